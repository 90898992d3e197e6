"""PyTorch's override protocol for the public functions: FX and other tracers see one call, not what is inside."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["overridable"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def overridable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give arguments that define `__torch_function__` (FX's proxies, tensor subclasses, modes) the call first."""

    @functools.wraps(function)
    def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return cast(_R, handle_torch_function(public, given, *args, **kwargs))
        return function(*args, **kwargs)

    return public
