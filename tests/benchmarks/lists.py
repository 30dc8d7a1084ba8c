"""A list of ten million images: seconds and memory for parsing it, for what training derives from its labels, and for the
loader.

    python -m tests.benchmarks.lists [--lines 10000000] [--workers 2]

The list and its images are synthetic, in a temporary folder; a path rule maps every path to one tiny image. Each figure
comes from a new process, so that earlier measurements do not affect its memory."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.core.cpu import available_cores
from reslt.data.datasets import load_dataset
from reslt.data.groups import branch_sets, shot_groups
from reslt.data.lists import images_per_class, read_list
from reslt.loading.batches import ShuffledBatches
from tests.benchmarks.turns import machine
from tests.builders import train_loader_of

CLASSES = 8142
IMBALANCE = 500  # images of the largest class over those of the smallest
BATCH = 256
BLOCK = 100_000  # lines written at once
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it


@dataclass(frozen=True)
class ListFigures:
    """Figures of parsing, and of what training derives from the labels. Memory is in bytes, None if there is no /proc."""

    characters: float  # per path, on average
    parse_seconds: float
    resident_before: int | None  # Python and all imports of train.py
    peak: int | None  # of the process, from its start until the list is parsed
    groups_seconds: float  # class counts, shot groups, branch sets
    order_seconds: float  # an epoch's permutation, until its first batch


@dataclass(frozen=True)
class Memory:
    """Bytes at one moment, without the pages of program files, which other programs may share.

    Proportional: a page that k processes share counts as 1/k in each of them."""

    proportional: float  # of one worker, on average
    own: float  # of one worker, on average: pages that it wrote and shares with no other process
    total: int  # proportional, of the main process and all its workers, so that each page counts once


def write_dataset(folder: Path, lines: int) -> None:
    """Write train.txt with `lines` (at least CLASSES) shuffled lines of a long-tailed dataset, one image, and the path rule
    that leads to it."""
    generator = np.random.default_rng(0)
    weights = float(IMBALANCE) ** -np.linspace(0, 1, CLASSES)
    drawn = generator.choice(CLASSES, lines - CLASSES, p=weights / weights.sum())
    labels = generator.permutation(np.concatenate((np.arange(CLASSES), drawn)))  # every class at least once
    with open(folder / "train.txt", "w", encoding="utf-8", newline="\n") as handle:
        for start in range(0, lines, BLOCK):
            block = labels[start : start + BLOCK].tolist()
            names = generator.bytes(16 * len(block)).hex()
            handle.writelines(
                f"train_val2018/Plantae/{label}/{names[k : k + 32]}.jpg {label}\n"
                for label, k in zip(block, range(0, len(names), 32), strict=True)
            )
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    (folder / "local.yaml").write_text("image_root: .\npath_rules: [{match: '^.+$', replace: tiny.png}]\n")


def measure_list(folder: Path) -> ListFigures:
    """Parse the folder's list and derive from its labels what training does. Call it in a new process."""
    before = _bytes("status", "VmRSS")
    start = time.perf_counter()
    images = read_list(folder / "train.txt")
    parsed = time.perf_counter()
    peak = _bytes("status", "VmHWM")  # getrusage may report the peak of the process that started this one
    grouping = time.perf_counter()
    counts = images_per_class(images.labels, CLASSES)
    shot_groups(counts)
    branch_sets(counts, 3)
    grouped = time.perf_counter()
    next(iter(ShuffledBatches(np.arange(len(images)), BatchShard(BATCH), seed=0)))
    ordered = time.perf_counter()
    return ListFigures(
        characters=len(images.text) / len(images),
        parse_seconds=parsed - start,
        resident_before=before,
        peak=peak,
        groups_seconds=grouped - grouping,
        order_seconds=ordered - grouped,
    )


def measure_loader(folder: Path, start_method: str, workers: int, samples: int) -> tuple[Memory, Memory]:
    """Return the memory near the start and at the end of an epoch of the training loader. Call it in a new process, whose
    start method it sets. The loader starts no more workers than there are cores."""
    multiprocessing.set_start_method(start_method, force=True)
    config = Config.of(
        data_on_device="off", workers=workers, batch_size=BATCH, limit_train=samples, crop="pad", crop_padding=0
    )
    settings = ImageSettings(8, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", crop_pct=1.0, augment=config.augment)
    others = set(multiprocessing.active_children())
    dataset = load_dataset(str(folder))  # kept while the loader runs, as in training
    loader = train_loader_of(dataset, config, settings)
    near_start, moments = len(loader) // 20, []
    for step, _ in enumerate(loader.epoch(0)):
        if step in (near_start, len(loader) - 1):
            started = [worker.pid for worker in multiprocessing.active_children() if worker not in others]
            moments.append(memory_of(started))
    return moments[0], moments[-1]


def memory_of(workers: list[int]) -> Memory:
    """Return the current memory of this process and of the workers with these process ids."""

    def proportional(pid: int | str) -> int:
        return sum(_bytes("smaps_rollup", key, pid) for key in ("Pss_Anon", "Pss_Shmem"))

    of_workers = [proportional(pid) for pid in workers]
    own = [_bytes("smaps_rollup", "Private_Dirty", pid) for pid in workers]
    return Memory(sum(of_workers) / len(workers), sum(own) / len(workers), proportional("self") + sum(of_workers))


def _bytes(file: str, key: str, pid: int | str = "self") -> int | None:
    """Return N * 1024 bytes for the line `key: N kB` in /proc/<pid>/<file>; None if the system does not state it."""
    path = Path(f"/proc/{pid}/{file}")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def in_fresh_process(function, *arguments):
    """Return function(*arguments) from a new interpreter, which has loaded only what this file imports."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000_000, help=f"lines of the list, at least {CLASSES}")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="workers of the loader, compared with one; at most one per core; 0: do not measure the loader",
    )
    parser.add_argument(
        "--samples", type=int, default=200_000, help="images per epoch of the loader, spread over the list"
    )
    possible = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]
    parser.add_argument("--start-methods", nargs="+", default=possible, choices=possible, help="how workers start")
    args = parser.parse_args(arguments)
    if args.lines < CLASSES or args.workers < 0 or args.samples < BATCH:
        parser.error(f"--lines must be at least {CLASSES}, --samples at least {BATCH}")
    workers, samples = min(args.workers, available_cores()), min(args.samples, args.lines)

    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder, args.lines)
        for line in list_table(args.lines, in_fresh_process(measure_list, folder)):
            print(line, flush=True)
        for line in loader_table(folder, args.lines, samples, workers, args.start_methods) if workers else ():
            print(line, flush=True)


def list_table(lines: int, figures: ListFigures) -> Iterator[str]:
    """Yield the printed lines of the figures of the list itself."""

    def gibibytes(size: int | None) -> str:
        return "no /proc" if size is None else f"{size / 2**30:.2f} GiB"

    yield f"{lines:,} lines, {CLASSES:,} classes, {figures.characters:.1f} characters a path"
    yield ""
    yield f"{'':<50}{'measured':>10}   bar at 10,000,000 lines"
    for name, figure, bar in (
        ("parse", f"{figures.parse_seconds:.1f} s", "25 s"),
        ("peak resident memory when parsed", gibibytes(figures.peak), "1.5 GiB"),
        ("  before parsing: Python and imports", gibibytes(figures.resident_before), ""),
        ("class counts, shot groups, branch sets", f"{figures.groups_seconds:.2f} s", ""),
        ("an epoch's permutation, to the first batch", f"{figures.order_seconds:.2f} s", ""),
        ("  both", f"{figures.groups_seconds + figures.order_seconds:.2f} s", "3 s"),
    ):
        yield f"{name:<50}{figure:>10}   {bar}".rstrip()
    yield ""


def loader_table(folder: Path, lines: int, samples: int, workers: int, start_methods: list[str]) -> Iterator[str]:
    """Yield the printed lines of the loader's memory with one worker and with `workers`, each measured when it is due."""
    if _bytes("smaps_rollup", "Pss_Anon") is None:
        yield "loader: not measured, this system has no /proc/<pid>/smaps_rollup that states Pss_Anon"
        return
    needed = (folder / "train.txt").stat().st_size + 12 * lines  # 12: an end and a label
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        yield (
            f"loader: not measured, the list takes up to {needed / 2**30:.2f} GiB of shared memory and {SHARED_MEMORY} "
            f"has {free / 2**30:.2f} GiB free"
        )
        return
    extent = "every image of the list" if samples == lines else f"{samples:,} images spread over the list, not all"
    yield f"loader, memory in MiB near the start -> at the end of an epoch; the epoch: {extent}"
    yield f"{'':<20}{'PSS of a worker':>18}{'its own pages':>18}{'all processes':>18}"
    for method in start_methods:
        alone = None
        for count in sorted({1, workers}):
            moments = in_fresh_process(measure_loader, folder, method, count, samples)
            columns = [[getattr(m, name) for m in moments] for name in ("proportional", "own", "total")]
            yield f"{f'{method}, {count} worker' + 's' * (count > 1):<20}" + "".join(map(_start_to_end, columns))
            if count > 1:
                added = [(m.total - before.total) / (count - 1) for m, before in zip(moments, alone, strict=True)]
                yield f"{'  each added worker':<56}{_start_to_end(added)}"
            alone = moments
    yield "PSS: a page shared by k processes counts as 1/k in each; a worker's grows as it comes to share the list's pages."
    yield "Program files are left out."


def _start_to_end(sizes: list[float]) -> str:
    return f"{f'{sizes[0] / 2**20:.0f} -> {sizes[1] / 2**20:.0f}':>18}"


if __name__ == "__main__":
    main()
