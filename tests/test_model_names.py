"""Models named by a hub or a folder, and pretrained weights with and without a network."""

import importlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as hub_constants
import pytest
import timm
import torch
import yaml
from conftest import TINY_FLAGS, make_dataset
from safetensors.torch import load_file, save_file

import reslt
from reslt.config.resolve import resolve
from reslt.config.schema import ModelSettings
from reslt.core.errors import UserError
from reslt.models import pretrained
from reslt.models.create import create_backbone

STATED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear", "crop_pct": 0.8}
CHANNELS = [8, 16, 32]


def write_model(folder, **changes):
    """Write a folder as timm exports it: a narrow CIFAR ResNet for 7 classes, exported at 24 pixels."""
    torch.manual_seed(1)
    model = timm.create_model("cifar_resnet20", num_classes=7, channels=CHANNELS)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    stated = STATED | {"input_size": [3, 24, 24], "num_classes": 7, "classifier": "fc", "url": "https://evil.example/x"}
    config = {"architecture": "cifar_resnet20", "num_classes": 7, "pretrained_cfg": stated}
    config |= {"model_args": {"channels": CHANNELS, "num_classes": 7, "drop_rate": 0.5}}
    stated.update(changes.pop("pretrained_cfg", {}))
    (folder / "config.json").write_text(json.dumps(config | changes))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "my model"
    write_model(folder)
    return folder


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, org/name, that answers requests for its files."""

    def do_GET(self):
        self.do_HEAD(with_body=True)

    def do_HEAD(self, with_body=False):
        self.server.asked.append(self.path)
        *repository, file = self.path.strip("/").split("/")
        place = self.server.folder / file
        found = repository == ["org", "name", "resolve", "main"] and place.is_file()
        content = place.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{file}"')
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound" if repository[:1] == ["org"] else "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def at_endpoint(monkeypatch, tmp_path):
    """at_endpoint(URL) points the hub's client to this URL; its cache and that of other hosts are empty."""

    def use(url):
        monkeypatch.setattr(hub_constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return use


@pytest.fixture
def hub(folder, at_endpoint):
    """A server in place of the hub; `asked` lists the paths of all requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = folder, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    at_endpoint(f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def unreachable_hub(at_endpoint):
    """The hub is a port that refuses connections."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    at_endpoint(f"http://127.0.0.1:{port}")
    return f"http://127.0.0.1:{port}"


def first_convolution(network):
    return network.backbone.state_dict()["conv1.weight"]


def exported_convolution(folder):
    return load_file(folder / "model.safetensors")["conv1.weight"]


@pytest.mark.parametrize("source", ["local-dir", "hf-hub"])
def test_a_model_from_a_folder_or_hub_has_its_architecture_and_on_request_its_weights(source, folder, hub):
    name = f"local-dir:{folder}" if source == "local-dir" else "hf-hub:org/name"
    network = reslt.create_model(name, 5, branch="bn", pretrained=True)
    torch.testing.assert_close(first_convolution(network), exported_convolution(folder), rtol=0, atol=0)
    assert network.backbone.fc.out_features == 5
    assert network.backbone.fc.in_features == 32  # the last of the channels that config.json states
    found = timm.data.resolve_model_data_config(network.backbone)
    assert {key: found[key] for key in STATED} == STATED
    assert found["input_size"] == (3, 24, 24)
    without = reslt.create_model(name, 5, branch="bn")
    assert not torch.equal(first_convolution(without), exported_convolution(folder))


def test_files_of_the_hub_are_fetched_once(hub, monkeypatch):
    reslt.create_model("hf-hub:org/name", 5, pretrained=True)
    asked = len(hub.asked)
    assert asked > 0
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    reslt.create_model("hf-hub:org/name", 5, pretrained=True)
    assert len(hub.asked) == asked


def test_a_pickle_in_a_repository_without_safetensors_is_read_as_tensors_only(tmp_path, hub):
    model = write_model(tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old/pytorch_model.bin")
    hub.folder = tmp_path / "old"
    network = reslt.create_model("hf-hub:org/name", 5, pretrained=True)
    torch.testing.assert_close(first_convolution(network), model.conv1.weight, rtol=0, atol=0)
    torch.save({"conv1.weight": ModelSettings()}, tmp_path / "old/pytorch_model.bin")
    with pytest.raises(UserError, match="give a file of weights"):
        reslt.create_model(f"local-dir:{tmp_path / 'old'}", 5, pretrained=True)


def test_a_crop_mode_that_is_not_used_is_reported(tmp_path, caplog):
    write_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    content = json.loads(file.read_text())
    content["pretrained_cfg"] = {**content.get("pretrained_cfg", {}), "crop_mode": "squash"}
    file.write_text(json.dumps(content))
    reslt.create_model(f"local-dir:{tmp_path / 'model'}", 5)
    assert "its crop_mode squash is not used" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "evil_net"}, "timm has no architecture 'evil_net'"),
        ({"architecture": "reslt_network", "exported_by": "reslt"}, "continue from its run with --init-from RUN"),
        ({"architecture": "hf-hub:evil/net"}, "timm has no architecture 'hf-hub:evil/net'"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path: --pretrained-file names a file of weights"),
        ({"model_args": {"block_fn": "os.system"}}, "'block_fn': from a file, .*--model-kwargs block_fn=VALUE"),
        ({"model_args": [1]}, "model_args: it is not a mapping"),
        ({"pretrained_cfg": {"mean": "0.5"}}, "mean: 0.5 is not a plain value; give --mean"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "mean: 1 values given"),
        ({"pretrained_cfg": {"crop_pct": True}}, "crop_pct: True is not a plain value"),
        ({"pretrained_cfg": {"crop_pct": 7}}, "crop_pct"),
        ({"pretrained_cfg": {"interpolation": "nearest"}}, "interpolation .*'nearest'"),
        ({"pretrained_cfg": {"input_size": [3, 24, 32]}}, r"not \[3, SIDE, SIDE\]; give --img-size"),
    ],
)
def test_a_strangers_description_may_state_only_an_architecture_and_plain_values(changes, message, tmp_path):
    importlib.import_module("reslt.deploy.modeling_reslt")  # registers the architectures of exports in timm
    write_model(tmp_path / "m", **changes)
    with pytest.raises(UserError, match=message) as raised:
        reslt.create_model(f"local-dir:{tmp_path / 'm'}", 5)
    assert str(raised.value).startswith(f"--model local-dir:{tmp_path / 'm'}: ")


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, None])
def test_a_folder_without_a_readable_description_is_refused(content, tmp_path):
    (tmp_path / "m").mkdir()
    if content:
        (tmp_path / "m/config.json").write_text(content)
    with pytest.raises(UserError, match=r"not readable as JSON|contains no config\.json"):
        reslt.create_model(f"local-dir:{tmp_path / 'm'}", 5)
    with pytest.raises(UserError, match="there is no such folder"):
        reslt.create_model(f"local-dir:{tmp_path / 'none'}", 5)


def test_a_run_records_plain_settings_and_never_needs_the_source_again(hub, tmp_path, run_script, monkeypatch):
    """Flags override the settings of the source; evaluating and resuming make no request."""
    data = make_dataset(tmp_path / "data")
    flags = [*TINY_FLAGS[4:], "--model", "hf-hub:org/name", "--pretrained", "--crop-pct", 0.7]
    flags = [flag for flag in flags if flag not in ("--img-size", "16")]
    where = ("--data", data, "--output", tmp_path / "runs")
    outcome = run_script("train", *flags, *where, "--epochs", 1)
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs/data-org-name-reslt-seed0"
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["model_source"] == "hf-hub:org/name"
    expected = STATED | {"crop_pct": 0.7, "img_size": 24, "model": "cifar_resnet20", "pretrained_file": None}
    expected["model_kwargs"] = {"channels": CHANNELS}
    assert {name: recorded["config"][name] for name in expected} == expected
    asked = len(hub.asked)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    described = reslt.load_run(run)[1]
    assert (described["model"], described["img_size"]) == ("cifar_resnet20", 24)
    resumed = run_script("train", *flags, *where, "--epochs", 2, "--resume", "auto", "--force-resume")
    assert resumed.code == 0, resumed.err
    assert len(hub.asked) == asked


@pytest.mark.parametrize("place", ["recipe", "info.yaml", "per_model"])
@pytest.mark.parametrize("name", ["hf-hub:org/name", "local-dir:m"])
def test_files_cannot_name_a_hub_or_folder(place, name, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    text = {"recipe": f"data: {tiny}\nmodel: '{name}'\n", "info.yaml": f"defaults: {{model: '{name}'}}\n"}
    text["per_model"] = f"defaults: {{model: resnet18, per_model: {{resnet18: {{model: '{name}'}}}}}}\n"
    (tiny / ("r.yaml" if place == "recipe" else "info.yaml")).write_text(text[place])
    flags = ["--recipe", "r.yaml"] if place == "recipe" else ["--data", str(tiny)]
    with pytest.raises(UserError, match=f"model: a file can name only timm's models; give the flag --model {name}"):
        resolve(flags)


def test_a_checkpoint_cannot_name_a_hub_or_folder():
    with pytest.raises(UserError, match="timm has no model 'hf-hub:org/name'"):
        create_backbone(ModelSettings(model="hf-hub:org/name"), 5)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("hf-hub:org/name@v1.0", "tiny-org-name@v1.0"), ("local-dir:a b/c: d/", "tiny-c-d"), ("local-dir:.", "tiny-tiny")],
)
def test_a_runs_default_name_is_a_plain_folder_name(name, folder, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    assert resolve(["--data", str(tiny), "--model", name]).config.run.experiment == f"{folder}-reslt-seed0"


INSTEAD = r"--pretrained-file FILE; --no-pretrained starts from random weights"


def test_without_network_pretrained_weights_are_refused_at_once_with_their_url(unreachable_hub):
    """This applies to the hub and to other hosts; the libraries by themselves would retry for a minute."""
    start = time.monotonic()
    with pytest.raises(
        UserError, match=f"resnet18: {unreachable_hub}/timm/.*model.safetensors .*cannot be fetched.*{INSTEAD}"
    ):
        reslt.create_model("resnet18", 5, pretrained=True)
    with pytest.raises(UserError, match=rf"{unreachable_hub}/x-1234\.pth is in no cache .*refused.*{INSTEAD}"):
        pretrained._url_file(f"{unreachable_hub}/x-1234.pth", "--pretrained: the weights of x")
    with pytest.raises(UserError, match=r"config\.json is in no cache .*or its folder: --model local-dir:FOLDER"):
        reslt.create_model("hf-hub:org/name", 5)
    assert time.monotonic() - start < 2


def test_a_host_that_never_answers_times_out(at_endpoint, monkeypatch):
    monkeypatch.setattr(pretrained, "PATIENCE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        at_endpoint(url)
        start = time.monotonic()
        for names in ({"hf_hub_id": "org/name"}, {"url": f"{url}/x.pth"}):
            monkeypatch.setattr(
                timm, "get_pretrained_cfg", lambda name, names=names: timm.models.PretrainedCfg(**names)
            )
            with pytest.raises(UserError, match=f"cannot be fetched .*timed out.*{INSTEAD}"):
                pretrained.weights_of("some_model")
        assert time.monotonic() - start < 2.5


def test_waiting_for_a_host_is_bounded_whatever_causes_the_delay(monkeypatch):
    monkeypatch.setattr(pretrained, "PATIENCE_SECONDS", -0.4)  # plus half a second of grace
    with pytest.raises(TimeoutError, match="no answer"):
        pretrained._answered(threading.Event().wait)


def test_timm_reads_weights_from_the_fetched_files(hub, monkeypatch):
    """A classifier for other classes is left out, as in timm; a model without weights is refused by its name."""
    cfg = timm.models.PretrainedCfg(hf_hub_id="org/name", num_classes=7, classifier="fc", custom_load=True)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    weights = pretrained.weights_of("cifar_resnet20")
    assert weights["custom_load"] is False
    assert [path.rpartition("/")[2] for path in hub.asked][-1] == "model.safetensors"
    settings = ModelSettings(model="cifar_resnet20", model_kwargs={"channels": CHANNELS}, pretrained=True)
    backbone = create_backbone(settings, 5)
    torch.testing.assert_close(backbone.conv1.weight, exported_convolution(hub.folder), rtol=0, atol=0)
    assert backbone.fc.out_features == 5
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no pretrained weights for cifar_resnet20; .*--no-pretrained"):
        pretrained.weights_of("cifar_resnet20")


def test_missing_weights_end_a_training_before_it_writes_anything(unreachable_hub, tmp_path, run_script):
    data = make_dataset(tmp_path / "data")
    (data / "info.yaml").write_text("image_root: images\ndefaults: {pretrained: true}\n")
    flags = ["--data", data, "--model", "resnet18", "--img-size", "16", "--output", tmp_path / "runs"]
    outcome = run_script("train", *flags)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: --pretrained: the weights of resnet18: ")
    assert not list((tmp_path / "runs").glob("[!.]*"))
