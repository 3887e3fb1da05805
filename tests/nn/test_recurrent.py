from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wngen.nn import WNGRU, WNLSTM, WNGRUCell, WNLinear, WNLSTMCell

PAIRS = {
    "lstm": (WNLSTM, nn.LSTM),
    "gru": (WNGRU, nn.GRU),
    "lstm-cell": (WNLSTMCell, nn.LSTMCell),
    "gru-cell": (WNGRUCell, nn.GRUCell),
}


@pytest.fixture(params=PAIRS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def twins(kind: str, **more: object) -> tuple[nn.Module, nn.Module, tuple[Tensor, object]]:
    """Our layer, torch's with the same effective weights, and an input with a state for both."""
    make, make_torch = PAIRS[kind]
    ours, theirs = make(3, 5, **more), make_torch(3, 5, **more)
    for part in ("ih", "hh"):
        for name, parameter in theirs.named_parameters():
            if part in name and "weight" in name:
                getattr(ours, part).set_weight(parameter)
            elif part in name:
                getattr(ours, part).bias.data = parameter.detach().clone()
    batch_first = more.get("batch_first", False)
    x = torch.randn(2, 3) if "cell" in kind else torch.randn(2, 7, 3) if batch_first else torch.randn(7, 2, 3)
    shape = (2, 5) if "cell" in kind else (1, 2, 5)
    h, c = torch.randn(shape), torch.randn(shape)
    return ours, theirs, (x, (h, c) if "lstm" in kind else h)


def gates(layer: WNLinear, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """What a map gives to each gate, by equation 2 of the paper."""
    weight = layer.g * layer.v / layer.v.square().sum(dim=1, keepdim=True).sqrt()
    return (x @ weight.T + layer.bias).chunk(count, dim=1)


def test_one_step_of_a_cell_by_its_equations():
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    lstm, gru = WNLSTMCell(3, 5), WNGRUCell(3, 5)
    for part in (lstm.ih, lstm.hh, gru.ih, gru.hh):
        part.g.data.uniform_(-2, 2)
    i, f, g, o = (a + b for a, b in zip(gates(lstm.ih, x, 4), gates(lstm.hh, h, 4), strict=True))
    next_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    torch.testing.assert_close(lstm(x, (h, c)), (o.sigmoid() * next_c.tanh(), next_c))
    (r, z, n), (hr, hz, hn) = gates(gru.ih, x, 3), gates(gru.hh, h, 3)
    reset, update = (r + hr).sigmoid(), (z + hz).sigmoid()
    torch.testing.assert_close(gru(x, h), (1 - update) * (n + reset * hn).tanh() + update * h)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_equals_torch_at_the_same_effective_weights(kind, bias, gain):
    ours, theirs, (x, state) = twins(kind, bias=bias)
    if gain == "exponential":
        exponential = PAIRS[kind][0](3, 5, bias=bias, gain=gain)
        for part in ("ih", "hh"):
            getattr(exponential, part).set_weight(getattr(ours, part).weight)
            if bias:
                getattr(exponential, part).bias = getattr(ours, part).bias
        ours = exponential
    torch.testing.assert_close(ours(x, state), theirs(x, state))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_batch_first(kind):
    ours, theirs, (x, state) = twins(kind, batch_first=True)
    torch.testing.assert_close(ours(x, state), theirs(x, state))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_sequence_is_the_steps_of_the_cell(kind):
    layer, _, (x, state) = twins(kind)
    cell = PAIRS[f"{kind}-cell"][0](3, 5)
    cell.load_state_dict(layer.state_dict(), strict=True)
    outputs, last = layer(x, state)
    step = tuple(part[0] for part in state) if kind == "lstm" else state[0]
    for t in range(len(x)):
        step = cell(x[t], step)
        torch.testing.assert_close(outputs[t], step[0] if kind == "lstm" else step)
    torch.testing.assert_close([part[0] for part in tree_leaves(last)], tree_leaves(step))


def test_gradients_reach_v_and_g_and_are_those_of_the_effective_weights(kind):
    ours, theirs, (x, state) = twins(kind)
    tree_leaves(ours(x, state))[0].square().sum().backward()
    tree_leaves(theirs(x, state))[0].square().sum().backward()
    for part in ("ih", "hh"):
        layer = getattr(ours, part)
        grad, grad_bias = (p.grad for name, p in theirs.named_parameters() if part in name)
        grad_g = (grad * layer.v).sum(dim=1, keepdim=True) / layer.v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.g.grad, grad_g, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((layer.v.grad * layer.v).sum(dim=1), torch.zeros(len(layer.v)), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.bias.grad, grad_bias)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_weights_are_normalized_once_for_a_sequence(kind, monkeypatch):
    layer, _, (x, _) = twins(kind)
    calls = []
    monkeypatch.setattr(WNLinear, "weight", property(lambda self: calls.append(self) or self.v))
    layer(x)
    assert len(calls) == 2


def test_starts_as_torch_does(kind):
    layer = PAIRS[kind][0](30, 64)
    for part in (layer.ih, layer.hh):
        torch.testing.assert_close(part.weight, part.v, rtol=1e-6, atol=1e-8)
        for parameter in (part.v, part.bias):
            assert 0.9 / 8 < parameter.abs().max() <= 1 / 8
            torch.testing.assert_close(parameter.std(), torch.tensor(1 / 8 / 3**0.5), rtol=0.1, atol=0)
        assert bool(part.initialized)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in PAIRS), ("lstm", {"batch_first": True}), ("gru", {"batch_first": True})],
)
def test_compiles_to_one_graph(kind, settings):
    layer, _, (x, state) = twins(kind, **settings)
    x = x[:, :2] if settings else x[:2]  # a sequence is unrolled
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, state), layer(x, state))
    grads = [
        torch.autograd.grad(tree_leaves(network(x, state))[0].square().sum(), list(layer.parameters()))
        for network in (compiled, layer)
    ]
    torch.testing.assert_close(*grads)


def test_deepcopy_and_pickle(kind):
    layer, _, (x, state) = twins(kind)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x, state), layer(x, state), rtol=0, atol=0)
