"""Signals, the checkpoint timer and losses that are not finite are known to all processes at the same step, and no step
waits for the device."""

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
    """Threads in place of processes; a reduction waits until all have called it, as collectives do."""

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
        """Return the request or the error of each process after a step."""

        def request(watch, loss):
            try:
                return watch.after(step, torch.tensor(loss))
            except NotFinite as error:
                return error

        return list(self.threads.map(request, self.watches, losses))


def alone(clock=None, minutes=None) -> Watch:
    return Watch(Accelerator(cpu=True), StopRequests(), minutes, clock=clock or Clock())


def first_error(is_lagging: bool, loss_of) -> tuple[int, int]:
    """Return the step at which a watch finds a loss that is not finite, and the step that it names."""
    clock = Clock()
    watch = alone(clock)
    watch.is_lagging = is_lagging
    for step in range(300):
        clock.now += 0.001  # so fast that the looks are as far apart as possible
        try:
            watch.after(step, torch.tensor(loss_of(step)))
        except NotFinite as error:
            return step, error.step
    raise AssertionError("no loss was found that is not finite")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 7, 100, 163])
def test_a_loss_that_is_not_finite_is_found_within_a_few_steps_and_named(bad, at):
    """It is found at the next look, or, if answers come one look later as on a GPU, at the look after that."""
    for is_lagging in (False, True):
        step, named = first_error(is_lagging, lambda step: bad if step >= at else 1.0)
        assert named == at
        assert step - at <= MOST_STEPS * (1 + is_lagging)


def test_the_look_at_the_end_of_an_epoch_finds_losses_since_the_previous_one():
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
def test_a_loss_of_one_process_that_is_not_finite_is_known_to_all_at_the_same_step(is_lagging):
    group = Group(2)
    for watch in group.watches:
        watch.is_lagging = is_lagging
    for step in range(10):
        group.clock.now += 0.4
        found = group.after(step, [1.0, math.nan if step == 6 else 1.0])
        if any(found):
            break
    assert step == 6 + is_lagging
    assert [error.step for error in found] == [6, 6]


def test_processes_of_different_speed_look_at_the_same_steps():
    """Each proposes a number of steps, and all take the mean."""
    group = Group(2)
    for step in range(30):
        group.clock.now += 0.01 * (1 + step)
        group.after(step, [1.0, 1.0])
        assert group.watches[0].next_look == group.watches[1].next_look


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(rank):
    group = Group(2)
    for step in range(6):
        group.clock.now += 0.6
        group.requests[rank].number = signal.SIGUSR1 if step >= 3 else 0
        found = group.after(step, [1.0, 1.0])
        if any(found):
            break
    assert step == 3
    assert found == [Request(signal.SIGUSR1)] * 2


@pytest.mark.parametrize("is_lagging", [False, True])
def test_a_checkpoint_is_due_once_per_interval_by_the_main_processs_clock(is_lagging):
    """The watch looks at each step. If answers come one look later, each request is one step later, and none is made
    again."""
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


def test_looks_are_half_a_second_apart_but_at_most_a_few_steps():
    for seconds_per_step, expected in ((1.0, 1), (0.1, 5), (0.001, MOST_STEPS)):
        clock = Clock()
        watch, looks = alone(clock), []
        for step in range(100):
            clock.now += seconds_per_step
            before = watch.look_step
            watch.after(step, torch.tensor(1.0))
            if watch.look_step != before:
                looks.append(step)
        assert set(np.diff(looks[2:])) == {expected}


def test_a_single_process_stops_at_the_next_step():
    clock = Clock()
    watch = alone(clock)
    for step in range(20):
        clock.now += 0.001
        assert watch.after(step, torch.tensor(1.0)) is None
    watch.requests.number = signal.SIGTERM
    assert watch.next_look > 22
    assert watch.after(20, torch.tensor(1.0)) == Request(signal.SIGTERM)


def test_signals_are_recorded_within_the_context_and_handled_as_before_after_it():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requests.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_sighup_stays_ignored():
    """nohup ignores SIGHUP, so that a run outlives its terminal. SIGUSR1 may be ignored to protect a job's script and the
    launcher, but must reach the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert requests.number == 0
            signal.raise_signal(signal.SIGUSR1)
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
    """Fake tensors have no values, so that reading one back, which waits for a GPU, raises. A step has the forward and
    backward passes, the loss, clipping, the optimizer's update, the sums for the progress bar, and the watch between two
    looks."""
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
            (torch.zeros(len(positions), 3, 16, 16, dtype=torch.uint8), torch.zeros(len(positions), dtype=torch.int64))
            for positions in shard.positions
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
def test_the_losses_of_parts_of_a_batch_add_up_to_its_loss(loss_fn):
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 0, 1])
    parts = [slice(0, 1), slice(1, 6)]
    whole = sum(loss_fn.denominators(labels[part]) for part in parts)
    together = sum(loss_fn(logits[:, part], labels[part], whole) for part in parts)
    torch.testing.assert_close(together, loss_fn(logits, labels))
