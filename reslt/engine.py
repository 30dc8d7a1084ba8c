"""Train one epoch, evaluate one list. Everything needed is passed in."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm import tqdm

from reslt.errors import Stopped, UserError
from reslt.images import mix
from reslt.loader import Loader
from reslt.metrics import ClassAccuracies, ClassHits, EpochStats, fused_logits
from reslt.mixing import Mixing
from reslt.models.experts import Experts
from reslt.models.reslt import ResLT
from reslt.shares import Share
from reslt.signals import StopRequests, name_of
from reslt.train_state import Progress
from reslt.watch import NotFinite, Request, Watch

REFRESH_SECONDS = 1.0
FILES_TOLD = 256  # of a batch whose loss is not finite


@dataclass(frozen=True)
class TrainStep:
    """What every step of a run is made of: `model` as Accelerate prepared it, and the rest."""

    model: torch.nn.Module
    loss_fn: torch.nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    share: Share
    normalize: Callable[[torch.Tensor], torch.Tensor]
    seed: int
    mixing: Mixing | None = None
    clip_grad: float | None = None

    def update(self, window: list[tuple[torch.Tensor, torch.Tensor]], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of a global batch, clipped, and the optimizer's step. -> as `gradients`. No synchronisation."""
        told = self.gradients(window, step)
        if self.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return told

    def gradients(
        self, window: list[tuple[torch.Tensor, torch.Tensor]], step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward passes over this process's passes of the global batch of step `step` (of the run): the gradient of that
        batch's loss, on every process alike. -> this process's share of the loss, and its hits (0 where images are mixed).

        Mixing and dropout are drawn from (seed, step), so a resumed run draws the same."""
        share, size = self.share, window[0][0].shape[-2:]
        mixes = None if self.mixing is None else self.mixing.draw(step, share.batch_size, *size)
        targets = [labels for _, labels in window]
        if mixes is not None:
            of_pass = [mixes[positions] for positions in share.positions]
            targets = [self.mixing.targets(y, m) for y, m in zip(targets, of_pass, strict=True)]
        whole = None
        if share.parts > 1:  # the loss's denominators are those of the global batch
            whole = self.accelerator.reduce(sum(self.loss_fn.weights(y) for y in targets), "sum")
        loss_sum, hits = torch.zeros(2, device=self.accelerator.device)
        for i, (images, labels) in enumerate(window):
            is_last = i == len(window) - 1
            images = self.normalize(images)
            if mixes is not None:
                images = self.mixing.mixed(images, of_pass[i])
            seed_dropout(mix(self.seed, step, share.rank * share.passes + i), self.accelerator.device)
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                branch_logits = self.model(images)
                loss = self.loss_fn(branch_logits, targets[i], whole)
                if i == 0:  # behind the forward pass: the new gradients take the old ones' memory, still in the cache
                    self.optimizer.zero_grad(set_to_none=True)
                self.accelerator.backward(loss * share.processes)  # DDP averages over the processes
            loss_sum += loss.detach()
            if mixes is None:
                hits += (fused_logits(branch_logits.detach()).argmax(-1) == labels).sum()
        return loss_sum, hits


def train_epoch(
    train_step: TrainStep,
    loader: Loader,
    progress: Progress,
    watch: Watch,
    *,
    ema=None,
    save: Callable[[Progress], None] = lambda progress: None,
    title: str = "",
) -> EpochStats:
    """The steps of an epoch that `progress` has not done yet; it is kept up to date. `save` is called, on all processes,
    when a checkpoint is due, at the epoch's end, and before the run stops.

    No step waits for the device. Raises Stopped where a signal came, and UserError, with the files of the batch, where a
    loss is not finite."""
    accelerator, is_main = train_step.accelerator, train_step.accelerator.is_main_process
    raw_model = accelerator.unwrap_model(train_step.model)
    raw_model.train()
    share, begun_at = train_step.share, progress.steps
    totals = torch.tensor(progress.own_sums(share.rank, share.processes), dtype=torch.float32).to(accelerator.device)
    first = progress.epoch * len(loader)  # step of the run that the epoch begins with
    watch.begin(first + progress.steps)

    def save_all() -> None:
        """Read the sums back from the devices, and have everything written."""
        progress.loss_sums, progress.hits = accelerator.gather(totals[None]).T.tolist()
        save(progress)
        watch.saved()

    shown = asked = time.perf_counter()
    try:
        with _bar(is_main, title, len(loader), progress.steps) as bar:
            for window in loader.windows(progress.epoch, progress.steps):
                progress.waited += time.perf_counter() - asked
                step = first + progress.steps
                loss, hits = train_step.update(window, step)
                if ema is not None:
                    ema.update(raw_model, step=step)
                totals += torch.stack([loss, hits])
                progress.steps += 1
                progress.images += share.batch_size
                now = time.perf_counter()
                progress.seconds += now - asked
                asked = now
                bar.update()
                request = watch.after(step, loss)
                if request and progress.steps < len(loader):  # else it is written behind the epoch's end
                    save_all()
                    if request.signal:
                        raise _stopped(request, progress, len(loader))
                    asked = time.perf_counter()
                if not bar.disable and now - shown > REFRESH_SECONDS:
                    shown = now
                    bar.set_postfix_str(
                        f"loss {watch.loss:.3f}, lr {train_step.optimizer.param_groups[0]['lr']:.3g}, "
                        f"{progress.images / progress.seconds:.0f} img/s, waiting {progress.waited / progress.seconds:.0%}"
                    )
            request = watch.finish(first + progress.steps)
    except NotFinite as fault:
        raise UserError(_not_finite(fault, progress.epoch, first, loader, train_step.optimizer)) from None
    if progress.steps > begun_at:
        save_all()
    if request and request.signal:
        raise _stopped(request, progress, len(loader))
    return progress.stats(is_mixed=train_step.mixing is not None)


@torch.inference_mode()
def evaluate(
    model: ResLT | Experts,
    loader: Loader,
    accelerator: Accelerator,
    num_classes: int,
    title: str = "",
    requests: StopRequests | None = None,
) -> ClassAccuracies:
    """Every image of the list once, each process its part -> accuracies per class, fused, per branch and per expert.

    Raises Stopped, on all processes, where a signal came to one."""
    model.eval()
    hits = ClassHits(model.logits_per_image, num_classes, accelerator.device)
    with _bar(accelerator.is_main_process, title, len(loader)) as bar:
        for images, labels in loader.epoch(0):
            if requests and requests.number:
                break
            with accelerator.autocast():
                branch_logits = model(images)
            hits.update(branch_logits, labels)
            bar.update()
    came = torch.tensor([requests.number if requests else 0], device=accelerator.device)
    number = int(accelerator.gather(came).max())
    if number:
        raise Stopped(number, f"stopped by {name_of(number)} while evaluating")
    hits.hits, hits.images = (accelerator.reduce(counts, "sum") for counts in (hits.hits, hits.images))
    return hits.accuracies()


def _bar(is_shown: bool, title: str, steps: int, done: int = 0) -> tqdm:
    """A bar on a terminal; nothing elsewhere, or on another process than the first."""
    return tqdm(
        total=steps,
        initial=done,
        desc=title,
        unit="batch",
        leave=False,
        disable=None if is_shown else True,
        dynamic_ncols=True,
    )


def _stopped(request: Request, progress: Progress, steps: int) -> Stopped:
    where = f"in epoch {progress.epoch + 1}, behind step {progress.steps} of {steps}"
    return Stopped(request.signal, f"stopped by {name_of(request.signal)} {where}")


def _not_finite(fault: NotFinite, epoch: int, first: int, loader: Loader, optimizer: torch.optim.Optimizer) -> str:
    """What a user needs to find the cause; `first` is the step of the run that the epoch begins with."""
    places = loader.places(epoch, fault.step - first)
    more = [f"and {len(places) - FILES_TOLD} more"] * (len(places) > FILES_TOLD)
    told = "\n  ".join(places[:FILES_TOLD] + more)
    return (
        f"epoch {epoch + 1}, step {fault.step - first + 1} of {len(loader)}, learning rate "
        f"{optimizer.param_groups[0]['lr']:.4g}: the loss is {fault.loss}. Nothing since the last checkpoint is kept. Lower "
        f"--lr, give --clip-grad, use --mixed-precision bf16 or no, or look at the images of this batch:\n  {told}"
    )


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that the device's dropout and stochastic depth draw from; costs about a microsecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
