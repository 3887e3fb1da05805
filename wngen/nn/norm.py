"""Mean-only batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanOnlyBatchNorm(nn.Module):
    """x - mean + bias, with the mean of each channel over the batch: centres what a weight-normalized layer gives out.

    Gradients come back centred as well (equation 8). In eval mode a running mean stands for the batch's.
    Each process of a distributed run takes the mean of its own part of the batch.

    It makes the outputs for one image depend on the others, so that what a likelihood model in training
    mode reports would not be a density: it is for encoders and classifiers.

    Args:
        num_features: number of channels, the second dimension of the input.
        momentum: share of a new batch in the running mean.

    References:
        A simple reparameterization to accelerate training of deep neural networks (Salimans & Kingma,
        2016), section 4.
    """

    running_mean: Tensor
    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.tensor(False, device=device))

    def reset_parameters(self) -> None:
        """Bias and running mean 0, not yet initialized from data."""
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        self.initialized.fill_(False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to the same (equation 7).

        Raises:
            ValueError: another number of channels, or one value per channel in training mode, of which
                nothing would be left.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"the input has shape {tuple(x.shape)}, wanted (B, {self.num_features}, ...)")
        mean = self.running_mean
        if self.training:
            if x.numel() == self.num_features:
                raise ValueError(
                    f"an input of shape {tuple(x.shape)} is its own mean: train on more than one value per channel"
                )
            dims = [dim for dim in range(x.dim()) if dim != 1]
            mean = x.mean(dims, dtype=torch.promote_types(x.dtype, torch.float32))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        offset = (self.bias - mean).view(-1, *[1] * (x.dim() - 2))
        return (x + offset).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"
