"""Full disks, and files that may not grow."""

import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reslt.runs import folder as run_folder
from tests.chaos.ground import Findings, Ground
from tests.chaos.trial import LONGEST, STOPPED_WITHIN, TERM, Trial, ended, watched

PAGE = 4096


def begun(trial: Trial) -> None:
    """Train until there are two checkpoints, then stop the run with SIGTERM."""
    with watched(trial.start()) as process:
        end = time.monotonic() + LONGEST
        while len(run_folder.newest_first(trial.run)) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid, TERM)
        ended(process, STOPPED_WITHIN)


def limited_files(ground: Ground, seed: int) -> Findings:
    """Resume a run whose files may not grow beyond a size that a checkpoint's largest file exceeds."""
    with Trial(ground, "file size limited", seed) as trial:
        largest = max(f.stat().st_size for f in run_folder.newest_first(ground.reference)[0].iterdir())
        begun(trial)
        limit = trial.random.randrange(20_000, largest)
        trial.history.append(f"RLIMIT_FSIZE {limit}")
        trial.findings.counts["full disks"] += 1
        with watched(trial.start(first=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))) as process:
            ended(process, LONGEST)
        is_reported = trial.is_reported_plainly(process.returncode)
        if is_reported and "could not be written" not in trial.output:
            is_reported = trial.fault("the message does not say `could not be written`")
        is_whole = trial.has_whole_checkpoints()
        trial.findings.counts["full disks survived"] += trial.ends_well() and is_reported and is_whole
        return trial.findings


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a disk of 16 MiB; yield None if this process may not mount one."""
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
    """Resume a run on a disk with a few free pages: it must end with a message or succeed, and resume once there is room."""
    with (
        Trial(ground, f"disk full except for {free_pages} pages", seed) as trial,
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
        is_reported = process.returncode == 0 or trial.is_reported_plainly(process.returncode)
        filler.unlink()
        is_whole = trial.has_whole_checkpoints()
        trial.findings.counts["full disks survived"] += trial.ends_well() and is_reported and is_whole
        return trial.findings


def pages_of_a_checkpoint(ground: Ground) -> int:
    """Return the number of pages that the files of a checkpoint take."""
    files = run_folder.newest_first(ground.reference)[0].iterdir()
    return sum(math.ceil(file.stat().st_size / PAGE) for file in files)
