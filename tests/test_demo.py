"""The accuracies that the README promises for `make demo`. Slow: trains twice, about two minutes on 2 cores."""

import json

import pytest


@pytest.mark.slow
def test_reslt_beats_cross_entropy_on_the_rare_digits(run_script, tmp_path):
    tables = {}
    for method in ("ce", "reslt"):
        outcome = run_script("train", "--method", method, "--output", tmp_path, "--experiment", method)
        assert outcome.code == 0, outcome.err
        tables[method] = next(
            iter(json.loads((tmp_path / method / "result.json").read_text())["tables"]["standard"].values())
        )
    assert tables["reslt"]["all"] >= 75
    assert tables["reslt"]["all"] >= tables["ce"]["all"] + 5
    assert tables["reslt"]["few"] >= tables["ce"]["few"] + 12
