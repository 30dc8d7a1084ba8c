"""Time and cost on many GPUs: the page has the calculated tables, and the formulas agree with calculations by hand."""

from pathlib import Path

import pytest

from tests.benchmarks.scale import JOBS, Machine, exchange, logits_bytes, plan, tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
INATURALIST, LONG_LIST = JOBS


def test_the_page_has_the_tables_that_the_script_prints():
    text = PAGE.read_text()
    assert all(table in text for _, table in tables(Machine()))


def test_a_single_gpu_exchanges_nothing_and_its_cost_is_that_of_its_hours():
    """A step on iNaturalist has 256 images at 5,360 a second, 6 K n D C = 51.2e9 products at 4e14 a second, ten passes over
    the logits of two branches and their sum, and the update of the classifier."""
    assert exchange(Machine(), 1e9, gpus=1) == 0
    alone = plan(Machine(usd=3), INATURALIST, 1, on_device=False)
    classifier = 6 * 2 * 256 * 2048 * 8142 / 400e12 + 10 * 3 * 256 * 8142 * 4 / 2.5e12 + 5 * 4 * 8142 * 2048 / 2.5e12
    assert alone.compute == pytest.approx(256 / 5360 + classifier, rel=1e-3)
    decoding = 256 / (16 * 192)  # takes longer than the step
    hours = 200 * (437_513 // 256 * decoding + 24_426 / (16 * 192)) / 3600
    assert (alone.hours, alone.usd) == pytest.approx((hours, 3 * hours))


def test_gradients_pass_the_slowest_link_nearly_twice_and_only_time_beyond_the_backward_pass_counts():
    machine = Machine()
    assert exchange(machine, 450e9, gpus=8) == pytest.approx(2 * 7 / 8, rel=1e-3)
    assert exchange(machine, 50e9, gpus=64) == pytest.approx(2 * 63 / 64, rel=1e-3)
    parameters = 100_000 * 2049 + 23.5e6 + 3 * 2048**2
    planned = plan(machine, LONG_LIST, 64, on_device=True)
    assert (planned.batch, planned.per_gpu) == (4096, 64)
    assert planned.exposed == pytest.approx(2 * 63 / 64 * 4 * parameters / 50e9 - 2 / 3 * planned.compute, rel=0.01)


def test_the_logits_are_those_of_all_branches_and_their_sum():
    assert logits_bytes(LONG_LIST, 256) == 4 * 256 * 100_000 * 4
