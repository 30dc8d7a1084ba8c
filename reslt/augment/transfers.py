"""Copies between host and device: to the device without waiting, to the host in a few pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from reslt.core.turns import let_others_work_until, own_turn

SMALL = 1 << 16  # elements; smaller tensors are copied to the host together


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy an array to the device. On a GPU the host continues at once: the array is pinned first, because a copy from
    other memory might wait until the device has finished all earlier work. One array costs less than several: while
    copies of its size are under way, torch allocates further pinned memory, which may wait too."""
    tensor = torch.as_tensor(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Prefetcher:
    """Copies of batches on a device. On a GPU, a stream of its own copies the next batch while a step works on the
    current one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
        """Yield the batches on the device, in their order."""
        if self.stream is None:
            for batch in batches:
                yield [part.to(self.device) for part in batch]  # complete, because its host memory will be reused
            return
        earlier = None
        for batch in batches:
            with torch.cuda.stream(self.stream):
                copied = [part.to(self.device, non_blocking=True) for part in batch]
                arrived = self.stream.record_event()
            if earlier is not None:
                yield taken_over(*earlier)
            earlier = copied, arrived
        if earlier is not None:
            yield taken_over(*earlier)


def taken_over(batch: list[torch.Tensor], arrived: torch.cuda.Event) -> list[torch.Tensor]:
    """Hand a batch from another stream, complete at the event `arrived`, to the current stream: the stream waits for the
    event, and the batch's memory is not reused before the stream's work on it is done."""
    current = torch.cuda.current_stream()
    current.wait_event(arrived)
    for part in batch:
        part.record_stream(current)
    return batch


def let_device_finish(device: torch.device) -> None:
    """Let the other runs of this process work until the device has finished this run's work, which the host is about to
    wait for. Without other runs, return at once."""
    if device.type == "cuda" and own_turn() is not None:
        let_others_work_until(torch.cuda.current_stream().record_event().query)


def begin_copies(tensors: dict[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    """Begin to copy tensors, as they are now, to the host. The returned function, which another thread may call, waits
    until they have arrived and returns the copies: contiguous, each with its own memory.

    On a GPU the host waits for nothing here, and work that begins later may change the tensors. Small tensors of the
    same data type are copied together: a network has hundreds, and each copy costs the host some time."""
    small: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() < SMALL:
            small.setdefault((tensor.device, tensor.dtype), []).append(name)
    together = [
        (names, _begin_copy(torch.cat([tensors[name].detach().reshape(-1) for name in names])))
        for names in small.values()
    ]
    large = {name: _begin_copy(tensor.detach()) for name, tensor in tensors.items() if tensor.numel() >= SMALL}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def finish() -> dict[str, torch.Tensor]:
        if arrived is not None:
            arrived.synchronize()
        found = {name: copy.contiguous() for name, copy in large.items()}
        for names, copies in together:
            parts = copies.split([shapes[name].numel() for name in names])
            found |= {name: part.view(shapes[name]).clone() for name, part in zip(names, parts, strict=True)}
        return {name: found[name] for name in shapes}

    return finish


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host. The copy of a GPU's tensor is filled later."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    on_host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)
