"""The time and cost of large trainings on 1 to 512 GPUs, calculated from measured rates: the tables of docs/scale.md.

    python -m tests.benchmarks.scale [--rate 5360] [--usd 2.5] [--cores 16] [--largest-batch 4096] ...

This command measures nothing. Enter your own figures; `--help` lists them. docs/scale.md explains each figure and states
which of the defaults were measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

FLOAT = 4  # bytes
MEASURED_BATCH = 256  # images of the step whose rate is given
GPUS = (1, 8, 64, 512)
CLASSES = (1_000, 8_142, 100_000)


@dataclass(frozen=True)
class Machine:
    """The assumptions of the tables; each field is a flag."""

    rate: float = 5360  # images per second of the training step on one GPU, with a small classifier
    fixed: float = 5.0  # milliseconds of a step that do not depend on its batch
    per_core: float = 192  # images per second that a core decodes and augments
    cores: float = 16  # per GPU
    device_decode: float = 22_600  # images per second that a GPU decodes if it does nothing else
    flops: float = 400e12  # per second, reached by large matrix products in bf16
    memory: float = 2.5e12  # bytes per second, reached by elementwise kernels
    passes: float = 10  # number of times that the loss reads or writes its logits, forward and backward
    nvlink: float = 450e9  # bytes per second that a GPU sends to the others of its machine
    network: float = 50e9  # bytes per second that a GPU sends to other machines
    latency: float = 10e-6  # seconds per hop
    per_machine: int = 8  # GPUs
    overlap: float = 2 / 3  # share of a step, the backward pass, during which gradients are exchanged
    per_gpu: int = 256  # images per GPU, at most
    largest_batch: int = 4096  # images per global batch, at most
    usd: float = 2.5  # per GPU and hour


@dataclass(frozen=True)
class Job:
    """A training."""

    name: str
    images: int
    classes: int
    epochs: int
    evaluated: int  # images per evaluation, of which there is one after each epoch
    branches: int  # K, each a 1 x 1 convolution
    width: int = 2048  # D
    backbone: float = 23.5e6  # parameters

    @property
    def of_classifier(self) -> float:
        """Parameters of the classifier."""
        return self.classes * (self.width + 1)

    @property
    def of_others(self) -> float:
        """Parameters of the backbone and the branches."""
        return self.backbone + self.branches * self.width**2


JOBS = (
    Job("iNaturalist 2018", 437_513, 8_142, 200, 24_426, branches=2),
    Job("A long list", 10_000_000, 100_000, 30, 100_000, branches=3),
)


@dataclass(frozen=True)
class Classifier:
    """The seconds of a step that the classifier and its loss take on one GPU."""

    products: float
    loss: float
    update: float

    @classmethod
    def of(cls, machine: Machine, job: Job, images: float) -> Classifier:
        # One product forward, two backward
        products = 6 * job.branches * images * job.width * job.classes / machine.flops
        loss = machine.passes * logits_bytes(job, images) / machine.memory
        # The update reads three times the classifier's size, and writes twice
        return cls(products, loss, update=5 * FLOAT * job.of_classifier / machine.memory)

    @property
    def total(self) -> float:
        return self.products + self.loss + self.update


def logits_bytes(job: Job, images: float) -> float:
    """Return the bytes of the logits of K branches and of their sum."""
    return (job.branches + 1) * images * job.classes * FLOAT


def exchange(machine: Machine, size: float, gpus: int) -> float:
    """Return the seconds in which `gpus` add up `size` bytes, 2 (P - 1) / P of which pass the slowest link of each GPU."""
    bandwidth = machine.nvlink if gpus <= machine.per_machine else machine.network
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * machine.latency


def exchange_if_sharded(machine: Machine, job: Job, gpus: int, images: float) -> float:
    """Return the seconds of the exchange of gradients with the classes divided among the GPUs of a machine. Each GPU adds up
    its share of the classifier with its peers of other machines; within the machine, the features of all images (bf16) are
    sent there, and their gradients back."""
    shards = min(gpus, machine.per_machine)
    features = 2 * (shards - 1) * images * job.branches * job.width * 2 / machine.nvlink
    machines = gpus // shards
    share = FLOAT * job.of_classifier / shards
    of_peers = 2 * (machines - 1) / machines * share / machine.network
    return exchange(machine, FLOAT * job.of_others, gpus) + of_peers + features


@dataclass(frozen=True)
class Plan:
    """The figures of a job on a number of GPUs."""

    batch: int
    per_gpu: float
    compute: float  # seconds per step
    exposed: float  # seconds per step of waiting for gradients
    hours: float
    usd: float
    rate: float  # images per second of all GPUs


def plan(machine: Machine, job: Job, gpus: int, on_device: bool) -> Plan:
    """Return the plan of a job. `on_device`: whether GPUs decode the images, not CPU cores."""
    per_gpu = min(machine.per_gpu, machine.largest_batch / gpus)
    growing = MEASURED_BATCH / machine.rate - machine.fixed / 1e3  # the part of its step that grows with its images
    compute = machine.fixed / 1e3 + growing * per_gpu / MEASURED_BATCH + Classifier.of(machine, job, per_gpu).total
    if on_device:
        compute += per_gpu / machine.device_decode
    exposed = max(exchange(machine, FLOAT * (job.of_classifier + job.of_others), gpus) - machine.overlap * compute, 0.0)
    step = compute + exposed if on_device else max(compute + exposed, per_gpu / (machine.cores * machine.per_core))
    batch = round(per_gpu * gpus)
    evaluation = job.evaluated / gpus / (3 * machine.rate)  # a forward pass alone
    if not on_device:
        evaluation = max(evaluation, job.evaluated / gpus / (machine.cores * machine.per_core))
    hours = job.epochs * (job.images // batch * step + evaluation) / 3600
    return Plan(batch, per_gpu, compute, exposed, hours, machine.usd * gpus * hours, batch / step)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)])


def of_job(machine: Machine, job: Job) -> str:
    """Return the table of a job."""
    header = ["GPUs", "global batch", "per GPU", "step, ms", "of it waiting for gradients", "images/s"]
    header += ["hours", "USD", "hours, decoded by CPU cores", "USD"]
    rows = []
    for gpus in GPUS:
        p, on_host = plan(machine, job, gpus, on_device=True), plan(machine, job, gpus, on_device=False)
        rows.append([f"{gpus}", f"{p.batch:,}", f"{p.per_gpu:g}", f"{1e3 * (p.compute + p.exposed):.1f}"])
        rows[-1] += [f"{1e3 * p.exposed:.1f}", f"{p.rate:,.0f}", f"{p.hours:,.2f}", f"{p.usd:,.0f}"]
        rows[-1] += [f"{on_host.hours:,.2f}", f"{on_host.usd:,.0f}"]
    return table(header, rows)


def of_classifiers(machine: Machine) -> str:
    """Return the table of the cost of classes on one GPU, in time and in bytes."""
    header = ["classes", "parameters", "matrix products, ms", "loss, ms", "update, ms", "of the backbone's step"]
    header += ["logits", "gradients", "checkpoint"]
    rows = []
    for classes in CLASSES:
        job = Job("", 0, classes, 0, 0, branches=3)
        cost, backbone = Classifier.of(machine, job, machine.per_gpu), machine.per_gpu / machine.rate
        gradients = FLOAT * (job.of_classifier + job.of_others)
        milliseconds = [f"{1e3 * part:.2f}" for part in (cost.products, cost.loss, cost.update)]
        rows.append([f"{classes:,}", f"{job.of_classifier / 1e6:.1f} M", *milliseconds, f"{cost.total / backbone:.1%}"])
        rows[-1] += [f"{size / 1e9:.2f} GB" for size in (logits_bytes(job, machine.per_gpu), gradients, 2 * gradients)]
    return table(header, rows)


def of_exchange(machine: Machine, job: Job) -> str:
    """Return the table of the exchange of gradients, with the whole classifier on each GPU and with an eighth of it."""
    header = [
        "GPUs",
        "whole classifier on each GPU, ms",
        f"classes divided among {machine.per_machine} GPUs, ms",
        "backward pass, ms",
    ]
    rows = []
    for gpus in GPUS[1:]:
        p = plan(machine, job, gpus, on_device=True)
        whole = exchange(machine, FLOAT * (job.of_classifier + job.of_others), gpus)
        sharded = exchange_if_sharded(machine, job, gpus, p.per_gpu)
        rows.append([f"{gpus}", *(f"{1e3 * seconds:.1f}" for seconds in (whole, sharded, machine.overlap * p.compute))])
    return table(header, rows)


def tables(machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each table."""
    for job in JOBS:
        yield f"{job.name}: {job.images:,} images, {job.classes:,} classes, {job.epochs} epochs", of_job(machine, job)
    yield f"Classifier and loss on one GPU, {machine.per_gpu} images", of_classifiers(machine)
    yield f"Exchange of gradients per step: {JOBS[1].classes:,} classes", of_exchange(machine, JOBS[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in fields(Machine):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=" ")
    for title, text in tables(Machine(**vars(parser.parse_args(arguments)))):
        print(title, "", text, "", sep="\n")


if __name__ == "__main__":
    main()
