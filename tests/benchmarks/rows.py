"""The ratios in which benchmarks end, the bars that they are compared with, and their passage between processes."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
WITHIN_NOISE = "within noise"  # a bar of 1, up to the difference between two measurements of the same thing
NOISE = 0.02  # in a ratio, if quartiles do not decide


@dataclass(frozen=True)
class Row:
    """Our rate over theirs: above 1, ours is faster."""

    name: str
    ratio: float
    low: float  # lower quartile of the rounds' ratios
    high: float  # upper quartile
    bar: float | str | None = None  # the least ratio to reach, or WITHIN_NOISE

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.bar is None:
            return None
        if self.bar == WITHIN_NOISE:
            return self.low <= 1 <= self.high or self.ratio >= 1 - NOISE
        return self.ratio >= self.bar

    @property
    def figures(self) -> str:
        """The ratio, its quartiles and the bar, as columns of a table."""
        bar = self.bar if isinstance(self.bar, str) else "" if self.bar is None else f"{self.bar:.2f}"
        return f"{self.ratio:>8.3f} {f'({self.low:.3f} to {self.high:.3f})':>20}   {bar}".rstrip()


def command_line(described: str) -> argparse.ArgumentParser:
    """Return the parser that benchmarks have in common."""
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the ratios to this file")
    return parser


def write_rows(rows: list[Row], file: Path | None) -> list[Row]:
    """Write the rows to a file, if one is named, and return them."""
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows]))
    return rows


def read_rows(file: Path) -> list[Row]:
    """Read the rows that a benchmark wrote. Raises FileNotFoundError if it did not end."""
    return [Row(**values) for values in json.loads(file.read_text())]


def run_each(commands: Iterable[tuple[list[str], float]], seconds_together: float = math.inf) -> tuple[list[Row], int]:
    """Run benchmarks, given as (command, seconds that it may take), each in a process of its own, and print one table of
    their rows. Return the rows and the exit code of the first benchmark that failed: 1 if it did not end in time, 0 if none
    failed."""
    start, failed, found = time.perf_counter(), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (command, seconds) in enumerate(commands):
            title = " ".join(command)
            print(f"--- python -m tests.benchmarks.{title}", flush=True)
            begun, file = time.perf_counter(), Path(folder) / f"{number}.json"
            seconds = min(seconds, seconds_together - (begun - start))
            code, fault = _run([*command, "--json", str(file)], seconds) if seconds > 0 else (1, "no time left")
            failed = failed or code
            found[f"{title} ({fault})" if code else title] = read_rows(file) if file.exists() and not code else []
            print(f"({time.perf_counter() - begun:.0f} s)\n", flush=True)
    for line in summary(found):
        print(line)
    print(f"{len(found)} benchmarks in {time.perf_counter() - start:.0f} s")
    return [row for rows in found.values() for row in rows], failed


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a benchmark. Return its exit code, and the reason to print if that is not 0. No process that it started outlives
    it."""
    module, *flags = command
    whole = [sys.executable, "-m", f"tests.benchmarks.{module}", *flags]
    with subprocess.Popen(whole, cwd=PROJECT, start_new_session=True) as process:
        try:
            code = process.wait(None if seconds == math.inf else seconds)
        except subprocess.TimeoutExpired:
            return 1, f"no end within {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, f"ended with {code}"


def summary(found: dict[str, list[Row]]) -> Iterator[str]:
    """Yield the lines of one table with the rows of all benchmarks."""
    states = {True: "met", False: "not met", None: "no bar"}
    yield f"{'ours / theirs, rates':<60} {'':<7} {'ratio':>8} {'(quartiles)':>20}   bar"
    for benchmark, rows in found.items():
        yield f"{benchmark}:" if rows else f"{benchmark}: no ratio"
        for row in rows:
            yield f"  {row.name:<58} {states[row.is_met]:<7} {row.figures}"
    verdicts = [row.is_met for rows in found.values() for row in rows if row.bar is not None]
    yield f"{sum(verdicts)} of {len(verdicts)} bars met"
