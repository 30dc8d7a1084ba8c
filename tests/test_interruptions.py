"""Runs that are stopped, killed or changed, then resumed: they end like uninterrupted runs or are refused plainly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import TINY_FLAGS, at_update, make_dataset

from reslt.evaluation import evaluate as engine
from reslt.evaluation.metrics import ClassAccuracies, ClassHits
from reslt.runs import checkpoint
from reslt.runs import folder as run_folder
from reslt.runs.summary import Summary
from reslt.runs.writer import Writer
from reslt.training import watch
from reslt.training.step import TrainStep

PROJECT = Path(__file__).resolve().parents[1]
ALL_DRAWS = ("--model-ema", "--model-ema-decay", "0.5", "--drop", "0.3", "--mixup", "0.4", "--color-jitter", "0.4")
STEPS = 3  # per epoch: 28 images in batches of 8


def flags(data: Path, output: Path, *more) -> list:
    return ["--data", data, "--output", output, "--experiment", "run", *TINY_FLAGS, "--epochs", "3", *more]


def final_bytes(run: Path) -> dict[str, bytes]:
    """Return the last checkpoint's weights, average and optimizer, the pointers and the accuracy of each class, as bytes."""
    last = run / "checkpoints" / (run / "checkpoints/last").read_text().strip()
    files = [*last.glob("*.safetensors"), *(run / "checkpoints").glob("[lb]*st"), run / "per_class.csv"]
    return {file.name: file.read_bytes() for file in files}


def summary(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "summary.csv").drop(columns=["images_per_second", "waiting"])


def assert_same_end(whole: Path, interrupted: Path) -> None:
    assert final_bytes(whole) == final_bytes(interrupted)
    pd.testing.assert_frame_equal(summary(whole), summary(interrupted))


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())


@pytest.fixture
def whole(tmp_path, run_script):
    """Train three epochs with a validation list, uninterrupted; return the flags of the run that will be interrupted."""
    data = make_dataset(tmp_path / "d", splits=("val", "test"))

    def with_flags(*more):
        outcome = run_script("train", *flags(data, tmp_path / "whole", *more))
        assert outcome.code == 0, outcome.err
        return lambda *others: flags(data, tmp_path / "cut", *more, *others)

    return with_flags


@pytest.mark.parametrize(
    ("number", "code", "on_device"),
    [
        (signal.SIGTERM, 143, "on"),
        (signal.SIGINT, 130, "off"),
        (signal.SIGUSR1, 138, "on"),
        (signal.SIGHUP, 129, "off"),
    ],
)
def test_a_signal_mid_epoch_writes_a_checkpoint_and_the_run_ends_with_the_same_bytes(
    tmp_path, run_script, monkeypatch, whole, number, code, on_device
):
    """The signal comes before the second step of the second epoch is taken: that step is finished, then saved."""
    cut, before = whole(*ALL_DRAWS, "--data-on-device", on_device), signal.getsignal(number)
    with monkeypatch.context() as patched:
        at_update(patched, STEPS + 1, lambda: os.kill(os.getpid(), number))
        stopped = run_script("train", *cut())
    assert stopped.code == code
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    how = f"continue it with --resume {tmp_path}/cut/run"
    assert re.search(rf"stopped by {name} in epoch 2, \w+ step 2 of 3; {re.escape(how)}", stopped.err)
    assert signal.getsignal(number) == before
    assert checkpoints(tmp_path / "cut/run") == ["1-3", "1-5"]
    resumed = run_script("train", *cut("--resume", "auto"))
    assert resumed.code == 0, resumed.err
    assert "resuming in epoch 2, after 2 of its steps" in resumed.out
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


def test_a_signal_to_all_processes_of_a_job_does_not_kill_the_workers(tiny, tmp_path):
    """SLURM signals the workers too: they continue until the step is finished and saved."""
    command = ["train.py", *flags(tiny, tmp_path, "--workers", "2", "--data-on-device", "off", "--epochs", "500")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
        )
    until = time.monotonic() + 60
    while not (tmp_path / "run/summary.csv").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    messages = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM" in messages
    assert "Traceback" not in messages


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, run_script, monkeypatch, whole):
    cut = whole()

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_update(monkeypatch, STEPS + 1, twice)
    assert run_script("train", *cut()).code == 130
    assert checkpoints(tmp_path / "cut/run") == ["1-3"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_checkpoint_is_written_mid_epoch_when_its_minutes_have_passed(
    tmp_path, run_script, monkeypatch, whole, micro_batches
):
    """A checkpoint is due at every step; a run that dies resumes from the newest."""
    cut = whole(*ALL_DRAWS, "--grad-accum-steps", micro_batches, "--checkpoint-hist", "9")
    often = ("--checkpoint-minutes", "1e-9")
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0)  # the processes check at every step
    with monkeypatch.context() as patched:
        at_update(patched, 2 * STEPS + 2, lambda: (_ for _ in ()).throw(MemoryError("killed")))
        with pytest.raises(MemoryError):
            run_script("train", *cut(*often))
    assert checkpoints(tmp_path / "cut/run") == ["0-1", "0-2", "1-3", "1-4", "1-5", "2-6", "2-7", "2-8"]
    resumed = run_script("train", *cut(*often, "--resume", "auto"))
    assert "resuming in epoch 3, after 2 of its steps" in resumed.out
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


@pytest.mark.parametrize("when", ["evaluating", "the best is chosen"])
def test_a_run_that_dies_after_an_epochs_last_step_does_not_train_it_again(
    tmp_path, run_script, monkeypatch, whole, when
):
    """The epoch is saved before it is evaluated, so nothing is trained twice."""
    cut, calls = whole(), []
    place, name = (engine, "evaluate") if when == "evaluating" else (run_folder, "choose_best")
    original = getattr(place, name)

    def dies_at_the_second(*arguments, **more):
        calls.append(name)
        if len(calls) == 2:
            raise MemoryError("killed")
        return original(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, dies_at_the_second)
        with pytest.raises(MemoryError):
            run_script("train", *cut())
    steps = []
    at_update(monkeypatch, 2 * STEPS, lambda: steps.append(6))
    resumed = run_script("train", *cut("--resume", "auto"))
    assert resumed.code == 0, resumed.err
    assert steps == [6]
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


def test_a_signal_while_evaluating_stops_after_the_saved_epoch(tmp_path, run_script, monkeypatch, whole):
    cut = whole()
    with monkeypatch.context() as patched:
        patched.setattr(ClassHits, "update", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
        stopped = run_script("train", *cut())
    assert stopped.code == 143
    assert "stopped by SIGTERM while evaluating" in stopped.err
    assert checkpoints(tmp_path / "cut/run") == ["1-3"]
    assert run_script("train", *cut("--resume", "auto")).code == 0
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


SELDOM = ("--checkpoint-seconds", "1000")


@pytest.mark.parametrize("scores", [[10, 20, 15], [20, 10, 15]])
def test_short_epochs_have_a_checkpoint_if_they_are_the_best_so_far_or_the_last(
    tmp_path, run_script, monkeypatch, whole, scores
):
    cut, remaining = whole(*SELDOM), list(scores)
    monkeypatch.setattr(ClassAccuracies, "score", property(lambda self: remaining[0]))
    monkeypatch.setattr(Summary, "scores", lambda self, split: dict(zip(self.column("val_all"), scores, strict=False)))
    assert run_script("train", *cut("--checkpoint-hist", "9")).code == 0
    best = 1 + scores.index(20)
    assert checkpoints(tmp_path / "cut/run") == sorted({f"{n}-{3 * n}" for n in (1, best, 3)})
    assert (tmp_path / "cut/run/checkpoints/best").read_text() == f"{best}-{3 * best}\n"


def test_a_run_with_few_checkpoints_that_dies_resumes_from_the_newest_to_the_same_bytes(
    tmp_path, run_script, monkeypatch, tiny
):
    """The second epoch has a row in the summary but no checkpoint: it is trained and its row written again."""
    assert run_script("train", *flags(tiny, tmp_path / "whole", *SELDOM)).code == 0
    cut = flags(tiny, tmp_path / "cut", *SELDOM)
    with monkeypatch.context() as patched:
        at_update(patched, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_script("train", *cut).code == 143
    with monkeypatch.context() as patched:
        at_update(patched, 2 * STEPS + 1, lambda: (_ for _ in ()).throw(MemoryError("killed")))
        with pytest.raises(MemoryError):
            run_script("train", *cut, "--resume", "auto")
    assert checkpoints(tmp_path / "cut/run") == ["0-2"]
    assert len(summary(tmp_path / "cut/run")) == 2
    with open(tmp_path / "cut/run/summary.csv", "ab") as file:
        file.write(b"3,0.1,")  # a row that a kill cut short
    resumed = run_script("train", *cut, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "incomplete" not in resumed.err
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


def test_a_signal_while_evaluating_writes_a_checkpoint_that_was_not_due(tmp_path, run_script, monkeypatch, tiny):
    assert run_script("train", *flags(tiny, tmp_path / "whole")).code == 0
    cut = flags(tiny, tmp_path / "cut", *SELDOM)
    with monkeypatch.context() as patched:
        patched.setattr(ClassHits, "update", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
        assert run_script("train", *cut).code == 143
    assert checkpoints(tmp_path / "cut/run") == ["1-3"]
    assert run_script("train", *cut, "--resume", "auto").code == 0
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


def test_a_disk_that_is_full_when_a_checkpoint_is_written_ends_the_run_at_the_next_check(
    tmp_path, run_script, monkeypatch, tiny
):
    submit = Writer.submit

    def is_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(watch, "LOOK_SECONDS", 0)
        patched.setattr(checkpoint, "save_file", is_full)
        patched.setattr(Writer, "submit", lambda self, *job: (submit(self, *job), wait(self._jobs)))
        ended = run_script("train", *flags(tiny, tmp_path, "--eval-every", "3"))
    assert ended.code == 2
    assert "1-3: the checkpoint could not be written: No space left on device" in ended.err
    assert "epoch 2" not in ended.out
    assert not (tmp_path / "run").exists()  # it had no checkpoint yet


def test_a_resumed_run_keeps_its_images_where_they_were(tmp_path, run_script, monkeypatch, whole):
    """Small images are resident by default, but a run that began on the host draws its augmentation there to the end."""
    cut = whole(*ALL_DRAWS, "--data-on-device", "off")
    with monkeypatch.context() as patched:
        at_update(patched, STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_script("train", *cut()).code == 143
    refused = run_script("train", *cut("--resume", "auto", "--data-on-device", "on"))
    assert refused.code == 2
    assert "data_on_device: 'off' -> 'on'" in refused.err
    resumed = run_script("train", *cut("--resume", "auto", "--data-on-device", "auto"))
    assert resumed.code == 0, resumed.err
    assert_same_end(tmp_path / "whole/run", tmp_path / "cut/run")


class TestAnotherConfiguration:
    """Changed settings are named; a change that would alter the result is refused unless it is forced."""

    def stopped(self, tiny, tmp_path, run_script, monkeypatch, *more) -> Path:
        with monkeypatch.context() as patched:
            at_update(patched, STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert run_script("train", *flags(tiny, tmp_path, *more)).code == 143
        return tmp_path / "run"

    def test_harmless_changes_pass_and_are_named(self, tiny, tmp_path, run_script, monkeypatch):
        self.stopped(tiny, tmp_path, run_script, monkeypatch)
        harmless = ("--workers", 1, "--checkpoint-minutes", 5, "--grad-accum-steps", 2)
        resumed = run_script("train", *flags(tiny, tmp_path, *harmless, "--resume", "auto"))
        assert resumed.code == 0, resumed.err
        assert (
            "resuming with changed settings: workers: 0 -> 1; grad_accum_steps: 1 -> 2; checkpoint_minutes: 20.0 -> 5.0"
        ) in resumed.err

    def test_a_changed_list_is_refused(self, tiny, tmp_path, run_script, monkeypatch):
        run = self.stopped(tiny, tmp_path, run_script, monkeypatch)
        lines = (tiny / "train.txt").read_text().splitlines()
        (tiny / "train.txt").write_text("\n".join([*lines[1:], "", lines[0]]))
        refused = run_script("train", *flags(tiny, tmp_path, "--resume", "auto"))
        assert refused.code == 2
        assert "train.txt contains other images" in refused.err
        assert "--force-resume" in refused.err
        (tiny / "train.txt").write_text("\r\n".join(["", *lines]))  # the same images
        resumed = run_script("train", *flags(tiny, tmp_path, "--resume", "auto"))
        assert resumed.code == 0, resumed.err
        assert len(pd.read_csv(run / "summary.csv")) == 3

    def test_a_missing_list_is_refused(self, tiny, tmp_path, run_script, monkeypatch):
        self.stopped(tiny, tmp_path, run_script, monkeypatch)
        (tiny / "test.txt").unlink()
        refused = run_script("train", *flags(tiny, tmp_path, "--resume", "auto"))
        assert "test.txt is missing now" in refused.err

    def test_a_harmful_change_is_refused_unless_it_is_forced(self, tiny, tmp_path, run_script, monkeypatch):
        run = self.stopped(tiny, tmp_path, run_script, monkeypatch)
        refused = run_script("train", *flags(tiny, tmp_path, "--resume", "auto", "--lr", "0.01"))
        assert refused.code == 2
        assert "lr: 0.05 -> 0.01" in refused.err
        forced = run_script("train", *flags(tiny, tmp_path, "--resume", "auto", "--lr", "0.01", "--force-resume"))
        assert forced.code == 0, forced.err
        assert "--force-resume: resuming a run that was started with other settings: lr: 0.05 -> 0.01" in forced.err
        assert yaml.safe_load((run / "config.yaml").read_text())["config"]["lr"] == 0.01
        assert (
            run_script("train", *flags(tiny, tmp_path, "--resume", "auto", "--lr", "0.01")).code == 0
        )  # now the run's own

    @pytest.mark.parametrize(
        ("stop_at", "resumes"), [(2, "in epoch 2, after 1 of its steps"), (3, "in epoch 2, after 2 of its steps")]
    )
    def test_another_batch_size_repeats_the_unfinished_epoch(self, tmp_path, run_script, monkeypatch, stop_at, resumes):
        """After 2 of 3 steps of epoch 2; with a batch of 14 an epoch has 2, and a checkpoint's name counts those."""
        data = make_dataset(tmp_path / "d", splits=("val",))
        run = self.stopped(data, tmp_path, run_script, monkeypatch, "--checkpoint-hist", "9")
        assert checkpoints(run) == ["1-3", "1-5"]
        again = flags(data, tmp_path, "--checkpoint-hist", "9", "--batch-size", "14", "--resume", "auto")
        with monkeypatch.context() as patched:
            at_update(patched, stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
            forced = run_script("train", *again, "--force-resume")
        assert forced.code == 143
        assert "an epoch now has 2 steps: resuming from the end of epoch 1" in forced.err
        assert checkpoints(run) == ["1-2", {2: "1-3", 3: "2-4"}[stop_at]]
        resumed = run_script("train", *again)
        assert resumed.code == 0, resumed.err
        assert f"resuming {resumes}" in resumed.out
        assert checkpoints(run) == [*["1-2", "1-3"][: 4 - stop_at], "2-4", "3-6"]
        assert pd.read_csv(run / "summary.csv")["epoch"].tolist() == [1, 2, 3]

    def test_a_forced_resume_that_does_not_fit_leaves_the_run_alone_and_one_that_fits_evaluates(
        self, tmp_path, run_script, monkeypatch
    ):
        data = make_dataset(tmp_path / "d", splits=("val",))
        run = self.stopped(data, tmp_path, run_script, monkeypatch, "--checkpoint-hist", "9")
        config, before = (run / "config.yaml").read_text(), checkpoints(run)
        forced = ("--resume", "auto", "--force-resume")
        again = flags(data, tmp_path, "--checkpoint-hist", "9", *forced, "--batch-size", "14")
        refused = run_script("train", *again, "--model-kwargs", "channels=4,8,16")
        assert (refused.code, "does not fit" in refused.err) == (2, True)
        assert (config, before) == ((run / "config.yaml").read_text(), checkpoints(run))
        assert run_script("train", *again).code == 0
        evaluated = run_script("evaluate", "--ckpt", run, "--output", tmp_path / "out")
        assert evaluated.code == 0, evaluated.err

    def test_forcing_needs_something_to_resume(self, tiny, tmp_path, run_script):
        assert "add --resume auto" in run_script("train", *flags(tiny, tmp_path, "--force-resume")).err


def test_no_checkpoint_is_written_from_weights_that_are_not_finite(tiny, tmp_path, run_script, monkeypatch):
    """The loss of a step is computed before its update: if the last update ruins the weights, no loss shows it."""
    original = TrainStep.update

    def ruins_the_last(self, window, step):
        outputs = original(self, window, step)
        if step == 2 * STEPS - 1:
            next(self.model.parameters()).data.view(-1)[3] = float("inf")
        return outputs

    monkeypatch.setattr(TrainStep, "update", ruins_the_last)
    outcome = run_script("train", *flags(tiny, tmp_path))
    assert outcome.code == 2
    assert re.search(r"epoch 2, after step 3 of 3: the weights are not finite \(model: \S+\)", outcome.err)
    assert checkpoints(tmp_path / "run") == ["1-3"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: [],
        lambda state: {**state, "epochs_done": -1},
        lambda state: {**state, "steps_done": "5"},
        lambda state: {**state, "config": []},
        lambda state: {**state, "progress": {"epoch": 1}},
        lambda state: {**state, "progress": {**state["progress"], "steps": 1.5}},
        lambda state: {**state, "optimizer": {"state": {"a": {}}, "param_groups": []}},
        lambda state: {**state, "optimizer": {**state["optimizer"], "param_groups": [{"params": [0, 1]}]}},
        lambda state: {**state, "optimizer": {**state["optimizer"], "state": {"0": {"tensor": "nowhere"}}}},
        lambda state: {**state, "num_classes": 4},
        lambda state: {**state, "steps_per_epoch": "3"},
        lambda state: {**state, "progress": {**state["progress"], "steps": 99}},
        lambda state: {**state, "config": {**state["config"], "alpha": {}}},
        lambda state: {k: v for k, v in state.items() if k != "scaler"},
    ],
)
def test_an_invalid_state_is_the_users_error(tiny, tmp_path, run_script, damage):
    """The digest is valid: somebody has edited both files."""
    assert run_script("train", *flags(tiny, tmp_path, "--checkpoint-hist", "1")).code == 0
    folder = tmp_path / "run/checkpoints/3-9"
    state = damage(json.loads((folder / "state.json").read_text()))
    (folder / "state.json").write_text(json.dumps(state))
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text(checkpoint._sums(folder, names))
    outcome = run_script("train", *flags(tiny, tmp_path, "--resume", "auto"))
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
