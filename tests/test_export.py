"""Exported models predict as their runs do: with timm alone, in onnxruntime, as torch programs, and loaded from a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from builders import model_of
from conftest import make_dataset, outcome_of, train_once
from hub import serving
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import reslt
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.deploy.export import check_flags, main, parser, require_replaceable
from reslt.deploy.model_card import Record, model_card
from reslt.deploy.programs import to_onnx, to_torch
from reslt.deploy.timm_folder import TimmModel, require_same
from reslt.models.fold import fold
from reslt.runs.calibration import Calibration, prediction_settings, write_calibration
from reslt.runs.folder import find

SIZE = 32
NARROW = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 16)}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 0.9, "img_size": SIZE}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture
def run(run_script, data) -> Path:
    """Return a run with `bn` branches, which fold into a CIFAR ResNet, and with a temperature, which its seven validation
    images do not determine."""
    run = train_once(run_script, data, "bn", "--epochs", "1", "--val-from-train", "0.25")
    found = find(run)
    fitted = {"data": "tiny", "list": "val", "list_digest": "", "images": 7, "epoch": 1, "steps_of_the_next": 0}
    valid_for = {
        "weights_digest": found.weights_digest,
        "prediction": prediction_settings(found, found.config().method),
    }
    errors = {"ece_before": 12.34, "ece_after": 3.0, "nll_before": 1.2, "nll_after": 1.0}
    write_calibration(run, Calibration(2.5, **fitted, **valid_for, **errors))
    return run


@pytest.fixture
def export(capsys):
    return lambda *arguments: outcome_of(main, arguments, capsys)


def parsed(*arguments) -> SimpleNamespace:
    return parser().parse_args([str(argument) for argument in arguments])


def trained(**settings) -> nn.Module:
    """Return a network whose statistics, branches, adapters and low-rank updates are not at their initial values."""
    torch.manual_seed(0)
    model = model_of(Config.of(img_size=SIZE, **settings), 5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2), nn.init.normal_(module.running_mean, std=0.1)
    for name, tensor in model.state_dict().items():
        if any(part in name for part in ("branches", "adapter", "lora")) and tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
        if name.endswith("running_mean"):
            tensor += 0.1
    return model


def described(model: str, **more) -> dict:
    arguments = NARROW if model.startswith("resne") else {"depth": 2} if model == "test_vit" else {}
    return PREPROCESSING | {"model": model, "model_kwargs": arguments, "method": "reslt", "num_classes": 5} | more


VIT = {"model": "test_vit"}
CASES = {
    "folded into the classifier": (dict(model="resnet18", branch="bn"), None),
    "a transformer": (dict(model="test_vit", branch="bn", branch_at="pooled"), None),
    "conv branches on the map": (dict(model="resnet18", branch="conv"), "reslt_network"),
    "conv branches on pooled features": (dict(model="resnet18", branch="conv", branch_at="pooled"), "reslt_network"),
    "conv branches on tokens": (dict(model="test_vit", branch="conv"), "reslt_network"),
    "a head that is not linear": (dict(model="convnext_atto", branch="bn"), "reslt_network"),
    "tied branches": (dict(model="convnext_atto", branch="conv", tied_branches=True), "reslt_network"),
    "a stack of convolutions": (dict(model="resnet18", method="ce", network="conv_stack", branches=2), "reslt_network"),
    "cosine": (dict(model="resnet18", method="ce", head="cosine", head_scale=7.0), "reslt_network"),
    "cosine after branches": (dict(model="resnet18", branch="bn", head="cosine"), "reslt_network"),
    "deconfounded": (dict(model="resnet18", method="ce", head="deconfounded", tde=1.5), "reslt_network"),
    "experts": (dict(model="resnet18", branch="conv", experts=2, expert_width=0.5), "reslt_experts"),
    "plain experts": (dict(model="cifar_resnet20", method="ce", experts=2), "reslt_experts"),
    "gated experts": (
        dict(model="cifar_resnet20", method="ce", head="cosine", experts=3, expert_stages=1, expert_gates=True),
        "reslt_experts",
    ),
    "gated branches": (
        dict(model="resnet18", branch="conv", experts=2, expert_stages=2, expert_gates=True),
        "reslt_experts",
    ),
    "experts with all stages": (
        dict(model="cifar_resnet20", method="ce", experts=2, expert_stages=3, expert_width=1.0),
        "reslt_experts",
    ),
    "a CIFAR ResNet": (dict(model="cifar_resnet20", branch="conv"), "reslt_network"),
    "low-rank updates": (dict(VIT, branch="bn", branch_at="pooled", tune="lora"), None),
    "adapters": (dict(VIT, method="ce", tune="adapter", adapter_dim=2), "reslt_network"),
    "adapters and folded branches": (dict(VIT, branch="bn", branch_at="pooled", tune="adapter"), "reslt_network"),
    "adapters, branches, cosine": (dict(VIT, branch="conv", head="cosine", tune="adapter"), "reslt_network"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_timm_loads_every_network_with_the_same_probabilities(case, tmp_path):
    settings, architecture = CASES[case]
    if settings.get("tune") == "lora":
        pytest.importorskip("peft")
    about = described(settings["model"])
    network = trained(model_kwargs=about["model_kwargs"], **settings)
    if "tde" in settings:
        network.backbone.get_classifier().alpha = settings["tde"]
    images = torch.randn(3, 3, SIZE, SIZE)
    logits = network(images)
    fused = logits.sum(-3) if logits.ndim == 3 else logits.sum(-3).mean(0)
    module, _ = fold(network, SIZE)
    exported = TimmModel.of(module.eval(), about)
    assert exported.architecture == (architecture or settings["model"])
    exported.write(tmp_path, about)
    assert require_same(tmp_path, module, SIZE) < 1e-6
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert fused.std() > 1e-3
    torch.testing.assert_close(loaded(images).softmax(-1), fused.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(model="resnet18", method="bbn"), "two last blocks"),
        (dict(model="own_resnet", method="ce"), "own_resnet is registered by the module own_models"),
    ],
)
def test_a_network_that_timm_cannot_express_is_refused_with_a_remedy(settings, message, monkeypatch):
    def own_resnet(pretrained=False, **kwargs):
        model = timm.create_model("resnet18", **kwargs)
        model.pretrained_cfg = model.pretrained_cfg | {"architecture": "own_resnet"}
        return model

    own_resnet.__module__ = "own_models"
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "own_resnet", own_resnet)
    module, _ = fold(trained(model_kwargs=NARROW, **settings), SIZE)
    with pytest.raises(UserError, match=f"{message}.*--format onnx or --format torch"):
        TimmModel.of(module, described("resnet18"))


def test_a_folder_that_predicts_differently_is_an_error(tmp_path):
    module, _ = fold(trained(model="resnet18", branch="bn", model_kwargs=NARROW), SIZE)
    TimmModel.of(module, described("resnet18")).write(tmp_path, described("resnet18"))
    with torch.no_grad():
        module.get_classifier().bias[0] += 0.1
    with pytest.raises(UserError, match="predicts differently"):
        require_same(tmp_path, module, SIZE)


def test_a_run_becomes_a_folder_that_states_its_preprocessing_classes_and_results(run, export, tmp_path):
    out = tmp_path / "out"
    outcome = export(run, out, "--license", "cc-by-4.0")
    assert outcome.code == 0, outcome.err
    names = {"README.md", "config.json", "model.safetensors", "modeling_cifar_resnet.py"}
    assert {file.name for file in out.iterdir()} == names
    ordinary = 0o666 & ~_umask()
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {ordinary}
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()

    config, (module, about) = json.loads((out / "config.json").read_text()), reslt.load_run(run)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).softmax(1), module(images).softmax(1), rtol=0, atol=1e-5)
    preprocessing = timm.data.resolve_model_data_config(loaded)
    assert tuple(preprocessing["input_size"]) == (3, 16, 16)
    for name in ("mean", "std", "interpolation", "crop_pct"):
        assert np.array_equal(preprocessing[name], about[name])
    assert (config["architecture"], config["num_classes"]) == ("cifar_resnet20", 3)
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["library_name"]) == ("cc-by-4.0", "timm")
    result = json.loads((run / "result.json").read_text())
    assert f"| {result['all']:.1f} |" in card.split("\n| reslt (fused)")[1].splitlines()[0]
    assert "test list, 15 images, epoch 1; chosen on the validation list." in card
    assert "21, 12 to 3 per class" in card  # of 16, 8 and 4
    assert "validation list: a share of 0.25 of each class" in card
    assert "\n- val_from_train: 0.25\n" in card
    assert "- limit_train" not in card
    assert config["temperature"] == 2.5
    assert "(model(transform(image)[None]) / 2.5).softmax(-1)" in card
    assert (
        "val list of tiny (7 images); there, the expected calibration error is 12.3 % without it and 3.0 % with it. On the"
        in card
    )
    assert f"results above, the expected calibration error is {result['ece']:.1f} %.\n" in card


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def output_in_this_process(code: str, monkeypatch, capsys) -> str:
    """Run code in this process with all that this suite has imported and registered hidden, and return its output."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "reslt"]:
        monkeypatch.setitem(sys.modules, name, None)
    known, own = timm.models._registry._model_entrypoints, ("reslt", "cifar_resnet")
    names = {name: entry for name, entry in known.items() if not name.startswith(own)}
    monkeypatch.setattr("timm.models._registry._model_entrypoints", names)
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    for name in ("modeling_reslt", "modeling_cifar_resnet"):
        del sys.modules[name]
    monkeypatch.undo()
    return capsys.readouterr().out


@pytest.mark.parametrize("place", ["this process", pytest.param("a new process", marks=pytest.mark.slow)])
def test_the_code_of_the_card_runs_without_this_suite(place, tmp_path, data, run_script, export, monkeypatch, capsys):
    """With `-I`, Python imports from neither the current folder nor PYTHONPATH."""
    run = train_once(run_script, data, "conv", "--epochs", "1", "--branch", "conv")
    out, photo, exif = tmp_path / "out", tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6  # viewers rotate the photo clockwise by 90 degrees
    pixels = Image.open(next((data / "images").rglob("*.png")))
    pixels.save(photo, exif=exif)
    assert export(run, out).code == 0
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "import modeling_reslt" in code
    assert "import modeling_cifar_resnet" in code
    code = code.replace("FOLDER", str(out)).replace("photo.jpg", str(photo))
    code += "\nprint('|', [f'{p:.8f}' for p in probabilities.tolist()])"
    if place == "this process":
        text = output_in_this_process(code, monkeypatch, capsys)
    else:
        script = tmp_path / "script.py"
        script.write_text(f"import sys; sys.modules['reslt'] = None\n{code}")
        done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = done.stdout
    printed = np.array(json.loads(text.split("|")[1].replace("'", '"')), float)

    module, about = reslt.load_run(run)
    transform = timm.data.create_transform(
        (3, 16, 16),
        interpolation=about["interpolation"],
        mean=about["mean"],
        std=about["std"],
        crop_pct=about["crop_pct"],
    )
    with torch.no_grad():
        expected = module(transform(pixels.transpose(Image.Transpose.ROTATE_270))[None]).softmax(-1)[0]
    np.testing.assert_allclose(printed, expected.numpy(), rtol=0, atol=1e-5)


def test_class_names_do_not_become_markup_of_the_card():
    about = described("resnet18", class_names=["a", "b|c", "d", "e", "`f`\n# g"], images_per_class=[9, 5, 3, 2, 1])
    loading = {"modules": (), "architecture": "resnet18", "arguments": {}}
    card = model_card(about, Record(), None, loading, {})
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"
    assert "| 1 | b\\|c | 5 |" in card
    assert "\n# g" not in card
    assert "--pretrained-file" in card


def test_the_card_mentions_adapters_and_the_calibrated_error_of_only_its_own_temperature():
    result = {"split": "test", "tables": {}, "ece": 10.0, "ece_calibrated": 2.0, "temperature": 3.0}
    loading = {
        "modules": ("modeling_reslt",),
        "architecture": "reslt_network",
        "arguments": {"adapters": {"blocks.0": 1}},
    }
    other, same = (
        model_card(described("test_vit", temperature=temperature), Record(result=result), None, loading, {})
        for temperature in (2.5, 3.0)
    )
    assert "blocks of the timm model contain adapters" in same
    assert "the expected calibration error is 10.0 %.\n" in other
    assert "the expected calibration error is 10.0 %, and 2.0 % with the temperature." in same


class Small(nn.Module):
    """An affine map from the mean color to five logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


def expected_of(module: nn.Module, images: torch.Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = (p.detach().double().numpy() for p in (module.fc.weight, module.fc.bias))
    logits = images.double().mean((2, 3)).numpy() @ weight.T + bias
    powers = np.exp(logits / temperature)
    return logits, powers / powers.sum(1, keepdims=True)


def test_an_onnx_file_takes_any_batch_and_states_classes_and_preprocessing(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, about = Small().eval(), described("small", temperature=2.0, class_names=["a", "b", "c", "d", "ü"])
    content, compared = to_onnx(module, about)
    assert "batches of 1 and 3" in compared
    session = onnxruntime.InferenceSession(content)
    for number in (1, 7):
        images = torch.randn(number, 3, SIZE, SIZE)
        for found, expected in zip(
            session.run(["logits", "probabilities"], {"images": images.numpy()}),
            expected_of(module, images, 2.0),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert json.loads(metadata["class_names"]) == about["class_names"]
    assert json.loads(metadata["mean"]) == about["mean"]
    assert json.loads(metadata["temperature"]) == 2.0
    (tmp_path / "small.onnx").write_bytes(content)
    require_replaceable(tmp_path / "small.onnx", "onnx")


def test_a_torch_program_takes_any_batch_and_states_classes_and_preprocessing(tmp_path):
    module, about = Small().eval(), described("small", temperature=2.0, class_names=["a", "b", "c", "d", "ü"])
    content, compared = to_torch(module, about)
    assert "batches of 1 and 3" in compared
    (tmp_path / "small.pt2").write_bytes(content)
    files = {"description.json": ""}
    program = torch.export.load(tmp_path / "small.pt2", extra_files=files).module()
    for number in (1, 7):
        images = torch.randn(number, 3, SIZE, SIZE)
        with torch.no_grad():
            found = program(images)
        for tensor, expected in zip(found, expected_of(module, images, 2.0), strict=True):
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-5)
    description = json.loads(files["description.json"])
    assert [description[name] for name in ("mean", "temperature")] == [about["mean"], 2.0]
    require_replaceable(tmp_path / "small.pt2", "torch")


def test_a_module_that_cannot_be_translated_is_refused_in_one_line():
    class Branching(Small):
        def forward(self, images):
            return self.fc(images.mean((2, 3))) if images.sum() > 0 else torch.zeros(len(images), 5)

    with pytest.raises(UserError, match="torch cannot translate this model") as raised:
        to_torch(Branching().eval(), described("small"))
    assert "\n" not in str(raised.value)


def test_a_module_that_takes_only_one_number_of_images_is_refused_in_one_line():
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)

    class FixedBatch(Small):
        def forward(self, images):
            return self.fc(images.mean((2, 3)).reshape(len(images), 3))

    with pytest.raises(UserError, match="--format onnx: torch cannot translate this model") as raised:
        to_onnx(FixedBatch().eval(), described("small"))
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_a_program_of_a_transformer_with_branches_and_adapters_takes_any_batch():
    about = described("test_vit")
    settings = dict(VIT, branch="conv", branch_at="pooled", tune="adapter")
    module, _ = fold(trained(model_kwargs=about["model_kwargs"], **settings), SIZE)
    assert "batches of 1 and 3" in to_torch(module.eval(), about)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "out", "--format", "onnx"], "a name that ends in .onnx"),
        (["run", "out.pt2"], "add --format torch"),
        (["run", "out.onnx", "--format", "onnx", "--license", "mit"], "--license applies to --format timm"),
        (["run", "o.pt2", "--format", "torch", "--push-to-hub", "me/x"], "--push-to-hub applies to --format timm"),
        (["run", "out", "--private"], "--private applies to --push-to-hub"),
        (["run", "out", "--license", "my: own"], "--license my: own"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check_flags(parsed(*arguments))


def test_onnx_without_its_package_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("reslt.deploy.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnx and onnxscript are not installed; pip install onnx onnxscript"):
        check_flags(parsed("missing-run", "out.onnx", "--format", "onnx"))


def test_overwrite_replaces_only_an_earlier_export(tmp_path, run, export):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is not an earlier export, but contains nothing to lose
    assert export(run, out).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = export(run, out)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert export(run, out, "--overwrite").code == 0
    (out / "notes.txt").write_text("mine")
    kept = export(run, out, "--overwrite")
    assert kept.code == 2
    assert "notes.txt" in kept.err
    for name, content in (("other.onnx", b"mine"), ("other.pt2", b"mine")):
        (tmp_path / name).write_bytes(content)
        format = "onnx" if name.endswith("onnx") else "torch"
        with pytest.raises(UserError, match="replaces only an earlier export"):
            check_flags(parsed(run, tmp_path / name, "--format", format, "--overwrite"))
        assert (tmp_path / name).read_bytes() == b"mine"


def test_nothing_is_written_into_checkpoints_or_left_by_a_full_disk(run, export, tmp_path, monkeypatch):
    inside = export(run, run / "checkpoints" / "out")
    assert inside.code == 2
    assert "checkpoints" in inside.err

    def full(self, *_, **__):
        raise OSError(28, "No space left on device", str(self))

    for out, flags in ((tmp_path / "out", ()), (tmp_path / "out.pt2", ("--format", "torch"))):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            patched.setattr("reslt.deploy.programs.to_torch", lambda *_: (b"a program", "compared"))
            outcome = export(run, out, *flags)
        assert outcome.code == 2
        assert "No space left" in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_averages_views_is_refused_but_its_folded_file_is_exported(run_script, data, export, tmp_path):
    run = train_once(run_script, data, "tta", "--epochs", "1", "--tta", "flip")
    refused = export(run, tmp_path / "out")
    assert refused.code == 2
    assert "without --tta flip" in refused.err
    file = tmp_path / "folded.safetensors"
    folded = run_script("evaluate", "--ckpt", run, "--tta", "none", "--fold", file, "--output", tmp_path / "results")
    assert folded.code == 0, folded.err
    outcome = export(file, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "records no settings" in (tmp_path / "out" / "README.md").read_text()

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights["fc.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata)
    damaged = export(file, tmp_path / "damaged")
    assert damaged.code == 2
    assert "fc.weight is not finite" in damaged.err
    assert not (tmp_path / "damaged").exists()


@pytest.fixture
def hub(monkeypatch):
    """Run a local hub that accepts one token, and set that token."""
    with serving("secret") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server


def test_a_pushed_folder_can_be_loaded_from_the_hub(hub, run, export, tmp_path):
    out = tmp_path / "out"
    outcome = export(run, out, "--push-to-hub", "me/flowers", "--private")
    assert outcome.code == 0, outcome.err
    assert f"{hub.address}/me/flowers" in outcome.out
    assert hub.private["me/flowers"] is True
    files = hub.repositories["me/flowers"]
    assert files == {file.name: file.read_bytes() for file in out.iterdir()}
    for name in files:
        huggingface_hub.hf_hub_download("me/flowers", name, endpoint=hub.address, local_dir=tmp_path / "fetched")
    module, _ = reslt.load_run(run)
    assert require_same(tmp_path / "fetched", module, 16) < 1e-6

    existing = export(run, tmp_path / "second", "--push-to-hub", "me/flowers")
    assert existing.code == 2
    assert "exists" in existing.err
    assert not (tmp_path / "second").exists()
    assert export(run, tmp_path / "second", "--push-to-hub", "me/flowers", "--overwrite").code == 0


def test_an_error_of_the_hub_is_one_line(hub, run, export, tmp_path, monkeypatch):
    def error(*flags) -> str:
        outcome = export(run, tmp_path / "out", *flags)
        assert outcome.code == 2
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err
        return outcome.err

    assert "USER/NAME" in error("--push-to-hub", "flowers")
    assert "USER/NAME" in error("--push-to-hub", "me/a--b..c")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "hf auth login" in error("--push-to-hub", "me/flowers")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in error("--push-to-hub", "me/flowers")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    hub.refused = "/commit/"
    message = error("--push-to-hub", "me/flowers")
    assert "exceeded your quota" in message
    assert f"hf upload me/flowers {tmp_path / 'out'}" in message
    assert (tmp_path / "out" / "README.md").exists()
