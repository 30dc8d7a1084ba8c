"""The folder of files that can be recreated: decoded images, compiled models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: RESLT_CACHE, else `reslt` in the user's cache folder."""
    named = os.environ.get("RESLT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reslt"
