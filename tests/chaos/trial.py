"""Processes, started as users start them or by fork, and a run that is started in such processes again and again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import train
from reslt.config.places import PROJECT
from reslt.core.errors import UserError
from reslt.core.locks import is_locked
from reslt.runs import checkpoint
from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground, differences, leftovers

LONGEST = 300.0  # seconds; a process that takes longer hangs
STOPPED_WITHIN = 10.0  # seconds from a signal to the end
TERM, KILL = signal.SIGTERM, signal.SIGKILL


# Processes


class Forked:
    """A forked child with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the exit code and return it. Raise subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.005)
        return self.returncode


Process = Forked | subprocess.Popen


def fork(
    main: Callable[[], None], arguments: Iterable[str], log: Path, first: Callable[[], None] = lambda: None
) -> Forked:
    """Fork a child in its own process group, which calls `first`, then an entry point with these arguments."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(TERM, signal.SIG_DFL)
        sys.argv = ["main.py", *map(str, arguments)]
        first()
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(command: list[str], log: Path) -> subprocess.Popen:
    """Start a new process in its own process group."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=PROJECT, stdout=output, stderr=output, start_new_session=True
        )


def kill(process: Process) -> bool:
    """SIGKILL a process and its whole group; return whether it was alive and died of this."""
    was_alive = process.poll() is None
    for end in (os.killpg, os.kill):  # a child that was just forked has no group yet
        try:
            end(process.pid, KILL)
        except (ProcessLookupError, PermissionError):
            continue
    return process.wait(LONGEST) == -KILL and was_alive


@contextmanager
def watched(process: Process) -> Iterator[Process]:
    """Kill a process and its group at the end of the block."""
    try:
        yield process
    finally:
        kill(process)


def ended(process: Process, seconds: float) -> bool:
    """Return whether a process ends by itself within this time."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return False
    return True


# One run, disturbed


class Trial:
    """A run in its own folder that is started again and again."""

    def __init__(self, ground: Ground, kind: str, seed: int, output: Path | None = None):
        self.ground, self.kind, self.seed = ground, kind, seed
        self.folder = Path(tempfile.mkdtemp(dir=ground.work, prefix="trial-"))
        self.run = (output or self.folder) / "run"
        self.random, self.log, self.lives = random.Random(f"{kind} {seed}"), self.folder / "log-0", 0
        self.history: list[str] = []  # the disturbances so far, for the report of a fault
        self.findings = Findings()

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, *more: str, plain: bool = False, first: Callable[[], None] = lambda: None) -> Process:
        """Start or resume the run in a new process; its output goes to a new log."""
        self.lives += 1
        self.log = self.folder / f"log-{self.lives}"
        arguments = [*self.ground.flags, "--output", str(self.run.parent), *more]
        return launch(["train.py", *arguments], self.log) if plain else fork(train.main, arguments, self.log, first)

    def has_entered(self, process: Process, timeout: float = LONGEST) -> bool:
        """Wait until a process has entered the run's folder; return False if it ends first."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and process.poll() is None:
            if is_locked(self.run):
                return True
            time.sleep(0.002)
        return False

    def was_writing(self, process: Process) -> bool:
        """Return whether a process, dead or alive, has a half-written file."""
        places = (self.run, self.run / "checkpoints")
        return any(True for place in places for _ in place.glob(f".{process.pid}-*"))

    def await_writing(self, process: Process, at_most: float) -> None:
        """Wait until a process writes a file, and up to 30 ms more."""
        end = time.monotonic() + at_most
        while not self.was_writing(process) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.03))

    def ends_well(self, *more: str, plain: bool = False, counted: str = "runs") -> bool:
        """Start the run once more, undisturbed: it must end with exit code 0 and the reference's bytes."""
        with watched(self.start(*more, plain=plain)) as process:
            return self.has_ended_well(process, counted)

    def has_ended_well(self, process: Process, counted: str = "runs") -> bool:
        """Wait for a started process: it must end with exit code 0 and the reference's bytes."""
        self.findings.counts[counted] += 1
        if not ended(process, LONGEST):
            return self.fault(f"no end within {LONGEST:.0f} s")
        if process.returncode:
            return self.fault(f"exit code {process.returncode}")
        if wrong := differences(self.run, self.ground.reference):
            return self.fault(f"differs from the undisturbed run in {', '.join(wrong)}")
        if left := leftovers(self.run):
            self.fault(f"never removed: {', '.join(left)}")
        self.findings.counts[f"{counted} equal"] += 1
        return True

    def fault(self, what: str) -> bool:
        """Record a fault with the history of the trial and the last lines of the log; return False."""
        history = "; ".join(self.history) or "undisturbed"
        tail = self.log.read_text(errors="replace").strip().splitlines()[-12:] if self.log.exists() else []
        lines = "\n".join(f"      {line[:300]}" for line in tail)
        self.findings.faults.append(f"{self.kind} (seed {self.seed}): {what}\n    after: {history}\n{lines}")
        return False

    @property
    def output(self) -> str:
        """The text that the newest process printed."""
        return self.log.read_text(errors="replace")

    def is_reported_plainly(self, code: int) -> bool:
        """Return whether a process ended with exit code 2, one line `error: ...` and no traceback."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        if code == 2 and len(errors) == 1 and "Traceback" not in self.output:
            return True
        return self.fault(
            f"exit code {code}, {len(errors)} messages; expected exit code 2, one message and no traceback"
        )

    def has_whole_checkpoints(self) -> bool:
        """Return whether there is a checkpoint, every one is valid, and no half-written file is left."""
        folders = run_folder.newest_first(self.run)
        broken = [folder.name for folder in folders if not is_valid(folder)]
        left = leftovers(self.run)
        if broken or left or not folders:
            return self.fault(f"checkpoints {[f.name for f in folders]}, broken {broken}, left over {left}")
        return True


def is_valid(folder: Path) -> bool:
    """Return whether a checkpoint loads."""
    try:
        checkpoint.load(folder)
    except UserError:
        return False
    return True


def undisturbed(ground: Ground) -> Ground:
    """Train the reference as users do; return the ground with it and its times."""
    with Trial(ground, "undisturbed", 0) as trial:
        start = time.monotonic()
        with watched(trial.start(plain=True)) as process:
            trial.has_entered(process)
            entered = time.monotonic()
            if not ended(process, LONGEST) or process.returncode:
                raise SystemExit(f"the undisturbed run failed:\n{trial.output}")
        shutil.rmtree(ground.reference, ignore_errors=True)
        trial.run.rename(ground.reference)
        return replace(ground, startup=entered - start, training=time.monotonic() - entered)
