"""Waits for other processes: reported if they are long, and ended by a signal even if the main thread is blocked."""

import os
import signal
import threading
import time

import pytest

from reslt.config.schema import Config
from reslt.core import waiting
from reslt.core.errors import UserError
from reslt.core.log import log_to_console
from reslt.core.signals import StopRequests
from reslt.core.waiting import Wait, Watcher, waits_watched
from reslt.runs.resume import shared_settings
from reslt.training import accelerator as device


@pytest.fixture
def ended():
    """The exit codes with which a watcher would have ended this process; its intervals are short."""
    codes = []
    log_to_console()
    with waits_watched(end=codes.append, report_seconds=0.1, tick_seconds=0.02), StopRequests():
        yield codes


def send(number: int) -> None:
    """Send a signal to this process. Its handlers run at once, as if the main thread were blocked right afterwards."""
    os.kill(os.getpid(), number)


def test_a_long_wait_is_reported_once_by_the_process_that_waits(ended, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Wait("process 0, which is decoding images"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "warning: process 1 has waited 0 s for process 0, which is decoding images\n"
    assert ended == []


def test_a_short_wait_is_not_reported(ended, capsys):
    for _ in range(10):
        with Wait("the other processes"):
            time.sleep(0.03)
    assert capsys.readouterr().err == ""


def test_a_step_that_takes_as_long_as_the_previous_one_is_not_reported(ended, capsys):
    """Three steps take 0.2 s each, twice the limit. Only the first is reported, since no earlier duration is known."""
    step = Wait("the end of a step")
    for _ in range(3):
        with step:
            time.sleep(0.2)
    assert capsys.readouterr().err.count("has waited") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_process_that_waits_after_its_patience(ended, capsys, number, code):
    with Wait("the end of a step", patience=0.2):
        send(number)
        time.sleep(0.1)
        assert ended == []
        time.sleep(0.3)
    assert ended[0] == code
    assert "while waiting for the end of a step" in capsys.readouterr().err


def test_the_patience_starts_at_the_signal_not_at_the_last_progress(ended):
    """The other processes may have received the signal too, and then end the wait in order."""
    with Wait("the end of a step", patience=0.2):
        time.sleep(0.4)
        send(signal.SIGTERM)
        time.sleep(0.1)
        assert ended == []
        time.sleep(0.2)
    assert ended[0] == 143


def test_a_signal_does_not_end_a_process_whose_waits_end(ended):
    """Steps continue, and then a checkpoint is written, which is not a wait."""
    send(signal.SIGTERM)
    for _ in range(10):
        with Wait("the end of a step", patience=0.2):
            time.sleep(0.05)
    time.sleep(0.4)
    assert ended == []


def test_a_second_ctrl_c_ends_a_waiting_process_at_once(ended):
    signal.signal(signal.SIGINT, lambda number, frame: None)  # a collective does not let its exception out either
    with Wait("the end of a step", patience=60):
        send(signal.SIGINT)
        time.sleep(0.1)
        assert ended == []
        send(signal.SIGINT)
        time.sleep(0.1)
    assert ended[0] == 130


def test_a_wait_ends_even_if_its_message_cannot_be_printed(ended, monkeypatch):
    """In `2>&1 | head`, the reader may have ended."""

    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(waiting, "log_from_here", gone)
    with Wait("the end of a step", patience=0.05):
        time.sleep(0.2)  # long enough to be reported
        send(signal.SIGTERM)
        time.sleep(0.2)
    assert ended[0] == 143


def test_the_time_limit_of_a_wait_ends_the_process_with_one_message(ended, capsys, monkeypatch):
    monkeypatch.setattr(Wait, "limit_seconds", 0.05)
    with Wait("process 0, which is writing a checkpoint"):
        while not ended:
            time.sleep(0.01)
    assert ended[0] == 1
    assert "writing a checkpoint, and ends: give a higher --ddp-timeout" in capsys.readouterr().err.splitlines()[0]


def test_a_watch_that_ends_restores_the_previous_wakeup_descriptor():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    watcher = Watcher(end=lambda code: None)
    watcher.start()
    watcher.stop()
    assert signal.set_wakeup_fd(-1) == before
    assert not watcher.thread.is_alive()


def test_a_watch_ends_even_if_a_worker_has_a_copy_of_its_pipe():
    watcher = Watcher(end=lambda code: None)
    copy = os.dup(watcher.writing_end)
    closing = threading.Timer(5, os.close, [copy])  # so that a watch that waits for this does not hang
    closing.start()
    watcher.start()
    watcher.stop()
    assert closing.is_alive()
    closing.cancel()
    os.close(copy)


@pytest.fixture
def gathered(monkeypatch):
    """gathered(values of the other processes) makes this process 0 of a group that gathers these values."""

    def of_others(*others):
        monkeypatch.setenv("WORLD_SIZE", str(1 + len(others)))
        monkeypatch.setattr(device, "gather_object", lambda own: own + list(others))

    return of_others


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([{"lr": 0.1, "opt": "sgd"}], None),
        ([{"lr": 0.2, "opt": "sgd"}], "(lr: 0.1 in process 0, 0.2 in process 1)"),
        ([{"lr": 0.1, "opt": "sgd"}, {"lr": 0.1, "opt": "lamb"}], "(opt: 'sgd' in process 0, 'lamb' in process 2)"),
        ([{"lr": 0.2, "opt": "a"}] * 3, "process 1 and 2 more; opt: 'sgd' in process 0, 'a' in process 1 and 2 more)"),
        ([{"lr": 0.1}], "(opt: 'sgd' in process 0, unknown in process 1)"),
        ([{"lr": 0.1, "opt": "sgd", "new": None}], "(new: unknown in process 0, None in process 1)"),
    ],
)
def test_settings_that_differ_between_processes_are_named_with_both_values(gathered, others, message):
    gathered(*others)
    if message is None:
        device.refuse_differences({"lr": 0.1, "opt": "sgd"}, "setting")
        return
    with pytest.raises(UserError) as refused:
        device.refuse_differences({"lr": 0.1, "opt": "sgd"}, "setting")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "other", "may_differ"),
    [
        ("workers", 8, True),
        ("output", "/scratch", True),
        ("data_dir", "/scratch", True),
        ("data", "/scratch/lists", True),  # its lists are compared
        ("checkpoint_minutes", 5.0, True),
        ("resume", "output/run", True),  # another path to a run; whether it resumes is compared
        ("resume", None, False),
        ("lr", 0.2, False),
        ("seed", 1, False),
        ("grad_accum_steps", 2, False),  # these may change when a run resumes
        ("channels_last", True, False),
        ("torchcompile", True, False),
    ],
)
def test_folders_and_workers_may_differ_between_processes(name, other, may_differ):
    settings = Config.of(resume="auto").flat()
    assert (shared_settings(settings) == shared_settings(settings | {name: other})) == may_differ


@pytest.mark.parametrize(
    ("own", "others", "message"),
    [
        ("no train.txt", ["no train.txt"], "no train.txt"),
        (None, ["no train.txt"], "process 1: no train.txt"),
        ("no train.txt", [None], "process 0: no train.txt"),
        (None, [None], None),
    ],
)
def test_an_error_that_one_process_finds_is_raised_on_all(gathered, own, others, message):
    def find():
        if own:
            raise UserError(own)
        return "found"

    gathered(*others)
    if message is None:
        assert device.on_every_process(find) == "found"
        return
    with pytest.raises(UserError) as raised:
        device.on_every_process(find)
    assert str(raised.value) == message
