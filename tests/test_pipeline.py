"""The pipeline from image files to a batch: the decision, the facts that it depends on, and what a resumed run keeps."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import CPU, loading_of, settings_of
from conftest import TINY_FLAGS, make_dataset
from PIL import Image
from safetensors.torch import load_file

from reslt.config.schema import Config
from reslt.core.errors import LocalFault, UserError
from reslt.data.datasets import load_dataset
from reslt.loading.loaders import HostLoader, Loading
from reslt.loading.pipeline import DEVICE_DECODE, FEATURES, HOST, RESIDENT, Facts, Pipeline, choose_pipeline
from reslt.loading.resident import ResidentLoader

CIFAR = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=1.0)
IMAGENET = CIFAR | dict(input_size=(3, 224, 224), crop_pct=0.875)
MUCH = 2**40

# 100 images of 32 x 32 pixels, exactly a fifth of the memory of the CPU
SMALL = Facts("cpu", img_size=32, images=100, memory=5 * 100 * 3 * 32 * 32, stored_size=(32, 32))
NO_ROOM = "they do not fit in a fifth of the memory"
UNEQUAL = dict(stored_size=None, unequal="b.png differs in size from the images before it")
HOST_ONLY = dict(host_only="--reprob erases only on the host")
FIXED = dict(no_features="", views=2, feature_bytes=SMALL.memory // 5)  # which fit exactly
CROPPED = dict(no_features="--crop pad draws a new view")
UNCACHED = "--tune head computes no features once: "

TABLE = [  # --data-on-device, --decode, facts other than SMALL's -> training, evaluation, reason
    ("auto", "host", {}, RESIDENT, RESIDENT, ""),
    ("auto", "host", dict(device="cuda"), RESIDENT, RESIDENT, ""),
    ("auto", "host", dict(device="mps"), RESIDENT, RESIDENT, ""),
    # too many
    ("auto", "host", dict(memory=SMALL.memory - 1), HOST, HOST, NO_ROOM),
    ("auto", "host", dict(images=101), HOST, HOST, NO_ROOM),
    ("auto", "host", dict(device="cuda", images=101), HOST, HOST, NO_ROOM),
    ("auto", "host", dict(stored_size=(32, 33)), HOST, RESIDENT, NO_ROOM),
    # too large
    ("auto", "host", dict(memory=MUCH, img_size=128, stored_size=(128, 128)), RESIDENT, RESIDENT, ""),
    ("auto", "host", dict(memory=MUCH, img_size=129), HOST, HOST, "129 x 129 pixels are not small"),
    ("auto", "host", dict(memory=MUCH, stored_size=(128, 129)), HOST, RESIDENT, "129 x 128 pixels are not small"),
    ("auto", "host", dict(memory=MUCH, stored_size=(375, 500)), HOST, RESIDENT, "500 x 375 pixels are not small"),
    # training images that cannot be resident; those for evaluation are cropped to one size and not augmented
    ("auto", "host", UNEQUAL, HOST, RESIDENT, UNEQUAL["unequal"]),
    ("auto", "host", HOST_ONLY, HOST, RESIDENT, HOST_ONLY["host_only"]),
    ("auto", "host", UNEQUAL | dict(img_size=224), HOST, HOST, "224 x 224 pixels are not small"),
    # the flags decide
    ("off", "host", {}, HOST, HOST, "--data-on-device off"),
    ("off", "host", UNEQUAL | HOST_ONLY, HOST, HOST, "--data-on-device off"),
    ("on", "host", {}, RESIDENT, RESIDENT, "--data-on-device on"),
    ("on", "host", dict(memory=1, img_size=224, stored_size=(500, 375)), RESIDENT, RESIDENT, "--data-on-device on"),
    ("auto", "device", {}, DEVICE_DECODE, HOST, "--decode device"),
    ("auto", "device", UNEQUAL | dict(device="cuda", img_size=224), DEVICE_DECODE, HOST, "--decode device"),
    ("off", "device", {}, DEVICE_DECODE, HOST, "--decode device"),
    ("on", "device", {}, RESIDENT, RESIDENT, "--data-on-device on"),
    # features in place of images, however large these are
    ("auto", "host", FIXED, FEATURES, FEATURES, "--tune head"),
    ("auto", "host", FIXED | UNEQUAL | HOST_ONLY | dict(img_size=500, images=10**6), FEATURES, FEATURES, "--tune head"),
    ("auto", "host", FIXED | dict(feature_bytes=SMALL.memory // 5 + 1), RESIDENT, RESIDENT, UNCACHED + NO_ROOM),
    ("auto", "host", CROPPED, RESIDENT, RESIDENT, UNCACHED + CROPPED["no_features"]),
    ("auto", "host", CROPPED | UNEQUAL, HOST, RESIDENT, f"{UNEQUAL['unequal']}; {UNCACHED}{CROPPED['no_features']}"),
    ("auto", "host", CROPPED | dict(images=101), HOST, HOST, f"{NO_ROOM}; {UNCACHED}{CROPPED['no_features']}"),
    ("on", "host", FIXED, RESIDENT, RESIDENT, "--data-on-device on"),
    ("off", "host", FIXED, HOST, HOST, "--data-on-device off"),
]
PADDED = 2 * 4  # pixels, on both sides: images that are padded and cropped are resident with their padding on a CPU


def facts(**changes) -> Facts:
    return Facts(**vars(SMALL) | changes)


@pytest.mark.parametrize(("data_on_device", "decode", "changes", "training", "evaluation", "reason"), TABLE)
def test_flags_and_facts_decide_the_pipeline(data_on_device, decode, changes, training, evaluation, reason):
    found = choose_pipeline(data_on_device, decode, facts(**changes))
    views = 2 if training == FEATURES else 1
    assert found == Pipeline(training, evaluation, reason, facts(**changes).device, views)
    assert found.is_resident == (training in (RESIDENT, FEATURES))


@pytest.mark.parametrize("decode", ["host", "device"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (UNEQUAL, UNEQUAL["unequal"]),
        (HOST_ONLY, HOST_ONLY["host_only"]),
        (UNEQUAL | HOST_ONLY, HOST_ONLY["host_only"]),
    ],
)
def test_resident_images_that_are_requested_but_impossible_are_refused(changes, reason, decode):
    with pytest.raises(UserError) as refused:
        choose_pipeline("on", decode, facts(**changes))
    assert str(refused.value) == f"--data-on-device on: {reason}; use auto or off"


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        (Pipeline(RESIDENT, RESIDENT, ""), "images resident on the CPU, augmented there in batches"),
        (
            Pipeline(RESIDENT, RESIDENT, "--data-on-device on", "cuda"),
            "images resident on the GPU, augmented there in batches (--data-on-device on)",
        ),
        (Pipeline(HOST, RESIDENT, NO_ROOM), f"images decoded and augmented by worker processes ({NO_ROOM})"),
        (
            Pipeline(DEVICE_DECODE, HOST, "--decode device", "cuda"),
            "JPEGs decoded and augmented on the GPU (--decode device)",
        ),
        (
            Pipeline(FEATURES, FEATURES, "--tune head", "cuda", 2),
            "features of 2 fixed views, computed once (--tune head)",
        ),
        (Pipeline(FEATURES, FEATURES, "--tune head"), "features of 1 fixed view, computed once (--tune head)"),
    ],
)
def test_a_pipeline_says_where_images_are_and_why(pipeline, text):
    assert str(pipeline) == text


# Facts from a dataset's files


def loading(folder: Path, model_data: dict = CIFAR, device: torch.device = CPU, **changes) -> Loading:
    config = Config.of(**dict(batch_size=8, workers=0, crop="pad") | changes)
    return loading_of(load_dataset(str(folder)), config, settings_of(config, model_data), device)


def write_photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """A dataset of one JPEG per (width, height) in `train.txt`, and the first of them in `test.txt`."""
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (9 * i, 0, 0)).save(folder / f"{i}.jpg")
    (folder / "train.txt").write_text("".join(f"{i}.jpg {i % 2}\n" for i in range(len(sizes))))
    (folder / "test.txt").write_text("0.jpg 0\n")
    (folder / "info.yaml").write_text("image_root: .\n")
    return folder


def test_small_images_of_one_size_are_resident_on_a_cpu_by_default(tmp_path):
    """Like the embedded digits: PNGs of 32 x 32 pixels, cropped after padding."""
    found = loading(make_dataset(tmp_path / "digits", side=32))
    pipeline = found.pipeline()
    assert pipeline == Pipeline(RESIDENT, RESIDENT, "", "cpu")
    assert isinstance(found.training(pipeline), ResidentLoader)
    assert isinstance(found.evaluation("test", pipeline), ResidentLoader)


def test_large_photos_are_decoded_by_workers_by_default(tmp_path):
    found = loading(write_photos(tmp_path / "photos", [(300, 200)] * 8), IMAGENET, crop="rrc")
    pipeline = found.pipeline()
    assert pipeline == Pipeline(HOST, HOST, "224 x 224 pixels are not small", "cpu")
    assert isinstance(found.training(pipeline), HostLoader)
    assert isinstance(found.evaluation("test", pipeline), HostLoader)


def test_large_photos_for_a_small_input_are_resident_if_they_are_resized_before_anything_random(tmp_path):
    """The random resized crop takes its boxes from the whole photo; padding follows the resizing of the short side."""
    folder = write_photos(tmp_path / "photos", [(300, 200)] * 8)
    expected = Pipeline(HOST, RESIDENT, "300 x 200 pixels are not small", "cpu")
    assert loading(folder, crop="rrc").pipeline() == expected
    found = loading(folder, crop="pad")
    assert found.pipeline() == Pipeline(RESIDENT, RESIDENT, "", "cpu")
    assert found.training(found.pipeline()).pixels.shape == (8, 3, 32 + PADDED, 48 + PADDED)


def test_no_photo_is_read_after_the_first_large_one(tmp_path):
    folder = write_photos(tmp_path / "photos", [(300, 200)] * 3)
    found = loading(folder, batch_size=2, crop="rrc")
    for name in ("1.jpg", "2.jpg"):
        (folder / name).unlink()
    assert found.pipeline().training == HOST


@pytest.mark.parametrize("crop", ["pad", "rrc"])
def test_a_rotated_photo_has_the_size_in_which_it_is_displayed(tmp_path, crop):
    """The decision reads headers, the resident pixels are decoded: both must see the same size."""
    folder = write_photos(tmp_path / "photos", [(33, 47)] * 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (47, 33)).save(folder / "5.jpg", exif=exif)
    found = loading(folder, crop=crop)
    shape = (8, 3, int(32 * 47 / 33) + PADDED, 32 + PADDED) if crop == "pad" else (8, 3, 47, 33)
    assert found.training(found.pipeline()).pixels.shape == shape


def test_an_image_of_another_size_is_named(tiny):
    Image.new("RGB", (17, 16)).save(tiny / "images/train/1/2.png")
    reason = "train.txt:19 train/1/2.png differs in size from the images before it"
    small = dict(img_size=16, crop="rrc")
    pipeline = loading(tiny, **small).pipeline()
    assert (pipeline.training, pipeline.evaluation) == (HOST, RESIDENT)
    assert pipeline.reason.endswith(reason)
    with pytest.raises(UserError, match=rf"^--data-on-device on: .*{reason}; use auto or off$"):
        loading(tiny, **small, data_on_device="on").pipeline()


@pytest.mark.parametrize(("changes", "reason"), [({"reprob": 0.5}, "--reprob"), ({"aa": "augmix-m5"}, "AugMix")])
def test_augmentation_that_only_the_host_supports_is_named(tiny, changes, reason):
    pipeline = loading(tiny, **changes).pipeline()
    assert (pipeline.training, pipeline.evaluation) == (HOST, RESIDENT)
    assert reason in pipeline.reason
    with pytest.raises(UserError, match=f"^--data-on-device on: .*{reason}.*; use auto or off$"):
        loading(tiny, **changes, data_on_device="on").pipeline()


@pytest.mark.parametrize("data_on_device", ["auto", "on"])
def test_a_training_image_whose_header_cannot_be_read_ends_the_run_with_file_and_line(tiny, data_on_device):
    (tiny / "images/train/1/2.png").write_bytes(b"broken")
    with pytest.raises(LocalFault, match=r"train\.txt:19: .*train/1/2\.png: not an image of a supported format"):
        loading(tiny, data_on_device=data_on_device).pipeline()


def test_evaluation_does_not_read_training_images(tiny):
    shutil.rmtree(tiny / "images/train")
    found = loading(tiny, reprob=0.5)
    pipeline = found.pipeline(trains=False)
    assert pipeline.evaluation == RESIDENT
    assert len(list(found.evaluation("test", pipeline).epoch(0))) == 2  # 15 images in batches of 8


def test_all_lists_must_fit_in_the_memory_of_the_gpu(tiny, monkeypatch):
    """28 training and 15 test images of 16 x 16 pixels; the memory of the GPU is made up."""
    memory = 5 * (28 + 15) * 3 * 16 * 16
    for total, training in ((memory, RESIDENT), (memory - 1, HOST)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, t=total: SimpleNamespace(total_memory=t))
        assert loading(tiny, device=torch.device("cuda"), img_size=16).pipeline().training == training


# Resuming


@pytest.mark.parametrize(
    ("typed", "recorded", "changes", "training"),
    [
        ("auto", None, {}, RESIDENT),
        ("auto", "off", {}, HOST),
        ("auto", "on", {}, RESIDENT),
        ("auto", "on", {"img_size": 160}, RESIDENT),  # too large for a new run
        ("auto", "off", {"decode": "device"}, DEVICE_DECODE),
        ("off", "on", {}, HOST),
        ("on", "off", {}, RESIDENT),
    ],
)
def test_auto_keeps_what_a_resumed_run_recorded(tiny, typed, recorded, changes, training):
    assert loading(tiny, data_on_device=typed, **changes).pipeline(recorded).training == training


@pytest.mark.parametrize(("flags", "recorded"), [([], "on"), (["--reprob", "0.1"], "off")])
def test_a_checkpoint_records_the_choice_of_auto(tiny, tmp_path, run_script, flags, recorded):
    flags = [*TINY_FLAGS, "--data", tiny, "--output", tmp_path, "--experiment", "run", "--epochs", "1", *flags]
    assert run_script("train", *flags).code == 0
    state = json.loads((tmp_path / "run/checkpoints/1-3/state.json").read_text())
    assert state["config"]["data_on_device"] == recorded
    assert "data_on_device: auto" in (tmp_path / "run/config.yaml").read_text()


def test_a_run_that_resumes_with_auto_ends_as_if_uninterrupted(tiny, tmp_path, run_script):
    """It started with worker processes; a new run with auto would use resident images and draw other crops."""
    flags = [*TINY_FLAGS, "--data", tiny, "--output", tmp_path]
    host = [*flags, "--experiment", "host"]
    assert run_script("train", *host, "--data-on-device", "off").code == 0
    assert run_script("train", *flags, "--experiment", "resident").code == 0
    last = tmp_path / "host/checkpoints/2-6"
    expected = load_file(last / "model.safetensors")
    resident = load_file(tmp_path / "resident/checkpoints/2-6/model.safetensors")
    assert any(not torch.equal(expected[name], resident[name]) for name in expected)

    shutil.rmtree(last)
    rest = run_script("train", *host, "--resume", "auto")
    assert rest.code == 0, rest.err
    assert "images decoded and augmented by worker processes" in rest.out
    weights = load_file(last / "model.safetensors")
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert json.loads((last / "state.json").read_text())["config"]["data_on_device"] == "off"
