"""Modules that are saved under the class of the host that they extend.

Sentence Transformers writes the class of every module into ``modules.json`` and imports that class on loading. Our modules
have the weights and files of their hosts. Saved under the host's name, a folder loads on a machine without this package.
"""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_Class = TypeVar("_Class", bound=type[nn.Module])


def saved_as(host: type[nn.Module]) -> Callable[[_Class], _Class]:
    """Class decorator: what Sentence Transformers writes down of the class is ``host``.

    ``repr`` names the class itself, and pickling and copying find it where it is defined.

    Args:
        host: The class of Sentence Transformers that the decorated one extends.
    """

    def decorate(cls: _Class) -> _Class:
        place = cls.__module__, cls.__qualname__

        def __repr__(self: nn.Module) -> str:
            return host.__repr__(self).replace(host.__name__, place[1], 1)

        def __reduce__(self: nn.Module) -> tuple[Any, ...]:
            if type(self) is not cls:  # a class of somebody else's that extends ours
                return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]
            return _empty, place, self.__dict__

        cls.__repr__, cls.__reduce__ = __repr__, __reduce__  # type: ignore[method-assign, assignment]
        cls.__module__, cls.__name__ = host.__module__, host.__name__
        return cls

    return decorate


def _empty(module: str, name: str) -> nn.Module:
    """An instance without attributes, which unpickling fills."""
    cls: type[nn.Module] = getattr(importlib.import_module(module), name)
    return cls.__new__(cls)
