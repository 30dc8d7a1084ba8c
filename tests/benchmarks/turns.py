"""Rates measured in turn: what a machine does beside a benchmark meets both sides alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from reslt.workers import available_cores

Side = Callable[[], int]  # does some work and says how many images that was


@dataclass(frozen=True)
class Turns:
    """Images per second of each side in each round."""

    rates: dict[str, np.ndarray]

    def rate(self, side: str) -> float:
        """Median over the rounds."""
        return float(np.median(self.rates[side]))

    def ratio(self, side: str, to: str) -> tuple[float, float, float]:
        """Median, lower and upper quartile of the rounds' own ratios: what changes from round to round drops out."""
        low, middle, high = np.quantile(self.rates[side] / self.rates[to], [0.25, 0.5, 0.75])
        return float(middle), float(low), float(high)

    def line(self, side: str, to: str, note: str = "") -> str:
        """A row of a table: the rate, and the ratio with its quartiles."""
        middle, low, high = self.ratio(side, to)
        return f"{side:44} {self.rate(side):10,.0f} img/s   {middle:6.3f}  ({low:.3f}..{high:.3f})  {note}".rstrip()


def in_turn(sides: dict[str, Side], rounds: int, device: torch.device, warm_up: int = 1) -> Turns:
    """Each round runs every side once, in an order that turns from round to round."""
    names = list(sides)
    for name in names:
        for _ in range(warm_up):
            sides[name]()
    rates = {name: np.zeros(rounds) for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            start = time.perf_counter()
            images = sides[name]()
            synchronize(device)
            rates[name][number] = images / (time.perf_counter() - start)
    return Turns(rates)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> str:
    """What was measured on, in a line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {available_cores()} CPU cores, {torch.get_num_threads()} threads; torch {torch.__version__}"
