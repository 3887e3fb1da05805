"""How large a batch pays: the gradient noise scale, measured while training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from rich import get_console
from torch import Tensor, nn

from wngen.image import Batch
from wngen.noise import derived_seed
from wngen.training.gradient_noise import Blocks, GradientNoise, PartSums, RunningNoise
from wngen.training.module import Training


class NoiseScale(pl.Callback):
    """Measures the gradient noise scale B_simple = tr(Sigma) / |G|^2, of the model and of each of its blocks.

    Well below it, a batch of twice the size needs half the steps; well above, nearly as many, so that more devices buy
    little. It is logged as `noise_scale/total` and `noise_scale/<block>` in images, beside `covariance_trace/...` and
    `squared_gradient/...`: means over the last `window` measurements, and the ratio of them.

    Now and then the gradients of parts of the batch at hand are computed besides what training does: of the ranks'
    shares where there are several processes, of the micro-batches where gradients are accumulated, and where these are
    fewer than `parts`, of pieces of them. Training takes the same path to the last bit with and without it, under any
    precision and strategy that is not refused. With 4 parts a measurement takes as long as two or three steps, with 8
    nearly four.

    What is differentiated is the objective of this step, with its noise and the weight of its rate, as the mean over
    a part. Which groups of latents are below their free bits the mean over the whole batch decides, as in training: a
    floor under each part's own mean would be another objective. So the mean of the parts' gradients is the step's own,
    before it is clipped. A step that is left out is not measured, nor one whose gradient is not finite, nor an
    epoch's last window of micro-batches where it has but one part. Layers that mix
    the images of a batch, such as `MeanOnlyBatchNorm`, see a part alone.

    B_simple takes all directions to be curved alike and the optimizer to be plain gradient descent. For the VAE of the
    paper it is 20 times below the critical batch size measured from whole runs (table 1: 10 and 200, averages over
    training). `wngen critical-batch` does the latter.

    Args:
        every_n_steps: how often to measure, in optimizer steps.
        parts: how many parts a batch is to consist of, over all processes and micro-batches; more of them make
            a measurement less noisy, and on a GPU slower.
        window: over how many measurements the means are; more of them make a smoother curve, which lags further behind
            training.

    Raises:
        ValueError: an argument out of range; or, when training begins, a strategy that splits up parameters; or, when
            it is to measure, a batch of one image.

    References:
        An Empirical Model of Large-Batch Training (McCandlish et al., 2018), section 2.2 and appendix A.1.
    """

    def __init__(self, every_n_steps: int = 50, parts: int = 4, window: int = 10) -> None:
        if every_n_steps < 1 or parts < 2 or window < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps}, parts={parts}, window={window}: wanted at least 1 step, at least 2 "
                "parts, and a window of at least 1 measurement"
            )
        self.every_n_steps, self.parts = every_n_steps, parts
        self.running = RunningNoise(window)
        self._blocks: Blocks | None = None
        self._sums: PartSums | None = None  # of the step that is being measured
        self._measured: dict[str, GradientNoise] = {}  # of it, before it is known whether the step is left out
        self._skipped = 0  # steps before it that were left out
        self._images = 0  # of the batch, over all processes and micro-batches

    @property
    def averages(self) -> dict[str, GradientNoise]:
        """Of each block, and of `total`."""
        return self.running.averages()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"NoiseScale with {type(trainer.strategy).__name__}: wanted whole gradients in every process, as with "
                "strategy=ddp; leave the callback out, or measure in a short run under ddp"
            )
        assert isinstance(pl_module, Training)
        self._blocks, self._sums, self._measured = Blocks(pl_module.model), None, {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Training)
        assert self._blocks is not None
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        if self._sums is None:
            self._sums, self._images = PartSums(self._blocks), 0
        self._images += len(batch.index) * trainer.world_size
        shares = trainer.world_size * trainer.accumulate_grad_batches
        self._add_parts(trainer, pl_module, batch, -(-self.parts // shares), batch_idx)

    def _add_parts(self, trainer: pl.Trainer, training: Training, batch: Batch, parts: int, batch_idx: int) -> None:
        """Add the gradients of the objective for the parts of a micro-batch."""
        assert self._sums is not None
        options, step, draw = training.options, trainer.global_step, trainer.global_step + 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())  # without it small gradients in fp16 become 0
        whole = torch.empty(0)  # of each group of latents the mean over the micro-batch in all processes

        def over_processes(mean: Tensor) -> Tensor:
            nonlocal whole
            whole = trainer.strategy.reduce(mean.clone(), reduce_op="mean")
            return whole

        # Where the model is compiled, parts of another size would have it compiled again, and training change with it.
        eager = torch.compiler.set_stance("force_eager") if options["compiled"] else nullcontext()
        with _undisturbed(training.model, training.device), eager:
            torch.manual_seed(derived_seed(options["seed"], "noise_scale", step, trainer.global_rank, batch_idx))
            context = trainer.precision_plugin.train_step_context
            if options["free_bits"]:
                with torch.no_grad(), context():
                    training.objective_nats(training(batch, draw), over_processes)
            for index in torch.arange(len(batch.index), device=batch.index.device).tensor_split(parts):
                if len(index):
                    label = None if batch.label is None else batch.label[index]
                    part = Batch(batch.image[index], label, batch.index[index])
                    with context():
                        loss = training.objective_nats(training(part, draw), lambda _: whole)
                    # Unlike `backward` it leaves .grad alone, and with it the hooks that DDP's all-reduce hangs on.
                    gradients = torch.autograd.grad(loss * scale, self._sums.blocks.parameters, materialize_grads=True)
                    if scaler is not None:
                        gradients = torch._foreach_div(gradients, scale)
                    self._sums.add(len(index), gradients)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Training)
        if self._sums is None:
            return
        self._measured, self._sums = self._sums.estimate(lambda t: _summed(trainer, t)), None
        self._skipped = pl_module.skips.total
        if self._images < 2:
            raise ValueError(
                f"NoiseScale at step {trainer.global_step}: a batch of {self._images} image has no parts; wanted at "
                "least 2 images over all processes and micro-batches"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Training)
        measured, self._measured = self._measured, {}
        if not measured or pl_module.skips.total > self._skipped:
            return
        if math.isfinite(measured["total"].covariance_trace):
            self.running.add(measured)
            self._log(trainer, trainer.global_step - 1)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        figures = {}
        for name, noise in self.averages.items():
            figures[f"noise_scale/{name}"] = noise.noise_scale
            figures[f"covariance_trace/{name}"] = noise.covariance_trace
            figures[f"squared_gradient/{name}"] = noise.squared_gradient
        for logger in trainer.loggers:
            logger.log_metrics(figures, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            get_console().print(self.verdict(), soft_wrap=True, markup=False)

    def verdict(self) -> str:
        """What the measurements say of the number of devices, in a sentence."""
        if not self.running.count:
            return f"The gradient noise scale was not measured: no step fell due by every_n_steps={self.every_n_steps}."
        scale, count = self.averages["total"].noise_scale, self.running.count
        measurements = "measurement" if count == 1 else f"{count} measurements"
        if 0 < scale < math.inf:
            digits = max(0, 1 - math.floor(math.log10(scale)))
            told = f"beyond a batch of about {scale:,.{digits}f} images more devices buy little"
        else:
            told = "the gradient drowns in its noise, and no batch was too large to pay"
        return (
            f"Gradient noise scale, over the last {measurements}, with batches of {self._images:,} images: {told}"
            "; but B_simple is a rough estimate, for VAEs up to 20 times too low (McCandlish et al. 2018, table 1): "
            "`wngen critical-batch` measures it from several runs."
        )

    def state_dict(self) -> dict[str, Any]:
        return {**self.running.state_dict(), "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.running.load_state_dict(state_dict)
        self._images = state_dict["images"]


def _summed(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    reduced = trainer.strategy.reduce(tensor, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes through the model that leave its buffers, and torch's generators, as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
