"""Private or undocumented API of the libraries this package builds on, all of it, each with the version it was read in, why
it is needed, and a test in ``tests/test_compat.py`` that says what changed when it breaks."""

from __future__ import annotations

from transformers import PreTrainedModel


def attention_of(encoder: PreTrainedModel) -> str:
    """The name of the attention that an encoder uses (``"sdpa"``, ``"flash_attention_2"``, ...).

    transformers 5.23: ``config._attn_implementation``. ``set_attn_implementation`` is public, a way to read it is not.
    """
    return str(encoder.config._attn_implementation)
