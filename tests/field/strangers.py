"""Files from strangers, the files that --overwrite may delete, and text that comes from data."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import ALONE, TINY_FLAGS, make_dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reslt.api import create_model, load_run
from reslt.config.resolve import resolve
from reslt.core.command import entry_point
from reslt.core.errors import UserError
from reslt.core.log import logged_to, logger
from reslt.core.text import csv_cell
from reslt.data.datasets import load_dataset
from reslt.models import create
from reslt.models.create import create_backbone
from reslt.models.fold import load_folded
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.folder import find, open_run

EARLIER = Path(__file__).parents[1] / "earlier_version"

# ---- Files from strangers: recipes, info.yaml, run folders, checkpoints, folded files ----

EVIL_ARGUMENTS = [  # of timm.create_model and of models, each with a value that would do harm, as YAML or JSON
    ("checkpoint_path", "evil.pth"),  # a pickle
    ("pretrained_cfg", {"file": "evil.pth", "url": "https://evil.example/x.pth"}),
    ("pretrained_cfg_overlay", {"hf_hub_id": "evil/model"}),
    ("pretrained", True),
    ("cache_dir", "stolen"),
    ("features_only", True),
    ("out_indices", [0]),
    ("block", "os.system"),
    ("act_layer", "../evil.pth"),
    ("layers", {"__class__": "x"}),
    ("never_heard_of", 3),
]


class Pickled:
    """An object whose pickle creates a file when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A working folder with only a malicious pickle. `guarded()` asserts that nothing read the pickle, changed a file or
    opened a connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    torch.save({"state_dict": Pickled()}, "evil.pth")
    connected = []

    def refuse(self, address):
        connected.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))
    before = snapshot(tmp_path)

    def untouched() -> None:
        assert connected == []
        assert not (tmp_path / "executed").exists()
        assert {name: digest for name, digest in snapshot(tmp_path).items() if name in before} == before

    return untouched


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stranger_run(folder: Path, **changes) -> Path:
    """Write a run of an earlier version whose state.json states other settings, with correct digests."""
    shutil.copytree(EARLIER / "run", folder)
    for place in (folder / "checkpoints").glob("*-*"):
        state = json.loads((place / "state.json").read_text())
        state["config"] |= changes
        (place / "state.json").write_text(json.dumps(state))
        names = [line.split("  ")[1] for line in (place / "SHA256SUMS").read_text().splitlines()]
        sums = [f"{hashlib.sha256((place / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (place / "SHA256SUMS").write_text("".join(sums))
    return folder


def stranger_folded(file: Path, **changes) -> Path:
    """Write a folded file with changes in its metadata."""
    with safe_open(EARLIER / "reslt_bn.safetensors", "pt") as opened:
        described = json.loads(opened.metadata()["reslt"])
    metadata = {"reslt": json.dumps(described | changes)}
    save_file(load_file(EARLIER / "reslt_bn.safetensors"), file, metadata=metadata)
    return file


def use_recipe(folder: Path, settings: dict, *flags: str):
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": "cifar_resnet20", "data": "digits_lt"} | settings))
    return resolve(["--recipe", "mine.yaml", *flags])


def use_dataset(folder: Path, settings: dict, *flags: str, data: str = "gift"):
    (folder / data).mkdir(exist_ok=True)
    (folder / data / "info.yaml").write_text(yaml.safe_dump({"defaults": {"model": "cifar_resnet20"} | settings}))
    return resolve(["--data", f"./{data}", *flags])


def use_per_model(folder: Path, settings: dict, *flags: str):
    return use_dataset(folder, {"per_model": {"cifar_resnet20": settings}}, *flags)


FILES = {  # source -> (function that uses a file with these settings, the file that the message names)
    "recipe": (use_recipe, "mine.yaml"),
    "defaults": (use_dataset, "gift/info.yaml"),
    "per_model": (use_per_model, "gift/info.yaml"),
    "run": (lambda folder, settings: load_run(stranger_run(folder / "run", **settings)), "state.json"),
    "folded": (lambda folder, settings: load_folded(stranger_folded(folder / "f.safetensors", **settings)), "f.safe"),
}


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize(("name", "value"), EVIL_ARGUMENTS, ids=[name for name, _ in EVIL_ARGUMENTS])
def test_a_file_can_set_only_arguments_of_a_models_architecture(name, value, source, tmp_path, guarded):
    use, file = FILES[source]
    with pytest.raises(UserError) as refused:
        use(tmp_path, {"model_kwargs": {"channels": [4, 8, 16], name: value}})
    assert re.search(
        rf"{file}.*: model_kwargs: '?{name}'?: .*(leave it out|--model-kwargs {name}=VALUE)", str(refused.value)
    )
    assert len(str(refused.value)) < 500
    guarded()


@pytest.mark.parametrize(
    "name", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "features_only", "cache_dir"]
)
def test_arguments_that_load_files_are_refused_even_if_typed(name, guarded):
    with pytest.raises(UserError, match=f"--model-kwargs: {name}: .*leave it out"):
        resolve(["--model-kwargs", f"{name}=evil.pth"])
    with pytest.raises(UserError, match=f"--model-kwargs: {name}: .*leave it out"):
        create_model("resnet18", 10, model_kwargs={name: "evil.pth"})
    guarded()


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("resnet18", {"layers": [1, 1, 1, 1], "stem_type": "deep", "output_stride": 16, "zero_init_last": False}),
        ("resnext50_32x4d", {"cardinality": 8, "base_width": 4, "global_pool": "avgmax"}),
        ("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg", "act_layer": "relu"}),
        ("deit_tiny_patch16_224", {"depth": 1, "init_values": 1e-4, "reg_tokens": 2}),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "window_size": 7, "mlp_ratio": 2.0}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": None}),
        ("efficientnet_b0", {"fix_stem": True, "output_stride": 16}),
        ("regnety_002", {"stem_width": 16, "se_ratio": 0.0}),
        ("mobilenetv3_small_050", {"head_bias": False, "global_pool": "avg"}),
        ("xcit_nano_12_p16_224", {"eta": 0.1}),
        ("coat_lite_tiny", {"crpe_window": None}),
        ("densenet121", {"growth_rate": 8, "block_config": [1, 1, 1, 1]}),
    ],
)
def test_files_may_set_architecture_arguments_of_the_usual_families(model, arguments, tmp_path, guarded):
    config = use_recipe(tmp_path, {"model": model, "model_kwargs": arguments}).config
    assert config["model_kwargs"] == arguments
    assert create_backbone(config.model, 7).num_classes == 7


def test_a_run_trained_with_an_unusual_argument_warns_and_loads_if_it_is_typed_again(tmp_path, guarded):
    assert any("--model-kwargs blocks=2" in w for w in resolve(["--model-kwargs", "blocks=2"]).warnings)
    run = stranger_run(tmp_path / "run", model_kwargs={"channels": [4, 8, 16], "odd": 3})
    with pytest.raises(UserError, match=r"if you trust it, type it instead: --model-kwargs odd=VALUE"):
        load_run(run)
    with pytest.raises(UserError, match=r"cannot be created: .*'odd'"):  # timm's message: the argument was passed on
        load_run(run, model_kwargs={"odd": 3})
    assert Checkpoint.config(find(run), model_kwargs=["channels=4,8,16", "odd=3"])["model_kwargs"] == {
        "channels": (4, 8, 16),
        "odd": 3,
    }


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"odd": 4}, "odd: the model of .*state.json was trained with 3; give that value"),
        ({"odd": 3, "channels": (8, 8, 8)}, r"channels: .* was trained with \[4, 8, 16\]"),
        ({"odd": 3, "width": 2}, "width: .*state.json states no such argument; leave it out"),
    ],
)
def test_arguments_typed_again_must_be_those_of_training(typed, message, tmp_path):
    run = stranger_run(tmp_path / "run", model_kwargs={"channels": [4, 8, 16], "odd": 3})
    with pytest.raises(UserError, match=f"--model-kwargs: {message}"):
        load_run(run, model_kwargs=typed)


def test_a_run_trained_with_an_unusual_argument_is_evaluated_folded_and_loaded_if_it_is_typed(
    tiny, tmp_path, run_script
):
    shape = ["patch_size=4", "embed_dim=12", "depth=1", "num_heads=3", "img_size=16", "pool_include_prefix=True"]
    model = ["--model", "vit_tiny_patch16_224", "--model-kwargs", *shape]
    flags = ["--data", tiny, *TINY_FLAGS, *model, "--output", tmp_path, "--experiment", "run"]
    trained = run_script("train", *flags, "--epochs", "1")
    assert trained.code == 0, trained.err
    run, folded, typed = tmp_path / "run", tmp_path / "f.safetensors", {"pool_include_prefix": True}
    before = (run / "result.json").read_text()
    refused = run_script("evaluate", "--ckpt", run)
    assert refused.code == 2
    assert "type it instead: --model-kwargs pool_include_prefix=VALUE" in refused.err
    outcome = run_script("evaluate", "--ckpt", run, "--model-kwargs", "pool_include_prefix=True", "--fold", folded)
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "result.json").read_text())["tables"] == json.loads(before)["tables"]
    with pytest.raises(UserError, match="type it instead"):
        load_folded(folded)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(load_folded(folded, typed)[0](images), load_run(run, model_kwargs=typed)[0](images))


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize(
    "model",
    ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:.", "evil/resnet18", "resnet18.evil/vit", "../evil.pth"],
)
def test_a_file_can_name_only_timms_models_not_repositories_or_paths(model, source, tmp_path, guarded):
    use, _ = FILES[source]
    refused = rf"timm has no model '{re.escape(model)}'|a file can name only timm's models; give the flag --model {re.escape(model)}"
    with pytest.raises(UserError, match=refused):
        create_backbone(use(tmp_path, {"model": model}).config.model, 10)
    guarded()


@pytest.mark.parametrize("source", ["run", "folded"])
def test_evaluation_reads_only_the_weights_of_the_file_itself(source, tmp_path, guarded):
    use, _ = FILES[source]
    asked = {
        "pretrained": True,
        "pretrained_file": "evil.pth",
        "resume": "auto",
        "overwrite": True,
        "log_with": "wandb",
    }
    model, described = use(tmp_path, asked | {"output": "evil.pth", "experiment": "../elsewhere"})
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert described["model"] == "cifar_resnet20"
    guarded()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": "3"}, "its num_classes is '3'"),
        ({"num_classes": 10**12}, "its num_classes is"),
        ({"img_size": None}, "its img_size is 'None'"),
        ({"experts": 2, "method": "ce", "use_experts": "all"}, "its use_experts is 'all'"),
        ({"model_kwargs": {"channels": [4, 8, 32]}}, "its weights do not fit"),
        ({"method": "evil"}, r"method \(.*'evil' is not one of"),
    ],
)
def test_invalid_metadata_of_a_folded_file_is_one_message(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_folded(stranger_folded(tmp_path / "f.safetensors", **changes))


@pytest.mark.parametrize("source", ["recipe", "defaults", "per_model"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output", "elsewhere"),
        ("experiment", "victim"),
        ("overwrite", True),
        ("resume", "auto"),
        ("force_resume", True),
        ("log_with", "wandb"),
        ("data_dir", "/etc"),
        ("data", "digits_lt"),
        ("pretrained_file", "evil.pth"),
    ],
)
def test_a_file_cannot_choose_files_to_replace_or_read_or_services_to_contact(key, value, source, tmp_path, guarded):
    use, file = FILES[source]
    if source == "recipe" and key in ("data", "pretrained_file"):  # the user named the recipe, which names these
        assert use(tmp_path, {key: value}).config[key] == value
        return
    with pytest.raises(
        UserError, match=rf"{file}: {key}: a file cannot set it; give it as a flag, --{key.replace('_', '-')}"
    ):
        use(tmp_path, {key: value})
    guarded()


def test_evaluate_refuses_a_strangers_run_before_anything_is_read(tmp_path, run_script, guarded):
    run = stranger_run(tmp_path / "run", model_kwargs={"checkpoint_path": "evil.pth"})
    outcome = run_script("evaluate", "--ckpt", run)
    assert outcome.code == 2
    assert "state.json: model_kwargs: checkpoint_path: --pretrained-file names a file of weights" in outcome.err
    guarded()


def test_timm_reads_a_downloaded_pickle_with_weights_only(guarded, monkeypatch):
    monkeypatch.setattr(create, "weights_of", lambda model: {"file": "evil.pth", "custom_load": False})
    with pytest.raises(UserError, match=r"cannot be created: .*(Unsupported|weights_only|Weights only)"):
        create_model("resnet18", 10, pretrained=True)
    guarded()


@pytest.mark.parametrize(
    "source", ["https://evil.example/lists", "http://raw.githubusercontent.com/x", "file:///etc", "ftp://evil.example",
               "https://raw.githubusercontent.com@evil.example"]
)  # fmt: skip
def test_a_dataset_cannot_name_another_host_to_fetch_lists_from(source, project, run_prepare, guarded):
    folder = project / "data_lists/gift"
    folder.mkdir()
    lists = {"train": {"file": "passwd", "lines": 1, "blob": "0" * 40}}
    (folder / "info.yaml").write_text(yaml.safe_dump({"published": {"source": source, "lists": lists}}))
    outcome = run_prepare("gift")
    assert outcome.code == 2
    assert "lists are fetched only from https://raw.githubusercontent.com/" in outcome.err
    guarded()


@pytest.mark.parametrize(
    ("prepare", "is_shown"),
    [("places_lt", True), ("cifar100 --imb-factor 0.01", True), ("own; rm -rf ~", False), ("$(id)", False),
     ("x\nerror: y", False), (["own"], False)],
)  # fmt: skip
def test_a_command_from_info_yaml_is_shown_only_if_it_is_harmless_to_paste(prepare, is_shown, tmp_path):
    (tmp_path / "info.yaml").write_text(yaml.safe_dump({"prepare": prepare}))
    with pytest.raises(UserError) as refused:
        load_dataset(str(tmp_path))
    assert (f"python -m reslt.prepare {prepare}" in str(refused.value)) == is_shown
    assert is_shown or "python -m reslt.prepare own --from FOLDER" in str(refused.value)


@pytest.mark.parametrize("what", ["log", "checkpoints"])
def test_a_strangers_run_that_is_resumed_writes_and_deletes_nothing_elsewhere(what, tmp_path):
    mine, theirs = stranger_run(tmp_path / "mine"), stranger_run(tmp_path / "theirs")
    (tmp_path / "bashrc").write_text("mine\n")
    if what == "log":
        (theirs / "train.log").symlink_to(tmp_path / "bashrc")
    else:
        shutil.rmtree(theirs / "checkpoints")
        (theirs / "checkpoints").symlink_to(mine / "checkpoints")
    before = snapshot(tmp_path)
    with (
        pytest.raises(UserError, match=f"{'train.log' if what == 'log' else 'checkpoints'}: it is a link"),
        open_run(theirs, {}, False, ALONE),
    ):
        pass
    assert snapshot(tmp_path) == before | {str(tmp_path / ".theirs.lock"): b""}


# ---- Files that --overwrite may delete ----

OURS = [
    "config.yaml", "summary.csv", "train.log", "result.json", "result-other-test.json", "per_class.csv",
    "per_class-other-test.csv", ".123.result.json", "checkpoints/last", "checkpoints/best",
    "checkpoints/1-3/model.safetensors", "checkpoints/1-3/ema.safetensors", "checkpoints/1-3/optimizer.safetensors",
    "checkpoints/1-3/processes.safetensors", "checkpoints/1-3/state.json", "checkpoints/1-3/SHA256SUMS",
    "checkpoints/.99.2-6/model.safetensors", "name/events.out.tfevents.1700000000.host.1.0",
    "name/1700000000.5/hparams.yml", "wandb/run-20260101_101010-abcd/files/x.json", "wandb/debug-internal.log",
]  # fmt: skip


def make_run(folder: Path, names=OURS) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    (folder / "config.yaml").write_text("config: {model: resnet18}\nversions: {torch: '2'}\n")
    return folder


def replace(run: Path) -> None:
    """Overwrite a run with one that writes one checkpoint."""
    with open_run(run, {"config": {}}, True, ALONE):
        (run / "checkpoints/5-5").mkdir()


def test_overwriting_removes_every_file_that_a_run_and_its_trackers_write(tmp_path):
    run = make_run(tmp_path / "run")
    replace(run)
    assert sorted(path.relative_to(run).as_posix() for path in run.rglob("*")) == [
        "checkpoints", "checkpoints/5-5", "config.yaml"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


@pytest.mark.parametrize(
    "other",
    ["notes.txt", "photos/a.jpg", "checkpoints/backup/model.safetensors", "checkpoints/1-3/notes.txt", "checkpoints/x",
     "name/notes.txt", "wandb/notes.txt", "folded.safetensors", "result.json.bak", "name/sub/sub/events.out.tfevents.1",
     ".2024.notes.txt", "checkpoints/.2024.backup/notes.txt"],
)  # fmt: skip
def test_any_other_file_prevents_overwriting_and_is_named(other, tmp_path):
    run = make_run(tmp_path / "run", [*OURS, other])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="--overwrite deletes only what a run writes") as refused:
        replace(run)
    assert other.partition("/")[0] in str(refused.value)
    assert {name: content for name, content in snapshot(tmp_path).items() if "lock" not in name} == before


def test_three_of_many_other_files_are_named_and_the_rest_counted(tmp_path):
    run = make_run(tmp_path / "run", [*OURS, *(f"notes{i:05d}.txt" for i in range(500))])
    with pytest.raises(UserError, match=r"contains notes00000.txt, notes00001.txt, notes00002.txt and 497 more; move"):
        replace(run)


@pytest.mark.parametrize("link", ["train.log", "data", "checkpoints", "checkpoints/1-3"])
def test_a_link_prevents_overwriting_and_its_target_is_untouched(link, tmp_path):
    target = make_run(tmp_path / "target")
    run = make_run(tmp_path / "run", ["summary.csv"])
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(target)
    with pytest.raises(UserError, match=f"also contains {link}"):
        replace(run)
    assert (target / "summary.csv").read_text() == "old"


@pytest.mark.parametrize("config", [None, "name: my other project\n", "config: 3\n", "{"])
def test_overwriting_replaces_no_folder_that_is_not_a_run(config, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink() if config is None else (run / "config.yaml").write_text(config)
    before = snapshot(run)
    with pytest.raises(UserError, match="this is not the folder of one"):
        replace(run)
    assert snapshot(run) == before


@pytest.mark.parametrize("which", ["run", "output"])
def test_a_link_to_a_run_stays_a_link(which, tmp_path):
    real = make_run(tmp_path / "disk/run")
    link = tmp_path / "link"
    link.symlink_to(real if which == "run" else real.parent)
    replace(link if which == "run" else link / "run")
    assert link.is_symlink()
    assert sorted(path.name for path in real.iterdir()) == ["checkpoints", "config.yaml"]
    assert sorted(path.name for path in real.parent.iterdir()) == [".run.lock", "run"]


@pytest.mark.parametrize("is_link", [False, True])
def test_an_overwriting_run_that_fails_before_its_first_checkpoint_restores_the_old_run(is_link, tmp_path):
    run = make_run(tmp_path / "disk/run")
    before = snapshot(run)
    if is_link:
        (tmp_path / "link").symlink_to(run)
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "link" if is_link else run, {"config": {}}, True, ALONE):
        1 / 0  # noqa: B018
    assert snapshot(run) == before
    assert not is_link or (tmp_path / "link").is_symlink()


def test_an_overwriting_run_that_lacks_file_descriptors_restores_the_old_run(tmp_path):
    """Without a free descriptor, no folder can be listed, so none that has content can be removed."""
    resource = pytest.importorskip("resource")
    run = make_run(tmp_path / "run")
    before, limits = snapshot(run), resource.getrlimit(resource.RLIMIT_NOFILE)

    def fail() -> None:
        with open_run(run, {"config": {}}, True, ALONE):
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
            open(tmp_path / "any", "w")  # noqa: SIM115

    try:
        with pytest.raises(OSError, match="Too many open files"):
            fail()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert snapshot(run) == before


def test_a_run_with_files_of_tensorboard_may_be_overwritten(tmp_path):
    """The files are written by torch's own SummaryWriter, which Accelerate's tracker uses."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    run = make_run(tmp_path / "run", ["summary.csv"])
    writer = tensorboard.SummaryWriter(run / "anything")
    writer.add_scalar("loss", 1.0)
    writer.close()
    replace(run)
    assert not (run / "anything").exists()


# ---- Text from data ----

HOSTILE = {  # a name that would mislead a terminal or a reader -> how it is printed
    "\x1b[2J\x1b[31mcat": r"\x1b[2J\x1b[31mcat",
    "cat\x07\x08\x7f": r"cat\x07\x08\x7f",
    "cat\x9b2J": r"cat\x9b2J",
    "cat\u202etac": r"cat\u202etac",
    "\u2066cat\u2069": r"\u2066cat\u2069",
    "cat\rerror: x": r"cat\rerror: x",
    "cat\u2028error": r"cat\u2028error",
    "caf\u00e9 \u5927\u718a\u732b \U0001f98a": "caf\u00e9 \u5927\u718a\u732b \U0001f98a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_command_prints_control_characters(name, capsys, tmp_path):
    """The name is printed, logged, part of a warning, raised in errors of two kinds, and written to train.log."""

    @entry_point
    def command(how: str) -> None:
        print(f"class {name}\ta tab, and\na line break")
        with logged_to(tmp_path / "train.log"):
            logger.info(name)
            logger.warning(name)
        raise UserError(name) if how == "user" else OSError(2, "no such file", name)

    for how in ("user", "system"):
        with pytest.raises(SystemExit):
            command(how)
        out, err = capsys.readouterr()
        shown = HOSTILE[name]
        assert out == f"class {shown}\ta tab, and\na line break\n{shown}\n"
        assert err == f"warning: {shown}\nerror: {shown}{': no such file' if how == 'system' else ''}\n"
    assert re.sub(r"(?m)^.{23} (INFO|WARNING|ERROR) ", "", (tmp_path / "train.log").read_text()) == f"{shown}\n" * 4


@pytest.mark.parametrize("name", [name for name in (*HOSTILE, "a\nb", "a\tb") if name.isprintable() is False])
def test_class_names_with_control_characters_are_refused_from_every_source(name, tiny, project, run_prepare):
    (tiny / "info.yaml").write_text(yaml.safe_dump({"image_root": "images", "class_names": ["a", "b", name]}))
    with pytest.raises(UserError, match=r"info.yaml: class_names: .* contains a control character") as refused:
        load_dataset(str(tiny))
    assert name not in str(refused.value)
    rows = [{"file": f"train/{c}/{i}.png", "label": c} for c in (0, 1) for i in range(4)]
    table = pd.DataFrame(rows).assign(label=lambda t: t["label"].map({0: "a", 1: name}))
    table.to_csv(tiny / "table.csv", index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
    flags = ("--image-column", "file", "--label-column", "label", "--data-dir", tiny / "images", "--name", "mine")
    outcome = run_prepare("own", "--csv", tiny / "table.csv", *flags, "--no-decode")
    assert outcome.code == 2
    assert "contains a control character" in outcome.err
    assert not (project / "data_lists/mine").exists()


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"), ("+1", "'+1"), ("-1+1", "'-1+1"), ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t'=1"), ("\r=1", "'\r'=1"), ("x;=1", "x;'=1"), ("x\n=1", "x\n'=1"), ("a-b = c@d", "a-b = c@d"),
        ("great auk", "great auk"), ("", ""),
    ],
)  # fmt: skip
def test_a_cell_is_never_a_formula_whatever_the_spreadsheets_separator(text, cell):
    assert csv_cell(text) == cell


def test_no_csv_file_contains_a_formula_and_recorded_bad_images_are_still_found(tmp_path, run_prepare, run_script):
    """Names of classes and files are formulas in three files that check and evaluate write."""
    folder = make_dataset(tmp_path / "tiny")
    names = ["=1+1", "@SUM(A1)", "-2"]
    (folder / "images/train/0/=1.png").write_bytes(b"no image")
    (folder / "train.txt").write_text((folder / "train.txt").read_text() + "train/0/=1.png 0\n=x.png 1\n")
    (folder / "images/=x.png").write_bytes(b"none either")
    (folder / "info.yaml").write_text(yaml.safe_dump({"image_root": "images", "class_names": names}))
    outcome = run_prepare("check", folder, "--decode", "--output", tmp_path / "out", "--workers", 0)
    assert outcome.code == 1
    run = stranger_run(tmp_path / "run", data=str(folder))
    flags = ("--workers", 0, "--bad-images", "skip")
    assert run_script("evaluate", "--ckpt", run, "--data", folder, *flags).code == 0
    (per_class,) = run.glob("per_class-*.csv")
    for file in (folder / "bad_images.csv", tmp_path / "out/tiny-images_per_class.csv", per_class):
        cells = [cell for row in csv.reader(file.read_text().splitlines()) for cell in row]
        assert [cell for cell in cells if cell[:1] in tuple("=+@\t\r") or cell == "-2"] == [], file
        assert "'=1+1" in cells or "'=x.png" in cells, file
    dataset = load_dataset(str(folder), bad_images="skip")
    assert dataset.left_out == {"train": ("train/0/=1.png", "=x.png")}
    recorded = (folder / "bad_images.csv").read_text()
    (folder / "bad_images.csv").write_text(recorded.replace("'=x.png", "=x.png"))  # the format of earlier versions
    assert load_dataset(str(folder), bad_images="skip").left_out == dataset.left_out


@pytest.mark.parametrize("key", ["image_root", "images"])
def test_folder_names_with_line_breaks_are_refused(key, tmp_path):
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 1\n")
    (tmp_path / "info.yaml").write_text(yaml.safe_dump({key: "x\nerror: forged"}))
    with pytest.raises(UserError) as refused:
        load_dataset(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["data", "model", "opt", "aa", "pretrained_file"])
def test_settings_with_control_characters_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        use_recipe(tmp_path, {name: "digits_lt\nerror: forged\x1b"})
    assert "\x1b" not in str(refused.value)
    assert not re.search("(?m)^error: forged", str(refused.value))
