"""Runs as processes of this machine, several at once. None outlives this process, unless that is killed. Imports no torch
before GPUs are counted."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import NamedTuple

from reslt.config.places import IS_CHECKOUT, PROJECT
from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.reproduce.rows import Run

GRACE_SECONDS = 60  # for a run to end in order
LONGEST_REASON = 600
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ended(NamedTuple):
    """A run with the outcome of its process or job, which has ended."""

    run: Run
    reason: str | None  # why it failed
    was_stopped: bool = False  # by a time limit or preemption: it continues later if it has progressed


class Process:
    """A process that trains one run."""

    def __init__(self, arguments: Iterable[str], log: Path, variables: Mapping[str, str]):
        """`arguments`: flags of train.py; `variables`: its environment."""
        self.process = _started(train_command(arguments), log, variables)

    def code_of(self, log: Path) -> int | None:
        """Return the exit code; None while it trains."""
        return self.process.poll()


class Group:
    """A process that trains several runs at once, `reslt.reproduce.together`."""

    def __init__(self, log: Path, variables: Mapping[str, str]):
        """`log`: for output that belongs to no run; `variables`: its environment."""
        self.connection, others_end = Pipe()
        command = [sys.executable, "-m", "reslt.reproduce.together", str(others_end.fileno())]
        with others_end:
            self.process = _started(command, log, variables, pass_fds=[others_end.fileno()])
        self.codes: dict[str, int] = {}  # received, by the runs' logs

    def train(self, arguments: Iterable[str], log: Path) -> None:
        """Start to train a run with these flags, while others continue."""
        with suppress(OSError):  # the process has just ended; `code_of` reports it
            self.connection.send((list(arguments), str(log)))

    def code_of(self, log: Path) -> int | None:
        """Return the exit code of the run with this log, or that of the process if it ended first; None while the run
        trains."""
        code_of_process = self.process.poll()
        with suppress(EOFError, OSError):
            while self.connection.poll():
                of_run, code = self.connection.recv()
                self.codes[of_run] = code
        return self.codes.pop(str(log), code_of_process)

    @property
    def has_ended(self) -> bool:
        """Whether it accepts no further runs."""
        return self.process.poll() is not None


class Processes:
    """The launcher of runs on this machine: `jobs` processes at once, each with `streams` runs."""

    poll_seconds = 0.2

    def __init__(self, jobs: int, logs: Path, streams: int = 1):
        """`logs`: folder of the runs' logs."""
        self.jobs, self.streams, self.logs = jobs, streams, logs
        self.gpus = visible_gpus()
        self.groups: dict[
            tuple[int, str], Group
        ] = {}  # by slot and precision, since Accelerate has one precision per process
        self.active: dict[
            Run, tuple[int, int, Process | Group]
        ] = {}  # slot, and the place in its log at which it begins
        self.failed: list[Ended] = []  # runs that could not be started

    def room(self) -> int:
        """Return the number of further runs that can be started now."""
        return self.jobs * self.streams - len(self.active)

    def begun(self, runs: list[Run]) -> dict[Run, str]:
        """Return the runs that an earlier call has started: none, since processes end with it."""
        return {}

    def start(self, runs: list[Run]) -> dict[Run, str]:
        """Start runs, up to the `room`. Return {run: description of its process}."""
        return {run: how for run in runs if (how := self._start(run))}

    def ended(self) -> list[Ended]:
        """Return the runs that have ended since the last call."""
        ended, self.failed = self.failed, []
        for run, (_, begin, process) in list(self.active.items()):
            log = self.log(run)
            if (code := process.code_of(log)) is not None:
                del self.active[run]
                ended.append(Ended(run, reason_of(code, log, begin) if code else None))
        return ended

    def stop(self) -> str:
        """End the active runs with SIGTERM, and, after GRACE_SECONDS or a second Ctrl-C, with SIGKILL. Return a message for
        the user."""
        works = {*(process for _, _, process in self.active.values()), *self.groups.values()}
        children = [work.process for work in works if work.process.poll() is None]
        for child in children:
            child.terminate()
        try:
            deadline = time.monotonic() + GRACE_SECONDS
            for child in children:
                child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            print(f"runs that did not end within {GRACE_SECONDS} s are killed", file=sys.stderr)
        finally:
            for child in children:
                _kill_group(child)
        return "the active runs were stopped; the same command resumes them"

    def log(self, run: Run) -> Path:
        """Return the file to which a run prints."""
        return self.logs / f"{run.config.run.experiment}.log"

    def _start(self, run: Run) -> str | None:
        log, used = self.log(run), [slot for slot, _, _ in self.active.values()]
        slot = min(range(self.jobs), key=used.count)
        try:
            begin = begin_log(log, run.arguments)
            if self.streams > 1:
                process = self._group(run, slot)
                process.train(run.arguments, log)
            else:
                process = Process(run.arguments, log, environment(slot, self.jobs, self.gpus))
        except OSError as fault:  # its log cannot be written; the other runs continue
            self.failed.append(Ended(run, f"{fault.filename}: {fault.strerror}"))
            return None
        self.active[run] = slot, begin, process
        return f"training, process {process.process.pid}"

    def _group(self, run: Run, slot: int) -> Group:
        """Return the process of a slot that trains runs of this precision; start it if necessary."""
        key = slot, run.config.run.mixed_precision
        if key not in self.groups or self.groups[key].has_ended:
            log = self.logs / f"streams-{slot}-{run.config.run.mixed_precision}.log"
            self.groups[key] = Group(log, environment(slot, self.jobs, self.gpus))
        return self.groups[key]


def train_command(arguments: Iterable[str]) -> list[str]:
    """Return the command of a run. Raises UserError if there is no train.py."""
    return [sys.executable, str(script("train.py")), *arguments]


def begin_log(log: Path, arguments: Iterable[str]) -> int:
    """Append the command of a run to its log. Return the place in the file after it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(train_command(arguments))}\n".encode())
        return output.tell()


def run_evaluation(run: Run, arguments: list, log: Path) -> str | None:
    """Run evaluate.py on the folder of a run, and wait for its end. Return the reason if it failed, else None."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script("evaluate.py"), "--ckpt", run.config.run_folder, *arguments]
    command += [part for module in run.config.run.imports for part in ("--import", module)]
    with open(log, "wb") as output:
        code = subprocess.call(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(0, 1, visible_gpus()),
        )
    return f"{reason_of(code, log, 0)}, log: {log}" if code else None


def _started(command: list[str], log: Path, variables: Mapping[str, str], **options) -> subprocess.Popen:
    """Start a process that appends its output to a log."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the runs in order
            **options,
        )


def _kill_group(leader: subprocess.Popen) -> None:
    """Kill the remaining processes of a run, including the workers that decode its images."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)


def reason_of(code: int, log: Path, begin: int) -> str:
    """Return the reason why a run ended with an exit code: its error message, else its last line after `begin` in the log."""
    if code < 0:
        number = -code
        hint = "; out of memory?" if number == signal.SIGKILL else ""
        return f"ended by signal {signal.Signals(number).name}{hint}"
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return last if len(last) <= LONGEST_REASON else last[:LONGEST_REASON] + "..."


def script(name: str) -> Path:
    """Return train.py or evaluate.py of the checkout, else of the current folder. Raises UserError if neither exists."""
    file = PROJECT / name if IS_CHECKOUT else Path(name)
    if not file.is_file():
        raise UserError(f"there is no {name} in this folder; start reslt.reproduce, which runs it, in a checkout")
    return file


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [gpu.strip() for gpu in stated.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Return the environment of the run in a job slot: one process, on one of several GPUs, or on a share of the CPU cores."""
    variables = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    if len(gpus) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if not gpus and jobs > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(available_cores() // jobs, 1)))
    return variables


def duration(seconds: float) -> str:
    """Seconds -> 45 s, 12 min, 3.5 h, 2.1 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
