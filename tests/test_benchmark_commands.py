"""Each benchmark with settings so small that it takes a moment: the numbers mean nothing, but the code runs."""

import re
import sys
import time
from contextlib import suppress

import psutil
import pytest
from accelerate.state import AcceleratorState

from tests.benchmarks import (
    auto_augment,
    chain,
    classes,
    end_to_end,
    epoch_parts,
    host,
    inference,
    loader,
    predict,
    sharded,
    step,
    streams,
    turns,
    workers,
)
from tests.benchmarks.rows import read_rows, run_each

ROWS = {
    step: (4, "--model cifar_resnet20 --size 8 --batch 4 --branch bn --rounds 2"),
    auto_augment: (1, "--images 8 --rounds 2 --seconds 0 --policies cifar10"),
    inference: (7, "--model cifar_resnet20 --img-size 8 --batch-size 2 --rounds 2 --seconds 0"),
    loader: (6, "--images 4 --rounds 1 --seconds 0"),
    chain: (1, "--images 4 --rounds 1 --workers 0"),
    predict: (2, "--model test_efficientnet --img-size 32 --images 2 --rounds 1"),
    end_to_end: (2, "--batch 4 --steps 2 --rounds 2 --workers 1"),
    epoch_parts: (0, "--images 20 --test-images 9 --size 8 --batch 4 --rounds 1"),
    streams: (1, "--runs 1 2 --model cifar_resnet20 --size 8 --batch 4 --steps 2 --rounds 2"),
}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("module", ROWS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_benchmark_prints_its_rows(module, tmp_path, capsys):
    count, flags = ROWS[module]
    rows = module.main(["--json", str(tmp_path / "rows.json"), *flags.split()])
    out = capsys.readouterr().out
    assert out.startswith(turns.machine().rpartition(", ")[0])
    assert len(rows) == count
    assert read_rows(tmp_path / "rows.json") == rows
    assert all(0 < row.low <= row.ratio <= row.high for row in rows)
    assert all(row.figures in out for row in rows)


def test_a_benchmark_that_fails_or_has_no_time_left_is_named_and_counted(capsys):
    assert run_each([(["no_such"], 60), (["step"], 0)]) == ([], 1)
    lines = capsys.readouterr().out.splitlines()
    assert {"no_such (ended with 1): no ratio", "step (no time left): no ratio"} <= set(lines)


def test_a_benchmark_that_takes_too_long_is_ended_with_the_run_it_started(tmp_path, monkeypatch, capsys):
    """A run that continued would slow the next measurements."""
    script, pid_file = tmp_path / "python", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {pid_file}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert run_each([(["cifar_run"], 0.3)]) == ([], 1)
    assert "cifar_run (no end within 0 s): no ratio" in capsys.readouterr().out
    run, deadline = int(pid_file.read_text()), time.monotonic() + 10
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(run).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_hosts_costs_are_printed_for_each_batch_size(capsys):
    table = host.main(["--images", "300", "--classes", "10", "--batches", "8", "16", "--rounds", "1"])
    out = capsys.readouterr().out
    assert all(name in out and len(columns) == 2 and min(columns) >= 0 for name, columns in table.items())
    assert len(table) == 24


def test_the_costs_of_workers_are_printed(capsys):
    table = workers.main(["--workers", "1", "--batches", "1", "--size", "2"])
    assert list(table) == [(2, 1, False), (2, 1, True)]
    assert "256 images of 2 px" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_sharding_runs_with_its_smallest_model(capsys):
    sharded.main([])
    out = capsys.readouterr().out
    assert len(re.findall(r"works, largest difference \d\.\de-1[5-7]", out)) == 2  # column-parallel, in float64
    assert re.search(r"steps with ResLT's loss.*works, largest difference (0\.0e\+00|\d\.\de-0[6-9])", out)


def test_the_classifiers_cost_is_printed_for_each_number_of_classes(capsys):
    found = classes.main(["--no-backbone", "--classes", "5", "7", "--batch", "2", "--width", "4", "--rounds", "1"])
    assert list(found) == [5, 7]
    assert min(found.values()) >= 0
    assert len(capsys.readouterr().out.splitlines()) == 4
