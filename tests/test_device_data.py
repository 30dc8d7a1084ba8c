"""Images resident on the device: the same pixels as on the host, the same distribution of augmentations, each a pure
function of (seed, epoch, sample). A CPU is a device too."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import CPU, eval_loader_of, train_loader_of
from conftest import TINY_FLAGS, make_dataset
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import functional as F

from reslt.augment.host_transforms import eval_transform
from reslt.augment.policies import HostOnly
from reslt.augment.settings import ImageSettings
from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.core.locks import locked
from reslt.data.datasets import Dataset, load_dataset
from reslt.loading import pixel_cache, resident
from reslt.loading.ahead import BlocksAhead
from reslt.loading.batches import Loader, OrderedBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.kept_arrays import HEADER, digest
from reslt.loading.loaders import HostLoader
from reslt.loading.pixel_cache import pixels
from reslt.loading.resident import Augmentation, ResidentLoader, random_table

BASE = Config.of(batch_size=8, workers=0, crop="pad", crop_padding=2, img_size=16, data_on_device="on", seed=3)


pytestmark = pytest.mark.usefixtures("own_cache")


def settings_of(config: Config) -> ImageSettings:
    return ImageSettings(config.augment.img_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), "bilinear", 1.0, config.augment)


def settings(**changes) -> ImageSettings:
    return settings_of(BASE.changed(**changes))


def train_loader(dataset: Dataset, shard: BatchShard | None = None, **changes) -> Loader:
    config = BASE.changed(**changes)
    return train_loader_of(dataset, config, settings_of(config), CPU, shard)


def eval_loader(dataset: Dataset, shard: BatchShard, **changes) -> Loader:
    config = BASE.changed(**changes)
    return eval_loader_of(dataset, "test", config, settings_of(config), CPU, shard)


def epoch_of(loader, epoch: int = 0, first_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all uint8 images and labels of an epoch, in its order."""
    windows = list(loader.windows(epoch, first_step))
    return tuple(torch.cat([batch[i] for window in windows for batch in window]) for i in (0, 1))


def stored(folder) -> torch.Tensor:
    """Return the pixels of the training images, (N, 3, H, W)."""
    dataset = load_dataset(str(folder))
    images = dataset.lists["train"]
    files = [dataset.image_root.file(images.path(i)) for i in range(len(images))]
    return torch.stack([F.pil_to_tensor(Image.open(file).convert("RGB")) for file in files])


def test_without_augmentation_the_batches_equal_the_hosts_to_the_byte(tiny):
    """Order, labels and pixels are compared in two epochs, from within an epoch, in micro-batches, and on each of two
    processes."""
    dataset = load_dataset(str(tiny))
    for shard in (
        BatchShard(8),
        BatchShard(8, micro_batches=2),
        BatchShard(8, 0, 2),
        BatchShard(8, 1, 2, micro_batches=2, paired=True),
    ):
        off = train_loader(dataset, shard, crop_padding=0, hflip=0.0, data_on_device="off")
        on = train_loader(dataset, shard, crop_padding=0, hflip=0.0)
        assert isinstance(off, HostLoader)
        assert isinstance(on, ResidentLoader)
        assert len(off) == len(on)
        for epoch, first_step in ((0, 0), (1, 0), (1, 2), (1, 3)):
            hosts, devices = (list(loader.windows(epoch, first_step)) for loader in (off, on))
            assert len(hosts) == len(devices) == len(on) - first_step
            for window, device_window in zip(hosts, devices, strict=True):
                assert len(window) == len(device_window) == shard.micro_batches
                for batch, device_batch in zip(window, device_window, strict=True):
                    assert all(
                        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, device_batch, strict=True)
                    )
        assert on.places(1, 0) == off.places(1, 0)


def test_a_crop_and_a_flip_are_those_of_torchvision_for_the_same_draws(tiny):
    loader, augmentation = train_loader(load_dataset(str(tiny))), Augmentation(settings())
    files, table = stored(tiny), random_table(3, 1, 28, augmentation.columns)
    assert table.shape == (28, 3)
    images, _ = epoch_of(loader, 1)
    for image, i in zip(images, loader.batches.order(1).ravel(), strict=True):
        top, left = (int(u * 5) for u in table[i, :2])  # 16 + 2 * 2 - 16 + 1 places
        expected = F.crop(F.pad(files[i], 2), top, left, 16, 16)
        assert torch.equal(image, F.hflip(expected) if table[i, 2] < 0.5 else expected)


@pytest.mark.parametrize(
    "changes", [{}, {"aa": "cifar10"}, {"crop": "rrc", "aa": "rand-m9-mstd0.5"}, {"color_jitter": (0.4,)}]
)
def test_an_image_is_a_function_of_seed_epoch_and_sample(tiny, changes):
    """It depends on neither blocks, batch size and process nor the state of the global generators."""
    dataset = load_dataset(str(tiny))

    def images_by_sample(epoch=1, shard=None, block_bytes=None, **more):
        torch.manual_seed(np.random.randint(99)), np.random.seed(np.random.randint(99))
        loader = train_loader(dataset, shard, **changes, **more)
        if block_bytes:
            like = (loader.images, stored(tiny).numpy(), loader.batches, settings(**changes), CPU, loader.augmentation)
            loader = ResidentLoader(*like, block_bytes)
        shard = loader.batches.shard
        order = loader.batches.order(epoch)[:, np.concatenate(shard.positions)].ravel()
        return dict(zip(order.tolist(), epoch_of(loader, epoch)[0], strict=True))

    first = images_by_sample()
    for others in (
        images_by_sample(block_bytes=1),
        images_by_sample(block_bytes=3 * 8 * 16 * 16 * 2),
        images_by_sample(batch_size=4),
        images_by_sample(shard=BatchShard(8, 1, 2)),
    ):
        assert all(torch.equal(image, first[i]) for i, image in others.items() if i in first)
    differing = {
        "epoch": images_by_sample(epoch=2),
        "seed": images_by_sample(seed=4),
    }
    for name, others in differing.items():
        common = [i for i in others if i in first]
        assert np.mean([torch.equal(others[i], first[i]) for i in common]) < 0.5, name


def test_a_resumed_epoch_continues_with_the_same_images(tiny):
    loader = train_loader(load_dataset(str(tiny)), aa="cifar10")
    whole, rest = epoch_of(loader, 2), epoch_of(loader, 2, first_step=1)
    assert torch.equal(whole[0][8:], rest[0])
    assert torch.equal(whole[1][8:], rest[1])


@pytest.mark.parametrize(
    "changes", [{}, {"crop": "rrc"}, {"aa": "cifar10"}, {"aa": "v0"}, {"color_jitter": (0.4,)}, {"rotate": 90}]
)
def test_host_and_device_draw_from_one_distribution(tmp_path, changes):
    """Over many epochs, the test compares the mean and the variance of each image's brightness, contrast, differences
    between its halves (a flip changes their sign), and red minus blue. They may differ by 5 standard errors of the
    difference of two independent samples."""
    folder = make_dataset(tmp_path / "few", counts=(4, 2, 2), side=16)
    dataset, epochs = load_dataset(str(folder)), 250

    def statistics(on_device: str) -> np.ndarray:
        loader = train_loader(dataset, **changes, data_on_device=on_device)
        found = np.zeros((epochs, 8, 5))
        for epoch in range(epochs):
            images = epoch_of(loader, epoch)[0].float()
            order = loader.batches.order(epoch).ravel()
            halves = images[..., :8].mean((1, 2, 3)) - images[..., 8:].mean((1, 2, 3))
            rows = images[..., :8, :].mean((1, 2, 3)) - images[..., 8:, :].mean((1, 2, 3))
            color = images.mean((2, 3))
            features = [images.mean((1, 2, 3)), images.std((1, 2, 3)), halves, rows, color[:, 0] - color[:, 2]]
            found[epoch, order] = torch.stack(features, 1).numpy()
        return found

    host, device = statistics("off"), statistics("on")
    for moment in (lambda x: x, lambda x: (x - np.concatenate([host, device]).mean(0)) ** 2):
        a, b = moment(host), moment(device)
        error = np.sqrt((a.var(0) + b.var(0)) / epochs)
        assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error + 1e-9).all()


def test_random_interpolation_is_bilinear_or_bicubic_with_equal_chances(tiny):
    dataset = load_dataset(str(tiny))
    flags = dict(crop="rrc", scale=(0.9, 1.0), hflip=0.0)
    loaders = [train_loader(dataset, train_interpolation=name, **flags) for name in ("random", "bilinear", "bicubic")]
    drawn = []  # 1 for bilinear, -1 for bicubic
    for epoch in range(12):
        random, bilinear, bicubic = (epoch_of(loader, epoch)[0].flatten(1) for loader in loaders)
        equal = torch.stack([(random == other).all(1) for other in (bilinear, bicubic)])
        drawn += (equal[0].int() - equal[1].int())[(bilinear != bicubic).any(1)].tolist()
    assert set(drawn) == {1, -1}
    assert len(drawn) > 200
    assert abs(sum(drawn)) < 4 * len(drawn) ** 0.5  # four standard deviations


def test_evaluated_images_equal_the_hosts_to_the_byte(tmp_path):
    """Images of other sizes are kept as they are after resizing and the center crop."""
    folder = make_dataset(tmp_path / "d", test_images=4)
    for i, side in enumerate((20, 33, 16)):
        file = folder / f"images/test/{i}/0.png"
        Image.open(file).resize((side, side + 5)).save(file)
    dataset = load_dataset(str(folder))
    host = eval_loader(dataset, BatchShard(10), data_on_device="off")
    assert isinstance(host, HostLoader)
    for rank in (0, 1):
        rank_loader = eval_loader(dataset, BatchShard(10, rank, 2), data_on_device="auto")
        assert isinstance(rank_loader, ResidentLoader)
        start, stop = BatchShard(10, rank, 2).span(12)
        expected = torch.cat([images for images, _ in host.epoch(0)])[start:stop]
        found = torch.cat([images for images, _ in rank_loader.epoch(0)])
        assert torch.equal(found, expected)
        labels = torch.cat([labels for _, labels in rank_loader.epoch(0)])
        assert labels.tolist() == dataset.lists["test"].labels[start:stop].tolist()


def test_blocks_made_ahead_contain_the_same_images(tiny):
    dataset = load_dataset(str(tiny))
    loaders = [train_loader(dataset, BatchShard(8, micro_batches=2), aa="cifar10", cutout=4) for _ in range(2)]
    loaders[1].block_bytes = loaders[0].block_bytes = 3 * 8 * 16 * 16 * 2  # two steps
    loaders[1].ahead = BlocksAhead(loaders[1]._blocks, CPU)
    for epoch, first_step in ((0, 0), (1, 0), (2, 1), (2, 0)):
        expected, found = (epoch_of(loader, epoch, first_step) for loader in loaders)
        assert all(torch.equal(part, made_ahead) for part, made_ahead in zip(expected, found, strict=True))


def test_the_last_batch_is_filled_with_preceding_images(tiny):
    images = ListedImages(load_dataset(str(tiny)).lists["train"], None, None, None)
    array = np.arange(28, dtype=np.uint8).repeat(3).reshape(28, 3, 1, 1)
    for span, expected in (((2, 13), [(2, 7, 5), (7, 12, 5), (8, 13, 1)]), ((4, 7), [(4, 7, 3)])):
        batches = OrderedBatches(*span, 5, is_filled=True)
        found = list(ResidentLoader(images, array, batches, settings(), CPU).on_device())
        assert [(int(seen[0, 0]), int(seen[-1, 0]) + 1, len(labels)) for seen, labels in found] == expected
        assert torch.equal(torch.cat([labels for _, labels in found]), images.labels[slice(*span)].long())


@pytest.mark.parametrize(
    "changes", [{}, {"aa": "cifar10"}, {"crop": "rrc", "aa": "v0"}, {"crop": "rrc", "train_interpolation": "random"}]
)
def test_augmenting_a_block_does_not_wait_for_the_device(changes):
    """Fake tensors have no values, so that reading one back, which waits for a GPU, raises. The plans are drawn before,
    on the host, where torchvision states its magnitudes as tensors."""
    augmentation = Augmentation(settings(**changes))
    rows = random_table(0, 0, 12, augmentation.columns)
    if augmentation.policy:
        drawn = augmentation.policy.plan(rows[:, -augmentation.policy.columns :], 16, 16)
        augmentation.policy = SimpleNamespace(plan=lambda *given: drawn)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = augmentation(torch.zeros(12, 3, 16, 16, dtype=torch.uint8), rows)
        assert images.shape == (12, 3, 16, 16)
        with pytest.raises(DataDependentOutputException):
            images.sum().item()


def kept_in(cache: Path) -> list[Path]:
    """Return the files of a cache folder except locks."""
    return [file for file in cache.iterdir() if file.suffix != ".lock"]


class TestDecodedOnce:
    def listed(self, folder, transform=F.pil_to_tensor) -> ListedImages:
        dataset = load_dataset(str(folder))
        return ListedImages(dataset.lists["train"], dataset.image_root, transform, None)

    def test_images_are_decoded_only_the_first_time(self, tiny, monkeypatch):
        first = pixels(self.listed(tiny), "as is", 0)
        monkeypatch.setattr(pixel_cache, "_decoded", None)
        again = pixels(self.listed(tiny), "as is", 0)
        assert np.array_equal(first, again)
        assert np.array_equal(again, stored(tiny).numpy())

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_decode_the_same_pixels(self, tiny, workers):
        assert np.array_equal(pixels(self.listed(tiny), "as is", workers), stored(tiny).numpy())

    def test_another_list_image_or_transform_has_another_digest(self, tiny):
        def digest_now(transform="as is", folder=tiny):
            return digest(self.listed(folder), transform)

        before = digest_now()
        assert digest_now() == before
        assert digest_now("another size") != before
        elsewhere = tiny.with_name("elsewhere")
        shutil.copytree(tiny, elsewhere)  # the copies have the same modification times
        assert digest_now(folder=elsewhere) != before
        image = tiny / "images/train/0/3.png"
        Image.new("RGB", (16, 16)).save(image)
        changed = digest_now()
        assert changed != before
        lines = (tiny / "train.txt").read_text().splitlines(keepends=True)
        (tiny / "train.txt").write_text("".join(lines[1:] + lines[:1]))
        assert digest_now() not in (before, changed)

    def test_a_changed_image_is_decoded_again(self, tiny):
        before = pixels(self.listed(tiny), "as is", 0)
        Image.new("RGB", (16, 16), (1, 2, 3)).save(tiny / "images/train/0/3.png")
        after = pixels(self.listed(tiny), "as is", 0)
        assert (after[3] == np.array([1, 2, 3]).reshape(3, 1, 1)).all()
        assert np.array_equal(np.delete(after, 3, 0), np.delete(before, 3, 0))

    def test_a_damaged_file_is_rewritten(self, tiny, tmp_path):
        expected = pixels(self.listed(tiny), "as is", 0)
        (file,) = kept_in(tmp_path / "cache")
        whole, generator = file.read_bytes(), np.random.default_rng(0)
        damaged = [b"", whole[:50], whole[:-1], whole + b"0", b"nothing", whole[: HEADER.itemsize]]
        for place in [*range(0, HEADER.itemsize, 5), *generator.integers(0, len(whole), 30)]:
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << int(generator.integers(8))]) + whole[place + 1 :])
        for content in damaged:
            file.write_bytes(content)
            assert np.array_equal(pixels(self.listed(tiny), "as is", 0), expected)
            assert file.read_bytes() == whole

    @pytest.mark.parametrize("folder", ["a_file/cache", "/proc/self"])  # the second exists
    def test_without_a_writable_folder_images_are_kept_in_memory(self, tiny, tmp_path, monkeypatch, caplog, folder):
        (tmp_path / "a_file").write_text("")
        monkeypatch.setenv("RESLT_CACHE", str(tmp_path / folder))
        assert np.array_equal(pixels(self.listed(tiny), "as is", 0), stored(tiny).numpy())
        assert "locked" not in caplog.text

    def test_on_a_full_disk_images_are_kept_in_memory(self, tiny, tmp_path):
        """A limit on the size of files makes a write fail as a full disk does."""
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            found = pixels(self.listed(tiny), "as is", 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert np.array_equal(found, stored(tiny).numpy())
        assert not kept_in(tmp_path / "cache")

    def test_a_temporary_file_of_another_machine_is_left_alone(self, tiny, tmp_path):
        """Two machines share the folder, and their processes have the same number."""
        expected = pixels(self.listed(tiny), "as is", 0)
        (file,) = kept_in(tmp_path / "cache")
        theirs = file.with_name(f".{os.getpid()}-00000000.another machine's.pixels")
        file.rename(theirs)
        with locked(theirs.with_name("another machine's.pixels")):
            assert np.array_equal(pixels(self.listed(tiny), "as is", 0), expected)
        assert sorted(kept_in(tmp_path / "cache")) == sorted([theirs, file])

    def test_files_left_by_killed_processes_and_earlier_versions_are_removed(self, tiny, tmp_path):
        cache = tmp_path / "cache"
        cache.mkdir()
        earlier = f"tiny-train-{'0a' * 12}.npy"
        left = [f".77.{earlier}", ".88-0123abcd.another.pixels", earlier]
        mine = [".mine", ".77", ".2024.notes", f"tiny-train-{'0a' * 11}.npy", "notes.npy"]
        for name in left + mine:
            (cache / name).write_text("")
        pixels(self.listed(tiny), "as is", 0)
        (file,) = cache.glob("*.pixels")
        assert {path.name for path in kept_in(cache)} == {*mine, file.name}

    def test_the_cache_does_not_grow_when_images_change(self, tiny, tmp_path):
        for level in range(4):
            Image.new("RGB", (16, 16), (level, 2, 3)).save(tiny / "images/train/0/3.png")
            assert pixels(self.listed(tiny), "as is", 0)[3, 0, 0, 0] == level
        assert len(kept_in(tmp_path / "cache")) == 1

    def test_an_image_replaced_by_one_of_the_same_size_and_time_is_decoded_again(self, tiny, tmp_path):
        image = tiny / "images/train/0/3.png"
        for inode, write in (
            ("same", lambda new: image.write_bytes(new.read_bytes())),
            ("new", lambda new: new.rename(image)),
        ):
            Image.new("RGB", (16, 16), (1, 1, 1)).save(image, "BMP")
            pixels(self.listed(tiny), "as is", 0)
            before, new = image.stat(), tmp_path / "new"
            Image.new("RGB", (16, 16), (9, 9, 9)).save(new, "BMP")
            os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
            write(new)
            os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
            after = image.stat()
            assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            assert (after.st_ino == before.st_ino) == (inode == "same")
            assert pixels(self.listed(tiny), "as is", 0)[3].max() == 9

    def test_an_unreadable_image_is_named_and_nothing_is_kept(self, tiny, tmp_path):
        (tiny / "images/train/1/2.png").write_bytes(b"broken")
        for workers in (0, 2):
            with pytest.raises(UserError, match=r"train\.txt:19: .*train/1/2\.png"):
                pixels(self.listed(tiny), "as is", workers)
        assert not kept_in(tmp_path / "cache")

    def test_an_image_of_another_size_is_named(self, tiny, monkeypatch):
        monkeypatch.setattr(pixel_cache, "BATCH", 5)
        Image.new("RGB", (17, 16)).save(tiny / "images/train/1/2.png")
        with pytest.raises(
            UserError, match=r"train\.txt:19 train/1/2\.png: .* not have the size .*--data-on-device off"
        ):
            pixels(self.listed(tiny), "as stored", 0)
        assert pixels(self.listed(tiny, eval_transform(settings())), "evaluation", 0).shape == (28, 3, 16, 16)


@pytest.mark.parametrize("sizes", [{}, {"tiny/images/train/0/3.png": (31, 20)}], ids=["equal", "unequal"])
def test_center_crops_are_those_of_evaluation_or_their_mirror_images(tiny, tmp_path, sizes):
    """Images of any size are stored cropped. One file of the cache serves training and evaluation of the same list."""
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 10, 90)).save(tmp_path / name)
    dataset, transform = load_dataset(str(tiny)), eval_transform(settings(crop="center"))
    views = torch.stack([transform(Image.open(tiny / f"images/{dataset.lists['train'].path(i)}")) for i in range(28)])
    loader = train_loader(dataset, crop="center", hflip=0.3)
    images, _ = epoch_of(loader)
    order = loader.batches.order(0).reshape(-1)
    mirrored = torch.from_numpy(random_table(3, 0, 28, 1)[order, 0] < 0.3)
    assert 0 < mirrored.sum() < 14
    assert torch.equal(images, torch.where(mirrored.view(-1, 1, 1, 1), views[order].flip(-1), views[order]))
    config = BASE.changed(crop="center")
    evaluated = eval_loader_of(dataset, "train", config, settings_of(config)).on_device()
    assert torch.equal(torch.cat([images for images, _ in evaluated]), views)
    assert len(kept_in(tmp_path / "cache")) == 1


@pytest.mark.parametrize(("changes", "reason"), [({"reprob": 0.5}, "--reprob"), ({"aa": "augmix-m5"}, "AugMix")])
def test_augmentation_without_a_device_implementation_is_refused_with_the_reason(changes, reason):
    with pytest.raises(HostOnly, match=reason):
        Augmentation(settings(**changes))


def test_a_run_with_resident_images_resumes_to_the_same_weights(tiny, tmp_path, run_script):
    flags = [*TINY_FLAGS, "--data", tiny, "--data-on-device", "on", "--aa", "cifar10", "--output", tmp_path]
    whole = run_script("train", *flags, "--experiment", "whole")
    assert whole.code == 0, whole.err
    assert "images resident on the CPU, augmented there in batches (--data-on-device on)" in whole.out
    part = run_script("train", *flags, "--experiment", "part", "--epochs", "1")
    assert part.code == 0
    rest = run_script("train", *flags, "--experiment", "part", "--resume", "auto", "--force-resume")
    assert rest.code == 0, rest.err
    refused = run_script("train", *flags, "--data-on-device", "off", "--experiment", "part", "--resume", "auto")
    assert refused.code == 2
    assert "data_on_device: 'on' -> 'off'" in refused.err
    evaluated = run_script("evaluate", "--ckpt", tmp_path / "whole", "--output", tmp_path / "again")
    assert evaluated.code == 0, evaluated.err
    assert (tmp_path / "again/per_class.csv").read_text() == (tmp_path / "whole/per_class.csv").read_text()
    weights = [load_file(tmp_path / name / "checkpoints/2-6/model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_evaluated_images_are_normalized_only_once_if_they_are_few(tiny, monkeypatch):
    """The second evaluation yields the same tensors. Above the limit, it yields equal ones."""
    dataset, found = load_dataset(str(tiny)), []
    for limit in (resident.NORMALIZED_BYTES, 0):
        monkeypatch.setattr(resident, "NORMALIZED_BYTES", limit)
        loader = eval_loader(dataset, BatchShard(8))
        found.append([list(loader.epoch(0)), list(loader.epoch(0))])
    (kept, kept_again), (made, made_again) = found
    assert all(first[0] is second[0] for first, second in zip(kept, kept_again, strict=True))
    assert not any(first[0] is second[0] for first, second in zip(made, made_again, strict=True))
    assert all(torch.equal(first[0], second[0]) for first, second in zip(kept, made_again, strict=True))
