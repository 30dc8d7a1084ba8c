"""A run's messages (train.log, the lines that replace a progress bar, the time left), and two settings of the process:
threads that do not spin while they wait, and freed memory that is kept."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_FLAGS

from reslt.core.batch_shard import BatchShard
from reslt.core.cpu import SPIN_COUNT, bound_spinning, keep_freed_memory
from reslt.core.errors import UserError
from reslt.core.log import log_to_console, logged_to, logger
from reslt.core.signals import StopRequests
from reslt.training.epoch import Pace, train_epoch
from reslt.training.state import Progress
from reslt.training.watch import Watch


def test_a_runs_log_contains_everything_printed_and_the_levels_of_messages(tiny, tmp_path, run_script):
    outcome = run_script("train", "--data", tiny, "--output", tmp_path, "--experiment", "run", *TINY_FLAGS)
    assert outcome.code == 0, outcome.err
    log = (tmp_path / "run/train.log").read_text()
    assert "WARNING tiny has no validation list" in log
    for line in outcome.out.splitlines():
        assert line in log


def test_a_resumed_run_continues_its_log(tiny, tmp_path, run_script):
    flags = ("--data", tiny, "--output", tmp_path, "--experiment", "run", *TINY_FLAGS)
    run_script("train", *flags)
    first = (tmp_path / "run/train.log").read_text()
    run_script("train", *flags, "--resume", "auto")
    log = (tmp_path / "run/train.log").read_text()
    assert log.startswith(first)
    assert "all of its epochs are trained" in log[len(first) :]


def test_the_error_that_ends_a_run_is_the_last_line_of_its_log(tmp_path):
    with pytest.raises(UserError), logged_to(tmp_path / "train.log"):
        raise UserError("the loss is nan")
    assert (tmp_path / "train.log").read_text().endswith("ERROR the loss is nan\n")


def test_a_log_on_a_full_disk_does_not_end_the_run():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    log_to_console()
    with logged_to(Path("/dev/full")):
        logger.info("this cannot be written")


def test_warnings_go_to_standard_error_and_everything_else_to_standard_output(capsys):
    log_to_console()
    logger.info("a line")
    logger.warning("a remark")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a line\n", "warning: a remark\n")


def test_only_the_main_process_prints(capsys, monkeypatch):
    log_to_console()
    monkeypatch.setenv("RANK", "1")
    logger.warning("a remark")
    assert capsys.readouterr().err == ""


def test_the_time_left_follows_from_the_steps_since_the_run_was_resumed():
    """A run resumed at step 10 of 40 takes 20 seconds for 5 steps, evaluation included, so its remaining 25 steps take 4
    seconds each."""
    now = iter((100.0, 120.0))
    pace = Pace(40, clock=lambda: next(now))
    pace.begin(10)
    pace.begin(14)  # a later epoch
    assert pace.seconds_left(15) == 100.0


def test_without_a_terminal_a_line_states_rate_loss_and_time_left(capsys):
    """Two epochs of two steps; a line is printed after every step of the first."""
    alone = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    step = SimpleNamespace(
        train_mode=lambda: None,
        begin_epoch=lambda: None,
        accelerator=alone,
        model=model,
        shard=BatchShard(4),
        mixing=None,
        learning_rate=0.1,
        update=lambda window, step: (torch.tensor(1.5), torch.tensor(2.0)),
    )

    class TwoSteps(list):
        def windows(self, epoch, first_step):
            return iter(self)

    log_to_console()
    train_epoch(
        step, TwoSteps([[(None, range(4))]] * 2), Progress(), Watch(alone, StopRequests()), Pace(4), line_seconds=0
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2, step 1/2: loss 1.500, lr 0.1, ")
    assert "img/s" in first
    assert second.endswith("0:00:00 left in the epoch, 0:00:00 in the run")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_environment_states_otherwise(monkeypatch, given, wanted):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    bound_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == wanted


@pytest.mark.parametrize("name", [None, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
@pytest.mark.parametrize("library", ["glibc", "another"])
def test_glibc_keeps_freed_memory_unless_the_environment_states_otherwise(monkeypatch, name, library):
    for other in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(other, raising=False)
    if name:
        monkeypatch.setenv(name, "1000")
    calls = []
    functions = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: functions if library == "glibc" else SimpleNamespace())
    keep_freed_memory()
    wanted = [] if name or library != "glibc" else [(-3, 1 << 30), (-1, (1 << 31) - 1)]
    assert calls == wanted


def test_spinning_is_bounded_before_torch_is_loaded():
    code = """
import os, sys
from reslt.core.command import entry_point
@entry_point
def main():
    assert "torch" not in sys.modules and os.environ["GOMP_SPINCOUNT"]
main()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=environment).returncode == 0
