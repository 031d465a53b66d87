"""Checkpoints to the Hugging Face Hub (``push``), their cards (``card``), and what it refuses in one line (``errors``)."""
