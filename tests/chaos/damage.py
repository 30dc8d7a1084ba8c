"""Damaged checkpoints, and damaged pointers to them."""

import os
import random
import shutil
from pathlib import Path

import evaluate
from reslt.config.resolve import resolve
from reslt.config.stages import stages_of
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.runs import checkpoint, resume
from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground
from tests.chaos.trial import LONGEST, Trial, ended, fork, watched


def truncated(content: bytes, random: random.Random) -> bytes:
    return content[: random.randrange(len(content))]


def without_last_byte(content: bytes, random: random.Random) -> bytes:
    return content[:-1]


def with_flipped_bit(content: bytes, random: random.Random) -> bytes:
    changed = bytearray(content)
    changed[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(changed)


def with_zeros(content: bytes, random: random.Random) -> bytes:
    """Zero a random range that starts at a byte that is not zero yet."""
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
    """Damage a checkpoint in one of the ways of `DAMAGES`; return a description. Hard links elsewhere keep their content."""
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
    """Copy a run's folder by hard links, for changes that replace files."""
    return Path(shutil.copytree(run, copy, copy_function=os.link))


def refused(ground: Ground, seed: int) -> Findings:
    """Damage one checkpoint of a finished run: it must not load, and resuming must choose another and report why."""
    with Trial(ground, "damaged", seed) as trial:
        linked(ground.reference, trial.run)
        folders = run_folder.newest_first(trial.run)
        kind = DAMAGES[seed % len(DAMAGES)]
        victim = trial.random.choice(folders)
        trial.history.append(f"{victim.name}: {damage(victim, kind, trial.random)}")
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
        classes, steps = Classes.read(state), state["steps_per_epoch"]
        found, messages = resume.to_resume(trial.run, config.stored(), classes, steps, stages_of(config))
        expected = folders[0] if victim != folders[0] else folders[1]
        was_newest = victim == folders[0]
        if str(victim) not in reason:
            trial.fault(f"the message does not name {victim}: {reason}")
        elif found is None or found.folder != expected:
            trial.fault(f"resumed from {found and found.folder}, expected {expected}")
        elif was_newest != any(line.startswith("skipped: ") and reason in line for line in messages):
            trial.fault(f"{victim.name} is not reported as skipped, or without need: {messages}")
        else:
            counts["damages refused"] += 1
        return trial.findings


def resumes_from_an_older(ground: Ground, seed: int, plain: bool) -> Findings:
    """Damage the newest checkpoint of a finished run: it must resume from the older one and end the same."""
    with Trial(ground, "newest damaged", seed) as trial:
        linked(ground.reference, trial.run)
        newest = run_folder.newest_first(trial.run)[0]
        trial.history.append(damage(newest, trial.random.choice(DAMAGES), trial.random))
        if trial.ends_well(plain=plain, counted="damaged runs") and f"skipped: {newest}" not in trial.output:
            trial.findings.counts["damaged runs equal"] -= 1
            trial.fault("the skipped checkpoint is not reported")
        return trial.findings


def cannot_resume(ground: Ground, seed: int, plain: bool) -> Findings:
    """Damage every checkpoint of a finished run: it must end with a message that names each."""
    with Trial(ground, "all damaged", seed) as trial:
        linked(ground.reference, trial.run)
        folders = run_folder.newest_first(trial.run)
        trial.history += [damage(folder, trial.random.choice(DAMAGES), trial.random) for folder in folders]
        trial.findings.counts["hopeless runs"] += 1
        with watched(trial.start(plain=plain)) as process:
            ended(process, LONGEST)
        if trial.is_reported_plainly(process.returncode):
            if all(str(folder) in trial.output for folder in folders):
                trial.findings.counts["hopeless runs reported"] += 1
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
    """Damage the pointer `last` or `best`: resuming must not need it, and evaluate.py must work or report the damage."""
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
        is_fine = process.returncode == 0 or trial.is_reported_plainly(process.returncode)
        if is_resumed:
            is_fine = trial.ends_well(counted="damaged runs") and is_fine
        trial.findings.counts["pointers survived"] += is_fine
        return trial.findings
