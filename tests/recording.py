"""A stand-in for CUDA graphs: notes the operations of a step, with the very tensors they ran on, and repeats them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_A_VALUE = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Recorder(TorchDispatchMode):
    """Notes every operation; as on a GPU, none may wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS_A_VALUE, f"{func} cannot be captured"
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output


def recorded(step: Callable[[], Any]) -> Callable[[], Any]:
    """What a step does to the memory it uses, whatever has become of the numbers that Python saw meanwhile."""
    with Recorder() as recorder:
        output = step()

    def replay() -> Any:
        for func, args, kwargs, recorded_output in recorder.calls:
            if torch.Tag.inplace_view in func.tags or func.is_view:
                continue  # looks at memory that is written elsewhere
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded_output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
        return output

    return replay
