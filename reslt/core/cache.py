"""The folder of files that can be recreated: decoded images, compiled models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the cache folder: RESLT_CACHE, else `reslt` in the user's cache folder; None if there is no home folder.

    A folder shared by all users, such as /tmp, is no substitute: files that others write there would be loaded."""
    if named := os.environ.get("RESLT_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reslt"
    except RuntimeError:
        return None


def make_writable(folder: Path) -> None:
    """Create a folder of the cache if it is missing. Raises OSError if no file can be created in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
