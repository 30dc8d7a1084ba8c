"""Kills at random moments, and at every stage of writing a checkpoint."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

from reslt.runs import checkpoint, summary, writer
from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground
from tests.chaos.trial import KILL, LONGEST, Trial, ended, kill, watched

IN_STARTUP = 0.15  # share of the kills before training begins
IN_WRITING = 0.3  # share of the others that are aimed at the writing of a checkpoint
MOST_KILLS = 6  # per run
# kinds of checkpoints; runs are killed at each stage of writing them
KINDS = ("within an epoch", "at an epoch's end", "written again", "of a new best epoch")
OFTEN, AFTER_EPOCHS = ("--checkpoint-minutes", "1e-9"), ("--checkpoint-minutes", "none")


# Kills at random moments


def killed_at_random(ground: Ground, seed: int, most: int, plain: bool) -> Findings:
    """Kill a run up to `most` times, start it again each time, and let it end. For odd seeds it writes no checkpoint at an
    epoch's end unless it must."""
    seldom = ("--checkpoint-seconds", "1000") if seed % 2 else ()
    with Trial(ground, f"killed, started {'as users do' if plain else 'by fork'}", seed) as trial:
        findings = trial.findings
        kills = writing = 0
        while kills < most:
            with watched(trial.start(*seldom, plain=plain)) as process:
                if trial.random.random() < IN_STARTUP:
                    delay = trial.random.uniform(0, ground.startup)
                    if ended(process, delay):
                        break
                else:
                    delay = trial.random.uniform(0, ground.training / 2)
                    if not trial.has_entered(process) or ended(process, delay):
                        break
                    if trial.random.random() < IN_WRITING:
                        trial.await_writing(process, at_most=ground.training)
                if not kill(process):
                    break
                kills += 1
                writing += trial.was_writing(process)
                names = [folder.name for folder in run_folder.newest_first(trial.run)]
                trial.history.append(f"SIGKILL {delay:.3f} s in, checkpoints {' '.join(names) or 'none'}")
        if process.returncode == -KILL:
            process = trial.start(*seldom, plain=plain)
        with watched(process):
            survived = trial.has_ended_well(process)
        findings.counts += Counter({"kills": kills, "kills plain": kills * plain, "kills writing": writing})
        findings.counts["kills survived"] += kills * survived
        return findings


# Kills at every stage of writing a checkpoint


class Stages:
    """A counter of the calls that write files while a checkpoint is written, which kills its process at one of them.

    A call that writes a file's content counts twice: before it, and with half of the bytes written. Checkpoints are written
    by the run's writer, as always, but the run waits for it, so that the order of the calls is the same each time."""

    def __init__(self, kind: str, fatal: int | None, record: Path):
        self.kind, self.fatal, self.record = kind, fatal, record
        self.saves = self.stages = 0
        self.of_thread = threading.local()  # depth: the number of `active` calls under way
        self.is_armed = False

    def install(self) -> None:
        """Wrap the functions that write, for the rest of this process."""
        for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, self.watch(name, getattr(os, name)))
        Path.write_text = self.in_halves("write_text", Path.write_text, lambda path, text: path)
        checkpoint.save_file = self.in_halves("save_file", checkpoint.save_file, lambda tensors, path: path)
        writer.Writer.submit = waiting(writer.Writer.submit)
        run_folder.begin_save = self.saving(run_folder.begin_save)
        run_folder.choose_best = self.active(run_folder.choose_best)
        run_folder.prune = self.active(run_folder.prune)
        summary.Summary.add = self.active(self.adding_a_row(summary.Summary.add))

    def saving(self, begin_save: Callable) -> Callable:
        """Wrap the job that writes a checkpoint: calls within it are counted."""

        def wrapped(*args, **kwargs):
            write, progress, steps_per_epoch = begin_save(*args, **kwargs), args[4], args[5]

            def counted():
                self.begin(progress, steps_per_epoch)
                write()

            return self.active(counted)

        return wrapped

    def adding_a_row(self, add: Callable) -> Callable:
        """Wrap the function that adds a row to summary.csv: it counts before the call and with half of the row written."""

        def wrapped(written, *args, **kwargs):
            if self.kind == "before its row":
                self.die("summary.csv")
            self.reach("row of summary.csv")
            before = written.file.stat().st_size if written.file.exists() else 0
            line = add(written, *args, **kwargs)
            after = written.file.stat().st_size
            self.reach("half a row of summary.csv", lambda: os.truncate(written.file, (before + after) // 2))
            return line

        return wrapped

    def active(self, function: Callable) -> Callable:
        """Wrap a part of writing a checkpoint: calls within it are counted while the chosen checkpoint is written."""

        def wrapped(*args, **kwargs):
            depth = getattr(self.of_thread, "depth", 0)
            self.of_thread.depth = depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.of_thread.depth = depth

        return wrapped

    def begin(self, progress, steps_per_epoch: int) -> None:
        """Decide whether the checkpoint that is about to be written is the chosen one."""
        self.saves += 1
        is_end = progress.steps == steps_per_epoch
        is_chosen = {
            "within an epoch": self.saves >= 4 and not is_end,  # an older one is removed then
            "at an epoch's end": is_end and progress.epoch == 1,
            "written again": True,
            "of a new best epoch": is_end,
        }.get(self.kind, False)
        self.is_armed = is_chosen and not self.stages

    def watch(self, name: str, function: Callable) -> Callable:
        """Wrap a call: it counts before it is made."""

        def wrapped(*args, **kwargs):
            self.reach(f"{name} {named(args[0])}")
            return function(*args, **kwargs)

        return wrapped

    def in_halves(self, name: str, function: Callable, target: Callable) -> Callable:
        """Wrap a call that writes a file: it counts before it is made and with half of the file written."""

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
        """Count a stage; die if it is the fatal one."""
        if not (self.is_armed and getattr(self.of_thread, "depth", 0)):
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


def waiting(submit: Callable) -> Callable:
    """Wrap the writer's `submit`: it waits until the job is done."""

    def wrapped(of_run, *args, **kwargs):
        submit(of_run, *args, **kwargs)
        wait(of_run._jobs)

    return wrapped


def named(path: object) -> str:
    """Return a path's last part without the number of a process; `flushed` for an open file."""
    return re.sub(r"^\.\d+\.", "new ", Path(path).name) if isinstance(path, (str, Path)) else "flushed"


def prepare_stage(trial: Trial, kind: str) -> tuple[str, ...]:
    """Bring a trial to the point before it writes a checkpoint of this kind; return the flags of the next process.

    'of a new best epoch': the checkpoint is written after the epoch is evaluated, since none is due at its end. 'written
    again': the run is killed after the checkpoint of an epoch's end and before the row of this epoch; when it resumes,
    it writes that checkpoint again."""
    if kind == "within an epoch":
        return OFTEN
    if kind == "of a new best epoch":
        return (*AFTER_EPOCHS, "--checkpoint-seconds", "1000")
    if kind == "at an epoch's end":
        return (*AFTER_EPOCHS, "--checkpoint-hist", "1")
    stages = Stages("before its row", None, trial.folder / "record-0")
    with watched(trial.start(*AFTER_EPOCHS, first=stages.install)) as process:
        ended(process, LONGEST)
    return AFTER_EPOCHS


def count_stages(ground: Ground, kind: str) -> list[str]:
    """Return the stages of writing one checkpoint, in words, from an undisturbed run."""
    with Trial(ground, f"stages of a checkpoint {kind}", 0) as trial:
        more, record = prepare_stage(trial, kind), trial.folder / "record"
        with watched(trial.start(*more, first=Stages(kind, None, record).install)) as process:
            if not trial.has_ended_well(process):
                raise SystemExit(trial.findings.faults[0])
        return record.read_text().splitlines() if record.exists() else []


def killed_at_stage(ground: Ground, kind: str, number: int, stage: str) -> Findings:
    """Kill a run at one stage (from 1) of writing a checkpoint, then start it again."""
    with Trial(ground, f"killed while a checkpoint was written {kind}", number) as trial:
        more, record = prepare_stage(trial, kind), trial.folder / "record"
        with watched(trial.start(*more, first=Stages(kind, number, record).install)) as process:
            ended(process, LONGEST)
            was_killed = process.returncode == -KILL and record.exists()
        trial.history.append(record.read_text().strip() if was_killed else f"stage {stage} was not reached")
        if not was_killed:
            trial.fault(f"this stage was not reached: exit code {process.returncode}")
            return trial.findings
        survived = trial.ends_well()
        trial.findings.counts += Counter({"stage kills": 1, "stage kills survived": int(survived)})
        return trial.findings
