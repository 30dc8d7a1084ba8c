"""One epoch of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
from timm.utils import ModelEmaV3

from reslt.augment.transfers import let_device_finish
from reslt.core.errors import Stopped, UserError
from reslt.core.log import logger, progress_bar
from reslt.core.phases import STEP, WAITING, Phases
from reslt.core.signals import signal_name
from reslt.core.turns import take_turns
from reslt.core.waiting import Wait
from reslt.loading.batches import Loader
from reslt.training.state import EpochStats, Progress
from reslt.training.step import TrainStep
from reslt.training.watch import NotFinite, Request, Watch

REFRESH_SECONDS = 1.0
LINE_SECONDS = 30.0  # between two lines if there is no bar
FILES_NAMED = 256  # in a message about a batch with a loss that is not finite


class Pace:
    """An estimate of a run's remaining time from the wall time of its steps, evaluation included, since it began or
    resumed."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic):
        self.total_steps, self.clock = total_steps, clock
        self.began: tuple[int, float] | None = None

    def begin(self, steps_done: int) -> None:
        """Start timing at step `steps_done` (of the run, from 0). Only the first call counts."""
        self.began = self.began or (steps_done, self.clock())

    def seconds_left(self, steps_done: int) -> float:
        """Return the estimated seconds until the run's last step."""
        first_step, since = self.began
        return (self.clock() - since) / max(steps_done - first_step, 1) * (self.total_steps - steps_done)


def train_epoch(
    train_step: TrainStep,
    loader: Loader,
    progress: Progress,
    watch: Watch,
    pace: Pace,
    *,
    ema: ModelEmaV3 | None = None,
    save: Callable[[Progress, bool], None] = lambda progress, is_awaited: None,
    phases: Phases | None = None,
    line_seconds: float = LINE_SECONDS,
) -> EpochStats:
    """Train the remaining steps of an epoch, and update `progress`.

    `save(progress, is_awaited)` is called on all processes when a checkpoint is due, at the end of the run's last epoch, and
    before the run stops. Only in the last case, `is_awaited` is True: `save` must return after the checkpoint is written.

    Progress is shown as a bar on a terminal, and as a line every `line_seconds` elsewhere. No step waits for the device.
    Raises Stopped after a signal, and UserError, which names the files of the batch, if a loss is not finite."""
    accelerator, is_main = train_step.accelerator, train_step.accelerator.is_main_process
    raw_model = accelerator.unwrap_model(train_step.model)
    train_step.train_mode()
    if progress.steps == 0:  # a resumed epoch began before its checkpoint
        train_step.begin_epoch()
    shard, begun_at, phases = train_step.shard, progress.steps, phases or Phases(is_of_process=False)
    totals = torch.tensor(progress.own_sums(shard.rank, shard.processes), dtype=torch.float32).to(accelerator.device)
    first = progress.epoch * len(loader)  # the epoch's first step, counted over the run
    watch.begin(first + progress.steps)
    pace.begin(first + progress.steps)
    step_wait = Wait("the end of a step, in which all processes take part")
    title = f"epoch {progress.epoch + 1}/{pace.total_steps // len(loader)}"

    def read_sums() -> None:
        """Read the sums back from the devices of all processes."""
        let_device_finish(accelerator.device)
        with Wait("the other processes to add up their losses"):
            progress.loss_sums, progress.hits = accelerator.gather(totals[None]).T.tolist()

    def take_checkpoint(request: Request | None) -> None:
        save(progress, bool(request and request.signal))
        watch.saved()

    phases.begin(WAITING)
    step_phase = STEP if phases.seconds["first step"] else "first step"
    shown = asked = time.perf_counter()
    try:
        with progress_bar(is_main, title, len(loader), progress.steps) as bar:
            for window in loader.windows(progress.epoch, progress.steps):
                phases.begin(step_phase)
                progress.waited += time.perf_counter() - asked
                step = first + progress.steps
                with step_wait:
                    loss, hits = train_step.update(window, step)
                    if ema is not None:
                        ema.update(raw_model, step=step)
                    totals += torch.stack([loss, hits])
                    request = watch.after(step, loss)
                take_turns()
                progress.steps += 1
                progress.images += sum(len(labels) for _, labels in window) * shard.processes
                now = time.perf_counter()
                progress.seconds += now - asked
                asked = now
                bar.update()
                if request and progress.steps < len(loader):  # the last step's is written below
                    read_sums()
                    take_checkpoint(request)
                    if request.signal:
                        raise _stopped(request, progress, len(loader))
                    asked = time.perf_counter()
                if is_main and now - shown > (line_seconds if bar.disable else REFRESH_SECONDS):
                    shown = now
                    run_left = _hours(pace.seconds_left(first + progress.steps))
                    state = f"loss {watch.loss:.3f}, lr {train_step.learning_rate:.3g}, "
                    state += f"{progress.images / progress.seconds:.0f} img/s, "
                    state += f"waiting {progress.waited / progress.seconds:.0%}"
                    bar.set_postfix_str(f"{state}, run {run_left} left")
                    if bar.disable:
                        epoch_left = _hours(progress.seconds / progress.steps * (len(loader) - progress.steps))
                        done = f"{title}, step {progress.steps}/{len(loader)}"
                        logger.info(f"{done}: {state}, {epoch_left} left in the epoch, {run_left} in the run")
                step_phase = STEP
                phases.begin(WAITING)
            phases.begin(STEP)  # the device finishes the last steps
            with step_wait:
                request = watch.finish(first + progress.steps)
    except NotFinite as fault:
        raise UserError(_not_finite(fault, progress.epoch, first, loader, train_step.learning_rate)) from None
    if progress.steps > begun_at:
        read_sums()
        if request or first + progress.steps == pace.total_steps:
            take_checkpoint(request)
    if request and request.signal:
        raise _stopped(request, progress, len(loader))
    return progress.stats(is_mixed=train_step.mixing is not None)


def _hours(seconds: float) -> str:
    """Seconds -> H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))


def _stopped(request: Request, progress: Progress, steps: int) -> Stopped:
    where = f"in epoch {progress.epoch + 1}, after step {progress.steps} of {steps}"
    return Stopped(request.signal, f"stopped by {signal_name(request.signal)} {where}")


def _not_finite(fault: NotFinite, epoch: int, first: int, loader: Loader, learning_rate: float) -> str:
    """Return a message that helps to find the cause. `first`: the epoch's first step, counted over the run."""
    places = loader.places(epoch, fault.step - first)
    more = [f"and {len(places) - FILES_NAMED} more"] * (len(places) > FILES_NAMED)
    files = "\n  ".join(places[:FILES_NAMED] + more)
    return (
        f"epoch {epoch + 1}, step {fault.step - first + 1} of {len(loader)}, learning rate "
        f"{learning_rate:.4g}: the loss is {fault.loss}. Steps since the last checkpoint are lost. Lower "
        f"--lr, give --clip-grad, use --mixed-precision bf16 or no, or check the images of this batch:\n  {files}"
    )
