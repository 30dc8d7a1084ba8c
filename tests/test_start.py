"""Imports and compilation at the start of a command, and the precision and layout in which a trained model computes."""

import gc
import shutil
import subprocess
import sys
import weakref
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_FLAGS

from reslt.config.schema import RunSettings
from reslt.core.cpu import uncollected_imports
from reslt.deploy.predict import _predicted
from reslt.deploy.trained_model import Prediction
from reslt.methods.predictors import AS_TRAINED, Predictions
from reslt.training.execution import Execution

PROJECT = Path(__file__).resolve().parents[1]
FAST = RunSettings(mixed_precision="bf16", channels_last=True, torchcompile=True)


class Sums(torch.nn.Module):
    """A model that maps (N, 3, H, W) images to (1, N, 3) logits of one branch."""

    def forward(self, images):
        return images.sum((-1, -2))[None]


def test_evaluation_compiles_only_for_full_batches_of_large_images():
    shapes, model = [], Sums().eval()
    # Module.compile() sets this attribute
    model._compiled_call_impl = lambda images: shapes.append(tuple(images.shape)) or model.forward(images)
    for size, batches in ((32, (8, 8, 5)), (160, (8, 8, 5))):
        with Predictions(model, [AS_TRAINED]) as predictions, torch.inference_mode():
            for number in batches:
                images = torch.rand(number, 3, size, size)
                assert torch.allclose(predictions(images)[0][0], images.sum((-1, -2)))
    assert shapes == [(8, 3, 160, 160)] * 2


@pytest.mark.parametrize(
    ("stated", "trained", "device", "images", "size", "expected"),
    [
        ({}, FAST, "cpu", 10**6, 224, ("no", False, False)),
        ({}, FAST, "cuda", 10**6, 224, ("bf16", True, True)),
        ({}, FAST, "cuda", 50_000, 224, ("bf16", True, False)),
        ({}, FAST, "cuda", 10**6, 32, ("bf16", True, False)),
        ({}, None, "cuda", 10**6, 224, ("no", False, False)),
        ({}, RunSettings(), "cuda", 10**6, 224, ("no", False, False)),
        (
            {"mixed_precision": "no", "channels_last": False, "torchcompile": False},
            FAST,
            "cuda",
            10**6,
            224,
            ("no", 0, 0),
        ),
        ({"mixed_precision": "bf16", "channels_last": True, "torchcompile": True}, None, "cpu", 5, 224, ("bf16", 1, 1)),
        ({"torchcompile": True}, FAST, "cuda", 5, 32, ("bf16", True, False)),
    ],
)
def test_a_model_computes_as_trained_on_a_gpu_and_exactly_on_a_cpu(stated, trained, device, images, size, expected):
    flags = Namespace(**(dict.fromkeys(("mixed_precision", "channels_last", "torchcompile")) | stated))
    found = Execution.of(flags, trained, device, images, size)
    assert (found.mixed_precision, found.channels_last, found.torchcompile) == expected


def test_the_description_states_why_a_model_trained_with_torch_compile_is_not_compiled():
    unset = Namespace(mixed_precision=None, channels_last=None, torchcompile=None)
    cuda = torch.device("cuda")
    line = Execution.of(unset, FAST, "cuda", 797, 224).described(cuda)
    assert line == "on cuda, precision bf16, channels-last, not compiled (fewer than 200,000 images)"
    assert Execution.of(unset, None, "cpu", 797, 224).described(torch.device("cpu")) == "on cpu, precision no"


def test_the_last_batch_of_photos_is_padded_for_a_compiled_model():
    sizes = []

    def logits(images):
        sizes.append(len(images))
        return images.mean((-1, -2))

    def ranked(logits, topk):
        return [Prediction([str(k)], [k], [1.0]) for k in logits.argmax(1).tolist()]

    images = torch.rand(5, 3, 4, 4)
    expected = images.mean((-1, -2)).argmax(1).tolist()
    photos = SimpleNamespace(paths=list("abcde"), labels=None)
    batches = [(images[:3], [None] * 3), (images[3:], [None] * 2)]
    model, given = SimpleNamespace(logits=logits, ranked=ranked), Namespace(features=None, logits=None, topk=1)
    for is_compiled, passed in ((True, [3, 3]), (False, [3, 2])):
        sizes.clear()
        rows = list(_predicted(model, batches, photos, given, {}, Execution(torchcompile=is_compiled)))
        assert sizes == passed
        assert [[row.classes for row in batch] for batch in rows] == [
            [(k,) for k in expected[i : i + 3]] for i in (0, 3)
        ]


def test_a_report_imports_no_torch():
    code = "import sys, reslt.runs.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_no_garbage_is_collected_during_imports_even_if_one_fails():
    with uncollected_imports():
        assert not gc.isenabled()
    with pytest.raises(ImportError), uncollected_imports():
        import nothing_such  # noqa: F401
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    assert frozen
    with uncollected_imports():
        more = [[] for _ in range(10_000)]
    assert len(more) == 10_000
    assert gc.get_freeze_count() <= frozen  # later objects may belong to a run and must be collected


def test_errors_caught_during_imports_keep_no_object_of_the_caller_alive(monkeypatch):
    """Each error refers to the frames of its callers, and thereby to a run's loaders with their workers."""

    class Loader:
        pass

    def imports():
        try:
            raise ImportError
        except ImportError as error:
            caught = [error]
            caught.append(caught)  # some packages create such cycles

    def run():
        loader = Loader()
        with uncollected_imports():
            imports()
        return weakref.ref(loader)

    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    loader = run()
    gc.collect()
    assert loader() is None


LATE = "pandas sklearn scipy matplotlib peft wandb tensorboard submitit onnx torchmetrics transformers jinja2"
FIRST_UPDATE = f"""
import sys
import reslt.training.step as step
def update(self, window, number):
    print("imported:", *sorted({{*{LATE.split()}}} & set(sys.modules)))
    sys.exit(0)
step.TrainStep.update = update
import train
train.train(sys.argv[1:])
"""


@pytest.mark.slow  # a process that imports torch
def test_a_run_imports_no_optional_package_before_its_first_step(tiny, tmp_path):
    arguments = ["--data", tiny, "--output", tmp_path / "output", *TINY_FLAGS]
    command = [sys.executable, "-c", FIRST_UPDATE, *map(str, arguments)]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported:"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs a C++ compiler")
def test_a_run_with_another_seed_rate_and_length_reuses_all_compiled_code(tiny, tmp_path, run_script, monkeypatch):
    """The only graph is that of the training step. Evaluation of images this small is not compiled."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    missed, found = [], []
    small = ("--model", "resnet18", "--model-kwargs", "layers=1,1,1,1", "channels=8,8,16,16")  # compiles in seconds
    for experiment, more in (("first", ()), ("second", ("--seed", "5", "--lr", "0.01", "--epochs", "1"))):
        torch._dynamo.reset()
        counters.clear()
        flags = ("--data", tiny, "--output", tmp_path / "output", "--experiment", experiment, *TINY_FLAGS, *small)
        outcome = run_script("train", *flags, "--torchcompile", *more)
        assert outcome.code == 0, outcome.err
        assert counters["stats"]["unique_graphs"] == 1
        missed.append(counters["inductor"]["fxgraph_cache_miss"])
        found.append(counters["inductor"]["fxgraph_cache_hit"])
    assert missed[0] > 0
    assert (missed[1], found[1]) == (0, missed[0])  # forward and backward
