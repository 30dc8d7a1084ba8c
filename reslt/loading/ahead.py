"""Preparation of the next block of resident images while steps use the current one, across epoch boundaries too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from reslt.augment.transfers import taken_over
from reslt.loading.batches import ShuffledBatches

Block = tuple[torch.Tensor, ...]  # the first axis of each tensor is that of the block's micro-batches


class BlocksAhead:
    """The blocks of an epoch, in order. A background thread begins to make each when the one before it is taken.

    The thread draws the random numbers and launches the copies and kernels, on a GPU on a stream of its own. When the last
    block of an epoch is taken, the thread makes the first block of the next epoch; it is discarded if that epoch differs,
    for example in its sampler. An error is raised when its block is taken. Nothing has to be closed: the thread makes one
    block at a time, then waits, and Python ends it."""

    def __init__(self, blocks: Callable[[ShuffledBatches], Iterator[Block]], device: torch.device):
        """`blocks`: a pure function that makes the blocks of an epoch, beginning at its first step."""
        self._blocks = blocks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the images may still be on their way
        # An epoch whose first block is requested
        self._next: tuple[ShuffledBatches, Iterator[Block], Future] | None = None

    def __call__(self, batches: ShuffledBatches) -> Iterator[Block]:
        """Yield the blocks of an epoch, beginning at its first step, for the current stream."""
        requested, self._next = self._next, None
        if requested is None or not _are_same(requested[0], batches):
            blocks = self._from(copy.copy(batches))
            requested = batches, blocks, self._request(blocks)
        (_, blocks, coming), left, following = requested, len(batches), _following(batches)
        while left:
            block, made = coming.result()
            coming, left = self._request(blocks), left - len(block[0])
            if not left:
                self._next = following, blocks, coming
            yield block if made is None else taken_over(block, made)

    def _from(self, batches: ShuffledBatches) -> Iterator[Block]:
        """Yield the blocks of an epoch, then those of all epochs that follow."""
        while True:
            yield from self._blocks(batches)
            batches = _following(batches)

    def _request(self, blocks: Iterator[Block]) -> Future:
        return self._thread.submit(self._made, blocks)

    def _made(self, blocks: Iterator[Block]) -> tuple[Block, torch.cuda.Event | None]:
        """Return the next block, and the event at which it is complete, None on a CPU."""
        if self._stream is None:
            return next(blocks), None
        with torch.cuda.stream(self._stream):
            return next(blocks), self._stream.record_event()


def _following(batches: ShuffledBatches) -> ShuffledBatches:
    """Return the batches of the next epoch, if only the epoch changes."""
    following = copy.copy(batches)
    following.epoch, following.first_step = batches.epoch + 1, 0
    return following


def _are_same(some: ShuffledBatches, others: ShuffledBatches) -> bool:
    """Return whether two epochs of a loader have the same batches."""
    return (
        (some.epoch, some.first_step) == (others.epoch, others.first_step)
        and some.sampler is others.sampler
        and some.second_sampler is others.second_sampler
    )
