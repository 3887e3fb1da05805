"""Training steps to measure for `scaling.py`: what they consist of, and how long they take, alone and under DDP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from ddp_model import BUCKET_BYTES, Cost, Interconnect, Link, bucketed, overlapped_s
from measuring import count_parameters, interleaved
from torch import Tensor, nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import wngen.data
import wngen.models
from wngen.arguments import config_path
from wngen.data import ImageDataModule
from wngen.nn import data_dependent_init
from wngen.noise import Noise
from wngen.training import objective_nats


class Step:
    """Training steps of a configuration's model, on random images, in bf16, as `wngen.training` takes them.

    Args:
        config: its name.
        foreach: whether Adamax goes through all parameters at once, as on a GPU.
    """

    def __init__(self, config: str, foreach: bool = False) -> None:
        options = yaml.safe_load(config_path(config).read_text())
        data: ImageDataModule = getattr(wngen.data, options["data"]["class_path"])(
            **options["data"].get("init_args", {})
        )
        training = options["training"]
        torch.manual_seed(0)
        build = getattr(wngen.models, options["model"]["class_path"])
        self.model: nn.Module = build(**data.spec.as_dict(), **options["model"].get("init_args", {}))
        self.spec, self.batch, self.free_bits = data.spec, data.batch_size, training.get("free_bits", 0.0)
        data_dependent_init(self.model, self.images(2), noise=Noise(0, torch.arange(2)))
        self.model.to(memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer: torch.optim.Optimizer
        if training.get("optimizer", "adam") == "adam":
            self.optimizer = torch.optim.Adam(self.parameters, 1e-4, fused=True)
        else:
            self.optimizer = torch.optim.Adamax(self.parameters, 1e-4, foreach=foreach)

    def images(self, count: int) -> Tensor:
        """Random ones."""
        return torch.randint(0, self.spec.levels, (count, *self.spec.shape), dtype=torch.uint8)

    def loss(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """What is minimized, by the model or by what is wrapped around it."""
        with torch.autocast("cpu", torch.bfloat16):
            bound = (model or self.model)(x, noise=Noise(0, torch.arange(len(x))))
        self.layers = len(bound.kl_nats)
        return objective_nats(bound, free_bits=self.free_bits)

    def update(self) -> None:
        """What a step does with the gradient, however many images it comes from."""
        nn.utils.clip_grad_norm_(self.parameters, 1e9)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1e-3)
        self.optimizer.zero_grad()

    def __call__(self, x: Tensor, model: nn.Module | None = None) -> None:
        """Take one."""
        self.loss(x, model).backward()
        self.update()


class Operations(TorchDispatchMode):
    """Counts operations that compute something: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count += not func.is_view and not name.startswith(("aten::empty", "aten::detach", "aten::new_empty"))
        return func(*args, **(kwargs or {}))


def flop(step: Step, images: int) -> tuple[int, int]:
    """Of matrix products and convolutions, in the forward pass and in both."""
    x = step.images(images)
    with FlopCounterMode(display=False) as counter:
        loss = step.loss(x)
        forward = counter.get_total_flops()
        loss.backward()
    step.optimizer.zero_grad()
    return forward, counter.get_total_flops()


def saved_bytes(step: Step, images: int) -> int:
    """That the forward pass keeps for the backward pass, parameters and buffers aside, each memory counted once."""
    own = {t.untyped_storage().data_ptr() for t in [*step.parameters, *step.model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    x = step.images(images)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step.loss(x)  # which holds what is kept, so that no address comes twice
    del loss
    return sum(sizes.values())


def arrivals(step: Step, images: int, rounds: int = 3) -> tuple[list[int], list[float]]:
    """The order in which gradients are there, and after which part of the backward pass each is."""
    at: dict[int, list[float]] = {i: [] for i in range(len(step.parameters))}

    def note(i: int, _: Tensor) -> None:
        at[i].append(time.process_time())

    handles = [p.register_post_accumulate_grad_hook(partial(note, i)) for i, p in enumerate(step.parameters)]
    for _ in range(rounds):
        loss = step.loss(step.images(images))
        started = time.process_time()
        loss.backward()
        taken = time.process_time() - started
        step.optimizer.zero_grad()
        for times in at.values():
            times[-1] = (times[-1] - started) / taken
    for handle in handles:
        handle.remove()
    ready = {i: statistics.median(times) for i, times in at.items()}
    order = sorted(ready, key=lambda i: ready[i])
    return order, [ready[i] for i in order]


def cost_of(config: str) -> Cost:
    """What a step of a configuration consists of, found on up to four images."""
    step = Step(config, foreach=True)
    (forward, one), (_, two), (_, three) = (flop(step, images) for images in (1, 2, 3))
    assert three - two == two - one, "the arithmetic of a step grows in proportion to its images"
    saved = [saved_bytes(step, images) for images in (2, 4)]
    order, ready = arrivals(step, 4)
    sizes = [4 * step.parameters[i].numel() for i in order]
    buckets = bucketed(sizes)
    theirs, _ = _compute_bucket_assignment_by_size([step.parameters[i] for i in order], list(BUCKET_BYTES))
    assert buckets == theirs, "DDP makes other buckets than the model of its time does"
    x = step.images(1)
    step(x)  # so that the optimizer has its state
    with Operations() as operations:
        step(x)
    return Cost(
        config,
        parameters=count_parameters(step.model),
        batch=step.batch,
        flop_per_image=two - one,
        flop_for_all=2 * one - two,
        forward_share=forward / one,
        saved_bytes_per_image=(saved[1] - saved[0]) / 2,
        saved_bytes=2 * saved[0] - saved[1],
        input_bytes_per_image=step.spec.dims,
        operations=operations.count,
        messages=1 + (step.layers if step.free_bits else 0),
        buckets=tuple(sum(sizes[i] for i in bucket) for bucket in buckets),
        ready=tuple(max(ready[i] for i in bucket) for bucket in buckets),
    )


def seconds_by_images(config: str, flop_per_image: float, rounds: int, most_flop: float = 1e12) -> dict[int, float]:
    """Processor seconds of a step on the configuration's batch and on halves of it, four sizes in all.

    Args:
        config: its name.
        flop_per_image: by which the largest is chosen.
        rounds: of which the median is taken.
        most_flop: of the largest.
    """
    step = Step(config)
    images = step.batch
    while images > 8 and images * flop_per_image > most_flop:
        images //= 2
    calls: dict[int, Callable[[], object]] = {n: partial(step, step.images(n)) for n in (images >> i for i in range(4))}
    return {n: statistics.median(s) for n, s in interleaved(calls, rounds, warmup=1, clock="cpu").items()}


def line(seconds: dict[int, float]) -> tuple[float, float]:
    """Seconds of no image and of each image: the straight line of least squared relative errors."""
    images, taken = np.array(list(seconds)), np.array(list(seconds.values()))
    slope, fixed = np.polyfit(images, taken, 1, w=1 / taken)
    return float(fixed), float(slope)


# Two processes of this machine


def compared(config: str, cost: Cost, rounds: int) -> dict[str, float]:
    """Milliseconds of a step under DDP with two gloo processes, as measured and as the model of time predicts them."""
    with TemporaryDirectory() as folder:
        spawn(_take_part, (folder, config, cost, rounds), nprocs=2)
        by_rank = [torch.load(Path(folder) / f"{rank}", weights_only=True) for rank in range(2)]
    # What both do together lasts as long as the slower one takes.
    taken = {way: statistics.median(map(max, *(r[way] for r in by_rank))) for way in by_rank[0] if way != "alone"}
    alone = statistics.median(by_rank[0]["alone"])
    latency = taken["small"] / 2
    rate = cost.gradient_bytes / max(taken["large"] - taken["small"], 1e-9)
    loopback = Interconnect("loopback", Link(rate, latency), per_machine=2)
    sends = [loopback.all_reduce_s(size, 2) for size in cost.buckets]
    rest = taken["forward"] + taken["update"]
    predicted = rest + overlapped_s(taken["backward"], cost.ready, sends)
    one_after_other = rest + taken["backward"] + sum(sends)
    return {
        "one process": 1e3 * alone,
        "two, each by itself": 1e3 * (rest + taken["backward"]),
        "DDP, measured": 1e3 * taken["ddp"],
        "DDP, predicted": 1e3 * predicted,
        "DDP, predicted without overlap": 1e3 * one_after_other,
        "gigabytes per second": rate / 1e9,
        "latency": 1e3 * latency,
        "efficiency, measured": alone / taken["ddp"] / 2,
        "efficiency, predicted": alone / predicted / 2,
    }


def _take_part(rank: int, folder: str, config: str, cost: Cost, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    step = Step(config)
    whole, half = step.images(cost.batch), step.images(cost.batch // 2)
    shared = Step(config)
    wrapped = DistributedDataParallel(shared.model, broadcast_buffers=False)
    small, large = torch.zeros(2), torch.zeros(cost.parameters)
    seconds: dict[str, list[float]] = {}

    def timed(way: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        seconds.setdefault(way, []).append(time.perf_counter() - started)
        return result

    for turn in range(rounds + 3):
        if turn == 3:
            seconds.clear()  # what came before was warming up
        dist.barrier()
        if rank == 0:
            timed("alone", partial(step, whole))
        dist.barrier()
        loss = timed("forward", partial(step.loss, half))
        timed("backward", loss.backward)
        timed("update", step.update)
        dist.barrier()
        timed("ddp", partial(shared, half, wrapped))
        dist.barrier()
        timed("small", partial(dist.all_reduce, small))
        dist.barrier()
        timed("large", partial(dist.all_reduce, large))
    torch.save(seconds, Path(folder) / f"{rank}")
    dist.destroy_process_group()


def as_record(cost: Cost) -> dict[str, Any]:
    """A cost as JSON."""
    return asdict(cost)


def from_record(record: dict[str, Any]) -> Cost:
    """The cost that `as_record` made JSON of."""
    return Cost(**{**record, "buckets": tuple(record["buckets"]), "ready": tuple(record["ready"])})
