from __future__ import annotations

import pytest
import torch

from wngen.precision import full_precision


def test_full_precision_ends_with_its_block():
    a = torch.randn(3, 3)
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(a.device):
            assert (a @ a).dtype == torch.float32
            assert conv.fp32_precision == "ieee"
        assert (a @ a).dtype == torch.bfloat16
    assert conv.fp32_precision == before
    with pytest.raises(ZeroDivisionError), full_precision(a.device):
        raise ZeroDivisionError
    assert conv.fp32_precision == before
