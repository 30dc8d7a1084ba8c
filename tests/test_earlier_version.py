"""Files of version 0.1.0 can still be read: `earlier_version/` keeps two of its runs, two folded files and a recipe.

They were made on the images of `make_dataset`, with one thread: the recipe trained ResLT on the host, with AutoAugment and
mixup; `run_ce` trained cross-entropy on resident images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset
from safetensors.torch import load_file

from reslt.api import load_run
from reslt.models.fold import load_folded

KEPT = Path(__file__).parent / "earlier_version"


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A working folder with copies of the kept files and the dataset that they were made on."""
    folder = tmp_path / "kept"
    shutil.copytree(KEPT, folder)
    make_dataset(folder / "tiny")
    monkeypatch.chdir(folder)
    return folder


def accuracies(result: dict) -> dict:
    return result["tables"]["standard"]


@pytest.mark.parametrize("run", ["run", "run_ce"])
def test_a_run_evaluates_to_its_recorded_numbers(kept, run_script, run):
    before = json.loads((kept / run / "result.json").read_text())
    outcome = run_script("evaluate", "--ckpt", kept / run, "--output", kept / "again")
    assert outcome.code == 0, outcome.err
    assert accuracies(json.loads((kept / "again" / "result.json").read_text())) == accuracies(before)


def test_a_run_is_reported_and_loaded(kept, capsys):
    from reslt.runs.report_command import main

    main([str(kept / "run"), str(kept / "run_ce")])
    assert "run_ce" in capsys.readouterr().out
    model, described = load_run(kept / "run")
    assert (described["model"], described["method"], described["epoch"]) == ("cifar_resnet20", "reslt", 2)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def test_a_run_that_stopped_after_an_epoch_resumes_on_the_host_to_the_same_weights(kept, run_script):
    """Its second epoch is trained again: version 0.1.0 augmented these images on the host, which resuming keeps."""
    final = load_file(kept / "run" / "checkpoints" / "2-6" / "model.safetensors")
    shutil.rmtree(kept / "run" / "checkpoints" / "2-6")
    shutil.move(kept / "run", kept / "runs" / "reslt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcome = run_script(
            "train", "--recipe", "recipe.yaml", "--experiment", "reslt", "--output", "runs", "--resume", "auto"
        )
    finally:
        torch.set_num_threads(threads)
    assert outcome.code == 0, outcome.err
    again = load_file(kept / "runs" / "reslt" / "checkpoints" / "2-6" / "model.safetensors")
    assert again.keys() == final.keys()
    for name, weight in final.items():
        torch.testing.assert_close(
            again[name], weight, rtol=1e-4, atol=1e-5, msg=name
        )  # another CPU rounds differently


def test_a_run_on_resident_images_is_complete_and_says_so_when_it_is_resumed(kept, run_script):
    flags = ("--recipe", "recipe.yaml", "--method", "ce", "--mixup", "0", "--resume", kept / "run_ce")
    outcome = run_script("train", *flags)
    assert outcome.code == 0, outcome.err
    assert "all of its epochs are trained" in outcome.out
    assert "images resident on the CPU" in outcome.out


def test_a_run_is_not_resumed_with_other_settings_and_says_which(kept, run_script):
    shutil.rmtree(kept / "run" / "checkpoints" / "2-6")
    outcome = run_script("train", "--recipe", "recipe.yaml", "--resume", kept / "run", "--lr", "0.3")
    assert outcome.code == 2
    assert "lr: 0.05 -> 0.3" in outcome.err


@pytest.mark.parametrize(("file", "predicts"), [("reslt_bn.safetensors", "run"), ("experts_conv.safetensors", None)])
def test_a_folded_file_predicts_as_the_run_that_it_was_folded_from(kept, file, predicts):
    from PIL import Image

    model, described = load_folded(kept / file)
    assert (described["num_classes"], described["img_size"]) == (3, 16)
    mean, std = (torch.tensor(described[name]).view(3, 1, 1) for name in ("mean", "std"))
    lines = [line.split() for line in (kept / "tiny" / "test.txt").read_text().splitlines()]
    images = [np.asarray(Image.open(kept / "tiny" / "images" / path)) for path, _ in lines]
    inputs = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        hits = model(inputs).argmax(1) == torch.tensor([int(label) for _, label in lines])
    result = json.loads((kept / (f"{predicts}/result.json" if predicts else "experts_result.json")).read_text())
    assert 100 * hits.float().mean().item() == pytest.approx(result["all"], abs=1e-4)


def test_a_recipe_file_trains(kept, run_script):
    outcome = run_script(
        "train", "--recipe", "recipe.yaml", "--output", "runs", "--experiment", "again", "--epochs", "1"
    )
    assert outcome.code == 0, outcome.err
    assert "AutoAugment rand-m9-mstd0.5, mixup 0.2" in outcome.out
