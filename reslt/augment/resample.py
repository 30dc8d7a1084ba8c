"""Crops and antialiased resizing of a batch of uint8 images on any device, with PIL's own arithmetic."""

from __future__ import annotations

import math

import numpy as np
import torch

from reslt.augment.transfers import to_device

RESAMPLINGS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # the number is the reach of the filter in pixels
BOX_ATTEMPTS = 10
BOX_COLUMNS = 4 * BOX_ATTEMPTS  # uniform numbers that determine an image's box
FLOAT_BYTES = 512 << 20  # for intermediate results, unless a single image needs more
FLOAT_BYTES_ON_CPU = 8 << 20  # more would exceed its caches and take three times as long
FRACTION_BITS, LOW_BITS = 22, 12  # the bits to which PIL rounds a weight, and how many of them its low part has

Spans = tuple[torch.Tensor, torch.Tensor]  # start and length of boxes along a line, (N, 1, 1) each


def resized_crops(
    images: torch.Tensor,
    boxes: np.ndarray | torch.Tensor,
    size: int,
    resampling: np.ndarray | torch.Tensor | int,
    float_bytes: int | None = None,
) -> torch.Tensor:
    """(N, 3, H, W) uint8; on the host, (N, 4) boxes in whole pixels (top, left, height, width; inside the image, not
    empty), and (N,) numbers of RESAMPLINGS or one for all -> (N, 3, size, size) uint8.

    The result is that of PIL's `image.crop(box).resize((size, size), resampling)`, bit for bit on the CPU; on another
    device, the last bit of a weight (MPS has no float64 at all) may change a rounded value by one level. Pixels outside
    the boxes are not used, so images may be padded to a common size. Nothing waits for the device. Matrix products suit
    a GPU; on a CPU they are about as fast as PIL."""
    device, extent = images.device, max(images.shape[-2:])
    table = np.column_stack([boxes, np.broadcast_to(resampling, len(images))])
    table = table.astype(np.float32 if device.type == "mps" else np.float64)
    kinds = np.unique(table[:, 4]).astype(int).tolist()
    # PIL resizes rows first, then rounds and clips, then resizes columns; since version 13 columns come first if that is
    # less work
    is_tall = (table[:, 2] > size) & (table[:, 2] - size > 2 * (table[:, 3] - size))
    numbers = images[0].numel() + 4 * size * extent + 12 * size * extent  # 4 bytes each: pixels, two weights, sums
    float_bytes = float_bytes or (FLOAT_BYTES_ON_CPU if device.type == "cpu" else FLOAT_BYTES)
    block = max(float_bytes // (4 * numbers), 1)
    crops = images.new_empty((len(images), 3, size, size))
    for tall in (False, True):
        chosen = np.flatnonzero(is_tall == tall)
        for first in range(0, len(chosen), block):
            part = chosen[first : first + block]
            indices, drawn = to_device(part, device), to_device(table[part], device)
            top, left, height, width, reach = drawn.view(-1, 5, 1, 1).unbind(1)
            if tall:
                turned = images[indices].transpose(2, 3)
                crops[indices] = _crops(turned, (left, width), (top, height), size, reach, kinds).transpose(2, 3)
            else:
                crops[indices] = _crops(images[indices], (top, height), (left, width), size, reach, kinds)
    return crops


def _crops(
    images: torch.Tensor, vertical: Spans, horizontal: Spans, size: int, reach: torch.Tensor, kinds: list[int]
) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, resized along rows first."""
    height, width = images.shape[-2:]
    weights = _weights(*horizontal, size, width, reach, kinds)
    rows = _resampled(images.reshape(-1, 3 * height, width), weights)  # (N, size, 3 H): x, then channel and y
    weights = _weights(*vertical, size, height, reach, kinds)
    columns = _resampled(rows.view(-1, size * 3, height), weights)  # (N, size, size 3): y, then x and channel
    return columns.view(-1, size, size, 3).permute(0, 3, 1, 2)


def _weights(
    starts: torch.Tensor, lengths: torch.Tensor, size: int, extent: int, reach: torch.Tensor, kinds: list[int]
) -> torch.Tensor:
    """Return the weight of each of the `extent` pixels of a line in each of the `size` pixels that the box's line becomes.

    (N, 1, 1) starts, lengths and reach -> (N, 2 size, extent) float32. A weight is an integer multiple of 2^-22, as in
    PIL; that integer is 2^12 times a number of the first half plus a number of the second half. The numbers of a half
    have at most 11 significant bits, so that a matrix product is exact even in TF32, whatever the global settings."""
    scale = lengths / torch.full_like(lengths, size)  # on a GPU, / size would multiply by 1 / size
    stretch = scale.clamp(min=1)  # if an image shrinks, the filter widens
    support = reach * stretch
    centers = (torch.arange(size, device=starts.device).view(-1, 1) + 0.5) * scale  # (N, size, 1)
    first = (centers - support + 0.5).floor().clamp(min=0)
    end = torch.minimum((centers + support + 0.5).floor(), lengths)
    taps = min(2 * math.ceil(max(kinds) * max(extent / size, 1)) + 1, extent)
    positions = (first + starts).clamp(max=extent - taps) + torch.arange(taps, device=starts.device)  # (N, size, taps)
    in_box = positions - starts
    weights = _filtered((in_box - centers + 0.5) * (1 / stretch), reach, kinds)
    weights = torch.where((first <= in_box) & (in_box < end), weights, 0)
    weights = weights / weights.sum(-1, keepdim=True) * 2**FRACTION_BITS
    weights = (weights + 0.5 * weights.sign()).trunc()
    high = (weights / 2**LOW_BITS).round()
    halves = torch.zeros((len(starts), 2, size, extent), device=starts.device)
    parts = torch.stack([high, weights - high * 2**LOW_BITS], 1).float()
    return halves.scatter_(-1, positions.long().unsqueeze(1).expand_as(parts), parts).flatten(1, 2)


def _filtered(x: torch.Tensor, reach: torch.Tensor, kinds: list[int]) -> torch.Tensor:
    """Return the values of each image's filter at distances `x` in pixels."""
    x = x.abs()
    values = torch.zeros_like(x)
    if 1 in kinds:
        values = torch.where(reach == 1, (1 - x).clamp(min=0), values)
    if 2 in kinds:  # Keys' cubic, a = -1/2
        outer = torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0)
        values = torch.where(reach == 2, torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, outer), values)
    if 3 in kinds:
        windowed = torch.sinc(x) * torch.sinc(x / 3)
        values = torch.where(reach == 3, torch.where(x < 3, windowed, 0), values)
    return values


def _resampled(lines: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, lines, extent) uint8, (N, 2 size, extent) weights -> (N, size, lines) uint8, rounded and clipped as in PIL."""
    with torch.autocast(lines.device.type, enabled=False):
        sums = torch.bmm(weights, lines.float().transpose(1, 2))
    whole, low = sums.int().unflatten(1, (2, -1)).unbind(1)
    whole = (whole << LOW_BITS).add_(low).add_(1 << FRACTION_BITS - 1)
    return (whole >> FRACTION_BITS).clamp_(0, 255).byte()


def draw_boxes(
    draws: np.ndarray,
    height: int | np.ndarray,
    width: int | np.ndarray,
    scale: tuple[float, ...],
    ratio: tuple[float, ...],
) -> np.ndarray:
    """(N, BOX_COLUMNS) uniform numbers in [0, 1); the sides of all images, or (N,) of each; the ranges of the relative
    area and of width / height -> (N, 4) int64 top, left, height, width of the random resized crops.

    A box is the first of ten attempts that fits, drawn as in timm (area uniform, ratio log-uniform, place uniform), or
    the largest central box with a ratio in the range. A side that would be rounded to 0 is 1."""
    height, width = (np.broadcast_to(side, len(draws))[:, None].astype(np.int64) for side in (height, width))
    area, log_ratio, top, left = draws.reshape(-1, 4, BOX_ATTEMPTS).swapaxes(0, 1)
    areas = (scale[0] + (scale[1] - scale[0]) * area) * (height * width)
    ratios = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * log_ratio)
    heights, widths = (np.maximum(np.rint(np.sqrt(square)), 1) for square in (areas / ratios, areas * ratios))
    tops, lefts = np.floor(top * (height - heights + 1)), np.floor(left * (width - widths + 1))
    fits = (heights <= height) & (widths <= width)
    attempts = np.stack([tops, lefts, heights, widths], -1)
    drawn = np.take_along_axis(attempts, fits.argmax(1)[:, None, None], 1)[:, 0]

    own = width / height
    central_heights = np.where(own < min(ratio), np.rint(width / min(ratio)), height)
    central_widths = np.where(own > max(ratio), np.rint(height * max(ratio)), width)
    central_tops, central_lefts = (height - central_heights) // 2, (width - central_widths) // 2
    central = np.concatenate([central_tops, central_lefts, central_heights, central_widths], 1)
    return np.where(fits.any(1, keepdims=True), drawn, central).astype(np.int64)


def padded(images: torch.Tensor, padding: int) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 3, H + 2 padding, W + 2 padding), with zeros on every side."""
    return torch.nn.functional.pad(images, (padding,) * 4).contiguous()


def crops_at(
    images: torch.Tensor, indices: torch.Tensor, tops: torch.Tensor, lefts: torch.Tensor, size: int
) -> torch.Tensor:
    """(M, 3, H, W) images, contiguous; (N,) int64 image index, top and left edge of each crop, on the same device ->
    (N, 3, size, size)."""
    height, width = images.shape[2:]
    if images.device.type == "cpu":
        return _windows(images, size).index_select(0, (indices * 3 * height + tops) * width + lefts)
    offsets = torch.arange(size, device=images.device)
    channel = torch.arange(3, device=images.device).view(-1, 1, 1)
    rows, columns = tops.view(-1, 1, 1, 1) + offsets.view(-1, 1), lefts.view(-1, 1, 1, 1) + offsets
    return images[indices.view(-1, 1, 1, 1), channel, rows, columns]


def _windows(images: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) contiguous -> (places, 3, size, size): a view of their memory with a window at every place. A CPU
    copies windows line by line, many times faster than it gathers single pixels; windows that cross from one image into
    the next are not used."""
    height, width = images.shape[2:]
    reach = (2 * height + size - 1) * width + size  # elements from a window's first to its last
    return images.as_strided((images.numel() - reach + 1, 3, size, size), (1, height * width, width, 1))


def flipped(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8, (N,) bool on the same device -> the images, those marked True mirrored left to right."""
    changes = images.flip(-1).bitwise_xor_(images)  # bits; choosing them by a mask is vectorized, `torch.where` is not
    return changes.bitwise_and_(flips.to(torch.uint8).mul_(255).view(-1, 1, 1, 1)).bitwise_xor_(images)
