"""The place of a list's images on this machine: an image root, and rules that rewrite paths which differ from the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reslt.config.places import DESCRIPTIONS, lists_folder
from reslt.config.yaml_files import read_yaml, require_texts_as_written
from reslt.core.errors import UserError
from reslt.core.text import has_controls, one_line
from reslt.data.shards import Pack, StoredImage

LOCAL_KEYS = {"image_root", "path_rules"}


@dataclass(frozen=True)
class PathRule:
    """A regular expression, and the replacement of its first match in a list's path (`\\1`: a group)."""

    match: str
    replace: str

    def apply(self, path: str) -> str | None:
        """Return the rewritten path; None if the rule does not match."""
        rewritten, count = re.subn(self.match, self.replace, path, count=1)  # `re` keeps compiled patterns
        return rewritten if count else None


@dataclass(frozen=True)
class ImageRoot:
    """The folder that a list's paths start from, and this machine's rules, of which the first match applies. Rules do not
    apply to a packed folder, whose index contains the paths of the list."""

    folder: Path
    rules: tuple[PathRule, ...] = ()
    source: str = ""  # the flag, variable or file that names the folder, for messages

    @cached_property
    def pack(self) -> Pack | None:
        """The folder's shards; None if it contains files. Raises UserError for a damaged index."""
        return Pack.at(self.folder)

    def file(self, path: str) -> StoredImage:
        """Return the image file of a list's path."""
        return self.folder / self.rewritten(path) if self.pack is None else self.pack.image(path)

    def ahead(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Return a context in which images of a pack are read ahead, in few long reads; files are read one by one."""
        return nullcontext() if self.pack is None else self.pack.ahead(paths)

    @property
    def remedy(self) -> str:
        """The remedy for an image that cannot be read."""
        return "repair or replace the file" if self.pack is None else "repair or replace its original and pack it again"

    def rewritten(self, path: str) -> str:
        """Return the path on disk, relative to the folder, of a list's path."""
        for rule in self.rules:
            if (rewritten := rule.apply(path)) is not None:
                return rewritten
        return path


def find_image_root(folder: Path, info: dict, data_dir: str | Path | None) -> ImageRoot:
    """Return the image root: --data-dir, else RESLT_DATA/<images>, else the image_root of local.yaml, else that of info.yaml,
    else data/<images>. <images> is `images` of info.yaml, else the name of the dataset's folder. The rules are those of
    local.yaml. The image root may be missing."""
    local, images = read_local(folder), info.get("images", folder.resolve().name)
    if not isinstance(images, str) or has_controls(images):
        raise UserError(f"{folder / 'info.yaml'}: images must be the name of a folder, not {images!r}")
    rules = parse_rules(local.get("path_rules"), folder / "local.yaml", "path_rules")
    shared = os.environ.get("RESLT_DATA")
    if data_dir is not None:
        return ImageRoot(Path(os.path.expanduser(data_dir)), rules, "--data-dir")
    if shared and (Path(shared) / images).is_dir():
        return ImageRoot(Path(shared) / images, rules, "RESLT_DATA")
    for content, file in ((local, "local.yaml"), (info, "info.yaml")):
        if content.get("image_root"):
            if has_controls(str(content["image_root"])):
                raise UserError(f"{folder / file}: image_root contains a control character; rename the folder")
            named = os.path.expanduser(str(content["image_root"]))  # leaves ~nobody unchanged; pathlib would raise
            return ImageRoot(folder / named, rules, str(folder / file))
    lists = folder.parent if folder.parent == DESCRIPTIONS else lists_folder()
    return ImageRoot(lists.parent / "data" / images, rules, "the default place")


def require_folder(root: ImageRoot, folder: Path, info: dict) -> None:
    """Raise UserError, with the remedies, if the image root is not a folder, or is a damaged pack."""
    if root.folder.is_dir():
        _ = root.pack  # raises for a damaged index
        return
    layout = f" (it contains {one_line(info['layout'])})" if "layout" in info else ""
    images = info.get("images", folder.resolve().name)
    raise UserError(
        f"image root {root.folder} (from {root.source}) is not a folder; give the folder that the paths in the lists of "
        f"{folder} start from{layout} with --data-dir DIR, or set RESLT_DATA to a folder with {images}/"
    )


def read_local(folder: Path) -> dict:
    """Read local.yaml in a dataset's folder, which is this machine's own; {} if there is none. Raises UserError for an
    unknown key."""
    file = folder / "local.yaml"
    content = read_yaml(file) if file.is_file() else {}
    if unknown := sorted(set(content) - LOCAL_KEYS):
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(sorted(LOCAL_KEYS))}")
    if content.get("image_root") is not None:
        require_texts_as_written(file, content, "image_root")
    return content


def parse_rules(content: object, file: Path, key: str) -> tuple[PathRule, ...]:
    """Return the rules of a list of {match: REGEX, replace: TEXT}. Raises UserError with file, rule and reason."""
    rules = []
    for number, item in enumerate(content if isinstance(content, list) else [content] if content else [], 1):
        is_rule = isinstance(item, dict) and set(item) == {"match", "replace"}
        if not is_rule or not all(isinstance(text, str) for text in item.values()):
            raise UserError(
                f"{file}: {key}: rule {number} is {item!r}; write it as {{match: 'REGEX', replace: 'TEXT'}}"
            )
        try:
            pattern = re.compile(item["match"])
            names = {group: name for name, group in pattern.groupindex.items()}
            groups = range(1, pattern.groups + 1)
            empty_groups = (f"(?P<{names[group]}>)" if group in names else "()" for group in groups)
            re.sub("".join(empty_groups), item["replace"], "", count=1)  # does the replacement name groups that exist?
        except (re.error, IndexError, ValueError, OverflowError, RecursionError) as fault:
            raise UserError(
                f"{file}: {key}: rule {number}, {item}: {fault}; both are Python regular expressions"
            ) from None
        rules.append(PathRule(**item))
    return tuple(rules)
