"""Photos from a folder of class folders, or of split folders that contain class folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from reslt.core.errors import UserError
from reslt.prepare.folder import SPLIT_FOLDERS, image_files, require_images, require_source, split_folders, subfolders
from reslt.prepare.photos import Account, Photos, require_two


def from_folder(source: Path) -> Photos:
    """Find photos in source/<class>/..., or in source/train/<class>/..., val/ (valid/, validation/) and test/."""
    require_source(source)
    top = subfolders(source)
    if not top:
        raise UserError(f"--from {source}: there are no class folders in it")
    left_out, lowered = Counter(), {folder.lower() for folder in top}
    if "train" not in top and "train" in lowered and lowered <= set(SPLIT_FOLDERS):
        raise UserError(f"--from {source}: {top} look like splits; call the folder of training images train")
    if top == ["train"] or (subfolders(source / "train") and lowered & (set(SPLIT_FOLDERS) - {"train"})):
        if others := [folder for folder in top if folder.lower() not in SPLIT_FOLDERS]:
            raise UserError(
                f"--from {source}: {top} are partly splits and partly not; move {others[0]} away, or give the folder of classes"
            )
        names, files = split_folders(source, left_out)
    else:
        names, files = top, {"train": [image_files(source / c, left_out) for c in top]}
        require_images(source, names, files["train"])
    require_two(names, source)
    relative = {
        s: [[f.relative_to(source).as_posix() for f in fs] for fs in per_class] for s, per_class in files.items()
    }
    decisions = [f"left out: {n:,} {kind} files, not a supported image format" for kind, n in left_out.items()]
    return Photos(source, names, relative, Account(decisions))
