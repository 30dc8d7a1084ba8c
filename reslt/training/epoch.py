"""One epoch of training."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from reslt.core.errors import Stopped, UserError
from reslt.core.log import progress_bar
from reslt.core.signals import signal_name
from reslt.evaluation.metrics import EpochStats
from reslt.loading.batches import Loader
from reslt.training.state import Progress
from reslt.training.step import TrainStep
from reslt.training.watch import NotFinite, Request, Watch

REFRESH_SECONDS = 1.0


FILES_TOLD = 256  # of a batch whose loss is not finite


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
    shard, begun_at = train_step.shard, progress.steps
    totals = torch.tensor(progress.own_sums(shard.rank, shard.processes), dtype=torch.float32).to(accelerator.device)
    first = progress.epoch * len(loader)  # step of the run that the epoch begins with
    watch.begin(first + progress.steps)

    def save_all() -> None:
        """Read the sums back from the devices, and have everything written."""
        progress.loss_sums, progress.hits = accelerator.gather(totals[None]).T.tolist()
        save(progress)
        watch.saved()

    shown = asked = time.perf_counter()
    try:
        with progress_bar(is_main, title, len(loader), progress.steps) as bar:
            for window in loader.windows(progress.epoch, progress.steps):
                progress.waited += time.perf_counter() - asked
                step = first + progress.steps
                loss, hits = train_step.update(window, step)
                if ema is not None:
                    ema.update(raw_model, step=step)
                totals += torch.stack([loss, hits])
                progress.steps += 1
                progress.images += shard.batch_size
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


def _stopped(request: Request, progress: Progress, steps: int) -> Stopped:
    where = f"in epoch {progress.epoch + 1}, behind step {progress.steps} of {steps}"
    return Stopped(request.signal, f"stopped by {signal_name(request.signal)} {where}")


def _not_finite(fault: NotFinite, epoch: int, first: int, loader: Loader, optimizer: torch.optim.Optimizer) -> str:
    """What a user needs to find the cause; `first` is the step of the run that the epoch begins with."""
    places = loader.places(epoch, fault.step - first)
    more = [f"and {len(places) - FILES_TOLD} more"] * (len(places) > FILES_TOLD)
    files = "\n  ".join(places[:FILES_TOLD] + more)
    return (
        f"epoch {epoch + 1}, step {fault.step - first + 1} of {len(loader)}, learning rate "
        f"{optimizer.param_groups[0]['lr']:.4g}: the loss is {fault.loss}. Nothing since the last checkpoint is kept. Lower "
        f"--lr, give --clip-grad, use --mixed-precision bf16 or no, or look at the images of this batch:\n  {files}"
    )
