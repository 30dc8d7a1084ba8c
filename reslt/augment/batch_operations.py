"""AutoAugment's operations on batches of uint8 images, on the device; the same bytes as PIL's for each image.

The host draws the operations, so nothing waits for the device: an image's operation decides its place in the block, and
each kind of operation works on a slice of it. Arithmetic follows PIL's step by step, in the same precision; each
product and sum is a separate call, so that no two are fused and rounded only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from reslt.augment.policies import AFFINE, BICUBIC, NEAREST, OPERATIONS, OperationPlan
from reslt.augment.transfers import to_device

PIXELS_AT_ONCE = 2**21  # enough to keep a GPU busy, while an intermediate in float64 stays at 50 MB
PIXELS_AT_ONCE_ON_CPU = 2**19  # more would exceed its caches, fewer would not pay for the calls
LUMINANCE = (19595.0, 38470.0, 7471.0)  # weights of R, G, B in 1/65536, as PIL rounds them
BOTH, ALONG_X, ALONG_Y = range(3)  # the coordinates of a pixel that an affine operation changes


@dataclass(frozen=True)
class Group:
    """Adjacent images that get the same kind of operation in a layer."""

    operation: str
    images: slice
    resampling: int  # of affine operations, like `along`
    along: int


def apply(images: torch.Tensor, programs: OperationPlan, pixels_at_once: int | None = None) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> the same, each image augmented by its plan, in new memory. Does not wait for the device.

    `pixels_at_once`: of a block of images, unless a single image has more; None: the number that suits the device."""
    if pixels_at_once is None:
        pixels_at_once = PIXELS_AT_ONCE_ON_CPU if images.device.type == "cpu" else PIXELS_AT_ONCE
    count = max(1, pixels_at_once // (images.shape[2] * images.shape[3]))
    fill = to_device(np.array(programs.fill, np.uint8), images.device).view(1, 3, 1, 1)
    return torch.cat(
        [
            _apply(part, programs[k * count : (k + 1) * count], fill)
            for k, part in enumerate(images.contiguous().split(count))
        ]
    )


def _apply(images: torch.Tensor, programs: OperationPlan, fill: torch.Tensor) -> torch.Tensor:
    places, groups, arguments = _layout(programs)
    device = images.device
    real = np.float32 if device.type == "mps" else np.float64  # Apple's GPUs lack float64: values may be off by 1
    sent = to_device(np.concatenate([places.ravel(), arguments.ravel()]).astype(real), device)
    places = sent[: places.size].view(places.shape).to(torch.int64)
    arguments = sent[places.numel() :].view(arguments.shape)
    for layer, layer_groups in enumerate(groups):
        images = images.index_select(0, places[layer])
        tables, tables_start = [], len(images)
        for group in layer_groups:
            part, values = images[group.images], arguments[layer, group.images]
            if group.operation in TABLES:
                tables.append(TABLES[group.operation](part, values[:, 0]))
                tables_start = min(tables_start, group.images.start)
            elif group.operation == "affine":
                part.copy_(_moved(part, values, group, fill))
            else:
                BLENDS[group.operation](part, values[:, 0])
        if tables:
            _map(images[tables_start:], torch.cat(tables))
    return images.index_select(0, places[-1])


def _layout(programs: OperationPlan) -> tuple[np.ndarray, list[list[Group]], np.ndarray]:
    """Lay out each layer's images so that those with the same kind of operation are adjacent.

    -> (L + 1, N) places: row l is the place of each image of layer l in the layout before, the last row restores the
    given order; per layer its groups, in their order; (L, N, 6) arguments in the layouts' order."""
    count, layers = programs.operations.shape
    a, b, c, d, e, f = np.moveaxis(programs.arguments, -1, 0)
    keeps_x, keeps_y = (a == 1) & (b == 0) & (c == 0), (d == 0) & (e == 1) & (f == 0)
    is_affine = programs.operations == AFFINE
    is_nearest = is_affine & (programs.resampling == NEAREST)
    along = np.where(is_affine & ~is_nearest, np.where(keeps_y, ALONG_X, np.where(keeps_x, ALONG_Y, BOTH)), BOTH)
    kinds = (programs.operations.astype(np.intp) * 3 + programs.resampling) * 3 + along
    arguments = programs.arguments.copy()
    arguments[is_nearest] = _fixed_point(arguments[is_nearest])

    order, places, groups, ordered = np.arange(count), np.empty((layers + 1, count), np.intp), [], []
    for layer in range(layers):
        before, order = np.argsort(order), np.argsort(kinds[:, layer], kind="stable")
        places[layer] = before[order]
        ordered.append(arguments[order, layer])
        starts = np.flatnonzero(np.diff(kinds[order, layer], prepend=-1)).tolist()
        groups.append([])
        for start, end in zip(starts, [*starts, count][1:], strict=True):
            operation, rest = divmod(int(kinds[order[start], layer]), 9)
            if operation:  # 0 is the identity
                groups[-1].append(Group(OPERATIONS[operation], slice(start, end), rest // 3, rest % 3))
    places[-1] = np.argsort(order)
    return places, groups, np.array(ordered).reshape(layers, count, 6)


# Affine operations


def _fixed_point(matrices: np.ndarray) -> np.ndarray:
    """(n, 6) PIL's matrices -> in 1/65536, for the center of the first pixel, as PIL's nearest neighbor rounds them."""
    a, b, c, d, e, f = matrices.T
    c, f = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
    is_straight = (b == 0) & (d == 0)  # PIL moves these without rounding the shift
    c, f = (np.where(is_straight, np.floor(v), v) for v in (c, f))
    return np.floor(np.stack([a, b, c, d, e, f], axis=1) * 65536.0 + 0.5)


def _moved(images: torch.Tensor, matrices: torch.Tensor, group: Group, fill: torch.Tensor) -> torch.Tensor:
    """(m, 3, H, W), (m, 6) -> the values at each pixel's source; `fill` if that is outside the image."""
    if group.resampling == NEAREST:
        values, inside = _nearest(images, matrices)
    else:
        values, inside = _interpolated(images, matrices, group)
    return torch.where(inside[:, None], values, fill)


def _at(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(m, 3, H, W) values, (m, H, W) int32 places y * W + x -> (m, 3, H, W) values at these places of each channel."""
    m, channels, height, width = values.shape
    first = torch.arange(m * channels, dtype=torch.int32, device=values.device).mul_(height * width)
    index = first.view(m, channels, 1, 1) + place[:, None]
    return values.view(-1).index_select(0, index.view(-1)).view(values.shape)


def _nearest(images: torch.Tensor, matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixel at each source, and which sources are in the image. Matrices in 1/65536, PIL's integers."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrices.to(torch.int32).T[:, :, None, None]
    column = torch.arange(width, dtype=torch.int32, device=images.device).view(1, 1, -1)
    row = torch.arange(height, dtype=torch.int32, device=images.device).view(1, -1, 1)
    x, y = (a * column + (b * row + c)) >> 16, (d * column + (e * row + f)) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return _at(images, y.clamp_(0, height - 1).mul_(width).add_(x.clamp_(0, width - 1))), inside


def _interpolated(images: torch.Tensor, matrices: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolate between the 2 x 2 or 4 x 4 pixels around each source; return which sources are in the image too.

    An unchanged coordinate is that of a pixel's center, where interpolation gives the pixel itself: it is skipped."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrices.T[:, :, None, None]
    column = torch.arange(width, dtype=matrices.dtype, device=images.device).add_(0.5).view(1, 1, -1)
    row = torch.arange(height, dtype=matrices.dtype, device=images.device).add_(0.5).view(1, -1, 1)
    blend, taps = (_cubic, (-1, 0, 1, 2)) if group.resampling == BICUBIC else (_linear, (0, 1))

    def around(place: torch.Tensor, size: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        is_inside = (place >= 0) & (place < size)
        place = place - 0.5
        before = place.floor()
        before_int = before.to(torch.int32)
        return (place - before)[:, None], [(before_int + tap).clamp_(0, size - 1) for tap in taps], is_inside

    if group.along == ALONG_Y:
        columns, x_inside = [(column - 0.5).to(torch.int32)], True
    else:
        x_weight, columns, x_inside = around(a * column + b * row + c, width)
    if group.along == ALONG_X:
        rows, y_inside = [(row - 0.5).to(torch.int32)], True
    else:
        y_weight, rows, y_inside = around(d * column + e * row + f, height)
    source = images.to(matrices.dtype)
    lines = []
    for y in rows:
        line = [_at(source, y * width + x) for x in columns]
        lines.append(line[0] if group.along == ALONG_Y else blend(line, x_weight))
    values = lines[0] if group.along == ALONG_X else blend(lines, y_weight)
    return values.clamp_(0, 255).to(torch.uint8), x_inside & y_inside


def _linear(values: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    left, right = values
    return (right - left).mul_(weight).add_(left)


def _cubic(values: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Interpolate between the inner two of four values with PIL's cubic."""
    v1, v2, v3, v4 = values
    result = (v2 - v1).sub_(v3).add_(v4).mul_(weight)
    result.add_((v1 - v2).mul_(2).add_(v3).sub_(v4)).mul_(weight)
    return result.add_(v3 - v1).mul_(weight).add_(v2)


# Blends with an image derived from it: factor 0 gives that one, 1 the image itself, above 1 extrapolates; and hues


def _blended(degenerate: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend as PIL's `Image.blend`, in float32; images of integers 0 to 255; (m,) factors."""
    factors = factors.to(torch.float32).view(-1, 1, 1, 1)
    return (images - degenerate).mul_(factors).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def _luminance(values: torch.Tensor) -> torch.Tensor:
    """(m, 3, H, W) float32 -> (m, 1, H, W) integers. All sums are below 2**24, so exact."""
    red, green, blue = (values[:, channel] * weight for channel, weight in enumerate(LUMINANCE))
    return red.add_(green).add_(blue).add_(32768.0).mul_(2.0**-16).floor_()[:, None]


def _color(images: torch.Tensor, factors: torch.Tensor) -> None:
    values = images.to(torch.float32)
    images.copy_(_blended(_luminance(values), values, factors))


def _sharpness(images: torch.Tensor, factors: torch.Tensor) -> None:
    """Blend with the mean of 3 x 3 pixels in which the central one has weight 5; PIL leaves the border unchanged."""
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return
    values = images.to(torch.float32)
    lines = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    inner = values[:, :, 1:-1, 1:-1]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * inner
    # A multiple of 1/13, plus a half, is at least 1/26 from an integer, so float32 is exact.
    smooth = total.mul_(1 / 13).add_(0.5).floor_()
    images[:, :, 1:-1, 1:-1] = _blended(smooth, inner, factors)


def _hue(images: torch.Tensor, shifts: torch.Tensor) -> None:
    """Shift the hue as torchvision does, by way of PIL's HSV in bytes. PIL computes in double precision, and keeps what it
    computed in single."""
    real = torch.float32 if images.device.type == "mps" else torch.float64

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

    hue = (hue + (shifts * 255).to(torch.int32).view(-1, 1, 1)) & 255  # wraps around, like a byte
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


BLENDS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {  # in place
    "color": _color,
    "sharpness": _sharpness,
    "hue": _hue,
}


# Operations by tables: (m, 3, H, W) images, (m,) arguments -> (m, 3, 256) uint8, the result for each value


def _map(images: torch.Tensor, tables: torch.Tensor) -> None:
    """Replace each value by its table's entry."""
    m, channels = tables.shape[:2]
    first = torch.arange(m * channels, dtype=torch.int32, device=images.device).mul_(256).view(m, channels, 1, 1)
    index = images + first
    torch.index_select(tables.view(-1), 0, index.view(-1), out=images.view(-1))


def _all_values(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=dtype, device=images.device).expand(len(images), 3, 256)


def _per_image(arguments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return arguments.to(dtype).view(-1, 1, 1)


def _posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    dropped = 8 - _per_image(bits, torch.int32).clamp(0, 8)  # 8: black
    return (_all_values(images, torch.int32) >> dropped << dropped).to(torch.uint8)


def _solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    values = _all_values(images, torch.int32)
    return torch.where(values < threshold.view(-1, 1, 1), values, 255 - values).to(torch.uint8)


def _solarize_add(images: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    values = _all_values(images, torch.int32)
    brighter = (values + _per_image(summand, torch.int32)).clamp_(max=255)
    return torch.where(values < 128, brighter, values).to(torch.uint8)


def _invert(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return 255 - _all_values(images, torch.uint8)


def _autocontrast(images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
    """Stretch with PIL's products in double precision: the brightest value may become 254."""
    pixels = images.flatten(2)
    low, high = (extreme.to(arguments.dtype)[..., None] for extreme in (pixels.amin(2), pixels.amax(2)))
    scale = torch.full_like(high, 255.0).div_((high - low).clamp_min_(1))  # 255.0 / x would multiply by 1 / x
    values = _all_values(images, arguments.dtype)
    return torch.where(high > low, (values * scale).add_(-low * scale).clamp_(0, 255), values).to(torch.uint8)


def _equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    pixels = images.flatten(2).to(torch.int64)
    ones = torch.ones_like(pixels, dtype=torch.int32)
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device).scatter_add_(2, pixels, ones)
    of_brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - of_brightest) // 255
    darker = counts.cumsum(2, dtype=torch.int32) - counts
    equal = (darker.add_(step // 2) // step.clamp_min(1)).clamp_(max=255)
    return torch.where(step > 0, equal, _all_values(images, torch.int32)).to(torch.uint8)


def _brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    black = torch.zeros((), device=images.device)
    return _blended(black, _all_values(images, torch.float32)[:, None], factors)[:, 0]


def _contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend with the image's mean luminance, rounded."""
    count = images.shape[2] * images.shape[3]
    total = _luminance(images.to(torch.float32)).to(torch.int32).sum((1, 2, 3), dtype=torch.int64)
    mean = ((2 * total + count) // (2 * count)).to(torch.float32).view(-1, 1, 1, 1)
    return _blended(mean, _all_values(images, torch.float32)[:, None], factors)[:, 0]


TABLES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "brightness": _brightness,
    "contrast": _contrast,
}
