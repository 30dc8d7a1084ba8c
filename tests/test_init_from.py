"""`--init-from`: the trained tensors that a model takes over, class by class, and those that stay as initialized."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from builders import model_of, settings_of
from conftest import TINY_FLAGS, fault, make_dataset
from safetensors.torch import load_file, save_file
from torch import nn

from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.models.fitting import fitting
from reslt.models.fold import fold, save_folded
from reslt.reproduce.first_stage import share_first_stages
from reslt.reproduce.rows import of_recipes, parse_varied
from reslt.runs import checkpoint
from reslt.runs.init_from import initialize

SMALL = {"channels": (2, 4, 8)}
ANIMALS, OTHERS = ("cat", "dog", "eel"), ("eel", "ant", "cat", "fox")  # eel: row 2, cat: row 0, ant and fox: new


def settings(**changes) -> Config:
    return Config.of(**{"model": "cifar_resnet20", "model_kwargs": SMALL, "img_size": 16, "method": "ce"} | changes)


def model(seed: int, classes: int = 3, **changes) -> nn.Module:
    """Return a network whose tensors, including branches and BatchNorm statistics, all differ from seed to seed."""
    torch.manual_seed(seed)
    made = model_of(settings(**changes), classes)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return made


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def named(names) -> Classes:
    return Classes(len(names), tuple(names))


def write_run(run: Path, classes: Classes, epoch: int = 2, pointer: str = "last", **parts: nn.Module) -> Path:
    state = {"epochs_done": epoch, "steps_done": epoch, "config": {}, "optimizer": {"state": {}, "param_groups": []}}
    tensors = {part: module.state_dict() for part, module in parts.items()}
    checkpoint.write(run / f"checkpoints/{epoch}-{epoch}", tensors, state | {"scaler": None} | classes.stored())
    (run / "checkpoints" / pointer).write_text(f"{epoch}-{epoch}\n")
    return run


def write_folded(file: Path, source: nn.Module, classes: Classes, **changes) -> Path:
    config = settings(**changes)
    images = settings_of(config, {"input_size": (3, 16, 16), "mean": (0, 0, 0), "std": (1, 1, 1)} | REST)
    save_folded(fold(source, config.augment.img_size)[0], config.model, config.method, images, classes, file)
    return file


REST = {"interpolation": "bilinear", "crop_pct": 1.0}


def assert_taken(now: dict, source: dict, prefix: str, other: str | None = None) -> None:
    """Assert that all tensors below `prefix`, except the classifier's, equal those of the source below `other`."""
    names = [name for name in now if name.startswith(prefix) and ".fc." not in name]
    assert names
    for name in names:
        assert torch.equal(now[name], source[name.replace(prefix, other or prefix, 1)]), name


def assert_kept(now: dict, before: dict, prefix: str) -> None:
    names = [name for name in now if name.startswith(prefix)]
    assert names
    assert all(torch.equal(now[name], before[name]) for name in names)


def test_classifier_rows_follow_the_names_of_classes_and_rows_of_new_classes_stay_as_initialized(tmp_path):
    source, target = model(1), model(2, 4)
    run, before = write_run(tmp_path / "run", named(ANIMALS), model=source), values(target)
    _, text = initialize(target, str(run), named(OTHERS))
    now = values(target)
    assert_taken(now, values(source), "backbone.")
    for tensor in ("backbone.fc.weight", "backbone.fc.bias"):
        trained = source.state_dict()[tensor]
        wanted = torch.stack([trained[2], before[tensor][1], trained[0], before[tensor][3]])
        assert torch.equal(now[tensor], wanted)
    assert text == f"{run} (epoch 2): 95 weights; classifier: 2 of 4 rows; new: 2 classifier rows (ant, fox)"


@pytest.mark.parametrize(
    ("of_run", "of_data", "taken"),
    [
        (Classes(3), Classes(3), " rows by index"),
        (Classes(3), named(ANIMALS), None),  # the same number of classes does not make them the same
        (named(ANIMALS), Classes(3), None),
        (named(ANIMALS), named(["x", "y", "z"]), None),
        (Classes(3, lists={"train": "a"}), Classes(3, ANIMALS, lists={"train": "a"}), " rows"),  # an old run's own list
    ],
)
def test_rows_are_matched_by_index_only_if_neither_side_names_its_classes(tmp_path, of_run, of_data, taken):
    source, target = model(1), model(2)
    run, before = write_run(tmp_path / "run", of_run, model=source), values(target)
    _, text = initialize(target, str(run), of_data)
    now = values(target)
    assert torch.equal(now["backbone.fc.weight"], (values(source) if taken else before)["backbone.fc.weight"])
    assert text.endswith(f"classifier: 3 of 3{taken}") if taken else "new: classifier" in text


def test_the_classifier_is_new_if_unnamed_classes_differ_in_number(tmp_path):
    target, run = model(2, 2), write_run(tmp_path / "run", Classes(3), model=model(1))
    before = values(target)
    assert "new: classifier" in initialize(target, str(run), Classes(2))[1]
    assert_kept(values(target), before, "backbone.fc.")


RESLT = {"method": "reslt", "branch": "bn"}


@pytest.mark.parametrize(
    ("of_source", "of_target", "ending"),
    [
        ({}, RESLT, "; new: branches (4 weights)"),
        (RESLT, {}, "; left out: branches"),
        (RESLT, RESLT, "rows"),
        (RESLT, {"method": "reslt", "branch": "conv"}, "; new: branches (5 weights)"),
        (RESLT, RESLT | {"branches": 4}, "; new: branches (4 weights)"),  # the statistics alone would fit
    ],
)
def test_a_plain_model_and_a_reslt_model_start_from_each_other(tmp_path, of_source, of_target, ending):
    source, target = model(1, **of_source), model(2, **of_target)
    run, before = write_run(tmp_path / "run", named(ANIMALS), model=source), values(target)
    _, text = initialize(target, str(run), named(ANIMALS))
    now = values(target)
    assert_kept(now, values(source), "backbone.")  # its classifier too
    if of_target is RESLT and of_source is RESLT:
        assert_taken(now, values(source), "branches.")
    elif of_target:
        assert_kept(now, before, "branches.")
    assert text.endswith(ending)


@pytest.mark.parametrize("width", [0.75, 1.0])
def test_experts_start_from_one_network_with_classifiers_of_their_own(tmp_path, width):
    """Late stages of another width are new. Experts that also had the same classifier would stay identical."""
    source, target = model(1), model(2, experts=2, expert_width=width)
    run, before = write_run(tmp_path / "run", named(ANIMALS), model=source), values(target)
    _, text = initialize(target, str(run), named(ANIMALS))
    now = values(target)
    assert_taken(now, values(source), "shared.", "backbone.")
    for e in range(2):
        assert_kept(now, before, f"experts.{e}.backbone.fc.")
        if width == 1:
            assert_taken(now, values(source), f"experts.{e}.backbone.", "backbone.")
        else:
            assert_kept(now, before, f"experts.{e}.backbone.")
    assert ("late stages of experts (120 weights)" in text) == (width != 1)
    assert "classifier" in text


def test_experts_start_from_experts_and_one_network_from_the_first_of_them(tmp_path):
    source = model(1, experts=2, expert_width=1)
    run = write_run(tmp_path / "run", named(ANIMALS), model=source)
    target, one = model(2, experts=3, expert_width=1), model(3)
    before = values(target)
    _, text = initialize(target, str(run), named(ANIMALS))
    for prefix in ("shared.", "experts.0.", "experts.1."):
        assert_kept(values(target), values(source), prefix)
    assert_kept(values(target), before, "experts.2.")
    assert text.endswith("new: late stages of experts (60 weights), 1 of 3 classifiers")
    assert initialize(one, str(run), named(ANIMALS))[1].endswith("rows; left out: 1 of 2 experts")
    assert_taken(values(one), values(source), "backbone.layer1.", "shared.layer1.")
    assert_kept(values(one), {n.replace("experts.0.", ""): t for n, t in values(source).items()}, "backbone.layer3.")


def test_the_weights_are_those_that_evaluation_would_use(tmp_path):
    """The moving average, if there is one, of the best checkpoint, if validation chose one; a path may name others."""
    seeds = {name: model(seed) for seed, name in enumerate(["last", "last_ema", "best", "best_ema"], 1)}
    run = write_run(tmp_path / "run", named(ANIMALS), model=seeds["last"], ema=seeds["last_ema"])
    places = {"last_ema": run, "last": run / "checkpoints/2-2/model.safetensors"}

    def assert_starts_from(name: str, place: Path) -> None:
        target = model(9)
        initialize(target, str(place), named(ANIMALS))
        assert_kept(values(target), values(seeds[name]), "")

    for name, place in places.items():
        assert_starts_from(name, place)
    write_run(run, named(ANIMALS), 1, "best", model=seeds["best"], ema=seeds["best_ema"])
    assert_starts_from("best_ema", run)
    assert_starts_from("last_ema", run / "checkpoints/last")
    assert initialize(model(9), str(run), named(ANIMALS))[1].startswith(f"{run} (epoch 1, moving average): ")


def test_the_digest_depends_on_the_weights_not_on_their_place(tmp_path):
    trained = model(1)
    runs = [write_run(tmp_path / name, named(ANIMALS), model=trained) for name in ("a", "b")]
    other = write_run(tmp_path / "other", named(ANIMALS), model=model(2))
    digests = [initialize(model(9), str(run), named(ANIMALS))[0] for run in (*runs, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 16


def test_a_folded_file_starts_a_plain_model_with_the_folded_classifier(tmp_path):
    source, target = model(1, **RESLT).eval(), model(2).eval()
    file = write_folded(tmp_path / "f.safetensors", source, named(ANIMALS), **RESLT)
    _, text = initialize(target, str(file), named(ANIMALS))
    assert text == f"{file} (folded): 95 weights; classifier: 3 of 3 rows"
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(target(images)[0], source(images).sum(0), rtol=1e-4, atol=1e-4)


def test_a_file_with_folded_convolutions_gives_its_backbone_and_leaves_the_branches_new(tmp_path):
    """Folded branches lack the BatchNorm that they were trained with."""
    conv = {"method": "reslt", "branch": "conv"}
    source, target = model(1, **conv), model(2, **conv)
    before = values(target)
    file = write_folded(tmp_path / "f.safetensors", source, named(ANIMALS), **conv)
    _, text = initialize(target, str(file), named(ANIMALS))
    assert_taken(values(target), values(source), "backbone.")
    assert torch.equal(target.backbone.fc.weight, source.backbone.fc.weight)
    assert_kept(values(target), before, "branches.")
    assert text.endswith("; new: branches (5 weights)")


def test_folded_experts_are_taken_one_by_one(tmp_path):
    """Depending on its branches, an expert is folded into a Fused, a FoldedResLT or a plain model."""
    for changes in (RESLT, {"method": "reslt", "branch": "conv"}, {}):
        source, target = model(1, experts=2, **changes), model(2, experts=2, **changes)
        file = write_folded(tmp_path / "f.safetensors", source, named(ANIMALS), experts=2, **changes)
        initialize(target, str(file), named(ANIMALS))
        assert_taken(values(target), values(source), "shared.")
        for e in range(2):
            assert_taken(values(target), values(source), f"experts.{e}.backbone.")


def test_branches_that_cannot_be_folded_are_taken_from_a_folded_file(tmp_path):
    """ConvNeXt's head is more than pooling and one layer, so its `bn` branches are not folded."""
    changes = RESLT | {
        "model": "convnext_atto",
        "model_kwargs": {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)},
        "img_size": 64,
    }
    source, target = model(1, **changes), model(2, **changes)
    file = write_folded(tmp_path / "f.safetensors", source, named(ANIMALS), **changes)
    initialize(target, str(file), named(ANIMALS))
    assert_kept(values(target), values(source), "")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_weights_fill_the_backbone_and_leave_the_classifier_new(tmp_path, ending):
    source, target = model(1), model(2)
    file, before = tmp_path / f"w.{ending}", values(target)
    tensors = values(source.backbone)
    save_file(tensors, file) if ending == "safetensors" else torch.save({"state_dict": tensors}, file)
    _, text = initialize(target, str(file), named(ANIMALS))
    assert_taken(values(target), values(source), "backbone.")
    assert_kept(values(target), before, "backbone.fc.")
    assert text == f"{file}: 95 weights; new: classifier (the classes of its rows are unknown)"


def test_timm_weights_of_another_input_size_are_converted(tmp_path):
    """The inputs have 16 and 4 patches of 8 x 8 pixels; timm resizes the position embeddings."""
    kwargs = {"embed_dim": 8, "num_heads": 2, "depth": 1, "patch_size": 8}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, **kwargs)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    target = model_of(settings(model="vit_tiny_patch16_224", model_kwargs=kwargs, img_size=16), 3)
    initialize(target, str(tmp_path / "vit.safetensors"), named(ANIMALS))
    assert torch.equal(target.backbone.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert target.backbone.pos_embed.shape == (1, 5, 8)


class Scaled(nn.Linear):
    """A linear head with one more parameter, which has a row per class, and one more statistic, which has none."""

    def __init__(self):
        super().__init__(8, 3)
        self.scales = nn.Parameter(torch.rand(3))
        self.register_buffer("running_mean", torch.rand(3))


def test_heads_of_different_kinds_exchange_the_tensors_of_the_same_name():
    linear, scaled = model(1), model(2)
    scaled.backbone.fc = Scaled()
    rows = np.array([2, -1, 0])
    found = fitting(scaled, values(linear), rows)
    assert set(found.new_in_classifier) == {"scales"}
    assert torch.equal(found.tensors["backbone.fc.weight"][[0, 2]], linear.backbone.fc.weight[[2, 0]])
    assert found.tensors.keys().isdisjoint({"backbone.fc.scales", "backbone.fc.running_mean"})
    assert fitting(linear, values(scaled), rows).left_out == {
        "scales of the classifier",
        "running_mean of the classifier",
    }
    other = model(3)
    other.backbone.fc = Scaled()
    found = fitting(other, values(scaled), rows)
    assert torch.equal(found.tensors["backbone.fc.scales"][[0, 2]], scaled.backbone.fc.scales[[2, 0]])
    assert torch.equal(
        found.tensors["backbone.fc.running_mean"], scaled.backbone.fc.running_mean
    )  # the same for all classes


def test_the_classifier_is_new_if_a_file_lacks_the_rows_of_its_classes(tmp_path):
    """The state.json of this run states more classes than its classifier has rows."""
    run, target = write_run(tmp_path / "run", named([*"abcdef", *ANIMALS]), model=model(1)), model(2)
    before = values(target)
    assert "new: classifier" in initialize(target, str(run), named(ANIMALS))[1]
    assert_kept(values(target), before, "backbone.fc.")


@pytest.mark.parametrize(
    ("of_target", "message"),
    [
        ({"model_kwargs": {"channels": (2, 4, 6)}}, r"30 of 95 weights .*backbone\.layer3\.0\.conv1\.weight \(6, 4, 3, 3\) has shape \(8, 4"),
        ({"model": "cifar_resnet32"}, r"backbone\.layer1\.3\.conv1\.weight \(2, 2, 3, 3\) is not in it"),
        ({"model": "resnet18", "model_kwargs": {}}, r"backbone\.conv1\.weight \(64, 3, 7, 7\) has shape"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused(tmp_path, of_target, message):
    run = write_run(tmp_path / "run", named(ANIMALS), model=model(1))
    with pytest.raises(
        UserError, match=rf"--init-from {run}: .*{message}.*; does it belong to another --model or --network\?"
    ):
        initialize(model(2, **of_target), str(run), named(ANIMALS))


def test_weights_of_a_deeper_model_are_refused_although_some_would_fit(tmp_path):
    run = write_run(tmp_path / "run", named(ANIMALS), model=model(1, model="cifar_resnet32"))
    with pytest.raises(UserError, match=r"contains 60 weights that the model lacks, first backbone\.layer1\.3\."):
        initialize(model(2), str(run), named(ANIMALS))


def test_weights_that_are_not_finite_and_paths_without_weights_are_refused(tmp_path):
    broken = model(1)
    broken.backbone.layer2[0].bn1.weight.data[1] = float("nan")
    run = write_run(tmp_path / "run", named(ANIMALS), model=broken)
    with pytest.raises(UserError, match=r"backbone\.layer2\.0\.bn1\.weight is not finite"):
        initialize(model(2), str(run), named(ANIMALS))
    (tmp_path / "notes.txt").write_text("no weights")
    for place, message in ((tmp_path, "there is no checkpoint"), (tmp_path / "notes.txt", "give a file of weights")):
        with pytest.raises(UserError, match=f"--init-from {place}: .*{message}"):
            initialize(model(2), str(place), named(ANIMALS))


def test_an_impossible_or_contradictory_source_is_an_error_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", named(ANIMALS), model=model(1))
    assert "init_from: there is no file or folder gone; give the folder of a run" in fault("--init-from", "gone")
    assert "2 errors" in fault("--init-from", "gone", "--lr", "0")
    contradiction = fault("--init-from", run, "--pretrained")
    assert "init_from: contradicts --pretrained, which names other weights to start from; drop one" in contradiction
    (tmp_path / "w.pth").touch()
    assert "contradicts --pretrained-file" in fault("--init-from", run, "--pretrained-file", "w.pth")
    (run / "config.yaml").touch()
    replaced = fault("--init-from", "run/checkpoints", "--output", ".", "--experiment", "run", "--overwrite")
    assert "run/checkpoints is in the run that --overwrite replaces" in replaced
    (tmp_path / "r.yaml").write_text(f"init_from: {run}\n")
    assert "r.yaml: init_from: a file cannot set it; give it as a flag, --init-from" in fault("--recipe", "r.yaml")
    (make_dataset(tmp_path / "d") / "info.yaml").write_text(f"defaults: {{init_from: {run}}}\n")
    assert "info.yaml: init_from: a file cannot set it" in fault("--data", tmp_path / "d")


def test_a_typed_init_from_replaces_the_pretrained_weights_of_a_recipe(tmp_path):
    run = write_run(tmp_path / "run", named(ANIMALS), model=model(1))
    (tmp_path / "r.yaml").write_text("pretrained: true\npretrained_file: gone.pth\n")
    config = resolve(["--recipe", str(tmp_path / "r.yaml"), "--init-from", str(run)]).config
    assert (config["init_from"], config["pretrained"], config["pretrained_file"]) == (str(run), False, None)
    assert "gone.pth" in fault("--recipe", tmp_path / "r.yaml", "--init-from", "none")


@pytest.mark.parametrize("resume", ["auto", "runs/mine"])
def test_a_missing_source_matters_only_to_a_run_that_has_no_checkpoint_yet(tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    arguments = ["--init-from", "gone", "--output", "runs", "--experiment", "mine", "--resume", resume]
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").touch()
    assert "there is no file or folder gone" in fault(*arguments)
    write_run(tmp_path / "runs/mine", named(ANIMALS), model=model(1))
    assert resolve(arguments).config["init_from"] == "gone"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("of_source") / "source", named(ANIMALS), model=model(1))


def test_a_run_records_its_source_and_resumes_without_it(tmp_path, run_script, source):
    """The learning rate is so small that a step changes no bit of a weight around 1, so the first epoch's checkpoint
    contains the source's weights."""
    data = make_dataset(tmp_path / "d")
    info = yaml.safe_load((data / "info.yaml").read_text()) | {"class_names": list(ANIMALS)}
    (data / "info.yaml").write_text(yaml.safe_dump(info))
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    flags = ["--data", data, "--output", tmp_path, "--experiment", "run", *TINY_FLAGS, "--method", "ce"]
    flags += ["--model-kwargs", "channels=2,4,8", "--lr", "1e-20", "--weight-decay", "0"]
    trained = run_script("train", *flags, "--init-from", copied)
    assert trained.code == 0, trained.err
    run = tmp_path / "run"
    assert f"\ninit    {copied} (epoch 2): 95 weights; classifier: 3 of 3 rows\n" in f"\n{trained.out}"
    before = load_file(run / "checkpoints/1-3/model.safetensors")
    now, wanted = dict(before), values(model(1))
    assert all(
        torch.equal(now[name], wanted[name]) for name in now if not name.split(".")[-1].startswith(("run", "num"))
    )
    described, result = yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "result.json").read_text())
    state = json.loads((run / "checkpoints/1-3/state.json").read_text())
    assert described["config"]["init_from"] == state["config"]["init_from"] == str(copied)
    digest = result["init_digest"]
    assert len(digest) == 16
    assert described["init_digest"] == state["config"]["init_digest"] == digest

    shutil.rmtree(copied)
    shutil.rmtree(run / "checkpoints/2-6")
    (run / "checkpoints/last").write_text("1-3\n")
    (run / "result.json").unlink()
    other = run_script("train", *flags, "--init-from", source, "--resume", "auto")
    assert other.code == 2
    assert f"init_from: '{copied}' -> '{source}'" in other.err
    resumed = run_script("train", *flags, "--init-from", copied, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "init    " not in resumed.out
    assert json.loads((run / "result.json").read_text())["init_digest"] == digest
    assert run_script("evaluate", "--ckpt", run).code == 0
    assert json.loads((run / "result.json").read_text())["init_digest"] == digest


def test_a_part_that_a_run_states_applies_to_its_shared_first_stage(tmp_path):
    """A cRT run with --cost focal trains both stages with it, and so must a first stage that it shares. The head of LWS
    comes from its method, so the first stage has none."""
    rows, _ = of_recipes(["digits_lt/crt", "digits_lt/lws"]).rows(
        [0], str(tmp_path), [], parse_varied(["cost=focal,ce"])
    )
    first = {}
    for row in share_first_stages(rows, str(tmp_path), []):
        [run] = row.runs
        first[run.recipe, run.config.method.cost] = run.first_stage
    assert first["digits_lt/crt", "focal"] == first["digits_lt/lws", "focal"]
    assert first["digits_lt/crt", "ce"] == first["digits_lt/lws", "ce"]
    assert first["digits_lt/crt", "ce"].recipe == "digits_lt/ce"
    of_focal = first["digits_lt/lws", "focal"].config.method
    assert (of_focal.method, of_focal.cost, of_focal.head) == ("ce", "focal", "linear")
