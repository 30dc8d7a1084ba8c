"""One training step: the gradients of a global batch, and the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from reslt.augment.mixing import Mixing
from reslt.augment.transfers import to_device
from reslt.core.batch_shard import BatchShard
from reslt.core.seeding import derive_seed
from reslt.methods.pairs import Pairing
from reslt.models.fusion import fused_logits
from reslt.training.sam import SharpnessAware
from reslt.training.teachers import Teachers

OF_THE_COST = -4  # seeds a cost's random numbers; the seeds of micro-batches count from 0
# An accumulation window: per micro-batch, (N, 3, H, W) uint8 images and (N,) int64 labels; for pairs, 2 N of each
Window = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one process's step, on the device, and the seeds of its dropout; lists are per micro-batch."""

    window: Window
    mixes: list[torch.Tensor] | None  # (N, 6) each, (N,) for pairs; None: images are neither mixed nor paired
    uniform: list[torch.Tensor] | None  # (N, C) each; None: the cost draws nothing
    seeds: list[int]


@dataclass
class TrainStep:
    """The training step of a run. `model`: as prepared by Accelerate."""

    model: torch.nn.Module
    loss_fn: torch.nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    shard: BatchShard
    normalize: Callable[[torch.Tensor], torch.Tensor]
    seed: int
    mixing: Mixing | Pairing | None = None
    clip_grad: float | None = None
    fusion: str | None = None  # of the prediction for the training accuracy
    keeps_statistics: bool = False  # BatchNorm uses its running statistics, and does not change them
    held: Sequence[torch.nn.Module] = ()  # modules that stay in evaluation mode, without those that they contain
    sam: float = 0.0  # rho of sharpness-aware minimization; 0: off
    teachers: Teachers | None = None

    def __post_init__(self) -> None:
        self.sharpness = SharpnessAware(self.model, self.loss_fn, self.sam) if self.sam else None

    def train_mode(self) -> None:
        """Set the model to training mode."""
        self.model.train()
        for module in self.held:
            module.training = False
        if self.keeps_statistics:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def begin_epoch(self) -> None:
        """Start an epoch in those parts of the loss that keep statistics per epoch. Not part of a recorded step."""
        for module in self.loss_fn.modules():
            if hasattr(module, "begin_epoch"):
                module.begin_epoch()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self, window: Window, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of the global batch of step `step` (of the run), clip them, and update the weights.
        Return what `gradients` returns. No synchronization."""
        return self.compute(self.inputs(window, step))

    def inputs(self, window: Window, step: int) -> StepInputs:
        """Draw mixing or pairing, the seeds of dropout and the random numbers of the cost, from (seed, step), so that a
        resumed run draws the same."""
        shard, mixes = self.shard, None
        if self.mixing is not None:
            drawn = self.mixing.draw(step, shard.batch_size, *window[0][0].shape[-2:])
            mixes = [drawn[positions].to(self.accelerator.device) for positions in shard.positions]
        seeds = [derive_seed(self.seed, step, shard.rank * shard.micro_batches + i) for i in range(shard.micro_batches)]
        return StepInputs(window, mixes, self._uniform(step) if self.loss_fn.draws else None, seeds)

    def _uniform(self, step: int) -> list[torch.Tensor]:
        """Draw (N, C) random numbers for each micro-batch, on the device. They are drawn for the global batch, so they do not
        depend on the number of processes."""
        shard, device = self.shard, self.accelerator.device
        generator = torch.Generator(device).manual_seed(derive_seed(self.seed, step, OF_THE_COST))
        drawn = torch.rand(shard.batch_size, self.loss_fn.draws, generator=generator, device=device)
        return [drawn[to_device(positions, device)] for positions in shard.positions]

    def compute(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the step: all work of the device except seeding dropout. Return what `gradients` returns."""
        totals = self.gradients(inputs)
        if self.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return totals

    def gradients(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradient that the optimizer uses, the same on every process: that of the global batch's loss, or, with
        `sam`, that at the perturbed weights, for the same inputs and the same dropout.

        Return this process's share of the loss, at the unperturbed weights, and its hits (0 if images are mixed or
        paired)."""
        totals = self._gradients_here(inputs)
        if self.sharpness is not None:
            with self.sharpness.perturbed():
                self._gradients_here(inputs)
        return totals

    def _gradients_here(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradient of the global batch's loss at the present weights, micro-batch by micro-batch."""
        shard, window, mixes = self.shard, inputs.window, inputs.mixes
        targets = [labels for _, labels in window]
        if mixes is not None:
            targets = [self.mixing.targets(y, m) for y, m in zip(targets, mixes, strict=True)]
        denominators = None
        # The denominators are those of the global batch, and count each image once, regardless of teachers' weights.
        if shard.parts > 1 or self.teachers is not None:
            denominators = self.accelerator.reduce(sum(self.loss_fn.denominators(y) for y in targets), "sum")
        loss_sum, hits = torch.zeros(2, device=self.accelerator.device)
        for i, (images, labels) in enumerate(window):
            is_last = i == len(window) - 1
            images = self.normalize(images)
            seen = (images,) if mixes is None else self.mixing.inputs(images, mixes[i])
            self.seed_pass(inputs.seeds[i])
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                logits = self.model(*seen)
                drawn = () if inputs.uniform is None else (inputs.uniform[i],)
                if self.teachers is None:
                    loss = self.loss_fn(logits, targets[i], denominators, *drawn)
                else:
                    loss = self._taught_loss(logits, seen[0], targets[i], denominators, *drawn)
                if i == 0:  # after the forward pass: the new gradients take the old ones' memory, still in the cache
                    self.optimizer.zero_grad(set_to_none=True)
                self.accelerator.backward(loss * shard.processes)  # DDP averages over the processes
            loss_sum += loss.detach()
            if mixes is None:
                with torch.no_grad():
                    hits += (fused_logits(logits, self.fusion).argmax(-1) == labels).sum()
        return loss_sum, hits

    def _taught_loss(
        self,
        logits: torch.Tensor,
        images: torch.Tensor,
        targets: torch.Tensor,
        denominators: torch.Tensor,
        *drawn: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss, with images weighted by the teachers, plus the teachers' own term. The teachers see the same
        images."""
        with self.accelerator.autocast():
            taught = self.teachers(images)
        loss = self.loss_fn(logits, self.teachers.weighted(taught, targets), denominators, *drawn)
        return loss + self.teachers.divergence(taught, fused_logits(logits, self.fusion)) / self.shard.batch_size

    def seed_pass(self, seed: int) -> None:
        """Seed the dropout and stochastic depth of one micro-batch."""
        seed_dropout(seed, self.accelerator.device)


def has_drawn(seed: int, device: torch.device) -> bool:
    """Return whether dropout or stochastic depth has drawn random numbers since `seed_dropout`. No synchronization."""
    on_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[torch.cuda.current_device()] if on_gpu else torch.default_generator
    return not torch.equal(generator.get_state(), torch.Generator(device).manual_seed(seed).get_state())


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that the device's dropout and stochastic depth draw from; costs about a microsecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
