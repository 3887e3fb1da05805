"""The runtime type checker of the tests: jaxtyping hands it every function and dataclass of wngen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float, as type checkers have it


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a call's arguments and result against their annotations, once it has returned.

    jaxtyping asks for two checks of each function: of the arguments before the call, and of the arguments
    and the result after it. Only the second is made, so that a value that wngen itself refuses gets
    wngen's own error, as it does outside the tests. Code that is being compiled is left alone.
    """
    if "ret0" not in function.__code__.co_varnames:  # where jaxtyping puts the result
        return function
    check = _check(function)

    @functools.wraps(function)
    def after_the_call(*args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            check(*args, **kwargs)

    return after_the_call
