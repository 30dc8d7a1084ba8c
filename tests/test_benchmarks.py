"""Every large benchmark, from its recipe's name: images laid out as published, each backbone, four steps.

The lists here are short, but have all classes; the descriptions and recipes are the committed ones."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from builders import model_of
from conftest import lay_out

from reslt.config.places import RECIPES, own_folder
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset

LONG_TAIL = {"imagenet_lt": 1000, "places_lt": 365, "inaturalist2018": 8142}


def published_paths(name: str, label: int, number: int) -> dict[str, str]:
    """Return {split: path} of one image of a class in the layout of a benchmark."""
    if name == "imagenet_lt":
        wnid = f"n{label:08d}"
        return {
            "train": f"train/{wnid}/{wnid}_{number}.JPEG",
            "val": f"train/{wnid}/{wnid}_9{number}.JPEG",
            "test": f"val/{wnid}/ILSVRC2012_val_{label:05d}{number:03d}.JPEG",
        }
    if name == "places_lt":
        place = f"{chr(97 + label % 26)}place_{label}"
        return {
            "train": f"train/{place}/{number:08d}.jpg",
            "val": f"train/{place}/9{number:07d}.jpg",
            "test": f"val/{place}/Places365_val_{label:05d}{number:03d}.jpg",
        }
    kind = ("Plantae", "Aves")[label % 2]
    return {
        split: f"train_val2018/{kind}/{label}/{k}{label:015x}{number:016x}.jpg"
        for k, split in enumerate(("train", "test"))
    }


@pytest.fixture
def prepared(project, tmp_path, photo):
    """prepared(name) -> image root: lists under data_lists/<name>, one training image per class and some more of the
    first classes, 20 validation and test images."""

    def make(name: str) -> Path:
        lines, folder = {}, own_folder(name)
        for label in range(LONG_TAIL[name]):
            for number in range(1 + 3 * (label < 4) + (label < 40)):
                for split, path in published_paths(name, label, number).items():
                    if split == "train" or (label < 20 and number == 0):
                        lines.setdefault(folder / f"{split}.txt", []).append((path, label))
        lay_out(tmp_path / "images", lines, photo)
        return tmp_path / "images"

    return make


def short(root: Path, tmp_path: Path, *more) -> list:
    """Return the flags of four steps on two images of 32 pixels each, decoded as larger images are."""
    common = [
        "--data-dir",
        root,
        "--data-on-device",
        "off",
        "--img-size",
        32,
        "--batch-size",
        2,
        "--lr",
        1e-4,
        "--limit-train",
        8,
        "--epochs",
        1,
        "--workers",
        0,
    ]
    return [*common, "--output", tmp_path / "runs", "--experiment", "run", *more]


# recipe, parameters of the plain backbone without classifier, its width D, branches K
BACKBONES = [
    ("imagenet_lt/resnet10", 4_905_792, 512, 3),
    ("imagenet_lt/resnext50", 22_979_904, 2048, 3),
    pytest.param("imagenet_lt/resnext101", 42_128_704, 2048, 3, marks=pytest.mark.slow),
    pytest.param("places_lt/resnet152", 58_143_808, 2048, 3, marks=pytest.mark.slow),
    ("inaturalist2018/resnet50", 23_508_032, 2048, 2),
]


@pytest.mark.parametrize(("recipe", "backbone", "width", "branches"), BACKBONES)
def test_each_backbone_trains_evaluates_and_checks_from_its_recipe(
    prepared, tmp_path, run_script, run_prepare, recipe, backbone, width, branches
):
    """The network has the backbone's parameters, K D^2 of the branches' convolution, 2 K D of their BatchNorm, and
    C (D + 1) of the classifier."""
    name = recipe.split("/")[0]
    root, classes = prepared(name), LONG_TAIL[name]
    checked = run_prepare("check", name, "--data-dir", root, "--decode", "--output", tmp_path / "out", "--workers", 2)
    assert checked.code == 0, checked.out
    outcome = run_script("train", "--recipe", recipe, *short(root, tmp_path, "--no-pretrained"))
    assert outcome.code == 0, outcome.err
    parameters = backbone + branches * width**2 + 2 * branches * width + classes * (width + 1)
    assert f" {parameters / 1e6:.2f} M parameters, " in outcome.out
    assert "test list (20 images), epoch 1" in outcome.out
    has_validation = name != "inaturalist2018"
    assert ("| val  many" in outcome.out) == has_validation  # selection looks at the validation list if there is one
    assert ("the paper's protocol, best epoch on test" in outcome.out) != has_validation
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "runs/run", "--data-dir", root)
    assert evaluated.code == 0, evaluated.err
    assert f"{name}, test list (20 images), epoch 1" in evaluated.out
    assert "the 10 classes with the lowest accuracy" in evaluated.out


@pytest.mark.parametrize(
    ("recipe", "branch_at", "eval_branch_at", "tau"),
    [
        ("imagenet_lt/resnet10_released", "pooled", None, 0.3),
        ("imagenet_lt/resnext50_released", "map", "pooled", 0.7),
        ("imagenet_lt/resnext101_released", "map", "pooled", 0.7),
        ("places_lt/resnet152_released", "map", "pooled", 0.7),
        ("inaturalist2018/resnet50_released", "map", "pooled", 0.0),
        ("inaturalist2018/resnet152_released", "map", "pooled", 0.0),
    ],
)
def test_released_recipes_evaluate_as_the_released_code_does(recipe, branch_at, eval_branch_at, tau):
    config = resolve(["--recipe", recipe]).config
    assert (config["branch_at"], config["eval_branch_at"], config["tau"]) == (branch_at, eval_branch_at, tau)
    plain = resolve(["--recipe", recipe.removesuffix("_released")]).config
    assert (plain["branch_at"], plain["eval_branch_at"], plain["tau"]) == (branch_at, None, None)


def test_replacing_one_argument_of_the_model_keeps_the_recipes_others(project):
    config = resolve(["--recipe", "imagenet_lt/resnet10", "--model-kwargs", "layers=2,1,1,1"]).config
    assert config["model_kwargs"] == {"layers": (2, 1, 1, 1), "zero_init_last": False}


def test_without_a_recipe_a_dataset_trains_with_the_benchmarks_settings(project):
    config = resolve(["--data", "imagenet_lt", "--model", "resnext101_32x4d"]).config
    assert (config["batch_size"], config["lr"], config["epochs"], config["alpha"]) == (128, 0.05, 180, 0.99)
    assert config["model_kwargs"] == {"zero_init_last": False}
    config = resolve(["--data", "inaturalist2018", "--model", "resnet152.tv_in1k"]).config
    assert (config["batch_size"], config["lr"], config["epochs"], config["warmup_epochs"]) == (128, 0.05, 200, 0)
    config = resolve(["--data", "places_lt"]).config
    assert (config["model"], config["pretrained"], config["epochs"]) == ("resnet152.tv_in1k", True, 30)
    config = resolve(["--data", "imagenet_lt", "--model", "vit_small_patch16_224"]).config
    assert (config["batch_size"], config["model_kwargs"]) == (256, {})


class TestPretrainedFile:
    """`--pretrained-file` through `create_model`, for files whose classifier has other classes."""

    def config(self, file, **changes):
        return Config.of(**{"model": "resnet18", "pretrained_file": str(file), "img_size": 32} | changes)

    def test_torchvisions_and_timms_key_names_both_load(self, tmp_path):
        torch.manual_seed(0)
        published = torchvision.models.resnet18()
        torch.save(published.state_dict(), tmp_path / "tv.pth")
        ours = timm.create_model("resnet18")
        torch.save({"state_dict": {f"module.{k}": v for k, v in ours.state_dict().items()}}, tmp_path / "timm.pth")
        for file, source in (("tv.pth", published), ("timm.pth", ours)):
            backbone = model_of(self.config(tmp_path / file), 5).backbone
            assert backbone.fc.out_features == 5
            for key, tensor in source.state_dict().items():
                assert key.startswith("fc.") or torch.equal(backbone.state_dict()[key], tensor), key

    def test_position_embeddings_of_another_input_size_are_interpolated(self, tmp_path):
        """A ViT of 2 x 2 patches into one of 3 x 3: timm interpolates; all other weights are the file's."""
        torch.manual_seed(0)
        small = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        torch.save(small.state_dict(), tmp_path / "vit.pth")
        changes = dict(model="vit_tiny_patch16_224", model_kwargs={"depth": 1}, img_size=48)
        backbone = model_of(self.config(tmp_path / "vit.pth", **changes), 5).backbone
        assert backbone.pos_embed.shape == (1, 10, 192)
        assert torch.equal(backbone.blocks[0].mlp.fc1.weight, small.blocks[0].mlp.fc1.weight)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "resnet34",
                r"1 of 100 weights do not fit ResNet: layer1\.0\.conv1\.weight \(64, 64, 3, 3\) is not in it; does the file belong to",
            ),
            ({"a": torch.zeros(1)}, r"100 of 100 weights do not fit ResNet: bn1\.bias \(64,\) is not in it"),
            ("resnet34 whole", r"it contains \d+ weights that ResNet lacks, first layer1\.2\.bn1"),
            (b"no weights", r"give a file of weights"),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(self, tmp_path, content, message):
        file = tmp_path / "x.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, dict):
            torch.save(content, file)
        else:
            state = torchvision.models.resnet34().state_dict()
            torch.save(
                {k: v for k, v in state.items() if "whole" in content or not k.startswith("layer1.0.conv1")}, file
            )
        with pytest.raises(UserError, match=message):
            model_of(self.config(file), 5)


def test_class_names_come_from_the_paths_if_the_description_says_so(prepared):
    prepared("places_lt")
    dataset = load_dataset("places_lt", images_needed=False)
    assert dataset.class_names[:2] == ("aplace_0", "bplace_1")


def test_classes_are_numbered_if_the_paths_lack_that_part(tiny):
    (tiny / "info.yaml").write_text("image_root: images\nclass_names_from_path: 1\n")
    assert load_dataset(str(tiny)).class_names == ("0", "1", "2")
    (tiny / "info.yaml").write_text("image_root: images\nclass_names_from_path: 5\n")
    assert load_dataset(str(tiny)).class_names == ("0", "1", "2")


OTHERS = "_(crt|lws|tau_norm|mixup|focal|cb_focal|causal|seql|bbn|ldam|ldam_drw|lifted|range|oltr|lfme|plus)$"


def test_every_plain_large_recipe_has_a_row_a_cross_entropy_row_and_the_released_evaluation():
    """Plain: not the strong rows, nor those of experts or of other methods, nor what is beyond the paper."""
    for name in LONG_TAIL:
        found = {p.stem for p in (RECIPES / name).glob("*.yaml")}
        found = {stem for stem in found if not re.search("_(strong|.experts|adjusted|own)|^vitb16_|" + OTHERS, stem)}
        plain = {stem for stem in found if not re.search("_(ce|released)$", stem)}
        assert found == plain | {f"{p}_ce" for p in plain} | {f"{p}_released" for p in plain}
