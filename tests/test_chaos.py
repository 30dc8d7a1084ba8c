"""The tool that kills and damages runs, on a small scale."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_runs_survive_kills_and_damage_and_leave_no_file_in_the_temporary_folder():
    """The folder's name is short: workers pass tensors through sockets, whose paths may have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        check_a_quick_run_in(Path(folder))


def check_a_quick_run_in(folder: Path) -> None:
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
