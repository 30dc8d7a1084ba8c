"""Preparing datasets: making long-tailed subsets, drawing the digits, and adopting existing lists."""

import hashlib
import pickle

import numpy as np
import pytest
import yaml
from conftest import make_dataset
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from reslt.config.places import DESCRIPTIONS
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.data.lists import read_list
from reslt.prepare import subsets
from reslt.prepare.__main__ import main
from reslt.prepare.subsets import cifar_subset, kept_per_class


def paths(file) -> list[str]:
    images = read_list(file)
    return [images.path(i) for i in range(len(images))]


@pytest.mark.parametrize(
    ("n_max", "classes", "factor", "total"),
    [
        (500, 100, 0.01, 10_847), (500, 100, 0.02, 12_608), (500, 100, 0.1, 19_573),
        (5000, 10, 0.01, 12_406), (5000, 10, 0.02, 13_996), (5000, 10, 0.1, 20_431),
    ],
)  # fmt: skip
def test_cifar_lt_has_the_published_sizes(n_max, classes, factor, total):
    assert kept_per_class(n_max, classes, factor).sum() == total
    chosen = cifar_subset(np.repeat(np.arange(classes), n_max), factor)
    assert len(chosen) == len(set(chosen.tolist())) == total


def test_the_digits_have_276_training_and_797_test_images_and_none_is_in_both_lists(project):
    main(["digits_lt"])
    dataset = load_dataset("digits_lt")
    assert dataset.images_per_class.tolist() == [100, 64, 41, 27, 17, 11, 7, 4, 3, 2]
    assert len(dataset.lists["train"]) == 276
    assert len(dataset.lists["test"]) == 797
    classes = {group: members.sum() for group, members in dataset.shot_groups["standard"].items()}
    assert classes == {"many": 3, "medium": 3, "few": 4}
    train, test = (paths(dataset.lists[split].file) for split in ("train", "test"))
    assert not {path.removeprefix("train/") for path in train} & {path.removeprefix("test/") for path in test}
    for path in (train[0], test[-1]):
        with Image.open(dataset.image_root.folder / path) as image:
            assert image.size == (32, 32)
    assert [path.name for path in (project / "data").iterdir()] == ["digits_lt"]


def test_the_embedded_dataset_is_made_only_at_its_first_use(project):
    subsets.make_if_embedded("digits_lt")
    lists = project / "data_lists/digits_lt"
    before = (lists / "train.txt").stat().st_mtime_ns
    subsets.make_if_embedded("digits_lt")
    subsets.make_if_embedded("something_else")
    assert (lists / "train.txt").stat().st_mtime_ns == before


def test_a_failure_while_images_are_drawn_leaves_neither_lists_nor_partial_images(project, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            subsets.make_if_embedded("digits_lt")
    assert not [path for path in (project / "data").rglob("*") if path.is_file()]
    assert not (project / "data_lists/digits_lt/train.txt").exists()
    subsets.make_if_embedded("digits_lt")
    assert len(list((project / "data").rglob("*.png"))) == 276 + 797


def test_the_subset_is_drawn_as_by_the_published_code():
    """After np.random.seed(0), that code shuffles the indices of each class in place and keeps the first n."""
    labels = np.random.RandomState(7).permutation(np.repeat(np.arange(10), 50))
    np.random.seed(0)
    expected = []
    for c in range(10):
        indices = np.where(labels == c)[0]
        np.random.shuffle(indices)
        expected.extend(indices[: int(50 * (0.1 ** (c / 9.0)))])
    assert cifar_subset(labels, 0.1).tolist() == expected


def fake_cifar10(folder, monkeypatch) -> np.ndarray:
    """Write an archive in CIFAR-10's format with 50 + 10 images of 10 classes, and return the training labels."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    generator, digests, all_labels = np.random.RandomState(0), {}, []

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((base / name).read_bytes()).hexdigest()

    for name, count in [(f"data_batch_{i}", 10) for i in range(1, 6)] + [("test_batch", 10)]:
        labels = generator.permutation(np.arange(count) % 10).tolist()
        all_labels += labels
        write(name, {"data": generator.randint(0, 256, (count, 3072), dtype=np.uint8), "labels": labels})
    names = yaml.safe_load((DESCRIPTIONS / "cifar10_lt_0.1/info.yaml").read_text())["class_names"]
    write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", digests[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    )
    return np.array(all_labels[:50])


def test_an_archive_of_cifar_becomes_png_files_and_lists(project, tmp_path, monkeypatch, capsys):
    labels = fake_cifar10(tmp_path / "archive", monkeypatch)
    stale = project / "data_lists/cifar10_lt_0.4/local.yaml"
    stale.parent.mkdir()
    stale.write_text(f"image_root: {tmp_path}")  # belongs to lists with other file names that were adopted earlier
    main(["cifar10", "--imb-factor", "0.4", "--source", str(tmp_path / "archive")])
    dataset = load_dataset("cifar10_lt_0.4")
    assert dataset.images_per_class.tolist() == [int(5 * 0.4 ** (c / 9)) for c in range(10)]
    assert dataset.image_root.folder == project / "data/cifar10"
    chosen = [int(p.split("/")[-1].removesuffix(".png")) for p in paths(dataset.lists["train"].file)]
    assert chosen == cifar_subset(labels, 0.4).tolist()
    assert labels[chosen].tolist() == dataset.lists["train"].labels.tolist()
    original = CIFAR10(str(tmp_path / "archive"), train=True).data
    with Image.open(dataset.image_root.folder / dataset.lists["train"].path(3)) as image:
        assert np.array_equal(np.asarray(image), original[chosen[3]])
    assert "train with: accelerate launch train.py --data cifar10_lt_0.4" in capsys.readouterr().out


def test_without_an_archive_and_network_access_the_error_states_the_remedy(project, tmp_path, monkeypatch):
    def download(self):
        (tmp_path / "nothing").mkdir()
        raise OSError("no network")

    monkeypatch.setattr(CIFAR100, "download", download)
    with pytest.raises(UserError, match=r"no network; without network access, put cifar-100-python/ .*--source"):
        subsets.make_cifar("cifar100", 0.01, tmp_path / "nothing")
    assert not (project / "data/cifar100").exists()
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def balanced(tmp_path):
    source = make_dataset(tmp_path / "made", counts=(12, 12, 12, 9), test_images=2) / "images"
    for split in ("train", "test"):
        for c, name in enumerate(["auk", "gull ß", "owl", "tern"]):
            (source / split / str(c)).rename(source / split / name)
    return source


@pytest.mark.parametrize(("profile", "counts"), [("exp", [12, 5, 2, 1]), ("step", [12, 12, 1, 1])])
def test_longtail_keeps_at_most_as_many_images_as_the_profile_states(project, balanced, profile, counts):
    """The profile exp keeps int(12 x 0.1^(c/3)) = 12, 5, 2, 1 images."""
    arguments = ["--from", str(balanced), "--imb-factor", "0.1", "--profile", profile]
    main(["longtail", *arguments, "--name", "birds"])
    dataset = load_dataset("birds")
    assert dataset.images_per_class.tolist() == counts
    assert dataset.class_names == ("auk", "gull ß", "owl", "tern")
    assert dataset.image_root.folder == balanced
    assert len(dataset.lists["test"]) == 8
    assert all((balanced / path).is_file() for path in paths(dataset.lists["train"].file))
    same_seed, _ = subsets.make_longtail(balanced, 0.1, profile, 0, "same_seed")
    other_seed, _ = subsets.make_longtail(balanced, 0.1, profile, 1, "other_seed")
    lists = [(folder / "train.txt").read_text() for folder in (dataset.folder, same_seed, other_seed)]
    assert lists[0] == lists[1] != lists[2]


def test_a_class_with_fewer_images_than_the_profile_states_keeps_them_all(project, balanced):
    folder, remarks = subsets.make_longtail(balanced, 1.0, "exp", 0, "all")
    assert remarks == ["images: 53 found = 53 taken + 0 left out + 0 not looked at"]
    assert load_dataset(str(folder)).images_per_class.tolist() == [12, 12, 12, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imb_factor": 0.01}, "the rarest of 4 classes would keep no image of 12"),
        ({"name": "digits_lt"}, "exists"),
        ({"name": "a/b"}, "plain name"),
        ({"source": "nowhere"}, "there is no such folder"),
        ({"source": "images/train"}, "no train/<class>/ folder"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_longtail_refuses_invalid_arguments_and_writes_nothing(project, balanced, change, message):
    arguments = dict(source=balanced, imb_factor=0.1, profile="exp", seed=0, name="new") | change
    arguments["source"] = balanced.parent / arguments["source"]
    with pytest.raises(UserError, match=message):
        subsets.make_longtail(**arguments)
    assert not (project / "data_lists/new").exists()


def test_an_empty_class_folder_is_named(project, balanced):
    (balanced / "train/zebra finch").mkdir()
    with pytest.raises(UserError, match="zebra finch: the class has no image"):
        subsets.make_longtail(balanced, 0.1, "exp", 0, "new")


def test_lists_of_another_imbalance_factor_are_not_adopted(project, tiny):
    with pytest.raises(UserError, match=r"28 images of 3 classes are not cifar100 .* 10847 of 100"):
        subsets.adopt_cifar("cifar100", 0.01, tiny, tiny / "images")
    assert not (project / "data_lists/cifar100_lt_0.01/train.txt").exists()


@pytest.mark.parametrize("factor", ["0.01", "0.02", "0.1"])
def test_real_lists_are_adopted_unchanged(project, real_images, factor):
    source = real_images / f"lists/cifar100_lt_{factor}"
    arguments = ["--lists", str(source), "--data-dir", str(real_images / "cifar100")]
    main(["cifar100", "--imb-factor", factor, *arguments])
    dataset = load_dataset(f"cifar100_lt_{factor}")
    assert (dataset.folder / "train.txt").read_bytes() == (source / "train.txt").read_bytes()
    assert dataset.image_root.folder == real_images / "cifar100"
    assert dataset.class_names[int(dataset.lists["test"].labels[-1])] in dataset.lists["test"].path(9_999)
    classes = {group: members.sum() for group, members in dataset.shot_groups["standard"].items()}
    assert classes == {"many": 35, "medium": 35, "few": 30}


def test_a_recipe_trains_and_evaluates_on_real_images(project, real_images, tmp_path, run_script, monkeypatch):
    """The recipe of CIFAR-100-LT 0.01 takes two steps; every tenth image of the test list is evaluated."""
    monkeypatch.setenv("RESLT_DATA", str(real_images))
    main(["cifar100", "--imb-factor", "0.01", "--lists", str(real_images / "lists/cifar100_lt_0.01")])
    (test,) = project.glob("data_lists/cifar100_lt_0.01/test.txt")
    test.write_text("".join(test.read_text().splitlines(keepends=True)[::10]))
    common = ["--workers", 0, "--limit-train", 256, "--epochs", 1, "--output", tmp_path, "--experiment", "run"]
    trained = run_script(
        "train", "--recipe", "cifar100_lt_0.01/resnet32", "--data-dir", real_images / "cifar100", *common
    )
    assert trained.code == 0, trained.err
    assert "test list (1,000 images), epoch 1" in trained.out
    assert "the paper, table 5:  all 45.34" in trained.out
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "run", "--data-dir", real_images / "cifar100")
    assert evaluated.code == 0, evaluated.err
    line = next(line for line in evaluated.out.splitlines() if line.startswith("reslt (fused)"))
    assert line in trained.out
