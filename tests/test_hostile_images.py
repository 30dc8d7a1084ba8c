"""Every kind of file that a list may name, built by hand: its pixels, or the reason why it is refused."""

import io
import os
import re
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from builders import settings_of
from conftest import make_dataset
from PIL import Image, ImageFile, features

from reslt.augment.decode import FORMATS, decode
from reslt.augment.host_transforms import eval_transform, train_transform
from reslt.config.schema import Config
from reslt.core.errors import LocalFault
from reslt.data.datasets import load_dataset
from reslt.data.lists import read_list
from reslt.data.paths import ImageRoot
from reslt.loading.image_dataset import ListedImages

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
PROJECT = Path(__file__).resolve().parents[1]


def outcome(folder: Path, content: bytes, name: str = "x.jpg") -> np.ndarray | str:
    """Return the (H, W, 3) pixels of a file with this content, or the reason why it is refused."""
    (folder / name).write_bytes(content)
    return outcome_of_file(folder, name)


def outcome_of_file(folder: Path, name: str) -> np.ndarray | str:
    (folder / "train.txt").write_text(f"{name} 0\n")
    image, reason = ListedImages(read_list(folder / "train.txt"), ImageRoot(folder), None, None).decoded(0)
    if reason:
        return reason
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, color_type, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG. Color types: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and alpha."""
    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + after + chunk(b"IEND", b"")


def tiff(width, height, bits, data: bytes, order="<", photometric=1, sample_format=1, orientation=1) -> bytes:
    """Return a TIFF of one gray strip. Photometric 0: white is zero. Sample formats: 1 unsigned, 2 signed, 3 floating
    point."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 274: orientation, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    return head + entries + b"\0\0\0\0" + data


def exif(orientation: int, kind=3, count=1) -> bytes:
    """Return an EXIF block of one entry: tag 0x0112, a 16-bit number (kind 3)."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, kind, count, orientation, 0, 0)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(color, size=(2, 2), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def shorts(*values, order=">") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


def gray(*values) -> list:
    return [[(v, v, v) for v in values]]


def in_two_colors() -> Image.Image:
    image = Image.new("PA", (2, 1))
    image.putpalette(bytes(RED + BLUE))
    image.putdata([(0, 255), (1, 0)])
    return image


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
SIXTEEN = (0, 255, 256, 32_768, 65_535)  # the high bytes: 0, 0, 1, 128, 255
PALETTE = chunk(b"PLTE", bytes(RED + BLUE))

READ = {  # name -> content, (H, W) RGB
    "RGB": (png(2, 1, 8, 2, bytes((1, 2, 3, 4, 5, 6))), [[(1, 2, 3), (4, 5, 6)]]),
    "gray": (png(2, 1, 8, 0, bytes((7, 200))), gray(7, 200)),
    "black and white": (png(8, 1, 1, 0, b"\xa0"), gray(255, 0, 255, 0, 0, 0, 0, 0)),
    "2-bit gray": (png(4, 1, 2, 0, bytes((0b00_01_10_11,))), gray(0, 85, 170, 255)),
    "palette": (png(2, 1, 8, 3, b"\0\1", PALETTE), [[RED, BLUE]]),
    "palette, one transparent": (png(2, 1, 8, 3, b"\0\1", PALETTE + chunk(b"tRNS", b"\0")), [[RED, BLUE]]),
    "palette, half transparent": (png(2, 1, 8, 3, b"\0\1", PALETTE + chunk(b"tRNS", b"\x80\x20")), [[RED, BLUE]]),
    "palette and alpha": (saved(in_two_colors(), "TIFF"), [[RED, BLUE]]),
    "RGB, a transparent color": (png(1, 1, 8, 2, bytes(RED), chunk(b"tRNS", b"\0\xff\0\0\0\0")), [[RED]]),
    "alpha": (png(2, 1, 8, 6, bytes((9, 8, 7, 0, 6, 5, 4, 255))), [[(9, 8, 7), (6, 5, 4)]]),
    "gray and alpha": (png(2, 1, 8, 4, bytes((90, 0, 80, 255))), gray(90, 80)),
    "CMYK": (saved(flat((255, 0, 0, 0), (1, 1), "CMYK"), "TIFF"), [[(0, 255, 255)]]),
    "CMYK, key": (saved(flat((0, 0, 0, 255), (1, 1), "CMYK"), "TIFF"), [[BLACK]]),
    "16-bit gray PNG": (png(5, 1, 16, 0, shorts(*SIXTEEN)), gray(0, 0, 1, 128, 255)),
    "16-bit RGB PNG": (png(1, 1, 16, 2, shorts(255, 32_768, 65_535)), [[(0, 128, 255)]]),
    "16-bit gray and alpha PNG": (png(1, 1, 16, 4, shorts(32_768, 0)), gray(128)),
    "16-bit RGB and alpha PNG": (png(1, 1, 16, 6, shorts(256, 32_768, 65_535, 0)), [[(1, 128, 255)]]),
    "16-bit TIFF": (tiff(5, 1, 16, shorts(*SIXTEEN, order="<")), gray(0, 0, 1, 128, 255)),
    "16-bit TIFF, most significant byte first": (tiff(5, 1, 16, shorts(*SIXTEEN), ">"), gray(0, 0, 1, 128, 255)),
    "16-bit TIFF, white is zero": (tiff(2, 1, 16, shorts(0, 65_535, order="<"), photometric=0), gray(255, 0)),
    "12-bit TIFF": (tiff(2, 1, 12, bytes((0xFF, 0xF8, 0x00))), gray(255, 128)),  # 4095, 2048
    "16-bit PGM": (b"P5 5 1 65535\n" + shorts(*SIXTEEN), gray(0, 0, 1, 128, 255)),
    "10-bit PGM": (b"P5 3 1 1023\n" + shorts(0, 512, 1023), gray(0, 128, 255)),
    "PPM": (b"P6 1 1 255\n\1\2\3", [[(1, 2, 3)]]),
    "BMP": (saved(flat((1, 2, 3), (1, 1)), "BMP"), [[(1, 2, 3)]]),
    "animation": (saved(flat(RED), "GIF", save_all=True, append_images=[flat(BLUE)]), [[RED] * 2] * 2),
    "animated PNG": (saved(flat(RED), "PNG", save_all=True, append_images=[flat(BLUE)]), [[RED] * 2] * 2),
    "pages": (saved(flat(RED), "TIFF", save_all=True, append_images=[flat(BLUE, (5, 5))]), [[RED] * 2] * 2),
    "one pixel": (png(1, 1, 8, 2, b"\1\2\3"), [[(1, 2, 3)]]),
    "100 times as wide as high": (png(100, 1, 8, 0, bytes(100)), gray(*[0] * 100)),
    "100 times as high as wide": (png(1, 100, 8, 0, bytes(100)), [[BLACK]] * 100),
    "bytes after the end": (png(1, 1, 8, 2, b"\1\2\3") + b"PK\3\4 and an archive", [[(1, 2, 3)]]),
}
if int(PIL.__version__.split(".")[0]) >= 13:  # earlier versions cannot read the YCbCr TIFFs that they write
    READ["YCbCr"] = saved(flat((99, 128, 128), (1, 1), "YCbCr"), "TIFF"), gray(99)
if features.check("webp"):
    READ["WebP"] = saved(flat((1, 2, 3), (1, 1)), "WEBP", lossless=True), [[(1, 2, 3)]]
    frames = dict(save_all=True, append_images=[flat(BLUE)], lossless=True)
    READ["animated WebP"] = saved(flat(RED), "WEBP", **frames), [[RED] * 2] * 2
if features.check("jpg_2000"):
    READ["JPEG 2000"] = saved(flat((1, 2, 3), (8, 8)), "JPEG2000"), [[(1, 2, 3)] * 8] * 8
    deep = Image.fromarray(np.full((8, 8), 32_768, np.uint16))
    READ["16-bit JPEG 2000"] = saved(deep, "JPEG2000"), gray(*[128] * 8) * 8


@pytest.mark.parametrize("kind", READ)
def test_a_file_is_read_with_exactly_its_pixels(tmp_path, kind):
    content, wanted = READ[kind]
    found = outcome(tmp_path, content)
    assert not isinstance(found, str), found
    assert found.tolist() == np.array(wanted).tolist()


LOSSY = {
    "JPEG": (saved(flat((200, 30, 60), (16, 16)), "JPEG"), (200, 30, 60)),
    "gray JPEG": (saved(flat(77, (16, 16), "L"), "JPEG"), (77, 77, 77)),
    "progressive JPEG": (saved(flat((200, 30, 60), (16, 16)), "JPEG", progressive=True), (200, 30, 60)),
    "CMYK JPEG, inverted as by Adobe": (saved(flat((255, 0, 0, 0), (16, 16), "CMYK"), "JPEG"), (0, 255, 255)),
    "MPO": (saved(flat(RED, (16, 16)), "MPO", save_all=True, append_images=[flat(BLUE, (16, 16))]), RED),
    "LAB": (saved(flat((255, 128, 128), (16, 16), "LAB"), "TIFF"), WHITE),
}
if "AVIF" in FORMATS and features.check("avif"):
    LOSSY["AVIF"] = saved(flat((200, 30, 60), (16, 16)), "AVIF"), (200, 30, 60)


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_file_is_read_with_nearly_its_color(tmp_path, kind):
    content, wanted = LOSSY[kind]
    found = outcome(tmp_path, content)
    assert not isinstance(found, str), found
    assert found.shape == (16, 16, 3)
    assert np.abs(found.astype(int) - wanted).max() <= 4


def bomb(kind: bytes) -> bytes:
    """Return a PNG chunk that decompresses from 40 kB to 40 MB."""
    return chunk(kind, b"name\0\0" + zlib.compress(bytes(40_000_000), 9))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


HUGE = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
KINDS = "not an image of a supported format .*JPEG, PNG"
TRUNCATED = r"not a readable image \(.*(truncated|Truncated|unrecognized data|incomplete|not enough image data|buffer)"
REFUSED = {  # name -> content, reason
    "empty": (b"", "the file is empty$"),
    "truncated JPEG": (cut(saved(NOISE, "JPEG")), TRUNCATED),
    "truncated progressive JPEG": (cut(saved(NOISE, "JPEG", progressive=True)), TRUNCATED),
    "truncated PNG": (cut(saved(NOISE, "PNG")), TRUNCATED),
    "truncated GIF": (cut(saved(NOISE.convert("P"), "GIF")), TRUNCATED),
    "truncated BMP": (cut(saved(NOISE, "BMP")), TRUNCATED),
    "truncated PPM": (cut(saved(NOISE, "PPM")), TRUNCATED),
    "truncated TIFF": (tiff(64, 64, 8, bytes(1000)), TRUNCATED),
    "8 bytes of a PNG": (b"\x89PNG\r\n\x1a\n", KINDS),
    "32-bit TIFF": (tiff(1, 1, 32, bytes(4), sample_format=2), "mode I: 32-bit values, whose range is unknown; convert"),
    "signed 16-bit TIFF": (tiff(1, 1, 16, bytes(2), sample_format=2), "mode I: .* range is unknown"),
    "floating-point TIFF": (tiff(1, 1, 32, bytes(4), sample_format=3), "mode F: floating-point values, .* convert it to 8"),
    "floating-point PFM": (b"Pf 1 1 -1.0\n" + bytes(4), "mode F: floating-point values"),
    "60000 x 60000 pixels": (
        b"\x89PNG\r\n\x1a\n" + HUGE + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""),
        r"not a readable image \(Image size \(3600000000 pixels\) exceeds limit of 178956970 pixels",
    ),
    "text that is a bomb": (png(1, 1, 8, 0, b"\0", bomb(b"zTXt")), r"not a readable image \(Decompressed data too large"),
    "text after the pixels that is a bomb": (png(1, 1, 8, 0, b"\0", after=bomb(b"zTXt")), "Decompressed data too large"),
    "color profile that is a bomb": (png(1, 1, 8, 0, b"\0", bomb(b"iCCP")), "Decompressed data too large"),
    "101 x 1": (png(101, 1, 8, 0, bytes(101)), "^101 x 1 pixels, more than 100 times as long as wide; crop it$"),
    "1 x 50000": (png(1, 50_000, 8, 0, bytes(50_000)), "^1 x 50000 pixels, more than 100 times"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", KINDS),
    "ICO": (saved(flat(RED, (16, 16)), "ICO"), KINDS),
    "TGA": (saved(flat(RED, (16, 16)), "TGA"), KINDS),
    "web page": (b"<!DOCTYPE html><title>404</title>", KINDS),
    "drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', KINDS),
    "zeros": (bytes(5000), KINDS),
}  # fmt: skip
if features.check("webp"):
    REFUSED["truncated WebP"] = cut(saved(NOISE, "WEBP", lossless=True)), "not a readable image|" + KINDS
if features.check("jpg_2000"):
    REFUSED["truncated JPEG 2000"] = cut(saved(NOISE, "JPEG2000")), "not a readable image|" + KINDS


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_is_refused_with_its_reason(tmp_path, kind):
    content, reason = REFUSED[kind]
    found = outcome(tmp_path, content)
    assert isinstance(found, str), found
    assert re.search(reason, found)
    assert found.isprintable()


def test_truncated_images_are_refused_even_if_another_library_makes_pil_accept_them(tmp_path, monkeypatch):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert re.search(TRUNCATED, outcome(tmp_path, cut(saved(NOISE, "JPEG"))))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.eps", "x.txt", "x", ".hidden", "ü x.JPEG"])
def test_the_content_of_a_file_decides_not_its_name(tmp_path, name):
    found = outcome(tmp_path, READ["RGB"][0], name)
    assert found.tolist() == np.array(READ["RGB"][1]).tolist()


UPRIGHT = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14  # 2 rows of 3 pixels
TURNED = UPRIGHT.swapaxes(0, 1)
STORED = {  # EXIF orientation -> stored pixels; the comment: the sides where row 0 and column 0 belong
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: TURNED,  # left, top
    6: TURNED[::-1],  # right, top
    7: TURNED[::-1, ::-1],  # right, bottom
    8: TURNED[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path, orientation):
    """A PNG may have the EXIF block before or after its pixels. The TIFF is gray. In the JPEG, each pixel becomes a block of
    16 x 16 pixels, so that compression hardly changes it."""
    stored = STORED[orientation]
    height, width, _ = stored.shape
    block = chunk(b"eXIf", exif(orientation)[6:])
    for where in ({"before": block}, {"after": block}):
        assert outcome(tmp_path, png(width, height, 8, 2, stored.tobytes(), **where)).tolist() == UPRIGHT.tolist()
    sixteen = png(width, height, 16, 0, shorts(*(256 * stored[:, :, 0].astype(int)).flatten()), block)
    assert outcome(tmp_path, sixteen)[:, :, 0].tolist() == UPRIGHT[:, :, 0].tolist()
    page = tiff(width, height, 8, stored[:, :, 0].tobytes(), orientation=orientation)
    assert outcome(tmp_path, page)[:, :, 0].tolist() == UPRIGHT[:, :, 0].tolist()
    blocks = Image.fromarray(stored.repeat(16, 0).repeat(16, 1))
    photo = outcome(tmp_path, saved(blocks, "JPEG", quality=100, subsampling=0, exif=exif(orientation)))
    assert photo.shape == (32, 48, 3)
    assert np.abs(photo[8::16, 8::16].astype(int) - UPRIGHT).max() <= 4
    if features.check("webp"):
        exact = saved(Image.fromarray(stored.copy()), "WEBP", lossless=True, exif=exif(orientation)[6:])
        assert outcome(tmp_path, exact).tolist() == UPRIGHT.tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest resets our own filter
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0nonsense that is no TIFF header",
        b"Exif\0\0MM\0*\0\0\xff\xff",  # its entries would start after its end
        exif(6)[:-7],
        exif(6, kind=2, count=4),  # text
        exif(6, kind=3, count=0xFFFFFFF),
        exif(6, kind=99),
        exif(0),
        exif(9),
        exif(65_535),
    ],
)
def test_a_broken_exif_block_leaves_the_image_as_it_is_stored(tmp_path, block):
    photo = outcome(tmp_path, saved(Image.new("RGB", (32, 16), RED), "JPEG", exif=block))
    assert not isinstance(photo, str), photo
    assert photo.shape == (16, 32, 3)
    found = outcome(tmp_path, png(2, 1, 8, 0, b"\1\2", chunk(b"eXIf", block[6:])))
    assert found[:, :, 0].tolist() == [[1, 2]]


def test_a_path_that_is_no_file_is_refused_without_waiting(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "no_link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "file.jpg").write_bytes(READ["RGB"][0])
    (tmp_path / "link.jpg").symlink_to("file.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "pipe.jpg", "device.jpg"):
        assert outcome_of_file(tmp_path, name) == "not a file but a folder, pipe or device"
    for name in ("gone.jpg", "no_link.jpg", "file.jpg/inside.jpg"):
        assert outcome_of_file(tmp_path, name) == "there is no such image"
    assert re.match(r"not a readable image \(Too many levels", outcome_of_file(tmp_path, "loop.jpg"))
    assert re.match(r"not a readable image \(File name too long", outcome_of_file(tmp_path, "x" * 300))
    assert outcome_of_file(tmp_path, "link.jpg").shape == (1, 2, 3)


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
        assert outcome_of_file(tmp_path, "s.jpg").startswith("not a readable image (")


def test_a_file_on_which_a_server_has_a_lease_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(READ["RGB"][0])
    plain = os.open

    def leased(path, flags):
        if flags & os.O_NONBLOCK:
            raise BlockingIOError
        return plain(path, flags)

    monkeypatch.setattr(os, "open", leased)
    assert decode(tmp_path / "x.png").size == (2, 1)


def test_no_file_stays_open(tmp_path):
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no list of open files here")
    before = len(list(folder.iterdir()))
    kept = [
        outcome(tmp_path, content)
        for content in (READ["pages"][0], READ["animation"][0], b"", REFUSED["32-bit TIFF"][0])
    ]
    assert len(kept) == 4
    assert len(list(folder.iterdir())) == before


def test_one_pixel_becomes_an_input_of_the_models_size(tmp_path):
    (tmp_path / "x.png").write_bytes(READ["one pixel"][0])
    own = dict(input_size=(3, 24, 24), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)
    for transform in (
        eval_transform(settings_of(Config.of(), own)),
        train_transform(settings_of(Config.of(crop="rrc"), own)),
        train_transform(settings_of(Config.of(crop="pad", hflip=0.0, crop_padding=0), own)),
    ):
        assert transform(decode(tmp_path / "x.png")).shape == (3, 24, 24)


def test_the_error_names_list_line_file_reason_and_remedy(tmp_path):
    dataset = load_dataset(str(make_dataset(tmp_path / "d")))
    victim = dataset.image_root.folder / dataset.lists["train"].path(20)
    victim.write_bytes(REFUSED["floating-point TIFF"][0])
    listed = ListedImages(dataset.lists["train"], dataset.image_root, None, None)
    wanted = rf"train\.txt:21: {re.escape(str(victim))}: mode F: .*; repair or replace the file, remove the line"
    with pytest.raises(LocalFault, match=wanted):
        listed[0, 20]
    assert listed.place(20) == f"{dataset.lists['train'].file}:21 train/1/4.png"


def test_pil_prints_no_warning_about_files_that_are_read(tmp_path):
    """PIL would warn about more pixels than its limit (lowered here), a transparent palette and a broken EXIF block."""
    (tmp_path / "large.png").write_bytes(saved(NOISE, "PNG"))
    (tmp_path / "palette.png").write_bytes(READ["palette, half transparent"][0])
    (tmp_path / "exif.jpg").write_bytes(saved(NOISE, "JPEG", exif=exif(6)[:-7]))
    code = (
        "import sys; from pathlib import Path; from PIL import Image; from reslt.augment.decode import decode;"
        "Image.MAX_IMAGE_PIXELS = 64 * 64 - 1; [decode(Path(name)) for name in sys.argv[1:]]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))], cwd=PROJECT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_common_image_formats_are_supported_and_documents_such_as_eps_are_not():
    assert {"JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM"} <= set(FORMATS) <= set(Image.OPEN)
    assert not {"EPS", "WMF", "PSD"} & set(FORMATS)
