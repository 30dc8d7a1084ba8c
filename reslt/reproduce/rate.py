"""How many images per second this device trains: bare steps on random input."""

from __future__ import annotations

import itertools
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
from timm.data import resolve_model_data_config

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.cpu import available_cores
from reslt.methods.losses import create_loss
from reslt.models.create import create_model
from reslt.training.optim import create_optimizer

WARMUP_STEPS, CHUNK, LEAST_CHUNKS, ENOUGH_SECONDS = 1, 2, 2, 2.0
CPU_BATCH, CPU_BATCH_LARGE, LARGE_SIDE = 64, 4, 128  # images of LARGE_SIDE pixels and more come in the smaller batch
DECIDES = (
    "model", "model_kwargs", "experts", "expert_width", "method", "branch", "branches", "branch_at", "img_size",
    "batch_size", "mixed_precision", "channels_last", "opt",
)  # fmt: skip


class Rate:
    """Images per second of training steps, measured once for each kind of network."""

    def __init__(self, stated: float | None = None):
        """`stated`: this rate for all, instead of measuring."""
        self.stated, self.measured = stated, {}
        kinds = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True))
        self.device = torch.device(next(kind for kind, is_there in kinds if is_there))

    def of(self, config: Config, num_classes: int | None) -> float | None:
        """None where it cannot be measured: classes unknown, a model that does not exist or is too large."""
        if self.stated or num_classes is None:
            return self.stated
        key = json.dumps([num_classes, *(getattr(config, name) for name in DECIDES)])
        if key not in self.measured:
            try:
                self.measured[key] = measure(config, num_classes, self.device)
            except Exception:  # whatever a foreign model raises, or a device that is too small
                self.measured[key] = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self.measured[key]


def measure(config: Config, num_classes: int, device: torch.device) -> float:
    """Forward, loss, backward, optimizer step: images per second, of the fastest CHUNK of steps. At most CPU_BATCH
    images a step on a CPU."""
    print(f"measuring {config.model} ...", file=sys.stderr, flush=True)
    config = replace(config, pretrained=False, pretrained_file=None)
    model = create_model(config, num_classes)
    side = ImageSettings.of(config, resolve_model_data_config(model.backbone)).size
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model = model.to(device=device, memory_format=layout).train()
    counts = np.geomspace(500, 5, num_classes).astype(np.int64)  # any will do: the class sets do not change the work
    loss_fn, optimizer = create_loss(config, counts).to(device), create_optimizer(config, model)
    batch = config.batch_size
    if device.type == "cpu":
        batch = min(batch, CPU_BATCH if side < LARGE_SIDE else CPU_BATCH_LARGE)
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(num_classes, (batch,), device=device)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    times, begin = [], time.perf_counter()
    for step in itertools.count(1 - WARMUP_STEPS):
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = loss_fn(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step >= 0 and step % CHUNK == 0:
            _wait_for(device)
            times.append(time.perf_counter())
            if len(times) > LEAST_CHUNKS and times[-1] - begin > ENOUGH_SECONDS:
                return CHUNK * batch / float(np.diff(times).min())


def describe_device() -> str:
    """The GPU's or the CPU's name, for a table's header."""
    if torch.cuda.is_available():
        # In a process of its own: asking here would hold GPU memory as long as the runs last.
        code = "import torch; print(*sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}), sep=', ')"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return asked.stdout.strip() or "CUDA"
    if torch.backends.mps.is_available():
        return f"{platform.machine()} GPU (MPS)"
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {available_cores()} CPU cores"


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
