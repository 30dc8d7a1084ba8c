"""The parts of growing a dataset: sides, contents, advice, and an info.yaml that keeps what its user wrote."""

import contextlib
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from reslt.core.errors import UserError
from reslt.prepare.advice import advise
from reslt.prepare.contents import digests_of, fingerprint, near_pairs
from reslt.prepare.folder import changed_yaml, dataset_files
from reslt.prepare.sides import read_sides, sides_of_new, write_sides


@pytest.mark.parametrize(
    ("new", "known", "held_out", "expected"),
    [
        (20, {}, {"test": 10, "val": 0}, {"test": 10, "train": 10}),
        (20, {}, {"test": 3, "val": 2}, {"test": 3, "val": 2, "train": 15}),
        (7, {}, {"test": 10, "val": 10}, {"test": 2, "val": 1, "train": 4}),
        (6, {"train": 10, "test": 10}, {"test": 10}, {"train": 6}),
        (6, {"train": 5, "test": 5}, {"test": 10}, {"test": 3, "train": 3}),  # 8 of 16
        (6, {"train": 30, "test": 5}, {"test": 10}, {"test": 5, "train": 1}),
        (
            3,
            {"test": 4},
            {"test": 10},
            {"train": 3},
        ),  # its training images were removed: more than half of the class is in the test list
        (4, {"train": 20, "val": 3}, {"test": 2, "val": 3}, {"test": 2, "train": 2}),
        (1, {}, {"test": 10}, {"train": 1}),
        (0, {"train": 2}, {"test": 10}, {}),
    ],
)
def test_new_images_fill_up_what_is_set_aside_to_at_most_half_of_the_class(new, known, held_out, expected):
    digests = [bytes([i] * 16) for i in range(new)]
    assert Counter(sides_of_new(digests, Counter(known), held_out, 0).values()) == expected


@given(st.sets(st.binary(min_size=16, max_size=16), min_size=2, max_size=30), st.randoms(), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_sides_depend_on_contents_and_seed_and_not_on_the_order_of_files(digests, draw, seed):
    one, two = sorted(digests), sorted(digests)
    draw.shuffle(two)
    assert sides_of_new(one, Counter(), {"test": 5}, seed) == sides_of_new(two, Counter(), {"test": 5}, seed)


def test_a_written_record_of_sides_reads_back_the_same(tmp_path):
    sides = {bytes([i] * 16): split for i, split in enumerate(("train", "val", "test", "train"))}
    assert read_sides(tmp_path) is None
    write_sides(tmp_path, sides)
    assert read_sides(tmp_path) == sides


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("split,digest\n", 1),
        ("digest,split\n" + "0" * 32 + ",tested\n", 2),
        ("digest,split\n" + "0" * 30 + ",test\n", 2),
        ("digest,split\n" + "x" * 32 + ",test\n", 2),
        ("digest,split\n" + "0" * 32 + ",test\n" + "0" * 32 + ",train\n", 3),
    ],
)
def test_a_damaged_record_of_sides_is_refused_with_its_line(tmp_path, text, line):
    (tmp_path / "sides.csv").write_text(text)
    with pytest.raises(UserError, match=rf"sides\.csv:{line}: "):
        read_sides(tmp_path)


def test_files_without_content_have_no_digest(tmp_path):
    for name, content in (("a", b"1"), ("b", b""), ("c", b"1"), ("d", b"2")):
        (tmp_path / name).write_bytes(content)
    one, empty, same, other, missing, folder = digests_of([*map(tmp_path.joinpath, "abcde"), tmp_path])
    assert one == same != other
    assert empty is missing is folder is None


def test_near_pairs_are_copies_whatever_their_size_and_quality(tmp_path):
    """Crops that share nothing, each with a copy of 70 % of the side at JPEG quality 50; and blank images."""
    prints = []
    for photo in load_sample_images().images:
        for i in range(4):
            crop = Image.fromarray(photo[200 * (i % 2) :, 300 * (i // 2) :][:200, :300])
            copy = crop.resize((210, 140), Image.Resampling.BICUBIC)
            copy.save(tmp_path / "copy.jpg", quality=50)
            with Image.open(tmp_path / "copy.jpg") as copy:
                prints += [fingerprint(crop), fingerprint(copy.convert("RGB"))]
    prints += [fingerprint(Image.new("RGB", (50, 50), color)) for color in ("white", "white", "black")]
    found = near_pairs(np.stack([np.frombuffer(p, np.uint8) for p in prints]))
    expected = [(2 * i, 2 * i + 1) for i in range(8)]
    contrast = [np.frombuffer(p, np.uint8)[8:].std() for p in prints]
    assert [tuple(pair) for pair in found] == [pair for pair in expected if contrast[pair[0]] >= 8]
    assert len(found) >= 6  # the sky is nearly blank
    assert near_pairs(np.empty((0, 264), np.uint8)).shape == (0, 2)


@pytest.mark.parametrize(
    ("trained", "tested", "stated", "flags", "remarks"),
    [
        ([60_000, 50_000], [10, 10], {}, " --model resnet50 --branches 2", ["more than the 2 classes"]),
        ([70_000, 30_000, 10_000], [10] * 3, {}, " --model resnet50", []),
        ([900, 500, 200], [5] * 3, {}, " --recipe own_finetune --model resnet50", ["1,600 training images are few"]),
        (
            [400, 200, 100, 40],
            [10] * 4,
            {"batch_size": 64, "lr": 0.025},
            " --recipe own_finetune --model resnet50 --batch-size 64 --lr 0.025 --logit-adjust 1 --alpha 0.5",
            ["few to learn", "10 times as many images as the smallest: --logit-adjust 1 --alpha 0.5"],
        ),
        (
            [800, 800],
            None,
            {},
            " --recipe own_finetune --model resnet50 --method ce",
            ["few to learn", "all classes have the same number of images: --method ce"],
        ),
        (
            [9_000, 800, 500],
            [3, 9, 4],
            {"method": "ce", "model": "resnet18"},
            " --recipe own_finetune --logit-adjust 1",
            ["few to learn", "--logit-adjust 1 (if", "fewer than 5 images: 2 of 3, first 'a' on 3"],
        ),
        ([9_000, 5_000, 2_000], None, {"branches": 2}, " --recipe own_finetune --model resnet50", ["few to learn"]),
        (
            [700, 250, 50],
            [9, 9, 9],
            {"batch_size": 16, "alpha": 0.9},
            " --recipe own_finetune --model resnet50 --logit-adjust 1",
            ["few to learn", "14 times as many"],
        ),
        (
            [9_000, 5_000, 2_000],
            None,
            {"pretrained": True, "epochs": 50},
            " --model resnet50 --pretrained",
            ["few to learn features from: --pretrained starts"],
        ),
        ([9_000, 5_000, 2_000], None, {"pretrained": False}, " --model resnet50", ["few to learn"]),
    ],
)
def test_advice_follows_from_the_counts_and_contradicts_no_stated_setting(trained, tested, stated, flags, remarks):
    """Batch 64 is the power of two below a tenth of 740 images, with half the learning rate of the default 128."""
    tested = None if tested is None else np.array(tested)
    advice = advise(np.array(trained), tested, "abcd"[: len(trained)], stated)
    assert advice.flags() == flags
    assert len(advice.remarks) == len(remarks), advice.remarks
    for remark, part in zip(advice.remarks, remarks, strict=True):
        assert part in remark


INFO = "# ours\ndescription: birds\nclass_names:\n- auk\n- owl\n\n# of the paper\nshot_split: {by: count}\n"


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        (INFO, {}, INFO),
        (INFO, {"class_names": ["auk", "owl", "001"]}, INFO.replace("- owl\n", "- owl\n- '001'\n")),
        (INFO, {"num_classes": 2}, INFO + "num_classes: 2\n"),
        ("a: 1", {"b": 2}, "a: 1\nb: 2\n"),
        ("{a: 1, b: 2}\n", {"b": 3}, "a: 1\nb: 3\n"),
        ("", {"a": {"b": 1}, "c": 2}, "a:\n  b: 1\nc: 2\n"),
        ("a: |\n  text\nb: 1\n", {"b": 2}, "a: |\n  text\nb: 2\n"),
        ("a: 1\n'b': 2\n", {"b": 3}, "a: 1\nb: 3\n"),
    ],
)
def test_changed_keys_leave_the_text_of_the_others(text, changes, expected):
    result = changed_yaml(text, changes)
    assert result == expected
    assert yaml.safe_load(result) == (yaml.safe_load(text) or {}) | changes


def test_a_dataset_replaces_its_own_files_and_keeps_others(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    for name in ("train.txt", "val.txt", "bad_images.csv", "notes.md"):
        (folder / name).write_text("old")
    (folder / "images").mkdir()
    (folder / ".new").mkdir()  # left by a process that was killed
    (folder / ".new/val.txt").write_text("half of it")
    with contextlib.suppress(KeyError), dataset_files(folder) as made:
        (made / "train.txt").write_text("new")
        raise KeyError
    assert (folder / "train.txt").read_text() == "old"
    with dataset_files(folder) as made:
        assert not list(made.iterdir())
        (made / "train.txt").write_text("new")
        (made / "test.txt").write_text("new")
    assert {p.name: p.read_text() for p in folder.iterdir() if p.is_file()} == {
        "train.txt": "new",
        "test.txt": "new",
        "notes.md": "old",
    }
    assert (folder / "images").is_dir()
