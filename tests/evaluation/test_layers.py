"""Layers have names that sort, and a unit is active if it tells images apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wngen.evaluation import active_units, by_resolution, layer_names, layer_title
from wngen.image import Batch
from wngen.models import ConvVAE


def test_names_sort_in_order_and_tell_the_resolution():
    names = layer_names([(32, 7, 6)] * 9 + [(32, 14, 12), (5,)])
    assert names[0] == "layer_01_7x6"
    assert names[9:] == ("layer_10_14x12", "layer_11")
    assert sorted(names) == list(names)
    assert [layer_title(name) for name in names[8:]] == ["layer 9, 7x6", "layer 10, 14x12", "layer 11"]
    assert layer_names([(3,)]) == ("layer_1",)


def test_resolutions_gather_their_layers_where_that_tells_something_new():
    names = layer_names([(3, 7, 6), (3, 14, 12), (3, 14, 12)])
    assert by_resolution(names) == {"7x6": names[:1], "14x12": names[1:]}
    assert by_resolution(names[1:]) == {}  # one resolution: the whole rate
    assert by_resolution(names[:2]) == {}  # one layer at each
    assert by_resolution(layer_names([(3,), (4,)])) == {}


class Known(ConvVAE):
    """The centre of the posterior is the number of the image times 1, 0.01 and 0, and a large constant."""

    def represent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert (y is None) == (self.num_classes is None)
        number = x.flatten(1)[:, :1].float()
        return torch.cat([0.01 * number, number, 0 * number, 1000 + 0.1 * number], dim=1)


def batches(size: int) -> list[Batch]:
    x = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 1, 6, 5)
    parts = torch.arange(10).split(size)
    return [Batch(x[part], torch.zeros(len(part), dtype=torch.int64), part) for part in parts]


@pytest.mark.parametrize("num_classes", [None, 3])
def test_units_that_vary_over_the_images_are_counted_for_each_layer(num_classes: int | None):
    model = Known(1, 6, 5, 256, latent_dim=4, widths=(4,), blocks=1, hidden=8, iaf_width=8, num_classes=num_classes)
    model.latent_shapes = ((1, 1, 2), (2,))
    for size in (3, 10):
        assert active_units(model, batches(size)) == (1, 1)
        # The variance of 0 to 9 is 8.25.
        assert active_units(model, batches(size), threshold=0.00082) == (2, 1)
        assert active_units(model, batches(size), threshold=0.00083) == (1, 1)
        assert active_units(model, batches(size), threshold=0.083) == (1, 0)


def test_one_image_does_not_vary():
    model = Known(1, 6, 5, 256, latent_dim=4, widths=(4,), blocks=1, hidden=8, iaf_width=8)
    with pytest.raises(ValueError, match="active units of 1 images: wanted at least 2"):
        active_units(model, batches(1)[:1])
