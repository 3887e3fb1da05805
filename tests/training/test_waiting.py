"""A GPU is never waited for in a step: no number is read from it, and none copied to it, on pretended CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wngen.data import BinarizedMNIST
from wngen.data.datamodule import binarize
from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.models import ConvVAE, PixelCNN, PixelCNNPP, PixelSNAIL, ResNetVAE
from wngen.nn import data_dependent_init
from wngen.noise import Noise
from wngen.training import EMA, Checkpoints, Training
from wngen.training.adamax import CompiledAdamax
from wngen.training.skips import Skips

MODELS: dict[str, Callable[[], LikelihoodModel]] = {
    "ConvVAE": lambda: ConvVAE(num_classes=3),
    "ResNetVAE": lambda: ResNetVAE(1, 28, 28, 2, "14x1, 7x2", [8], latent_channels=4),
    "PixelCNN": lambda: PixelCNN(1, 28, 28, 2, num_classes=3),
    "PixelCNNPP": lambda: PixelCNNPP(3, 8, 8, 256, filters=8, blocks=1),
    "PixelSNAIL": lambda: PixelSNAIL(1, 28, 28, 2, filters=8),
}
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Watch(TorchDispatchMode):
    """Notes what would have the host wait: numbers that are read, and copies between host and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.calls += 1
        came = {t.device.type for t in args if isinstance(t, torch.Tensor) and function not in READS}
        moved = isinstance(out, torch.Tensor) and function.name().startswith(("aten::_to_copy", "aten::copy_"))
        if function in READS or (moved and came != {out.device.type}):
            self.waits.append(function.name())
        return out


def pretend(model: nn.Module) -> None:
    """Lay parameters and buffers out on a GPU that is not there; under a FakeTensorMode."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None:
                    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                    held[name] = nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_objective(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Training, "global_step", 7)
    model = MODELS[name]().train()
    spec = model.spec
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        pretend(model)
        training = Training(model, free_bits=0.1)
        index = torch.zeros(4, dtype=torch.int64, device="cuda")
        image = torch.zeros(4, *spec.shape, dtype=torch.uint8, device="cuda")
        batch = Batch(binarize(image, "dynamic", Noise(0, index, 3)), index, index)
        loss = training.objective_nats(training(batch, draw=8), lambda mean: mean)
    assert loss.device.type == "cuda"
    assert watch.calls > 100
    assert watch.waits == []


@pytest.mark.parametrize("name", MODELS)
def test_backward_clipping_optimizer_and_average(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pl.Trainer, "global_step", 0)
    model = MODELS[name]().train()
    image = torch.randint(0, model.spec.levels, (16, *model.spec.shape), dtype=torch.uint8)
    y = None if model.num_classes is None else torch.arange(16) % 3
    data_dependent_init(model, image, y)
    optimizer, skips, average = torch.optim.Adam(model.parameters(), fused=True), Skips(1e6, 3), EMA(0.9)
    trainer, training = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False), Training(model)
    average.on_train_start(trainer, training)
    monkeypatch.setattr(pl.Trainer, "global_step", 1)
    loss = model(image, y, noise=Noise(0, torch.arange(16), 1)).distortion_nats.mean()
    before = [p.detach().clone() for p in model.parameters()]
    with Watch() as watch:
        loss.backward()
        skips.leave_out(skips.decide(nn.utils.clip_grad_norm_(model.parameters(), 1.0)), optimizer)
        optimizer.step()
        average.on_train_batch_end(trainer, training)
    assert watch.waits == []
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_the_progress_bar_shows_lies_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """Lightning reads it at every step."""
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(Training, "log_dict", lambda self, figures, **_: logged.update(figures))
    model = ConvVAE()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(model)
        training = Training(model)
        assert next(training.parameters()).device.type == "cuda"
        training._log_figures("train", [-90.0, 60.0, 30.0], learning_rate=0.1)
    assert {"train/elbo_nats", "train/bits_per_dim", "train/learning_rate"} <= logged.keys()
    assert {figure.device.type for figure in logged.values()} == {"cpu"}


def test_compiled_adamax_is_told_of_steps_that_are_left_out_without_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wngen.training.adamax.torch.compile", lambda function, **_: function)
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    alone = [nn.Parameter(p.detach().clone()) for p in weights]
    ours, theirs, skips = CompiledAdamax(weights, 0.1), torch.optim.Adamax(alone, 0.1), Skips(10.0, 100)
    for norm in (float("nan"), 1.0, float("inf"), 2.0):  # the first one too, before there are moments
        for p, q in zip(weights, alone, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone() if norm < 10 else torch.full_like(p, norm)
        with Watch() as watch:
            skips.leave_out(skips.decide(torch.tensor(norm)), ours)
            ours.step()
        assert watch.waits == []
        if norm < 10:
            theirs.step()
    for p, q in zip(weights, alone, strict=True):
        torch.testing.assert_close(p, q)
    assert skips.total == 2


def test_what_would_wait_is_noticed():
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        torch.as_tensor(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            float(torch.ones((), device="cuda"))
    assert watch.waits == ["aten::_to_copy"]
    with Watch() as watch:
        assert float(torch.ones(())) == 1
    assert watch.waits == ["aten::_local_scalar_dense"]


def test_what_processes_told_each_other_is_read_once_its_copy_is_here(monkeypatch: pytest.MonkeyPatch):
    """Not from the GPU a step later: that would wait for the step which it has been asked for since."""
    events: list[str] = []
    event = SimpleNamespace(record=lambda: events.append("record"), synchronize=lambda: events.append("synchronize"))
    monkeypatch.setattr("wngen.training.resuming.torch.cuda.Event", lambda: event)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    checkpoints, trainer = Checkpoints(every_n_minutes=0), pl.Trainer(logger=False, enable_checkpointing=False)
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    checkpoints._place = 0, False
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        checkpoints._tell(trainer)
        assert checkpoints._told.device.type == "cpu"
        assert events == ["record"]
        with pytest.raises(DataDependentOutputException):  # a pretended number; but it is read on the CPU, and later
            checkpoints._rest(trainer)
    assert events == ["record", "synchronize"]
    assert watch.waits[:1] == ["aten::_to_copy"]


def test_training_images_lie_where_the_batches_are_wanted(monkeypatch: pytest.MonkeyPatch):
    def loader_of(data: BinarizedMNIST):
        strategy = SimpleNamespace(root_device=torch.device("meta"))
        data.trainer = SimpleNamespace(
            strategy=strategy,
            overfit_batches=0,
            global_rank=0,
            world_size=1,
            fit_loop=SimpleNamespace(total_batch_idx=-1),
        )
        return data.train_dataloader()

    batch = next(iter(loader_of(BinarizedMNIST(batch_size=16))))
    assert {batch.image.device.type, batch.index.device.type} == {"meta"}
    assert batch.image.shape == (16, 1, 28, 28)
    monkeypatch.setattr("wngen.data.datamodule.RESIDENT_BYTES", 1000)
    batch = next(iter(loader_of(BinarizedMNIST(batch_size=16))))
    assert {batch.image.device.type, batch.index.device.type} == {"cpu"}
