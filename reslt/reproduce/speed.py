"""The cost of a prediction with a network: parameters, multiply-adds, and time on this device."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import resolve_model_data_config

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.models.complexity import complexity
from reslt.models.create import create_model
from reslt.reproduce.rate import wait_for
from reslt.training.placement import place

BATCH = 64  # images, as in table 7 of the paper
WARM_UP, FEWEST_BATCHES, MOST_BATCHES, ENOUGH_SECONDS = 5, 3, 100, 2.0
LONGEST_REASON = 200
SLOW_SECONDS = 1.0  # one batch that takes longer, as with large images on a CPU, is enough warm-up
DECIDES = (
    "model", "model_kwargs", "experts", "expert_width", "expert_stages", "expert_gates", "network",
    "head", "branch", "branches", "tied_branches",
    "branch_at", "eval_branch_at", "router_topk", "img_size", "mixed_precision", "channels_last",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a prediction."""

    parameters: int
    multiply_adds: int  # of an image
    milliseconds: float  # of a batch of BATCH images, the median of several


class Costs:
    """Costs of networks, each measured once."""

    def __init__(self) -> None:
        self.measured: dict[str, Cost | None] = {}

    def of(self, config: Config, num_classes: int | None) -> Cost | None:
        """Return the cost; None if classes are unknown, or the model is missing or too large."""
        if num_classes is None:
            return None
        key = json.dumps([num_classes, *(config[name] for name in DECIDES)])
        if key not in self.measured:
            try:
                self.measured[key] = measure(config.changed(pretrained=False, pretrained_file=None), num_classes)
            except Exception as fault:  # a third-party model or a full device may raise anything
                reason = " ".join(str(fault).split())[:LONGEST_REASON]
                print(f"warning: {config.model.model} is not timed: {reason}", file=sys.stderr)
                self.measured[key] = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self.measured[key]


@torch.inference_mode()
def measure(config: Config, num_classes: int) -> Cost:
    """Measure the cost of a configuration's network in evaluation mode, with random weights and images, all experts, and one
    view of each image."""
    print(f"timing {config.model.model} ...", file=sys.stderr, flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the previous network
    accelerator = Accelerator(mixed_precision=config.run.mixed_precision or "no")
    model = create_model(config.model, config.method, num_classes, config.augment.img_size)
    size = ImageSettings.of(config.augment, resolve_model_data_config(model.backbone)).size
    counted = complexity(model, size)
    model = place(model, False, config.run.channels_last, accelerator).eval()
    images = torch.randn(BATCH, 3, size, size, device=accelerator.device)

    def seconds_of_a_batch() -> float:
        begin = time.perf_counter()
        with accelerator.autocast():
            model(images)
        wait_for(accelerator.device)
        return time.perf_counter() - begin

    if seconds_of_a_batch() < SLOW_SECONDS:
        for _ in range(WARM_UP - 1):
            seconds_of_a_batch()
    seconds = []
    while len(seconds) < FEWEST_BATCHES or (sum(seconds) < ENOUGH_SECONDS and len(seconds) < MOST_BATCHES):
        seconds.append(seconds_of_a_batch())
    return Cost(counted.parameters, counted.multiply_adds, 1000 * statistics.median(seconds))
