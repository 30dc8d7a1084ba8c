"""Waits for the other processes of a run: a long one is reported, and a stop signal ends a process that is stuck in one.

The main thread runs no signal handler while a collective blocks it. Another thread reads the signals instead, from the file
descriptor to which Python writes their numbers, and checks the wait that the main thread is in."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from reslt.core.log import log_from_here
from reslt.core.ranks import process_name
from reslt.core.signals import STOP_SIGNALS, signal_name

REPORT_SECONDS = 30.0  # a wait that lasts longer is reported
PATIENCE_SECONDS = 10.0  # from the start of a wait, or from a later signal, to the end of the process
TICK_SECONDS = 0.5  # between two checks
END = 0  # in place of a signal's number: end the watch


class Wait:
    """A context in which others may block this process, such as a collective. It costs two clock readings.

    A wait may be entered repeatedly, once per step for example; it then counts as long only beyond twice the duration of the
    previous one."""

    current: Wait | None = None  # the wait that the main thread is in
    limit_seconds = math.inf  # for every wait: --ddp-timeout

    def __init__(self, awaited: str, patience: float = PATIENCE_SECONDS):
        """`awaited` completes 'process 1 has waited 30 s for ...'. `patience`: seconds after a stop signal in which the other
        processes can end the wait."""
        self.awaited, self.patience = awaited, patience
        self.since, self.usual_seconds, self.is_reported = 0.0, 0.0, False

    def __enter__(self) -> Wait:
        self.since, self.is_reported = time.monotonic(), False
        Wait.current = self
        return self

    def __exit__(self, *_) -> None:
        Wait.current = None
        self.usual_seconds = 2 * (time.monotonic() - self.since)


class Watcher:
    """A thread that reports long waits, and ends the process if it was asked to stop but is stuck in one."""

    def __init__(
        self,
        end: Callable[[int], None] = os._exit,
        report_seconds: float = REPORT_SECONDS,
        tick_seconds: float = TICK_SECONDS,
    ):
        """`end` is called with the exit code. Create a watcher in the main thread."""
        self.end, self.report_seconds, self.tick_seconds = end, report_seconds, tick_seconds
        self.number, self.signaled_at, self.is_urgent = 0, math.inf, False
        self.signals, self.writing_end = os.pipe()
        os.set_blocking(self.writing_end, False)
        self.thread = threading.Thread(target=self._run, name="waits", daemon=True)

    def start(self) -> None:
        """Start the thread, and make Python write the numbers of signals to the pipe."""
        self.before = signal.set_wakeup_fd(self.writing_end, warn_on_full_buffer=False)
        self.thread.start()

    def stop(self) -> None:
        """End the thread, and leave signals to their handlers again."""
        signal.set_wakeup_fd(self.before)
        os.write(self.writing_end, bytes([END]))  # closing the pipe is not enough: workers may have copies of its end
        self.thread.join()
        os.close(self.writing_end)
        os.close(self.signals)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self.signals], [], [], self.tick_seconds)
            if ready:
                numbers = os.read(self.signals, 64)
                if END in numbers:
                    return
                for number in numbers:
                    self._note(number)
            if (wait := Wait.current) is not None:
                self._check(wait, time.monotonic())

    def _note(self, number: int) -> None:
        """Note a signal; the first one counts, and a second Ctrl-C ends the process without patience."""
        if number not in STOP_SIGNALS:
            return
        self.is_urgent |= bool(self.number) and number == signal.SIGINT
        if not self.number:
            self.number, self.signaled_at = number, time.monotonic()

    def _check(self, wait: Wait, now: float) -> None:
        seconds, usual = now - wait.since, wait.usual_seconds
        patience_over = seconds > max(wait.patience, usual) and now - self.signaled_at > wait.patience
        if self.number and (patience_over or self.is_urgent):
            _report(
                logging.ERROR, f"{process_name()}: ended by {signal_name(self.number)} while waiting for {wait.awaited}"
            )
            self.end(128 + self.number)
        elif seconds > wait.limit_seconds:
            _report(
                logging.ERROR,
                f"{process_name()} has waited {seconds:.0f} s for {wait.awaited}, and ends: give a higher --ddp-timeout "
                "if that may take longer; else see the messages of the other processes",
            )
            self.end(1)
        elif seconds > max(self.report_seconds, usual) and not wait.is_reported:
            wait.is_reported = True
            _report(logging.WARNING, f"{process_name()} has waited {seconds:.0f} s for {wait.awaited}")


def _report(level: int, text: str) -> None:
    """Log a message. If its stream is gone, such as a closed terminal or `| head`, continue the watch."""
    with suppress(OSError):
        log_from_here(level, text)


@contextmanager
def waits_watched(**intervals) -> Iterator[None]:
    """Watch the waits of one of several processes within the block; `intervals`: arguments of `Watcher`. Outside the main
    thread, where Python handles no signals, watch nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watcher = Watcher(**intervals)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()
