"""Build the wheel, install it in a fresh environment, and use it there: `python -m tests.fresh_environment lowest newest`.

`lowest` installs the lowest version that each requirement admits, `newest` what pip chooses. `--suite` also installs
the packages of the tests, at the same kind of version, and runs the whole fast suite of this checkout in that
environment. An environment takes about 6 GB and a few minutes; `--keep DIR` keeps it and uses it again."""

from __future__ import annotations

import argparse
import email
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1]

TRIAL = """
import json, pathlib, subprocess, sys
import numpy as np, torch
from PIL import Image
import reslt

assert pathlib.Path(reslt.__file__).is_relative_to(sys.prefix), reslt.__file__
random = np.random.default_rng(0)
for name, count in {"auk": 20, "puffin": 8, "razorbill": 4}.items():
    folder = pathlib.Path("photos", name)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8)).save(folder / f"{i}.png")
subprocess.run([sys.executable, "-m", "reslt.prepare", "own", "--from", "photos", "--name", "birds"], check=True)
subprocess.run([sys.executable, "-m", "reslt.prepare", "check", "birds", "--decode"], check=True)
birds = reslt.load_dataset("birds")
assert birds.class_names == ("auk", "puffin", "razorbill"), birds.class_names

from reslt.data.groups import branch_sets

model = reslt.create_model("resnet18", birds.num_classes, branches=3, branch="bn")
loss_fn = reslt.ResLTLoss(branch_sets(birds.images_per_class, 3), alpha=0.9)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
images, labels = torch.randn(6, 3, 64, 64), torch.tensor([0, 0, 0, 1, 1, 2])
losses = []
for _ in range(8):
    loss = loss_fn(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
predictions = model(images).sum(0).argmax(-1)
assert len(reslt.shot_accuracy(predictions, labels, birds.images_per_class)) == 4
print(len(reslt.list_methods()), "methods,", len(reslt.list_recipes()), "recipes; losses", losses[0], losses[-1])
"""


def requirements(wheel: Path, python_version: str, extra: str = "") -> list[Requirement]:
    """Return the wheel's requirements on that Python, those of one extra included."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    found = [Requirement(line) for line in lines]
    where = {"python_version": python_version, "extra": extra}
    return [one for one in found if one.marker is None or one.marker.evaluate(where)]


def lowest(requirement: Requirement) -> str:
    """Return `name==version` for the version that a requirement `name>=version` begins with."""
    [bound] = [each for each in requirement.specifier if each.operator == ">="]
    return f"{requirement.name}=={bound.version}"


def try_environment(folder: Path, wheel: Path, versions: str, python: str, suite: bool) -> None:
    """Make the environment in `folder` unless it exists, use the wheel there, and run the suite if asked to.

    Raises `CalledProcessError` if a command fails."""
    interpreter = folder / "bin/python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    version = subprocess.check_output(
        [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    needed = requirements(wheel, version, "test" if suite else "")
    chosen = [lowest(one) if versions == "lowest" else f"{one.name}{one.specifier}" for one in needed]
    pip = [interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *chosen], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    subprocess.run([interpreter, "-m", "pip", "list", "--format=freeze"], check=True)
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "RESLT" not in name}
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([interpreter, "-c", TRIAL], cwd=work, env=outside, check=True)
    if suite:
        command = [interpreter, "-m", "pytest", "-n", "logical", "--dist", "loadfile"]
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        subprocess.run(command, cwd=PROJECT, env=os.environ | {"PATH": path, "PYTHONPATH": str(PROJECT)}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fresh_environment", description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="+", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--suite", action="store_true", help="run the whole fast suite too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environments in DIR and keep them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")  # setuptools leaves its build there, and would pack modules of an earlier one
        for name in ("reslt", "data_lists"):
            shutil.copytree(PROJECT / name, source / name)
        for name in ("pyproject.toml", "requirements.txt", "README.md"):
            shutil.copy(PROJECT / name, source)
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch, source], check=True)
        [wheel] = Path(scratch).glob("reslt-*.whl")
        for versions in args.versions:
            folder = (args.keep or Path(scratch)).resolve() / versions
            print(f"--- {wheel.name}, {versions} versions", flush=True)
            try_environment(folder, wheel, versions, args.python, args.suite)


if __name__ == "__main__":
    main()
