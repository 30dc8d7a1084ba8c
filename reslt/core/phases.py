"""The wall time of a run, by phase: the table and the trace of `--profile`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Phases of an epoch. Phases before the first epoch are named at the calls that begin them.
WAITING, STEP, EVALUATION, CHECKPOINT, BOOKKEEPING = "waiting", "step", "evaluation", "checkpoint", "bookkeeping"
OF_EPOCHS = (WAITING, STEP, EVALUATION, CHECKPOINT, BOOKKEEPING)
MOST_SPANS = 1_000_000  # in a trace; later ones are left out


class Phases:
    """Seconds of each phase of this process. Exactly one phase runs at any time, so they add up to the wall time since the
    process started or, for one of several runs in a process, since this object was created. The first phase is `imports`.

    With a GPU, these are seconds of the host: it may wait in one phase for work that it launched in another."""

    def __init__(
        self, is_of_process: bool = True, keeps_spans: bool = False, clock: Callable[[], float] = time.perf_counter
    ):
        self.clock = clock
        self.began = clock() - (_seconds_since_start() if is_of_process else 0.0)
        self.seconds: Counter[str] = Counter()
        self.spans: list[tuple[str, str, float, float]] | None = [] if keeps_spans else None  # thread, phase, from, to
        self.current, self._since = "imports", self.began
        self.epochs = 0
        self._first_epoch: Counter[str] = Counter()  # seconds of each phase until the first epoch had ended

    def begin(self, phase: str) -> str:
        """End the current phase and begin another. Return the one that ended."""
        now, ended = self.clock(), self.current
        self.seconds[ended] += now - self._since
        if self.spans is not None and now > self._since and len(self.spans) < MOST_SPANS:
            self.spans.append(("run", ended, self._since, now))
        self.current, self._since = phase, now
        return ended

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count the block as a phase; afterwards, the current one continues."""
        before = self.begin(phase)
        try:
            yield
        finally:
            self.begin(before)

    def add(self, thread: str, phase: str, since: float, until: float) -> None:
        """Add work of another thread, which is no phase of the run, to the trace. Times are those of `clock`."""
        if self.spans is not None:
            self.spans.append((thread, phase, since, until))

    def end_epoch(self) -> None:
        """Note that an epoch has ended."""
        self.begin(self.current)
        self.epochs += 1
        if self.epochs == 1:
            self._first_epoch = self.seconds.copy()

    def table(self) -> str:
        """Return a table of each phase's seconds and share so far and, for phases of an epoch, milliseconds per epoch: the
        mean over all epochs but the first."""
        self.begin(self.current)
        whole, later = self._since - self.began, self.epochs - 1
        lines = [f"{'profile':<16}{'seconds':>10}{'share':>9}{'ms an epoch':>14}"]
        for phase, seconds in self.seconds.items():
            each = ""
            if phase in OF_EPOCHS and later > 0:
                each = f"{1000 * (seconds - self._first_epoch[phase]) / later:,.1f}"
            lines.append(f"  {phase:<14}{seconds:>10.2f}{seconds / whole:>9.1%}{each:>14}")
        added = sum(self.seconds.values())
        lines.append(f"  {'sum':<14}{added:>10.2f}{added / whole:>9.1%}")
        return "\n".join(line.rstrip() for line in lines)

    def trace(self) -> str:
        """Return the spans as JSON in the trace event format, which browsers draw (chrome://tracing, ui.perfetto.dev)."""
        self.begin(self.current)
        threads = {name: number for number, name in enumerate(dict.fromkeys(span[0] for span in self.spans or ()))}
        events = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": number, "args": {"name": name}}
            for name, number in threads.items()
        ]
        for thread, phase, since, until in self.spans or ():
            microseconds = {"ts": round(1e6 * (since - self.began), 1), "dur": round(1e6 * (until - since), 1)}
            events.append({"name": phase, "ph": "X", "pid": os.getpid(), "tid": threads[thread]} | microseconds)
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _seconds_since_start() -> float:
    """Return the seconds since this process started, at least 0: the system's clock may have been set back."""
    import psutil

    return max(time.time() - psutil.Process().create_time(), 0.0)
