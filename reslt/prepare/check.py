"""`python -m reslt.prepare check NAME`: find the problems in a dataset's lists and images before training."""

from __future__ import annotations

import shlex
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from reslt.config.places import dataset_folder
from reslt.config.resolve import configure
from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.log import logger
from reslt.core.text import counted, csv_cell
from reslt.data.bad_images import BAD_IMAGES
from reslt.data.datasets import class_names, count_classes, how_to_prepare, list_files, read_info
from reslt.data.groups import SHOTS, STANDARD_SPLIT, by_frequency, shot_groups
from reslt.data.lists import ImageList, images_per_class, read_list
from reslt.data.paths import ImageRoot, find_image_root, parse_rules, require_folder
from reslt.prepare.contents import FINGERPRINT_BYTES
from reslt.prepare.folder import local_content, record_where_possible, write_local
from reslt.prepare.layout import fit_rules, rule_by_hand, share_found
from reslt.prepare.repeats import copies, repeats

NAMED = 5  # images per kind of problem that are printed
SLOW_SECONDS = 2.0  # an image that takes longer to decode is reported
THREADS, CHUNK = 16, 2_000  # a network file system answers many requests at a time


@dataclass
class Findings:
    """The findings of `check`: a row of numbers per list, problems (any makes the exit code 1) and remarks."""

    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the findings as printed."""
        messages = [f"PROBLEM  {problem}" for problem in self.problems]
        messages += [f"note     {remark}" for remark in self.remarks]
        count = len(self.problems)
        verdict = f"{count} problem{'s' * (count > 1)}" if count else "no problems"
        return "\n".join([self.table.to_string(), *messages, verdict])


def check(
    data: str,
    data_dir: Path | None,
    decode: bool,
    fix_paths: bool,
    workers: int,
    output: Path,
    near_copies: bool = False,
    slow_seconds: float = SLOW_SECONDS,
) -> Findings:
    """Check the lists and images of a dataset. Write the plot and counts of images per class to `output`, with `decode`
    unreadable images to the dataset's bad_images.csv, and with `fix_paths` rules that fit to its local.yaml. If a file
    cannot be written, log a warning and return the findings nevertheless.

    With `decode`, also compare the contents of images, and report those that take longer than `slow_seconds` to decode;
    with `near_copies`, also find resized and recompressed copies. Raises UserError if there are no lists or no image root
    to check."""
    folder = dataset_folder(data)
    info, found = read_info(folder), Findings()
    files = list_files(folder)
    if "train" not in files:
        raise UserError(f"{folder / 'train.txt'} does not exist; {how_to_prepare(folder, info)}")
    root = find_image_root(folder, info, data_dir)
    require_folder(root, folder, info)

    lists = {}
    for split, file in files.items():
        try:
            lists[split] = read_list(file)
        except UserError as fault:
            found.problems.append(str(fault))
    if not lists:
        return found
    try:
        largest = max(int(images.labels.max()) for images in lists.values())
        num_classes = count_classes(info, folder / "info.yaml", largest)
        configure({"data": data})
    except UserError as fault:
        found.problems.append(str(fault))
        return found
    _check_labels(lists, num_classes, found)
    root = _fit_paths(data, folder, info, lists, root, data_dir, fix_paths, found)
    found.problems += repeats(lists, root)

    rows, decoded = {}, Decoded.of(lists, near_copies)
    for split, images in lists.items():
        absent, empty = _check_presence(images, root, found)
        missing = len(absent) + len(empty)
        rows[split] = {"images": len(images), "classes": len(np.unique(images.labels)), "missing": missing}
        if decode:
            rows[split]["unreadable"] = _decode(decoded, split, root, absent, empty, workers, found)
    if decode:
        record = record_where_possible(folder, decoded.bad, output)
        all_of_them = f"; all are in {record}" if record else ""
        found.problems += [f"{file}: and {more:,} more{all_of_them}" for file, more in decoded.unnamed.items()]
        problems, remarks = copies(lists, root, decoded.digests, decoded.fingerprints)
        found.problems += problems
        found.remarks += remarks + decoded.slow(slow_seconds)
    found.table = pd.DataFrame(rows).T
    if "train" in lists and num_classes <= 10 * len(lists["train"]):  # else a label is wrong: nothing to draw
        try:
            _draw_counts(folder, info, lists, num_classes, output, found)
        except OSError as fault:
            logger.warning(
                f"{fault.filename or output}: {fault.strerror}: the plot and counts per class are not written; give another "
                "folder with --output DIR"
            )
    return found


@dataclass
class Decoded:
    """The results of decoding the images of all lists, in order."""

    lists: dict[str, ImageList]
    digests: np.ndarray  # (N,) uint64: the first half of the content's digest; 0: not decoded
    seconds: np.ndarray  # (N,) float32: to read and decode
    fingerprints: np.ndarray | None  # (N, 264) uint8
    bad: list[tuple[str, int, str, str]] = field(default_factory=list)  # rows of bad_images.csv
    unnamed: dict[Path, int] = field(default_factory=dict)  # list file -> unreadable images that are not printed

    @classmethod
    def of(cls, lists: dict[str, ImageList], fingerprints: bool) -> Decoded:
        """Return empty results for these lists."""
        count = sum(map(len, lists.values()))
        prints = np.zeros((count, FINGERPRINT_BYTES), np.uint8) if fingerprints else None
        return cls(lists, np.zeros(count, np.uint64), np.zeros(count, np.float32), prints)

    def examine(self, split: str, root: ImageRoot, indices: np.ndarray, workers: int) -> list[tuple[int, str]]:
        """Decode images of a list; return (index, reason) of each at which training would stop."""
        from reslt.prepare.examine import examine

        names, reasons = list(self.lists), []
        start = sum(len(self.lists[name]) for name in names[: names.index(split)])
        for image in examine(self.lists[split], root, indices, workers, self.fingerprints is not None):
            if image.reason:
                reasons.append((image.index, image.reason))
            self.seconds[start + image.index] = image.seconds
            if image.digest:
                self.digests[start + image.index] = int.from_bytes(image.digest[:8], "little")
            if image.fingerprint:
                self.fingerprints[start + image.index] = np.frombuffer(image.fingerprint, np.uint8)
        return reasons

    def slow(self, threshold: float) -> list[str]:
        """Return a remark that names the slowest images, if any took longer than `threshold` seconds."""
        order = np.argsort(-self.seconds, kind="stable")[: int((self.seconds > threshold).sum())]
        if not len(order):
            return []
        named = [
            f"{place} ({self.seconds[n]:.1f} s)" for n, place in zip(order[:NAMED], self._places(order), strict=False)
        ]
        return [
            f"{counted(len(order), 'image')} took more than {threshold:g} s to decode, the slowest: {', '.join(named)}; every "
            "epoch waits for them: reslt.prepare shrink makes smaller copies"
        ]

    def _places(self, positions: np.ndarray) -> Iterator[str]:
        ends = np.cumsum([len(images) for images in self.lists.values()])
        for position in positions.tolist():
            k = int(np.searchsorted(ends, position, side="right"))
            images = list(self.lists.values())[k]
            i = position - int(ends[k] - len(images))
            yield f"{images.place(i)} {images.path(i)}"


def _check_labels(lists: dict[str, ImageList], num_classes: int, found: Findings) -> None:
    for split, images in lists.items():
        try:
            images.check_labels(num_classes)
        except UserError as fault:
            found.problems.append(str(fault))
        present = np.unique(images.labels[images.labels < num_classes])
        if (absent := num_classes - len(present)) == 0:
            continue
        first = int(np.argmax(np.append(present, -1) != np.arange(len(present) + 1)))
        text = f"{images.file}: {absent:,} of {num_classes:,} classes have no image, first class {first}"
        if split == "train":
            found.problems.append(
                text + "; number the classes 0..C-1 without gaps, or correct num_classes in info.yaml"
            )
        else:
            found.remarks.append(text + "; their accuracy will be n/a")


def _decode(
    decoded: Decoded,
    split: str,
    root: ImageRoot,
    absent: list[int],
    empty: list[int],
    workers: int,
    found: Findings,
) -> int:
    """Decode the images of a list. Report the first ones that are unreadable though neither absent nor empty, and return
    their number."""
    images = decoded.lists[split]
    tried = np.arange(len(images))
    if 2 * len(absent) > len(images):
        tried = np.delete(tried, absent)
        found.remarks.append(
            f"{images.file}: more than half of the images are missing, so they are not recorded in {BAD_IMAGES}"
        )
    recorded = decoded.examine(split, root, tried, workers)
    decoded.bad += [(images.file.name, images.line(i), images.path(i), reason) for i, reason in recorded]
    reported = {*absent, *empty}
    unreadable = [(i, reason) for i, reason in recorded if i not in reported]
    for i, reason in unreadable[:NAMED]:
        found.problems.append(f"{images.place(i)}: {root.file(images.path(i))}: {reason}")
    if len(unreadable) > NAMED:
        decoded.unnamed[images.file] = len(unreadable) - NAMED
    return len(unreadable)


def _fit_paths(
    data: str,
    folder: Path,
    info: dict,
    lists: dict[str, ImageList],
    root: ImageRoot,
    data_dir: Path | None,
    fix_paths: bool,
    found: Findings,
) -> ImageRoot:
    """If paths do not match the disk, look for stated rules that fit. Report them or, with `fix_paths`, write and use them,
    and report how to write a rule for images that are still missing. Return the image root with the rules in use."""
    if root.pack is not None:  # its index contains the paths of the lists
        return root
    images, local_file, text = list(lists.values()), folder / "local.yaml", ""
    before = after = share_found(images, root)
    rules = root.rules
    if before < 1:
        variants = parse_rules(info.get("path_variants"), folder / "info.yaml", "path_variants")
        fitting = fit_rules(images, root.folder, (*root.rules, *variants))
        fitted = ImageRoot(root.folder, fitting, root.source)
        share = share_found(images, fitted)
        if share > before and repeats(lists, fitted) == repeats(lists, ImageRoot(root.folder)):
            rules, after = fitting, share
            shown = "; ".join(f"{rule.match!r} -> {rule.replace!r}" for rule in rules) or "none, the paths as they are"
            text = f"paths do not match the disk: {before:.0%} of a sample exist; rules that fit: {shown} ({after:.0%} then)"
            where = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
            command = f"python -m reslt.prepare check {shlex.quote(data)}{where} --fix-paths"
            if not fix_paths:
                found.problems.append(f"{text}; write them to {local_file} with: {command}")
    if not fix_paths:
        return root
    fitted = ImageRoot(root.folder, rules, root.source)
    if after < 1 and (by_hand := rule_by_hand(images, fitted, local_file)):
        found.remarks.append(by_hand)
    if after == 0:
        found.remarks.append(f"nothing is written to {local_file}: no image of a sample exists below {root.folder}")
    elif rules != root.rules or data_dir:
        try:
            write_local(folder, rules, data_dir)
            if text:
                found.remarks.append(f"{text}; written to {local_file}")
        except OSError as fault:
            shown = yaml.safe_dump(local_content(folder, rules, data_dir), default_flow_style=None, width=1000).rstrip()
            logger.warning(f"{local_file} cannot be written ({fault.strerror}); it would contain:\n{shown}")
    return fitted


def _check_presence(images: ImageList, root: ImageRoot, found: Findings) -> tuple[list[int], list[int]]:
    """Return the indices of images that are not on disk, and of empty files; report the first of each."""
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        absent, empty = zip(*pool.map(lambda chunk: _absent_and_empty(images, root, chunk), chunks), strict=True)
    absent, empty = list(chain.from_iterable(absent)), list(chain.from_iterable(empty))
    for indices, what, remedy in (
        (
            absent,
            "there is no image",
            f"does the list belong to this image root ({root.folder})? Give another with --data-dir DIR, or try other layouts "
            "with --fix-paths",
        ),
        (empty, "the file is empty:", "fetch it again, or remove the line from the list"),
    ):
        if indices:
            first = root.file(images.path(indices[0]))
            remedy = remedy if root.pack is None else first.fault()
            found.problems.append(
                f"{images.place(indices[0])}: {what} {first} ({len(indices):,} of {len(images):,} lines); {remedy}"
            )
    return absent, empty


def _absent_and_empty(images: ImageList, root: ImageRoot, chunk: range) -> tuple[list[int], list[int]]:
    absent, empty = [], []
    for i in chunk:
        try:
            status = root.file(images.path(i)).stat()
        except OSError:
            absent.append(i)
            continue
        if not stat.S_ISREG(status.st_mode):
            absent.append(i)
        elif status.st_size == 0:
            empty.append(i)
    return absent, empty


def _draw_counts(folder: Path, info: dict, lists, num_classes: int, output: Path, found: Findings) -> None:
    """Write the counts per class as CSV, and the training counts as a plot, colored by shot group."""
    counts = {split: images_per_class(images.labels, num_classes)[:num_classes] for split, images in lists.items()}
    name, train = folder.resolve().name, counts["train"]
    frame = pd.DataFrame({f"{split}_images": per_class for split, per_class in counts.items()})
    if len(np.unique(lists["train"].labels)) == num_classes and (
        names := class_names(info, folder / "info.yaml", lists["train"])
    ):
        frame.insert(0, "name", list(map(csv_cell, names)))
    output.mkdir(parents=True, exist_ok=True)
    frame.rename_axis("class").to_csv(output / f"{name}-images_per_class.csv")
    plot = output / f"{name}-images_per_class.png"
    groups = {}
    for key in ("shot_split", "paper_split"):
        try:
            groups[key] = shot_groups(train, info.get(key, STANDARD_SPLIT))
        except UserError as fault:
            found.problems.append(f"{folder / 'info.yaml'}: {key}: {fault}")
            groups[key] = shot_groups(train, STANDARD_SPLIT)
    _plot_counts(train, groups["shot_split"], name, plot)
    found.remarks.append(
        f"{train.max():,}..{train.min():,} training images per class, median {np.median(train):g}; plot and counts: {plot}, "
        ".csv"
    )
    if num_classes <= 20:
        found.remarks.append("images per class\n" + frame.to_string())


def _plot_counts(train: np.ndarray, groups: dict[str, np.ndarray], name: str, file: Path) -> None:
    """Plot (C,) training counts as a PNG: a bar per class by descending count, logarithmic, colored by shot group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    rank = np.empty(len(train), np.int64)
    rank[by_frequency(train)] = np.arange(len(train))
    for shot, color in zip(SHOTS, ("#3b6ea5", "#e0a030", "#c0392b"), strict=True):
        of_shot = groups[shot]
        label = f"{shot}: {of_shot.sum():,} classes, {train[of_shot].sum():,} images"
        axes.bar(rank[of_shot], train[of_shot], width=1.0, color=color, label=label)
    axes.set(yscale="log", xlabel="classes, by images", ylabel="training images", title=name)
    axes.set_ylim(bottom=0.8)
    axes.legend()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
