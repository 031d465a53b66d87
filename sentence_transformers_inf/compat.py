"""What this package takes from other packages although they do not document it; ``tests/test_compat.py`` checks each.

Public names serve wherever there are some. Of MTEB (2.26) nothing private is in use.
"""

from __future__ import annotations

# huggingface_hub 1.5 to 2.4: the class of what its HTTP client raises where the Hub cannot be reached. The client is httpx
# in 1.x and httpx2 in 2.x, and only this name is right for both. If it goes, an unreachable Hub is a traceback instead of
# one line.
from huggingface_hub.errors import HTTPError

__all__ = ["HTTPError"]
