"""Calling asynchronous functions from synchronous ones, in notebooks too."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal

_Result = TypeVar("_Result")


def run_sync(function: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
    """Call an asynchronous function and wait for its result.

    Where the thread runs an event loop already, as in a notebook, the function gets a thread with a loop of its own; an
    interrupt cancels it there.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())
    call: Callable[[], Awaitable[_Result]] = function
    with start_blocking_portal() as portal:
        return portal.call(call)
