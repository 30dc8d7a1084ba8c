"""Shared folders: two processes at once, caches, writes that fail, and numbers that are not finite."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, make_dataset, outcome_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from reslt.api import load_run
from reslt.core import locks, log
from reslt.core.cache import cache_folder
from reslt.core.errors import UserError
from reslt.core.files import atomic_folder
from reslt.core.locks import locked, sweep
from reslt.core.phases import Phases
from reslt.data.datasets import load_dataset
from reslt.evaluation import tables
from reslt.evaluation.evaluate import NotFiniteError
from reslt.evaluation.metrics import ClassHits
from reslt.loading import pixel_cache
from reslt.loading.image_dataset import ListedImages
from reslt.loading.pixel_cache import pixels
from reslt.models import fold, folding
from reslt.prepare import subsets
from reslt.prepare.folder import new_dataset
from reslt.runs import checkpoint, convert, summary
from reslt.runs import folder as run_folder
from reslt.runs.folder import find
from reslt.runs.run import Run
from reslt.training.state import Progress

EARLIER = Path(__file__).parents[1] / "earlier_version"

# ---- Two processes at once ----


def at_once(count: int, work) -> list:
    """Call `work(i)` in threads that start together -> results or exceptions, in order. (Each call of `locked` has a lock
    object of its own, so threads wait for each other as processes do.)"""
    barrier, outcomes = threading.Barrier(count), [None] * count

    def run(i: int) -> None:
        barrier.wait()
        try:
            outcomes[i] = work(i)
        except Exception as fault:
            outcomes[i] = fault

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return {file: (inode, mtime)}; these differ after a file is replaced, even by the same content."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def two_first_uses(tmp_path_factory) -> tuple[Path, list, int]:
    """The embedded dataset made for two trainings at the same moment: its project, their outcomes, number of images saved."""
    root, saved, save = tmp_path_factory.mktemp("project"), [], Image.Image.save
    (root / "data_lists").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RESLT_LISTS", str(root / "data_lists"))
        patched.setattr(Image.Image, "save", lambda self, *a, **k: saved.append(1) or save(self, *a, **k))
        return root, at_once(2, lambda _: subsets.make_if_embedded("digits_lt")), len(saved)


@pytest.fixture
def digits(two_first_uses, monkeypatch) -> Path:
    monkeypatch.setenv("RESLT_LISTS", str(two_first_uses[0] / "data_lists"))
    return two_first_uses[0] / "data/digits_lt"


def test_two_trainings_that_start_at_once_create_the_embedded_dataset_once(digits, two_first_uses):
    _, outcomes, saved = two_first_uses
    assert (outcomes, saved) == ([None, None], 276 + 797)
    dataset = load_dataset("digits_lt")
    assert {split: len(images) for split, images in dataset.lists.items()} == {"train": 276, "test": 797}
    assert len(list(digits.rglob("*.png"))) == saved


def test_no_image_of_the_embedded_dataset_is_replaced_under_a_running_training(digits, run_prepare):
    """Missing and empty images are written again if a list is missing or the command is given."""
    lost, empty = (sorted(digits.rglob("*.png"))[i] for i in (3, 300))
    for repair in (lambda: run_prepare("digits_lt").code or None, lambda: subsets.make_if_embedded("digits_lt")):
        before = state_of(digits)
        lost.unlink()
        empty.write_bytes(b"")
        (digits.parents[1] / "data_lists/digits_lt/train.txt").unlink()
        assert repair() is None
        after = state_of(digits)
        assert {path for path in before if before[path] != after[path]} == {
            str(path.relative_to(digits)) for path in (lost, empty)
        }
        assert empty.stat().st_size > 0


def test_a_users_own_folders_with_the_name_of_the_embedded_dataset_are_kept(project, run_prepare):
    lists, images = project / "data_lists/digits_lt", project / "data/digits_lt"
    for folder in (lists, images):
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    (lists / "train.txt").write_text("mine.png 0\n")
    before = state_of(project)
    subsets.make_if_embedded("digits_lt")  # there is no test.txt
    assert state_of(project) == before
    refused = run_prepare("digits_lt")
    assert refused.code == 2
    assert "train.txt: this is not the list of the embedded dataset; rename its folder to keep it" in refused.err
    assert state_of(project) == before


CREATED = {
    "own": ("own", "--from", "{photos}/train", "--no-decode", "--name", "mine"),
    "longtail": ("longtail", "--from", "{photos}", "--imb-factor", 0.5, "--name", "mine"),
    "shrink": ("shrink", "tiny", "--size", 8, "--output", "{work}/small", "--workers", 0, "--name", "mine"),
}


@pytest.mark.parametrize("command", CREATED)
def test_a_dataset_that_another_process_is_creating_is_refused_and_an_existing_one_is_not_replaced(
    command, project, run_prepare, tmp_path
):
    tiny = make_dataset(project / "data_lists/tiny")
    arguments = [str(part).format(photos=tiny / "images", work=tmp_path) for part in CREATED[command]]
    mine = project / "data_lists/mine"
    (mine.parent / ".77-0123abcd.mine").mkdir()  # left by a process that was killed
    with locked(mine):
        refused = run_prepare(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert f"another process is using {mine}; wait for it to end, or stop it" in refused.err
    assert not mine.exists()
    assert run_prepare(*arguments).code == 0
    assert [path for path in project.rglob(".*") if path.suffix != ".lock"] == []
    before = state_of(project)
    assert len([path for path in before if path.startswith("data_lists/mine/")]) >= 3
    if command != "shrink":  # which continues its work
        again = run_prepare(*arguments)
        assert again.code == 2
        assert "mine already exists; " in again.err
    assert state_of(project) == before


def test_if_two_processes_create_a_folder_it_has_the_content_of_one_of_them(project):
    def create(i: int) -> None:
        with new_dataset("mine") as folder:
            for name in ("info.yaml", "train.txt"):
                (folder / name).write_text(str(i))

    outcomes = at_once(2, create)
    (lost,) = [outcome for outcome in outcomes if outcome is not None]
    assert isinstance(lost, UserError)
    written = {path.read_text() for path in (project / "data_lists/mine").iterdir()}
    assert written == {str(outcomes.index(None))}


def test_a_process_that_waits_for_a_lock_names_it_and_continues_when_it_is_released(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.05)
    order = []

    def work(i: int) -> None:
        with locked(tmp_path / "data", waits=True):
            order.append(i)
            time.sleep(0.3)
            order.append(i)

    at_once(2, work)
    assert order in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert caplog.messages == [f"waiting: another process is using {tmp_path / 'data'}"]


def test_a_folder_is_replaced_only_on_request_and_only_once_the_new_one_is_complete(tmp_path, monkeypatch):
    folder, rename = tmp_path / "1-3", os.rename
    folder.mkdir()
    (folder / "old").write_text("mine")

    def write(**how) -> None:
        with atomic_folder(folder, **how) as temporary:
            (temporary / "new").write_text("")

    with pytest.raises(FileExistsError) as refused:
        write()
    assert refused.value.filename == str(folder)

    def rename_that_fails(source, target) -> None:
        if Path(target) == folder and (Path(source) / "new").exists():
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    with monkeypatch.context() as failing:
        failing.setattr(os, "rename", rename_that_fails)
        with pytest.raises(OSError, match="Input/output error"):
            write(replaces=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["1-3", "old"]
    write(replaces=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["1-3", "new"]


def test_only_unfinished_files_of_killed_processes_are_removed(tmp_path):
    names = [".2024.notes", ".77-0123abcd.dead", ".77-0123abcd.alive", ".77", "77.mine", ".gitignore", ".mine.lock"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / ".88-0123abcd.folder/deep").mkdir(parents=True)
    with locked(tmp_path / "alive"):
        sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".alive.lock"} - {".77-0123abcd.dead"}


def test_an_image_that_was_replaced_in_the_source_is_shrunk_again(project, run_prepare, tmp_path):
    """One replacement is newer; the other has old times, as after `cp -p` or from an archive."""
    tiny = make_dataset(project / "data_lists/tiny")
    command = ("shrink", "tiny", "--size", 8, "--output", tmp_path / "small", "--workers", 0)
    assert run_prepare(*command).code == 0
    newer, older = (tiny / f"images/train/0/{i}.png" for i in range(2))
    before = state_of(tmp_path / "small")
    (tmp_path / "small/train/1/.77-0123abcd.5.png").write_bytes(b"half of it")  # left by a process that was killed
    for image, times in ((newer, None), (older, (1e9, 1e9))):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(image)
        os.utime(image, times)
    again = run_prepare(*command)
    assert again.code == 0
    assert f"{28 + 15 - 2} already there" in again.out
    assert "2 shrunk" in again.out
    after = state_of(tmp_path / "small")
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {"train/0/0.png", "train/0/1.png"}
    for path in ("train/0/0.png", "train/0/1.png"):
        assert np.asarray(Image.open(tmp_path / "small" / path)).max() == 9


# ---- Caches ----


@pytest.fixture
def cache(own_cache, monkeypatch) -> Path:
    monkeypatch.setattr(log, "_WARNED", set())
    return own_cache


def listed(folder: Path) -> ListedImages:
    dataset = load_dataset(str(folder))
    return ListedImages(dataset.lists["train"], dataset.image_root, pil_to_tensor, None)


def read_directly(folder: Path) -> np.ndarray:
    """Return the training images as Pillow reads them."""
    paths = [line.split()[0] for line in (folder / "train.txt").read_text().splitlines()]
    return np.stack([np.asarray(Image.open(folder / "images" / path)).transpose(2, 0, 1) for path in paths])


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


DAMAGES = {
    "a pixel": lambda whole: flip(whole, len(whole) - 1000),
    "the last byte": lambda whole: flip(whole, len(whole) - 1),
    "its own digest": lambda whole: flip(whole, 3),
    "truncated": lambda whole: whole[: len(whole) // 2],
    "longer": lambda whole: whole + whole[-768:],
    "zeros, as after a power failure": lambda whole: bytes(len(whole)),
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_decoded_again(damage, tiny, cache):
    wanted = read_directly(tiny)
    assert np.array_equal(pixels(listed(tiny), "as is", 0), wanted)
    (file,) = cache.glob("*.pixels")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(pixels(listed(tiny), "as is", 0), wanted)
    assert file.read_bytes() == whole


def test_truncating_the_cache_under_a_run_changes_nothing(tiny, cache):
    """If the file were memory-mapped, SIGBUS would end the process."""
    for _ in range(2):  # decoded, then read
        found = pixels(listed(tiny), "as is", 0)
        (file,) = cache.glob("*.pixels")
        whole = file.read_bytes()
        os.truncate(file, 0)
        assert np.array_equal(found, read_directly(tiny))
        file.write_bytes(whole)


def test_a_run_trains_on_its_images_even_if_the_cache_contains_others(tiny, tmp_path, cache, run_script):
    """First, every cached pixel is inverted; then two lists exchange their files."""
    flags = ("--data", tiny, *TINY_FLAGS, "--data-on-device", "on", "--epochs", 1, "--output", tmp_path, "--experiment")
    rows = []
    for name in ("first", "inverted", "exchanged"):
        files = sorted(cache.glob("*.pixels"))
        if name == "inverted":
            for file in files:
                file.write_bytes(file.read_bytes()[:200] + bytes(255 - b for b in file.read_bytes()[200:]))
        if name == "exchanged":
            contents = [file.read_bytes() for file in files]
            for file, content in zip(files, contents[::-1], strict=True):
                file.write_bytes(content)
        trained = run_script("train", *flags, name)
        assert trained.code == 0, trained.err
        with open(tmp_path / name / "summary.csv", newline="") as handle:
            rows += [
                {k: v for k, v in row.items() if k not in ("images_per_second", "waiting")}
                for row in csv.DictReader(handle)
            ]
    assert len(files) == 2  # train, test
    assert rows[0] == rows[1] == rows[2]


def test_two_runs_that_need_the_same_images_decode_them_once(tiny, cache, monkeypatch):
    decoded, decode = [], pixel_cache._decoded

    def counted(*arguments):
        decoded.append(1)
        time.sleep(0.1)
        return decode(*arguments)

    monkeypatch.setattr(pixel_cache, "_decoded", counted)
    for found in at_once(2, lambda _: pixels(listed(tiny), "as is", 0)):
        assert np.array_equal(found, read_directly(tiny))
    assert len(decoded) == 1


def test_without_a_home_folder_images_are_decoded_every_time(tiny, monkeypatch):
    for name in ("RESLT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert cache_folder() is None
    assert np.array_equal(pixels(listed(tiny), "as is", 0), read_directly(tiny))


# ---- Failures that do not end a run, and numbers that are not finite ----


@pytest.fixture(scope="module")
def run_of_two_epochs(tmp_path_factory) -> Path:
    """A folder with the dataset tiny/ and a run trained on it, run/."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(EARLIER / "run", work / "run")
    make_dataset(work / "tiny")
    return work


def error(number: int, file="") -> OSError:
    return OSError(number, os.strerror(number), str(file))


NOT_ESSENTIAL = {
    "an old checkpoint": "1-3: this old checkpoint cannot be removed: Permission denied",
    "fsync of a folder": "the file system cannot flush a folder to disk (Invalid argument)",
    "summary.csv": "summary.csv: it cannot be written: No space left on device",
    "a tracker": "--log-with: ConnectionError: no network; its record may lack values",
    "the cache": "decoded images cannot be kept there (Not a directory)",
}


def test_each_failure_that_is_not_essential_gives_one_warning_and_the_same_result(
    tiny, tmp_path, run_script, monkeypatch
):
    flags = ("--data", tiny, *TINY_FLAGS, "--epochs", 3, "--checkpoint-hist", 1, "--output", tmp_path, "--experiment")
    whole = run_script("train", *flags, "whole")
    monkeypatch.setattr(log, "_WARNED", set())
    fsync = os.fsync

    def no_fsync_of_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise error(errno.EINVAL)
        fsync(descriptor)

    def no_rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise error(errno.EACCES, path)

    def no_tracker(*_, **__):
        raise ConnectionError("no network")

    def no_summary(file, text):
        raise error(errno.ENOSPC, file)

    monkeypatch.setattr(os, "fsync", no_fsync_of_folders)
    monkeypatch.setattr(run_folder.shutil, "rmtree", no_rmtree)
    monkeypatch.setattr("accelerate.Accelerator.log", no_tracker)
    monkeypatch.setattr(summary, "write_atomically", no_summary)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESLT_CACHE", str(tmp_path / "file/cache"))
    hindered = run_script("train", *flags, "hindered")
    assert hindered.code == 0, hindered.err
    for text in NOT_ESSENTIAL.values():
        assert hindered.err.count(text) == 1, text
    assert hindered.err.count("warning: ") == whole.err.count("warning: ") + len(NOT_ESSENTIAL)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "hindered")]
    assert results[1] == results[0]
    kept = sorted(path.name for path in (tmp_path / "hindered/checkpoints").iterdir())
    assert kept == ["1-3", "2-6", "3-9", "last"]


def test_a_result_that_cannot_be_written_is_printed_before_the_error(tiny, tmp_path, run_script, monkeypatch):
    def full(file, text):
        raise error(errno.ENOSPC, file)

    monkeypatch.setattr(tables, "write_atomically", full)
    trained = run_script(
        "train", "--data", tiny, *TINY_FLAGS, "--epochs", 1, "--output", tmp_path, "--experiment", "run"
    )
    assert trained.code == 2
    assert f"{tmp_path / 'run/result.json'}: No space left on device" in trained.err
    assert re.search(r"the last epoch: tiny, test list \(15 images\)[^§]*reslt \(fused\)", trained.out)
    assert "accuracy per class" in trained.out


@pytest.mark.parametrize(
    ("bad", "values", "message"),
    [
        ("classifier", 3e38, r"test\.txt: the model's logits are not finite for 15 of 15 images"),
        ("classifier", float("nan"), r"model\.safetensors: backbone\.fc\.weight is not finite; use another checkpoint"),
        ("running_var", float("inf"), r"model\.safetensors: \S+running_var is not finite; use another checkpoint"),
    ],
)
def test_numbers_that_are_not_finite_end_an_evaluation(bad, values, message, run_of_two_epochs, tmp_path, run_script):
    run = tmp_path / "run"
    shutil.copytree(run_of_two_epochs / "run", run)
    found = find(run)
    tensors = found.tensors("model")
    name = "backbone.fc.weight" if bad == "classifier" else next(name for name in tensors if name.endswith(bad))
    tensors[name].fill_(values)
    checkpoint.write(found.folder, {"model": tensors}, found.state, replaces=True)
    before = state_of(run)
    evaluated = run_script(
        "evaluate", "--ckpt", run, "--data", run_of_two_epochs / "tiny", "--fold", tmp_path / "f.safetensors"
    )
    assert evaluated.code == 2
    assert re.search(message, evaluated.err), evaluated.err
    assert state_of(run) == before
    assert not (tmp_path / "f.safetensors").exists()
    if values != 3e38:  # finite weights are loaded; the caller must check their logits
        with pytest.raises(UserError, match=message):
            load_run(run)


def test_logits_that_are_not_finite_end_a_run_only_after_its_last_epoch(capsys):
    def measure(split: str, epochs_done: int) -> str:
        if split == "val":
            raise NotFiniteError("val.txt: the model's logits are not finite")
        return f"{split} {epochs_done}"

    run = SimpleNamespace(epochs=3, phases=Phases(is_of_process=False), _finish_writing=lambda: None)
    log.log_to_console()
    assert Run.evaluate(run, measure, ["val", "test"], Progress(1)) == {"test": "test 2"}
    assert "warning: val.txt: the model's logits are not finite; training continues" in capsys.readouterr().err
    with pytest.raises(NotFiniteError):
        Run.evaluate(run, measure, ["val", "test"], Progress(2))


def test_images_with_a_logit_that_is_not_finite_are_counted_in_each_branch_and_expert():
    logits = torch.zeros(2, 3, 5, 4)  # E, K, N, C
    logits[0, 0, 1, 2], logits[1, 2, 1, 0], logits[1, 1, 4, 3] = float("nan"), float("inf"), -float("inf")
    hits = ClassHits((2, 3), 4, torch.device("cpu"))
    for given in (logits, logits[:, :, 2:4], logits[:, :, :2]):
        hits.update(given, torch.zeros(given.shape[2], dtype=torch.int64))
    assert hits.accuracies().not_finite == 2 + 0 + 1


def test_folded_weights_that_compute_other_logits_are_not_written(run_of_two_epochs, tmp_path, run_script, monkeypatch):
    def wrong(classifier, branches):
        classifier.bias.add_(torch.tensor([0.5, 0.0, 0.0]))

    monkeypatch.setattr(folding, "_into_classifier", wrong)
    run, out = run_of_two_epochs / "run", tmp_path / "f.safetensors"
    evaluated = run_script(
        "evaluate", "--ckpt", run, "--data", run_of_two_epochs / "tiny", "--output", tmp_path, "--fold", out
    )
    assert evaluated.code == 2
    assert "the folded weights do not compute the model's logits" in evaluated.err
    assert not out.exists()
    with pytest.raises(UserError, match="do not compute the model's logits"):
        load_run(run)


def test_a_folded_file_with_a_number_that_is_not_finite_is_not_loaded(tmp_path):
    given, file = EARLIER / "reslt_bn.safetensors", tmp_path / "folded.safetensors"
    with safe_open(given, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(given)
    tensors["fc.bias"][1] = float("nan")
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"folded\.safetensors: fc\.bias is not finite"):
        fold.load_folded(file)


REFUSED_OUTPUTS = {
    "weights": ("--fold", "run/checkpoints/2-6/model.safetensors", "inside {run}/checkpoints/2-6, which only"),
    "more weights": ("--fold", "run/checkpoints/2-6/folded.safetensors", "inside {run}/checkpoints/2-6, which only"),
    "among checkpoints": ("--fold", "run/checkpoints/f.safetensors", "inside {run}/checkpoints, which only training"),
    "through a link": ("--fold", "link/2-6/folded.safetensors", "inside {run}/checkpoints/2-6, which only training"),
    "another file": ("--fold", "mine.safetensors", "it exists and is not a file of folded weights; give another name"),
    "results in a checkpoint": ("--output", "run/checkpoints/2-6", "inside {run}/checkpoints/2-6, which only"),
    "results among checkpoints": ("--output", "run/checkpoints/new", "inside {run}/checkpoints, which only"),
    "results of another run": ("--output", "other", "the results of another run in it would be replaced"),
}


@pytest.mark.parametrize("case", REFUSED_OUTPUTS.values(), ids=REFUSED_OUTPUTS)
def test_an_output_that_would_damage_a_run_is_refused_before_the_evaluation(case, tmp_path, run_script, monkeypatch):
    flag, place, message = case
    for name in ("run", "other"):
        shutil.copytree(EARLIER / "run", tmp_path / name)
    shutil.copyfile(EARLIER / "run/checkpoints/2-6/model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "run/checkpoints")
    before = state_of(tmp_path)
    monkeypatch.setattr("reslt.evaluation.evaluate.evaluate", None)
    refused = run_script("evaluate", "--ckpt", tmp_path / "run", flag, tmp_path / place)
    assert (refused.code, refused.out) == (2, "")
    assert message.format(run=tmp_path / "run") in refused.err
    assert state_of(tmp_path) == before


def test_folded_weights_beside_a_run_may_be_written_again(run_of_two_epochs, tmp_path, run_script):
    out = tmp_path / "folded.safetensors"
    places = ("--ckpt", run_of_two_epochs / "run", "--data", run_of_two_epochs / "tiny", "--output", tmp_path)
    for _ in range(2):
        assert run_script("evaluate", *places, "--fold", out).code == 0
    assert fold.is_folded(out)


def test_a_converted_checkpoint_is_not_written_into_a_run(tmp_path, capsys):
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    before, place = state_of(tmp_path), tmp_path / "run/checkpoints/9-9"
    refused = outcome_of(
        convert.main, ("convert", "no.pth.tar", "--model", "resnet10t", "--data", "x", "--output", place), capsys
    )
    assert refused.code == 2
    assert f"inside {tmp_path / 'run/checkpoints'}, which only training writes to" in refused.err
    assert state_of(tmp_path) == before
