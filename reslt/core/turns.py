"""Several runs in one process: each is a thread, and only one of them works at a time. They take turns at defined points,
such as after each training step, so that two of them never use the process's global state at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

_OF_THREAD = threading.local()


class Turns:
    """The order of threads: first come, first served."""

    def __init__(self):
        self._guard = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()  # each is released when its thread's turn begins

    @contextmanager
    def taking_part(self) -> Iterator[Turn]:
        """Within the block, this thread works only in its turns."""
        self._begin()
        _OF_THREAD.turn = turn = Turn(self)
        try:
            yield turn
        finally:
            _OF_THREAD.turn = None
            self._end()

    def has_others(self) -> bool:
        """Return whether another thread waits for its turn."""
        return bool(self._waiting)

    def rotate(self) -> None:
        """Let each thread that waits have a turn, then return."""
        with self._guard:
            own = self._enqueue()
            self._waiting.popleft().release()
        own.acquire()

    def _begin(self) -> None:
        with self._guard:
            own = self._enqueue() if self._is_taken else None
            self._is_taken = True
        if own is not None:
            own.acquire()

    def _end(self) -> None:
        with self._guard:
            self._is_taken = bool(self._waiting)
            if self._waiting:
                self._waiting.popleft().release()

    def _enqueue(self) -> threading.Lock:
        own = threading.Lock()
        own.acquire()
        self._waiting.append(own)
        return own


@dataclass(eq=False)
class Turn:
    """A thread's participation in `Turns`. `output`: the stream for what it prints, if it has its own. `suspend` is called
    before other threads work, `resume` afterwards."""

    turns: Turns
    output: TextIO | None = None
    suspend: Callable[[], None] = lambda: None
    resume: Callable[[], None] = lambda: None


def own_turn() -> Turn | None:
    """Return the turn of this thread; None if it takes no turns, as in a process with a single run."""
    return getattr(_OF_THREAD, "turn", None)


@contextmanager
def on_behalf_of(turn: Turn | None) -> Iterator[None]:
    """Within the block, print this thread's messages as those of another thread's run, for example while it writes that
    run's files. This thread takes no turns."""
    before, _OF_THREAD.turn = own_turn(), turn
    try:
        yield
    finally:
        _OF_THREAD.turn = before


def take_turns() -> bool:
    """Let the other runs of this process work, each for one turn. Return whether there are any."""
    turn = own_turn()
    if turn is None or not turn.turns.has_others():
        return False
    turn.suspend()
    turn.turns.rotate()
    turn.resume()
    return True


def let_others_work_until(is_done: Callable[[], bool]) -> None:
    """Let the other runs of this process work until `is_done`; return at once if there are none."""
    while not is_done() and take_turns():
        pass


class OutputOfTurn:
    """A text stream that replaces `stream`: text written in a turn goes to the turn's own output, if it has one."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        turn = own_turn()
        return getattr(self._stream if turn is None or turn.output is None else turn.output, name)
