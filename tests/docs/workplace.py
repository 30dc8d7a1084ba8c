"""A folder to run a page's blocks in, as a reader would have it after the first steps: a checkout, photos, a dataset `birds`;
for slow blocks also a finished run and its folded file.

`python` and `accelerate` there are small scripts. They append the flags of `<!-- with: ... -->` to the commands of a
program, and let runs of train.py replace those that exist, unless they resume. `accelerate launch` starts the script
directly, as it does on a machine with one CPU and no GPU, but without the seconds that it takes to start; `make demo` uses
the real one."""

from __future__ import annotations

import ast
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from tests.docs.commands import assignments, check_training
from tests.docs.pages import PROJECT, Block, Page

CLASSES = {"puffin": 40, "razorbill": 24, "guillemot": 15, "black guillemot": 9, "little auk": 6, "great auk": 4}
MORE = {"great auk": 3, "puffin": 2}
SIDE = 96
RUN = "output/birds-resnet50-own_finetune-seed0"
SMALL = [
    "--model", "test_resnet.r160_in1k", "--no-pretrained", "--img-size", "64", "--epochs", "2", "--warmup-epochs", "0",
]  # fmt: skip
LINKED = ("train.py", "evaluate.py", "reslt", "docs", "tests", "Makefile", "requirements.txt")
PROGRAM = """#!/usr/bin/env bash
if [[ $0 == */accelerate ]]; then shift; fi
more=()
while read -r program flags; do
    for word in "$@"; do
        if [[ $word == "$program" || $word == */"$program" ]]; then eval "more+=($flags)"; fi
    done
done <"$DOCS_WITH"
if [[ " $* " == *" train.py "* && " $* " != *" --resume "* ]]; then more+=(--overwrite); fi
exec PYTHON "$@" "${more[@]}"
"""


def draw_photos(folder: Path, counts: dict[str, int], seed: int) -> list[tuple[str, str]]:
    """Draw small photos, a folder per class, and return (path, class) of each. Each class has a color of its own."""
    generator = np.random.default_rng(seed)
    found = []
    for c, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(1, count + 1):
            color = np.array([40 * (list(CLASSES).index(name) + 1), 90 + 20 * c, 200 - 30 * c]) + generator.integers(
                -20, 20, 3
            )
            coarse = generator.integers(-30, 30, (8, 8, 3)) + color
            image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.BILINEAR)
            path = f"{name}/{i:04}.jpg"
            image.save(folder / path, quality=85)
            found.append((path, name))
    return found


def make_workplace(folder: Path) -> Path:
    """Make the folder that every page begins with a copy of."""
    folder.mkdir(parents=True)
    photos = draw_photos(folder / "photos", CLASSES, seed=0)
    draw_photos(folder / "more_photos", MORE, seed=1)
    shutil.copy(folder / "photos/great auk/0001.jpg", folder / "photo.jpg")
    table = "".join(f"photos/{path},{name}\n" for path, name in photos)
    (folder / "photos.csv").write_text(f"file,species\n{table}")
    for description in (PROJECT / "data_lists").glob("*/info.yaml"):
        copy = folder / description.relative_to(PROJECT)
        copy.parent.mkdir(parents=True)
        shutil.copy(description, copy)
    make_programs(folder / ".programs")
    with at(folder):
        from reslt.prepare.__main__ import main

        with redirect_stdout(io.StringIO()):
            main(["own", "--from", "photos", "--name", "birds", "--test-per-class", "2", "--no-decode"])
    return folder


def make_programs(folder: Path) -> None:
    """Write the scripts python, python3 and accelerate."""
    folder.mkdir()
    for name in ("python", "python3", "accelerate"):
        (folder / name).write_text(PROGRAM.replace("PYTHON", sys.executable))
        (folder / name).chmod(0o755)


def add_run(folder: Path) -> None:
    """Train a small model on birds, and fold it."""
    place = Workplace(folder)
    flags = " ".join(SMALL)
    script = f"""
    python train.py --data birds --recipe own_finetune {flags} --workers 0 --experiment {Path(RUN).name}
    python evaluate.py --ckpt {RUN} --workers 0 --save-predictions --fold birds.safetensors
    """
    place.run_bash(script, [], timeout=300)


def copy_workplace(source: Path, target: Path) -> Path:
    """Copy the folder for a page. Weights are linked, since no command changes such a file in place."""

    def copy(file: str, to: str) -> None:
        os.link(file, to) if file.endswith((".safetensors", ".jpg")) else shutil.copy2(file, to)

    shutil.copytree(source, target, copy_function=copy)
    for name in LINKED:
        (target / name).symlink_to(PROJECT / name)
    for file in (PROJECT / "data_lists").glob("*.md"):
        shutil.copy(file, target / "data_lists")
    return target


@contextmanager
def at(folder: Path) -> Iterator[None]:
    """Within the block, the folder is the current one, modules in it can be imported, and no variable of the user's names other
    places. What is imported from it and registered there is forgotten afterwards."""
    from reslt.config import imports
    from reslt.config.methods import METHODS
    from reslt.config.parts import PARTS

    registries = [*PARTS.values(), METHODS]
    before, modules, place, path = [dict(r) for r in registries], set(sys.modules), os.getcwd(), list(sys.path)
    loaded, variables = (
        set(imports._loaded),
        {name: os.environ.pop(name, None) for name in ("RESLT_DATA", "RESLT_LISTS")},
    )
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(place)
        sys.path[:] = path
        os.environ.update({name: value for name, value in variables.items() if value is not None})
        imports._loaded.intersection_update(loaded)
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)


def check_imports(code: str) -> None:
    """Raise ImportError if code that is not run imports a name of the package that does not exist."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "reslt":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "reslt":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise ImportError(f"{node.module} has no {alias.name}")


class Workplace:
    """Runs the blocks of one page, in order, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        self.printed = ("", "")  # by the last block that ran: standard output, and standard error

    def run(self, page: Page, is_slow: bool) -> list[str]:
        """Run a page's blocks, those marked slow only if `is_slow`. Return a fault for each that fails."""
        with at(self.folder):
            return self._run(page, is_slow)

    def _run(self, page: Page, is_slow: bool) -> list[str]:
        faults, has_run = [], False
        for i, block in enumerate(page.blocks):
            try:
                if block.is_output:
                    self.compare(block) if has_run else None
                    continue
                has_run = block.why_not_run is None and (is_slow or not block.is_slow) and not block.file
                if block.file:
                    self.write(block)
                if block.language == "yaml" and block.why_not_run is None:
                    self.check_yaml(block, [b.file for b in page.blocks[:i] if b.language == "python" and b.file])
                elif block.language == "python" and not has_run:
                    check_imports(block.text)
                elif has_run and block.language == "bash":
                    self.run_bash(block.text, page.blocks[:i], block.more_flags, timeout=300 if is_slow else 30)
                elif has_run and block.language == "python":
                    self.run_python(block)
            except Exception as fault:
                faults.append(f"{block.place}: {type(fault).__name__}: {fault}")
        return faults

    def write(self, block: Block) -> None:
        """Write a block to the file that its first line names."""
        file = self.folder / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".py":
            compile(block.text, block.place, "exec")
        file.write_text(block.text if block.language != "text" else block.text.partition("\n")[2])

    def run_bash(self, text: str, before: list[Block], more_flags=(), timeout: float = 60) -> None:
        """Run a script. Raises RuntimeError with what it printed if it fails."""
        flags = self.folder / ".programs/flags"
        flags.write_text("".join(f"{program} {more}\n" for program, more in more_flags))
        paths = [str(self.folder / ".programs"), str(Path(sys.executable).parent), os.environ["PATH"]]
        variables = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(PROJECT), "DOCS_WITH": str(flags)}
        for name in ("RESLT_DATA", "RESLT_LISTS"):
            variables.pop(name, None)
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"{assignments(before)}\n{text}"],
            cwd=self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.printed = process.communicate(timeout=timeout)
        except BaseException:  # too late, or Ctrl-C: its children end with it
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        if process.returncode:
            out, err = self.printed
            raise RuntimeError(f"exit code {process.returncode}\n{out[-1000:]}{err[-2000:]}")

    def run_python(self, block: Block) -> None:
        """Run a block of Python in the page's namespace, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            exec(compile("\n" * block.line + block.text, str(PROJECT / block.page), "exec"), self.namespace)
        self.printed = (out.getvalue(), err.getvalue())

    def compare(self, block: Block) -> None:
        """Raise ValueError if the last block did not print what this one shows."""
        out, err = self.printed
        if not any(block.shows(text) for text in (out, err, out + err, err + out)):
            raise ValueError(f"the block before it prints\n{out}{err[-1000:]}")

    def check_yaml(self, block: Block, modules: list[str]) -> None:
        """Raise UserError unless a block is a valid recipe, info.yaml or local.yaml. `modules`: files of the page that may
        register what a recipe names."""
        from reslt.config.yaml_files import read_yaml
        from reslt.data.datasets import load_dataset, read_info
        from reslt.data.paths import find_image_root

        file = self.folder / (block.file or ".programs/recipe.yaml")
        file.write_text(block.text)
        if file.name in ("info.yaml", "local.yaml"):
            find_image_root(file.parent, read_info(file.parent), None)
            if (file.parent / "train.txt").is_file():
                load_dataset(str(file.parent), images_needed=False)
            check_training(["--data", str(file.parent)])  # with its `defaults:`
        else:
            data = [] if "data" in read_yaml(file) else ["--data", "birds"]
            imports = [part for module in modules for part in ("--import", module.removesuffix(".py"))]
            check_training(["--recipe", str(file), *data, *imports])
