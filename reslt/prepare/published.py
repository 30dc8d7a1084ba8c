"""The published lists of a benchmark: fetched, or adopted from copies, and verified by line count and git blob id.

A dataset's info.yaml says what they are:

    published:
      source: https://...                                      pinned address of a folder
      lists: {train: {file: NAME, lines: N, blob: SHA1}, ...}  `blob` is what `git hash-object NAME` prints
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reslt.config.places import DESCRIPTIONS, own_folder
from reslt.core.errors import UserError
from reslt.core.files import atomic_file, flush
from reslt.data.datasets import read_info
from reslt.data.lists import SPLITS

TIMEOUT_SECONDS, ATTEMPTS = 30.0, 4
BLOCK = 1 << 16


@dataclass(frozen=True)
class PublishedList:
    """One list as its authors published it."""

    split: str
    url: str
    file: str
    lines: int
    blob: str

    def fault(self, file: Path) -> str | None:
        """What of `file` differs from the published list; None where it is the same to the byte."""
        blob, lines = blob_id(file), count_lines(file)
        if blob == self.blob:
            return None
        if lines != self.lines:
            return f"it has {lines:,} lines, the published list has {self.lines:,}"
        reason = f"it has the right {lines:,} lines, but its git blob id is {blob}, not {self.blob}"
        unix = file.read_bytes().replace(b"\r\n", b"\n")
        if _blob_id(unix) == self.blob:
            return reason + ": its lines end as Windows writes them; convert them to Unix line ends"
        return reason + ": some line was changed"


def names() -> list[str]:
    """The datasets whose info.yaml says where their lists are published."""
    infos = DESCRIPTIONS.glob("*/info.yaml")
    return sorted(p.parent.name for p in infos if re.search(r"(?m)^published:", p.read_text("utf-8", "replace")))


def published_lists(folder: Path) -> list[PublishedList]:
    """What a dataset's info.yaml says. Raises UserError where that is malformed."""
    stated = read_info(folder).get("published")
    try:
        source, lists = stated["source"].rstrip("/"), stated["lists"]
        found = []
        for split in sorted(lists, key=SPLITS.index):
            item = lists[split]
            found.append(
                PublishedList(split, f"{source}/{item['file']}", item["file"], int(item["lines"]), item["blob"])
            )
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        raise UserError(
            f"{folder / 'info.yaml'}: published: must hold source: URL and lists: {{train: {{file:, lines:, blob:}}, ...}} "
            f"({type(fault).__name__}: {fault})"
        ) from None


def prepare(name: str, from_dir: Path | None = None) -> list[str]:
    """Bring data_lists/<name> its published lists: those that lie there are verified, the others adopted from `from_dir`
    or fetched. Returns a line on each. Nothing is written before all that was found is verified; raises UserError."""
    folder = own_folder(name)
    wanted = published_lists(folder)
    messages, missing = [], []
    for item in wanted:
        file = folder / f"{item.split}.txt"
        if not file.is_file():
            missing.append(item)
        elif fault := item.fault(file):
            raise UserError(f"{file}: {fault}; remove it and run this again, or put the published {item.file} there")
        else:
            messages.append(f"{file}: there already, verified")
    copies = _copies(missing, from_dir) if from_dir else _fetched(missing, folder)
    for item in reversed(
        [item for item in missing if item.split in copies]
    ):  # train.txt last: it says that all is there
        with atomic_file(folder / f"{item.split}.txt") as temporary:
            shutil.copyfile(copies[item.split], temporary)
        if not from_dir:
            copies[item.split].unlink()
        messages.append(f"{folder / item.split}.txt: {copies[item.split] if from_dir else item.url}, verified")
    for item in missing:
        if item.split not in copies:
            messages.append(
                f"{folder / item.split}.txt: MISSING, {from_dir} holds no such list; fetch it with: "
                f"python -m reslt.prepare {name}"
            )
    return messages


def _copies(wanted: list[PublishedList], from_dir: Path) -> dict[str, Path]:
    """{split: file} of a folder's copies of published lists, whatever their names; those that are not there are left out.

    Raises UserError where there is none, or a file that is named like a list differs from it."""
    if not from_dir.is_dir():
        raise UserError(f"--from-dir {from_dir}: there is no such folder")
    files = {blob_id(file): file for file in sorted(from_dir.glob("*.txt"))}
    found = {item.split: files[item.blob] for item in wanted if item.blob in files}
    for item in wanted:
        if item.split in found:
            continue
        likely_names = (item.file, f"{item.split}.txt", item.file.rpartition("_")[2])
        for file in (from_dir / name for name in likely_names):
            if file.is_file() and file not in found.values():
                raise UserError(f"{file}: not the published {item.file}: {item.fault(file)}; nothing was adopted")
    if wanted and not found:
        files_wanted = ", ".join(item.file for item in wanted)
        raise UserError(f"--from-dir {from_dir}: it holds none of the published lists ({files_wanted})")
    return found


def _fetched(wanted: list[PublishedList], folder: Path) -> dict[str, Path]:
    """{split: file} of lists that were downloaded and verified, beside their final place. Raises UserError."""
    parts = {}
    for item in wanted:
        part, by_hand = folder / f"{item.split}.txt.part", folder / f"{item.split}.txt"
        if not (part.is_file() and blob_id(part) == item.blob):
            try:
                download(item.url, part)
            except (OSError, http.client.HTTPException) as fault:
                reason = getattr(fault, "reason", None) or fault
                raise UserError(
                    f"{item.url}: cannot be fetched: {reason}. Run this again to go on where it stopped; without network, "
                    f"put a copy of {item.file} at {by_hand} by hand, or name a folder of copies with --from-dir DIR, and "
                    "run this again: it is verified then"
                ) from None
        if fault := item.fault(part):
            part.unlink()
            raise UserError(f"{item.url}: what was fetched is not the published list: {fault}; nothing was written")
        parts[item.split] = part
    return parts


def download(url: str, part: Path, timeout: float = TIMEOUT_SECONDS) -> None:
    """Fetch a file into `part`, with a progress bar; what lies there from an interrupted attempt is continued.

    Tries again after a broken connection, with growing pauses. Raises OSError or HTTPException."""
    for attempt in range(ATTEMPTS):
        try:
            return _download_once(url, part, timeout)
        except urllib.error.HTTPError as fault:
            if fault.code == 416:  # nothing left to send: what is there is too long
                part.unlink(missing_ok=True)
            if (fault.code < 500 and fault.code != 416) or attempt == ATTEMPTS - 1:
                raise
        except (OSError, http.client.HTTPException):
            if attempt == ATTEMPTS - 1:
                raise
        time.sleep(2**attempt)


def _download_once(url: str, part: Path, timeout: float) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        url, headers={"User-Agent": "reslt"} | ({"Range": f"bytes={done}-"} if done else {})
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if answer.status != 206:  # the server sends the whole file, whatever was asked for
            done = 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        progress = tqdm(desc=url.rpartition("/")[2], total=total, initial=done, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if done else "wb") as file, progress as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    flush(part)


def blob_id(file: Path) -> str:
    """The git blob id of a file: SHA-1 of "blob <bytes>\\0" and its content."""
    return _blob_id(file.read_bytes())


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def count_lines(file: Path) -> int:
    """Lines of a file; a last one without line end counts."""
    lines, last = 0, b"\n"
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")
