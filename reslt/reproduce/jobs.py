"""Runs as separate processes, several at once; none outlives this process unless that is killed."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path

import torch

from reslt.config.places import IS_CHECKOUT, PROJECT
from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.locks import AT_WORK, is_locked
from reslt.reproduce.rows import Run
from reslt.reproduce.status import RunStatus, read_status

GRACE_SECONDS = 60  # for a run to end in order
POLL_SECONDS = 1.0
LONGEST_REASON = 600
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """A process that trains several runs at once, `reslt.reproduce.together`."""

    def __init__(self, log: Path, variables: Mapping[str, str]):
        """`log`: for what no run prints; `variables`: its environment."""
        self.connection, others_end = Pipe()
        command = [sys.executable, "-m", "reslt.reproduce.together", str(others_end.fileno())]
        with others_end:
            self.process = _started(command, log, variables, pass_fds=[others_end.fileno()])
        self.guard, self.has_ended = threading.Lock(), False
        self.codes: dict[str, queue.SimpleQueue[int]] = {}  # of the runs that it trains, by their logs
        threading.Thread(target=self._receive, daemon=True).start()

    def train(self, arguments: Iterable[str], log: Path) -> int:
        """Train a run with these flags, beside the others -> its exit code, or that of the process if this ends first."""
        code = self.codes[str(log)] = queue.SimpleQueue()
        with self.guard:
            if self.has_ended:
                return self.process.wait()
            with suppress(OSError):  # it has just ended: see `_receive`
                self.connection.send((list(arguments), str(log)))
        return code.get()

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                log, code = self.connection.recv()
                self.codes.pop(log).put(code)
        code = self.process.wait()
        with self.guard:
            self.has_ended = True
            self.connection.close()
        for of_run in list(self.codes.values()):
            of_run.put(code)


class Trainings:
    """Training of runs, each writing to its own log: `jobs` processes at once, each with `streams` runs."""

    def __init__(self, jobs: int, logs: Path, skipped: int, total: int, streams: int = 1):
        """`skipped` of `total` runs are not trained: for the count in printed lines."""
        self.jobs, self.streams, self.logs, self.count, self.total = jobs, streams, logs, skipped, total
        self.gpus = visible_gpus()
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs * streams):
            self.slots.put(slot % jobs)
        self.groups: dict[tuple[int, str], Group] = {}  # by slot and precision, which Accelerate shares in a process
        self.children: set[subprocess.Popen] = set()
        self.trained: dict[Run, threading.Event] = {}
        self.guard, self.ending = threading.Lock(), threading.Event()

    def train(self, runs: list[Run], finished: Callable[[Run, RunStatus], None]) -> None:
        """Train each run and call `finished`, in this thread. If interrupted, end the active runs. A run that starts, or
        learns, from another comes after it in the list, and waits for it."""
        pool = ThreadPoolExecutor(self.jobs * self.streams)
        try:
            self.trained = {run: threading.Event() for run in runs}
            for future in as_completed([pool.submit(self._train, run) for run in runs]):
                finished(*future.result())
        finally:
            self._end_children()
            pool.shutdown(cancel_futures=True)

    def _train(self, run: Run) -> tuple[Run, RunStatus]:
        with self.guard:
            self.count += 1
            place = f"[{self.count}/{self.total}] {run.name}"
        for required in run.requires:
            while required in self.trained and not self.trained[required].wait(POLL_SECONDS):
                if self.ending.is_set():
                    break
        slot, start = self.slots.get(), time.monotonic()
        try:
            progress = self._fault_of_required(run) or self._until_ended(run, slot, place)
        except OSError as fault:  # of its own folder or log; the other runs continue
            progress = RunStatus(fault=f"{fault.filename}: {fault.strerror}")
        finally:
            self.slots.put(slot)
            self.trained[run].set()
        if progress.result:
            what = f"{progress.result.last['all']:.1f} at the last epoch"
        else:
            what = f"failed: {progress.fault}"
        if not self.ending.is_set():
            _print_line(f"{place}: {what} ({duration(time.monotonic() - start)})")
        return run, progress

    def _fault_of_required(self, run: Run) -> RunStatus | None:
        without = next((required for required in run.requires if not read_status(required).result), None)
        if without is None:
            return None
        how = "starts" if without is run.first_stage else "learns"
        return RunStatus(fault=f"the run that it {how} from, {without.config.run.experiment}, has no result")

    def _until_ended(self, run: Run, slot: int, place: str) -> RunStatus:
        """Train a run, after any process that is using it already, left over from an earlier, killed call."""
        while True:
            self._wait_for_others(run, place)
            progress = read_status(run)
            if progress.result or progress.fault or self.ending.is_set():
                return progress
            reason = self._call(run, slot, place)
            if reason is None:
                progress = read_status(run)
                no_result = "it left no result; does the dataset have a list to evaluate on?"
                return progress if progress.result else RunStatus(progress.epochs_done, fault=no_result)
            if AT_WORK not in reason:  # else another process was faster
                return RunStatus(fault=f"{reason}, log: {self._log(run)}")

    def _wait_for_others(self, run: Run, place: str) -> None:
        folder = run.config.run_folder
        if is_locked(folder):
            _print_line(f"{place}: waiting for another process that is using {folder}")
        while is_locked(folder) and not self.ending.wait(POLL_SECONDS):
            pass

    def _call(self, run: Run, slot: int, place: str) -> str | None:
        """Run train.py to its end. Return why it failed, else None."""
        log = self._log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script("train.py")), *run.arguments]
        with open(log, "ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            begin = output.tell()
        with self.guard:
            if self.ending.is_set():
                return "not started"
            group = self._group(run, slot) if self.streams > 1 else None
            child = group.process if group else _started(command, log, environment(slot, self.jobs, self.gpus))
            self.children.add(child)
        _print_line(f"{place}: training, process {child.pid}, log: {log}")
        code = group.train(run.arguments, log) if group else child.wait()
        with self.guard:
            if child.poll() is not None:
                self.children.discard(child)
        return reason_of(code, log, begin) if code else None

    def _group(self, run: Run, slot: int) -> Group:
        """Return the process of a slot that trains runs of this precision; start it if there is none."""
        key = slot, run.config.run.mixed_precision
        if key not in self.groups or self.groups[key].has_ended:
            log = self.logs / f"streams-{slot}-{run.config.run.mixed_precision}.log"
            self.groups[key] = Group(log, environment(slot, self.jobs, self.gpus))
        return self.groups[key]

    def _log(self, run: Run) -> Path:
        return self.logs / f"{run.config.run.experiment}.log"

    def _end_children(self) -> None:
        """End the active runs: by SIGTERM first; after GRACE_SECONDS, or at a second Ctrl-C, by SIGKILL."""
        with self.guard:
            self.ending.set()
            children = set(self.children)
        for child in children:
            child.terminate()
        try:
            deadline = time.monotonic() + GRACE_SECONDS
            for child in children:
                child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            print(f"killed after {GRACE_SECONDS} s: they did not end", file=sys.stderr)
        finally:
            for child in children:
                _kill_group(child)


def _print_line(text: str) -> None:
    """Print a line by one write: `print` writes the line's end by another, between which other threads may print."""
    print(f"{text}\n", end="", flush=True)


def run_evaluation(run: Run, arguments: list, log: Path) -> str | None:
    """Run evaluate.py on the folder of a run to its end. Return why it failed, else None."""
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
    """Start a process that appends what it prints to a log."""
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
    """Kill the remaining processes of a run: itself, and the workers that decode its images."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)


def reason_of(code: int, log: Path, begin: int) -> str:
    """Return why a run ended with this exit code: its error message, else the last line that it wrote after `begin`."""
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
        raise UserError(f"there is no {name} in this folder; reproduce runs it, so start it in a checkout")
    return file


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [gpu.strip() for gpu in stated.split(",") if gpu.strip() not in ("", "-1")]
    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Return the environment of the run in a job slot: one process, one GPU of several, its share of the CPU cores."""
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
