"""A process that trains several runs at once: each as a thread, step by step in turn, and on a GPU on a stream of its own.

`python -m reslt.reproduce.together FD`: `reslt.reproduce.jobs` starts it and, over the connection FD, sends it the flags and
the log of each run, and receives the run's exit code. It ends when the connection is closed and its runs have ended."""

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
    """Return the function `train` of train.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("train", script("train.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train


def train_together(train: Train, connection: Connection) -> int:
    """Train each run (flags, log file) that is received, from then on, beside those that are training; send (log file, exit
    code) when it ends. Return when the connection is closed and all have ended -> 0.

    After a signal, each run writes a checkpoint and ends, and no further one begins -> the signal's number."""
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
            with suppress(OSError):  # the command was killed; the run is finished nevertheless
                connection.send((log, code))


@contextmanager
def own_random_numbers(turn: Turn) -> Iterator[None]:
    """Within the block, the global generators of the CPU continue at each turn where they were at the end of the one
    before."""
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
    """Within the block, the work of this thread on a GPU is on a stream of its own, and the default generator has a state of
    its own: a CUDA graph reads its seed from the state's memory when it runs, which is after the other runs' turns."""
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
        gc.collect()  # the run's tensors are in cycles of references, and the others need their memory


if __name__ == "__main__":
    main()
