"""Prediction of photos: `.predict` of a loaded model, and `python -m reslt.predict`."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset, outcome_of, train_once
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

import reslt
from reslt.augment.host_transforms import CenterOfResized
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.data.paths import ImageRoot
from reslt.deploy import rows
from reslt.deploy.photo_list import PhotoList, photos_in, photos_of
from reslt.deploy.predict import _printer, main
from reslt.deploy.trained_model import TrainedModel

NAMES = ["great auk", "razorbill", "=puffin"]
FUSED = ("--experts", 2, "--tta", "flip", "--fusion", "max", "--prior-tau", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_dataset(tmp_path_factory.mktemp("data") / "tiny", (16, 8, 4), test_images=3, side=20)
    (folder / "info.yaml").write_text(
        f"image_root: images\ndefaults: {{branch: bn}}\nclass_names: {json.dumps(NAMES)}\n"
    )
    return folder


@pytest.fixture
def trained(data, run_script):
    """trained(name, *flags) -> folder of a run of one epoch, trained once for all tests that read it."""
    return lambda name="reslt", *flags: train_once(run_script, data, name, "--epochs", 1, *flags)


@pytest.fixture
def predict(capsys):
    """predict('--ckpt', ...) -> Outcome of `python -m reslt.predict`, in this process."""
    return lambda *arguments: outcome_of(main, ("--workers", 0, *arguments), capsys)


@pytest.fixture
def photos(data, tmp_path) -> Path:
    """A folder with two photos, one of them in a subfolder, a damaged one and a text file."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(data / "images/test/0/0.png", folder / "a.png")
    shutil.copy(data / "images/test/1/0.png", folder / "sub/b.png")
    (folder / "damaged.jpg").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "readme.txt").write_text("photos")
    return folder


def timms_probabilities(model: TrainedModel, file: Path) -> np.ndarray:
    """Return the softmax of the module's logits for a file that PIL decodes and timm transforms."""
    module, described = model
    transform = create_transform(
        described["img_size"],
        is_training=False,
        **{name: described[name] for name in ("interpolation", "crop_pct", "mean", "std")},
    )
    with torch.no_grad():
        return module(transform(Image.open(file).convert("RGB"))[None]).softmax(1)[0].numpy()


def logits_of_evaluation(run_script, run: Path, out: Path) -> torch.Tensor:
    outcome = run_script("evaluate", "--ckpt", run, "--logits", out / "l.safetensors", "--output", out)
    assert outcome.code == 0, outcome.err
    return load_file(out / "l.safetensors")["logits"]


def test_a_path_an_image_and_arrays_are_predicted_alike(data, trained):
    model = reslt.load_run(trained())
    module, described = model
    assert (module, described) == (model.module, model.description) == (model[0], model[1])
    assert len(model) == 2
    file = data / "images/test/0/0.png"
    image = Image.open(file)
    expected = timms_probabilities(model, file)
    one = model.predict(str(file))
    assert one.classes == np.argsort(-expected).tolist()
    assert one.names == [NAMES[k] for k in one.classes]
    np.testing.assert_allclose(one.probabilities, np.sort(expected)[::-1], rtol=1e-5)
    assert model.predict(file) == model.predict(image) == model.predict(np.asarray(image)) == one
    both = model.predict(iter([file, image]))
    assert both == model.predict(np.stack([np.asarray(image)] * 2))
    assert both[0].names == both[1].names == one.names
    np.testing.assert_allclose(both[0].probabilities, one.probabilities, rtol=1e-4)
    assert len(model.predict(file, topk=2).names) == 2
    assert str(one).startswith(f"{one.names[0]} {100 * one.probabilities[0]:.1f} %, ")
    assert "3 classes, 16 px, not calibrated, on cpu" in repr(model)


def test_probabilities_are_calibrated_with_the_temperature(data, trained):
    module, described = reslt.load_run(trained())
    file, plain = data / "images/test/0/0.png", TrainedModel(module, described).predict(data / "images/test/0/0.png")
    calibrated = TrainedModel(module, described | {"temperature": 2.0}).predict(file)
    roots = np.sqrt(plain.probabilities)  # softmax(z / 2) is proportional to the root of softmax(z)
    np.testing.assert_allclose(calibrated.probabilities, roots / roots.sum(), rtol=1e-5)
    assert calibrated.classes == plain.classes


def test_an_image_in_memory_is_read_as_a_file_is(data, trained, tmp_path):
    """This includes EXIF orientation and 16 bits per value."""
    model, pixels = reslt.load_run(trained()), Image.open(data / "images/test/0/0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(tmp_path / "turned.png", exif=exif)
    upright = model.predict(pixels.transpose(Image.Transpose.ROTATE_270))
    assert model.predict(tmp_path / "turned.png") == model.predict(Image.open(tmp_path / "turned.png")) == upright
    assert upright != model.predict(pixels)
    deep = np.asarray(pixels.convert("L"), np.uint16) << 8
    assert model.predict(Image.fromarray(deep)) == model.predict(pixels.convert("L"))


@pytest.mark.parametrize(
    ("photo", "reason"),
    [
        ("nowhere.jpg", "nowhere.jpg: there is no such image"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 3)), "type float64"),
        ([3], "of type int; give a path"),
        (3, "of type int; give a path"),
        (None, "of type NoneType; give a path"),
        (b"a.png", "of type bytes; give a path"),
        (Image.new("F", (4, 4)), "floating-point"),
    ],
)
def test_an_input_that_is_no_photo_is_refused(trained, photo, reason):
    with pytest.raises(UserError, match=reason):
        reslt.load_run(trained()).predict(photo)


def test_predictions_equal_those_of_evaluation(data, trained, run_script, predict, tmp_path, caplog):
    """Two experts, mirror images, the maximum over branches and a prior. The module by itself lacks mirror images and the
    maximum."""
    run = trained("fused", *FUSED)
    model = reslt.load_run(run)
    assert "the module predicts without --tta flip" in caplog.text
    logits = logits_of_evaluation(run_script, run, tmp_path)
    files = [data / "images" / line.split()[0] for line in (data / "test.txt").read_text().splitlines()]
    predicted = model.predict(files, topk=3)
    found = np.array([[dict(zip(p.classes, p.probabilities, strict=True))[k] for k in range(3)] for p in predicted])
    np.testing.assert_allclose(found, logits.softmax(1).numpy(), rtol=1e-4)
    assert np.abs(found[0] - timms_probabilities(model, files[0])).max() > 1e-3
    outcome = predict("--ckpt", run, files[0], "--topk", 1)
    assert outcome.code == 0
    assert "warning" not in outcome.err  # the command lacks nothing
    assert outcome.out.count("\n") == 1
    assert outcome.out.endswith(f"{predicted[0].names[0]:<9} {100 * predicted[0].probabilities[0]:5.1f} %\n")


def test_a_table_names_the_classes_and_the_reason_for_a_damaged_file(trained, photos, predict):
    outcome = predict("--ckpt", trained(), photos, "--topk", 2)
    assert outcome.code == 0
    assert "probabilities are not calibrated" in outcome.err
    a, damaged, b = outcome.out.splitlines()
    model = reslt.load_run(trained())
    for line, file in ((a, photos / "a.png"), (b, photos / "sub/b.png")):
        first, second = model.predict(file).names[:2]
        assert str(file)[-50:] in line
        assert line.index(first) < line.index(second)
    assert "not a readable image" in damaged
    assert outcome.err.count("warning") == 2
    assert "not predicted: 1 other file (.txt)\n" in outcome.err
    assert "1 of 3 photos could not be read" in outcome.err


def test_a_csv_file_has_a_row_per_photo(trained, photos, predict, tmp_path):
    out = tmp_path / "sub/predictions.CSV"
    outcome = predict("--ckpt", trained(), photos / "sub", photos / "a.png", photos / "damaged.jpg", "--output", out)
    assert outcome.code == 0
    found = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["path"] for row in found] == [str(photos / name) for name in ("sub/b.png", "a.png", "damaged.jpg")]
    expected = reslt.load_run(trained()).predict(photos / "a.png")
    assert [int(found[1][f"class_{k}"]) for k in (1, 2, 3)] == expected.classes
    names = [name.replace("=", "'=") for name in expected.names]  # so that no spreadsheet takes it for a formula
    assert [found[1][f"name_{k}"] for k in (1, 2, 3)] == names
    np.testing.assert_allclose(
        [float(found[1][f"probability_{k}"]) for k in (1, 2, 3)], expected.probabilities, rtol=1e-4
    )
    assert found[1]["error"] == found[2]["name_1"] == ""
    assert "not a readable image" in found[2]["error"]
    again = predict("--ckpt", trained(), photos / "a.png", "--output", out)  # its own file is replaced
    assert again.code == 0
    assert len(out.read_text().splitlines()) == 2


def test_a_list_with_labels_is_read_from_its_datasets_image_root(data, trained, predict, tmp_path):
    out = tmp_path / "p.jsonl"
    assert predict("--ckpt", trained(), "--list", data / "test.txt", "--output", out).code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    lines = [line.rsplit(" ", 1) for line in (data / "test.txt").read_text().splitlines()]
    assert [[row["path"], row["label"]] for row in found] == [[path, int(label)] for path, label in lines]
    expected = reslt.load_run(trained()).predict(data / "images" / lines[-1][0])
    assert (found[-1]["names"], found[-1]["classes"], found[-1]["error"]) == (expected.names, expected.classes, None)
    np.testing.assert_allclose(found[-1]["probabilities"], expected.probabilities, rtol=1e-4)


def test_labels_are_matched_with_the_models_classes_by_name(data, trained, predict, tmp_path):
    (tmp_path / "info.yaml").write_text("class_names: [razorbill, great auk]\n")
    (tmp_path / "list.txt").write_text("test/1/0.png 0\ntest/0/0.png 1\n")
    arguments = ("--ckpt", trained(), "--list", tmp_path / "list.txt", "--data-dir", data / "images")
    assert predict(*arguments, "--output", tmp_path / "p.jsonl").code == 0
    rows_found = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows_found] == [1, 0]
    (tmp_path / "info.yaml").write_text("class_names: [razorbill, gull]\n")
    outcome = predict(*arguments)
    assert outcome.code == 2
    assert "list.txt:2: label 1 is the class 'gull', which" in outcome.err


def test_a_list_without_labels_may_have_paths_that_contain_spaces(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffa photo 1\r\n\n/b c.jpg\n")
    found = photos_in(tmp_path / "list.txt", None)
    assert (found.paths, found.labels, found.root.folder) == (["a photo 1", "/b c.jpg"], None, tmp_path)


def test_paths_that_do_not_exist_are_refused_at_once(photos):
    with pytest.raises(UserError, match=r"gone.png: there is no such file or folder \(2 of PHOTOS do"):
        photos_of([str(photos / "a.png"), str(photos / "gone.png"), str(photos / "gone")])


def test_other_files_of_folders_are_counted_and_named(photos, caplog):
    for name in ("b.CR2", "sub/c.CR2", "notes", "Thumbs.db"):
        (photos / name).write_bytes(b"")
    found = photos_of([str(photos), str(photos / "sub")])
    assert len(found.paths) == 3 + 1
    assert "not predicted: 5 other files (.CR2, no suffix, .txt)" in caplog.text  # sub/c.CR2 is in both folders


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.png 0\n\nb.png\nc.png 1\n", r"list.txt:3: 'b.png' has no label, but line 1 has one"),
        ("path label\na.png 0\n", r"list.txt:1: 'path label' has no label, but line 2 has one"),
        ("path,label\na.png,0\n", r"list.txt:1: 'path,label' is the header of a table; give a list of paths"),
    ],
)
def test_a_line_whose_format_differs_from_the_others_is_named(tmp_path, text, reason):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=reason):
        photos_in(tmp_path / "list.txt", None)


def test_an_error_about_missing_photos_names_the_folder_that_was_searched(trained, photos, predict, tmp_path):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    for outcome in (
        predict("--ckpt", trained(), "--list", tmp_path / "list.txt"),
        predict("--ckpt", trained(), "--list", tmp_path / "list.txt", "--data-dir", photos),
    ):
        assert "png: there is no such image (the list's paths start from " in outcome.err
        assert "--data-dir" in outcome.err


def test_an_error_about_ckpt_has_a_remedy_that_fits_the_command(photos, predict, run_script, tmp_path):
    (tmp_path / "notes.py").write_text("")
    assert "give the folder of a run (output/NAME)" in predict("--ckpt", tmp_path / "notes.py", photos / "a.png").err
    folded = Path(__file__).parent / "earlier_version/reslt_bn.safetensors"
    outcome = run_script("evaluate", "--ckpt", folded, "--calibrate", "--output", tmp_path)
    assert outcome.code == 2
    assert "this is a folded file, not a checkpoint; give the folder of its run" in outcome.err


@pytest.mark.parametrize("flag", ["--output", "--features", "--logits"])
def test_no_file_is_written_into_checkpoints(trained, photos, predict, monkeypatch, flag):
    monkeypatch.setattr("reslt.deploy.trained_model.read_run", None)  # an error if it were called
    checkpoint = next((trained() / "checkpoints").glob("*-*"))
    file = checkpoint / ("p.csv" if flag == "--output" else "p.safetensors")
    outcome = predict("--ckpt", trained(), photos / "a.png", flag, file)
    assert outcome.code == 2
    assert f"{flag} {file}: this is inside" in outcome.err


def test_columns_are_aligned_after_control_characters_are_escaped(capsys):
    names = ["\x1bauk", "gull"]  # 7 characters as \\x1bauk
    write = _printer(PhotoList(["a\tb.png", "long.png"], ImageRoot(Path("."))), names)
    for path, name in (("a\tb.png", names[0]), ("long.png", names[1])):
        write(rows.Row(path, None, (0,), (name,), (0.5,)))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a\\tb.png  \\x1bauk  50.0 %"
    assert second == "long.png  gull     50.0 %"


def test_parquet_has_the_columns_of_csv(trained, photos, predict, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "p.parquet"
    for _ in range(2):  # its own file is replaced
        assert predict("--ckpt", trained(), photos, "--topk", 1, "--output", out).code == 0
    table = parquet.read_table(out)
    assert table.column_names == ["path", "class_1", "name_1", "probability_1", "error"]
    assert table["name_1"].to_pylist()[1] is None
    assert table["name_1"].to_pylist()[0] == reslt.load_run(trained()).predict(photos / "a.png").names[0]


def test_parquet_without_its_package_is_refused_before_the_work(photos, predict, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    outcome = predict("--ckpt", "nowhere", photos, "--output", tmp_path / "p.parquet")
    assert outcome.code == 2
    assert "pip install pyarrow" in outcome.err


@pytest.mark.parametrize("kind", ["run", "folded"])
def test_features_times_the_classifier_are_the_logits(trained, run_script, photos, predict, tmp_path, kind):
    """A run's features are added over its three branches, so the logits are W f + 3 b; a folded file has one classifier."""
    ckpt = run = trained()
    if kind == "folded":
        ckpt = tmp_path / "folded.safetensors"
        assert run_script("evaluate", "--ckpt", run, "--output", tmp_path / "out", "--fold", ckpt).code == 0
    files = "--features", tmp_path / "f.safetensors", "--logits", tmp_path / "l.safetensors"
    outcome = predict("--ckpt", ckpt, photos, *files)
    assert outcome.code == 0, outcome.err
    features, logits = load_file(files[1])["features"], load_file(files[3])["logits"]
    assert features[1].isnan().all()
    assert logits[1].isnan().all()
    if kind == "run":
        weights = load_file(next((run / "checkpoints").glob("*-*/model.safetensors")))
        expected = features @ weights["backbone.fc.weight"].T + 3 * weights["backbone.fc.bias"]
    else:
        expected = reslt.load_folded(ckpt).module.get_classifier()(features)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]].detach(), rtol=1e-4, atol=1e-4)
    model = reslt.load_run(run)
    probabilities = model.predict(photos / "a.png").probabilities
    np.testing.assert_allclose(logits[0].softmax(0).sort(descending=True)[0], probabilities, rtol=1e-4)
    paths = (tmp_path / "f.txt").read_text().splitlines()
    assert paths == [str(photos / name) for name in ("a.png", "damaged.jpg", "sub/b.png")]


def test_invalid_input_is_an_error_of_one_line_and_leaves_no_file(data, trained, photos, predict, tmp_path):
    (tmp_path / "empty/sub").mkdir(parents=True)
    (tmp_path / "empty/sub/readme.txt").write_text("")
    (tmp_path / "of_others.txt").write_text("a.png 0\nsub/b.png 3\n")
    (tmp_path / "mine.csv").write_text("path,name\n")
    out = ("--output", tmp_path / "p.csv")
    cases = {
        "there is no image in this folder; 1 other file": (tmp_path / "empty", *out),
        "none of 2 photos could be read; the first is": (photos / "damaged.jpg", photos / "readme.txt", *out),
        "of_others.txt:2: label 3 is outside 0..2; the classes of the list are not those of": (
            "--list", tmp_path / "of_others.txt", "--data-dir", photos, *out,
        ),
        "the image root": ("--list", data / "test.txt", "--data-dir", tmp_path / "nowhere", *out),
        "it exists and contains no predictions": (photos, "--output", tmp_path / "mine.csv"),
        "give a file name that ends in .csv": (photos, "--output", tmp_path / "p.xlsx"),
        "give PHOTOS": out,
        "--device nowhere": (photos / "sub", "--device", "nowhere", *out),
        "--topk 0": (photos, "--topk", 0, *out),
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for reason, arguments in cases.items():
        outcome = predict("--ckpt", trained(), *arguments)
        assert (outcome.code, outcome.err.count("error: ")) == (2, 1), outcome.err
        assert reason in outcome.err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def write_many(file: Path) -> None:
    with rows.open_rows(file, 1, False) as opened:
        for i in range(5000):
            opened.write(rows.Row(f"{i * 7919 % 5000}.jpg", None, (i,), (f"{i}",), (1 / (i + 1),)))


@pytest.mark.parametrize("suffix", rows.KINDS)
def test_a_full_disk_leaves_no_partial_file(tmp_path, suffix):
    """A limit on the size of files makes a write fail as a full disk does."""
    resource = pytest.importorskip("resource")
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    limits, file = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / f"p{suffix}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_many(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(raised.value.filename).parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_a_model_without_class_names_is_reported(predict, photos):
    outcome = predict("--ckpt", Path(__file__).parent / "earlier_version/reslt_bn.safetensors", photos / "a.png")
    assert outcome.code == 0
    assert "has no class names" in outcome.err


@pytest.mark.parametrize(("width", "height"), [(640, 480), (500, 700), (333, 500)])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bilinear", 0.875), ("bicubic", 0.95), ("lanczos", 1.0)])
def test_resizing_only_the_center_of_a_photo_equals_resizing_all_of_it(photo, width, height, interpolation, crop_pct):
    """Less than 1 % of the values differ, by one level of 255."""
    settings = ImageSettings(96, (0.0,) * 3, (1.0,) * 3, interpolation, crop_pct, Config().augment)
    image = Image.open(photo).resize((width, height), Image.Resampling.LANCZOS)
    whole = create_transform(96, is_training=False, interpolation=interpolation, crop_pct=crop_pct).transforms[:2]
    expected = np.asarray(whole[1](whole[0](image)), int)
    difference = np.abs(np.asarray(CenterOfResized(settings)(image), int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
