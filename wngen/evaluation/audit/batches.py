"""Claims of every model: what an image's likelihood does not depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from wngen.evaluation.audit.claim import Measured, Specimen, claimed
from wngen.evaluation.audit.soundness import unlikely
from wngen.model import LikelihoodModel
from wngen.noise import Noise

ALONE = 4  # images that are also measured one by one
IMPORTANCE_SAMPLES = 2
DRAWN = 2


@claimed(
    "An image's likelihood does not depend on its batch",
    "nats",
    "Statistics of the batch leak into the likelihood: it is not that of an image, and changes with the batch size.",
    at_most=1e-6,
)
@torch.no_grad()
def batch_composition(specimen: Specimen) -> Measured:
    """Largest change from the whole batch to an image alone, in reverse order, and among other neighbours."""
    x, y, _ = specimen.first(len(specimen.x))
    index = torch.arange(len(x), device=x.device)
    whole = _nats(specimen, specimen.exact, x, y, index)
    differences = []

    def compare(kind: str, seen: Tensor, wanted: Tensor) -> None:
        differences.append((float((seen - wanted).abs().max().nan_to_num(torch.inf)), kind))

    for i in range(min(ALONE, len(x))):
        one = slice(i, i + 1)
        compare("alone", _nats(specimen, specimen.exact, x[one], _part(y, one), index[one]), whole[:, one])
    turned = index.flip(0)
    compare("in reverse order", _nats(specimen, specimen.exact, x[turned], _part(y, turned), turned), whole[:, turned])
    half, odd = (len(x) + 1) // 2, unlikely(specimen)
    others = torch.cat([x[:half], odd])
    _, labels = specimen.repeated(len(odd))
    labels = None if y is None or labels is None else torch.cat([y[:half], labels])
    places = torch.arange(len(others), device=x.device)
    among = _nats(specimen, specimen.exact, others, labels, places)
    compare("among unlikely images", among[:, :half], whole[:, :half])
    worst, kind = max(differences)
    return Measured(worst, f"alone, reversed, among unlikely images; most {kind}" if worst else "to the last bit")


@claimed(
    "The same seed gives the same, bit by bit",
    "values",
    "Likelihoods or samples take random numbers from elsewhere: no figure of this model can be had again.",
    at_most=0,
)
@torch.no_grad()
def determinism(specimen: Specimen) -> Measured:
    """Likelihoods and samples that differ between two runs, whatever state torch's global generator is in."""
    x, y, _ = specimen.first(len(specimen.x))
    index = torch.arange(len(x), device=x.device)
    _, labels = specimen.repeated(DRAWN)
    runs = []
    devices = [x.device] if x.is_cuda else []
    for state in (1, 2):
        with torch.random.fork_rng(devices):
            torch.manual_seed(state)
            nats = _nats(specimen, specimen.model, x, y, index)
            drawn = specimen.model.sample(DRAWN, labels, generator=specimen.generator())
            runs.append((nats, drawn))
    (nats, drawn), (again, drawn_again) = runs
    counts = int((nats != again).sum()), int((drawn != drawn_again).sum())  # NaN differs from itself
    detail = f"{counts[0]} of {nats.numel()} likelihoods, {counts[1]:,} of {drawn.numel():,} sub-pixels drawn"
    return Measured(sum(counts), detail)


@claimed(
    "Measuring changes neither images nor weights",
    "tensors",
    "A second measurement is not one of the same model and images.",
    at_most=0,
)
@torch.no_grad()
def untouched(specimen: Specimen) -> Measured:
    """Images, labels, parameters and buffers that differ after a forward pass, a likelihood and a sample."""
    model = specimen.model
    x, (_, y) = specimen.levels(2), specimen.repeated(2)
    before = {name: tensor.clone() for name, tensor in _tensors(model, x, y).items()}
    _nats(specimen, model, x, y, torch.arange(len(x), device=x.device))
    model.sample(1, None if y is None else y[:1], generator=specimen.generator())
    after = _tensors(model, x, y)
    changed = [
        name for name, tensor in before.items() if not torch.equal(tensor.nan_to_num(), after[name].nan_to_num())
    ]
    return Measured(len(changed), f"first of them {changed[0]}" if changed else f"of {len(before)}")


def _tensors(model: LikelihoodModel, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    named = {"images": x, **dict(model.named_parameters()), **dict(model.named_buffers())}
    return named if y is None else {"labels": y, **named}


def _part(y: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if y is None else y[rows]


def _nats(specimen: Specimen, model: LikelihoodModel, x: Tensor, y: Tensor | None, index: Tensor) -> Tensor:
    """`(2, B)`: what `forward` and what `log_likelihood` give."""
    forward = model(x, y, Noise(specimen.seed, index)).elbo_nats.double()
    best = model.log_likelihood(x, y, IMPORTANCE_SAMPLES, Noise(specimen.seed, index))
    return torch.stack([forward, best])
