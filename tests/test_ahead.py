"""Blocks of resident images that are made ahead of the steps: the same ones, never more than one ahead, in any order of
epochs. A CPU runs the thread as a GPU does; streams and events are stand-ins that take down what is asked of them."""

import copy
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import CPU

from reslt.core.batch_shard import BatchShard
from reslt.loading.ahead import BlocksAhead
from reslt.loading.batches import ShuffledBatches


class Numbered:
    """Blocks of two steps, which contain the epoch and the indices of the images; `made` takes down when each was begun."""

    def __init__(self):
        self.made, self.fails_at = [], None

    def __call__(self, batches):
        parts, _ = batches.parts()
        for first in range(0, len(parts), 2):
            self.made.append((batches.epoch, batches.first_step + first))
            if self.made[-1] == self.fails_at:
                raise ValueError("a fault of the thread")
            block = torch.from_numpy(parts[first : first + 2])
            yield block.flatten(0, 1), torch.full((block.shape[0] * block.shape[1],), batches.epoch)


def batches_of(micro_batches: int = 1) -> ShuffledBatches:
    return ShuffledBatches(np.arange(20), BatchShard(4, micro_batches=micro_batches), seed=3)  # five steps


def taken(ahead, batches: ShuffledBatches, epoch: int, first_step: int = 0) -> list:
    batches.epoch, batches.first_step = epoch, first_step
    return [[part.tolist() for part in block] for block in ahead(batches)]


def until(made: list, count: int) -> None:
    """Wait until so many blocks were begun; then give the thread time to begin more than it should."""
    deadline = time.monotonic() + 10
    while len(made) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)


class Reversed:
    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(20)[::-1]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_blocks_are_those_made_on_demand_whatever_is_asked_for(micro_batches):
    plain, ahead, batches = Numbered(), BlocksAhead(Numbered(), CPU), batches_of(micro_batches)
    for epoch, first_step in ((0, 0), (1, 0), (2, 3), (3, 0), (3, 0), (5, 4), (0, 1)):
        assert taken(ahead, batches, epoch, first_step) == taken(plain, batches, epoch, first_step)
    batches.sampler = Reversed()
    for epoch in (1, 2):
        assert taken(ahead, batches, epoch) == taken(plain, batches, epoch)
    batches.sampler, batches.second_sampler = None, Reversed()
    assert taken(ahead, batches, 3) == taken(plain, batches, 3)


def test_one_block_is_ahead_over_the_boundary_of_epochs_too():
    blocks, batches = Numbered(), batches_of()
    ahead, in_epoch = BlocksAhead(blocks, CPU), [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]
    for epoch in (0, 1):
        batches.epoch = epoch
        for number, _ in enumerate(ahead(batches)):
            until(blocks.made, 3 * epoch + number + 2)
            assert blocks.made == in_epoch[: 3 * epoch + number + 2]


def test_an_error_is_raised_when_its_block_is_taken_and_ends_nothing_else():
    blocks, batches = Numbered(), batches_of()
    ahead, blocks.fails_at = BlocksAhead(blocks, CPU), (0, 2)
    epoch = ahead(batches)
    next(epoch)
    until(blocks.made, 2)
    with pytest.raises(ValueError, match="a fault of the thread"):
        next(epoch)
    assert len(taken(ahead, batches, 1)) == 3
    blocks.fails_at = (3, 0)  # prepared after epoch 2, but never asked for
    assert [len(taken(ahead, batches, epoch)) for epoch in (2, 4)] == [3, 3]


def test_an_epoch_left_early_makes_no_further_block():
    blocks, batches = Numbered(), batches_of()
    ahead = BlocksAhead(blocks, CPU)
    epoch = ahead(batches)
    next(epoch)
    epoch.close()
    until(blocks.made, 2)
    assert blocks.made == [(0, 0), (0, 2)]
    assert taken(ahead, batches, 0) == taken(Numbered(), batches, 0)


def test_a_gpu_makes_a_block_on_its_own_stream_and_the_steps_stream_waits_for_it(monkeypatch):
    calls, here = [], threading.get_ident()

    def stream(name: str) -> SimpleNamespace:
        def note(what):
            return lambda *given: calls.append((name, what, *given, threading.get_ident() == here))

        return SimpleNamespace(wait_stream=note("waits for"), wait_event=note("waits for"), record_event=lambda: name)

    @contextmanager
    def within(chosen):
        calls.append(("begin", threading.get_ident() == here))
        yield
        calls.append(("end", threading.get_ident() == here))

    class Part(torch.Tensor):
        def record_stream(self, used_by):
            calls.append(("used by", used_by is steps, threading.get_ident() == here))

    side, steps = stream("side"), stream("steps")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: steps)
    ahead = BlocksAhead(lambda batches: iter([(torch.zeros(5).as_subclass(Part),)]), torch.device("cuda"))
    assert calls == [("side", "waits for", steps, True)]
    [block] = ahead(copy.copy(batches_of()))
    deadline = time.monotonic() + 10
    while calls.count(("end", False)) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    in_thread, of_consumer = [call for call in calls if not call[-1]], [call for call in calls[1:] if call[-1]]
    assert in_thread == [("begin", False), ("end", False)] * 2  # the second one is of the next epoch
    assert of_consumer == [("steps", "waits for", "side", True), ("used by", True, True)]
    assert len(block[0]) == 5
