"""Real runs that are killed, damaged, out of disk space and signaled: does each of them end as if nothing had happened?

    python -m tests.chaos [--kills 100] [--damages 300] [--seed 0] [--jobs 2]

A run of train.py on the embedded digits, undisturbed, is the reference: weights, moving average and optimizer of its last and
best checkpoints, its summary without what depends on the clock, its tables. Every disturbed run must end with the same bytes.
Prints a table of figures and every fault with its seed; the exit code is 1 if there is a fault. No file remains.

Processes are started in two ways: as users start them (`python train.py ...`) and, to save the seconds that imports take,
by fork from this process, which has imported everything, trained nothing, and has one thread. Linux and macOS only.
"""

import argparse
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

from reslt.config.places import default_images_folder, lists_folder
from reslt.prepare.subsets import make_if_embedded
from tests.chaos.damage import POINTERS, cannot_resume, refused, resumes_from_an_older, wrong_pointer
from tests.chaos.disks import full_disk, limited_files, pages_of_a_checkpoint
from tests.chaos.ground import FLAGS, Findings, Ground
from tests.chaos.kills import KINDS, MOST_KILLS, count_stages, killed_at_random, killed_at_stage
from tests.chaos.pair import with_two_processes
from tests.chaos.stops import signaled
from tests.chaos.trial import TERM, undisturbed

EVALUATED = 150  # images in each of the validation and the test list


@dataclass
class Chaos:
    """A whole chaos test: its ground, a pool of processes that carry out trials side by side, and the findings so far."""

    ground: Ground
    pool: ProcessPoolExecutor
    jobs: int
    seed: int
    start: float
    findings: Findings = field(default_factory=Findings)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"{time.monotonic() - self.start:6.0f} s  {text}", flush=True)

    def gather(self, title: str, futures: list[Future], every: int = 10) -> None:
        """Wait for trials and add their findings."""
        for done, future in enumerate(as_completed(futures), start=1):
            found = future.result()
            self.findings += found
            for fault in found.faults:
                self.say(f"FAULT {fault.splitlines()[0]}")
            if done % every == 0 or done == len(futures):
                self.say(f"{title}: {done} of {len(futures)}")

    def kill_at_random(self, requested: int) -> None:
        """Kill runs at random moments; at least a quarter of the kills are of processes started as users start them."""
        counts, rounds = self.findings.counts, 0
        while counts["kills"] < requested:
            missing = requested - counts["kills"]
            tasks = []
            while missing > 0:
                most = min(MOST_KILLS, missing)
                missing -= most
                is_plain = counts["kills plain"] + sum(m for m, plain in tasks if plain) < requested / 3
                tasks.append((most, is_plain))
            seeds = range(self.seed * 10_000 + rounds * 100, (self.seed + 1) * 10_000)
            pairs = zip(seeds, tasks, strict=False)
            futures = [self.pool.submit(killed_at_random, self.ground, seed, *task) for seed, task in pairs]
            self.gather("runs killed at random moments", futures, every=1)
            rounds += 1
            if rounds > requested:
                raise SystemExit("processes cannot be killed in time: they end too fast")

    def kill_at_stages(self, most: int) -> None:
        """Kill runs at every stage of writing a checkpoint; if there are more than `most` stages, at a sample of them."""
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

    def damage(self, requested: int, trials: int) -> None:
        """Check `requested` damaged checkpoints, and resume damaged runs, whose number `trials` sets."""
        submit, first = self.pool.submit, self.seed * 10_000
        self.gather(
            "damaged checkpoints", [submit(refused, self.ground, first + i) for i in range(requested)], every=100
        )
        futures = [submit(resumes_from_an_older, self.ground, first + i, i % 3 == 2) for i in range(trials)]
        futures += [submit(cannot_resume, self.ground, first + i, i % 3 == 2) for i in range(math.ceil(trials / 2))]
        kinds = [(name, kind) for kind in POINTERS for name in ("last", "best")][: 4 * trials]
        futures += [submit(wrong_pointer, self.ground, *kind, i % 4 == 0) for i, kind in enumerate(kinds)]
        self.gather("damaged runs", futures)

    def fill_disks(self, trials: int) -> None:
        """Limit the size of files, and fill a real disk, leaving from no page to more than a checkpoint takes."""
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
        """Send each signal that asks a run to stop `trials` times."""
        numbers = (TERM, signal.SIGINT, signal.SIGUSR1)
        seeds = [(number, self.seed * 10_000 + i) for i in range(trials) for number in numbers]
        futures = [self.pool.submit(signaled, self.ground, *pair, pair[1] % 2 == 1) for pair in seeds]
        self.gather("signals", futures)

    def table(self) -> str:
        """Return the figures, one per line."""
        c = self.findings.counts
        wholes = ("runs", "damaged runs", "signaled runs", "paired runs")
        equal = sum(c[f"{name} equal"] for name in wholes)
        lines = [
            f"kills survived {c['kills survived']} of {c['kills']} at random moments ({c['kills writing']} of them while "
            f"something was written, {c['kills plain']} of processes started as users do)",
            f"kills survived {c['stage kills survived']} of {c['stage kills']} at stages of writing a checkpoint (of "
            f"{c['stages']} stages)",
            f"runs ended bit-equal {equal} of {sum(c[name] for name in wholes)}",
            f"damaged checkpoints refused {c['damages refused']} of {c['damages']}, loaded {c['damages loaded']}",
            f"runs without any valid checkpoint that said so {c['hopeless runs reported']} of {c['hopeless runs']}",
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
    """Write lists of the embedded digits; validation and test list are parts of the test images."""
    make_if_embedded("digits_lt")
    folder.mkdir()
    source = lists_folder() / "digits_lt"
    tested = random.Random(0).sample((source / "test.txt").read_text().splitlines(keepends=True), 2 * EVALUATED)
    shutil.copy(source / "train.txt", folder)
    shutil.copy(source / "info.yaml", folder)
    (folder / "val.txt").write_text("".join(tested[:EVALUATED]))
    (folder / "test.txt").write_text("".join(tested[EVALUATED:]))


def chaos(kills: int, damages: int, seed: int, jobs: int, work: Path) -> Findings:
    """Carry out the whole chaos test in the folder `work`; print progress and the table."""
    start = time.monotonic()
    write_lists(work / "digits")
    images = default_images_folder() / "digits_lt"
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
    parser.add_argument(
        "--kills", type=int, default=100, help="at random moments; below 20: a quick version of the whole test"
    )
    parser.add_argument("--damages", type=int, default=300, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the damage")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    given = parser.parse_args(arguments)
    for name in ("evaluation.evaluate", "runs.run", "loading.loaders", "training.epoch", "training.setup"):
        import_module(f"reslt.{name}")  # train.py imports these when it runs: forked processes need them
    signal.signal(TERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "tmp").mkdir()
        os.environ |= {"TMPDIR": f"{folder}/tmp", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        tempfile.tempdir = None  # so that TMPDIR is read again
        torch.set_num_threads(1)  # for forked processes; the variable does it for the others
        findings = chaos(given.kills, given.damages, given.seed, given.jobs, Path(folder))
    sys.exit(1 if findings.faults else 0)


if __name__ == "__main__":
    main()
