"""A model of how long a training step takes under DDP: formulas alone, for `scaling.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
BUCKET_BYTES = (MIB, 25 * MIB)  # at which DDP closes its first bucket of gradients, and each further one
GAUGE = 8  # bytes of the small messages, whose time is latency alone
# What a step reads and writes of memory, however few the images: the normalized weight and its bf16 copy (14), the
# gradient through both (18), its clipping (12), Adam (28), the average (12).
STEP_BYTES_PER_PARAMETER = 14 + 18 + 12 + 28 + 12
DDP_BYTES_PER_PARAMETER = 16  # copies of gradients into the buckets and back


@dataclass(frozen=True)
class Link:
    """A connection, as seen by each of those that it connects.

    Args:
        bytes_per_second: in each direction.
        latency_s: of a hop.
    """

    bytes_per_second: float
    latency_s: float

    def all_reduce_s(self, size: float, n: int) -> float:
        """Seconds of an all-reduce among n: of a ring, or of two trees where those are faster, as NCCL chooses.

        A ring takes 2 (n - 1) hops, and each link carries 2 (n - 1) / n of the bytes (Patarasuk and Yuan 2009);
        trees take 2 log2 n hops and twice the bytes (Sanders, Speck and Traeff 2009).
        """
        if n == 1:
            return 0.0
        ring = 2 * (n - 1) / n * size / self.bytes_per_second + 2 * (n - 1) * self.latency_s
        trees = 2 * size / self.bytes_per_second + 2 * math.ceil(math.log2(n)) * self.latency_s
        return min(ring, trees)


@dataclass(frozen=True)
class Interconnect:
    """What joins the GPUs: a link within each machine, and one between machines.

    Args:
        name: for the tables.
        within: of each GPU to the others of its machine.
        between: of each machine, all its adapters together; None where there is only one machine.
        per_machine: GPUs.
    """

    name: str
    within: Link
    between: Link | None = None
    per_machine: int = 8

    def all_reduce_s(self, size: float, n: int) -> float:
        """Seconds: reduce-scatter within each machine, all-reduce of the parts between, all-gather within."""
        inside = min(n, self.per_machine)
        seconds = self.within.all_reduce_s(size, inside)
        return seconds if self.between is None else seconds + self.between.all_reduce_s(size, n // inside)

    @property
    def most(self) -> float:
        """How many GPUs it joins."""
        return self.per_machine if self.between is None else math.inf


@dataclass(frozen=True)
class Device:
    """A GPU as the model of time sees it.

    Args:
        flops: of bf16 matrix products, per second.
        utilization: what part of them a network reaches in its forward and backward pass.
        launch_s: of an operation on the processor, below which none is on the GPU.
        memory_bytes_per_s: of its memory.
    """

    flops: float
    utilization: float
    launch_s: float
    memory_bytes_per_s: float

    @property
    def rate(self) -> float:
        """FLOP per second of a network."""
        return self.flops * self.utilization


@dataclass(frozen=True)
class Cost:
    """What a training step of a configuration consists of.

    Args:
        config: its name.
        parameters: numbers that are trained.
        batch: images in a step, over all processes.
        flop_per_image: of matrix products and convolutions, forward and backward.
        flop_for_all: the same per step, of what is the same for all images.
        forward_share: of them in the forward pass.
        saved_bytes_per_image: what is kept for the backward pass.
        saved_bytes: the same per step, whatever the number of images: normalized weights, and their bf16 copies.
        input_bytes_per_image: uint8.
        operations: that a step launches.
        messages: small all-reduces of a step: the signal to stop, and one for each layer with free bits.
        buckets: bytes of DDP's buckets of gradients, in the order in which they are sent.
        ready: the part of the backward pass after which each is ready.
    """

    config: str
    parameters: int
    batch: int
    flop_per_image: float
    flop_for_all: float
    forward_share: float
    saved_bytes_per_image: float
    saved_bytes: float
    input_bytes_per_image: int
    operations: int
    messages: int
    buckets: tuple[int, ...]
    ready: tuple[float, ...]

    def flop(self, images: float) -> float:
        """Of so many images."""
        return self.flop_for_all + images * self.flop_per_image

    @property
    def gradient_bytes(self) -> int:
        """That each process has to average with the others at each step."""
        return 4 * self.parameters

    @property
    def state_bytes(self) -> int:
        """Of parameters, gradients, two moments, average, and DDP's buckets, all fp32."""
        return 24 * self.parameters

    def fixed_s(self, device: Device, n: int = 1) -> float:
        """Seconds of what a step does with the weights themselves, however few the images, on each of n GPUs."""
        per_parameter = STEP_BYTES_PER_PARAMETER + (n > 1) * DDP_BYTES_PER_PARAMETER
        return per_parameter * self.parameters / device.memory_bytes_per_s

    def work_s(self, device: Device, images: float) -> float:
        """Seconds of the forward and backward pass: computing, or launching where that takes longer."""
        return max(self.flop(images) / device.rate, self.operations * device.launch_s)

    def step_s(self, device: Device, interconnect: Interconnect, n: int, images: float) -> float:
        """Seconds of a step of n GPUs with so many images on each.

        Args:
            device: each of them.
            interconnect: between them.
            n: GPUs.
            images: on each of them.
        """
        work, fixed = self.work_s(device, images), self.fixed_s(device, n)
        forward = self.forward_share * work
        if n == 1:
            return work + fixed
        before = self.messages * interconnect.all_reduce_s(GAUGE, n)
        sends = [interconnect.all_reduce_s(size, n) for size in self.buckets]
        return before + forward + overlapped_s(work - forward, self.ready, sends) + fixed

    def efficiency(self, device: Device, interconnect: Interconnect, n: int, strong: bool) -> float:
        """How much n GPUs do, as a part of n times what one does.

        Args:
            device: each of them.
            interconnect: between them.
            n: GPUs.
            strong: whether they share the batch that one has, rather than that each has as many.
        """
        one = self.step_s(device, interconnect, 1, self.batch)
        images = self.batch / n if strong else self.batch
        return one / (self.step_s(device, interconnect, n, images) * (n if strong else 1))

    def most_gpus(
        self, device: Device, interconnect: Interconnect, strong: bool, least: float = 0.9, limit: int = 1024
    ) -> int:
        """The power of two up to which the efficiency is at least `least`; `limit` also stands for more."""
        n = 1
        while 2 * n <= min(limit, interconnect.most, self.batch if strong else limit):
            if self.efficiency(device, interconnect, 2 * n, strong) < least:
                break
            n *= 2
        return n


def overlapped_s(backward_s: float, ready: Sequence[float], sends_s: Sequence[float]) -> float:
    """Seconds from the start of the backward pass until it is over and all buckets have been sent.

    One bucket goes after the other, each not before it is ready (Li et al. 2020, section 3.2.3): the end of sending
    is the largest, over buckets j, of the time at which j is ready and the time to send j and all that follow.
    """
    ends = [backward_s * at + sum(sends_s[j:]) for j, at in enumerate(ready)]
    return max(backward_s, *ends)


def bucketed(sizes: Sequence[int]) -> list[list[int]]:
    """Places of gradients in DDP's buckets: one takes them in turn until it holds as much as `BUCKET_BYTES` says."""
    buckets: list[list[int]] = [[]]
    for place, _ in enumerate(sizes):
        limit = BUCKET_BYTES[min(len(buckets), len(BUCKET_BYTES)) - 1]
        buckets[-1].append(place)
        if sum(sizes[i] for i in buckets[-1]) >= limit:
            buckets.append([])
    return [bucket for bucket in buckets if bucket]
