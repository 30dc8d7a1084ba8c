"""AutoAugment's operations on batches of uint8 images, on the device, with the same bytes as PIL for each image.

The host draws the operations, so nothing waits for the device: it sorts a block's images by kind of work, and each kind
runs on a slice of the block. On a block of small images, a GPU needs less time than its host needs for the calls, so
operations share calls wherever they can, whatever each image's arguments are. The arithmetic follows PIL's step by step,
in the same precision; each product and sum is a separate call, so that no two are fused and rounded only once (unless
both are exact)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from reslt.augment.policies import AFFINE, BICUBIC, CODES, NEAREST, OPERATIONS, OperationPlan
from reslt.augment.transfers import to_device

PIXELS_AT_ONCE = 2**22  # 4,096 images of 32 x 32: few calls, while the policy `v0` allocates no more than 150 MB
PIXELS_AT_ONCE_ON_CPU = 2**19  # more would exceed its caches, fewer would not pay for the calls
TURNED_AT_ONCE, TURNED_AT_ONCE_ON_CPU = 2**20, 2**14  # pixels interpolated from 4 or 16 others, at up to 500 bytes each
LUMINANCE = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # weights of R, G, B, as PIL rounds them


@dataclass(frozen=True)
class Group:
    """Adjacent images that need the same work in a layer."""

    work: int  # index into WORKS
    images: slice
    plain: int  # number of leading images that need the cheaper variant: linear, not cubic; brightness, not contrast


class Frame:
    """Constants that depend only on the number and size of the images, the color of empty pixels and the device."""

    def __init__(self, images: torch.Tensor, fill: tuple[int, int, int]):
        count, _, height, width = images.shape
        device = images.device
        # Apple's GPUs lack float64: values may be off by 1
        self.real = real = torch.float32 if device.type == "mps" else torch.float64
        self.columns = torch.arange(width, dtype=torch.int32, device=device)
        self.rows = torch.arange(height, dtype=torch.int32, device=device).view(-1, 1)
        self.row_starts = self.rows * width
        self.column_centers, self.row_centers = self.columns.to(real).add_(0.5), self.rows.to(real).add_(0.5)
        self.values = torch.arange(256, dtype=torch.int32, device=device)
        self.taps = torch.arange(-1, 3, dtype=real, device=device).view(4, 1, 1, 1)
        numbers = torch.arange(3 * count, dtype=torch.int32, device=device).view(-1, 1, 1)
        self.first_pixels, self.first_entries = numbers[:count] * (height * width), (numbers * 256).view(-1, 3, 1, 1)
        at_once = TURNED_AT_ONCE_ON_CPU if device.type == "cpu" else TURNED_AT_ONCE
        self.turned_at_once = max(1, at_once // (height * width))
        sent = to_device(np.array([0, width, height, *fill], np.float64), device).to(real)
        self.zero, self.size, self.fill = sent[0], sent[1:3].view(2, 1, 1), sent[3:].to(torch.uint8).view(3, 1, 1)


def apply(images: torch.Tensor, plan: OperationPlan, pixels_at_once: int | None = None) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> the same, each image augmented by its plan, in new memory. Does not wait for the device.

    `pixels_at_once`: the size of a block of images, unless a single image has more pixels; None: what suits the device."""
    if pixels_at_once is None:
        pixels_at_once = PIXELS_AT_ONCE_ON_CPU if images.device.type == "cpu" else PIXELS_AT_ONCE
    count = max(1, pixels_at_once // (images.shape[2] * images.shape[3]))
    parts = images.contiguous().split(count)
    frame = Frame(parts[0], plan.fill)
    done = [_apply(part, plan[k * count : (k + 1) * count], frame) for k, part in enumerate(parts)]
    return torch.cat(done) if len(done) > 1 else done[0]


def _apply(images: torch.Tensor, plan: OperationPlan, frame: Frame) -> torch.Tensor:
    places, groups, arguments = lay_out(plan, *images.shape[2:], frame.turned_at_once)
    sent = to_device(np.concatenate([places.ravel(), arguments.ravel()]), images.device).to(frame.real)
    places = sent[: places.size].view(places.shape).to(torch.int32)
    arguments = sent[places.numel() :].view(arguments.shape)
    for layer, layer_groups in enumerate(groups):
        images = images.index_select(0, places[layer])
        mapped = next((group.images.start for group in layer_groups if group.work >= FIRST_TABLE), len(images))
        tables = images.new_empty(len(images) - mapped, 3, 256)
        for group in layer_groups:
            part, values = images[group.images], arguments[layer, group.images]
            result = WORKS[group.work](part, values, group.plain, frame)
            if result is not None:
                tables[group.images.start - mapped : group.images.stop - mapped] = result
        if len(tables):
            _map(images[mapped:], tables, frame)
    return images.index_select(0, places[-1])


def lay_out(
    plan: OperationPlan, height: int, width: int, turned_at_once: int
) -> tuple[np.ndarray, list[list[Group]], np.ndarray]:
    """Lay out each layer's images so that those with the same kind of work are adjacent. A group contains at most
    `turned_at_once` images that are interpolated along both axes.

    Returns (L + 1, N) places: row l gives the place of each image of layer l in the layout of the layer before, and the
    last row restores the given order; the groups of each layer, in their order; and (L, N, 6) arguments in the layouts'
    order, as the functions in WORKS take them."""
    count, layers = plan.operations.shape
    operations, resampling = plan.operations.ravel(), plan.resampling.ravel()
    kinds, arguments = 2 * WORK_OF[operations], plan.arguments.reshape(-1, 6).copy()
    for operation, as_steps in STEPS.items():
        chosen = np.flatnonzero(operations == CODES[operation])
        for column, number in enumerate(as_steps(arguments[chosen, 0])):
            arguments[chosen, column] = number
    kinds[operations == CODES["contrast"]] += 1
    chosen = np.flatnonzero((operations == AFFINE) & (resampling == NEAREST))
    arguments[chosen] = _fixed_point(arguments[chosen])
    chosen = np.flatnonzero((operations == AFFINE) & (resampling != NEAREST))
    work, arguments[chosen] = _axes(arguments[chosen], height, width)
    kinds[chosen] = 2 * work + (resampling[chosen] == BICUBIC)

    kinds, arguments = kinds.reshape(count, layers), arguments.reshape(count, layers, 6)
    places, groups, ordered = np.empty((layers + 1, count), np.intp), [], np.empty((layers, count, 6))
    place = np.arange(count)  # of each image, in the given order
    for layer, of_layer in enumerate(kinds.T):
        order = np.argsort(of_layer, kind="stable")
        places[layer] = place[order]
        place[order] = np.arange(count)
        ordered[layer] = arguments[order, layer]
        starts = np.searchsorted(of_layer[order], np.arange(2 * len(WORKS) + 1)).tolist()
        groups.append([])
        for number, work in enumerate(WORKS):
            start, second, end = starts[2 * number : 2 * number + 3]
            at_once = turned_at_once if work is _along_both_axes else count
            if work is not None and end > start:
                for first in range(start, end, at_once):
                    last = min(first + at_once, end)
                    groups[layer].append(Group(number, slice(first, last), min(max(second, first), last) - first))
    places[-1] = place
    return places, groups, ordered


# Affine operations


def _fixed_point(matrices: np.ndarray) -> np.ndarray:
    """(n, 6) PIL's matrices -> the same in units of 1/65536, at the center of the first pixel, rounded as PIL's nearest
    neighbor does."""
    a, b, c, d, e, f = matrices.T
    c, f = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
    is_straight = (b == 0) & (d == 0)  # PIL moves these without rounding the shift
    c, f = (np.where(is_straight, np.floor(v), v) for v in (c, f))
    return np.floor(np.stack([a, b, c, d, e, f], axis=1) * 65536.0 + 0.5)


def _axes(matrices: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 6) PIL's matrices of operations that interpolate -> (n,) index into WORKS, (n, 6) arguments.

    An axis whose coordinate does not change is skipped: at a pixel's center, interpolation returns the pixel itself. If
    one axis is left, the arguments are its three matrix entries, the number of pixels along it, the distance in memory
    between two of them, and whether the axis is x."""
    keeps_x, keeps_y = (matrices[:, :3] == [1, 0, 0]).all(1), (matrices[:, 3:] == [0, 1, 0]).all(1)
    arguments = matrices.copy()
    arguments[keeps_x, :3], arguments[keeps_x, 3:] = matrices[keeps_x, 3:], (height, width, False)
    arguments[keeps_y, :3], arguments[keeps_y, 3:] = matrices[keeps_y, :3], (width, 1, True)
    return np.where(keeps_x | keeps_y, WORKS.index(_along_one_axis), WORKS.index(_along_both_axes)), arguments


def _packed(images: torch.Tensor) -> torch.Tensor:
    """(m, 3, H, W) -> (m H W,) int32: the bytes of a pixel in one number, so that one access reads them all."""
    red, green, blue = images.unbind(1)
    return red.to(torch.int32).add_(green, alpha=1 << 8).add_(blue, alpha=1 << 16).view(-1)


def _at(packed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Packed pixels, (..., m, H, W) int32 places among them -> (..., m, 3, H, W) uint8, not contiguous."""
    found = packed.index_select(0, index.view(-1)).view(torch.uint8)
    return found.view(*index.shape, 4)[..., :3].movedim(-1, -3)


def _signed(values: torch.Tensor) -> torch.Tensor:
    """uint8 -> int16, contiguous: exact for differences of bytes, and read and written four times as fast as float64."""
    return values.to(torch.int16, memory_format=torch.contiguous_format)


def _nearest(images: torch.Tensor, matrices: torch.Tensor, _: int, frame: Frame) -> None:
    """Take the pixel at each source; the matrices are in units of 1/65536, as PIL's integers are."""
    a, b, c = matrices.to(torch.int32).view(-1, 2, 3, 1, 1).unbind(2)  # of x and of y: (m, 2, 1, 1)
    place = (a * frame.columns + (b * frame.rows + c)) >> 16
    inside, (x, y) = _are_inside(place, frame), place.unbind(1)
    height, width = images.shape[2:]
    index = y.clamp(0, height - 1).mul_(width).add_(x.clamp(0, width - 1)).add_(frame.first_pixels[: len(images)])
    torch.where(inside, _at(_packed(images), index), frame.fill, out=images)


def _along_one_axis(images: torch.Tensor, numbers: torch.Tensor, linear: int, frame: Frame) -> None:
    """Interpolate between 2 or 4 pixels of a row or column: the first `linear` images linearly, the others cubically."""
    a, b, c, size, stride, is_x = numbers.view(-1, 6, 1, 1).unbind(1)
    place = (a * frame.column_centers + b * frame.row_centers).add_(c)
    inside = (place >= 0).logical_and_(place < size)[:, None]
    line = torch.where(is_x > 0, frame.row_starts, frame.columns).add_(frame.first_pixels[: len(images)])
    before, weight = _pixel_before(place)
    packed, last = _packed(images), size - 1
    for part, taps, blend in _variants(linear, len(images)):
        near = (before[part] + frame.taps[taps]).clamp_(frame.zero, last[part]).mul_(stride[part])
        values = blend(_signed(_at(packed, near.to(torch.int32).add_(line[part]))), weight[part]).clamp_(0, 255)
        torch.where(inside[part], values.to(torch.uint8), frame.fill, out=images[part])


def _along_both_axes(images: torch.Tensor, matrices: torch.Tensor, linear: int, frame: Frame) -> None:
    """Interpolate between the 2 x 2 or 4 x 4 pixels around each source: along x, then y."""
    a, b, c = matrices.view(-1, 2, 3, 1, 1).unbind(2)  # of x and of y: (m, 2, 1, 1)
    place = (a * frame.column_centers + b * frame.row_centers).add_(c)
    inside = _are_inside(place, frame)
    before, weight = _pixel_before(place)
    packed, last, width = _packed(images), frame.size - 1, images.shape[3]
    for part, taps, blend in _variants(linear, len(images)):
        near = (before[part] + frame.taps[taps, None]).clamp_(frame.zero, last).to(torch.int32)
        x, y = near.unbind(2)  # (T, m, H, W)
        index = x.add_(frame.first_pixels[: len(images)][part]) + y.mul_(width)[:, None]
        values = _signed(_at(packed, index))  # (T, T, m, 3, H, W): y, x
        values = blend(blend(values.transpose(0, 1), weight[part, 0]), weight[part, 1]).clamp_(0, 255)
        torch.where(inside[part], values.to(torch.uint8), frame.fill, out=images[part])


def _are_inside(place: torch.Tensor, frame: Frame) -> torch.Tensor:
    """(m, 2, H, W) coordinates x, y -> (m, 1, H, W) bool: whether they are in the image."""
    inside = (place >= 0).logical_and_(place < frame.size)
    return inside[:, :1] & inside[:, 1:]


def _pixel_before(place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last pixel with a center at or before each coordinate, and the coordinate's distance from that center."""
    place = place - 0.5
    before = place.floor()
    return before, place.sub_(before)


def _variants(linear: int, count: int) -> Iterator[tuple[slice, slice, Callable]]:
    """Yield the images of each kind of interpolation, as a slice, with its part of the taps -1 to 2 and its function."""
    if linear:
        yield slice(0, linear), slice(1, 3), _linear
    if linear < count:
        yield slice(linear, count), slice(0, 4), _cubic


def _linear(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Interpolate linearly: (2, ..., m, 3, H, W) neighbors, (m, H, W) weights -> (..., m, 3, H, W)."""
    left, right = values
    return ((right - left) * weight[:, None]).add_(left)


def _cubic(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Interpolate between the inner two of four neighbors with PIL's cubic; the caller clips. Shapes as for `_linear`."""
    v1, v2, v3, v4 = values
    weight = weight[:, None]
    result = (v2 - v1).sub_(v3).add_(v4) * weight
    result.add_(torch.add(v3, v1 - v2, alpha=2).sub_(v4)).mul_(weight)  # twice a number is exact
    return result.add_(v3 - v1).mul_(weight).add_(v2)


# Blends of an image with one derived from it (factor 0: the derived one; 1: the image; above 1: extrapolated), and hues


def _blended(degenerate: torch.Tensor, images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
    """Blend as PIL's `Image.blend` does, in float32. The images contain integers 0 to 255; the first argument is the
    factor."""
    factors = arguments[:, 0].to(torch.float32).view(-1, 1, 1, 1)
    return (images - degenerate).mul_(factors).add_(degenerate).clamp_(0, 255)


def _luminance(images: torch.Tensor) -> torch.Tensor:
    """(m, 3, H, W) -> (m, 1, H, W) integers as float32. All sums are below 256 and multiples of 1/65536, thus exact."""
    red, green, blue = images.split(1, 1)
    total = red * LUMINANCE[0]
    return total.add_(green, alpha=LUMINANCE[1]).add_(blue, alpha=LUMINANCE[2]).add_(0.5).floor_()


def _color(images: torch.Tensor, arguments: torch.Tensor, _: int, frame: Frame) -> None:
    values = images.to(torch.float32)
    images.copy_(_blended(_luminance(values), values, arguments))


def _sharpness(images: torch.Tensor, arguments: torch.Tensor, _: int, frame: Frame) -> None:
    """Blend with the weighted mean of 3 x 3 pixels, the central one with weight 5; PIL leaves the border unchanged."""
    if min(images.shape[2:]) < 3:
        return
    values = images.to(torch.float32)
    lines = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    inner = values[:, :, 1:-1, 1:-1]
    total = (lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]).add_(inner, alpha=4)
    # A multiple of 1/13, plus a half, is at least 1/26 from an integer, so float32 is exact.
    smooth = total.mul_(1 / 13).add_(0.5).floor_()
    images[:, :, 1:-1, 1:-1] = _blended(smooth, inner, arguments)


def _hue(images: torch.Tensor, arguments: torch.Tensor, _: int, frame: Frame) -> None:
    """Shift the hue as torchvision does, by way of PIL's HSV in bytes. PIL computes in double precision and stores the
    results in single."""
    real = frame.real

    def kept(values: torch.Tensor) -> torch.Tensor:
        return values.float().to(real)

    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    spread = (value - least).float()
    from_red, from_green, from_blue = (
        ((value - channel).float() / spread.clamp_min(1)).to(real) for channel in (red, green, blue)
    )
    hue = torch.where(red == value, kept(from_blue - from_green), kept(2.0 + from_red - from_blue))
    hue = torch.where((red != value) & (green != value), kept(4.0 + from_green - from_red), hue)
    hue = (kept((hue / 6.0 + 1.0).fmod(1.0)) * 255.0).to(torch.int32)
    saturation = ((spread / value.float().clamp_min(1)).to(real) * 255.0).to(torch.int32)

    hue = (hue + (arguments[:, :1, None] * 255).to(torch.int32)) & 255  # wraps around, like a byte
    place = hue.to(real) * 6.0 / 255.0
    sector = place.floor()
    rest, saturated = kept(place - sector), kept(saturation.to(real) / 255.0)
    bright = value.to(real)
    low, falling, rising = (
        (bright * (1.0 - saturated * part) + 0.5).floor() for part in (torch.ones_like(rest), rest, 1.0 - rest)
    )
    # the channels of the six sectors of the color circle
    order = [(bright, rising, low), (falling, bright, low), (low, bright, rising)]
    order += [(low, falling, bright), (rising, low, bright), (bright, low, falling)]
    sector = sector.to(torch.int64).remainder_(6)
    for channel in range(3):
        shifted = torch.stack([of_sector[channel] for of_sector in order]).gather(0, sector[None])[0]
        images[:, channel] = torch.where(saturation == 0, bright, shifted).to(torch.uint8)


# Operations by tables: (m, 3, H, W) images, (m, 6) arguments -> (m, 3 or 1, 256) results, one for each value


def _map(images: torch.Tensor, tables: torch.Tensor, frame: Frame) -> None:
    """Replace each value with its table's entry."""
    index = images + frame.first_entries[: len(images)]
    torch.index_select(tables.view(-1), 0, index.view(-1), out=images.view(-1))


def _steps(images: torch.Tensor, arguments: torch.Tensor, _: int, frame: Frame) -> torch.Tensor:
    """Below a threshold, keep some bits and add a summand; from the threshold on, keep the value or its complement."""
    bits, summand, threshold, flipped = arguments[:, :4].to(torch.int32).view(-1, 4, 1, 1).unbind(1)
    low = (frame.values & bits).add_(summand).clamp_(max=255)
    return torch.where(frame.values < threshold, low, frame.values ^ flipped)


def _autocontrast(images: torch.Tensor, arguments: torch.Tensor, _: int, frame: Frame) -> torch.Tensor:
    """Stretch the values with PIL's products in double precision: the brightest may become 254."""
    pixels = images.flatten(2)
    low, high = (extreme.to(frame.real)[..., None] for extreme in (pixels.amin(2), pixels.amax(2)))
    scale = torch.full_like(high, 255.0).div_((high - low).clamp_min_(1))  # 255.0 / x would multiply by 1 / x
    stretched = (frame.values * scale).sub_(low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched, frame.values)


def _equalize(images: torch.Tensor, arguments: torch.Tensor, _: int, frame: Frame) -> torch.Tensor:
    pixels = images.flatten(2).to(torch.int64)
    ones = torch.ones_like(pixels, dtype=torch.int32)
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device).scatter_add_(2, pixels, ones)
    of_brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - of_brightest) // 255
    darker = counts.cumsum(2, dtype=torch.int32).sub_(counts)
    equal = darker.add_(step // 2).floor_divide_(step.clamp_min(1)).clamp_(max=255)
    return torch.where(step > 0, equal, frame.values)


def _blend_with_mean(images: torch.Tensor, arguments: torch.Tensor, brightness: int, frame: Frame) -> torch.Tensor:
    """Blend the first `brightness` images with black, the others with their own mean luminance, rounded."""
    count = images.shape[2] * images.shape[3]
    mean = torch.zeros(len(images), 1, 1, 1, device=images.device)
    if brightness < len(images):
        luminance = _luminance(images[brightness:].to(torch.float32))
        total = luminance.sum((1, 2, 3), keepdim=True, dtype=torch.int64)
        mean[brightness:] = total.add_(count // 2).floor_divide_(count)
    return _blended(mean, frame.values.view(1, 1, 1, -1), arguments)[:, 0]


# Operation -> the number in its plan -> the bits kept, the summand, the threshold and the bits flipped
STEPS: dict[str, Callable[[np.ndarray], tuple]] = {
    "posterize": lambda bits: (256 - 2 ** (8 - np.trunc(bits).clip(0, 8)), 0, 256, 0),  # 0 bits: black
    "solarize": lambda threshold: (255, 0, np.ceil(threshold), 255),
    "solarize_add": lambda summand: (255, np.trunc(summand), 128, 0),
    "invert": lambda _: (255, 0, 0, 255),
}
TABLES: dict[str, Callable[[torch.Tensor, torch.Tensor, int, Frame], torch.Tensor]] = {
    "posterize": _steps,
    "solarize": _steps,
    "solarize_add": _steps,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _steps,
    "brightness": _blend_with_mean,
    "contrast": _blend_with_mean,
}
IN_PLACE = {"color": _color, "sharpness": _sharpness, "hue": _hue}
# The work on a group of images, in the order of a layer: none, changes in place, changes by a table
WORKS = (None, _nearest, _along_one_axis, _along_both_axes, *IN_PLACE.values(), *dict.fromkeys(TABLES.values()))
FIRST_TABLE = WORKS.index(_steps)
WORK_OF = np.array(
    [WORKS.index({"identity": None, "affine": _nearest, **IN_PLACE, **TABLES}[name]) for name in OPERATIONS], np.int8
)
