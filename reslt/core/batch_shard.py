"""The division of a global batch among processes, and among the micro-batches of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class BatchShard:
    """The rank shard of each global batch: `micro_batches` of `processes` x `micro_batches` equal parts."""

    batch_size: int  # images of the global batch
    rank: int = 0
    processes: int = 1
    micro_batches: int = 1  # --grad-accum-steps
    paired: bool = False  # mixing: each part contains both images of a pair

    @property
    def parts(self) -> int:
        """Number of equal parts of a global batch."""
        return self.processes * self.micro_batches

    @cached_property
    def positions(self) -> list[np.ndarray]:
        """Positions in the global batch, an array per micro-batch of this process. Raises ValueError if the batch (with
        `paired`, its pairs) cannot be divided evenly."""
        mine = range(self.rank * self.micro_batches, (self.rank + 1) * self.micro_batches)
        if self.paired:
            return [paired_slice(self.batch_size, part, self.parts) for part in mine]
        if self.batch_size % self.parts:
            raise ValueError(f"{self.batch_size} images cannot be divided into {self.parts} equal parts")
        return list(np.arange(self.batch_size).reshape(self.parts, -1)[list(mine)])

    def span(self, images: int) -> tuple[int, int]:
        """Return the start and end of this process's part of a list of `images`: each image belongs to one process."""
        return images * self.rank // self.processes, images * (self.rank + 1) // self.processes


def paired_slice(batch_size: int, part: int, parts: int) -> np.ndarray:
    """Return the positions of a part in the global batch: each image i and its partner batch_size-1-i, ordered so that
    the local pairing is the global one. Raises ValueError if the pairs cannot be divided evenly."""
    if parts == 1:
        return np.arange(batch_size)
    pairs, rest = divmod(batch_size, 2 * parts)
    if rest:
        raise ValueError(f"{batch_size} images cannot be divided into {parts} parts of whole pairs")
    first = np.arange(part * pairs, (part + 1) * pairs)
    return np.concatenate([first, batch_size - 1 - first[::-1]])
