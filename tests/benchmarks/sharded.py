"""A model divided among processes, in its smallest form: two processes on a CPU, which communicate with gloo.

    python -m tests.benchmarks.sharded

Fully sharded (FSDP2): the same steps of a CIFAR ResNet-20 with ResLT's branches and loss as with DistributedDataParallel.
Column-parallel classifier: each process has the weights of half of the classes, and computes cross-entropy from three
all-reduces of one number per image, compared with the whole classifier. Each line states the largest difference, or the
error."""

from __future__ import annotations

import argparse
import copy
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from reslt.config.schema import Config
from reslt.models.finite import not_finite
from tests.builders import loss_of, model_of

PROCESSES, CLASSES, IMAGES, STEPS = 2, 10, 16, 3
WIDTH, MANY = 64, 1000  # of the column-parallel classifier


class FromAllShards(torch.autograd.Function):
    """The sum over processes; its gradient is that of the process's own part."""

    @staticmethod
    def forward(ctx, part: torch.Tensor) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class ToAllShards(torch.autograd.Function):
    """Features that every process has; their gradient is the sum over processes."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        return features

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def sharded_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, first: int) -> torch.Tensor:
    """(N, C / P) logits of this process's classes, which begin at `first`, (N,) labels -> the loss over all classes.

    log sum_c exp z_c - z_y: the maximum, the sum and the label's logit come from all processes, one number per image."""
    largest = logits.detach().amax(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = FromAllShards.apply((logits - largest[:, None]).exp().sum(1))
    own = labels - first
    is_here = (own >= 0) & (own < logits.shape[1])
    picked = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] * is_here
    return (total.log() + largest - FromAllShards.apply(picked)).mean()


def column_parallel(rank: int, is_cosine: bool) -> float:
    """Return the largest difference between loss and gradients and those of the whole classifier, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, features = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for rows in (MANY, 2 * IMAGES)
    )
    labels = torch.randint(MANY, (2 * IMAGES,), generator=generator)

    def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return 30 * F.linear(F.normalize(x), F.normalize(w)) if is_cosine else F.linear(x, w)

    whole = weight.clone().requires_grad_(), features.clone().requires_grad_()
    loss = F.cross_entropy(logits(whole[1], whole[0]), labels)
    loss.backward()
    first = rank * MANY // PROCESSES
    part = weight[first : first + MANY // PROCESSES].clone().requires_grad_(), features.clone().requires_grad_()
    sharded = sharded_cross_entropy(logits(ToAllShards.apply(part[1]), part[0]), labels, first)
    sharded.backward()
    of_part = whole[0].grad[first : first + MANY // PROCESSES]
    pairs = (loss, sharded), (of_part, part[0].grad), (whole[1].grad, part[1].grad)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def fully_sharded(rank: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield the operations of a run on its model: the name, and a function that returns the largest difference."""
    config = Config.of(model="cifar_resnet20", branch="bn", nesterov=True)
    torch.manual_seed(0)
    model = model_of(config, CLASSES)
    average, replica = ModelEmaV3(model, decay=0.9), DistributedDataParallel(copy.deepcopy(model))
    loss_fn = loss_of(config, np.arange(CLASSES, 0, -1) * 10)
    fully_shard(model)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(STEPS, IMAGES, 3, 32, 32, generator=generator)
    labels = torch.randint(CLASSES, (STEPS, IMAGES), generator=generator)

    def difference() -> float:
        whole = {name: p.full_tensor() for name, p in model.named_parameters()}
        return max((p - whole[name]).abs().max().item() for name, p in replica.module.named_parameters())

    def steps() -> float:
        for network in (model, replica):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
            for x, y in zip(images, labels, strict=True):
                denominators = loss_fn.denominators(y)
                dist.all_reduce(denominators)
                optimizer.zero_grad()
                (PROCESSES * loss_fn(network(x), y, denominators)).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
        return difference()

    def batch_norm() -> float:
        ours, theirs = dict(model.named_buffers()), dict(replica.module.named_buffers())
        return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)

    def moving_average() -> float:
        average.update(model)
        return 0.0

    def finite() -> float:
        not_finite(model.state_dict(), model)
        return 0.0

    def written() -> float:
        with tempfile.TemporaryDirectory() as folder:
            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, Path(folder) / "weights")
        return 0.0

    yield "steps with ResLT's loss, clipped gradients, momentum", steps
    yield "BatchNorm's statistics, each process's own", batch_norm
    yield "moving average of the weights (--model-ema)", moving_average
    yield "checkpoint: weights are examined", finite
    yield "checkpoint: weights are written", written


def outcome(trial: Callable[[], float]) -> str:
    """Return the largest difference that a trial found, or its error in one line."""
    try:
        return f"works, largest difference {trial():.1e}"
    except Exception as fault:  # the report is about errors of any kind
        return f"fails: {type(fault).__name__}: {str(fault).splitlines()[0]}"


def process(rank: int, port: int, file: str) -> None:
    """Run all trials as one of the processes; the first writes the table."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    lines = ["fully sharded (FSDP2), against DistributedDataParallel, float32"]
    lines += [f"  {name:<54}{outcome(trial)}" for name, trial in fully_sharded(rank)]
    lines += ["column-parallel classifier, against the whole one, float64"]
    for name, is_cosine in (("linear", False), ("cosine", True)):
        lines += [f"  {name:<54}{outcome(lambda is_cosine=is_cosine: column_parallel(rank, is_cosine))}"]
    if rank == 0:
        Path(file).write_text("\n".join(lines))
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table"
        torch.multiprocessing.spawn(process, (port, str(file)), PROCESSES)
        print(file.read_text())


if __name__ == "__main__":
    main()
