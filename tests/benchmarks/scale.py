"""Time and cost of large trainings on 1 to 512 GPUs, calculated from measured rates: the tables of docs/scale.md.

    python -m tests.benchmarks.scale [--rate 5360] [--usd 2.5] [--cores 16] [--largest-batch 4096] ...

Nothing is measured here. Put in your own figures; `--help` names all of them. docs/scale.md states what each one is, and which
of the defaults were measured.
"""

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

    rate: float = 5360  # images a second of the training step on one GPU, small classifier
    fixed: float = 5.0  # ms of a step that do not become shorter with its batch
    per_core: float = 192  # images a second that a core decodes and augments
    cores: float = 16  # per GPU
    device_decode: float = 22_600  # images a second that a GPU decodes, if it does nothing else
    flops: float = 400e12  # a second, reached by large matrix products in bf16
    memory: float = 2.5e12  # bytes a second, reached by elementwise kernels
    passes: float = 10  # times that the loss reads or writes its logits, forward and backward
    nvlink: float = 450e9  # bytes a second that a GPU sends to the others of its machine
    network: float = 50e9  # bytes a second that a GPU sends to other machines
    latency: float = 10e-6  # seconds of one hop
    per_machine: int = 8  # GPUs
    overlap: float = 2 / 3  # of a step, the backward pass, during which gradients are exchanged
    per_gpu: int = 256  # images of a GPU, at most
    largest_batch: int = 4096  # images of the global batch, at most
    usd: float = 2.5  # per GPU and hour


@dataclass(frozen=True)
class Job:
    """A training."""

    name: str
    images: int
    classes: int
    epochs: int
    evaluated: int  # images per evaluation, one after each epoch
    branches: int  # K, a 1 x 1 convolution each
    width: int = 2048  # D
    backbone: float = 23.5e6  # parameters

    @property
    def of_classifier(self) -> float:
        """Its parameters."""
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
    """Seconds of a step that the classifier and its loss take on one GPU."""

    products: float
    loss: float
    update: float

    @classmethod
    def of(cls, m: Machine, job: Job, images: float) -> Classifier:
        products = 6 * job.branches * images * job.width * job.classes / m.flops  # forward, and two products backward
        loss = m.passes * logits_bytes(job, images) / m.memory
        return cls(products, loss, update=5 * FLOAT * job.of_classifier / m.memory)  # reads 3, writes 2 of its size

    @property
    def total(self) -> float:
        return self.products + self.loss + self.update


def logits_bytes(job: Job, images: float) -> float:
    """Return the bytes of the logits of K branches and of their sum."""
    return (job.branches + 1) * images * job.classes * FLOAT


def exchange(m: Machine, size: float, gpus: int) -> float:
    """Return the seconds in which `gpus` add up `size` bytes: 2 (P - 1) / P of them pass each GPU's slowest link."""
    bandwidth = m.nvlink if gpus <= m.per_machine else m.network
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * m.latency


def exchange_if_sharded(m: Machine, job: Job, gpus: int, images: float) -> float:
    """Return the same with the classes divided among the GPUs of a machine: each adds up its share of the classifier with
    its peers of other machines, and, within the machine, passes the features of all (bf16) there and their gradients back."""
    shards = min(gpus, m.per_machine)
    features = 2 * (shards - 1) * images * job.branches * job.width * 2 / m.nvlink
    machines = gpus // shards
    share = FLOAT * job.of_classifier / shards
    of_peers = 2 * (machines - 1) / machines * share / m.network
    return exchange(m, FLOAT * job.of_others, gpus) + of_peers + features


@dataclass(frozen=True)
class Plan:
    """A job on a number of GPUs."""

    batch: int
    per_gpu: float
    compute: float  # seconds of a step
    exposed: float  # seconds that it waits for gradients
    hours: float
    usd: float
    rate: float  # images a second of all GPUs


def plan(m: Machine, job: Job, gpus: int, on_device: bool) -> Plan:
    """Return the plan. `on_device`: whether GPUs decode the images, else their cores do."""
    per_gpu = min(m.per_gpu, m.largest_batch / gpus)
    growing = MEASURED_BATCH / m.rate - m.fixed / 1e3  # of the step of that batch, the part that its images need
    compute = m.fixed / 1e3 + growing * per_gpu / MEASURED_BATCH + Classifier.of(m, job, per_gpu).total
    if on_device:
        compute += per_gpu / m.device_decode
    exposed = max(exchange(m, FLOAT * (job.of_classifier + job.of_others), gpus) - m.overlap * compute, 0.0)
    step = compute + exposed if on_device else max(compute + exposed, per_gpu / (m.cores * m.per_core))
    batch = round(per_gpu * gpus)
    evaluation = job.evaluated / gpus / (3 * m.rate)  # a forward pass alone
    if not on_device:
        evaluation = max(evaluation, job.evaluated / gpus / (m.cores * m.per_core))
    hours = job.epochs * (job.images // batch * step + evaluation) / 3600
    return Plan(batch, per_gpu, compute, exposed, hours, m.usd * gpus * hours, batch / step)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)])


def of_job(m: Machine, job: Job) -> str:
    """Return the table of a job."""
    header = ["GPUs", "global batch", "per GPU", "step, ms", "of it waiting for gradients", "images/s"]
    header += ["hours", "USD", "hours, decoded by CPU cores", "USD"]
    rows = []
    for gpus in GPUS:
        p, on_host = plan(m, job, gpus, on_device=True), plan(m, job, gpus, on_device=False)
        rows.append([f"{gpus}", f"{p.batch:,}", f"{p.per_gpu:g}", f"{1e3 * (p.compute + p.exposed):.1f}"])
        rows[-1] += [f"{1e3 * p.exposed:.1f}", f"{p.rate:,.0f}", f"{p.hours:,.2f}", f"{p.usd:,.0f}"]
        rows[-1] += [f"{on_host.hours:,.2f}", f"{on_host.usd:,.0f}"]
    return table(header, rows)


def of_classifiers(m: Machine) -> str:
    """Return the table of what classes cost on one GPU, and in bytes."""
    header = ["classes", "parameters", "matrix products, ms", "loss, ms", "update, ms", "of the backbone's step"]
    header += ["logits", "gradients", "checkpoint"]
    rows = []
    for classes in CLASSES:
        job = Job("", 0, classes, 0, 0, branches=3)
        cost, backbone = Classifier.of(m, job, m.per_gpu), m.per_gpu / m.rate
        gradients = FLOAT * (job.of_classifier + job.of_others)
        milliseconds = [f"{1e3 * part:.2f}" for part in (cost.products, cost.loss, cost.update)]
        rows.append([f"{classes:,}", f"{job.of_classifier / 1e6:.1f} M", *milliseconds, f"{cost.total / backbone:.1%}"])
        rows[-1] += [f"{size / 1e9:.2f} GB" for size in (logits_bytes(job, m.per_gpu), gradients, 2 * gradients)]
    return table(header, rows)


def of_exchange(m: Machine, job: Job) -> str:
    """Return the table of the exchange of gradients, with the whole classifier on each GPU and with an eighth of it."""
    header = [
        "GPUs",
        "whole classifier on each GPU, ms",
        f"classes divided among {m.per_machine} GPUs, ms",
        "backward pass, ms",
    ]
    rows = []
    for gpus in GPUS[1:]:
        p = plan(m, job, gpus, on_device=True)
        whole = exchange(m, FLOAT * (job.of_classifier + job.of_others), gpus)
        sharded = exchange_if_sharded(m, job, gpus, p.per_gpu)
        rows.append([f"{gpus}", *(f"{1e3 * seconds:.1f}" for seconds in (whole, sharded, m.overlap * p.compute))])
    return table(header, rows)


def tables(m: Machine) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each table."""
    for job in JOBS:
        yield f"{job.name}: {job.images:,} images, {job.classes:,} classes, {job.epochs} epochs", of_job(m, job)
    yield f"Classifier and loss on one GPU, {m.per_gpu} images", of_classifiers(m)
    yield f"Exchange of gradients per step: {JOBS[1].classes:,} classes", of_exchange(m, JOBS[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in fields(Machine):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=" ")
    for title, text in tables(Machine(**vars(parser.parse_args(arguments)))):
        print(title, "", text, "", sep="\n")


if __name__ == "__main__":
    main()
