"""`reproduce --streams`: several runs in one process end as each does alone, even if they are stopped or one fails."""

import gc
import importlib.util
import os
import random
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, at_update, make_dataset
from reproducing import runs_of, started, wait_until, write_recipe
from test_cuda_graph import BASE, batch, graphed
from test_interruptions import ALL_DRAWS, assert_same_end

import train
from reslt.augment.host_transforms import seed_generators
from reslt.core import locks
from reslt.core.log import log_to_console, logger, warn_once
from reslt.core.signals import StopRequests
from reslt.core.turns import Turn, Turns, let_others_work_until, own_turn, take_turns
from reslt.reproduce import jobs
from reslt.reproduce.rows import Run
from reslt.reproduce.together import own_random_numbers, own_stream, train_together
from reslt.training.compiled import compile_model
from reslt.training.cuda_graph import REHEARSALS
from reslt.training.step import TrainStep

# Random numbers of torch, NumPy and Python's `random`; images resident and not; a second stage with a new head.
KINDS = {
    "resident": ("--seed", "1", *ALL_DRAWS),
    "on_host": ("--seed", "2", "--data-on-device", "off", "--drop", "0.3", "--cutmix", "1.0", "--aa", "rand-m9"),
    "crt": ("--seed", "3", "--method", "crt", "--stage2-epochs", "1"),
}


def flags_of(kind: str, data: Path, output: Path) -> list[str]:
    where = ("--data", data, "--output", output, "--experiment", kind)
    return [str(flag) for flag in (*TINY_FLAGS, *where, *KINDS[kind])]


def together(runs: dict[str, list[str]], logs: Path) -> dict[str, int]:
    """Train the runs {name: flags} at once, in this process -> their exit codes."""
    log_to_console()
    logs.mkdir(exist_ok=True)
    here, there = Pipe()
    for name, flags in runs.items():
        here.send((flags, str(logs / name)))
    codes = {}

    def receive():
        for _ in runs:
            log, code = here.recv()
            codes[Path(log).name] = code
        here.close()

    thread = threading.Thread(target=receive)
    thread.start()
    train_together(train.train, there)
    thread.join()
    return codes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(dataset, folder of the runs of KINDS, each trained alone)."""
    root = tmp_path_factory.mktemp("alone")
    data = make_dataset(root / "tiny")
    for kind in KINDS:
        train.train(flags_of(kind, data, root))
    return data, root


def test_several_runs_in_one_process_end_as_each_does_alone(alone, tmp_path, monkeypatch):
    """Their files are bit-equal. They take turns after every step, and each run's log and train.log contain only its own
    messages."""
    data, root = alone
    order, original = [], TrainStep.update
    monkeypatch.setattr(TrainStep, "update", lambda self, *given: order.append(self.seed) or original(self, *given))
    codes = together({kind: flags_of(kind, data, tmp_path) for kind in KINDS}, tmp_path / "logs")
    assert codes == dict.fromkeys(KINDS, 0)
    assert (
        sum(seed == following for seed, following in pairwise(order[:9])) <= 2
    )  # if they ran one by one, it would be 6
    for kind in KINDS:
        assert_same_end(root / kind, tmp_path / kind)
        for log in (tmp_path / "logs" / kind, tmp_path / kind / "train.log"):
            text = log.read_text()
            assert set(re.findall(r"run  +(\S+)\n", text)) == {str(tmp_path / kind)}
            assert text.count("epoch 2  lr") == 1
            assert ("--streams gains little" in text) == (kind == "on_host")


def test_a_signal_stops_every_run_with_a_checkpoint_and_all_resume(alone, tmp_path, monkeypatch):
    data, root = alone
    runs = {kind: flags_of(kind, data, tmp_path) for kind in KINDS}

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: StopRequests.of_main_thread.number)  # until the main thread has noted it

    with monkeypatch.context() as patched:
        at_update(patched, 4, stop)
        assert together(runs, tmp_path / "logs") == dict.fromkeys(KINDS, 143)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for kind in KINDS:
        assert f"continue it with --resume {tmp_path / kind}" in (tmp_path / "logs" / kind).read_text()
        assert not (tmp_path / kind / "result.json").exists()
    resumed = {kind: [*flags, "--resume", "auto"] for kind, flags in runs.items()}
    assert together(resumed, tmp_path / "logs") == dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        assert "resuming in epoch" in (tmp_path / "logs" / kind).read_text()
        assert_same_end(root / kind, tmp_path / kind)


def test_a_run_that_fails_does_not_end_the_others(alone, tmp_path, monkeypatch):
    """One run fails because of its settings, one because of its loss, one because of a bug, and one because another run
    uses its folder. The run with the bug has no checkpoint of its last steps and resumes from the previous one."""
    data, root = alone
    good, dies = flags_of("resident", data, tmp_path), flags_of("crt", data, tmp_path)
    runs = {
        "no such model": [*flags_of("resident", data, tmp_path / "a"), "--model", "no_such_model"],
        "diverges": [*flags_of("resident", data, tmp_path / "b"), "--lr", "1e30"],
        "good": good,
        "dies": dies,
        "twice": [*good, "--resume", "auto"],
    }
    original = TrainStep.update

    def dies_at_step_4(self, window, step):
        if step == 4 and self.seed == 3:
            raise ZeroDivisionError("killed")
        return original(self, window, step)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "update", dies_at_step_4)
        codes = together(runs, tmp_path / "logs")
    assert codes == {"no such model": 2, "diverges": 2, "good": 0, "dies": 1, "twice": 2}
    logs = {name: (tmp_path / "logs" / name).read_text() for name in runs}
    assert re.search("^error: .*no_such_model", logs["no such model"], re.MULTILINE)
    assert re.search("^error: epoch 1, step 2 of 3.*the loss is (nan|inf)", logs["diverges"], re.MULTILINE)
    assert logs["dies"].endswith("ZeroDivisionError: killed\n")
    assert f"error: another process is using {tmp_path / 'resident'}" in logs["twice"]
    assert_same_end(root / "resident", tmp_path / "resident")
    assert together({"dies": [*dies, "--resume", "auto"]}, tmp_path / "logs") == {"dies": 0}
    assert_same_end(root / "crt", tmp_path / "crt")


class InThisProcess:
    """A thread in place of a process that trains runs together; it starts without the seconds of imports."""

    def __init__(self, command, log, variables, pass_fds):
        assert command[1:] == ["-m", "reslt.reproduce.together", str(pass_fds[0])]
        self.pid, self.connection = 2**30, Connection(os.dup(pass_fds[0]))
        self.thread = threading.Thread(target=train_together, args=(train.train, self.connection))
        self.thread.start()

    def poll(self):
        return None if self.thread.is_alive() else 0

    def wait(self, timeout=None):
        self.thread.join(timeout)
        return 0

    def terminate(self):
        self.connection.close()


class TestCommand:
    def test_the_runs_of_a_table_are_trained_together_and_those_that_fail_are_reported(
        self, tiny, tmp_path, reproduce, run_script, monkeypatch
    ):
        """Two of the four runs train at once; the next joins as soon as one has ended."""
        monkeypatch.setattr(jobs, "_started", InThisProcess)
        monkeypatch.setattr(jobs, "_kill_group", lambda leader: None)
        bad = write_recipe(tmp_path / "bad.yaml", tiny, lr=1e30)
        good = write_recipe(tmp_path / "good.yaml", tiny)
        out = tmp_path / "out"
        messages = reproduce("--recipes", bad, good, "--seeds", 4, 5, "--output", out, "--streams", 2, "--epochs", 1)
        assert messages.code == 1
        assert len(re.findall(r"bad.yaml seed \d: failed: epoch 1, step \d of 3.*the loss is", messages.out)) == 2
        assert len(re.findall(r"good.yaml seed \d: \d+\.\d at the last epoch", messages.out)) == 2
        table = (out / "reproduce/recipes/table.md").read_text()
        assert "2 of 4 runs done" in table
        (log,) = (out / "reproduce/recipes/logs").glob("*good-seed4.log")
        assert log.read_text().startswith("$ ")
        (run,) = out.glob("*good-seed4")
        arguments = shlex.split(log.read_text().splitlines()[0][2:])[2:]
        assert run_script("train", *arguments, "--output", tmp_path / "alone").code == 0
        assert_same_end(tmp_path / "alone" / run.name, run)

    def test_each_job_and_precision_has_a_process_of_its_own(self, tmp_path, monkeypatch):
        """Accelerate supports one precision per process. After a process has ended, the next run starts another."""

        class Group:
            def __init__(self, log, variables):
                self.log, self.has_ended, self.process = log.name, False, SimpleNamespace(pid=len(started))
                started.append(self)

            def train(self, arguments, log):
                trained.append((self.log, log.name))

        def run_of(name, precision):
            of_run = SimpleNamespace(experiment=name, mixed_precision=precision)
            return Run("r", {}, 0, (), SimpleNamespace(run=of_run))

        started, trained = [], []
        monkeypatch.setattr(jobs, "Group", Group)
        processes = jobs.Processes(2, tmp_path, streams=3)
        assert processes.room() == 6
        runs = [run_of(*of) for of in (("a", "no"), ("b", "no"), ("c", "bf16"), ("d", "no"), ("e", "no"))]
        assert list(processes.start(runs)) == runs
        no, of_1, bf16 = "streams-0-no.log", "streams-1-no.log", "streams-0-bf16.log"
        assert trained == [(no, "a.log"), (of_1, "b.log"), (bf16, "c.log"), (of_1, "d.log"), (no, "e.log")]
        assert processes.room() == 1
        started[1].has_ended = True
        processes.start([run_of("f", "no")])
        assert (started[-1].log, started[-1] is started[1]) == (of_1, False)

    def test_the_runs_of_a_process_that_dies_end_with_its_code(self, tmp_path, monkeypatch):
        class Killed(InThisProcess):
            def __init__(self, command, log, variables, pass_fds):
                self.connection, self.code = Connection(os.dup(pass_fds[0])), None

            def poll(self):
                return self.code

        monkeypatch.setattr(jobs, "_started", Killed)
        group, logs = jobs.Group(tmp_path / "log", {}), [tmp_path / name for name in ("a.log", "b.log", "c.log")]
        for log in logs[:2]:
            group.train(["--seed", "1"], log)
        assert group.code_of(logs[0]) is None
        group.process.connection.send((str(logs[1]), 0))  # the last message before it dies
        group.process.connection.close()
        group.process.code = -9
        group.train(["--seed", "2"], logs[2])
        assert [group.code_of(log) for log in logs] == [-9, 0, -9]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--streams", 0), "--streams 0: it must be at least 1"),
            (("--log-with", "wandb"), "wandb records one run per"),
        ],
    )
    def test_settings_that_rule_out_a_shared_process_are_refused(
        self, tiny, tmp_path, reproduce, monkeypatch, flags, message
    ):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "wandb" or found(name, *more))
        recipe = write_recipe(tmp_path / "a.yaml", tiny)
        refused = reproduce("--recipes", recipe, "--output", tmp_path / "out", "--streams", 3, *flags)
        assert refused.code == 2
        assert message in refused.err


def side_by_side(*works: Callable[[Turn], None]) -> None:
    """Call each in a thread of its own. They take turns in this order; the first begins when all have joined."""
    turns, threads, faults = Turns(), [], []

    def call(work):
        try:
            with turns.taking_part() as turn:
                work(turn)
        except BaseException as fault:
            faults.append(fault)

    with turns.taking_part():
        for number, work in enumerate(works):
            threads.append(threading.Thread(target=call, args=(work,)))
            threads[-1].start()
            wait_until(lambda count=number + 1: len(turns._waiting) == count)
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


class TestTurns:
    def test_threads_work_one_after_the_other_until_each_has_ended(self):
        worked = []

        def steps(name, count):
            def work(turn):
                for _ in range(count):
                    worked.append(name)
                    take_turns()

            return work

        side_by_side(steps("a", 3), steps("b", 1), steps("c", 5))
        assert "".join(worked) == "abcacaccc"

    def test_only_one_works_at_a_time(self):
        active = []

        def work(turn):
            for _ in range(5):
                active.append(turn)
                time.sleep(0.002)
                assert active == [turn]
                active.remove(turn)
                take_turns()

        side_by_side(work, work, work)

    def test_a_run_that_is_alone_never_waits(self):
        assert not take_turns()
        with Turns().taking_part() as turn:
            turn.suspend = lambda: pytest.fail("there is no other run")
            assert not take_turns()
            let_others_work_until(lambda: False)  # returns: the caller waits by itself
            assert own_turn() is turn
        assert own_turn() is None

    def test_the_next_run_begins_if_one_ends_with_an_error(self):
        ended = []
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda turn: 1 / 0, lambda turn: ended.append("b"))
        assert ended == ["b"]

    def test_a_wait_ends_when_another_run_makes_its_condition_true(self):
        done = []

        def works(turn):
            take_turns()
            done.append("b")

        side_by_side(lambda turn: let_others_work_until(lambda: done), works)

    def test_each_run_gives_a_repeated_warning_once(self, monkeypatch):
        turns, warnings = Turns(), []
        monkeypatch.setattr(logger, "warning", warnings.append)
        for run in ("first", "second"):
            with turns.taking_part():
                for _ in range(2):
                    warn_once("of this test", run)
        assert warnings == ["first", "second"]

    def test_the_random_numbers_of_a_run_do_not_depend_on_the_others(self):
        """They come from the global generators of torch, NumPy and Python, seeded once, with turns in between."""

        def draws(seed, found):
            def work(turn):
                with own_random_numbers(turn):
                    seed_generators(seed)
                    for _ in range(3):
                        found.append((torch.rand(1).item(), np.random.rand(), random.random()))
                        take_turns()

            return work

        alone, together = ([[], []] for _ in range(2))
        for seed in (0, 1):
            side_by_side(draws(seed, alone[seed]))
        side_by_side(*(draws(seed, together[seed]) for seed in (0, 1)))
        assert together == alone
        assert len(set(alone[0] + alone[1])) == 6

    def test_a_thread_that_waits_for_a_lock_lets_its_owner_work(self, tmp_path, monkeypatch):
        """Otherwise, both would wait forever."""
        monkeypatch.setattr(locks, "SILENT_SECONDS", 0.05)
        monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.05)
        active = []

        def work(turn):
            with locks.locked(tmp_path / "place", waits=True):
                active.append(turn)
                take_turns()
                assert active.pop() is turn

        side_by_side(work, work)


def test_compiled_models_of_other_runs_do_not_exhaust_torchs_limit():
    """By default, torch compiles a function for at most 8 models, and those of all runs of the process count."""
    limits = []

    def work(turn):
        compile_model(SimpleNamespace(compile=lambda dynamic: limits.append(torch._dynamo.config.cache_size_limit)))

    side_by_side(work, work)
    assert min(limits) >= 1000


class TestGPU:
    """Streams, graphs and generators of a GPU, replaced by stand-ins; nothing runs on a GPU."""

    def test_graphs_of_several_runs_that_take_turns_replay_as_alone(self):
        """The network has dropout, whose seed is set before each replay."""
        config = BASE.changed(drop=0.5, mixup=0.4)

        def trains(seed, found):
            def work(turn):
                with own_random_numbers(turn):
                    step, _ = graphed(config)
                    step.seed = seed
                    for number in range(REHEARSALS + 3):
                        step.update(batch(10 * seed + number), number)
                        take_turns()
                    assert step.recording is not None
                    found.append(step.model.state_dict())

            return work

        alone, together = ([[], []] for _ in range(2))
        for seed in (0, 1):
            side_by_side(trains(seed, alone[seed]))
        side_by_side(*(trains(seed, together[seed]) for seed in (0, 1)))
        for (by_itself,), (in_turn,) in zip(alone, together, strict=True):
            assert all(torch.equal(by_itself[name], in_turn[name]) for name in by_itself)

    def test_each_run_has_a_stream_and_a_generator_state_of_its_own(self, monkeypatch):
        class Generator:
            state = "of the process"

            def clone_state(self):
                return object()

            def graphsafe_set_state(self, state):
                self.state = state

        generator, streams, seen = Generator(), [], {}
        monkeypatch.setattr(gc, "collect", lambda: None)  # it takes a while among the other tests
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Stream", object)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(streams.append(stream)))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (generator,))

        def work(turn):
            with own_random_numbers(turn), own_stream(turn):
                for _ in range(3):
                    seen.setdefault(turn, []).append(generator.state)
                    take_turns()

        side_by_side(work, work)
        assert len(set(streams)) == 2
        first, second = seen.values()
        assert [len(states) for states in (first, second)] == [3, 3]
        assert [len(set(states)) for states in (first, second)] == [1, 1]
        assert len({first[0], second[0], Generator.state}) == 3


@pytest.mark.slow
def test_three_runs_that_are_killed_and_resumed_together_end_as_three_processes_do(tmp_path, reproduce):
    """The process of the command and that of the runs are killed (SIGKILL) when all three runs have an epoch; the same
    command resumes them. Another command trains each run in a process of its own."""
    common = ("--recipes", "digits_lt/ce", "--seeds", 0, 1, 2, "--epochs", 4)
    streams = (*common, "--output", tmp_path / "together", "--streams", 3)
    command = started(*streams)
    wait_until(lambda: len([*(tmp_path / "together").glob("*/checkpoints/last")]) == 3 or command.poll() is not None)
    (group,) = runs_of(command.pid)
    command.kill()
    os.kill(group, signal.SIGKILL)
    command.communicate()
    assert not [*(tmp_path / "together").glob("*/result.json")]
    messages = reproduce(*streams)
    assert messages.code == 0, messages.out + messages.err
    logs = [log.read_text() for log in (tmp_path / "together/reproduce/recipes/logs").glob("*seed*.log")]
    assert all(re.search(r"resuming in epoch \d", log) for log in logs)
    assert reproduce(*common, "--output", tmp_path / "alone").code == 0
    runs = [*(tmp_path / "alone").glob("digits*")]
    assert len(runs) == 3
    for run in runs:
        assert_same_end(run, tmp_path / "together" / run.name)
