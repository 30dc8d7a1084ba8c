"""`python -m reslt.export RUN OUT`: write a trained model as files that other programs load. See docs/export.md."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from reslt.config.checks import raise_all
from reslt.config.command_line import add_import_flag, key_values
from reslt.config.imports import load_imports
from reslt.core.command import Parser, entry_point
from reslt.core.errors import UserError
from reslt.core.files import atomic_file, atomic_folder
from reslt.core.text import listed

if TYPE_CHECKING:
    from torch import nn

FORMATS = {"timm": None, "onnx": ".onnx", "torch": ".pt2"}  # with the suffix of the file; None: a folder
OF_FOLDER = re.compile(r"config\.json|model\.safetensors|README\.md|modeling_(reslt|cifar_resnet)\.py")
ONNX_PACKAGES = ("onnx", "onnxscript")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = Parser(prog="python -m reslt.export", description="Write a trained model as files for other programs.")
    found.add_argument(
        "run", type=Path, metavar="RUN", help="run folder, folder of one checkpoint, or file of evaluate.py --fold"
    )
    found.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; for onnx and torch, file to write (.onnx, .pt2)"
    )
    found.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="timm",
        help="timm: a folder for timm.create_model('local-dir:OUT', pretrained=True), with a model card; onnx: requires "
        "onnx and onnxscript; torch: torch.export (default: timm)",
    )
    found.add_argument(
        "--which",
        choices=("last", "best"),
        help="checkpoint of the run; unset: the best if validation chose one, else the last",
    )
    found.add_argument(
        "--model-kwargs",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="arguments of the model that are not accepted from a file, with the values used in training",
    )
    found.add_argument(
        "--license",
        metavar="ID",
        help="license in the model card, such as apache-2.0 or cc-by-nc-4.0; unset: unknown",
    )
    found.add_argument(
        "--push-to-hub", metavar="NAME", help="also upload the folder to the Hugging Face hub, as USER/NAME"
    )
    found.add_argument("--private", action="store_true", help="with --push-to-hub, a new repository is private")
    found.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier export, including its model card; with --push-to-hub, add a commit",
    )
    add_import_flag(found)
    return found


def check_flags(given: argparse.Namespace) -> None:
    """Raise UserError for contradictory flags, and for a place that cannot be written. Imports no torch."""
    flag, ending = f"--format {given.format}", FORMATS[given.format]
    if ending and given.out.suffix.lower() != ending:
        raise UserError(f"{given.out}: {flag} writes a file; give a name that ends in {ending}")
    if not ending and given.out.suffix.lower() in FORMATS.values():
        formats = {ending: name for name, ending in FORMATS.items()}
        raise UserError(
            f"{given.out}: {flag} writes a folder; for a file, add --format {formats[given.out.suffix.lower()]}"
        )
    for name, value in (("--license", given.license), ("--push-to-hub", given.push_to_hub)):
        if value and ending:
            raise UserError(f"{name} applies to --format timm, which writes a folder with a model card; drop {name}")
    if given.private and not given.push_to_hub:
        raise UserError("--private applies to --push-to-hub NAME; add that, or drop --private")
    if given.license and not LICENSE.fullmatch(given.license):
        raise UserError(f"--license {given.license}: give an identifier of the hub, such as apache-2.0")
    if given.format == "onnx" and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        are = "are" if len(missing) > 1 else "is"
        raise UserError(f"{flag}: {' and '.join(missing)} {are} not installed; pip install {' '.join(ONNX_PACKAGES)}")
    if not given.out.exists() or (not ending and is_empty_folder(given.out)):
        return
    if not given.overwrite:
        raise UserError(f"{given.out} exists; give another name, or --overwrite if it is an earlier export")
    require_replaceable(given.out, given.format)


def is_empty_folder(out: Path) -> bool:
    """Return whether a path is an empty folder that a new one may replace: neither a link nor the current folder."""
    return out.is_dir() and not out.is_symlink() and out.resolve() != Path.cwd() and not any(out.iterdir())


def require_replaceable(out: Path, format: str) -> None:
    """Raise UserError if a file or folder is not entirely the result of an earlier export in this format."""
    reason = None
    try:
        if format == "timm":
            others = [
                path.name for path in sorted(out.iterdir()) if not OF_FOLDER.fullmatch(path.name) or not path.is_file()
            ]
            if others:
                reason = f"it also contains {listed(others, 3)}"
            elif json.loads((out / "config.json").read_text(encoding="utf-8")).get("exported_by") != "reslt":
                reason = "its config.json is not that of an export"
        elif format == "onnx":
            import onnx

            entries = {entry.key: entry.value for entry in onnx.load(out, load_external_data=False).metadata_props}
            reason = None if entries.get("exported_by") == "reslt" else "its metadata are not those of an export"
        else:
            with zipfile.ZipFile(out) as archive:
                name = next(name for name in archive.namelist() if name.endswith("extra/description.json"))
                stated = json.loads(archive.read(name))
            reason = None if stated.get("exported_by") == "reslt" else "its description is not that of an export"
    except Exception:  # the file may be anything, so its reader may raise anything
        reason = "it is not an export"
    if reason:
        raise UserError(
            f"{out}: --overwrite replaces only an earlier export of this format; {reason}; give another name"
        )


def load(place: Path, which: str | None, model_kwargs: list[str]) -> tuple[nn.Module, dict]:
    """Load a run, a checkpoint or a folded file as `reslt.load_run` and `reslt.load_folded` do. Raises UserError, also if
    the exported model would lack a part of the run's predictor."""
    from reslt.deploy.trained_model import load_folded, read_run
    from reslt.models.fold import is_folded

    typed, faults = key_values(model_kwargs)
    raise_all(faults)
    if is_folded(place):
        if which:
            raise UserError(f"--which {which} chooses among the checkpoints of a run, but {place} is a file; drop it")
        loaded = load_folded(place, typed)
    else:
        loaded = read_run(place, which, typed)
    loaded.require_preprocessing()
    if loaded.lacking:
        raise UserError(
            f"{place}: the exported model would predict without {', '.join(loaded.lacking)}; to export it nevertheless, fold "
            "it first without: evaluate.py --ckpt RUN --FLAG none --fold FILE.safetensors (a router: --use-experts 1), and "
            "export FILE.safetensors"
        )
    module, described = loaded
    return module, described


def how_to_load(out: Path, modules: tuple[str, ...]) -> str:
    """Return a sentence on how timm loads the folder."""
    call = f"timm.create_model('local-dir:{out}', pretrained=True)"
    if not modules:
        return f"{call} loads it with timm alone"
    files = " and ".join(f"{name}.py" for name in modules)
    return f"import {files} from this folder first; then {call} loads it"


@entry_point
def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    check_flags(given)
    load_imports(given.imports or ())

    from reslt.deploy.model_card import Record, model_card
    from reslt.deploy.programs import to_onnx, to_torch
    from reslt.deploy.timm_folder import TimmModel, require_same
    from reslt.runs.folder import require_outside_checkpoints

    require_outside_checkpoints(given.out, "OUT")
    if given.push_to_hub:
        from reslt.deploy.hub import push, require_pushable

        require_pushable(given.push_to_hub, given.overwrite)
    module, described = load(given.run, given.which, given.model_kwargs)
    if given.format != "timm":
        content, compared = (to_onnx if given.format == "onnx" else to_torch)(module, described)
        with atomic_file(given.out) as file:
            file.write_bytes(content)
        print(f"{given.out}: {compared}")
        return
    model, record = TimmModel.of(module, described), Record.of(given.run, given.which)
    loading = {"modules": model.modules, "architecture": model.architecture, "arguments": model.arguments}
    card = model_card(described, record, given.license, loading, model.backbone.pretrained_cfg)
    with atomic_folder(given.out, replaces=given.overwrite or is_empty_folder(given.out)) as folder:
        model.write(folder, described, given.license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        difference = require_same(folder, module, described["img_size"])
    compared = f"probabilities differ by at most {difference:.1g} from the run's"
    print(f"{given.out}: {how_to_load(given.out, model.modules)}; {compared}")
    if given.push_to_hub:
        try:
            print(push(given.out, given.push_to_hub, given.private))
        except UserError as fault:
            raise UserError(f"{fault}; {given.out} is complete: hf upload {given.push_to_hub} {given.out}") from None
