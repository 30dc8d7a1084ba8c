"""--import: a user's own modules, which register methods, timm models and the like before settings are checked.

Only modules that the user typed are imported, never those that a file names. A run records them, so that the error for an
unknown part can name the flag. Loads no torch itself."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.text import shown

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
SHOWN_NAMES, LONGEST_REASON = 3, 300
_loaded: set[str] = set()  # names, as typed


def load_imports(names: Iterable[str]) -> None:
    """Import modules by name (from the environment, else the current folder) or by file, FILE.py, each once.

    Raises UserError for one that does not exist or fails, with the line of the user's file."""
    for name in names:
        try:
            _import_file(Path(name)) if name.endswith(".py") else _import_module(name)
        except (Exception, SystemExit) as fault:  # the user's code may raise anything
            raise UserError(f"--import {name}: {_reason(fault, name)}") from None
        _loaded.add(name)


def _import_module(name: str) -> None:
    if not MODULE.fullmatch(name):
        raise UserError("it is neither the name of a module nor a file that ends in .py")
    if os.getcwd() not in sys.path:  # appended: a file there replaces no installed package
        sys.path.append(os.getcwd())
    importlib.import_module(name)


def _import_file(file: Path) -> None:
    if not file.is_file():
        raise UserError("there is no such file; give its path, or the name of a module")
    place = file.resolve()
    module = (
        f"{place.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"  # not the name of an installed module
    )
    if module in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module, place)
    sys.modules[module] = importlib.util.module_from_spec(spec)  # timm looks up the module of what it registers
    try:
        spec.loader.exec_module(sys.modules[module])
    except BaseException:
        del sys.modules[module]
        raise


def _reason(fault: BaseException, name: str) -> str:
    """Return the error, after FILE:LINE of the user's code if the import reached it."""
    text = shown(str(fault), LONGEST_REASON)
    error = text if isinstance(fault, UserError) else f"{type(fault).__name__}: {text}"
    if isinstance(fault, SyntaxError) and fault.filename:
        return f"{fault.filename}:{fault.lineno}: {type(fault).__name__}: {fault.msg}"
    frames = traceback.extract_tb(fault.__traceback__)
    of_import = (__file__, importlib.__file__)
    frames = [frame for frame in frames if frame.filename not in of_import and not frame.filename.startswith("<")]
    if frames:  # the deepest line in the imported file itself, not in code that it calls
        line = [frame.lineno for frame in frames if frame.filename == frames[0].filename][-1]
        return f"{frames[0].filename}:{line}: {error}"
    if isinstance(fault, ModuleNotFoundError):
        return (
            f"there is no such module, neither installed nor in {os.getcwd()} ({text}); give its file, --import FILE.py"
        )
    return error


def recorded_imports(run: Path | None) -> object:
    """Return the imports that config.yaml in a run's folder records; None if the file is missing or damaged."""
    try:
        config = read_yaml(run / "config.yaml").get("config") if run else None
    except UserError:
        return None
    return config.get("imports") if isinstance(config, dict) else None


@contextmanager
def naming_imports(recorded: object) -> Iterator[None]:
    """Within the block, add to a UserError the `--import` flags that a run was trained with and that are not given now.
    `recorded` is the value in the run's file, of any type; it is only shown, never imported."""
    try:
        yield
    except UserError as fault:
        names = [name for name in recorded if isinstance(name, str)] if isinstance(recorded, (list, tuple)) else []
        missing = [name for name in names if name not in _loaded and name not in sys.modules]
        if not missing:
            raise
        flags = " ".join(f"--import {shlex.quote(shown(name))}" for name in missing[:SHOWN_NAMES])
        raise UserError(
            f"{fault}\nthe run was trained with {flags}: if you trust this code, give the flag again (in Python: import the "
            "module first)"
        ) from None
