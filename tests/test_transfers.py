"""Copies between host and device, without a GPU."""

import numpy as np
import pytest
import torch

from reslt.augment import transfers
from reslt.augment.transfers import Prefetcher, begin_copies, to_device

CPU = torch.device("cpu")


def test_to_device_keeps_the_values_and_types_of_arrays_and_tensors():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert torch.equal(to_device(array, CPU), torch.from_numpy(array))
    assert to_device(array, CPU).dtype == torch.int16
    assert to_device(torch.ones(2, dtype=torch.bool), CPU).tolist() == [True, True]


def test_batches_arrive_whole_and_in_order():
    batches = [[torch.full((2,), i), torch.tensor([i])] for i in range(4)]
    arrived = list(Prefetcher(CPU)(iter(batches)))
    assert [[part.tolist() for part in batch] for batch in arrived] == [[[i, i], [i]] for i in range(4)]


@pytest.mark.parametrize("small", [transfers.SMALL, 0])
def test_copies_on_the_host_have_memory_of_their_own(monkeypatch, small):
    """Whether tensors are copied together or one by one, changes to the originals after the start do not reach the copies."""
    monkeypatch.setattr(transfers, "SMALL", small)
    weight = torch.arange(6.0).view(2, 3)
    named = {"weight": weight, "its view": weight[0], "turned": weight.T, "number": torch.tensor(3)}
    before = {name: tensor.clone() for name, tensor in named.items()}
    finish = begin_copies(named)
    for tensor in named.values():
        tensor.zero_()  # as training does, while another thread writes
    copies = finish()
    assert list(copies) == list(named)
    for name, tensor in before.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].is_contiguous()
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 4


def test_small_tensors_of_a_gpu_are_copied_together(monkeypatch):
    """A tensor subclass claims to be on a GPU and counts the copies from there."""
    copied = []

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

        def cpu(self):
            copied.append(self.numel())
            return torch.Tensor(self.as_subclass(torch.Tensor))

        def to(self, *target, **kwargs):
            copied.append(self.numel())
            return self.as_subclass(torch.Tensor).to(*target, **kwargs)

    monkeypatch.setattr(transfers, "SMALL", 10)
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (), "large": (4, 5), "c": (9,)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    copies = begin_copies({name: value.as_subclass(Elsewhere) for name, value in values.items()})()
    assert sorted(copied) == [6 + 1 + 9, 20]
    for name, value in values.items():
        assert type(copies[name]) is torch.Tensor
        assert torch.equal(copies[name], value)
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 4  # as safetensors requires
