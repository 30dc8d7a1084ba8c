"""Decoding and augmentation: pure functions of (seed, epoch, sample)."""

import multiprocessing
import random
import re

import numpy as np
import pytest
import torch
from builders import eval_loader_of, settings_of, train_loader_of
from conftest import make_dataset
from PIL import Image
from timm.data import create_transform

from reslt.augment.decode import GAP, View, decode
from reslt.augment.host_transforms import eval_transform, posterize, seed_generators, train_transform
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.errors import LocalFault, UserError
from reslt.core.seeding import derive_seed
from reslt.data.datasets import load_dataset
from reslt.data.lists import read_list
from reslt.data.paths import ImageRoot
from reslt.loading.batches import Loader, Normalize
from reslt.loading.image_dataset import ListedImages

MODEL_DATA = dict(
    input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), interpolation="bicubic", crop_pct=0.9
)


def config(**changes) -> Config:
    values = dict(crop="pad", crop_padding=2, workers=0, batch_size=8, data_on_device="off") | changes
    return Config.of(**values)


def settings(**changes) -> ImageSettings:
    return settings_of(config(**changes), MODEL_DATA)


def train_loader(folder, **changes) -> Loader:
    return train_loader_of(load_dataset(str(folder)), config(**changes), settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": "pad"},
        {"crop": "rrc", "color_jitter": (0.4, 0.4, 0.4, 0.1)},
        {"crop": "pad", "aa": "cifar10", "reprob": 0.5},
        {"crop": "rrc", "aa": "rand-m9-mstd0.5", "reprob": 0.5, "remode": "rand"},
        {"crop": "pad", "aa": "augmix-m5-w2"},
        {"crop": "center", "aa": "rand-m9-mstd0.5", "reprob": 0.5},
    ],
)
def test_a_samples_augmentation_depends_on_seed_epoch_and_sample_alone(tiny, changes):
    dataset = load_dataset(str(tiny))

    def sample(seed, epoch, index, before=0):
        torch.manual_seed(before), random.seed(before), np.random.seed(before)
        images = ListedImages(dataset.lists["train"], dataset.image_root, train_transform(settings(**changes)), seed)
        return images[epoch, index][0]

    first = sample(1, 2, 3)
    assert torch.equal(first, sample(1, 2, 3, before=99))
    others = [sample(2, 2, 3), sample(1, 3, 3)]
    assert all(not torch.equal(first, other) for other in others)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 16, 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(tiny, workers):
    """They are equal if each batch is dropped at once, so that its memory is reused, and if all are kept."""
    alone, helped = (train_loader(tiny, workers=number, batch_size=2) for number in (0, workers))
    alone, helped = (
        [*loader.epoch(0), *(batch for (batch,) in list(loader.windows(1))), *loader.epoch(2)]
        for loader in (alone, helped)
    )
    assert len(alone) == len(helped) == 3 * (28 // 2)
    for (images, labels), (images2, labels2) in zip(alone, helped, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own(tiny):
    loader = train_loader(tiny, batch_size=7)
    orders = []
    for epoch in (0, 1, 0):
        loader.batches.epoch = epoch
        orders.append([index for batch in loader.batches for _, index, _ in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(28))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_limit_train_spreads_over_the_list(tiny):
    loader = train_loader(tiny, limit_train=4, batch_size=2)
    assert loader.batches.indices.tolist() == [0, 9, 18, 27]


def test_fewer_images_than_a_batch_are_the_users_error(tiny):
    with pytest.raises(UserError, match="28 images are fewer than --batch-size 29"):
        train_loader(tiny, batch_size=29)


def test_evaluation_shows_every_image_once_in_order(tiny):
    dataset = load_dataset(str(tiny))
    loader = eval_loader_of(dataset, "test", config(batch_size=4), settings())
    labels = [y for _, batch in loader.epoch(0) for y in batch.tolist()]
    assert labels == dataset.lists["test"].labels.tolist()


def test_normalization_is_that_of_the_unit_interval():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 / 255 - 0.5) / 0.2, (128 / 255 - 0.4) / 0.2, (255 / 255 - 0.3) / 0.1]
    out = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))(pixels)
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))


def test_an_image_of_the_right_size_passes_evaluation_unchanged():
    """CIFAR: crop_pct 1 and 32 px must neither resample nor crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = eval_transform(settings(img_size=32, crop_pct=1.0))(Image.fromarray(pixels))
    assert torch.equal(out, torch.from_numpy(pixels).permute(2, 0, 1))


def test_evaluation_resizes_the_short_side_by_crop_pct_and_crops_the_center():
    """A 512 x 256 image is resized to 256 and cropped to 224: its center is white, and only the center is kept."""
    picture = Image.new("RGB", (512, 256))
    picture.paste((255, 255, 255), (140, 0, 372, 256))
    transform = eval_transform(settings(img_size=224, crop_pct=0.875, interpolation="bilinear"))
    assert transform(picture).float().mean() == 255


def test_pad_and_crop_shows_zeros_at_the_border():
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    transform = train_transform(settings(crop_padding=4, hflip=0.0))
    torch.manual_seed(0)
    crops = torch.stack([transform(white) for _ in range(64)])
    assert (crops[:, :, 7:9, 7:9] == 255).all()  # the center is in every crop
    assert 0.2 < (crops[:, 0, 0, 8] == 0).float().mean() < 0.8  # rows above the image: 4 of 9 offsets


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_the_resized_crop_obeys_scale_ratio_and_flip(hflip):
    """The whole area at ratio 1 is the picture itself, or its mirror; a quarter of the area is half of each side."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = train_transform(settings(crop="rrc", scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=hflip))
    expected = pixels[:, ::-1] if hflip else pixels
    assert torch.equal(whole(Image.fromarray(pixels)), torch.from_numpy(expected.copy()).permute(2, 0, 1))
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (1, 16, 3)))
    quarter = train_transform(settings(crop="rrc", scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=hflip))(ramp)
    assert 7 * 16 - 16 <= int(quarter.max()) - int(quarter.min()) <= 7 * 16  # 8 of 16 rows of a ramp in steps of 16


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(16, 16), (23, 19)])
def test_the_center_crop_is_the_view_of_evaluation_or_its_mirror_image(size, hflip):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = eval_transform(settings())(image)
    found = train_transform(settings(crop="center", hflip=hflip))(image)
    assert torch.equal(found, expected.flip(-1) if hflip else expected)


@pytest.mark.parametrize("crop", ["pad", "rrc", "center"])
@pytest.mark.parametrize("aa", ["cifar10", "v0", "original", "rand-m9-mstd0.5", "augmix-m5-w2", "3a"])
def test_auto_augment_follows_crop_and_flip_and_takes_the_place_of_color_jitter(crop, aa):
    """Only 3a contains color jitter, as in timm."""
    transform = train_transform(settings(crop=crop, aa=aa, color_jitter=(0.4,)))
    steps = re.findall(r"[A-Z]\w+(?=\(| object)", repr(transform))
    augment = next(i for i, step in enumerate(steps) if step in ("AutoAugment", "RandAugment", "AugMixAugment"))
    assert steps.index("RandomHorizontalFlip") < augment
    crops = {"pad": "RandomCrop", "center": "CenterOfResized"}
    assert crop == "rrc" or steps.index(crops[crop]) < steps.index("RandomHorizontalFlip")
    assert ("ColorJitter" in steps) == (aa == "3a")
    seed_generators(0)
    assert transform(Image.new("RGB", (20, 18), (90, 10, 200))).shape == (3, 16, 16)


def test_torchvisions_cifar_policy_is_the_one_used():
    """torchvision's own class makes the same pixels from the same draws; crop and flip are off."""
    from torchvision import transforms

    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    ours = train_transform(settings(aa="cifar10", crop_padding=0, hflip=0.0))
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        torch.rand(1)  # the flip's draw: a crop of the whole image draws none
        expected = transforms.functional.pil_to_tensor(theirs(pixels))
        torch.manual_seed(seed)
        assert torch.equal(ours(pixels), expected)
        changed += not torch.equal(expected, transforms.functional.pil_to_tensor(pixels))
    assert changed > 10


def test_areas_that_timms_rotations_and_shears_leave_empty_get_the_mean_color():
    """Other operations turn a white image gray or black, but never into this color."""
    transform = train_transform(settings(aa="original", crop_padding=0))
    torch.manual_seed(0), random.seed(0)
    outs = torch.stack([transform(Image.new("RGB", (16, 16), (255, 255, 255))) for _ in range(100)])
    assert (outs.movedim(1, -1) == torch.tensor([128, 102, 76])).all(-1).any()


@pytest.mark.parametrize("aa", ["v0", "rand-m2", "rand-m9-mstd0.5-inc1"])
def test_policies_that_posterize_to_zero_bits_give_a_black_image(aa):
    """At least one of 400 draws posterizes to 0 bits, which makes the image black."""
    transform = train_transform(settings(aa=aa, crop_padding=0))
    picture = Image.fromarray(np.random.default_rng(0).integers(1, 256, (16, 16, 3), dtype=np.uint8))
    outs = []
    for seed in range(400):
        seed_generators(seed)
        outs.append(transform(picture).max().item())
    assert min(outs) == 0
    assert max(outs) == 255
    black = posterize(picture, 0)
    assert (black.mode, black.size, black.getextrema()) == ("RGB", (16, 16), ((0, 0), (0, 0), (0, 0)))
    assert posterize(picture, 2).getpixel((0, 0)) == tuple(v & 0b11000000 for v in picture.getpixel((0, 0)))


def test_a_policy_that_timm_does_not_know_is_refused():
    with pytest.raises(UserError, match="--aa rand-m9-q3: Unknown RandAugment config section"):
        train_transform(settings(aa="rand-m9-q3"))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_fills_a_box_around_the_mean_and_leaves_the_rest(mode):
    """The erased box of a white image has the mean color (const), one color (rand), or noise (pixel)."""
    transform = train_transform(settings(reprob=1.0, remode=mode, crop_padding=0))
    random.seed(0), torch.manual_seed(0)
    for _ in range(20):
        out = transform(Image.new("RGB", (16, 16), (255, 255, 255)))
        erased = out[:, (out != 255).any(0)]  # (3, pixels of the box)
        assert 0 < erased.shape[1] < 0.5 * 16 * 16
        colors = erased.unique(dim=1).shape[1]
        if mode == "const":
            assert erased[:, 0].tolist() == [128, 102, 76]  # 255 x mean
        assert colors == 1 if mode != "pixel" else colors > 0.9 * erased.shape[1]
    assert torch.equal(
        train_transform(settings(reprob=1e-9, crop_padding=0))(Image.new("RGB", (16, 16), "red"))[0],
        torch.full((16, 16), 255, dtype=torch.uint8),
    )


def test_settings_left_open_are_the_models_own():
    found = settings()
    assert (found.size, found.mean, found.interpolation, found.crop_pct) == (16, (0.5, 0.4, 0.3), "bicubic", 0.9)
    found = settings(img_size=8, mean=(0.1, 0.1, 0.1), interpolation="bilinear", crop_pct=1.0)
    assert (found.size, found.mean, found.interpolation, found.crop_pct) == (8, (0.1, 0.1, 0.1), "bilinear", 1.0)


@pytest.mark.parametrize(
    ("damage", "workers"), [("truncated", 0), ("text", 0), ("gone", 0), ("empty", 0), ("truncated", 2)]
)  # only one case with workers: torch waits 5 s for each worker of an interrupted epoch
def test_an_image_that_cannot_be_read_names_file_and_line(tmp_path, workers, damage):
    folder = make_dataset(tmp_path / "d", side=64)
    dataset = load_dataset(str(folder))
    victim = dataset.image_root.folder / dataset.lists["train"].path(20)
    whole = victim.read_bytes()
    victim.write_bytes({"truncated": whole[:1500], "text": b"not an image", "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        victim.unlink()
    with pytest.raises(LocalFault, match=rf"train\.txt:21: {re.escape(str(victim))}: .*; repair or replace") as fault:
        list(train_loader(folder, workers=workers, batch_size=28).epoch(0))
    assert "\n" not in str(fault.value)


def test_derived_seeds_differ_and_fit_63_bits():
    seeds = {derive_seed(seed, epoch, sample) for seed in range(4) for epoch in range(50) for sample in range(200)}
    assert len(seeds) == 4 * 50 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    low_bits = np.array([seed & 0xFF for seed in seeds])
    assert abs(low_bits.mean() - 127.5) < 2


def test_worker_processes_get_the_list_by_reference(tiny):
    """A spawned worker (macOS, Windows, Python 3.14) unpickles the dataset: handles of shared memory, not the list."""
    from multiprocessing.reduction import ForkingPickler

    dataset = load_dataset(str(tiny))
    images = dataset.lists["train"]
    long = images.__class__(
        images.file, np.tile(images.text, 5000), images.ends, images.labels, images.lines_without_image
    )
    listed = ListedImages(long, dataset.image_root, train_transform(settings()), 0)
    assert long.text.nbytes > 1_000_000
    assert len(ForkingPickler.dumps(listed)) < 20_000


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """A real photo, 640 x 427 pixels."""
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0])


def listed_file(file, **changes) -> ListedImages:
    """Return the training loader's list of one image file, seeded with 0."""
    (file.parent / "train.txt").write_text(f"{file.name} 0\n")
    transform = train_transform(settings(crop="rrc", **changes))
    return ListedImages(read_list(file.parent / "train.txt"), ImageRoot(file.parent), transform, 0)


def save_turned(image: Image.Image, file, orientation: int, **options) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, exif=exif, **options)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "random"])
@pytest.mark.parametrize(
    ("name", "size", "side", "orientation"),
    [
        ("x.jpg", (60, 45), 48, 1),  # no view is large enough to be scaled
        ("x.jpg", (61, 47), 40, 6),
        ("x.jpg", (90, 20), 32, 3),  # mostly timm's fallback, the center
        ("x.png", (640, 427), 16, 1),  # other formats are never scaled
        ("x.png", (500, 301), 24, 8),
        ("x.png", (3, 2), 16, 1),
        ("x.webp", (200, 150), 16, 7),
    ],
)
def test_a_view_is_drawn_and_resized_as_by_timms_transform(
    tmp_path, scene, interpolation, name, size, side, orientation
):
    """Bit for bit, including the flip and the color jitter that are drawn after it; timm gets the whole decoded image."""
    save_turned(scene.resize(size), tmp_path / name, orientation, quality=90)
    images = listed_file(tmp_path / name, img_size=side, train_interpolation=interpolation, color_jitter=(0.4,))
    theirs = create_transform(
        side, is_training=True, interpolation=interpolation, color_jitter=0.4, auto_augment=None, normalize=False
    )
    whole = decode(tmp_path / name)
    for epoch in range(25):
        seed_generators(derive_seed(0, epoch, 0))
        expected = theirs(whole)
        assert torch.equal(images[epoch, 0][0], expected)
        seed_generators(derive_seed(0, epoch, 0))
        assert torch.equal(images.transform(whole), expected)


def scales_of(monkeypatch) -> list[float]:
    """Return a list that collects the factor by which each JPEG decoded from now on is scaled down."""
    from PIL.JpegImagePlugin import JpegImageFile

    scales, load = [], JpegImageFile.load

    def loaded(image):
        if image.tile:
            scales.append(image.decoderconfig[0] if image.decoderconfig else 1)
        return load(image)

    monkeypatch.setattr(JpegImageFile, "load", loaded)
    return scales


def test_a_large_jpeg_is_decoded_as_small_as_its_view_allows(tmp_path, scene, monkeypatch):
    """A view of 64 pixels is decoded at 1/8, 1/4 or 1/2 of the size if GAP = 1.5 pixels per pixel of the view remain."""
    scene.resize((1600, 1200)).save(tmp_path / "x.jpg", quality=90)
    scales = scales_of(monkeypatch)
    for side in (1200, 767, 400, 383, 200, 191, 100):
        view = View((0, 0, side, side), (64, 64), Image.Resampling.BILINEAR)
        assert decode(tmp_path / "x.jpg", lambda size, view=view: view).size == (64, 64)
    assert GAP == 1.5
    assert scales == [8, 4, 4, 2, 2, 1, 1]  # at 8: 768 = 64 x 1.5 x 8 and more; at 4: 384; at 2: 192


def test_a_scaled_view_differs_little_from_that_of_the_whole_image(tmp_path, scene, monkeypatch):
    scene.resize((1600, 1200), Image.Resampling.LANCZOS).save(tmp_path / "x.jpg", quality=90)
    images = listed_file(tmp_path / "x.jpg", img_size=112)
    whole, scales, differences = decode(tmp_path / "x.jpg"), scales_of(monkeypatch), []
    for epoch in range(20):
        seed_generators(derive_seed(0, epoch, 0))
        expected = images.transform(whole).int()
        differences.append((images[epoch, 0][0].int() - expected).abs())
    assert set(scales) >= {2, 4}
    assert torch.stack(differences).float().mean() < 0.6  # on a scale of 0 to 255
    assert torch.stack(differences).max() <= 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(803, 1001), (808, 1000)])
def test_a_scaled_view_shows_the_same_area_as_that_of_the_whole_image(tmp_path, orientation, size, monkeypatch):
    """Ramps along both sides: red and green show where a pixel comes from. Partial pixels at an edge shift nothing."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([across, down, across * 0], axis=2).round().astype(np.uint8)
    options = dict(quality=100, subsampling=0)
    save_turned(Image.fromarray(pixels), tmp_path / "x.jpg", orientation, **options)
    whole, scales = decode(tmp_path / "x.jpg"), scales_of(monkeypatch)
    view = View((40, 30, 790, 800), (30, 30), Image.Resampling.BILINEAR)
    asked = []
    scaled = decode(tmp_path / "x.jpg", lambda size: asked.append(size) or view)
    assert asked == [whole.size]
    difference = np.asarray(scaled).astype(int) - np.asarray(view.of(whole))
    assert np.abs(difference).max() <= 2
    assert (
        np.abs(difference.mean((0, 1))).max() < 0.3
    )  # a shift by half a pixel of the scaled image would be more than 1
    assert scales == [1 if orientation > 1 and size == (803, 1001) else 8]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_refused_even_if_it_is_decoded_small(tmp_path, scene, progressive):
    file = tmp_path / "x.jpg"
    scene.save(file, quality=90, progressive=progressive)
    whole = file.read_bytes()
    images = listed_file(file, img_size=16, scale=(1.0, 1.0), ratio=(1.5, 1.5))
    assert images[0, 0][0].shape == (3, 16, 16)
    for kept in (0.2, 0.5, 0.9):
        file.write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(LocalFault, match=r"train\.txt:1: .*x\.jpg: not a readable image \(.*truncated"):
            images[0, 0]


def test_a_large_view_of_every_kind_of_jpeg_is_decoded_small(tmp_path, scene, monkeypatch):
    """The kinds are gray, CMYK, progressive, and several images in one file."""
    view = View((0, 0, 640, 427), (20, 20), Image.Resampling.BILINEAR)
    kinds = {"L": {}, "CMYK": {}, "RGB": dict(progressive=True)}
    for mode, options in kinds.items():
        scene.convert(mode).save(tmp_path / f"{mode}.jpg", quality=95, **options)
    scene.save(tmp_path / "MPO.jpg", "MPO", quality=95, save_all=True, append_images=[scene.rotate(90)])
    wholes = {file: decode(file) for file in sorted(tmp_path.iterdir())}
    scales = scales_of(monkeypatch)
    for file, whole in wholes.items():
        scaled = decode(file, lambda size: view)
        assert (scaled.mode, scaled.size) == ("RGB", (20, 20))
        assert np.abs(np.asarray(scaled).astype(int) - np.asarray(view.of(whole))).mean() < 0.8
    assert scales == [8] * 4


def test_an_ended_loader_has_no_workers_and_starts_new_ones_for_the_next_epoch(tiny):
    loader = train_loader(tiny, workers=1)
    first = [labels.tolist() for _, labels in loader.epoch(0)]
    assert len(multiprocessing.active_children()) == 1
    loader.end()
    assert multiprocessing.active_children() == []
    assert [labels.tolist() for _, labels in loader.epoch(0)] == first
    loader.end()
