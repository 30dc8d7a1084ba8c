"""`prepare pack`: images in shards train, evaluate and fail exactly as the files they are made from."""

import logging
import multiprocessing
import os
import pickle
import shlex
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import eval_loader_of, settings_of, train_loader_of
from conftest import TINY_FLAGS, last_checkpoint, make_dataset
from PIL import Image

from reslt.augment.host_transforms import pil_to_chw
from reslt.config.schema import Config
from reslt.core.errors import LocalFault, UserError
from reslt.data.datasets import load_dataset
from reslt.data.lists import read_list
from reslt.data.paths import ImageRoot
from reslt.data.shards import AHEAD, ENTRY, NEAR, Pack, _runs, index_digest, path_digest
from reslt.loading.image_dataset import ListedImages
from reslt.loading.kept_arrays import digest
from reslt.loading.read_ahead import read_ahead
from reslt.prepare import pack
from reslt.prepare.folder import write_lists

OWN = dict(input_size=(3, 48, 48), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)


def noise(seed: int, side: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


LISTED = {
    "train": [("a/1.jpg", 0), ("a/2.x y.JPG", 0), ("b/3.png", 1), ("b/4.jpg", 1), ("b/no suffix", 1)],
    "val": [("b/3.png", 1), ("a//1.jpg", 0)],
    "test": [("b/5.webp.jpeg", 1), ("a/6.jpg", 0)],
}
FILES = ["a/1.jpg", "a/2.x y.JPG", "b/3.png", "b/4.jpg", "b/no suffix", "b/5.webp.jpeg", "a/6.jpg"]  # as first listed


def write_photos(root: Path) -> None:
    for i, path in enumerate(FILES):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        noise(i, 360 + i).save(root / path, "BMP")  # 0.4 MB each; a file's name does not matter


@pytest.fixture
def photos(project, tmp_path) -> Path:
    """data_lists/photos: seven files of 0.4 MB, two of them listed twice."""
    root, folder = tmp_path / "photos", project / "data_lists" / "photos"
    write_photos(root)
    write_lists(folder, LISTED)
    (folder / "local.yaml").write_text(yaml.safe_dump({"image_root": str(root)}))
    return root


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_shards_are_webdatasets_of_each_file_once_in_the_lists_order(photos, run_prepare, tmp_path):
    shards = tmp_path / "shards"
    done = run_prepare("pack", "photos", "--output", shards, "--shard-size", 1)
    assert (done.code, done.err) == (0, "")
    assert f"{shards}: 7 images in 3 shards (3 written)" in done.out
    assert f"photos reads its images from {shards} from now on" in done.out
    labels, suffixes, members = [0, 0, 1, 1, 1, 1, 0], ["jpg", "jpg", "png", "jpg", "jpg", "jpeg", "jpg"], []
    for shard, count in enumerate((3, 3, 1)):  # the third image of 0.4 MB makes a shard exceed 1 MB and ends it
        with tarfile.open(shards / f"{shard:06}.tar") as tar:
            found = [(member.name, tar.extractfile(member).read()) for member in tar]
            assert len(found) == 2 * count
            assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar.getmembers()} == {(0, 0, "", 0o644)}
            members += found
    for i, (path, label, suffix) in enumerate(zip(FILES, labels, suffixes, strict=True)):
        assert members[2 * i] == (f"{i:09}.{suffix}", (photos / path).read_bytes())
        assert members[2 * i + 1] == (f"{i:09}.cls", str(label).encode())
    dataset = load_dataset("photos")
    assert dataset.image_root.folder == shards
    for images in dataset.lists.values():
        for i in range(len(images)):
            assert dataset.image_root.file(images.path(i)).read_bytes() == (photos / images.path(i)).read_bytes()


def test_an_interrupted_pack_is_refused_and_completed_with_the_same_bytes(photos, run_prepare, tmp_path, monkeypatch):
    shards, command = tmp_path / "shards", ("pack", "photos", "--shard-size", 1, "--data-dir", photos, "--output")
    assert run_prepare(*command, shards).code == 0
    whole = content_of(shards)

    def killed(*_):
        raise KeyboardInterrupt

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    other = tmp_path / "other"
    with monkeypatch.context() as patched:
        patched.setattr(pack.Packing, "_finish", killed)
        assert run_prepare(*command, other).code != 0
    assert "index.npy" not in content_of(other)
    with pytest.raises(
        UserError, match=r"packing was interrupted; continue it with: python -m reslt.prepare pack photos"
    ):
        load_dataset("photos", other)
    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", full_disk)
        full = run_prepare(*command, tmp_path / "full")
    assert full.code == 2
    assert f"{tmp_path / 'full' / '000000.tar'}: No space left on device; fix this, then repeat the command" in full.err
    assert content_of(tmp_path / "full").keys() == {"pack.yaml"}
    (other / "000001.tar").unlink()  # as if it had been written at the moment of the kill
    times = {path.name: path.stat().st_mtime_ns for path in other.glob("*.tar")}
    again = run_prepare(*command, other)
    assert again.code == 0, again.err
    assert "(1 written, 2 already there)" in again.out
    assert {name: (other / name).stat().st_mtime_ns for name in times} == times
    found = content_of(other)
    assert {n: c for n, c in found.items() if n != "pack.yaml"} == {n: c for n, c in whole.items() if n != "pack.yaml"}


def test_a_changed_original_or_list_rewrites_the_shards_from_that_image_on(photos, run_prepare, project, tmp_path):
    shards = tmp_path / "shards"
    assert run_prepare("pack", "photos", "--output", shards, "--shard-size", 1).code == 0
    noise(99, 370).save(photos / "b/4.jpg", "BMP")  # the first of the second shard
    again = run_prepare("pack", "photos", "--output", shards, "--shard-size", 1)
    assert "7 images in 3 shards (1 written, 2 already there)" in again.out
    root = load_dataset("photos").image_root
    assert root.file("b/4.jpg").read_bytes() == (photos / "b/4.jpg").read_bytes()
    noise(7).save(photos / "a/new.jpg", "PNG")
    with open(project / "data_lists/photos/test.txt", "a") as file:
        file.write("a/new.jpg 0\n")
    with pytest.raises(UserError) as stale:
        load_dataset("photos").check_for_training("stop")
    assert "test.txt:3: " in str(stale.value)
    assert "the pack does not contain this path; bring it up to date with: " in str(stale.value)
    command = str(stale.value).partition("bring it up to date with: ")[2].split()
    assert command[:3] == ["python", "-m", "reslt.prepare"]
    assert "8 images in 3 shards (1 written, 2 already there)" in run_prepare(*command[3:]).out
    load_dataset("photos").check_for_training("stop")
    (project / "data_lists/photos/test.txt").write_text("a/new.jpg 0\nb/3.png 1\n")
    assert "6 images in 2 shards (1 written, 1 already there)" in run_prepare(*command[3:]).out
    assert {p.name for p in shards.glob("0*")} == {"000000.tar", "000000.npy", "000001.tar", "000001.npy"}
    train = project / "data_lists/photos/train.txt"
    train.write_text("".join(f"{path} {label}\n" for path, label in LISTED["train"][2:3] + LISTED["train"][:2]))
    (project / "data_lists/photos/test.txt").write_text("b/4.jpg 1\nb/no suffix 1\na/new.jpg 0\n")
    assert "6 images in 2 shards (1 written, 1 already there)" in run_prepare(*command[3:]).out  # in another order
    train.write_text("b/3.png 1\na/1.jpg 0\n")
    # So large that the first shard is full without the image that is gone: in the second one only the numbers change.
    noise(2, 480).save(photos / "b/3.png", "BMP")
    assert "5 images in 2 shards (2 written)" in run_prepare(*command[3:]).out
    names = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            names += [name for name in tar.getnames() if not name.endswith(".cls")]
    assert names == ["000000000.png", *(f"{i:09}.jpg" for i in range(1, 5))]


def test_missing_and_empty_files_are_named_and_left_out(photos, run_prepare, tmp_path):
    (photos / "a/2.x y.JPG").unlink()
    (photos / "b/4.jpg").write_bytes(b"")
    done = run_prepare("pack", "photos", "--output", tmp_path / "shards", "--shard-size", 1)
    problems = [line for line in done.out.splitlines() if line.startswith("PROBLEM")]
    assert (done.code, len(problems)) == (1, 2)
    assert "train.txt:2: " in problems[0]
    assert "there is no such image" in problems[0]
    assert f"train.txt:4: {photos / 'b/4.jpg'}: the file is empty" in problems[1]
    assert "5 images in 2 shards" in done.out
    write_photos(photos)
    again = run_prepare("pack", "photos", "--output", tmp_path / "shards", "--shard-size", 1)
    assert "7 images in 3 shards" in again.out


def test_other_files_are_never_overwritten_and_a_partial_pack_is_not_used(photos, run_prepare, project, tmp_path):
    local = project / "data_lists/photos/local.yaml"
    before = local.read_text(), content_of(photos / "a")
    for flags, message in (
        (("--output", photos), "it exists and contains other files"),
        (("--output", tmp_path / "x", "--data-dir", tmp_path / "project"), "no image could be read; the first: "),
        (("--output", tmp_path / "y", "--shard-size", 0), "--shard-size 0: give a whole number from 1"),
    ):
        done = run_prepare("pack", "photos", *flags)
        assert done.code == 2, done.out
        assert message in done.err
    done = run_prepare("pack", "photos", "--output", tmp_path / "part", "--lists", "val")
    assert f"the pack does not contain all lists of photos; read it with: --data-dir {tmp_path / 'part'}" in done.out
    assert (local.read_text(), content_of(photos / "a")) == before
    done = run_prepare("pack", "photos", "--output", tmp_path / "part")
    assert "it contains images made differently" not in done.err
    assert "7 images in 1 shard (1 written)" in done.out
    done = run_prepare("pack", "photos", "--output", tmp_path / "third")
    assert "photos reads its images from the pack" in done.err
    write_lists(project / "data_lists/fewer", LISTED | {"test": LISTED["test"][:1]})  # a subset of the images
    done = run_prepare("pack", "fewer", "--output", tmp_path / "part", "--data-dir", photos)
    assert done.code == 2, done.out
    assert "it contains images made differently ({'dataset': 'photos'" in done.err
    load_dataset("photos").check_for_training("stop")


def test_the_command_that_repairs_a_moved_pack_names_its_new_folder(photos, run_prepare, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_prepare("pack", "photos", "--output=~/before").code == 0
    moved = (tmp_path / "before").rename(tmp_path / "after it")
    (moved / "000000.tar").unlink()
    with pytest.raises(UserError) as missing:
        load_dataset("photos", moved).check_for_training("stop")
    command = shlex.split(str(missing.value).partition("pack again with: ")[2])[3:]
    assert run_prepare(*command, "--data-dir", photos).code == 0
    load_dataset("photos", moved).check_for_training("stop")


def test_a_damaged_index_or_shard_is_reported_and_repaired_by_the_same_command(photos, run_prepare, tmp_path):
    shards = tmp_path / "shards"
    command = ("pack", "photos", "--output", shards, "--shard-size", 1)
    assert run_prepare(*command).code == 0
    content = (shards / "index.npy").read_bytes()
    for damaged, message in (
        (None, r"index.npy is missing; pack again with: python -m"),
        (content[:150], r"index.npy is damaged; pack again"),
        (content[:-1] + bytes([content[-1] ^ 1]), r"its digest is not that of pack.yaml"),
    ):
        (shards / "index.npy").unlink(missing_ok=True)
        if damaged is not None:
            (shards / "index.npy").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_dataset("photos")
    assert run_prepare(*command).code == 0
    assert (shards / "index.npy").read_bytes() == content
    dataset, file = load_dataset("photos"), load_dataset("photos").image_root.file("b/4.jpg")  # opens nothing yet
    whole = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(whole[:200_000])
    listed = ListedImages(dataset.lists["train"], dataset.image_root, pil_to_chw, None)
    fault = listed.__getitems__([(0, 0), (0, 3)])
    assert isinstance(fault, LocalFault)
    assert f"train.txt:4: {shards / '000001.tar'}, byte 512 (b/4.jpg): the shard ends at byte 200000, " in str(fault)
    assert "repair or replace its original and pack it again" in str(fault)
    with pytest.raises(UserError, match=r"train.txt:4: .*000001.tar, byte 512 .*the shard ends at byte 200000"):
        load_dataset("photos").check_for_training("stop")
    (shards / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"the shard is missing; pack again with: python -m reslt.prepare pack photos"):
        load_dataset("photos").check_for_training("stop")
    checked = run_prepare("check", "photos", "--output", tmp_path / "out")
    assert checked.code == 1
    assert "the shard is missing" in checked.out
    assert run_prepare(*command).code == 0
    assert (shards / "000001.tar").read_bytes() == whole
    assert file.read_bytes() == (photos / "b/4.jpg").read_bytes()


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """A dataset of JPEGs and PNGs, and the folder of its shards."""
    root = tmp_path_factory.mktemp("twins")
    folder = make_dataset(root / "files", counts=(16, 8), side=16)
    for i, file in enumerate(sorted((folder / "images/train").rglob("*.png"))):
        if i % 3:
            noise(i).save(file, "JPEG")
    pack.pack(str(folder), root / "shards", 1000, None, None)
    (folder / "local.yaml").unlink()
    return folder, root / "shards"


def settings(**changes):
    return Config.of(**dict(crop="rrc", batch_size=8, workers=0, data_on_device="off") | changes)


@pytest.mark.parametrize("changes", [{}, {"decode": "device"}, {"crop": "center", "data_on_device": "on"}])
def test_batches_from_shards_equal_those_from_files(twins, changes):
    folder, shards = twins
    config = settings(**changes)
    sides = []
    for data_dir in (None, shards):
        dataset = load_dataset(str(folder), data_dir)
        train = train_loader_of(dataset, config, settings_of(config, OWN))
        test = eval_loader_of(dataset, "test", config, settings_of(config, OWN))
        sides.append([*train.epoch(0), *train.epoch(1), *test.epoch(0)])
    for (ours, our_labels), (theirs, their_labels) in zip(*sides, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(our_labels, their_labels)


def test_weights_from_shards_are_bit_equal_to_those_from_files(twins, run_script, tmp_path):
    folder, shards = twins
    weights = []
    for name, flags in (("files", ()), ("shards", ("--data-dir", shards))):
        where = ("--data", folder, "--output", tmp_path, "--experiment", name, "--data-on-device", "off")
        outcome = run_script("train", *TINY_FLAGS, *where, "--epochs", 1, *flags)
        assert outcome.code == 0, outcome.err
        weights.append((last_checkpoint(tmp_path / name) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@contextmanager
def counted_calls(monkeypatch):
    """Yield {function: number of calls} of the functions that open, inspect and read files."""
    counts = dict.fromkeys(("open", "stat", "fstat", "pread"), 0)

    def counting(name, original):
        def call(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for name in counts:
            patched.setattr(os, name, counting(name, getattr(os, name)))
        yield counts


def test_an_epoch_opens_each_shard_once_and_reads_neighbors_together(twins, monkeypatch):
    folder, shards = twins
    dataset = load_dataset(str(folder), shards)
    images = ListedImages(dataset.lists["train"], dataset.image_root, None, None)
    assert len(images) == 24
    with counted_calls(monkeypatch) as counts:
        for first in (0, 12):  # two batches in the list's order
            with images.root.ahead(images.listed.path(i) for i in range(first, first + 12)):
                assert all(images.decoded(i)[1] is None for i in range(first, first + 12))
        with images.root.ahead(["train/0/3.png", "no such path"]):
            assert images.decoded(3)[1] is None
    assert counts == {"open": 1, "stat": 0, "fstat": 0, "pread": 3}
    files = ListedImages(dataset.lists["train"], ImageRoot(folder / "images"), None, None)
    with counted_calls(monkeypatch) as counts:
        assert len([files.decoded(i) for i in range(24)]) == 24
    assert counts["open"] == 24
    assert counts["fstat"] >= 24


def test_neighbors_are_images_with_a_small_gap_in_the_same_shard():
    places = [(0, 512, 1000), (0, 3072, 1000), (0, 4072 + NEAR, 10), (0, 4083 + 2 * NEAR, 10), (1, 512, 10)]
    found = [(shard, first, end, len(parts)) for shard, first, end, parts in _runs(places)]
    assert found == [(0, 512, 4082 + NEAR, 3), (0, 4083 + 2 * NEAR, 4093 + 2 * NEAR, 1), (1, 512, 522, 1)]
    large = [(0, 512 + k * 10_001_024, 10_000_000) for k in range(3)]  # two would exceed 16 MiB
    assert [len(parts) for *_, parts in _runs(large)] == [1, 1, 1]


def test_images_beyond_the_limit_are_read_one_by_one(tmp_path):
    length = AHEAD // 4
    rows = [(*path_digest(f"{k}.png"), 2 * k * length, length, 0) for k in range(6)]
    entries = np.sort(np.array(rows, ENTRY), order="high")
    np.save(tmp_path / "index.npy", entries)
    (tmp_path / "pack.yaml").write_text(yaml.safe_dump({"index_digest": index_digest(entries)}))
    with open(tmp_path / "000000.tar", "wb") as file:
        file.truncate(12 * length)  # a sparse file
    root = ImageRoot(tmp_path)
    with root.ahead(f"{k}.png" for k in range(6)):
        ready = [root.pack.already_read(root.file(f"{k}.png")) is not None for k in range(6)]
        assert ready == [True] * 4 + [False] * 2
        assert len(root.file("5.png").read_bytes()) == length
    assert root.pack.already_read(root.file("0.png")) is None


def test_a_pack_is_passed_to_spawned_workers_without_its_index(twins):
    folder, shards = twins
    root = ImageRoot(shards)
    expected = root.file("train/0/3.png").read_bytes()  # opens the pack
    pickled = pickle.dumps(root)
    assert len(pickled) < 1000
    received = pickle.loads(pickled)
    assert received.file("train/0/3.png").read_bytes() == expected == (folder / "images/train/0/3.png").read_bytes()
    assert isinstance(received.pack, Pack)


def test_forked_workers_read_at_the_same_time_from_inherited_descriptors(twins):
    folder, shards = twins
    dataset = load_dataset(str(folder), shards)
    dataset.image_root.file("train/0/0.png").read_bytes()  # opens the shard in this process
    sides = []
    for workers in (0, 2):
        config = settings(workers=workers)
        sides.append(list(train_loader_of(dataset, config, settings_of(config, OWN)).epoch(0)))
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(*sides, strict=True))
    assert not [child for child in multiprocessing.active_children() if child.exitcode]


def test_stored_decoded_images_are_valid_until_their_shard_changes(twins):
    folder, shards = twins
    images = read_list(folder / "train.txt")

    def current_digest() -> bytes:
        return digest(ListedImages(images, ImageRoot(shards), None, None), "as they are")

    before = current_digest()
    assert current_digest() == before
    status = os.stat(shards / "000000.tar")
    os.utime(shards / "000000.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert current_digest() != before


def test_packing_a_shrunk_copy_and_shrinking_a_pack_give_the_same_images(photos, run_prepare, tmp_path):
    assert run_prepare("shrink", "photos", "--size", 32, "--output", tmp_path / "small", "--workers", 0).code == 0
    assert run_prepare("pack", "photos_32", "--output", tmp_path / "shards").code == 0
    assert run_prepare("pack", "photos", "--output", tmp_path / "large").code == 0
    of_pack = run_prepare(
        "shrink", "photos", "--size", 32, "--output", tmp_path / "again", "--workers", 0, "--name", "again"
    )
    assert of_pack.code == 0, of_pack.err
    assert "7 shrunk" in of_pack.out
    root = load_dataset("photos_32").image_root
    assert root.folder == tmp_path / "shards"
    for path in FILES:
        assert root.file(path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_shards_that_fit_into_memory_are_read_ahead_once_per_machine(twins, monkeypatch, caplog):
    found, may_read, read = Pack(twins[1]), threading.Event(), []
    size = (twins[1] / "000000.tar").stat().st_size
    caplog.set_level(logging.INFO)
    assert read_ahead(found, free=2 * size - 1) is None
    assert "they exceed 50% of the free memory" in caplog.text

    def reading(shard, offset, length):
        may_read.wait(10)
        read.append((shard, offset, length))

    monkeypatch.setattr(found, "read", reading)
    thread = read_ahead(found, free=2 * size)
    assert read_ahead(found, free=2 * size) is None  # another run on this machine
    may_read.set()
    thread.join()
    assert read == [(0, 0, size)]
    second = read_ahead(found, free=2 * size)
    second.join()
    assert len(read) == 2
