"""From the output of a network to the distribution of the pixels."""

from __future__ import annotations

from torch import Tensor

from wngen.distributions import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    PixelDistribution,
)
from wngen.image import ImageSpec


class PixelLikelihood:
    """What the channels of a network's output mean.

    Args:
        name: `bernoulli`, for two levels; `categorical`, a probability for each level of each sub-pixel; `mixture`, a
            `DiscretizedLogisticMixture`; `discretized_logistic`, whose scale is not predicted; or `auto`, which is
            `bernoulli` where that says all and else the last of `choices`.
        spec: of the images.
        choices: those that the model offers.
        dependent: whether channels of a pixel are predicted from each other by the network, so that a Bernoulli
            distribution for each of them says all.
        components: of the mixture.

    Attributes:
        name: which it is, never `auto`.
        outputs: channels that the network must have, P; those of one image channel lie side by side unless it is a
            mixture.

    Raises:
        ValueError: a likelihood that is not offered, or Bernoulli for other than two levels.
    """

    def __init__(
        self,
        name: str,
        spec: ImageSpec,
        choices: tuple[str, ...] = ("bernoulli", "mixture"),
        dependent: bool = False,
        components: int = 10,
    ) -> None:
        if name not in ("auto", *choices):
            raise ValueError(f"likelihood={name!r}: wanted one of auto, {', '.join(choices)}")
        if name == "auto":
            name = "bernoulli" if spec.levels == 2 and (dependent or spec.channels == 1) else choices[-1]
        if name == "bernoulli" and spec.levels != 2:
            raise ValueError(
                f"likelihood='bernoulli' is for levels=2, got levels={spec.levels}; take 'auto' or binarize"
            )
        self.name, self.spec = name, spec
        self.outputs = {
            "bernoulli": spec.channels,
            "categorical": spec.channels * spec.levels,
            "discretized_logistic": spec.channels,
            "mixture": DiscretizedLogisticMixture.parameters_per_pixel(components, spec.channels),
        }[name]

    def __call__(self, predicted: Tensor, log_scale: Tensor | None = None) -> PixelDistribution:
        """The distributions of pixels from `(B, P, H, W)`, and from the scale that discretized logistics share."""
        if self.name == "bernoulli":
            return Bernoulli(predicted)
        if self.name == "categorical":
            return Categorical(predicted.unflatten(1, (self.spec.channels, -1)).movedim(2, -1))  # (B, C, H, W, levels)
        if self.name == "discretized_logistic":
            assert log_scale is not None
            return DiscretizedLogistic(predicted, log_scale, self.spec.levels)
        return DiscretizedLogisticMixture.from_parameters(predicted, self.spec.channels, self.spec.levels)
