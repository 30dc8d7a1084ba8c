"""Signals that request an orderly stop of a run, and a record of the first one received."""

from __future__ import annotations

import signal
import threading

# Ctrl-C; the end of a job; SLURM's warning before a job's time limit; the end of the terminal
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class StopRequests:
    """A context in which a signal is recorded instead of ending the process; a second Ctrl-C ends it at once.

    Ctrl-C and the end of the terminal remain ignored if they were before (nohup, a shell's background jobs). Other threads
    share the requests of the main thread; outside its context, they record nothing."""

    of_main_thread: StopRequests | None = None  # while it is in this context

    def __init__(self):
        self.number = 0  # of the first signal received; 0: none
        self._before = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
            self._before = {}
            for number in STOP_SIGNALS:
                handler = signal.getsignal(number)
                if handler != signal.SIG_IGN or number.name in ("SIGTERM", "SIGUSR1"):
                    self._before[number] = handler
            for number in self._before:
                signal.signal(number, self._note)
            StopRequests.of_main_thread = self
            return self
        return StopRequests.of_main_thread or self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if StopRequests.of_main_thread is self:
            StopRequests.of_main_thread = None

    def _note(self, number, frame) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


def signal_name(number: int) -> str:
    """Return a signal's name, such as 'SIGTERM'; 'Ctrl-C' for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
