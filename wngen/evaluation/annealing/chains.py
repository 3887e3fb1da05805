"""Annealed importance sampling: a model's likelihood without its posterior, and how far off that can be.

The chains run in the space of the prior's own noise, where the prior of every model is the standard Gaussian however
its layers depend on each other: p(x) is the average of p(x | z(eps)) over standard normal eps. They see the decoder and
the prior alone, so that nothing in the posterior or in its density can make the result agree with a bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wngen.evaluation.annealing.annealed import Annealed, Sandwich
from wngen.evaluation.annealing.hamiltonian import ImageLikelihood, transition
from wngen.evaluation.processes import ALONE, Processes
from wngen.evaluation.rows import Rows, Tables, merged
from wngen.evaluation.running import FractionDone, device_name, first_weight, parts, prepared, reported
from wngen.image import Batch
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel, at_least
from wngen.noise import Noise, derived_seed

SHARPNESS = 4.0  # of the sigmoid that temperatures follow, as in the references
TARGET_ACCEPTANCE = 0.65  # at which Hamiltonian Monte Carlo moves furthest for its cost (Beskos et al., 2013)
PILOT_CHAINS, PILOT_STEPS, PILOT_RATE = 4, 100, 0.2  # of the preliminary run that finds step sizes


@torch.no_grad()
def annealed_importance_sampling(
    model: LikelihoodModel,
    batches: Iterable[Batch],
    images: int,
    steps: int,
    chains: int = 16,
    leapfrog_steps: int = 10,
    seed: int = 0,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | FractionDone = False,
    processes: Processes = ALONE,
) -> Annealed:
    """Estimate the log-likelihood of each image of a data set by chains from the prior to the posterior.

    At temperature beta a chain's target is p(z) p(x | z)^beta. Its transitions are those of Hamiltonian Monte Carlo,
    whose step sizes, for each image and temperature, come from a preliminary run with other noise: those of a chain
    that is counted depend on nothing in it, so that its weight is unbiased. The noise of a chain follows from the seed
    and the index of its image. The result depends on batches, chunks and processes by rounding alone; long chains
    amplify that until, in single precision, two runs differ as two seeds do.

    Args:
        model: with latent variables.
        batches: the images with their indices, in any order; labels are used if the model is conditioned on them. Of
            several processes each has its own.
        images: how many there must be, over all processes.
        steps: from the prior to the posterior. The error falls with their number, the time grows with it; 1 is
            importance sampling from the prior.
        chains: for each image.
        leapfrog_steps: of each transition.
        seed: of the noise.
        chunk: chains that go through the model at once; it bounds the memory. By default what the model says.
        device: where to run; where the model is by default.
        progress: whether to show a bar with the remaining time; or what to call with the fraction done.
        processes: that share the images. Each gets the figures of all.

    Raises:
        ValueError: a model without latent variables; an index missing or repeated, or a value that is not finite, whose
            index the message names.
        TypeError: images that are not of integer levels.

    References:
        Annealed importance sampling (Neal, 2001); On the quantitative analysis of decoder-based generative models
        (Wu et al., 2017), section 4.
    """
    started = time.perf_counter()
    annealing = _Annealing.of(model, steps, chains, leapfrog_steps, seed, chunk)
    at_least(1, images=images)
    rows = Rows(images)
    with prepared(model, device) as home, reported(progress, images / processes.count, "annealing") as advance:
        for batch in batches:
            rows.claim(batch)
            for x, y, index in parts(batch, annealing.images_at_once, model, home):
                annealing.model.spec.scale(x)  # refuses what are no images of the model's
                likelihood = ImageLikelihood(annealing.model, x, y, annealing.chunk, annealing.share(advance))
                annealing.forward(likelihood, index, annealing.step_sizes(likelihood, index), rows)
    tables = merged(processes.gather(rows.tables()), images)
    return annealing.result(tables, home, started)


@torch.no_grad()
def bidirectional_monte_carlo(
    model: LikelihoodModel,
    images: int,
    steps: int,
    chains: int = 16,
    leapfrog_steps: int = 10,
    seed: int = 0,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | FractionDone = False,
    processes: Processes = ALONE,
) -> Sandwich:
    """Bound the error of annealed importance sampling on images that the model draws.

    Of such an image the latents are known, and are an exact draw from its posterior: from there chains run back to the
    prior. A model that is conditioned on classes draws images of all classes in turn.

    Args:
        model: with latent variables.
        images: how many to draw, over all processes.
        steps: see `annealed_importance_sampling`, as for all that follow.
        chains: for each image and direction.
        leapfrog_steps: of each transition.
        seed: of the images and the noise.
        chunk: chains that go through the model at once.
        device: where to run.
        progress: whether to show a bar; or what to call with the fraction done.
        processes: that share the images.

    Raises:
        ValueError: a model without latent variables, or a value that is not finite.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse et al., 2015), section 4.
    """
    started = time.perf_counter()
    annealing = _Annealing.of(model, steps, chains, leapfrog_steps, seed, chunk)
    at_least(1, images=images)
    lower, upper = Rows(images), Rows(images)
    with prepared(model, device) as home, reported(progress, images / processes.count, "annealing") as advance:
        own = torch.arange(images)[processes.rank :: processes.count]
        for index in own.split(annealing.images_at_once) if len(own) else ():
            batch, eps = simulated(annealing.model, index.to(home), seed)
            x, y, index = batch.image, batch.label, batch.index
            share = annealing.share(advance, directions=2)
            likelihood = ImageLikelihood(annealing.model, x, y, annealing.chunk, share)
            step_sizes = annealing.step_sizes(likelihood, index)
            annealing.forward(likelihood, index, step_sizes, lower)
            annealing.reverse(likelihood, index, step_sizes, eps, upper)
    tables = [merged(processes.gather(rows.tables()), images) for rows in (lower, upper)]
    results = [annealing.result(table, home, started) for table in tables]
    return Sandwich(results[0], replace(results[1], is_reverse=True))


def simulated(model: LatentVariableModel, index: Tensor, seed: int = 0) -> tuple[Batch, Tensor]:
    """Images that the model draws, those of `(B,)` indices, and the prior's noise `(B, Z)` that they come from."""
    noise = Noise(derived_seed(seed, "simulated images"), index)
    eps = noise.normal(_latents(model)).to(first_weight(model))
    y = None if model.num_classes is None else index % model.num_classes
    pixels = model.decode(model.prior_at(eps, y), y)
    uniform = noise.uniform(pixels.uniforms, model.spec.height, model.spec.width)
    return Batch(pixels.draw(uniform.to(eps)), y, index), eps


def temperatures(steps: int) -> NDArray[np.float64]:
    """beta from 0 to 1, `(steps + 1,)`: equal steps of a sigmoid's argument, short ones at both ends."""
    sigmoid = 1 / (1 + np.exp(-SHARPNESS * np.linspace(-1, 1, steps + 1)))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


@dataclass(frozen=True)
class _Annealing:
    """How chains run between prior and posterior; see `annealed_importance_sampling`."""

    model: LatentVariableModel
    steps: int
    chains: int
    leapfrog_steps: int
    seed: int
    chunk: int

    @classmethod
    def of(
        cls, model: LikelihoodModel, steps: int, chains: int, leapfrog_steps: int, seed: int, chunk: int | None
    ) -> _Annealing:
        if not isinstance(model, LatentVariableModel):
            raise ValueError(
                f"{type(model).__name__} has no latent variables to anneal: its likelihood is exact; use `evaluate`"
            )
        chunk = model.chunk if chunk is None else chunk
        at_least(1, steps=steps, chains=chains, leapfrog_steps=leapfrog_steps, chunk=chunk)
        return cls(model, steps, chains, leapfrog_steps, seed, chunk)

    @property
    def images_at_once(self) -> int:
        """So many that their chains fill the model."""
        return max(1, self.chunk // self.chains)

    def share(self, advance: Callable[[float], None], directions: int = 1) -> Callable[[int], None]:
        """What to call with the number of chains that went through the model; it tells how many images that makes."""
        whole = directions * self.chains * (1 + (self.steps - 1) * self.leapfrog_steps)
        if self.steps > 1:
            whole += PILOT_CHAINS * (1 + (PILOT_STEPS - 1) * self.leapfrog_steps)
        return lambda chains: advance(chains / whole)

    def step_sizes(self, likelihood: ImageLikelihood, index: Tensor) -> Tensor:
        """`(steps - 1, B)`, for each temperature between prior and posterior and each image.

        They are found at fewer temperatures and interpolated.
        """
        z = _latents(self.model)
        log_step = torch.full((len(index),), -0.25 * math.log(z), dtype=torch.float64, device=index.device)
        if self.steps == 1:
            return log_step.new_empty(0, len(index))
        noise = Noise(derived_seed(self.seed, "step sizes"), index).repeat(range(PILOT_CHAINS))
        at, found = likelihood.at(noise.normal(z).to(first_weight(self.model))), []
        for beta in temperatures(PILOT_STEPS)[1:-1].tolist():
            step_size = log_step.exp().repeat(PILOT_CHAINS)
            at, probability = transition(likelihood, at, beta, step_size, noise, self.leapfrog_steps)
            accepted = probability.view(PILOT_CHAINS, -1).mean(dim=0)
            log_step = log_step + PILOT_RATE * (accepted - TARGET_ACCEPTANCE)
            found.append(log_step)
        place = torch.arange(1, self.steps, dtype=torch.float64) / self.steps * PILOT_STEPS - 1
        place = place.clamp(0, len(found) - 1).to(index.device)
        table, before = torch.stack(found), place.long()
        after = (before + 1).clamp(max=len(found) - 1)
        return table[before].lerp(table[after], (place - before)[:, None]).exp()

    def forward(self, likelihood: ImageLikelihood, index: Tensor, step_sizes: Tensor, rows: Rows) -> None:
        """Run from the prior and put the lower bounds into rows."""
        noise = Noise(derived_seed(self.seed, "forward chains"), index).repeat(range(self.chains))
        start = noise.normal(_latents(self.model)).to(first_weight(self.model))
        log_weight, acceptance = self._run(likelihood, start, temperatures(self.steps), step_sizes, noise)
        self._put(rows, index, self._log_mean(log_weight), log_weight, acceptance)

    def reverse(self, likelihood: ImageLikelihood, index: Tensor, step_sizes: Tensor, eps: Tensor, rows: Rows) -> None:
        """Run from draws from the posterior `(B, Z)` and put the upper bounds into rows."""
        noise = Noise(derived_seed(self.seed, "reverse chains"), index).repeat(range(self.chains))
        falling = temperatures(self.steps)[::-1]
        start = eps.repeat(self.chains, 1)
        log_weight, acceptance = self._run(likelihood, start, falling, step_sizes.flip(0), noise)
        self._put(rows, index, -self._log_mean(log_weight), log_weight, acceptance)

    def _run(
        self, likelihood: ImageLikelihood, start: Tensor, betas: NDArray[np.float64], step_sizes: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Anneal noise `(k b, Z)` from the first temperature to the last: log weights and mean acceptance `(k b,)`."""
        at = likelihood.at(start)
        log_weight = (betas[1] - betas[0]) * at.log_likelihood
        refused = torch.zeros_like(log_weight)
        for beta, change, step_size in zip(betas[1:-1].tolist(), np.diff(betas)[1:].tolist(), step_sizes, strict=True):
            at, probability = transition(
                likelihood, at, beta, step_size.repeat(self.chains), noise, self.leapfrog_steps
            )
            log_weight, refused = log_weight + change * at.log_likelihood, refused + (1 - probability)
        return log_weight, 1 - refused / max(1, self.steps - 1)

    def _log_mean(self, log_weight: Tensor) -> Tensor:
        """Of weights `(k b,)` over chains, `(B,)`."""
        return log_weight.view(self.chains, -1).logsumexp(dim=0) - math.log(self.chains)

    def _put(self, rows: Rows, index: Tensor, bound: Tensor, log_weight: Tensor, acceptance: Tensor) -> None:
        effective = 2 * self._log_mean(log_weight) - self._log_mean(2 * log_weight)
        rows.put(index, "log_likelihood_nats", bound)
        rows.put(index, "effective_chains", self.chains * effective.exp())
        rows.put(index, "acceptance", acceptance.view(self.chains, -1).mean(dim=0))

    def result(self, tables: Tables, device: torch.device, started: float) -> Annealed:
        return Annealed(
            **tables,
            steps=self.steps,
            chains=self.chains,
            leapfrog_steps=self.leapfrog_steps,
            is_reverse=False,
            seed=self.seed,
            dtype=str(first_weight(self.model).dtype).removeprefix("torch."),
            device=device_name(device),
            wall_seconds=time.perf_counter() - started,
        )


def _latents(model: LatentVariableModel) -> int:
    """Z, of all layers."""
    return sum(math.prod(shape) for shape in model.latent_shapes)
