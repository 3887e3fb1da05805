"""The audit of a model: each of its claims is measured, none is taken on trust."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch

from wngen.evaluation.audit import (
    batches,
    bounds,
    causality,
    decoding,
    flows,
    probabilities,
    samples,
    soundness,
)
from wngen.evaluation.audit.claim import Claim, Finding, Specimen
from wngen.evaluation.audit.verdict import Audit
from wngen.evaluation.report import weights_sha256
from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.precision import full_precision

CLAIMS: tuple[Claim, ...] = (
    soundness.finite_weights,
    soundness.initialized,
    soundness.finite_likelihoods,
    soundness.at_most_certain,
    soundness.agreement,
    batches.batch_composition,
    batches.determinism,
    batches.untouched,
    causality.causality,
    causality.poisoned_future,
    causality.neighbours,
    causality.receptive_field,
    decoding.decoder_is_forward,
    decoding.decoder_likelihood,
    probabilities.level_probabilities,
    probabilities.pixel_probabilities,
    probabilities.image_probabilities,
    probabilities.estimated_image_probabilities,
    flows.log_determinant,
    flows.triangularity,
    flows.invertibility,
    flows.determinant_in_rate,
    flows.prior_density,
    bounds.exact_samples,
    bounds.rising_bounds,
    bounds.closed_form,
    samples.sample_form,
    samples.surprise,
    samples.brightness,
    samples.simulated_bound,
)

__all__ = ["CLAIMS", "Audit", "Claim", "Finding", "Specimen", "audit"]


def audit(
    model: LikelihoodModel,
    images: Batch,
    seed: int = 0,
    claims: Sequence[Claim] = CLAIMS,
    watch: Callable[[Claim], None] | None = None,
) -> Audit:
    """Measure the claims that a model makes, through its contract and what it is built from.

    It works on copies in eval mode, without autocast or TF32: the model stays as it is.

    Args:
        model: any model.
        images: that it takes, with labels if it is conditioned on them; two at least, such as 16 of a test set.
        seed: of all random numbers.
        claims: which to measure; those that a model does not make are left out.
        watch: is told of each claim before it is measured.

    Raises:
        ValueError: fewer than two images, whose figures say nothing of their spread; images or labels that the model
            does not take.
    """
    if len(images.image) < 2:
        raise ValueError(f"{len(images.image)} image: an audit needs at least 2, such as 16")
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    model.spec.scale(images.image.cpu())  # which checks it
    y = None if model.num_classes is None or images.label is None else images.label.to(device)
    model.check_labels(y, len(images.image))
    started = time.perf_counter()
    own, exact = (copy.deepcopy(model).eval().requires_grad_(False) for _ in range(2))
    exact = exact.double().to(memory_format=torch.contiguous_format)  # in which convolutions of doubles are faster
    specimen = Specimen(own, exact, images.image.to(device, copy=True), y, images.index.to(device), seed)
    findings = []
    with full_precision(device):
        for claim in claims:
            if watch is not None:
                watch(claim)
            if (finding := claim.check(specimen)) is not None:
                findings.append(finding)
    protocol = {
        "images": len(images.image),
        "index": images.index.tolist(),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "weights_sha256": weights_sha256(model),
        "versions": {name: version(name) for name in ("wngen", "torch")},
        "wall_seconds": time.perf_counter() - started,
    }
    return Audit(model.config, protocol, tuple(findings))
