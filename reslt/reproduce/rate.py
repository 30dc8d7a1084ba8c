"""The training speed of this device in images per second, measured with the real training step on random images."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import resolve_model_data_config

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.core.cpu import available_cores
from reslt.data.groups import SHOTS
from reslt.loading.batches import Normalize
from reslt.methods.pairs import create_pairing
from reslt.methods.registry import create_loss
from reslt.models.create import create_model
from reslt.training.placement import place
from reslt.training.setup import Training
from reslt.training.teachers import Teachers

ENOUGH_SECONDS, LEAST_STEPS = 2.0, 2
CPU_BATCH, CPU_BATCH_LARGE, LARGE_SIDE = 64, 4, 128  # images of LARGE_SIDE pixels or more use the smaller batch
DECIDES = (
    "model", "model_kwargs", "experts", "expert_width", "expert_stages", "expert_gates", "network",
    "head", "branch", "branches", "branch_at", "img_size",
    "batch_size", "mixed_precision", "channels_last", "opt", "second_sampler", "feature_loss", "views",
)  # fmt: skip


class Rate:
    """Images per second of training steps, measured once for each kind of network."""

    def __init__(self, stated: float | None = None):
        """`stated`: the rate of all networks, instead of measured ones."""
        self.stated, self.measured = stated, {}

    def of(self, config: Config, num_classes: int | None) -> float | None:
        """Return the rate; None if classes are unknown, or the model is missing or too large."""
        if self.stated or num_classes is None:
            return self.stated
        key = json.dumps([num_classes, config.method.described.taught_by, *(config[name] for name in DECIDES)])
        if key not in self.measured:
            try:
                self.measured[key] = measure(config.changed(pretrained=False, pretrained_file=None), num_classes)
            except Exception:  # a third-party model or a full device may raise anything
                self.measured[key] = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self.measured[key]


def measure(config: Config, num_classes: int) -> float:
    """Measure the images per second of a configuration's training step; both images of a pair, and all views, are counted. On
    a CPU, a step has at most CPU_BATCH images or pairs."""
    print(f"measuring {config.model.model} ...", file=sys.stderr, flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the previous network
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision or "no")
    device = accelerator.device
    model = create_model(config.model, config.method, num_classes, config.augment.img_size)
    settings = ImageSettings.of(config.augment, resolve_model_data_config(model.backbone))
    model = place(model, False, config.run.channels_last, accelerator).train()
    counts = np.geomspace(500, 5, num_classes).astype(np.int64)  # any counts: the class sets do not change the work
    loss_fn = create_loss(config.method, counts, config.model.experts, model=model)
    batch = config.optim.batch_size
    if device.type == "cpu":
        batch = min(batch, CPU_BATCH if settings.size < LARGE_SIDE else CPU_BATCH_LARGE)
    normalize = Normalize(settings.mean, settings.std).to(device)
    teachers = None
    if method := config.method.described.taught_by:
        teacher = create_model(config.model, config.changed(method=method).method, num_classes, config.augment.img_size)
        classes = np.arange(num_classes) * len(SHOTS) // num_classes  # any groups
        groups = {shot: classes == g for g, shot in enumerate(SHOTS)}
        teachers = place(Teachers([teacher] * len(SHOTS), groups), False, config.run.channels_last, accelerator)
    shard, run = BatchShard(batch), replace(config.run, torchcompile=False, cuda_graph="off")
    training = Training(model, config.optim, run, accelerator, shard, normalize, teachers=teachers)
    stage = stages_of(config)[0]
    training.enter(stage, loss_fn, create_pairing(stage, num_classes, steps=1))
    step, count = training.step, batch * (2 if config.method.trains_on_pairs else config.method.views_in_training)
    images = torch.randint(256, (count, 3, settings.size, settings.size), dtype=torch.uint8, device=device)
    labels = torch.randint(num_classes, (count // config.method.views_in_training,), device=device)
    step.update([(images, labels)], 0)
    wait_for(device)
    steps, begin, seconds = 0, time.perf_counter(), 0.0
    while steps < LEAST_STEPS or seconds < ENOUGH_SECONDS:
        step.update([(images, labels)], steps)
        wait_for(device)
        steps, seconds = steps + 1, time.perf_counter() - begin
    return steps * count / seconds


def describe_device() -> str:
    """Return the name of the GPUs or the CPU for the header of a table."""
    if torch.cuda.is_available():
        # In a separate process: here, the question would occupy GPU memory as long as the runs last.
        names = "{torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}"
        code = f"import torch; print(*sorted({names}), sep=', ')"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return answer.stdout.strip() or "CUDA"
    if torch.backends.mps.is_available():
        return f"{platform.machine()} GPU (MPS)"
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {available_cores()} CPU cores"


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
