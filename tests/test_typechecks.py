"""The type checks that the other tests rely on are really switched on."""

import pytest
import torch
from jaxtyping import TypeCheckError

from wngen import Bound, ImageSpec
from wngen.models import ConvVAE
from wngen.nn import WNLinear


def test_a_wrong_argument_that_nothing_else_catches_is_an_error():
    with pytest.raises(TypeCheckError, match=r"28\.0"):
        ImageSpec(1, 28.0, 28, 2)
    with pytest.raises(TypeCheckError, match="80"):
        Bound([80.0])


def test_a_function_raises_its_own_error_about_its_argument():
    with pytest.raises(ValueError, match="wanted 'linear' or 'exponential'"):
        WNLinear(2, 3, gain="cubic")


def test_an_int_may_stand_for_a_float():
    assert WNLinear(2, 3, init_scale=2).init_scale == 2


def test_compiled_code_is_still_one_graph():
    model = ConvVAE(channels=1, height=8, width=8, levels=2, widths=(4, 4), blocks=1, hidden=8)
    x = torch.randint(2, (4, 1, 8, 8), dtype=torch.uint8)
    encode = torch.compile(model.encode, backend="eager", fullgraph=True)
    torch.testing.assert_close(encode(x), model.encode(x))
