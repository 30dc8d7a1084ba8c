"""One process, several processes, several micro-batches per step: the run is the same."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import processes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY_FLAGS, make_dataset
from safetensors.torch import load_file

import train
from reslt.core.batch_shard import BatchShard

PROJECT = Path(__file__).resolve().parents[1]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# A model without BatchNorm, whose statistics are each process's own.
NO_BATCH_NORM = [
    *TINY_FLAGS, "--model", "convnext_atto", "--model-kwargs", "dims=8,8,16,16", "depths=1,1,1,1", "--method", "crt",
    "--img-size", "32", "--epochs", "2", "--stage2-epochs", "1", "--mixup", "0.2", "--model-ema", "--model-ema-decay", "0.5",
]  # fmt: skip


def launched(*arguments, processes: int = 2, limit: float = 120) -> subprocess.CompletedProcess:
    """Run a script of the project in new processes."""
    command = [sys.executable, *(TWO if processes == 2 else []), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=limit)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints/last").read_text().strip()
    return {f"{f.stem}/{k}": v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference, relative to the norm of `a`."""
    assert a.keys() == b.keys()
    joined = [torch.cat([t.double().flatten() for _, t in sorted(tensors.items())]) for tensors in (a, b)]
    return float((joined[0] - joined[1]).norm() / joined[0].norm())


def summary(run: Path) -> str:
    return pd.read_csv(run / "summary.csv", dtype=str).drop(columns=["images_per_second", "waiting"]).to_csv()


def results_of(case: str, results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in results.items() if name.startswith(f"{case}/")}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """{(processes, micro-batches): gradients, weights and class means}"""
    folder = tmp_path_factory.mktemp("processes")
    data = make_dataset(folder / "data")
    ended = launched("tests/processes.py", data, folder / "two")
    assert ended.returncode == 0, ended.stderr
    refusals = {(folder / f"two-refusal-{rank}.txt").read_text() for rank in (0, 1)}
    expected = (
        "the processes of this run were started with different settings (lr: 0.1 in process 0, 0.05 in process 1)"
    )
    assert len(refusals) == 1
    assert refusals.pop().startswith(expected)
    found = {(2, micro_batches): load_file(folder / f"two-{micro_batches}.safetensors") for micro_batches in (1, 2)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for micro_batches in (1, 4):
        found[1, micro_batches] = processes.compute(str(data), Accelerator(cpu=True), micro_batches)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("case", processes.CASES)
@pytest.mark.parametrize("other", [(2, 1), (2, 2), (1, 4)], ids=lambda x: f"{x[0]} processes, {x[1]} micro-batches")
def test_the_gradients_of_a_step_are_those_of_one_process_with_the_whole_batch(results, case, other):
    """BatchNorm is in evaluation mode; images of the rarest class are only in the last part."""
    assert distance(results_of(case, results[1, 1]), results_of(case, results[other])) < 1e-6


@pytest.mark.parametrize("case", processes.WITH_FEATURES)
def test_a_loss_of_features_sees_those_of_all_processes(results, case):
    """Pairs of images, class means and statistics are those of the whole batch, and so are their gradients; the statistics
    are equal on both processes."""
    one, two = results_of(case, results[1, 1]), results_of(case, results[2, 1])
    statistics = [found.pop(f"{case}/of each process", torch.zeros(1)) for found in (one, two)]
    torch.testing.assert_close(statistics[1], statistics[0].expand_as(statistics[1]))
    if case == "statistics":
        assert len(statistics[1]) == 2
        assert statistics[1].abs().max() > 0.01
        assert torch.equal(*statistics[1])
    assert distance(one, two) < 1e-6
    plain = results_of("cross-entropy", results[1, 1])
    if one.keys() == {f"{case}/{name.split('/')[1]}" for name in plain}:
        assert distance({f"{case}/{name.split('/')[1]}": value for name, value in plain.items()}, one) > 1e-2


@pytest.mark.parametrize("other", [(2, 1), (2, 2), (1, 4)], ids=lambda x: f"{x[0]} processes, {x[1]} micro-batches")
def test_three_epochs_end_with_the_weights_of_one_process_with_whole_batches(results, other):
    assert distance(results_of("trained", results[1, 1]), results_of("trained", results[other])) < 1e-5


@pytest.mark.parametrize("other", [(2, 1), (2, 2)], ids=lambda x: f"{x[0]} processes, {x[1]} micro-batches")
def test_the_class_means_of_two_processes_are_those_of_one(results, other):
    assert distance(results_of("means", results[1, 1]), results_of("means", results[other])) < 1e-6


def test_the_cases_differ_from_each_other(results):
    """If they did not, the comparisons would prove nothing."""
    gradients = [{k.split("/")[1]: v for k, v in results_of(case, results[1, 1]).items()} for case in processes.CASES]
    plain = [g for g in gradients if g.keys() == gradients[0].keys()]
    for i, a in enumerate(plain):
        for b in plain[i + 1 :]:
            assert distance(a, b) > 1e-3


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2)])
def test_the_parts_of_a_batch_are_equal_and_together_the_batch(ranks, micro_batches, paired):
    parts = [p for rank in range(ranks) for p in BatchShard(24, rank, ranks, micro_batches, paired).positions]
    assert {len(part) for part in parts} == {24 // (ranks * micro_batches)}
    assert sorted(np.concatenate(parts)) == list(range(24))
    if paired:  # image i of a part mixes with image -1 - i, its partner in the global batch
        assert all((part + part[::-1] == 23).all() for part in parts)


def test_every_step_process_and_micro_batch_has_its_own_dropout_seed(monkeypatch):
    """2 processes, 3 steps and 2 micro-batches: all seeds differ."""
    from reslt.training import step as train_step

    seeds, config = [], processes.BASE.changed(batch_size=8)
    monkeypatch.setattr(train_step, "seed_dropout", lambda number, device: seeds.append(number))
    for rank in (0, 1):
        step = processes.prepared_step(config, processes.COUNTS, Accelerator(cpu=True), 2, normalize=lambda x: x)
        step = dataclasses.replace(step, shard=BatchShard(8, rank, 2, 2))
        for number in (0, 1, 2):
            window = [(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))] * 2
            step.gradients(step.inputs(window, number))
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 2


def test_the_processes_divide_a_list_without_omitting_or_repeating_an_image():
    for images, ranks in ((11, 2), (11, 3), (2, 3), (1, 2)):
        ranges = [range(*BatchShard(8, rank, ranks).span(images)) for rank in range(ranks)]
        assert [i for part in ranges for i in part] == list(range(images))


class TestWholeRuns:
    """train.py and evaluate.py as users launch them."""

    def flags(self, data: Path, output: Path, *more) -> list:
        return ["--data", data, "--output", output, "--experiment", "run", *NO_BATCH_NORM, *more]

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory) -> Path:
        """28 training images, 11 test images."""
        data = make_dataset(tmp_path_factory.mktemp("whole") / "d", splits=("val", "test"))
        lines = (data / "test.txt").read_text().splitlines(keepends=True)
        (data / "test.txt").write_text("".join(lines[:11]))
        return data

    @pytest.fixture(scope="class")
    def runs(self, data, tmp_path_factory) -> dict[int, tuple[Path, str]]:
        """{processes: (the run's folder, the output of two processes)}"""
        output = tmp_path_factory.mktemp("runs")
        train.train([str(flag) for flag in self.flags(data, output / "1")])
        AcceleratorState._reset_state(reset_partial_state=True)
        ended = launched("train.py", *self.flags(data, output / "2"))
        assert ended.returncode == 0, ended.stderr
        return {1: (output / "1/run", ""), 2: (output / "2/run", ended.stdout)}

    def test_two_processes_end_with_the_weights_of_one(self, runs):
        assert distance(*(last_weights(run) for run, _ in runs.values())) < 1e-5

    def test_two_processes_report_the_numbers_of_one_and_only_once(self, runs):
        numbers = ["epoch", "train_loss", "val_all", "lr"]
        frames = [pd.read_csv(run / "summary.csv")[numbers] for run, _ in runs.values()]
        pd.testing.assert_frame_equal(*frames, rtol=1e-4)
        of_two = runs[2][1]
        assert "2 processes on cpu" in of_two
        assert len(re.findall(r"^epoch 1 ", of_two, re.M)) == len(re.findall(r"^data ", of_two, re.M)) == 1

    def test_each_image_is_evaluated_once(self, runs, tmp_path):
        run = runs[2][0]
        per_class = pd.read_csv(run / "per_class.csv")
        assert per_class["test_images"].sum() == 11
        ended = launched("evaluate.py", "--ckpt", run, "--output", tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / "per_class.csv").read_text() == (run / "per_class.csv").read_text()
        assert "test list (11 images)" in ended.stdout
        assert (
            json.loads((tmp_path / "result.json").read_text())["all"]
            == json.loads((run / "result.json").read_text())["all"]
        )

    def test_a_run_moves_from_two_processes_to_one_at_a_checkpoint(self, runs, data, tmp_path, run_script):
        """The run is stopped in the second epoch; one process, with two micro-batches per step, resumes it."""
        stopped = launched(stops_at(4, tmp_path), *self.flags(data, tmp_path))
        assert re.search(r"stopped by SIGUSR1 in epoch 2, \w+ step 2 of 3", stopped.stderr)
        ended = run_script("train", *self.flags(data, tmp_path, "--resume", "auto", "--grad-accum-steps", 2))
        assert ended.code == 0, ended.err
        assert "resuming in epoch 2, after 2 of its steps" in ended.out
        assert "BatchNorm and dropout see other parts of a batch than before" in ended.err
        assert distance(last_weights(tmp_path / "run"), last_weights(runs[1][0])) < 1e-5


def stops_at(step: int, folder: Path, write_seconds: float = 0) -> Path:
    """Write a train.py whose second process gets SIGUSR1 before a step, and whose checkpoints take seconds to write."""
    script = folder / "stopped.py"
    script.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(PROJECT)!r})
import train
from reslt.runs import checkpoint
from reslt.training import watch
from reslt.training.step import TrainStep
watch.LOOK_SECONDS = 0
update, write = TrainStep.update, checkpoint.write
def signaled(self, window, step):
    if step == {step} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return update(self, window, step)
TrainStep.update = signaled
checkpoint.write = lambda *a, **k: (time.sleep({write_seconds}), write(*a, **k))
try:
    train.main()
finally:
    if os.environ["RANK"] == "1":
        print("the other process ends after", os.listdir(os.path.join(sys.argv[sys.argv.index("--output") + 1], "run/checkpoints")))
""")
    return script


@pytest.mark.parametrize("cut", ["mid-epoch", pytest.param("after an epoch", marks=pytest.mark.slow)])
def test_two_processes_with_batch_norm_that_are_stopped_and_resumed_end_with_the_same_bytes(tiny, tmp_path, cut):
    """Each process has its own statistics, which a mid-epoch checkpoint keeps. No process ends before it is written."""
    flags = ["--data", tiny, "--experiment", "run", *TINY_FLAGS, "--epochs", "3"]
    whole = launched("train.py", *flags, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    if cut == "mid-epoch":
        stopped = launched(stops_at(4, tmp_path, write_seconds=1), *flags, "--output", tmp_path / cut)
        assert re.search(r"stopped by SIGUSR1 in epoch 2, after step 2 of 3", stopped.stderr)
        assert stopped.stderr.count("stopped by") == 1
        assert re.search(r"the other process ends after .*'1-5'", stopped.stdout)
    else:
        shutil.copytree(
            tmp_path / "whole", tmp_path / cut
        )  # stopped after an epoch that is evaluated and in the summary
        for name in ("2-6", "3-9"):
            shutil.rmtree(tmp_path / cut / "run/checkpoints" / name)
    resumed = launched("train.py", *flags, "--output", tmp_path / cut, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    whole, ours = (last_weights(tmp_path / name / "run") for name in ("whole", cut))
    assert any(name.startswith("processes/") for name in whole)
    assert whole.keys() == ours.keys()
    assert all(torch.equal(whole[key], ours[key]) for key in whole)
    assert summary(tmp_path / "whole/run") == summary(tmp_path / cut / "run")


@pytest.mark.parametrize("on_device", ["on", "off"])
def test_an_image_that_one_process_cannot_read_ends_all_with_its_message(tiny, tmp_path, on_device):
    victim = tiny / "images/train/2/1.png"
    victim.write_bytes(victim.read_bytes()[:300])
    begin = time.monotonic()
    flags = ("--data", tiny, "--output", tmp_path, *TINY_FLAGS, "--batch-size", 28, "--data-on-device", on_device)
    ended = launched("train.py", *flags)
    assert ended.returncode != 0
    assert len(re.findall(r"error: process [01]: .*train\.txt:26: .*1\.png: not a readable image", ended.stderr)) == 1
    assert "[rank" not in ended.stderr  # no traceback of the other process, which lost its partner
    assert time.monotonic() - begin < 60


def test_an_image_whose_size_cannot_be_read_is_reported_once(tiny, tmp_path):
    """All sizes are read before small images become resident."""
    (tiny / "images/train/2/1.png").write_bytes(b"no image")
    ended = launched("train.py", "--data", tiny, "--output", tmp_path, *TINY_FLAGS)
    report = r"error: process [01]: .*train\.txt:26: .*1\.png: not an image of a supported format"
    assert len(re.findall(report, ended.stderr)) == 1
    assert ended.stderr.count("error: ") == 1


def test_a_process_with_workers_ends_at_once_if_it_fails_mid_epoch(tiny, tmp_path):
    """Workers ignore SIGTERM. A process that exits sends it to them and waits, which would take forever."""
    victim = tiny / "images/train/2/1.png"
    victim.write_bytes(victim.read_bytes()[:300])
    flags = ("--data", tiny, "--output", tmp_path, *TINY_FLAGS, "--workers", 2, "--data-on-device", "off")
    ended = launched("train.py", *flags, processes=1, limit=60)
    assert ended.returncode == 2
    assert "not a readable image" in ended.stderr


def test_a_mistake_that_only_the_first_process_finds_ends_all_without_a_wait(tiny, tmp_path, run_script):
    """The learning rate differs from the checkpoint's; the other process gets the error and does not wait in a collective."""
    flags = ["--data", tiny, "--output", tmp_path, "--experiment", "run", *TINY_FLAGS, "--epochs", "1"]
    assert run_script("train", *flags).code == 0
    ended = launched("train.py", *flags, "--resume", "auto", "--lr", "0.01")
    assert ended.stderr.count("error: ") == 1
    assert "lr: 0.05 -> 0.01" in ended.stderr
    assert "lost the other processes" not in ended.stderr
    assert "[rank" not in ended.stderr  # no traceback


def test_a_signal_while_numpy_is_imported_ends_the_process(tmp_path):
    """torch swallows exceptions that are raised while it imports numpy."""
    (tmp_path / "sitecustomize.py").write_text("""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("numpy._core._methods", "numpy.core._methods") and self in sys.meta_path:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
""")
    for script in ("train.py", "evaluate.py"):
        command = [sys.executable, PROJECT / script, *(["--ckpt", "x"] if script == "evaluate.py" else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PROJECT)])}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 143, ended.stderr


def test_a_mistake_that_all_processes_find_is_reported_once(tmp_path):
    ended = launched("train.py", "--data", tmp_path, "--output", tmp_path / "out")
    assert ended.stderr.count("error: ") == 1
    assert "train.txt does not exist" in ended.stderr
