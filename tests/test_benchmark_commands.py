"""Each benchmark with settings that take a moment: the figures mean nothing, but the code runs."""

import pytest
from accelerate.state import AcceleratorState

from tests.benchmarks import (
    auto_augment,
    chain,
    end_to_end,
    epoch_parts,
    inference,
    loader,
    predict,
    step,
    streams,
    turns,
)
from tests.benchmarks.rows import read_rows

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
