"""Stop signals, the checkpoint timer and non-finite losses, agreed on by all ranks at the same step. No step waits for
the device.

About twice a second, the ranks `look`: each puts the losses of its last steps and its requests into one small tensor,
and the sum over ranks is the answer. On a GPU, the answer is copied to the host asynchronously and read at the next
look."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from reslt.core.signals import STOP_SIGNALS, StopRequests
from reslt.core.turns import let_others_work_until

LOOK_SECONDS = 0.5
KEPT = 64  # losses; at least as many as steps between a look and the one after the next
MOST_STEPS = 16  # between looks


@dataclass(frozen=True)
class Request:
    """A request to all processes after this step: write a checkpoint, and stop if `signal` is not 0."""

    signal: int


class NotFinite(Exception):
    """A step's loss is not finite."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss of step {step} is {loss}")
        self.step, self.loss = step, loss


class Watch:
    """Monitoring of a run's steps, with the same outcome on every process."""

    def __init__(
        self,
        accelerator: Accelerator,
        requests: StopRequests,
        checkpoint_minutes: float | None = None,
        checkpoint_seconds: float = 0.0,
        has_failed: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`checkpoint_minutes`, `checkpoint_seconds`: the time since the last checkpoint after which another is due,
        mid-epoch and at the end of an epoch; `has_failed`: whether a checkpoint could not be written, so that another is due
        at once."""
        self.accelerator, self.requests, self.clock = accelerator, requests, clock
        self.seconds_between = math.inf if checkpoint_minutes is None else 60 * checkpoint_minutes
        self.seconds_between_epochs, self.has_failed = checkpoint_seconds, has_failed
        self.losses = torch.zeros(KEPT, device=accelerator.device)  # step s at s % KEPT
        self.loss = math.nan  # of the global batch, at the newest step of the last answer
        self.is_alone = accelerator.num_processes == 1
        self.is_on_gpu = accelerator.device.type == "cuda"
        self.is_lagging = self.is_on_gpu  # an answer is read one look later
        self.last_saved = clock()
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin at step `step` (of the run, from 0)."""
        self.next_look, self.steps_between, self.asked = step + 1, 1, None
        self.look_step, self.look_time = step, self.clock()

    def saved(self) -> None:
        """Note that a checkpoint has just been taken."""
        self.last_saved = self.look_time = self.clock()

    def after(self, step: int, loss: torch.Tensor) -> Request | None:
        """Check after step `step`. `loss`: this process's share of the loss. Raises NotFinite on all processes together."""
        self.losses[step % KEPT] = loss
        if self.is_alone and self.requests.number:
            return Request(self.requests.number)
        if step + 1 < self.next_look:
            return None
        return self._look(step + 1, self.seconds_between, at_once=not self.is_lagging)

    def finish(self, steps_done: int) -> Request | None:
        """Look for the last time in an epoch, and wait for the answer."""
        earlier = self._look(steps_done, self.seconds_between_epochs, at_once=True)
        return earlier or (Request(self.requests.number) if self.is_alone and self.requests.number else None)

    def _look(self, steps_done: int, seconds_between: float, at_once: bool) -> Request | None:
        answered = [self._answer()] if self.asked else []
        is_old = self.clock() - self.last_saved >= seconds_between or self.has_failed()
        self._ask(steps_done, is_due=is_old and not any(answered))
        self.look_step, self.look_time = steps_done, self.clock()
        if at_once:
            answered.append(self._answer())
        self.next_look = steps_done + self.steps_between
        found = [request for request in answered if request]
        return max(found, key=lambda request: request.signal, default=None)

    def _ask(self, steps_done: int, is_due: bool) -> None:
        seconds = max(self.clock() - self.look_time, 1e-6) / max(steps_done - self.look_step, 1)
        wishes = [float(self.requests.number == number) for number in STOP_SIGNALS]
        wishes += [float(is_due and self.accelerator.is_main_process)]
        wishes += [min(max(LOOK_SECONDS / seconds, 1.0), float(MOST_STEPS))]
        wished = torch.tensor(wishes, pin_memory=self.is_on_gpu).to(self.losses.device, non_blocking=True)
        total = self.accelerator.reduce(torch.cat([self.losses, wished]), "sum")
        self.asked = steps_done, *self._to_host(total)

    def _to_host(self, total: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Return a copy, and the event after which it is complete; None if it is complete."""
        if not self.is_on_gpu:
            return total.cpu(), None
        on_host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
        on_host.copy_(total, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return on_host, copied

    def _answer(self) -> Request | None:
        """Read the answer: the same numbers, and so the same decisions, on every process."""
        steps_done, on_host, copied = self.asked
        self.asked = None
        if copied is not None:
            let_others_work_until(copied.query)
            copied.synchronize()  # it has completed since the last look
        losses, (*signals, due, steps) = on_host[:KEPT].tolist(), on_host[KEPT:].tolist()
        for step in range(max(steps_done - KEPT, 0), steps_done):
            if not math.isfinite(losses[step % KEPT]):
                raise NotFinite(step, losses[step % KEPT])
        self.loss = losses[(steps_done - 1) % KEPT]
        self.steps_between = max(round(steps / self.accelerator.num_processes), 1)
        number = next((number for number, count in zip(STOP_SIGNALS, signals, strict=True) if count), 0)
        return Request(number) if number or due else None
