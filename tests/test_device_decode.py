"""Images decoded and cropped on the device equal the host's: the same pixels, labels and errors. The CPU is the device
here; libjpeg decodes on both sides."""

import io
import multiprocessing
import os
import re
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from builders import CPU, settings_of, train_loader_of
from PIL import Image
from torch.utils.data import DataLoader

from reslt.augment.host_transforms import train_transform
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import LocalFault, UserError
from reslt.data.datasets import load_dataset
from reslt.data.lists import read_list
from reslt.data.paths import ImageRoot
from reslt.loading import device_decode
from reslt.loading.batches import Loader
from reslt.loading.device_decode import DeviceDecoder, EncodedBatch, EncodedImages
from reslt.loading.image_dataset import ListedImages
from reslt.loading.loaders import DeviceDecodeLoader, HostLoader
from reslt.loading.resident import random_table
from reslt.loading.workers import UnlessFault

collate = UnlessFault(EncodedBatch.of)
# Before Pillow 13, tall boxes are resized rows first, which rounds a different intermediate result.
as_pillow_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="the host's pixels are Pillow 13's")
OWN = dict(input_size=(3, 48, 48), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)


def config(**changes) -> Config:
    return Config.of(**dict(crop="rrc", aa=None, color_jitter=(0.0,), batch_size=8, workers=0) | changes)


def settings(**changes) -> ImageSettings:
    return settings_of(config(**changes), OWN)


def train_loader(folder: Path, **changes) -> Loader:
    return train_loader_of(load_dataset(str(folder)), config(**changes), settings(**changes))


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Return noise on a coarse pattern. Keep sides below three times the input's: the host decodes larger images at half
    their size."""
    generator = np.random.default_rng(height * width)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = generator.integers(-25, 25, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_thumbnail(image: Image.Image) -> bytes:
    """Return a JPEG whose EXIF block contains a whole JPEG with its own end marker."""
    thumbnail = saved(image.resize((16, 12)))
    return saved(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail)


GOES_ENCODED = {
    "4:2:0": saved(photo(70, 110)),
    "4:4:4": saved(photo(110, 70), subsampling=0, quality=95),
    "4:2:2": saved(photo(90, 91), subsampling=1),
    "gray": saved(photo(75, 60, "L")),
    "upright by EXIF": saved(photo(60, 80), exif=turned(1)),
    "with a thumbnail": with_thumbnail(photo(81, 65)),
    "with bytes after its end": saved(photo(50, 52)) + b"PK\3\4 and an archive",
    "named otherwise.png": saved(photo(49, 51)),
}
GOES_DECODED = {
    "progressive": saved(photo(72, 112), progressive=True),
    "CMYK": saved(photo(64, 80, "CMYK")),
    "RGB-coded": saved(photo(66, 80), keep_rgb=True),
    "turned": saved(photo(68, 100), exif=turned(6)),
    "mirrored": saved(photo(67, 100), exif=turned(2)),
    "PNG": saved(photo(55, 95), "PNG"),
    "gray PNG": saved(photo(56, 95, "L"), "PNG"),
    "GIF": saved(photo(57, 95), "GIF"),
    "end cut off, then zeros": saved(photo(58, 95))[:-2] + bytes(100),  # libjpeg finds all pixels
}


def listed(folder: Path, files: dict[str, bytes]):
    """Write the files and a list in which image i has label i. Return the list and its image root."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "train.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(files)))
    return read_list(folder / "train.txt"), ImageRoot(folder)


def host_and_device(
    folder: Path, files: dict[str, bytes], image_settings: ImageSettings, seed=3
) -> tuple[ListedImages, EncodedImages]:
    images, root = listed(folder, files)
    return ListedImages(images, root, train_transform(image_settings), seed), EncodedImages(
        images, root, image_settings, seed
    )


def batch_of(images: EncodedImages, epoch: int) -> EncodedBatch:
    return collate(images.__getitems__([(epoch, i) for i in range(len(images))]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_interpolation": "random"},
        {"train_interpolation": "lanczos", "hflip": 0.0},
        {"train_interpolation": "bicubic", "hflip": 1.0, "scale": (0.01, 0.3), "ratio": (0.3, 3.0)},
        {"scale": (1.0, 1.0)},
    ],
)
@as_pillow_13
def test_crops_and_labels_are_the_hosts_for_every_kind_of_file(tmp_path, changes):
    image_settings = settings(**changes)
    host, images = host_and_device(tmp_path, GOES_ENCODED | GOES_DECODED, image_settings)
    decoder = DeviceDecoder(images, CPU, image_settings.size)
    for epoch in range(3):
        batch = batch_of(images, epoch)
        crops = decoder(batch)
        assert crops.shape == (len(images), 3, 48, 48)
        for i, crop in enumerate(crops):
            wanted, label = host[epoch, i]
            assert torch.equal(crop, wanted), (epoch, images.place(i), (crop != wanted).float().mean())
            assert batch.labels[i] == label == i
        assert batch.indices.tolist() == list(range(len(images)))


def test_plain_jpegs_are_passed_encoded_and_all_other_files_decoded(tmp_path):
    _, images = host_and_device(tmp_path, GOES_ENCODED | GOES_DECODED, settings())
    batch = batch_of(images, 0)
    found = dict(zip(GOES_ENCODED | GOES_DECODED, batch.is_jpeg.tolist(), strict=True))
    assert found == dict.fromkeys(GOES_ENCODED, True) | dict.fromkeys(GOES_DECODED, False)
    for content, file in zip(batch.contents(), GOES_ENCODED.values(), strict=False):
        assert bytes(content.numpy()) == file


def test_only_the_crop_of_a_decoded_image_is_passed(tmp_path):
    _, images = host_and_device(tmp_path, {"x.png": GOES_DECODED["PNG"]}, settings(scale=(0.25, 0.25)))
    content, (height, width), box, *_ = images[0, 0]
    assert content.shape == (3, height, width)
    assert box == (0, 0, height, width)
    assert height * width == pytest.approx(55 * 95 / 4, rel=0.03)


def damaged_tables(jpeg: bytes) -> bytes:
    """Return the JPEG with a Huffman table that claims more codes than exist."""
    start = jpeg.index(b"\xff\xc4") + 5
    return jpeg[:start] + b"\xff" * 16 + jpeg[start + 16 :]


BROKEN = {
    "cut": GOES_ENCODED["4:2:0"][:-500],
    "cut and with a thumbnail": GOES_ENCODED["with a thumbnail"][:-300],
    "cut to its header": GOES_ENCODED["4:2:0"][:100],
    "empty": b"",
    "text": b"not an image",
    "long": saved(Image.new("RGB", (1010, 10))),
    "damaged tables": damaged_tables(GOES_ENCODED["4:2:0"]),
}


@pytest.mark.parametrize("kind", [*BROKEN, "gone", "folder", "pipe"])
def test_a_file_that_the_host_refuses_is_refused_with_the_same_message(tmp_path, kind):
    image_settings = settings()
    files = {"first.jpg": GOES_ENCODED["gray"], "bad.jpg": BROKEN.get(kind, b""), "third.jpg": GOES_ENCODED["4:4:4"]}
    host, images = host_and_device(tmp_path, files, image_settings)
    bad = tmp_path / "bad.jpg"
    if kind not in BROKEN:
        bad.unlink()
        {"gone": lambda: None, "folder": bad.mkdir, "pipe": lambda: os.mkfifo(bad)}[kind]()
    with pytest.raises(LocalFault, match=rf"train\.txt:2: {re.escape(str(bad))}: .*; repair or replace") as wanted:
        host[0, 1]
    decoder = DeviceDecoder(images, CPU, image_settings.size)
    batch = collate(images.__getitems__([(0, i) for i in range(3)]))
    if kind == "damaged tables":  # only the decoder finds these, not the worker
        with pytest.raises(LocalFault) as found:
            decoder(batch)
        assert str(found.value) == str(wanted.value)
    else:
        assert isinstance(batch, LocalFault)
        assert str(batch) == str(wanted.value)


@as_pillow_13
def test_a_file_that_the_device_cannot_decode_is_decoded_on_the_host_and_named(tmp_path, monkeypatch):
    image_settings = settings()
    host, images = host_and_device(tmp_path, GOES_ENCODED, image_settings)
    decoder = DeviceDecoder(images, CPU, image_settings.size)
    plain = device_decode.decode_jpeg

    def refuses_gray(files, **options):
        if any(bytes(file.numpy()) == GOES_ENCODED["gray"] for file in files):
            raise RuntimeError("Failed to decode batch: 8\nException raised from ...")
        return plain(files, **options)

    monkeypatch.setattr(device_decode, "decode_jpeg", refuses_gray)
    with pytest.warns(
        UserWarning, match=r"train\.txt:4 gray: decoded on the host.* \(Failed to decode batch: 8\)$"
    ) as seen:
        crops = decoder(batch_of(images, 0))
    assert sum(warning.category is UserWarning for warning in seen) == 1  # torchvision adds others
    assert torch.equal(crops, torch.stack([host[0, i][0] for i in range(len(host))]))


def test_running_out_of_memory_is_not_mistaken_for_a_broken_file(tmp_path, monkeypatch):
    _, images = host_and_device(tmp_path, GOES_ENCODED, settings())
    decoder, calls = DeviceDecoder(images, CPU, 48), []

    def full(files, **_):
        calls.append(len(files))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device_decode, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder(batch_of(images, 0))
    assert calls == [len(GOES_ENCODED)]


def test_a_torchvision_that_cannot_decode_on_the_device_is_reported_before_the_first_batch(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(device_decode, "decode_jpeg", fails)
    with pytest.raises(
        UserError, match=r"^--decode device: .* on cpu \(decode_jpegs_cuda: .* support\); use --decode host$"
    ):
        DeviceDecoder(None, CPU, 48)


def test_a_batch_is_decoded_in_one_call_and_a_large_one_in_blocks_of_bounded_memory(tmp_path, monkeypatch):
    image_settings = settings()
    _, images = host_and_device(tmp_path, GOES_ENCODED | GOES_DECODED, image_settings)
    decoder, batch, sizes = DeviceDecoder(images, CPU, image_settings.size), batch_of(images, 0), []
    plain = device_decode.decode_jpeg

    def measured(files, **options):
        decoded = plain(files, **options)
        sizes.append([image.numel() for image in decoded])
        return decoded

    monkeypatch.setattr(device_decode, "decode_jpeg", measured)
    wanted = decoder(batch)
    assert [len(call) for call in sizes] == [len(GOES_ENCODED)]
    for bound in (60_000, 1):
        sizes.clear()
        monkeypatch.setattr(device_decode, "BLOCK_BYTES", bound)
        assert torch.equal(decoder(batch), wanted)
        assert sum(map(len, sizes)) == len(GOES_ENCODED)
        assert all(sum(call) <= bound or len(call) == 1 for call in sizes)
        assert any(len(call) > 1 for call in sizes) == (bound > 1)


def test_an_image_of_one_pixel_can_always_be_cropped(tmp_path):
    image_settings = settings()
    _, images = host_and_device(
        tmp_path, {"x.jpg": saved(Image.new("RGB", (1, 1), (9, 9, 9)), subsampling=0)}, image_settings
    )
    decoder = DeviceDecoder(images, CPU, image_settings.size)
    for epoch in range(20):
        assert (decoder(batch_of(images, epoch)) == 9).all()


def test_only_contents_and_labels_are_tensors_and_they_are_pinned_and_moved(tmp_path, monkeypatch):
    """Each tensor that a worker passes on uses up a file descriptor."""
    _, images = host_and_device(tmp_path, GOES_ENCODED, settings())
    batch = batch_of(images, 0)
    assert {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)} == {"content", "labels"}
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    copy = batch.pin_memory()
    assert [id(tensor) for tensor in pinned] == [id(batch.content), id(batch.labels)]
    assert torch.equal(copy.content, batch.content)
    moved = copy.to(torch.device("meta"), non_blocking=True)
    assert moved.labels.device.type == "meta"
    assert moved.content.device.type == "cpu"
    assert len(moved) == len(GOES_ENCODED)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_pass_batches_to_the_main_process(tmp_path, method, workers):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    image_settings = settings()
    _, images = host_and_device(tmp_path, GOES_ENCODED | GOES_DECODED, image_settings)
    keys = [[(0, i) for i in range(9)], [(1, i) for i in range(4, 12)]]
    loader = DataLoader(
        images, batch_sampler=keys, collate_fn=collate, num_workers=workers, multiprocessing_context=method
    )
    decoder = DeviceDecoder(images, CPU, image_settings.size)
    for batch, its_keys in zip(loader, keys, strict=True):
        assert torch.equal(decoder(batch), decoder(collate([images[key] for key in its_keys])))
        assert batch.labels.tolist() == [i for _, i in its_keys]


def test_a_worker_passes_an_error_to_the_main_process(tmp_path):
    _, images = host_and_device(tmp_path, {"x.jpg": BROKEN["cut"]}, settings())
    (found,) = DataLoader(images, batch_sampler=[[(0, 0)]], collate_fn=collate, num_workers=1)
    assert isinstance(found, UserError)
    assert "train.txt:1: " in str(found)


def test_worker_processes_receive_the_list_by_reference(tmp_path):
    images, root = listed(tmp_path, {f"{'x' * 100}{i}.jpg": b"" for i in range(1000)})
    assert images.text.nbytes > 100_000
    assert len(ForkingPickler.dumps(EncodedImages(images, root, settings(), 0))) < 20_000


@pytest.fixture
def photos(tmp_path):
    """A dataset of 24 JPEGs of different sizes in three classes."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(24):
        photo(60 + i, 100 - i).save(folder / f"images/{i}.jpg", quality=90)
        lines.append(f"{i}.jpg {i % 3}\n")
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("".join(lines))
    (folder / "info.yaml").write_text("image_root: images\n")
    return folder


@as_pillow_13
def test_the_loader_gives_the_hosts_batches(photos):
    """Without augmentation after crop and flip, host and device draw the same numbers and produce the same pixels."""
    host = train_loader(photos, workers=2, data_on_device="off")
    device = train_loader(photos, workers=2, decode="device")
    assert isinstance(host, HostLoader)
    assert isinstance(device, DeviceDecodeLoader)
    for epoch in (0, 1):
        pairs = zip(host.windows(epoch, 1), device.windows(epoch, 1), strict=True)
        for (batch,), (other,) in pairs:
            assert torch.equal(batch[0], other[0])
            assert torch.equal(batch[1], other[1])


def test_augmentation_after_the_crop_is_a_function_of_seed_epoch_and_sample(photos):
    def images(aa, batch_size, epoch):
        loader = train_loader(photos, batch_size=batch_size, decode="device", aa=aa)
        order = loader.batches.order(epoch).ravel().tolist()
        return dict(zip(order, torch.cat([batch[0] for (batch,) in loader.windows(epoch)]), strict=True))

    first, plain = images("rand-m9-mstd0.5", 8, 1), images(None, 8, 1)
    others = images("rand-m9-mstd0.5", 12, 1)
    assert sorted(first) == sorted(others)
    assert all(torch.equal(image, others[i]) for i, image in first.items())
    changed = sum(not torch.equal(image, plain[i]) for i, image in first.items())
    assert 8 < changed < 24  # each of two operations with probability one half
    later = images("rand-m9-mstd0.5", 8, 2)
    assert not any(torch.equal(image, later[i]) for i, image in first.items())


@pytest.mark.parametrize(("aa", "columns"), [(None, 0), ("rand-m9-mstd0.5", 10)])
def test_cutout_is_drawn_from_the_last_columns_of_the_table(photos, aa, columns):
    loader = train_loader(photos, decode="device", aa=aa, cutout=8)
    assert (loader.policy.columns if aa else 0) == columns
    table = random_table(loader.batches.seed, 1, 24, columns + 2)
    order, size = loader.batches.order(1).ravel(), loader.size
    covered = torch.zeros(24, size, size, dtype=torch.bool)
    for i, (u, v) in enumerate(table[order, -2:]):
        top, left = (max(int(size * number) - 4, 0) for number in (u, v))
        covered[i, top : int(size * u) + 4, left : int(size * v) + 4] = True
    images = torch.cat([batch[0] for (batch,) in loader.windows(1)])
    assert not images[covered[:, None].expand_as(images)].any()
    assert (images[~covered[:, None].expand_as(images)] > 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"crop": "pad"}, "--crop pad"),
        ({"crop": "center"}, "--crop center"),
        ({"reprob": 0.5}, "--reprob"),
        ({"aa": "augmix-m5"}, "AugMix"),
    ],
)
def test_settings_that_the_device_cannot_apply_are_refused(photos, changes, reason):
    with pytest.raises(UserError, match=f"--decode device: .*{reason}.*; use --decode host"):
        train_loader(photos, decode="device", **changes)


def test_a_run_decodes_on_the_device(photos, tmp_path, run_script):
    flags = ["--data", photos, "--model", "cifar_resnet20", "--model-kwargs", "channels=8,16,32", "--img-size", "32"]
    flags += ["--epochs", "1", "--batch-size", "8", "--warmup-epochs", "0", "--color-jitter", "0.4", "--workers", "1"]
    outcome = run_script("train", *flags, "--decode", "device", "--output", tmp_path, "--experiment", "run")
    assert outcome.code == 0, outcome.err
    assert "JPEGs decoded and augmented on the CPU (--decode device)" in outcome.out
    assert "test  many" in outcome.out
