"""The chain from large images to a training step, stage by stage: where the time goes, and what limits the loader.

    python -m tests.benchmarks.chain [--decode device] [--workers N] [--images 256] [--rounds 3]
    python -m tests.benchmarks.chain --disk-ms 5     # a simulated disk that takes as long for each open and read
    python -m tests.benchmarks.chain --cold --images 5000     # first and second epochs from this machine's disk

The images are 500 x 375 JPEGs (quality 90, 4:2:0), read from files and from the shards of `prepare pack`, cropped to 224 x
224 with a random resized crop, and flipped. The first table shows one core: the code that workers run, with a clock around
each of its parts, then the copy to the device and normalization. The second shows the loader with all its workers: its
rate, and how long a step waits that takes as long as a ResNeXt-50's on an H100, or as --step-rate states. The last one
counts the calls to the file system in a shuffled epoch."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from reslt.augment import decode as host_decode
from reslt.augment.host_transforms import RandomView, ViewFirst
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.cpu import available_cores
from reslt.data.datasets import load_dataset
from reslt.data.shards import Pack
from reslt.loading import device_decode, image_dataset, read_ahead
from reslt.loading.batches import Loader
from reslt.prepare.pack import pack
from tests.benchmarks.photos import write_photos
from tests.benchmarks.rows import Row, command_line, write_rows
from tests.benchmarks.turns import default_device, in_turn, machine, synchronize
from tests.builders import train_loader_of

SIDE, WIDTH, HEIGHT, CLASSES = 224, 500, 375, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIFFERENT = 256  # photos; further files are copies of these
SHARD_MEGABYTES = 100
STEP_RATE = 4276.0  # images/s of a compiled ResNeXt-50 on an H100
DISK_RATE = 100e6  # bytes per second of the simulated disk
FILES, SHARDS = "files", "shards"
READ_AHEAD = "reslt.loading.loaders.read_ahead"
OTHER, WORKER = "the rest (Python)", "a worker's part"
ON_HOST = ("read", "header", "draw", "decode", "crop", "resize", "flip, to array", "collate", OTHER)
ON_DEVICE = ("pin", "copy", "decode on the device", "resize on the device", "flip on the device", "normalize")
PARTS = (  # the clocked functions: owner, name, stage, whether it works on the device
    (host_decode, "open_image", "header", False),
    (host_decode, "_to_rgb", "decode", False),
    (Image.Image, "crop", "crop", False),
    (Image.Image, "resize", "resize", False),
    (RandomView, "__call__", "draw", False),
    (image_dataset, "seed_generators", "draw", False),
    (device_decode, "seed_generators", "draw", False),
    (ViewFirst, "steps", "flip, to array", False),
    (Pack, "read", "read", False),
    (Pack, "_advise", "read", False),
    (device_decode.DeviceDecoder, "_decode", "decode on the device", True),
    (device_decode, "resized_crops", "resize on the device", True),
    (device_decode, "flipped", "flip on the device", True),
)


class Clock:
    """Seconds per stage: wall time with a GPU, else the CPU time of this thread, which other processes do not affect. The
    time of a stage within another stage counts only for the inner one."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.inner = device, {}, []
        self.now = time.perf_counter if device.type == "cuda" else time.thread_time

    @contextmanager
    def stage(self, name: str, on_device: bool = False) -> Iterator[None]:
        start = self.now()
        self.inner.append(0.0)
        try:
            yield
            if on_device:
                synchronize(self.device)
        finally:
            taken = self.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - self.inner.pop()
            if self.inner:
                self.inner[-1] += taken

    def around(self, name: str, function: Callable, on_device: bool = False) -> Callable:
        def timed(*arguments, **options):
            with self.stage(name, on_device):
                return function(*arguments, **options)

        return timed


class TimedFile:
    """An open file whose reads count as reading, although a decoder asks for them."""

    def __init__(self, file, clock: Clock):
        self.file, self.read = file, clock.around("read", file.read)
        self.seek, self.tell = file.seek, file.tell

    def __enter__(self) -> TimedFile:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Put the clock around the parts of the chain."""
    opened = clock.around("read", host_decode.open_file)
    with ExitStack() as stack:
        for owner in (host_decode, device_decode):
            stack.enter_context(mock.patch.object(owner, "open_file", lambda path: TimedFile(opened(path), clock)))
        for owner, name, stage, on_device in PARTS:
            timed = clock.around(stage, getattr(owner, name), on_device)
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


def through_the_chain(loader: Loader, epoch: int, device: torch.device) -> dict[str, float]:
    """Run an epoch in this process and return the seconds per stage. The loader has no workers."""
    clock = Clock(device)
    loader.batches.epoch = epoch
    with clocked(clock):
        for keys in loader.batches:
            with clock.stage(OTHER):
                samples = loader.images.__getitems__(keys)
            with clock.stage("collate"):
                batch = loader.workers.loader.collate_fn(samples)
            is_encoded = hasattr(loader, "decoder")
            if device.type == "cuda":
                with clock.stage("pin"):
                    batch = batch.pin_memory() if is_encoded else [part.pin_memory() for part in batch]
            with clock.stage("copy", on_device=True):
                images = loader.decoder(batch) if is_encoded else batch[0].to(device, non_blocking=True)
            with clock.stage("normalize", on_device=True):
                loader.normalize(images)
    return clock.seconds


def write_files(folder: Path, images: int) -> None:
    """Write a dataset of `images` files."""
    paths = write_photos(folder, min(images, DIFFERENT), WIDTH, HEIGHT, "jpg", CLASSES)
    for i in range(len(paths), images):
        original = paths[i % len(paths)]
        paths.append(f"{original.partition('/')[0]}/{i}.jpg")
        shutil.copyfile(folder / original, folder / paths[-1])
    (folder / "train.txt").write_text("".join(f"{path} {path.partition('/')[0]}\n" for path in paths))
    (folder / "info.yaml").write_text("image_root: .\n")


def loader_of(folder: Path, source: Path | None, config: Config, device: torch.device) -> Loader:
    """Return the training loader of a dataset. `source`: the folder of shards; None: files."""
    settings = ImageSettings(SIDE, MEAN, STD, interpolation="bilinear", crop_pct=0.875, augment=config.augment)
    return train_loader_of(load_dataset(str(folder), source), config, settings, device)


def stage_table(seconds: dict[str, list[dict[str, float]]], images: int) -> Iterator[str]:
    """Yield the printed lines: per stage and source, microseconds per image, share of the whole, images per second."""
    yield f"{'one core':<24}" + "".join(f"{f'from {source}: us':>20}{'share':>8}{'img/s':>10}" for source in seconds)
    medians = {
        source: {name: 1e6 / images * float(np.median([r[name] for r in rounds])) for name in rounds[0]}
        for source, rounds in seconds.items()
    }
    totals = {source: sum(of_source.values()) for source, of_source in medians.items()}
    present = {name for of_source in medians.values() for name in of_source}
    names = [name for name in (*ON_HOST, WORKER, *ON_DEVICE) if name in present or name == WORKER]
    for name in [*names, "whole chain"]:
        line = f"  {name:<22}"
        for source, of_source in medians.items():
            sums = {WORKER: sum(of_source.get(part, 0.0) for part in ON_HOST), "whole chain": totals[source]}
            taken = sums.get(name, of_source.get(name, 0.0))
            rate = f"{1e6 / taken:,.0f}" if taken >= 1 else "-"
            line += f"{taken:>20,.1f}{taken / totals[source]:>8.1%}{rate:>10}"
        yield line


def loader_epochs(loader: Loader, images: int) -> Callable[[], int]:
    numbers = count()

    def run() -> int:
        for _ in loader.windows(next(numbers)):
            pass
        return images

    return run


def waits(loader: Loader, epoch: int, batch_size: int, step_rate: float) -> float:
    """Return the share of an epoch, without its first batch, in which steps wait for the loader. A step is a sleep."""
    waited, start = 0.0, None
    batches = loader.windows(epoch)
    asked = time.perf_counter()
    for _ in batches:
        now = time.perf_counter()
        if start is None:
            start = now
        else:
            waited += now - asked
        time.sleep(batch_size / step_rate)
        asked = time.perf_counter()
    return waited / max(asked - start, 1e-9)


def requests(folder: Path, source: Path | None, images: int) -> dict[str, int]:
    """Read a shuffled epoch without decoding and return the number of calls of each kind."""
    with mock.patch(READ_AHEAD):
        loader = loader_of(folder, source, config_of(images, 0), torch.device("cpu"))
    root, listed, calls = loader.images.root, loader.images.listed, {"opens": 0, "stats": 0}

    def counting(kind: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            calls[kind] += 1
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for name, kind in (("open", "opens"), ("stat", "stats"), ("fstat", "stats")):
            stack.enter_context(mock.patch.object(os, name, counting(kind, getattr(os, name))))
        before = reads_so_far()
        read_all(root, listed, loader.batches, epoch=0)
        return calls | {"reads": reads_so_far() - before}


def reads_so_far() -> int:
    """Return the number of the process's calls of read and pread; 0 if the system does not count them."""
    file = Path("/proc/self/io")
    lines = file.read_text().splitlines() if file.exists() else ()
    return next((int(line.split()[1]) for line in lines if line.startswith("syscr")), 0)


def read_all(root, listed, batches, epoch: int) -> int:
    """Read the bytes of an epoch, batch by batch, and return their number."""
    batches.epoch, total = epoch, 0
    for keys in batches:
        with root.ahead(listed.path(key[1]) for key in keys):
            for key in keys:
                with host_decode.open_file(root.file(listed.path(key[1]))) as file:
                    total += len(file.read())
    return total


class SlowDisk:
    """A simulated network disk: a wait per open, and per read of bytes that no earlier read has brought into memory."""

    def __init__(self, latency: float):
        self.latency, self.known = latency, set()
        self.open_regular, self.read, self.advise = host_decode._open_regular, Pack.read, Pack._advise

    def open(self, path: str, flags: int) -> int:
        time.sleep(self.latency)  # file systems ask the server at each open, even if they keep the content
        if path not in self.known:
            time.sleep(self.latency + os.path.getsize(path) / DISK_RATE)
            self.known.add(path)
        return self.open_regular(path, flags)

    def read_shard(self, found: Pack, shard: int, offset: int, length: int) -> bytes:
        pieces = range(offset // read_ahead.PIECE, (offset + length - 1) // read_ahead.PIECE + 1)
        if (shard, offset) not in self.known and not all((shard, "piece", piece) in self.known for piece in pieces):
            time.sleep(self.latency + length / DISK_RATE)
            self.known.add((shard, offset))
        if not offset % read_ahead.PIECE:
            self.known.add((shard, "piece", offset // read_ahead.PIECE))
        return self.read(found, shard, offset, length)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(host_decode, "_open_regular", self.open))
            slow = lambda found, *place: self.read_shard(found, *place)  # noqa: E731 (binds `found` as a method does)
            stack.enter_context(mock.patch.object(Pack, "read", slow))
            stack.enter_context(mock.patch.object(Pack, "_advise"))
            yield


def config_of(images: int, workers: int, decode: str = "host") -> Config:
    batch_size = max(1, min(64, images // 2))
    return Config.of(
        workers=workers, batch_size=batch_size, color_jitter=(0.0,), crop="rrc", data_on_device="off", decode=decode
    )


def slow_disk_table(folder: Path, packed: Path, images: int, latency: float) -> Iterator[str]:
    """Yield the printed lines of two epochs of reading from a simulated disk, in one process."""
    megabytes = DISK_RATE / 1e6
    yield f"reading alone, simulated disk: {1e3 * latency:g} ms per open and read, {megabytes:.0f} MB/s; img/s"
    yield f"{'':<40}{'epoch 1':>12}{'epoch 2':>12}"
    for name, source, ahead in ((FILES, None, False), (SHARDS, packed, False), (f"{SHARDS}, read ahead", packed, True)):
        with SlowDisk(latency).mounted():
            with nullcontext() if ahead else mock.patch(READ_AHEAD):
                start = time.perf_counter()
                loader = loader_of(folder, source, config_of(images, 0), torch.device("cpu"))
            rates = []
            for epoch in range(2):
                read_all(loader.images.root, loader.images.listed, loader.batches, epoch)
                rates.append(images / (time.perf_counter() - start))
                start = time.perf_counter()
        yield f"  {name:<38}" + "".join(f"{rate:>12,.0f}" for rate in rates)


def forget(folder: Path) -> None:
    """Drop the content of files from the page cache and, if permitted, the system's cache of file metadata."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    if os.access("/proc/sys/vm/drop_caches", os.W_OK):
        Path("/proc/sys/vm/drop_caches").write_text("2")


def cold_table(
    folder: Path, packed: Path, images: int, workers: int, rounds: int, device: torch.device
) -> Iterator[str]:
    """Yield the printed lines of two epochs from this machine's disk, the first with nothing in memory: of reading alone, as
    medians of rounds in which each source has a turn, and of the loader, once."""
    sources = {FILES: (None, False), SHARDS: (packed, False), f"{SHARDS}, read ahead": (packed, True)}

    def epochs(source: Path | None, is_ahead: bool, decodes: bool) -> list[float]:
        forget(folder)
        forget(packed)
        start, rates = time.perf_counter(), []
        with nullcontext() if is_ahead else mock.patch(READ_AHEAD):
            loader = loader_of(folder, source, config_of(images, workers if decodes else 0), device)
        run = loader_epochs(loader, images)
        for epoch in range(2):
            if decodes:
                run()
            else:
                read_all(loader.images.root, loader.images.listed, loader.batches, epoch)
            rates.append(images / (time.perf_counter() - start))
            start = time.perf_counter()
        return rates

    yield f"{images:,} images, page cache dropped before epoch 1; img/s"
    yield f"{'':<50}{'epoch 1':>12}{'epoch 2':>12}"
    reading = [{name: epochs(*source, decodes=False) for name, source in sources.items()} for _ in range(rounds)]
    for name, source in sources.items():
        for kind, found in (
            ("reading alone, one process", np.median([rates[name] for rates in reading], axis=0)),
            (f"loader, {workers} workers", epochs(*source, decodes=True)),
        ):
            yield f"  {f'{name}: {kind}':<48}" + "".join(f"{rate:>12,.0f}" for rate in found)


def bottleneck(per_core: float, rate: float, step_rate: float, cores: int) -> str:
    """Return a line that states what limits training."""
    if rate >= step_rate:
        return f"the step is the bottleneck: the loader makes {rate:,.0f} images/s, the step takes {step_rate:,.0f}"
    needed = math.ceil(step_rate / per_core)
    return (
        f"the loader is the bottleneck: {rate:,.0f} images/s of {step_rate:,.0f} that the step takes; with {per_core:,.0f} "
        f"per core and worker, {needed} cores would do (there {'is' if cores == 1 else 'are'} {cores})"
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the tables; return the ratio of the rates from shards and from files."""
    device = default_device()
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=256, help="files, each read once in an epoch; at least 4")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; each source has a turn in each")
    parser.add_argument("--workers", type=int, default=16, help="workers of the loader; at most one per CPU core")
    parser.add_argument("--decode", choices=("host", "device"), default="host", help="where JPEGs are decoded")
    parser.add_argument("--step-rate", type=float, default=STEP_RATE, help="images/s of the waiting step")
    parser.add_argument("--disk-ms", type=float, help="measure a simulated disk with this latency instead")
    parser.add_argument("--cold", action="store_true", help="measure first and second epochs from the disk instead")
    given = parser.parse_args(arguments)
    if given.images < 4 or given.rounds < 1 or given.workers < 0:
        parser.error("--images must be at least 4, --rounds at least 1, --workers at least 0")
    workers, threads = min(given.workers, available_cores()), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder, packed = Path(temporary) / "images", Path(temporary) / "shards"
        folder.mkdir()
        write_files(folder, given.images)
        pack(str(folder), packed, SHARD_MEGABYTES, None, None)
        (folder / "local.yaml").unlink()
        print(f"{machine()}; {given.images:,} files of {WIDTH} x {HEIGHT}, --decode {given.decode}", flush=True)
        if given.disk_ms is not None or given.cold:
            lines = (
                cold_table(folder, packed, given.images, workers, given.rounds, device)
                if given.cold
                else slow_disk_table(folder, packed, given.images, given.disk_ms / 1e3)
            )
            for line in lines:
                print(line, flush=True)
            return write_rows([], given.json)

        sources, seconds = {FILES: None, SHARDS: packed}, {FILES: [], SHARDS: []}
        torch.set_num_threads(1)
        try:
            config = config_of(given.images, 0, given.decode)
            chains = {name: loader_of(folder, source, config, device) for name, source in sources.items()}
            for number in range(given.rounds + 1):  # the first round warms up
                for name in sorted(chains, reverse=bool(number % 2)):
                    found = through_the_chain(chains[name], number, device)
                    seconds[name] += [found] * bool(number)
        finally:
            torch.set_num_threads(threads)
        per_epoch = len(chains[FILES]) * config.optim.batch_size
        print("", *stage_table(seconds, per_epoch), "", sep="\n", flush=True)

        config = config_of(given.images, workers, given.decode)
        with_workers = {name: loader_of(folder, source, config, device) for name, source in sources.items()}
        sides = {name: loader_epochs(loader, per_epoch) for name, loader in with_workers.items()}
        turns = in_turn(sides, given.rounds, device)
        title = f"loader, {workers} workers, --decode {given.decode}"
        print(*turns.table(title, FILES, {}), sep="\n")
        for name, loader in with_workers.items():
            share = waits(loader, 0, config.optim.batch_size, given.step_rate)
            print(f"  {f'from {name}: a step of {given.step_rate:,.0f} img/s waits':<48} {share:>11.0%} of the time")
        of_worker = [sum(found.get(stage, 0.0) for stage in ON_HOST) for found in seconds[SHARDS]]
        per_core = per_epoch / float(np.median(of_worker))
        print(f"  {bottleneck(per_core, turns.rate(SHARDS), given.step_rate, available_cores())}\n")
        print(f"{'a shuffled epoch, one process':<34}{'opens':>10}{'stats':>10}{'reads':>10}")
        for name, source in sources.items():
            asked = requests(folder, source, given.images)
            print(f"  {f'{given.images:,} images from {name}':<32}" + "".join(f"{n:>10,}" for n in asked.values()))
        row = turns.row(SHARDS, FILES, None, f"loader, --decode {given.decode}: from shards, against files")
    return write_rows([row], given.json)


if __name__ == "__main__":
    main()
