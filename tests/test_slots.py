"""The shared memory that workers write batches to is reused, but never while a tensor still refers to it."""

import pickle
import resource

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from reslt.core.errors import UserError
from reslt.loading.slots import BatchesWithSlots, IntoSlots, SamplesWithSlots, Slots


def samples(count: int) -> list[tuple[torch.Tensor, int]]:
    return [(torch.full((3, 2, 2), 10 + i, dtype=torch.uint8), i) for i in range(count)]


def received(slots: Slots, slot: int | None, count: int) -> list[torch.Tensor]:
    """Return the main process's part of a batch that a worker collates."""
    return pickle.loads(pickle.dumps(IntoSlots(slots)((slot, samples(count)))))


@pytest.mark.parametrize("slot", [1, None])
@pytest.mark.parametrize("count", [2, 3])  # three images do not fit into a slot
def test_a_batch_equals_that_of_torchs_own_collate_function(slot, count):
    images, labels = received(Slots(2, 2 * 12), slot, count)
    for ours, theirs in zip((images, labels), default_collate(samples(count)), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_slot_becomes_free_when_no_view_of_its_batch_is_left():
    slots = Slots(2, 24)
    slot, other = slots.take(), slots.take()
    assert slots.take() is None
    images, _ = received(slots, slot, 2)
    view = images[:1]
    del images
    slots.begin()
    assert slots.free == [other]  # no batch in it was received, and no worker has it at the beginning of an epoch
    assert view.unique().tolist() == [10]
    del view
    assert sorted(slots.free) == [0, 1]


def test_each_batch_of_keys_has_a_slot_of_its_own_while_slots_are_free():
    slots, keys = Slots(2, 24), [np.zeros((1, 2), int)] * 3
    assert sorted(str(slot) for slot, _ in BatchesWithSlots(keys, slots)) == ["0", "1", "None"]
    assert len(list(BatchesWithSlots(keys, slots))) == len(BatchesWithSlots(keys, slots)) == 3


def test_the_error_of_an_unreadable_image_is_passed_on():
    class Unreadable:
        def __getitems__(self, keys):
            return UserError("train.txt:1: unreadable")

    assert isinstance(SamplesWithSlots(Unreadable()).__getitems__((0, np.zeros((1, 2)))), UserError)


def test_slots_that_would_fill_the_shared_memory_are_not_created():
    assert Slots.created(2, 1 << 10).memory.shape == (2, 1 << 10)
    assert Slots.created(1 << 10, 1 << 40) is None


def test_slots_that_the_system_refuses_are_not_created():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))
    try:
        assert Slots.created(2, 1 << 10) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
