"""The LightningModule that trains every model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from wngen.evaluation import by_resolution, layer_names
from wngen.image import Batch
from wngen.latent import LatentVariableModel
from wngen.model import Bound, LikelihoodModel
from wngen.nn import data_dependent_init
from wngen.noise import Noise, derived_seed
from wngen.training.adamax import CompiledAdamax
from wngen.training.ema import EMA
from wngen.training.objective import FreeBitsGroup, objective_nats
from wngen.training.schedule import Decay, learning_rate_factor
from wngen.training.skips import Skips


class Training(pl.LightningModule):
    """Trains a likelihood model by gradient descent on its bound.

    Random numbers are those of (seed, step, image), so that the path does not depend on how the images are
    spread over batches and processes, nor on whether training was interrupted.

    Args:
        model: what to train.
        optimizer: `adam` (fused where the device allows) or `adamax` (in one pass if the model is compiled).
        learning_rate: after warm-up.
        betas: decay of the optimizer's first and second moments.
        warmup_steps: over which the learning rate rises from 0.
        decay: how it falls after that: `constant`, `linear` or `cosine` to 0 at the end of training, or
            `exponential` by `decay_rate` at each step.
        decay_rate: of the exponential decay, a factor such as 0.999995 per step.
        free_bits: floor of each group's rate in the objective, in nats.
        free_bits_per: what a group is, a stochastic `layer` or a `channel` of it.
        kl_warmup_steps: over which the weight of the rate in the objective rises to 1.
        ema_decay: of the weights' moving average, used for validation, test and release; 0 for none.
        clip_norm: gradients of a larger norm are scaled down to it.
        skip_norm: a step whose gradient norm is above it, or not finite, is left out and counted.
        give_up_after: so many left-out steps in a row end the training with an error.
        init_images: so many training images, the same in every run on this data, initialize the layers; 0
            keeps the default init.
        channels_last: lay images out with the channels innermost, which convolutions are faster on.
        compiled: run the model through `torch.compile`; worth its minutes in long runs.
        seed: of the noise.

    Raises:
        ValueError: arguments out of range; the message says which.
    """

    def __init__(
        self,
        model: LikelihoodModel,
        optimizer: Literal["adam", "adamax"] = "adam",
        learning_rate: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 200,
        decay: Decay = "constant",
        decay_rate: float = 0.999995,
        free_bits: float = 0.0,
        free_bits_per: FreeBitsGroup = "channel",
        kl_warmup_steps: int = 0,
        ema_decay: float = 0.999,
        clip_norm: float = 100.0,
        skip_norm: float = 1e6,
        give_up_after: int = 100,
        init_images: int = 256,
        channels_last: bool = True,
        compiled: bool = False,
        seed: int = 0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "model", "__class__")}
        super().__init__()
        self.options: dict[str, Any] = {**arguments, "betas": list(betas)}  # plain types, for the checkpoint
        if learning_rate <= 0 or clip_norm <= 0 or skip_norm <= 0:
            raise ValueError(
                f"learning_rate={learning_rate}, clip_norm={clip_norm}, skip_norm={skip_norm}: all must be positive"
            )
        if free_bits < 0 or min(warmup_steps, kl_warmup_steps, init_images) < 0 or give_up_after < 1:
            raise ValueError(
                f"free_bits={free_bits}, warmup_steps={warmup_steps}, kl_warmup_steps={kl_warmup_steps}, "
                f"init_images={init_images} must not be negative, nor give_up_after={give_up_after} below 1"
            )
        choices = {
            "optimizer": (optimizer, ("adam", "adamax")),
            "decay": (decay, get_args(Decay)),
            "free_bits_per": (free_bits_per, get_args(FreeBitsGroup)),
        }
        for name, (seen, wanted) in choices.items():
            if seen not in wanted:
                raise ValueError(f"{name}={seen!r}: wanted one of {', '.join(wanted)}")
        self.model = model
        self.ema = EMA(ema_decay)
        self.skips = Skips(skip_norm, give_up_after)
        layers = layer_names(model.latent_shapes) if isinstance(model, LatentVariableModel) else ()
        self._layers = layers if len(layers) > 1 else ()  # of one layer it is the rate
        self._figure_names = [
            "elbo_nats",
            "distortion_nats",
            "rate_nats",
            *(f"kl_nats/{name}" for name in self._layers),
        ]
        self._totals = self._no_totals()
        self._parts: list[Tensor] = []  # figures of the micro-batches so far of a step that is logged

    # Initialization and what goes along

    def configure_callbacks(self) -> list[pl.Callback]:
        return [self.ema]

    def setup(self, stage: str) -> None:
        resumes = self.trainer.ckpt_path is not None
        if stage == "fit" and self.options["init_images"] and not resumes:
            data_module = getattr(self.trainer, "datamodule", None)
            if data_module is None:
                raise ValueError(
                    "data-dependent init needs a data module: pass trainer.fit(training, datamodule=...), or call "
                    "wngen.nn.data_dependent_init(model, images) yourself and set init_images=0"
                )
            count = min(self.options["init_images"], data_module.size("train"))
            self.initialize(next(iter(data_module.evaluation_batches("train", count, limit=count))))
        if isinstance(self.trainer.strategy, DDPStrategy) and not self._has_state_besides_weights():
            # DDP would send masks to all processes at every step.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.trainer.strategy._ddp_kwargs.setdefault(name, False)
        if self.options["channels_last"]:
            self.model.to(memory_format=torch.channels_last)
        if self.options["compiled"] and stage == "fit":
            self.model.compile()

    def _has_state_besides_weights(self) -> bool:
        """Whether steps may change buffers of the model, such as running means."""
        weights = {name for name, _ in self.model.named_parameters()}
        return any(name.rpartition(".")[2] != "initialized" for name in self.model.state_dict().keys() - weights)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return float(optimizer.param_groups[0]["lr"])

    def initialize(self, batch: Batch) -> None:
        """Data-dependent init from a batch, the same in every process; a second call does nothing."""
        noise = Noise(self.options["seed"], batch.index)
        data_dependent_init(self.model, batch.image, self._label(batch), noise=noise)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.options
        if options["optimizer"] == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.model.parameters(),
                options["learning_rate"],
                tuple(options["betas"]),
                # Lightning would leave the gradients scaled for a fused optimizer, and their norm be misread.
                fused=self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed",
            )
        else:
            adamax = CompiledAdamax if options["compiled"] else torch.optim.Adamax
            optimizer = adamax(self.model.parameters(), options["learning_rate"], tuple(options["betas"]))
        steps = self.trainer.estimated_stepping_batches if options["decay"] in ("linear", "cosine") else 0
        factor = learning_rate_factor(options["decay"], options["warmup_steps"], steps, options["decay_rate"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Steps

    def forward(self, batch: Batch, draw: int = 0) -> Bound:
        """The bound of a batch, under its `draw`-th noise."""
        return self.model(batch.image, self._label(batch), noise=Noise(self.options["seed"], batch.index, draw))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # What draws from torch's own generator, such as dropout, draws the same at this step after a resumption.
        part = batch_idx % self.trainer.accumulate_grad_batches
        seed = derived_seed(self.options["seed"], "step", self.global_step, self.global_rank, part)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes half a millisecond on a CPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        bound = self(batch, draw=self.global_step + 1)
        loss = self.objective_nats(bound, self._average_over_processes)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:  # as Lightning counts, which writes down what is logged
            figures = torch.cat([self._figures(bound).mean(dim=0), loss.detach()[None]])
            self._parts = [*self._parts, figures] if part else [figures]
            *means, objective = self._average_over_processes(torch.stack(self._parts).mean(dim=0)).tolist()
            self._log_figures(
                "train",
                means,
                epochs=self.epochs,
                objective_nats=objective,
                kl_weight=self.kl_weight,
                learning_rate=self.learning_rate,
                skipped_steps=float(self.skips.total),
            )
            self.skips.check(self.global_step - 1)
        return loss

    def on_train_epoch_end(self) -> None:
        self.skips.check(self.global_step - 1)

    @property
    def epochs(self) -> float:
        """How often training has gone through its images, this micro-batch included."""
        return self.trainer.current_epoch + (self.trainer.fit_loop.batch_idx + 1) / self.trainer.num_training_batches

    @property
    def kl_weight(self) -> float:
        """Of the rate in the objective of the step to come."""
        warmup = self.options["kl_warmup_steps"]
        return min(1.0, (self.global_step + 1) / warmup) if warmup else 1.0

    def objective_nats(self, bound: Bound, average: Callable[[Tensor], Tensor]) -> Tensor:
        """What the step to come minimizes; see `wngen.training.objective_nats`."""
        options = self.options
        return objective_nats(bound, self.kl_weight, options["free_bits"], options["free_bits_per"], average)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._add(self(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._add(self(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_totals("val", epochs=self.epochs)

    def on_test_epoch_end(self) -> None:
        self._log_totals("test")

    def _label(self, batch: Batch) -> Tensor | None:
        """The classes, for a model that is conditioned on them."""
        return None if self.model.num_classes is None else batch.label

    def _average_over_processes(self, mean: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return mean
        total = mean.clone()
        torch.distributed.all_reduce(total)  # not the strategy's `reduce`, which waits for all processes first
        return total / self.trainer.world_size

    def _add(self, bound: Bound) -> None:
        """Add a batch to the sums over the images of an evaluation, kept in double precision."""
        figures = self._figures(bound).double()
        batch = torch.cat([figures.new_full((1,), len(figures)), figures.sum(dim=0)])
        self._totals = self._totals.to(batch.device) + batch

    def _log_totals(self, split: str, **more: float) -> None:
        """Log means over all images of all processes, each image counted once."""
        totals = self.trainer.strategy.reduce(self._totals.to(self.device), reduce_op="sum")
        assert isinstance(totals, Tensor)
        self._totals = self._no_totals()
        self._log_figures(split, (totals[1:] / totals[0]).tolist(), **more)

    def _no_totals(self) -> Tensor:
        """The number of images, and the sum over them of each figure, before the first one has come."""
        return torch.zeros(1 + len(self._figure_names), dtype=torch.float64)

    def _figures(self, bound: Bound) -> Tensor:
        """What is logged of each image of a batch, `(B, figures)` in the order of `_figure_names`."""
        rates = [bound.rate_nats, *bound.layer_kl_nats.unbind(dim=1)]
        figures = [bound.elbo_nats, bound.distortion_nats, *rates][: len(self._figure_names)]
        return torch.stack(figures, dim=1).detach()

    def _log_figures(self, split: str, means: list[float], **more: float) -> None:
        figures = {**dict(zip(self._figure_names, means, strict=True)), **more}
        elbo_nats = figures.pop("elbo_nats")
        bits_per_dim = self.model.spec.bits_per_dim(-elbo_nats)
        shown = {"elbo_nats": elbo_nats, "bits_per_dim": bits_per_dim}
        for resolution, layers in by_resolution(self._layers).items():
            figures[f"kl_nats_at/{resolution}"] = sum(figures[f"kl_nats/{layer}"] for layer in layers)
        for each in (shown, figures):
            # On the CPU: Lightning reads what it shows at every step, and would wait for a GPU to do so.
            tensors = {f"{split}/{name}": torch.tensor(figure) for name, figure in each.items()}
            self.log_dict(tensors, prog_bar=each is shown)

    # Steps that are left out

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, or leave the step out where its norm says that it would do harm.

        Raises:
            FloatingPointError: too many steps in a row were left out. On a GPU, which would have to be waited for, that
                is found out at the next step that is logged.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        left_out = self.skips.decide(torch.nn.utils.clip_grad_norm_(parameters, self.options["clip_norm"]))
        self.skips.leave_out(left_out, optimizer)
        if left_out.is_cpu:
            self.skips.check(self.global_step)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data_module = getattr(self.trainer, "datamodule", None)
        checkpoint["wngen"] = {
            "version": version("wngen"),
            "model": self.model.config,
            "training": self.options,
            "data": data_module.config if data_module is not None else None,
            "processes": self.trainer.world_size,
            "skipped": self.skips.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["wngen"]
        if saved["model"] != self.model.config:
            raise ValueError(f"the checkpoint holds a model {saved['model']}, not {self.model.config}")
        self.skips.load_state_dict(saved["skipped"])
