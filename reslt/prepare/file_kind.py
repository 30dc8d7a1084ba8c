"""The kind of a file, from its first bytes, before it is parsed: users give a workbook, a web page or JSON as a table."""

from __future__ import annotations

import re
from pathlib import Path

from reslt.core.errors import UserError

HEAD_BYTES = 4096  # examined
TABLE, JSON, JSON_LINES = "a table", "JSON", "JSON lines"
TEXTS = (TABLE, JSON, JSON_LINES)
READ_BY = {
    TABLE: "a table is read with --csv FILE --image-column COLUMN --label-column COLUMN",
    JSON: "JSON in COCO's form is read with --json FILE",
    JSON_LINES: "JSON lines are read with --from FOLDER if the file is called metadata.jsonl and is beside the images",
}
SIGNATURES = (
    (b"\x89PNG", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"GIF8", "a GIF image", ""),
    (b"%PDF", "a PDF document", ""),
    (b"PAR1", "a Parquet file", "save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook (.xls)", "save it as CSV"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch its content with: git lfs pull"),
)
# A compressed table is unpacked while it is read if its name has the ending.
ARCHIVES = (
    (b"PK\x03\x04", "a zip archive", (".zip",)),
    (b"\x1f\x8b", "gzip", (".gz",)),
    (b"BZh", "bzip2", (".bz2",)),
    (b"\xfd7zXZ", "xz", (".xz",)),
    (b"\x28\xb5\x2f\xfd", "zstd", (".zst",)),
)


def require_kind(file: Path, flag: str, wanted: str) -> None:
    """Raise UserError, without quoting the file, if it is not of the `wanted` kind: 'a table', 'JSON' or 'JSON lines'."""
    try:
        if not file.is_file():  # opening a pipe would wait for its writer
            reason = "not a file but a folder, pipe or device" if file.exists() else "there is no such file"
            raise UserError(f"{flag} {file}: not readable as {wanted}: {reason}")
        with open(file, "rb") as handle:
            head = handle.read(HEAD_BYTES)
    except OSError as fault:
        raise UserError(f"{flag} {file}: not readable as {wanted}: {fault.strerror}") from None
    kind, remedy = _kind(head, file.suffix.lower(), wanted)
    if kind != wanted:
        remedy = remedy or READ_BY.get(kind, f"give {wanted}")
        raise UserError(f"{flag} {file}: not readable as {wanted}: it seems to be {kind}; {remedy}")


def _kind(head: bytes, suffix: str, wanted: str) -> tuple[str, str]:
    """Return the kind of a file with these first bytes, and a remedy or ''."""
    if head.startswith(b"PK\x03\x04") and (b"[Content_Types].xml" in head or suffix in (".xlsx", ".xlsm")):
        return "an Excel workbook (.xlsx)", "save it as CSV"
    for signature, kind, suffixes in ARCHIVES:
        if head.startswith(signature):
            return (wanted, "") if wanted == TABLE and suffix in suffixes else (kind, "unpack it")
    for signature, kind, remedy in SIGNATURES:
        if head.startswith(signature):
            return kind, remedy
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image", ""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return "an empty file", ""
    if b"\0" in head:
        return "binary data, or text that is not UTF-8", "save it as UTF-8 text"
    if re.match(rb"<(!doctype|html|head|body|\?xml|svg|!--)", text, re.IGNORECASE):
        return "a web page or XML", "was a page downloaded in place of the file?"
    if re.match(rb"""\{\s*["'}]|\[\s*([\[{"\]]|\d)""", text):
        lines = text.split(b"\n", 2)
        of_lines = text.startswith(b"{") and lines[0].rstrip().endswith(b"}") and (suffix == ".jsonl" or len(lines) > 1)
        is_one_value = of_lines and len(lines) > 1 and not lines[1].strip()  # {...} and a last line break
        return (JSON_LINES, "") if of_lines and (suffix == ".jsonl" or not is_one_value) else (JSON, "")
    return TABLE, ""
