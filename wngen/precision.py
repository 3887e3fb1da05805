"""Whether arithmetic is done in the precision that tensors are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: convolutions in TF32, torch's default on a GPU, would make float32 a name only."""
    gpu: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    operations = [torch.backends.cuda.matmul, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn]
    precisions = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision
