"""Recurrent layers with weight normalization.

Their gates, the order of the gates and their shapes are those of torch's layers. Every row of the input
weights and of the hidden weights has a norm of its own. Data-dependent initialization does not apply to
recurrent networks (Salimans & Kingma 2016, section 3): they start as torch's do, with g = ||v||.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wngen.nn.layers import Gain, WNLinear
from wngen.nn.tracing import being_traced


class WNRecurrent(nn.Module):
    """What recurrent layers share: weight-normalized maps of the input and of the hidden state to all gates.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether the gates have biases.
        gain: `linear` or `exponential` parameterization of g.
    """

    gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        gain: Gain = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.ih = WNLinear(input_size, self.gates * hidden_size, bias, gain, device=device, dtype=dtype)
        self.hh = WNLinear(hidden_size, self.gates * hidden_size, bias, gain, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights and biases uniform within 1 / sqrt(hidden_size), as torch's; no data initializes them."""
        bound = 1 / math.sqrt(self.hidden_size)
        for layer in (self.ih, self.hh):
            layer.set_weight(torch.empty_like(layer.v).uniform_(-bound, bound))
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound)
            layer.initialized.fill_(True)

    def weights(self) -> list[Tensor]:
        """The effective weights of the input and of the hidden state, and the biases of both if there are any."""
        biases = [layer.bias for layer in (self.ih, self.hh) if layer.bias is not None]
        return [self.ih.weight, self.hh.weight, *biases]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias}"


class WNLSTMCell(WNRecurrent):
    """`nn.LSTMCell` with weight normalization; arguments as of `WNRecurrent`."""

    gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`(B, input_size)` and the state (h, c), each `(B, hidden_size)`, to the next state; zeros by default."""
        zeros = x.new_zeros(len(x), self.hidden_size)
        return torch.lstm_cell(x, state or (zeros, zeros), *self.weights())


class WNGRUCell(WNRecurrent):
    """`nn.GRUCell` with weight normalization; arguments as of `WNRecurrent`."""

    gates = 3

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """`(B, input_size)` and the state `(B, hidden_size)` to the next state; zeros by default."""
        if state is None:
            state = x.new_zeros(len(x), self.hidden_size)
        return torch.gru_cell(x, state, *self.weights())


class _Sequence(WNRecurrent):
    """A recurrent layer that runs over a whole sequence, and normalizes its weights once for it."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        batch_first: bool = False,
        gain: Gain = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, gain, device, dtype)
        self.batch_first = batch_first

    def zeros(self, x: Tensor) -> Tensor:
        """The state that a sequence starts from by default, `(1, B, hidden_size)`."""
        return x.new_zeros(1, x.shape[0 if self.batch_first else 1], self.hidden_size)


class WNLSTM(_Sequence):
    """`nn.LSTM` of one layer and one direction with weight normalization.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether the gates have biases.
        batch_first: whether sequences are `(B, T, features)` and not `(T, B, features)`.
        gain: `linear` or `exponential` parameterization of g.
    """

    gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`(T, B, input_size)` and the state (h, c), each `(1, B, hidden_size)`, to all outputs and the last state."""
        h, c = state or (self.zeros(x), self.zeros(x))
        weights = self.weights()
        if not being_traced():
            output, h, c = torch.lstm(x, (h, c), weights, self.bias, 1, 0.0, self.training, False, self.batch_first)
            return output, (h, c)
        # torch.compile cannot take the kernel for CPUs apart, so here are its steps.
        h, c, time, outputs = h[0], c[0], int(self.batch_first), []
        for step in x.unbind(time):
            h, c = torch.lstm_cell(step, (h, c), *weights)
            outputs.append(h)
        return torch.stack(outputs, time), (h[None], c[None])


class WNGRU(_Sequence):
    """`nn.GRU` of one layer and one direction with weight normalization; arguments as of `WNLSTM`."""

    gates = 3

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(T, B, input_size)` and the state `(1, B, hidden_size)` to all outputs and the last state."""
        if state is None:
            state = self.zeros(x)
        return torch.gru(x, state, self.weights(), self.bias, 1, 0.0, self.training, False, self.batch_first)
