"""Rates measured in turn, so that other work of the machine affects all sides alike."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from reslt.core.cpu import available_cores
from tests.benchmarks.rows import Row

Side = Callable[[], int]  # does some work and returns its number of images


@dataclass(frozen=True)
class Turns:
    """The images per second of each side in each round."""

    rates: dict[str, np.ndarray]

    def rate(self, side: str) -> float:
        """Return the median over the rounds."""
        return float(np.median(self.rates[side]))

    def row(self, side: str, to: str, bar: float | str | None = None, name: str | None = None) -> Row:
        """Return the median and quartiles of the ratios within rounds, from which changes between rounds drop out."""
        low, middle, high = np.quantile(self.rates[side] / self.rates[to], [0.25, 0.5, 0.75]).tolist()
        return Row(name or side, middle, low, high, bar)

    def with_fastest(self, name: str, sides: list[str]) -> Turns:
        """Return the turns with one more side: in each round, the fastest of `sides`."""
        return Turns(self.rates | {name: np.max([self.rates[side] for side in sides], axis=0)})

    def table(self, title: str, to: str, bars: Mapping[str, float | str]) -> Iterator[str]:
        """Yield the printed lines: the rate of each side, and its ratio to the rate of the side `to`."""
        yield f"{title:<50} {'img/s':>11} {'ratio':>8} {'(quartiles)':>20}   bar"
        for side in self.rates:
            yield f"  {side:<48} {self.rate(side):>11,.1f} {self.row(side, to, bars.get(side)).figures}"


def in_turn(
    sides: dict[str, Side], rounds: int, device: torch.device, warm_up: int = 1, turn_seconds: float | None = None
) -> Turns:
    """Give every side a turn in each round, in an order that rotates from round to round, and return the rates. Before the
    first round, each side has `warm_up` turns that do not count. A turn calls its side once, or as often as takes about
    `turn_seconds`."""
    for side in sides.values():
        for _ in range(warm_up):
            side()
    if turn_seconds is not None:
        sides = {name: _lengthened(side, turn_seconds, device) for name, side in sides.items()}
    names, rates = list(sides), {name: np.zeros(rounds) for name in sides}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            images, seconds = _timed(sides[name], device)
            rates[name][number] = images / seconds
    return Turns(rates)


def _lengthened(side: Side, seconds: float, device: torch.device) -> Side:
    """Return a side that calls `side` as often as takes about `seconds`, at least once."""
    _, of_one = _timed(side, device)
    times = max(1, round(seconds / of_one))
    return lambda: sum(side() for _ in range(times))


def _timed(side: Side, device: torch.device) -> tuple[int, float]:
    """Return the number of images, and the seconds until the device has finished with them."""
    synchronize(device)
    start = perf_counter()
    images = side()
    synchronize(device)
    return images, perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def default_device() -> torch.device:
    """Return the first GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine() -> str:
    """Return a line with GPU, processor, cores, memory, versions and threads."""
    gpu = f"{torch.cuda.get_device_name(default_device())}; " if torch.cuda.is_available() else ""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{gpu}{models[0] if models else platform.processor()}, {available_cores()} cores, {memory / 2**30:.1f} GiB RAM; "
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )
