"""Real runs that are killed, damaged, out of disk space and signalled: does every one of them end as if nothing had been?

    python -m tests.chaos [--kills 100] [--damages 300] [--seed 0] [--jobs 2]

A run of train.py on the embedded digits, undisturbed, is the reference: weights, moving average and optimizer of its last and
best checkpoints, its summary without what depends on the clock, its tables. Every disturbed run must end with the same bytes.
Prints a table of figures, and every fault with its reproducer; exit code 1 where there is one. Leaves nothing behind.

Processes are started in two ways: as users do (`python train.py ...`), and, to save the seconds that imports take, by fork
from this process, which has imported everything, trained nothing, and has one thread. Linux and macOS.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

import evaluate
import train
from reslt import checkpoint, report, run_folder
from reslt import engine as _engine  # noqa: F401  what train.py imports when it runs: the forked need it
from reslt.errors import UserError
from reslt.files import lock_file
from reslt.prepare.subsets import make_if_embedded
from reslt.sources import DATA_LISTS, PROJECT, resolve

CLOCK = {"images_per_second", "waiting"}  # columns of summary.csv that differ from run to run
EVALUATED = 150  # images of each of the validation and the test list
LONGEST = 300.0  # seconds; a process that takes longer hangs
STOPPED_WITHIN = 10.0  # seconds from a signal to the end
MOST_KILLS = 6  # of one run
IN_STARTUP, IN_WRITING = (
    0.15,
    0.3,
)  # shares of the kills before training begins, and aimed at the writing of a checkpoint
MOST_CHECKPOINTS = 3  # of a finished run: two, and the best
PAGE = 4096
TERM, KILL = signal.SIGTERM, signal.SIGKILL
FLAGS = [
    "--model",
    "cifar_resnet20",
    "--model-kwargs",
    "channels=8,16,32",
    "--img-size",
    "16",
    "--epochs",
    "3",
    "--batch-size",
    "16",
    "--warmup-epochs",
    "1",
    "--workers",
    "1",
    "--model-ema",
    "--model-ema-decay",
    "0.9",
    "--mixup",
    "0.2",
    "--drop",
    "0.1",
    "--eval-every",
    "1",
    "--checkpoint-minutes",
    "0.002",
    "--checkpoint-hist",
    "2",
    "--experiment",
    "run",
    "--resume",
    "auto",
]
OFTEN, BEHIND_EPOCHS = ("--checkpoint-minutes", "1e-9"), ("--checkpoint-minutes", "none")


@dataclass
class Findings:
    """What came of some trials: counts under names, and what was not survived."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __iadd__(self, other: Findings) -> Findings:
        self.counts.update(other.counts)
        self.faults += other.faults
        return self


@dataclass(frozen=True)
class Ground:
    """Where everything happens, and what an undisturbed run came to."""

    work: Path
    flags: tuple[str, ...]
    reference: Path  # the folder of the undisturbed run
    startup: float = 0.0  # seconds of a process as users start it, until it enters the run's folder
    training: float = 0.0  # seconds from there to the end


# What a run came to


def comes_to(run: Path) -> dict[str, bytes]:
    """Everything that must be the same however often a run was disturbed. Raises OSError where the run is not finished."""
    kept = {}
    for pointer in (run / "checkpoints" / "last", run / "checkpoints" / "best"):
        if pointer.name == "last" or pointer.exists():
            name = pointer.read_text().strip()
            kept[pointer.name] = name.encode()
            for file in (pointer.parent / name).glob("*.safetensors"):
                kept[f"{pointer.name} {file.name}"] = file.read_bytes()
            progress = json.loads((pointer.parent / name / "state.json").read_text())["progress"]
            kept[f"{pointer.name} progress"] = str({k: progress[k] for k in ("epoch", "steps", "loss_sums")}).encode()
    kept["per_class.csv"] = (run / "per_class.csv").read_bytes()
    kept["result.json"] = (run / "result.json").read_bytes()
    with open(run / "summary.csv", newline="") as lines:
        rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(lines)]
    kept["summary.csv"] = json.dumps(rows).encode()
    return kept


def differences(run: Path, reference: Path) -> list[str]:
    """The names of what differs between two finished runs; what keeps a run from being read, where it is not finished."""
    expected = comes_to(reference)
    try:
        found = comes_to(run)
    except (OSError, ValueError, KeyError) as fault:
        return [f"unfinished: {fault}"]
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def left_behind(run: Path) -> list[str]:
    """What a finished run should not hold: half-written files, and checkpoints beyond the two kept beside the best."""
    kept = [folder.name for folder in run_folder.newest_first(run)]
    hidden = [path.name for place in (run, run / "checkpoints") for path in place.glob(".*")]
    return hidden + ([f"checkpoints {' '.join(kept)}"] if len(kept) > MOST_CHECKPOINTS else [])


# Processes


class Forked:
    """A forked child with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
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
    """A child in a process group of its own that calls `first`, then an entry point with these arguments."""
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
    """A fresh process in a process group of its own."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=PROJECT, stdout=output, stderr=output, start_new_session=True
        )


def kill(process: Process) -> bool:
    """SIGKILL a process and its whole group. Whether it was alive, and this is what it died of."""
    was_alive = process.poll() is None
    for end in (os.killpg, os.kill):  # a child that was just forked has no group yet
        try:
            end(process.pid, KILL)
        except (ProcessLookupError, PermissionError):
            continue
    return process.wait(LONGEST) == -KILL and was_alive


@contextmanager
def watched(process: Process) -> Iterator[Process]:
    """Nothing of a process outlives the block."""
    try:
        yield process
    finally:
        kill(process)


def ended(process: Process, seconds: float) -> bool:
    """Whether a process ends by itself within this time."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return False
    return True


# One run, disturbed


class Trial:
    """A run of its own that is started again and again."""

    def __init__(self, ground: Ground, kind: str, seed: int, output: Path | None = None):
        self.ground, self.kind, self.seed = ground, kind, seed
        self.folder = Path(tempfile.mkdtemp(dir=ground.work, prefix="trial-"))
        self.run = (output or self.folder) / "run"
        self.random, self.log, self.lives = random.Random(f"{kind} {seed}"), self.folder / "log-0", 0
        self.told: list[str] = []  # what was done to it, for a fault's report
        self.findings = Findings()

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, *more: str, plain: bool = False, first: Callable[[], None] = lambda: None) -> Process:
        """The command of the run, resuming, in a new process; its output goes to a new log."""
        self.lives += 1
        self.log = self.folder / f"log-{self.lives}"
        arguments = [*self.ground.flags, "--output", str(self.run.parent), *more]
        return launch(["train.py", *arguments], self.log) if plain else fork(train.main, arguments, self.log, first)

    def has_entered(self, process: Process, timeout: float = LONGEST) -> bool:
        """Wait until a process has entered the run's folder; False where it ended first."""
        end = time.monotonic() + timeout
        lock = lock_file(self.run)
        while time.monotonic() < end and process.poll() is None:
            if lock.exists() and lock.read_text() == str(process.pid):
                return True
            time.sleep(0.002)
        return False

    def was_writing(self, process: Process) -> bool:
        """Whether there is something half written of a process, dead or alive."""
        places = (self.run, self.run / "checkpoints")
        return any(True for place in places for _ in place.glob(f".{process.pid}.*"))

    def awaits_writing(self, process: Process, at_most: float) -> None:
        """Wait until a process writes something, and up to 30 ms more."""
        end = time.monotonic() + at_most
        while not self.was_writing(process) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.03))

    def ends_well(self, *more: str, plain: bool = False, counted: str = "runs") -> bool:
        """Start the run once more, undisturbed: it must end with exit code 0 and the reference's bytes."""
        with watched(self.start(*more, plain=plain)) as process:
            return self.has_ended_well(process, counted)

    def has_ended_well(self, process: Process, counted: str = "runs") -> bool:
        """The same of a process that is under way."""
        self.findings.counts[counted] += 1
        if not ended(process, LONGEST):
            return self.fault(f"no end within {LONGEST:.0f} s")
        if process.returncode:
            return self.fault(f"exit code {process.returncode}")
        if wrong := differences(self.run, self.ground.reference):
            return self.fault(f"differs from the undisturbed run in {', '.join(wrong)}")
        if left := left_behind(self.run):
            self.fault(f"left behind for good: {', '.join(left)}")
        self.findings.counts[f"{counted} equal"] += 1
        return True

    def fault(self, what: str) -> bool:
        """Note what was not survived, with its story and the last lines of the log. False."""
        story = "; ".join(self.told) or "undisturbed"
        tail = self.log.read_text(errors="replace").strip().splitlines()[-12:] if self.log.exists() else []
        lines = "\n".join(f"      {line[:300]}" for line in tail)
        self.findings.faults.append(f"{self.kind} (seed {self.seed}): {what}\n    after: {story}\n{lines}")
        return False

    @property
    def output(self) -> str:
        """What the newest process printed."""
        return self.log.read_text(errors="replace")

    def is_told_plainly(self, code: int) -> bool:
        """Whether a process ended with exit code 2, one `error: ...` and no traceback."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        if code == 2 and len(errors) == 1 and "Traceback" not in self.output:
            return True
        return self.fault(f"exit code {code}, {len(errors)} messages, want exit code 2 and one message, no traceback")

    def has_whole_checkpoints(self) -> bool:
        """Whether there is a checkpoint, every one verifies, and nothing half written lies about."""
        folders = run_folder.newest_first(self.run)
        broken = [folder.name for folder in folders if not verifies(folder)]
        left = left_behind(self.run)
        if broken or left or not folders:
            return self.fault(f"checkpoints {[f.name for f in folders]}, broken {broken}, left over {left}")
        return True


def verifies(folder: Path) -> bool:
    """Whether a checkpoint loads."""
    try:
        checkpoint.load(folder)
    except UserError:
        return False
    return True


def undisturbed(ground: Ground) -> Ground:
    """The ground with its reference made, by the plain command, and its times."""
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


# Kills at random moments


def killed_at_random(ground: Ground, seed: int, most: int, plain: bool) -> Findings:
    """Kill a run up to `most` times, start it again each time, let it end."""
    with Trial(ground, f"killed, started {'as users do' if plain else 'by fork'}", seed) as trial:
        findings = trial.findings
        kills = writing = 0
        while kills < most:
            with watched(trial.start(plain=plain)) as process:
                if trial.random.random() < IN_STARTUP:
                    wait = trial.random.uniform(0, ground.startup)
                    if ended(process, wait):
                        break
                else:
                    wait = trial.random.uniform(0, ground.training / 2)
                    if not trial.has_entered(process) or ended(process, wait):
                        break
                    if trial.random.random() < IN_WRITING:
                        trial.awaits_writing(process, at_most=ground.training)
                if not kill(process):
                    break
                kills += 1
                writing += trial.was_writing(process)
                names = [folder.name for folder in run_folder.newest_first(trial.run)]
                trial.told.append(f"SIGKILL {wait:.3f} s in, checkpoints {' '.join(names) or 'none'}")
        if process.returncode == -KILL:
            process = trial.start(plain=plain)
        with watched(process):
            survived = trial.has_ended_well(process)
        findings.counts += Counter({"kills": kills, "kills plain": kills * plain, "kills writing": writing})
        findings.counts["kills survived"] += kills * survived
        return findings


# Kills at every stage of writing a checkpoint


class Stages:
    """Counts the calls by which files are written while a checkpoint is, in a forked child; kills it at one of them.

    A call that writes a file's content counts twice: before it, and with half of the bytes written."""

    def __init__(self, kind: str, fatal: int | None, record: Path):
        self.kind, self.fatal, self.record = kind, fatal, record
        self.saves = self.stages = self.depth = 0
        self.is_armed = False

    def install(self) -> None:
        """Wrap what writes, for the rest of this process."""
        for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, self.watch(name, getattr(os, name)))
        Path.write_text = self.in_halves("write_text", Path.write_text, lambda path, text: path)
        checkpoint.save_file = self.in_halves("save_file", checkpoint.save_file, lambda tensors, path: path)
        run_folder.save = self.active("save", run_folder.save)
        run_folder.choose_best = self.active("choose_best", run_folder.choose_best)
        run_folder.prune = self.active("prune", run_folder.prune)
        report.Summary.add = self.active("summary", report.Summary.add)

    def active(self, name: str, function: Callable) -> Callable:
        """A part of writing a checkpoint, within which calls are counted where the wished checkpoint is written."""

        def wrapped(*args, **kwargs):
            if name == "save":
                self.begin(progress=args[4], steps_per_epoch=args[5])
            if name == "summary" and self.kind == "before its row":
                self.die("summary.csv")
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return wrapped

    def begin(self, progress, steps_per_epoch: int) -> None:
        """A checkpoint is about to be written: is it the wished one?"""
        self.saves += 1
        is_end = progress.steps == steps_per_epoch
        is_wished = {
            "within an epoch": self.saves >= 4 and not is_end,  # one is removed then
            "at an epoch's end": is_end and progress.epoch == 1,
            "written again": True,
        }.get(self.kind, False)
        self.is_armed = is_wished and not self.stages

    def watch(self, name: str, function: Callable) -> Callable:
        """A call that is counted before it is made."""

        def wrapped(*args, **kwargs):
            self.reach(f"{name} {named(args[0])}")
            return function(*args, **kwargs)

        return wrapped

    def in_halves(self, name: str, function: Callable, target: Callable) -> Callable:
        """A call that writes a file, counted before it and in the middle."""

        def wrapped(*args, **kwargs):
            file = Path(target(*args[:2]))
            self.reach(f"{name} {named(file)}")

            def halve():
                content = file.read_bytes()
                file.write_bytes(content[: len(content) // 2])

            result = function(*args, **kwargs)
            self.reach(f"half of {name} {named(file)}", halve)
            return result

        return wrapped

    def reach(self, stage: str, before: Callable[[], None] = lambda: None) -> None:
        """A stage is reached, perhaps the fatal one."""
        if not (self.is_armed and self.depth):
            return
        self.stages += 1
        if self.stages == self.fatal:
            before()
            self.die(stage)
        if self.fatal is None:
            with open(self.record, "a") as record:
                record.write(f"{stage}\n")

    def die(self, stage: str) -> None:
        """Kill this process and its workers at once."""
        with open(self.record, "a") as record:
            record.write(f"killed before {stage}\n")
        os.killpg(os.getpid(), KILL)
        time.sleep(LONGEST)


def named(path: object) -> str:
    """A path's last part without a process's number; of an open file, nothing."""
    return re.sub(r"^\.\d+\.", "new ", Path(path).name) if isinstance(path, (str, Path)) else "flushed"


KINDS = ("within an epoch", "at an epoch's end", "written again")


def prepare_stage(trial: Trial, kind: str) -> tuple[str, ...]:
    """Bring a trial to where the checkpoint of a kind is written next; returns the flags of that process.

    'written again': a run whose only checkpoint is that of an epoch's end, killed before the epoch had its row: resumed, it
    writes that checkpoint once more."""
    if kind == "within an epoch":
        return OFTEN
    if kind == "at an epoch's end":
        return (*BEHIND_EPOCHS, "--checkpoint-hist", "1")
    stages = Stages("before its row", None, trial.folder / "record-0")
    with watched(trial.start(*BEHIND_EPOCHS, first=stages.install)) as process:
        ended(process, LONGEST)
    return BEHIND_EPOCHS


def count_stages(ground: Ground, kind: str) -> list[str]:
    """The stages of writing one checkpoint, in words, by a run that is not disturbed."""
    with Trial(ground, f"stages of a checkpoint {kind}", 0) as trial:
        more, record = prepare_stage(trial, kind), trial.folder / "record"
        with watched(trial.start(*more, first=Stages(kind, None, record).install)) as process:
            if not trial.has_ended_well(process):
                raise SystemExit(trial.findings.faults[0])
        return record.read_text().splitlines() if record.exists() else []


def killed_at_stage(ground: Ground, kind: str, number: int, stage: str) -> Findings:
    """Kill a run at one stage (from 1) of writing a checkpoint; start it again."""
    with Trial(ground, f"killed while a checkpoint was written {kind}", number) as trial:
        more, record = prepare_stage(trial, kind), trial.folder / "record"
        with watched(trial.start(*more, first=Stages(kind, number, record).install)) as process:
            ended(process, LONGEST)
            was_killed = process.returncode == -KILL and record.exists()
        trial.told.append(record.read_text().strip() if was_killed else f"stage {stage} was not reached")
        if not was_killed:
            trial.fault(f"this stage was not reached: exit code {process.returncode}")
            return trial.findings
        survived = trial.ends_well()
        trial.findings.counts += Counter({"stage kills": 1, "stage kills survived": int(survived)})
        return trial.findings


# Damage


def truncated(content: bytes, random: random.Random) -> bytes:
    return content[: random.randrange(len(content))]


def without_last_byte(content: bytes, random: random.Random) -> bytes:
    return content[:-1]


def with_flipped_bit(content: bytes, random: random.Random) -> bytes:
    changed = bytearray(content)
    changed[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(changed)


def with_zeros(content: bytes, random: random.Random) -> bytes:
    """A random range is zeroed, from a byte on that is not zero yet."""
    start = random.choice([i for i in random.sample(range(len(content)), min(len(content), 999)) if content[i]])
    length = random.randint(1, len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def with_added_byte(content: bytes, random: random.Random) -> bytes:
    return content + random.choice([b"\n", b"\0", b" ", random.randbytes(1)])


def emptied(content: bytes, random: random.Random) -> bytes:
    return b""


CHANGES = (truncated, without_last_byte, with_flipped_bit, with_zeros, with_added_byte, emptied)
DAMAGES = (*(change.__name__ for change in CHANGES), "deleted", "swapped")


def damage(folder: Path, kind: str, random: random.Random) -> str:
    """Damage a checkpoint in one of `DAMAGES`; returns what was done, in words. Hard links elsewhere keep their content."""
    files = sorted(folder.iterdir())
    file = random.choice(files)
    content = file.read_bytes()
    file.unlink()
    if kind == "swapped":
        other = random.choice([f for f in files if f != file])
        theirs = other.read_bytes()
        other.unlink()
        file.write_bytes(theirs)
        other.write_bytes(content)
        return f"{file.name} and {other.name} swapped"
    if kind != "deleted":
        change = next(change for change in CHANGES if change.__name__ == kind)
        file.write_bytes(change(content, random))
    return f"{file.name} {kind}"


def linked(run: Path, copy: Path) -> Path:
    """A copy of a run's folder by hard links, for changes that replace files."""
    return Path(shutil.copytree(run, copy, copy_function=os.link))


def refused(ground: Ground, seed: int) -> Findings:
    """Damage one checkpoint of a finished run: it must not load, and resuming must take another and tell why."""
    with Trial(ground, "damaged", seed) as trial:
        linked(ground.reference, trial.run)
        folders = run_folder.newest_first(trial.run)
        kind = DAMAGES[seed % len(DAMAGES)]
        victim = trial.random.choice(folders)
        trial.told.append(f"{victim.name}: {damage(victim, kind, trial.random)}")
        counts = trial.findings.counts
        counts["damages"] += 1
        try:
            checkpoint.load(victim)
            counts["damages loaded"] += 1
            trial.fault("the checkpoint loads")
            return trial.findings
        except UserError as fault:
            reason = str(fault)
        state = checkpoint.load(next(f for f in folders if f != victim)).state
        config = resolve([*ground.flags, "--output", str(trial.run.parent)]).config
        found, told = run_folder.to_resume(trial.run, config, state["num_classes"], state["lists"])
        expected = folders[0] if victim != folders[0] else folders[1]
        was_met = victim == folders[0]
        if str(victim) not in reason:
            trial.fault(f"the message does not name {victim}: {reason}")
        elif found is None or found.folder != expected:
            trial.fault(f"resumed from {found and found.folder}, expected {expected}")
        elif was_met != any(line.startswith("skipped: ") and reason in line for line in told):
            trial.fault(f"what is told of it: {told}")
        else:
            counts["damages refused"] += 1
        return trial.findings


def goes_on_from_an_older(ground: Ground, seed: int, plain: bool) -> Findings:
    """With its newest checkpoint damaged, a finished run goes on from the older one to the same end."""
    with Trial(ground, "newest damaged", seed) as trial:
        linked(ground.reference, trial.run)
        newest = run_folder.newest_first(trial.run)[0]
        trial.told.append(damage(newest, trial.random.choice(DAMAGES), trial.random))
        if trial.ends_well(plain=plain, counted="damaged runs") and f"skipped: {newest}" not in trial.output:
            trial.findings.counts["damaged runs equal"] -= 1
            trial.fault("what was skipped is not told")
        return trial.findings


def cannot_go_on(ground: Ground, seed: int, plain: bool) -> Findings:
    """With every checkpoint damaged, the run ends with a message that names each."""
    with Trial(ground, "all damaged", seed) as trial:
        linked(ground.reference, trial.run)
        folders = run_folder.newest_first(trial.run)
        trial.told += [damage(folder, trial.random.choice(DAMAGES), trial.random) for folder in folders]
        trial.findings.counts["hopeless runs"] += 1
        with watched(trial.start(plain=plain)) as process:
            ended(process, LONGEST)
        if trial.is_told_plainly(process.returncode):
            if all(str(folder) in trial.output for folder in folders):
                trial.findings.counts["hopeless runs told"] += 1
            else:
                trial.fault("the message does not name every checkpoint")
        return trial.findings


POINTERS = {
    "empty": b"",
    "garbage": b"what is this?\n",
    "of nothing": b"9-999\n",
    "binary": bytes(range(256)),
    "null": b"\0\n",
    "long": b"7" * 5000,
    "two lines": b"3-54\n2-36\n",
    "elsewhere": b"../..\n",
}


def wrong_pointer(ground: Ground, name: str, kind: str, is_resumed: bool) -> Findings:
    """A damaged `last` or `best`: resuming does not care, evaluate.py works or tells what is wrong."""
    with Trial(ground, f"the file `{name}` is damaged: {kind}", 0) as trial:
        linked(ground.reference, trial.run)
        pointer = trial.run / "checkpoints" / name
        pointer.unlink()
        pointer.write_bytes(POINTERS[kind])
        trial.findings.counts["pointers"] += 1
        arguments = ["--ckpt", str(trial.run), "--which", name, "--output", str(trial.folder / "evaluated")]
        trial.log = trial.folder / "log-evaluate"
        with watched(fork(evaluate.main, arguments, trial.log)) as process:
            ended(process, LONGEST)
        is_fine = process.returncode == 0 or trial.is_told_plainly(process.returncode)
        if is_resumed:
            is_fine = trial.ends_well(counted="damaged runs") and is_fine
        trial.findings.counts["pointers survived"] += is_fine
        return trial.findings


# Full disks


def begun(trial: Trial) -> None:
    """Train until there are two checkpoints, then stop in order."""
    with watched(trial.start()) as process:
        end = time.monotonic() + LONGEST
        while len(run_folder.newest_first(trial.run)) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid, TERM)
        ended(process, STOPPED_WITHIN)


def limited_files(ground: Ground, seed: int) -> Findings:
    """No file may grow beyond some size that a checkpoint's file exceeds."""
    with Trial(ground, "file size limited", seed) as trial:
        largest = max(f.stat().st_size for f in run_folder.newest_first(ground.reference)[0].iterdir())
        begun(trial)
        limit = trial.random.randrange(20_000, largest)
        trial.told.append(f"RLIMIT_FSIZE {limit}")
        trial.findings.counts["full disks"] += 1
        with watched(trial.start(first=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))) as process:
            ended(process, LONGEST)
        is_told = trial.is_told_plainly(process.returncode)
        if is_told and "could not be written" not in trial.output:
            is_told = trial.fault("the message does not say `could not be written`")
        is_whole = trial.has_whole_checkpoints()
        trial.findings.counts["full disks survived"] += trial.ends_well() and is_told and is_whole
        return trial.findings


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of 16 MiB; None where this process may not mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    is_linux = sys.platform.startswith("linux")
    if not is_linux or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def full_disk(ground: Ground, seed: int, free_pages: int) -> Findings:
    """So many pages are free when a begun run goes on: it ends with a message, or gets by, and goes on once there is room."""
    with (
        Trial(ground, f"disk full but for {free_pages} pages", seed) as trial,
        small_disk(trial.folder / "disk") as disk,
    ):
        if disk is None:
            trial.findings.counts["disks not mounted"] += 1
            return trial.findings
        trial.run = disk / "run"
        begun(trial)
        filler = disk / "filler"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(max(free - free_pages * PAGE, 0)))
        trial.findings.counts["full disks"] += 1
        with watched(trial.start()) as process:
            ended(process, LONGEST)
        is_told = process.returncode == 0 or trial.is_told_plainly(process.returncode)
        filler.unlink()
        is_whole = trial.has_whole_checkpoints()
        trial.findings.counts["full disks survived"] += trial.ends_well() and is_told and is_whole
        return trial.findings


def pages_of_a_checkpoint(ground: Ground) -> int:
    """Pages that the files of a checkpoint take."""
    files = run_folder.newest_first(ground.reference)[0].iterdir()
    return sum(math.ceil(file.stat().st_size / PAGE) for file in files)


# Signals


def signalled(ground: Ground, number: int, seed: int, plain: bool) -> Findings:
    """A signal that asks a run to stop, at a random moment; then the run goes on."""
    name = signal.Signals(number).name
    with Trial(ground, f"{name}, started {'as users do' if plain else 'by fork'}", seed) as trial:
        counts = trial.findings.counts
        with watched(trial.start(plain=plain)) as process:
            if plain and seed % 4 == 3:
                wait = trial.random.uniform(0.2, ground.startup)
                ended(process, wait)
            else:
                wait = trial.random.uniform(0, ground.training * 0.9)
                trial.has_entered(process)
                ended(process, wait)
            if process.poll() is None:
                trial.told.append(f"{name} {wait:.3f} s in")
                counts["signals"] += 1
                os.kill(process.pid, number)
                sent = time.monotonic()
                is_fine = ended(process, STOPPED_WITHIN)
                if not is_fine:
                    trial.fault(f"alive {STOPPED_WITHIN:.0f} s after {name}")
                trial.told.append(f"ended {time.monotonic() - sent:.2f} s later with {process.returncode}")
                is_late = process.returncode in (0, -number) and not differences(trial.run, ground.reference)
                as_shells_say = {128 + number, -number}  # the latter before Python runs our code, and after
                if is_fine and not is_late and process.returncode not in as_shells_say:
                    is_fine = trial.fault(f"exit code {process.returncode}, expected {128 + number}")
                if is_fine and "Traceback" in trial.output:
                    is_fine = trial.fault("a traceback")
                if is_fine and not is_late and "\nmethod " in trial.output:
                    is_fine = stopped_in_order(trial, name)
                counts["signals obeyed"] += is_fine
        trial.ends_well(counted="signalled runs")
        return trial.findings


def stopped_in_order(trial: Trial, name: str) -> bool:
    """Whether a process that had begun to train says so, and wrote a checkpoint where it says that it stopped."""
    said = re.search(
        rf"stopped by ({name}|Ctrl-C) (while evaluating|in epoch (\d+), behind step (\d+) of (\d+))", trial.output
    )
    if not said:
        return trial.fault(f"no line `stopped by {name} ...`")
    newest = run_folder.newest_first(trial.run)[0].name
    if said[3]:
        epoch, step, steps = map(int, said.groups()[2:])
        if not newest.endswith(f"-{(epoch - 1) * steps + step}"):
            return trial.fault(f"the newest checkpoint is {newest}")
    return True


# Two processes


def two_processes(launcher: str) -> list[str]:
    """The start of a command that trains with two processes on the CPU."""
    if launcher == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]


class TwoProcesses(Trial):
    """A trial whose run is one of two processes."""

    launcher = "torchrun"

    def start(self, *more: str, plain: bool = True, first: Callable[[], None] = lambda: None) -> Process:
        """A launcher in a new process, with its two."""
        self.lives += 1
        self.log = self.folder / f"log-{self.lives}"
        arguments = ["train.py", *self.ground.flags, "--output", str(self.run.parent), *more]
        return launch([*two_processes(self.launcher), *arguments], self.log)

    def ranks(self, process: Process) -> list[psutil.Process]:
        """The processes that train."""
        try:
            children = psutil.Process(process.pid).children()
            return [child for child in children if any(part.endswith("train.py") for part in child.cmdline())]
        except psutil.Error:
            return []

    def has_entered(self, process: Process, timeout: float = LONGEST) -> bool:
        """Wait until the ranks train: a checkpoint is there that was not."""
        before, end = run_folder.newest_first(self.run), time.monotonic() + timeout
        while time.monotonic() < end and process.poll() is None:
            if run_folder.newest_first(self.run) != before and len(self.ranks(process)) == 2:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def watched_tree(process: Process) -> Iterator[Process]:
    """Nothing of a launcher or of what it started outlives the block; ranks have process groups of their own."""
    try:
        yield process
    finally:
        end_tree(process)


def end_tree(process: Process) -> None:
    """SIGKILL a process and all its descendants."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.Error:
        tree = []
    for member in tree:
        with_no_such_process(member.kill)
    kill(process)
    psutil.wait_procs(tree, timeout=LONGEST)


def with_no_such_process(act: Callable[[], None]) -> None:
    """Do something to a process that may be gone."""
    try:
        act()
    except psutil.Error:
        return


def disturbed_pair(ground: Ground, how: str, launcher: str, seed: int) -> Findings:
    """Two processes of which one or all are killed, or whose launcher gets a SIGTERM; then the run goes on."""
    with TwoProcesses(ground, f"two processes ({launcher}), {how}", seed) as trial:
        trial.launcher = launcher
        trial.findings.counts["pairs"] += 1
        with watched_tree(trial.start()) as process:
            if not trial.has_entered(process):
                trial.fault(f"no training: exit code {process.poll()}")
                return trial.findings
            ended(process, trial.random.uniform(0, ground.training / 2))
            ranks = trial.ranks(process)
            if how == "SIGTERM of the launcher":
                os.kill(process.pid, TERM)
            elif how == "SIGKILL of one":
                with_no_such_process(trial.random.choice(ranks).kill)
            else:
                for rank in ranks:
                    with_no_such_process(rank.kill)
            is_ended = ended(process, 60)
            trial.told.append(f"{how}: the launcher ended with {process.returncode}")
        if not is_ended:
            trial.fault("the launcher did not end within 60 s")
        if how.startswith("SIGTERM") and process.returncode and "stopped by SIGTERM" not in trial.output:
            is_ended = trial.fault("no process says that it stopped in order")
        with watched_tree(trial.start()) as process:
            is_equal = trial.has_ended_well(process, counted="paired runs")
        trial.findings.counts["pairs survived"] += is_equal and is_ended
        return trial.findings


def with_two_processes(ground: Ground, seed: int, say: Callable[[str], None]) -> Findings:
    """An undisturbed run of two processes, and disturbed ones; one after the other, as each takes two cores."""
    findings = Findings()
    ground = replace(ground, reference=ground.work / "reference of two")
    with TwoProcesses(ground, "two processes, undisturbed", seed) as trial, watched_tree(trial.start()) as process:
        trial.has_entered(process)
        entered = time.monotonic()
        if not ended(process, LONGEST) or process.returncode:
            trial.fault(f"exit code {process.returncode}")
            return trial.findings
        ground = replace(ground, training=time.monotonic() - entered)
        trial.run.rename(ground.reference)
    for i, how in enumerate(("SIGKILL of one", "SIGTERM of the launcher", "SIGKILL of all") * 2):
        findings += disturbed_pair(ground, how, ("torchrun", "accelerate launch")[i % 2], seed + i)
        say(f"two processes: {findings.counts['pairs survived']} of {findings.counts['pairs']}")
    return findings


# All of it


@dataclass
class Chaos:
    """The whole: a ground, processes that carry out trials side by side, and what was found so far."""

    ground: Ground
    pool: ProcessPoolExecutor
    jobs: int
    seed: int
    start: float
    findings: Findings = field(default_factory=Findings)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.start:6.0f} s  {text}", flush=True)

    def gather(self, title: str, futures: list[Future], every: int = 10) -> None:
        """Wait for trials, and keep what they found."""
        for done, future in enumerate(as_completed(futures), start=1):
            found = future.result()
            self.findings += found
            for fault in found.faults:
                self.say(f"FAULT {fault.splitlines()[0]}")
            if done % every == 0 or done == len(futures):
                self.say(f"{title}: {done} of {len(futures)}")

    def kill_at_random(self, wished: int) -> None:
        """A quarter of the kills and more with processes started as users do."""
        counts, rounds = self.findings.counts, 0
        while counts["kills"] < wished:
            missing = wished - counts["kills"]
            tasks = []
            while missing > 0:
                most = min(MOST_KILLS, missing)
                missing -= most
                is_plain = counts["kills plain"] + sum(m for m, plain in tasks if plain) < wished / 3
                tasks.append((most, is_plain))
            seeds = range(self.seed * 10_000 + rounds * 100, (self.seed + 1) * 10_000)
            pairs = zip(seeds, tasks, strict=False)
            futures = [self.pool.submit(killed_at_random, self.ground, seed, *task) for seed, task in pairs]
            self.gather("runs killed at random moments", futures, every=1)
            rounds += 1
            if rounds > wished:
                raise SystemExit("processes cannot be killed in time: they end too fast")

    def kill_at_stages(self, most: int) -> None:
        """At every stage of writing a checkpoint, or, where that is more than `most`, at some."""
        counted = [self.pool.submit(count_stages, self.ground, kind) for kind in KINDS]
        stages = [
            (kind, number, stage)
            for kind, future in zip(KINDS, counted, strict=True)
            for number, stage in enumerate(future.result(), start=1)
        ]
        self.findings.counts["stages"] = len(stages)
        chosen = stages if most >= len(stages) else random.Random(self.seed).sample(stages, most)
        futures = [self.pool.submit(killed_at_stage, self.ground, *stage) for stage in chosen]
        self.gather("kills at stages of a checkpoint", futures)

    def damage(self, wished: int, trials: int) -> None:
        """Damaged checkpoints in one process, and, from end to end, as many as `trials` says."""
        submit, first = self.pool.submit, self.seed * 10_000
        self.gather("damaged checkpoints", [submit(refused, self.ground, first + i) for i in range(wished)], every=100)
        futures = [submit(goes_on_from_an_older, self.ground, first + i, i % 3 == 2) for i in range(trials)]
        futures += [submit(cannot_go_on, self.ground, first + i, i % 3 == 2) for i in range(math.ceil(trials / 2))]
        kinds = [(name, kind) for kind in POINTERS for name in ("last", "best")][: 4 * trials]
        futures += [submit(wrong_pointer, self.ground, *kind, i % 4 == 0) for i, kind in enumerate(kinds)]
        self.gather("damaged runs", futures)

    def fill_disks(self, trials: int) -> None:
        """Files that may not grow, and a disk that is really full, from no page at all to more than a checkpoint."""
        needed = pages_of_a_checkpoint(self.ground)
        pages = [
            needed,
            0,
            needed // 2,
            needed + 1,
            1,
            needed - 1,
            2,
            needed + 2,
            3,
            needed // 3,
            needed - 2,
            needed + 3,
        ]
        submit, first = self.pool.submit, self.seed * 10_000
        futures = [submit(limited_files, self.ground, first + i) for i in range(math.ceil(trials / 2))]
        futures += [submit(full_disk, self.ground, first, free) for free in pages[: 2 * trials]]
        self.gather("full disks", futures)

    def signal(self, trials: int) -> None:
        """Each signal that asks a run to stop, `trials` times."""
        numbers = (TERM, signal.SIGINT, signal.SIGUSR1)
        seeds = [(number, self.seed * 10_000 + i) for i in range(trials) for number in numbers]
        futures = [self.pool.submit(signalled, self.ground, *pair, pair[1] % 2 == 1) for pair in seeds]
        self.gather("signals", futures)

    def table(self) -> str:
        """The figures."""
        c = self.findings.counts
        wholes = ("runs", "damaged runs", "signalled runs", "paired runs")
        equal = sum(c[f"{name} equal"] for name in wholes)
        lines = [
            f"kills survived {c['kills survived']} of {c['kills']} at random moments ({c['kills writing']} of them while "
            f"something was written, {c['kills plain']} of processes started as users do)",
            f"kills survived {c['stage kills survived']} of {c['stage kills']} at stages of writing a checkpoint (of "
            f"{c['stages']} stages)",
            f"runs ended bit-equal {equal} of {sum(c[name] for name in wholes)}",
            f"damaged checkpoints refused {c['damages refused']} of {c['damages']}, loaded {c['damages loaded']}",
            f"runs without any whole checkpoint told so {c['hopeless runs told']} of {c['hopeless runs']}",
            f"damaged pointers survived {c['pointers survived']} of {c['pointers']}",
            f"full disks survived {c['full disks survived']} of {c['full disks']}"
            + (", none of them really full: no disk could be mounted" if c["disks not mounted"] else ""),
            f"signals obeyed {c['signals obeyed']} of {c['signals']}",
            f"two processes survived {c['pairs survived']} of {c['pairs']}"
            if c["pairs"]
            else "two processes: not in a quick version",
            f"faults {len(self.findings.faults)}",
            f"wall time {time.monotonic() - self.start:.0f} s",
        ]
        return "\n".join(lines)


def write_lists(folder: Path) -> None:
    """The embedded digits, with a validation and a test list of a part of its test images."""
    make_if_embedded("digits_lt")
    folder.mkdir()
    source = DATA_LISTS / "digits_lt"
    tested = random.Random(0).sample((source / "test.txt").read_text().splitlines(keepends=True), 2 * EVALUATED)
    shutil.copy(source / "train.txt", folder)
    shutil.copy(source / "info.yaml", folder)
    (folder / "val.txt").write_text("".join(tested[:EVALUATED]))
    (folder / "test.txt").write_text("".join(tested[EVALUATED:]))


def chaos(kills: int, damages: int, seed: int, jobs: int, work: Path) -> Findings:
    """Everything, in a folder; prints progress and the table."""
    start = time.monotonic()
    write_lists(work / "digits")
    images = PROJECT / "data" / "digits_lt"
    flags = ("--data", str(work / "digits"), "--data-dir", str(images), *FLAGS)
    ground = undisturbed(Ground(work, flags, work / "reference"))
    is_quick = kills < 20
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            whole = Chaos(ground, pool, jobs, seed, start)
            whole.say(f"undisturbed: {ground.startup:.1f} s of start and {ground.training:.1f} s of training")
            whole.damage(damages, trials=1 if is_quick else 6)
            whole.fill_disks(trials=1 if is_quick else 6)
            whole.signal(trials=1 if is_quick else 8)
            whole.kill_at_stages(most=kills if is_quick else 10 * kills)
            whole.kill_at_random(kills)
        finally:
            pool.shutdown(cancel_futures=True)
    if not is_quick:
        whole.findings += with_two_processes(ground, seed, whole.say)
    for fault in whole.findings.faults:
        print(f"FAULT {fault}")
    print(whole.table())
    return whole.findings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at random moments; below 20: a quick version of all")
    parser.add_argument("--damages", type=int, default=300, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the damage")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    given = parser.parse_args(arguments)
    signal.signal(TERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "tmp").mkdir()
        os.environ |= {"TMPDIR": f"{folder}/tmp", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        tempfile.tempdir = None  # read TMPDIR anew
        torch.set_num_threads(1)  # of the forked, as the variable does for the others
        findings = chaos(given.kills, given.damages, given.seed, given.jobs, Path(folder))
    sys.exit(1 if findings.faults else 0)


if __name__ == "__main__":
    main()
