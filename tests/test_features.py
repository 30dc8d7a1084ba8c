"""evaluate.py --features and --logits: files for other tools, one row per image of the list, in its order."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dataset, train_once
from safetensors import safe_open
from safetensors.torch import load_file

from reslt.evaluation import outputs
from reslt.evaluation.outputs import Outputs
from reslt.methods.predictors import Predictor
from reslt.runs.folder import find

RUNS = {"reslt": (), "experts": ("--experts", 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", (16, 8, 4), test_images=7)


@pytest.fixture
def trained(data, run_script):
    """trained(name of RUNS) -> folder of a run of one epoch, trained once for all tests that read it."""
    return lambda name: train_once(run_script, data, name, "--epochs", 1, *RUNS[name])


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_features_times_the_classifier_are_the_logits(data, trained, run_script, tmp_path):
    """ResLT adds three branches with one classifier: W (f_1 + f_2 + f_3) + 3 b."""
    run, features, logits = trained("reslt"), tmp_path / "f.safetensors", tmp_path / "sub/l.safetensors"
    outcome = run_script("evaluate", "--ckpt", run, "--features", features, "--logits", logits)
    assert outcome.code == 0, outcome.err
    seen, predicted = load_file(features), load_file(logits)
    assert set(seen) == {"labels", "features", "branch_features"}
    assert set(predicted) == {"labels", "logits", "branch_logits"}
    assert seen["branch_features"].shape == (1, 3, 21, 32)
    assert predicted["branch_logits"].shape == (1, 3, 21, 3)
    weights = find(run).tensors(find(run).evaluated)
    weight, bias = weights["backbone.fc.weight"], weights["backbone.fc.bias"]
    expected = seen["features"] @ weight.T + 3 * bias
    torch.testing.assert_close(predicted["logits"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predicted["branch_logits"].sum((0, 1)), predicted["logits"], rtol=1e-5, atol=1e-5)
    lines = (data / "test.txt").read_text()
    assert features.with_suffix(".txt").read_text() == logits.with_suffix(".txt").read_text() == lines
    assert seen["labels"].tolist() == [int(line.split()[1]) for line in lines.splitlines()]
    described = metadata_of(logits)
    assert (described["data"], described["split"], described["epoch"], described["run"]) == (
        "tiny", "test", "1", str(run)
    )  # fmt: skip
    again = run_script("evaluate", "--ckpt", run, "--features", features)  # its own file is replaced
    assert again.code == 0, again.err


def test_the_logits_rank_classes_as_the_tables_first_row(trained, run_script, tmp_path):
    """With a prior subtracted, tau and mirror images. The features of the two experts are concatenated."""
    run, out = trained("experts"), tmp_path / "out"
    flags = ("--prior-tau", 1, "--tau", 0.5, "--tta", "flip", "--output", out)
    files = ("--features", out / "f.safetensors", "--logits", out / "l.safetensors")
    outcome = run_script("evaluate", "--ckpt", run, *flags, *files)
    assert outcome.code == 0, outcome.err
    seen, predicted = load_file(out / "f.safetensors"), load_file(out / "l.safetensors")
    width = seen["branch_features"].shape[-1]
    assert seen["branch_features"].shape == (2, 3, 21, width)
    first = seen["branch_features"][0].sum(0)
    torch.testing.assert_close(seen["features"][:, :width], first)
    log_prior = torch.tensor([16 / 28, 8 / 28, 4 / 28]).log()
    expected = predicted["branch_logits"].sum(1).mean(0) - log_prior
    torch.testing.assert_close(predicted["logits"], expected, rtol=1e-4, atol=1e-4)
    hits = (predicted["logits"].argmax(1) == predicted["labels"]).float().mean()
    assert json.loads((out / "result.json").read_text())["all"] == pytest.approx(100 * float(hits))
    assert (metadata_of(out / "l.safetensors")["prior_tau"], metadata_of(out / "l.safetensors")["tta"]) == (
        "1.0",
        "flip",
    )


def test_the_lines_written_are_those_with_an_image(trained, run_script, tmp_path):
    """A blank line has no image, and line ends may be those of Windows."""
    other = make_dataset(tmp_path / "other", (4, 4, 4), test_images=2)
    lines = (other / "test.txt").read_text().splitlines()
    (other / "test.txt").write_text("\r\n".join([*lines[:3], "", *lines[3:]]) + "\r\n")
    out = tmp_path / "l.safetensors"
    outcome = run_script("evaluate", "--ckpt", trained("reslt"), "--data", other, "--logits", out)
    assert outcome.code == 0, outcome.err
    assert out.with_suffix(".txt").read_text() == "\n".join(lines) + "\n"


def test_the_logits_are_those_of_the_chosen_fusion(trained, run_script, tmp_path):
    out = tmp_path / "l.safetensors"
    outcome = run_script("evaluate", "--ckpt", trained("reslt"), "--fusion", "max", "--logits", out)
    assert outcome.code == 0, outcome.err
    predicted = load_file(out)
    assert torch.equal(predicted["logits"], predicted["branch_logits"][0].amax(0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "a.pt"], "--features a.pt: give a file name that ends in .safetensors"),
        (
            ["--features", "a.safetensors", "--logits", "./a.safetensors"],
            "--logits a.safetensors: --features writes this file too",
        ),
        (
            ["--fold", "a.safetensors", "--logits", "a.safetensors"],
            "--logits a.safetensors: --fold writes this file too",
        ),
        (["--logits", "taken.safetensors"], "it exists and is not a file that this flag has written"),
        (["--logits", "train.safetensors"], "train.txt, which exists, would be replaced"),
    ],
)
def test_a_file_that_would_damage_another_is_refused(trained, run_script, tmp_path, monkeypatch, flags, message):
    run = trained("reslt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.safetensors").write_bytes(b"someone's")
    (tmp_path / "train.txt").write_text("a.png 0\n")
    refused = run_script("evaluate", "--ckpt", run, *flags)
    assert refused.code == 2
    assert message in refused.err
    assert (tmp_path / "taken.safetensors").read_bytes() == b"someone's"
    assert (tmp_path / "train.txt").read_text() == "a.png 0\n"


def test_a_file_inside_a_checkpoint_is_refused(trained, run_script):
    run = trained("reslt")
    refused = run_script("evaluate", "--ckpt", run, "--features", run / "checkpoints/f.safetensors")
    assert refused.code == 2
    assert "which only training writes to" in refused.err


class Ranks:
    """Accelerators of several processes, simulated by threads: each `gather` waits for all."""

    def __init__(self, number: int):
        self.number, self.barrier, self.sent = number, threading.Barrier(number), [None] * number

    def accelerator(self, rank: int) -> SimpleNamespace:
        def gather(tensor):
            self.sent[rank] = tensor
            self.barrier.wait()
            every = torch.cat(self.sent)
            self.barrier.wait()
            return every

        return SimpleNamespace(num_processes=self.number, device=torch.device("cpu"), gather=gather)


@pytest.mark.parametrize("lengths", [(5, 4), (3, 0), (1, 1)])
def test_rows_of_all_processes_are_in_the_order_of_the_list(lengths, monkeypatch):
    """Rows are gathered two at a time, from processes with different numbers of images, one of them without any."""
    monkeypatch.setattr(outputs, "ROWS_AT_ONCE", 2)
    ranks, first, found = Ranks(len(lengths)), np.cumsum([0, *lengths]), {}
    model = SimpleNamespace(logits_per_image=(1,), classifiers=[SimpleNamespace(in_features=2)])

    def run(rank: int) -> None:
        mine = torch.arange(first[rank], first[rank + 1])
        collected = Outputs(model, 3, Predictor(), of_features=True)
        for batch in mine.split(2) if len(mine) else ():
            rows = batch[:, None].float()
            collected.add(rows.expand(-1, 3)[None], [rows.expand(-1, 2)], batch)
        found[rank] = collected.gathered(ranks.accelerator(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(lengths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_all in found.values():
        for rows in (of_all["labels"], of_all["logits"][:, 0], of_all["features"][:, 1]):
            assert rows.tolist() == list(range(sum(lengths)))


def test_the_files_have_the_users_ordinary_permissions(trained, run_script, tmp_path):
    """Any new file gets these under the current umask; the writer of safetensors would make its files private."""
    (tmp_path / "ordinary").touch()
    assert run_script("evaluate", "--ckpt", trained("reslt"), "--features", tmp_path / "f.safetensors").code == 0
    modes = {(tmp_path / name).stat().st_mode for name in ("ordinary", "f.safetensors", "f.txt")}
    assert len(modes) == 1
