"""A process that trains several runs at once, each in a thread. They take turns step by step; on a GPU, each has a stream.

`reslt.reproduce.jobs` starts it as `python -m reslt.reproduce.together FD`. Over the connection FD, it receives the flags and
the log of each run, and returns the run's exit code. It ends when the connection is closed and its runs have ended."""

from __future__ import annotations

import gc
import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection

import numpy as np
import torch

from reslt.core.command import entry_point, exit_code_of
from reslt.core.signals import StopRequests
from reslt.core.text import printable_output
from reslt.core.turns import OutputOfTurn, Turn, Turns
from reslt.reproduce.jobs import script

POLL_SECONDS = 0.2  # between two looks for a signal

Train = Callable[[list[str]], None]  # the flags of train.py


@entry_point
def main() -> None:
    number = train_together(_train_of_script(), Connection(int(sys.argv[1])))
    if number:
        sys.exit(128 + number)


def _train_of_script() -> Train:
    """Return the function `train` of train.py, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("train", script("train.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train


def train_together(train: Train, connection: Connection) -> int:
    """Receive runs, (flags, log file) each, and train them together from then on; send (log file, exit code) when one ends.
    Return 0 when the connection is closed and all runs have ended.

    After a signal, no further run begins, each run writes a checkpoint and ends, and the result is the signal's number."""
    turns, threads = Turns(), []
    with (
        StopRequests() as requests,
        redirect_stdout(OutputOfTurn(sys.stdout)),
        redirect_stderr(OutputOfTurn(sys.stderr)),
        printable_output(),
    ):
        while not requests.number:
            try:
                received = connection.recv() if connection.poll(POLL_SECONDS) else None
            except (EOFError, OSError):
                break
            if received:
                threads.append(threading.Thread(target=_run, args=(train, *received, turns, connection), daemon=True))
                threads[-1].start()
        for thread in threads:
            thread.join()
    return requests.number


def _run(train: Train, arguments: list[str], log: str, turns: Turns, connection: Connection) -> None:
    """Train one run, in its turns."""
    code = 1
    with turns.taking_part() as turn:
        try:
            with (
                open(log, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as turn.output,
                own_random_numbers(turn),
                own_stream(turn),
            ):
                code = exit_code_of(lambda: train(arguments, is_only_run=False))
        finally:
            turn.output = None
            with suppress(OSError):  # the command was killed, but the run is finished
                connection.send((log, code))


@contextmanager
def own_random_numbers(turn: Turn) -> Iterator[None]:
    """Within the block, give this thread its own state of the CPU's global random generators: each turn continues where its
    previous turn ended."""
    states = []

    def suspend() -> None:
        states[:] = random.getstate(), np.random.get_state(), torch.default_generator.get_state()

    def resume() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])

    turn.suspend, turn.resume = suspend, resume
    yield


@contextmanager
def own_stream(turn: Turn) -> Iterator[None]:
    """Within the block, give this thread its own stream on a GPU, and its own state of the default generator: a CUDA graph
    reads its seed from the memory of that state when it runs, which may be after turns of other runs."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        generator, on_host = torch.cuda.default_generators[torch.cuda.current_device()], turn.resume
        own = generator.clone_state()

        def resume() -> None:
            on_host()
            generator.graphsafe_set_state(own)

        generator.graphsafe_set_state(own)
        turn.resume = resume
        yield
        gc.collect()  # reference cycles contain the run's tensors, and the other runs need their memory


if __name__ == "__main__":
    main()
