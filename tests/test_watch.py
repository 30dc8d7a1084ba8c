"""Signals, clocks and losses that are not finite: known to all processes at the same step, without a step that waits."""

import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import loss_of, mixing_of, model_of
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.core.signals import StopRequests
from reslt.methods.losses import FusionLoss, ResLTLoss
from reslt.training.step import TrainStep
from reslt.training.watch import MOST_STEPS, NotFinite, Request, Watch

CPU = torch.device("cpu")


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Group:
    """Processes that are threads here: a reduction waits until all have come to it, as collectives do."""

    def __init__(self, count: int, **watch):
        self.clock, self.meeting, self.given = Clock(), threading.Barrier(count, timeout=10), [None] * count
        self.requests = [StopRequests() for _ in range(count)]
        self.threads = ThreadPoolExecutor(count)
        self.watches = []
        for rank in range(count):
            accelerator = SimpleNamespace(
                num_processes=count,
                device=CPU,
                is_main_process=rank == 0,
                reduce=lambda tensor, how, rank=rank: self.reduce(rank, tensor),
            )
            self.watches.append(Watch(accelerator, self.requests[rank], clock=self.clock, **watch))

    def reduce(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self.given[rank] = tensor
        self.meeting.wait()
        total = sum(self.given)
        self.meeting.wait()
        return total

    def after(self, step: int, losses: list[float]) -> list:
        """What each process finds, or raises, after a step."""

        def messages(watch, loss):
            try:
                return watch.after(step, torch.tensor(loss))
            except NotFinite as fault:
                return fault

        return list(self.threads.map(messages, self.watches, losses))


def alone(clock=None, minutes=None) -> Watch:
    return Watch(Accelerator(cpu=True), StopRequests(), minutes, clock=clock or Clock())


def first_bad(is_lagging: bool, loss_of) -> tuple[int, int]:
    """The step at which a watch finds a loss that is not finite, and the step that it names."""
    clock = Clock()
    watch = alone(clock)
    watch.is_lagging = is_lagging
    for step in range(300):
        clock.now += 0.001  # so fast that the looks are as far apart as they may be
        try:
            watch.after(step, torch.tensor(loss_of(step)))
        except NotFinite as fault:
            return step, fault.step
    raise AssertionError("it found nothing")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 7, 100, 163])
def test_a_loss_that_is_not_finite_is_found_within_a_few_steps_and_named(bad, at):
    """At the next look, or at the one after it where answers come one look later, as on a GPU."""
    for is_lagging in (False, True):
        step, messages = first_bad(is_lagging, lambda step: bad if step >= at else 1.0)
        assert messages == at
        assert step - at <= MOST_STEPS * (1 + is_lagging)


def test_an_epochs_last_look_finds_what_came_after_the_one_before():
    clock = Clock()
    watch = alone(clock)
    for step in range(40):
        clock.now += 0.001
        watch.after(step, torch.tensor(1.0))
    assert watch.next_look > 41
    watch.after(40, torch.tensor(math.nan))
    with pytest.raises(NotFinite, match="step 40"):
        watch.finish(41)


@pytest.mark.parametrize("is_lagging", [False, True])
def test_a_part_that_is_not_finite_is_known_to_all_processes_at_the_same_step(is_lagging):
    group = Group(2)
    for watch in group.watches:
        watch.is_lagging = is_lagging
    for step in range(10):
        group.clock.now += 0.4
        found = group.after(step, [1.0, math.nan if step == 6 else 1.0])
        if any(found):
            break
    assert step == 6 + is_lagging
    assert [fault.step for fault in found] == [6, 6]


def test_processes_with_other_speeds_of_their_own_look_at_the_same_steps():
    """Each wishes its own distance; the mean of the wishes is what all take."""
    group = Group(2)
    for step in range(30):
        group.clock.now += 0.01 * (1 + step)
        group.after(step, [1.0, 1.0])
        assert group.watches[0].next_look == group.watches[1].next_look


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(who):
    group = Group(2)
    for step in range(6):
        group.clock.now += 0.6
        group.requests[who].number = signal.SIGUSR1 if step >= 3 else 0
        found = group.after(step, [1.0, 1.0])
        if any(found):
            break
    assert step == 3
    assert found == [Request(signal.SIGUSR1)] * 2


@pytest.mark.parametrize("is_lagging", [False, True])
def test_a_checkpoint_is_due_once_per_interval_by_the_main_processs_clock(is_lagging):
    """A look at each step; where answers come one look later, each is one step later, and none comes twice."""
    clock = Clock()
    watch, due = alone(clock, minutes=1.0), []
    watch.is_lagging = is_lagging
    for step in range(400):
        clock.now += 0.5
        if watch.after(step, torch.tensor(1.0)) == Request(0):
            due.append(clock.now)
            watch.saved()
    assert due == ([60.5, 121.0, 181.5] if is_lagging else [60.0, 120.0, 180.0])


def test_at_an_epochs_end_a_checkpoint_is_due_if_the_last_one_is_old_or_failed():
    clock, failed = Clock(), [False]
    watch = Watch(
        Accelerator(cpu=True), StopRequests(), None, checkpoint_seconds=5.0, has_failed=lambda: failed[0], clock=clock
    )
    due = []
    for epoch in range(12):
        clock.now += 2.0
        failed[0] = epoch == 10
        watch.after(epoch, torch.tensor(1.0))
        if watch.finish(epoch + 1):
            due.append(epoch)
            watch.saved()
    assert due == [2, 5, 8, 10]


def test_looks_are_half_a_second_apart_and_never_more_than_a_few_steps():
    for pace, wanted in ((1.0, 1), (0.1, 5), (0.001, MOST_STEPS)):
        clock = Clock()
        watch, looks = alone(clock), []
        for step in range(100):
            clock.now += pace
            before = watch.look_step
            watch.after(step, torch.tensor(1.0))
            if watch.look_step != before:
                looks.append(step)
        assert set(np.diff(looks[2:])) == {wanted}


def test_one_process_stops_at_the_very_next_step():
    clock = Clock()
    watch = alone(clock)
    for step in range(20):
        clock.now += 0.001
        assert watch.after(step, torch.tensor(1.0)) is None
    watch.requests.number = signal.SIGTERM
    assert watch.next_look > 22
    assert watch.after(20, torch.tensor(1.0)) == Request(signal.SIGTERM)


def test_signals_are_noted_while_entered_and_handled_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requests.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_was_ignored_stays_so():
    """nohup ignores SIGHUP, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert requests.number == 0
            signal.raise_signal(
                signal.SIGUSR1
            )  # a job's script may shield itself and the launcher from it, not the run
            assert requests.number == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])


CASES = {
    "reslt": (Config.of(branch="bn", clip_grad=1.0), 1),
    "mixed, in two micro-batches": (Config.of(branch="bn", mixup=0.4, cutmix=1.0, batch_size=8), 2),
    "cross-entropy": (Config.of(method="ce", smoothing=0.1), 1),
    "experts": (Config.of(branch="bn", experts=2, branch_loss="mean"), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case):
    """A step on tensors that hold no numbers: reading one back, which is what waits for a GPU, has nothing to give and
    raises. Forward, loss, backward, clipping, the optimizer's step, the sums for the bar and the watch between two looks."""

    config, micro_batches = CASES[case]
    config = config.changed(model="cifar_resnet20", model_kwargs={"channels": (8, 16, 32)}, batch_size=8)
    accelerator = Accelerator(cpu=True)
    watch = alone()
    watch.next_look = 10**9
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(config, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        mixing = mixing_of(config, 3)
        shard = BatchShard(8, micro_batches=micro_batches, paired=mixing is not None)
        loss_fn = loss_of(config, np.array([9, 5, 2]))
        step = TrainStep(
            model, loss_fn, optimizer, accelerator, shard, lambda x: x.float(), 0, mixing, config.optim.clip_grad
        )
        window = [
            (torch.zeros(len(p), 3, 16, 16, dtype=torch.uint8), torch.zeros(len(p), dtype=torch.int64))
            for p in shard.positions
        ]
        totals = torch.zeros(2)
        watch.losses = torch.zeros(64)
        for number in range(2):
            loss, hits = step.update(window, number)
            totals += torch.stack([loss, hits])
            assert watch.after(number, loss) is None
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize("loss_fn", [FusionLoss(), ResLTLoss(np.ones((2, 3), bool), 0.5)])
def test_parts_of_a_batch_add_up_to_its_loss(loss_fn):
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 0, 1])
    parts = [slice(0, 1), slice(1, 6)]
    whole = sum(loss_fn.denominators(labels[part]) for part in parts)
    together = sum(loss_fn(logits[:, part], labels[part], whole) for part in parts)
    torch.testing.assert_close(together, loss_fn(logits, labels))
