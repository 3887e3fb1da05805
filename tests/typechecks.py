"""The runtime type checker of the tests: jaxtyping hands it every function and dataclass of wngen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float, as type checkers have it

# torch.compile would trace the checks along with the code, and break the graph at each.
type(jaxtyping.config).jaxtyping_disable = property(lambda _: torch.compiler.is_compiling())


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a call's arguments and result against their annotations, once it has returned.

    jaxtyping asks for two checks of each function: of the arguments before the call, and of the arguments
    and the result after it. Only the second is made, so that a value that wngen itself refuses gets
    wngen's own error, as it does outside the tests.
    """
    checks_the_result = "ret0" in function.__code__.co_varnames  # where jaxtyping puts it
    return _check(function) if checks_the_result else function
