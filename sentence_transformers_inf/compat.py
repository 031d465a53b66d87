"""Private or undocumented API of other packages that this one uses, all of it.

Each entry says in which version it was read, why it is needed, and what goes wrong without it. ``tests/test_compat.py``
checks each. Public names serve wherever there are some.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

# huggingface_hub 1.5 to 2.4: the class of what its HTTP client raises where the Hub cannot be reached. The client is httpx
# in 1.x and httpx2 in 2.x, and only this name is right for both. If it goes, an unreachable Hub is a traceback instead of
# one line.
from huggingface_hub.errors import HTTPError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# sentence-transformers 6.2: ``Transformer._load_model`` loads what stands in the place of a transformers model. It is
# overridden in modules/exported.py, because the host runs graphs through Optimum alone, which refuses the transformers that
# this package needs. If it goes, load_instruction_model(DIR, backend="onnx") finds no weights in the folder.

__all__ = ["HTTPError", "attention_of", "import_openvino"]


def attention_of(encoder: PreTrainedModel) -> str:
    """The name of the attention that an encoder uses (``"sdpa"``, ``"flash_attention_2"``, ...).

    transformers 5.6 to 5.23: ``set_attn_implementation`` is public, a way to read what is set is not. If it goes,
    training on a CPU fails at its start.
    """
    return str(encoder.config._attn_implementation)


def import_openvino() -> ModuleType:
    """Import OpenVINO and let it report to nobody.

    openvino 2026.4: importing it sends an event to its maker, unless the package ``openvino_telemetry`` is missing. If that
    changes, an export sends a request to the internet.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
