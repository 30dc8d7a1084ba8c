"""The published lists of a benchmark: fetched, or adopted from copies, and verified by git blob id.

A dataset's info.yaml states them:

    published:
      source: https://...                                      pinned address of a folder
      lists: {train: {file: NAME, lines: N, blob: SHA1}, ...}  `blob` is what `git hash-object NAME` prints
"""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reslt.config.places import DESCRIPTIONS, dataset_folder, lists_folder, own_folder
from reslt.core.errors import UserError
from reslt.core.files import atomic_file, regular_file
from reslt.data.datasets import read_info
from reslt.data.lists import SPLITS

SOURCES = ("https://raw.githubusercontent.com/",)  # info.yaml may come from a stranger and cannot name another host
TIMEOUT_SECONDS = 30.0  # without a byte from the server


@dataclass(frozen=True)
class PublishedList:
    """One list of a benchmark, as its authors published it."""

    split: str
    url: str
    file: str
    lines: int
    blob: str

    def fault(self, content: bytes) -> str | None:
        """Return the way in which a list differs from the published one; None if it is identical."""
        blob, lines = blob_id(content), count_lines(content)
        if blob == self.blob:
            return None
        if lines != self.lines:
            return f"it has {lines:,} lines, the published list has {self.lines:,}"
        reason = f"it has the right {lines:,} lines, but its git blob id is {blob}, not {self.blob}"
        if blob_id(content.replace(b"\r\n", b"\n")) == self.blob:
            return reason + ": it has Windows line ends; convert them to Unix line ends"
        return reason + ": some line was changed"


def names() -> list[str]:
    """Return the datasets whose info.yaml states where their lists are published."""
    files = {*DESCRIPTIONS.glob("*/info.yaml"), *lists_folder().glob("*/info.yaml")}
    texts = {file: file.read_text("utf-8", "replace") for file in files if file.is_file()}
    return sorted({file.parent.name for file, text in texts.items() if re.search(r"(?m)^published:", text)})


def published_lists(folder: Path) -> list[PublishedList]:
    """Return the published lists that a dataset's info.yaml states. Raises UserError if the entry is malformed."""
    stated = read_info(folder).get("published")
    try:
        source, lists = stated["source"].rstrip("/"), stated["lists"]
        items = [(split, lists[split]) for split in sorted(lists, key=SPLITS.index)]
        return [
            PublishedList(split, f"{source}/{item['file']}", item["file"], int(item["lines"]), item["blob"])
            for split, item in items
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        raise UserError(
            f"{folder / 'info.yaml'}: published: must contain source: URL and lists: {{train: {{file:, lines:, blob:}}, ...}} "
            f"({type(fault).__name__}: {fault})"
        ) from None


def prepare(name: str, from_dir: Path | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """Put the published lists into data_lists/<name>: verify those already there, adopt the others from `from_dir` or fetch
    them. Return a line on each. Everything is verified before anything is written. Raises UserError for a list that differs
    or cannot be fetched."""
    folder = lists_folder() / name
    messages, missing = [], []
    for item in published_lists(dataset_folder(name)):
        file = folder / f"{item.split}.txt"
        if not file.is_file():
            missing.append(item)
        elif fault := item.fault(file.read_bytes()):
            raise UserError(f"{file}: {fault}; remove it and run this again, or put the published {item.file} there")
        else:
            messages.append(f"{file}: already there, verified")
    if from_dir:
        contents = _copies(missing, from_dir)
    else:
        bar = tqdm(missing, desc="fetching", unit="list", disable=None if missing else True)
        contents = {item.split: _fetch(item, folder, timeout_seconds) for item in bar}
    own_folder(name)
    for item in reversed(missing):  # train.txt last: it marks the dataset as complete
        file = folder / f"{item.split}.txt"
        if item.split in contents:
            with atomic_file(file) as temporary:
                temporary.write_bytes(contents[item.split])
            messages.append(f"{file}: {from_dir or item.url}, verified")
        else:
            remedy = f"fetch it with: python -m reslt.prepare {name}"
            messages.append(f"{file}: MISSING, {from_dir} contains no such list; {remedy}")
    return messages


def _copies(wanted: list[PublishedList], from_dir: Path) -> dict[str, bytes]:
    """Return {split: content} of those published lists that a folder contains, under any names.

    Raises UserError if there is none, or if a file that is named like a list differs from it."""
    if not from_dir.is_dir():
        raise UserError(f"--from-dir {from_dir}: there is no such folder")
    contents = {file: regular_file(file).read_bytes() for file in sorted(from_dir.glob("*.txt"))}
    by_blob = {blob_id(content): content for content in contents.values()}
    found = {item.split: by_blob[item.blob] for item in wanted if item.blob in by_blob}
    for item in wanted:
        if item.split in found:
            continue
        likely_names = (item.file, f"{item.split}.txt", item.file.rpartition("_")[2])
        for file in (from_dir / name for name in likely_names):
            if file in contents and contents[file] not in found.values():
                reason = item.fault(contents[file])
                raise UserError(f"{file}: not the published {item.file}: {reason}; nothing was adopted")
    if wanted and not found:
        files_wanted = ", ".join(item.file for item in wanted)
        raise UserError(f"--from-dir {from_dir}: it contains none of the published lists ({files_wanted})")
    return found


def _fetch(item: PublishedList, folder: Path, timeout_seconds: float) -> bytes:
    """Download and verify a list. Raises UserError that explains how to provide it by hand."""
    if not item.url.startswith(SOURCES):
        raise UserError(
            f"{item.url!r}: lists are fetched only from {' or '.join(SOURCES)}; download {item.file!r} yourself if you trust "
            "this address, and name its folder with --from-dir DIR"
        )
    try:
        with urllib.request.urlopen(item.url, timeout=timeout_seconds) as answer:
            content = answer.read()
    except (OSError, ValueError, http.client.HTTPException) as fault:
        reason = getattr(fault, "reason", None) or fault
        raise UserError(
            f"{item.url}: cannot be fetched: {reason}. Run this again, or put a copy of {item.file} at "
            f"{folder / item.split}.txt by hand, or name a folder of copies with --from-dir DIR; copies are verified too"
        ) from None
    if fault := item.fault(content):
        raise UserError(
            f"{item.url}: the fetched file is not the published list: {fault}; nothing was written. Put a copy of {item.file} "
            f"at {folder / item.split}.txt by hand"
        )
    return content


def blob_id(content: bytes) -> str:
    """Return the git blob id of a file's content: SHA-1 of "blob <bytes>\\0" and the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def count_lines(content: bytes) -> int:
    """Return the number of lines; a last one without a line end counts."""
    return content.count(b"\n") + (content[-1:] not in (b"", b"\n"))
