"""A folder of lists -> a dataset, and what can be wrong with it."""

import numpy as np
import pytest
import yaml
from conftest import make_dataset

from reslt.datasets import check_images, load_dataset, read_info
from reslt.errors import UserError
from reslt.sources import DATA_LISTS


def test_counts_classes_and_groups_are_derived_from_the_lists(tmp_path):
    dataset = load_dataset(str(make_dataset(tmp_path / "d", counts=(30, 20, 3))))
    assert dataset.num_classes == 3
    assert dataset.images_per_class.tolist() == [30, 20, 3]
    assert dataset.class_names is None
    groups = dataset.shot_groups["standard"]
    assert [groups[s].tolist() for s in ("many", "medium", "few")] == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_info_yaml_is_not_needed(tiny):
    (tiny / "info.yaml").unlink()
    assert load_dataset(str(tiny), str(tiny / "images")).num_classes == 3


def test_a_paper_split_stands_beside_the_standard_one(tiny):
    info = {"image_root": "images", "paper_split": {"by": "rank", "many": 1, "medium": 1, "few": 1}}
    (tiny / "info.yaml").write_text(yaml.safe_dump(info))
    groups = load_dataset(str(tiny)).shot_groups
    assert list(groups) == ["standard", "paper"]
    assert groups["paper"]["few"].tolist() == [False, False, True]


def write(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train.txt").unlink(), r"train\.txt does not exist; .*reslt\.prepare"),
        (lambda d: write(d, "test.txt", "test/0/0.png 3\n"), r"test\.txt:1: label 3 is outside 0\.\.2"),
        (lambda d: write(d, "train.txt", "train/0/0.png 0\ntrain/2/0.png 2\n"), r"class 1 has no training image"),
        (lambda d: write(d, "train.txt", "train/0/0.png 0\ntrain\n"), r"train\.txt:2: no label: 'train'"),
        (lambda d: write(d, "info.yaml", "image_root: nowhere"), r"image root .*nowhere.* is not a folder.*--data-dir"),
        (lambda d: write(d, "info.yaml", "image_rot: images"), r"info\.yaml: unknown key 'image_rot'; known"),
        (
            lambda d: write(d, "train.txt", "train/0/0.png 0\ntrain/2/0.png 999999999\n"),
            r"class 1 has no training image",
        ),
        (
            lambda d: write(d, "train.txt", "train/0/0.png 1\ntrain/2/0.png 2\n"),
            r"class 0 has no training image \(1 such",
        ),
        (lambda d: write(d, "train.txt", "train/0/0.png 0\n"), r"at least 2 classes"),
        (lambda d: write(d, "info.yaml", "num_classes: true"), r"at least 2 classes.*True"),
        (lambda d: write(d, "info.yaml", "class_names: [a, no, b]"), r"class_names must be a list of different texts"),
        (lambda d: write(d, "info.yaml", "images: [a]"), r"images must be the name of a folder"),
        (lambda d: write(d, "info.yaml", "num_classes: 3\nnum_classes: 4"), r"'num_classes' stands twice"),
        (lambda d: write(d, "info.yaml", "num_classes: 4"), r"class 3 has no training image"),
        (lambda d: write(d, "info.yaml", "num_classes: 2"), r"label 2 is outside 0\.\.1"),
        (lambda d: write(d, "info.yaml", "class_names: [a, b, a]"), r"class_names must be a list of different texts"),
        (
            lambda d: write(d, "info.yaml", "num_classes: 3\nclass_names: [a, b]"),
            r"num_classes is 3, but class_names has 2",
        ),
        (
            lambda d: write(d, "info.yaml", "shot_split: {by: rank, many: 9, medium: 0, few: 0}"),
            r"info\.yaml: shot_split: .*add up to 9, but .* 3",
        ),
        (
            lambda d: write(d, "info.yaml", "shot_split: 3"),
            r"info\.yaml: shot_split: shot split 3: it must be \{by: count",
        ),
        (lambda d: write(d, "local.yaml", "root: x"), r"local\.yaml: unknown key 'root'"),
    ],
)
def test_a_fault_names_place_value_and_remedy(tiny, damage, message):
    damage(tiny)
    with pytest.raises(UserError, match=message):
        load_dataset(
            str(tiny), None if (tiny / "info.yaml").read_text() == "image_root: nowhere" else str(tiny / "images")
        )


def test_the_image_root_is_looked_for_in_a_fixed_order(tiny, tmp_path, monkeypatch):
    for name in ("flag", "all/pictures", "local"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.delenv("RESLT_DATA", raising=False)
    info = {"image_root": "images", "images": "pictures"}
    write(tiny, "info.yaml", yaml.safe_dump(info))
    assert load_dataset(str(tiny)).image_root.folder == tiny / "images"
    write(tiny, "local.yaml", yaml.safe_dump({"image_root": str(tmp_path / "local")}))
    assert load_dataset(str(tiny)).image_root.folder == tmp_path / "local"
    monkeypatch.setenv("RESLT_DATA", str(tmp_path / "all"))
    assert load_dataset(str(tiny)).image_root.folder == tmp_path / "all/pictures"
    assert load_dataset(str(tiny), str(tmp_path / "flag")).image_root.folder == tmp_path / "flag"


def test_lists_that_do_not_match_the_folder_are_noticed_early(tiny):
    dataset = load_dataset(str(tiny))
    check_images(dataset, ["train", "test"])
    (dataset.image_root.folder / "train/1/5.png").unlink()
    with pytest.raises(UserError, match=r"train\.txt:22: there is no image .*train/1/5\.png.*--data-dir"):
        check_images(dataset, ["test", "train"])


def test_lists_to_evaluate(tmp_path):
    both = load_dataset(str(make_dataset(tmp_path / "both", splits=("val", "test"))))
    test_only = load_dataset(str(make_dataset(tmp_path / "test_only")))
    neither = load_dataset(str(make_dataset(tmp_path / "neither", splits=())))
    assert both.eval_splits(None) == ["val"]
    assert both.eval_splits("both") == ["val", "test"]
    assert test_only.eval_splits(None) == ["test"]
    assert neither.eval_splits(None) == []
    with pytest.raises(UserError, match=r"--eval-split val: .*val\.txt does not exist"):
        test_only.eval_splits("val")


def test_labels_stay_as_compact_as_the_list(tiny):
    assert load_dataset(str(tiny)).lists["train"].labels.dtype == np.int32


@pytest.mark.parametrize(("name", "most"), [("cifar10", 5000), ("cifar100", 500)])
@pytest.mark.parametrize("factor", [0.01, 0.02, 0.1])
def test_the_stated_training_images_are_those_of_the_imbalance_factor(name, most, factor):
    """Class c of C keeps int(most x factor^(c / (C - 1))) images (Cui et al. 2019)."""
    classes = int(name.removeprefix("cifar"))
    info = read_info(DATA_LISTS / f"{name}_lt_{factor}")
    assert info["training_images"] == sum(int(most * factor ** (c / (classes - 1))) for c in range(classes))
