"""Whether code runs as it stands or is being traced."""

from __future__ import annotations

import torch


def being_traced() -> bool:
    """Whether `torch.compile` or a transform of `torch.func` is at work, which both want plain formulas."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
