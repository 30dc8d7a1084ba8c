"""The tool that kills and damages runs, in a quick version of itself."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_quick_version_survives_everything_and_leaves_nothing():
    """In a folder of a short name: workers hand tensors over through sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        survives_in(Path(folder))


def survives_in(folder: Path) -> None:
    environment = os.environ | {"TMPDIR": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--kills", "4", "--damages", "30"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^kills survived 4 of 4 at random moments", ended.stdout, re.M)
    assert re.search(r"^kills survived 4 of 4 at stages", ended.stdout, re.M)
    assert re.search(r"^damaged checkpoints refused 30 of 30, loaded 0$", ended.stdout, re.M)
    equal, runs = map(int, re.search(r"^runs ended bit-equal (\d+) of (\d+)$", ended.stdout, re.M).groups())
    assert equal == runs > 8
    assert "faults 0" in ended.stdout
    assert list(folder.iterdir()) == []
