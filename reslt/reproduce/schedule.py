"""The schedule of the runs of a table, for any launcher."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from reslt.core.locks import AT_WORK, is_locked
from reslt.core.signals import StopRequests
from reslt.reproduce.jobs import Ended, duration
from reslt.reproduce.rows import Run
from reslt.reproduce.status import RunStatus, read_status

LOOK_SECONDS = 0.2  # between two looks for a signal


class Launcher(Protocol):
    """A place that trains runs, alone or in groups: processes of this machine, or jobs of a cluster."""

    poll_seconds: float  # between two calls of `ended`

    def room(self) -> int:
        """Return the number of further runs that can be started now."""

    def begun(self, runs: list[Run]) -> dict[Run, str]:
        """Return {run: description} of those runs that an earlier call started and that still train."""

    def start(self, runs: list[Run]) -> dict[Run, str]:
        """Start runs, up to the `room`. Return {run: description}. A run that is missing in it must wait, or `ended` returns
        it next."""

    def ended(self) -> list[Ended]:
        """Return the runs that have ended since the last call."""

    def stop(self) -> str:
        """End the processes that must not outlive this one. Return a message for the user about the active runs."""

    def log(self, run: Run) -> Path:
        """Return the file to which a run prints."""


class Trainings:
    """Training of runs. A run that starts or learns from another waits for it."""

    def __init__(self, launcher: Launcher, skipped: int, total: int):
        """`skipped`: the number of the `total` runs that are not trained, for the count in printed lines."""
        self.launcher, self.count, self.total = launcher, skipped, total
        self.waiting: list[Run] = []
        self.active: dict[Run, str | None] = {}  # the checkpoint at its start, None if unknown
        self.locked: set[Run] = set()  # waiting runs with a folder that another process uses
        self.places: dict[Run, str] = {}  # such as "[3/9] recipe seed 0"
        self.starts: dict[Run, float] = {}  # in seconds of the monotonic clock

    def train(self, runs: list[Run], finished: Callable[[Run, RunStatus], None]) -> None:
        """Train each run and call `finished`. If interrupted, stop the launcher and raise KeyboardInterrupt or
        SystemExit."""
        self.waiting, self.finished = list(runs), finished
        with StopRequests() as requests:  # so that a signal during the start of a run does not lose it
            try:
                self._note(self.launcher.begun(runs), before={})
                while self.waiting or self.active:
                    for ended in self.launcher.ended():
                        self._settle(ended)
                    self._start()
                    if _rest(self.launcher.poll_seconds * bool(self.waiting or self.active), requests):
                        break
            finally:
                message = self.launcher.stop()
        if requests.number:
            print(message, file=sys.stderr)
            raise KeyboardInterrupt if requests.number == signal.SIGINT else SystemExit(128 + requests.number)

    def _start(self) -> None:
        """Start the runs that can begin now, up to the launcher's room."""
        ready, room = [], self.launcher.room()
        unfinished = {*self.waiting, *self.active}
        for run in list(self.waiting):
            if len(ready) >= room:
                break
            if any(required in unfinished for required in run.requires):
                continue
            progress = _fault_of_required(run)
            if progress is None and is_locked(run.config.run_folder):
                room -= 1  # a process that an earlier, killed call left also uses this machine
                if run not in self.locked:
                    self.locked.add(run)
                    message = f"waiting for another process that is using {run.config.run_folder}"
                    print(f"{self._place(run)}: {message}", flush=True)
                continue
            self.locked.discard(run)
            progress = progress or read_status(run)
            if progress.result or progress.fault:
                self.waiting.remove(run)
                self._finish(run, progress)
            else:
                ready.append(run)
        before = {run: _newest_checkpoint(run) for run in ready}
        self._note(self.launcher.start(ready) if ready else {}, before)

    def _note(self, started: dict[Run, str], before: dict[Run, str]) -> None:
        for run, how in started.items():
            self.waiting.remove(run)
            self.active[run] = before.get(run)
            self.starts.setdefault(run, time.monotonic())
            print(f"{self._place(run)}: {how}, log: {self.launcher.log(run)}", flush=True)

    def _settle(self, ended: Ended) -> None:
        """Finish a run that has ended, or queue it for another start."""
        run, reason, was_stopped = ended
        if run in self.waiting:  # it could not be started
            self.waiting.remove(run)
        before, progress = self.active.pop(run, ""), read_status(run)
        has_progressed = before is None or _newest_checkpoint(run) != before
        if not progress.result:
            if reason is None:
                reason = "it wrote no result; does the dataset have a list to evaluate on?"
                progress = RunStatus(progress.epochs_done, fault=reason)
            elif AT_WORK in reason or (was_stopped and has_progressed):
                # Another process was faster, or a time limit was reached.
                self.waiting.insert(0, run)
                if was_stopped:
                    print(f"{self._place(run)}: to be continued: {reason}", flush=True)
                return
            else:
                without = " without a new checkpoint" if was_stopped else ""
                progress = RunStatus(fault=f"{reason}{without}, log: {self.launcher.log(run)}")
        self._finish(run, progress)

    def _finish(self, run: Run, progress: RunStatus) -> None:
        last = progress.result and f"{progress.result.last['all']:.1f} at the last epoch"
        seconds = time.monotonic() - self.starts.get(run, time.monotonic())
        print(f"{self._place(run)}: {last or f'failed: {progress.fault}'} ({duration(seconds)})", flush=True)
        self.finished(run, progress)

    def _place(self, run: Run) -> str:
        if run not in self.places:
            self.count += 1
            self.places[run] = f"[{self.count}/{self.total}] {run.name}"
        return self.places[run]


def _fault_of_required(run: Run) -> RunStatus | None:
    missing = next((required for required in run.requires if not read_status(required).result), None)
    if missing is None:
        return None
    how = "starts" if missing is run.first_stage else "learns"
    return RunStatus(fault=f"the run that it {how} from, {missing.config.run.experiment}, has no result")


def _newest_checkpoint(run: Run) -> str:
    """Return the name of a run's newest checkpoint; "" if there is none."""
    last = run.config.run_folder / "checkpoints" / "last"
    return last.read_text().strip() if last.is_file() else ""


def _rest(seconds: float, requests: StopRequests) -> int:
    """Wait for `seconds`, or until a signal arrives. Return its number; 0 if there was none."""
    deadline = time.monotonic() + seconds
    while not requests.number and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, LOOK_SECONDS))
    return requests.number
