"""Blocks of resident images made ahead of the steps: the same blocks, at most one ahead, in any order of epochs.
A CPU runs the thread as a GPU does; streams and events are stand-ins that record their calls."""

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
    """Blocks of two steps that contain the epoch and the indices of the images; `made` records them in the order begun."""

    def __init__(self):
        self.made, self.fails_at = [], None

    def __call__(self, batches):
        parts, _ = batches.parts()
        for first in range(0, len(parts), 2):
            self.made.append((batches.epoch, batches.first_step + first))
            if self.made[-1] == self.fails_at:
                raise ValueError("an error in the thread")
            block = torch.from_numpy(parts[first : first + 2])
            yield block.flatten(0, 1), torch.full((block.shape[0] * block.shape[1],), batches.epoch)


def batches_of(micro_batches: int = 1) -> ShuffledBatches:
    return ShuffledBatches(np.arange(20), BatchShard(4, micro_batches=micro_batches), seed=3)  # five steps


def blocks_of(make, batches: ShuffledBatches, epoch: int, first_step: int = 0) -> list:
    batches.epoch, batches.first_step = epoch, first_step
    return [[part.tolist() for part in block] for block in make(batches)]


def wait_until_begun(made: list, count: int) -> None:
    """Wait until `count` blocks were begun; then give the thread time to begin more than it should."""
    deadline = time.monotonic() + 10
    while len(made) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)


class Reversed:
    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(20)[::-1]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_blocks_made_ahead_equal_those_made_on_demand_in_any_order_of_epochs(micro_batches):
    plain, ahead, batches = Numbered(), BlocksAhead(Numbered(), CPU), batches_of(micro_batches)
    for epoch, first_step in ((0, 0), (1, 0), (2, 3), (3, 0), (3, 0), (5, 4), (0, 1)):
        assert blocks_of(ahead, batches, epoch, first_step) == blocks_of(plain, batches, epoch, first_step)
    batches.sampler = Reversed()
    for epoch in (1, 2):
        assert blocks_of(ahead, batches, epoch) == blocks_of(plain, batches, epoch)
    batches.sampler, batches.second_sampler = None, Reversed()
    assert blocks_of(ahead, batches, 3) == blocks_of(plain, batches, 3)


def test_exactly_one_block_is_made_ahead_even_across_epochs():
    blocks, batches = Numbered(), batches_of()
    ahead, in_epoch = BlocksAhead(blocks, CPU), [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]
    for epoch in (0, 1):
        batches.epoch = epoch
        for number, _ in enumerate(ahead(batches)):
            wait_until_begun(blocks.made, 3 * epoch + number + 2)
            assert blocks.made == in_epoch[: 3 * epoch + number + 2]


def test_an_error_is_raised_when_its_block_is_due_and_later_epochs_are_unharmed():
    blocks, batches = Numbered(), batches_of()
    ahead, blocks.fails_at = BlocksAhead(blocks, CPU), (0, 2)
    epoch = ahead(batches)
    next(epoch)
    wait_until_begun(blocks.made, 2)
    with pytest.raises(ValueError, match="an error in the thread"):
        next(epoch)
    assert len(blocks_of(ahead, batches, 1)) == 3
    blocks.fails_at = (3, 0)  # prepared after epoch 2, but never asked for
    assert [len(blocks_of(ahead, batches, epoch)) for epoch in (2, 4)] == [3, 3]


def test_an_epoch_left_early_makes_no_further_block():
    blocks, batches = Numbered(), batches_of()
    ahead = BlocksAhead(blocks, CPU)
    epoch = ahead(batches)
    next(epoch)
    epoch.close()
    wait_until_begun(blocks.made, 2)
    assert blocks.made == [(0, 0), (0, 2)]
    assert blocks_of(ahead, batches, 0) == blocks_of(Numbered(), batches, 0)


def test_a_gpu_makes_blocks_on_their_own_stream_and_the_steps_wait_for_them(monkeypatch):
    calls, this_thread = [], threading.get_ident()

    def stream(name: str) -> SimpleNamespace:
        def note(what):
            return lambda *given: calls.append((name, what, *given, threading.get_ident() == this_thread))

        return SimpleNamespace(wait_stream=note("waits for"), wait_event=note("waits for"), record_event=lambda: name)

    @contextmanager
    def within(chosen):
        calls.append(("begin", threading.get_ident() == this_thread))
        yield
        calls.append(("end", threading.get_ident() == this_thread))

    class Part(torch.Tensor):
        def record_stream(self, used_by):
            calls.append(("used by", used_by is steps, threading.get_ident() == this_thread))

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
    assert in_thread == [("begin", False), ("end", False)] * 2  # the second block belongs to the next epoch
    assert of_consumer == [("steps", "waits for", "side", True), ("used by", True, True)]
    assert len(block[0]) == 5
