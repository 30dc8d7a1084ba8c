"""Processes that wait or differ, pipes and devices, and faults of the environment."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import TINY_FLAGS, make_dataset

from reslt.api import create_model, load_run
from reslt.config.yaml_files import read_yaml
from reslt.core.environment import explained
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.loading.workers import Workers
from reslt.models.fold import load_folded
from reslt.prepare import published
from reslt.prepare.from_table import from_csv
from reslt.runs.released import class_order, load_tensors
from reslt.runs.report import read_result
from tests.field.strangers import stranger_run

PROJECT = Path(__file__).resolve().parents[2]

# ---- Processes that wait, ranks that differ ----

TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
def test_processes_with_different_learning_rates_are_refused_before_training(tiny, tmp_path):
    script = tmp_path / "other.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(PROJECT)!r})
import train
sys.argv += ["--lr", "0.01", "--workers", "1"] if os.environ["RANK"] == "1" else []
train.main()
""")
    command = [*TWO, script, "--data", tiny, "--output", tmp_path / "out", *TINY_FLAGS]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
        "error: the processes of this run were started with different settings "
        "(lr: 0.05 in process 0, 0.01 in process 1); start all of them with the same ones"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "number", "code"), [(0, signal.SIGTERM, 143), (1, signal.SIGINT, 130)])
def test_a_process_that_waits_for_a_frozen_one_is_ended_by_a_signal(tiny, tmp_path, frozen, number, code):
    """It ends ten seconds after the signal, with a message. Python's own handlers never run during such a wait."""
    flags = ["--data", tiny, "--output", tmp_path, "--experiment", "run", *TINY_FLAGS, "--epochs", 100_000]
    with open(tmp_path / "log", "w") as log:
        command = [*map(str, [*TWO, "train.py", *flags])]
        launcher = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
    until = time.monotonic() + 60
    while not (tmp_path / "run/summary.csv").exists() and time.monotonic() < until:
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children()
    ranks = {int(child.environ()["RANK"]): child for child in started if "RANK" in child.environ()}
    try:
        ranks[frozen].send_signal(signal.SIGSTOP)
        time.sleep(1)
        ranks[1 - frozen].send_signal(number)
        begin = time.monotonic()
        while ranks[1 - frozen].is_running() and ranks[1 - frozen].status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - begin < 20
            time.sleep(0.05)
        assert 8 < time.monotonic() - begin < 15
    finally:
        ranks[frozen].kill()
        launcher.wait(40)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    messages = (tmp_path / "log").read_text()
    assert f"error: process {1 - frozen}: ended by {name} while waiting for " in messages
    assert f"exitcode  : {code}" in messages


# ---- Pipes, devices, and faults of the environment ----


def make_odd(place: Path, kind: str) -> None:
    """Replace a file by a pipe without a writer, or by a link to an endless device."""
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")


READERS = {  # file below a folder with a run and a dataset -> its reader
    "tiny/info.yaml": lambda f: read_yaml(f / "tiny/info.yaml"),
    "tiny/local.yaml": lambda f: read_yaml(f / "tiny/local.yaml"),
    "tiny/train.txt": lambda f: load_dataset(str(f / "tiny")),
    "tiny/bad_images.csv": lambda f: load_dataset(str(f / "tiny"), bad_images="skip"),
    "table.csv": lambda f: from_csv({"train": f / "table.csv"}, "a", ["b"]),
    "run/checkpoints/2-6/SHA256SUMS": lambda f: load_run(f / "run"),
    "run/checkpoints/2-6/state.json": lambda f: load_run(f / "run"),
    "run/checkpoints/2-6/model.safetensors": lambda f: load_run(f / "run"),
    "run/result.json": lambda f: read_result(f / "run"),
    "run/checkpoints/last": lambda f: load_run(f / "run"),
    "folded.safetensors": lambda f: load_folded(f / "folded.safetensors"),
    "order.txt": lambda f: class_order(f / "order.txt", 3),
    "released.pth.tar": lambda f: load_tensors(f / "released.pth.tar"),
    "weights.pth": lambda f: create_model("resnet18", 3, pretrained_file=str(f / "weights.pth")),
    "copies/a.txt": lambda f: published.prepare("toy", f / "copies"),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices_are_refused_before_they_are_opened(name, kind, tmp_path, project):
    make_dataset(tmp_path / "tiny")
    stranger_run(tmp_path / "run")
    toy = project / "data_lists/toy"
    toy.mkdir()
    lists = {"train": {"file": "a.txt", "lines": 1, "blob": "0" * 40}}
    (toy / "info.yaml").write_text(yaml.safe_dump({"published": {"source": "https://x", "lists": lists}}))
    make_odd(tmp_path / name, kind)
    opened = []

    def spy(event, arguments):
        if event == "open" and str(arguments[0]) == str(tmp_path / name):
            opened.append(arguments)

    watch_opening(spy)
    with pytest.raises(
        (UserError, OSError),
        match=r"it is a (pipe|device)|not a file but a folder, pipe or device|does not exist|there is no (file|checkpoint)",
    ):
        READERS[name](tmp_path)
    assert opened == []


_spies = []


def watch_opening(spy) -> None:
    """Call `spy` at every file opened from now on, instead of the previous spy. (Audit hooks cannot be removed.)"""
    if not _spies:
        sys.addaudithook(lambda event, arguments: event == "open" and _spies[-1](event, arguments))
    _spies[:] = [spy]


class TestEnvironment:
    """A fault of the machine is one message with a remedy; a possible bug keeps its traceback."""

    @pytest.mark.parametrize(
        ("fault", "remedy"),
        [
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lower --workers"),
            (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "lower --workers"),
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "--workers 0"),
            (
                RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left"),
                "--shm-size",
            ),
            (RuntimeError("unable to open shared memory object </torch_1_2>: Too many open files (24)"), "ulimit -n"),
            (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
            (OSError(errno.EMFILE, "Too many open files", "a.png"), "ulimit -n"),
            (RuntimeError("Could not determine home directory."), "RESLT_CACHE"),
            (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--grad-accum-steps"),
            (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "--workers"),
            (MemoryError(), "memory is used up"),
            (RuntimeError("can't start new thread"), "ulimit -u"),
            (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
            (OSError(errno.ENOSPC, "No space left on device"), "standard output"),
            (PermissionError(errno.EACCES, "Permission denied", "output"), "output: Permission denied"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_fault_of_the_machine_is_one_line_with_its_remedy(self, fault, remedy):
        message = explained(fault)
        assert remedy in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "fault",
        [
            RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
            RuntimeError("out of resource: shared memory, Required: 123"),  # of a compiled kernel
            ValueError("x"),
            MemoryError("killed"),
            OSError("no number"),
            OSError(errno.EIO, "Input/output error"),  # it names no file
        ],
        ids=str,
    )
    def test_any_other_error_keeps_its_traceback(self, fault):
        assert explained(fault) is None

    def printed(self, body: str, shell: str = "", **environment) -> subprocess.CompletedProcess:
        """Run a command with this body and return its exit code and output."""
        code = f"from reslt.core.command import entry_point\n@entry_point\ndef main():\n    {body}\nmain()"
        command = ["bash", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
        return subprocess.run(command, cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True)

    def test_characters_that_the_terminal_lacks_are_escaped(self):
        ended = self.printed("print('Käse 猫')", PYTHONIOENCODING="ascii")
        assert (ended.returncode, ended.stdout) == (0, "K\\xe4se \\u732b\n")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_results_that_cannot_be_printed_are_an_error_and_log_messages_a_warning(self):
        ended = self.printed("print('the table')", "> /dev/full")
        assert ended.returncode == 2
        assert (
            ended.stderr
            == "error: standard output, or another file, cannot be written: No space left on device; free some space\n"
        )
        log = "import reslt.core.log as log; log.logger.info('a'); log.logger.info('b')"
        ended = self.printed(log, "> /dev/full")
        assert ended.returncode == 0
        assert ended.stderr == "warning: standard output cannot be written: No space left on device\n"

    def test_a_closed_standard_stream_is_not_replaced_by_the_next_file(self):
        """Otherwise, the next file that is opened would receive the printed text."""
        body = "print('lost'); import os; number = os.open(os.devnull, os.O_RDONLY); os._exit(number)"
        ended = self.printed(body, "<&- >&- 2>&-")
        assert ended.returncode > 2

    def test_a_user_without_a_home_folder_is_asked_for_a_cache(self):
        ended = self.printed("raise RuntimeError('Could not determine home directory.')")
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: this user has no home folder: set RESLT_CACHE")

    @pytest.mark.parametrize("end", [lambda i: os.kill(os.getpid(), signal.SIGKILL), lambda i: lambda: i])
    def test_a_worker_that_is_killed_or_cannot_send_its_batch_is_an_error(self, end, capfd):
        """The second worker returns a function, which cannot be pickled, so the thread that sends it fails."""

        class Ends(torch.utils.data.Dataset):
            def __getitem__(self, i):
                return end(i)

        with pytest.raises(RuntimeError) as raised:
            list(Workers(Ends(), [[0], [1]], workers=1, collate=list))
        assert explained(raised.value).startswith("a worker that decodes images ended")
