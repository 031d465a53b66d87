"""Put a model where others serve embeddings: :func:`export_model` writes what those servers load."""

from sentence_transformers_inf.export.export import FORMATS, check_format, export_model

__all__ = ["FORMATS", "check_format", "export_model"]
