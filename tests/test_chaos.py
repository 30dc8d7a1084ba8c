"""The tool that kills and damages runs: it notices what it looks for, so its figures are not empty."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from reslt.runs import checkpoint
from reslt.runs import folder as run_folder
from tests.chaos.damage import DAMAGES, damage, linked, refused
from tests.chaos.ground import FLAGS, Ground, differences, left_behind
from tests.chaos.kills import Stages
from tests.chaos.trial import Trial, fork, kill, launch

PROJECT = Path(__file__).resolve().parents[1]
SUMMARY = "epoch,lr,train_loss,images_per_second,waiting,val_all\n1,0.1,2.5,{},0.1,30.0\n"


def make_checkpoint(folder: Path) -> Path:
    """Files of a checkpoint's names with digits of their own; not one that loads."""
    folder.mkdir(parents=True)
    for i, part in enumerate(("model", "ema", "optimizer")):
        (folder / f"{part}.safetensors").write_bytes(random.Random(i).randbytes(300))
    (folder / "state.json").write_text('{"progress": {"epoch": 0, "steps": 17, "loss_sums": [41.5], "seconds": 1.5}}')
    (folder / "SHA256SUMS").write_text("".join(f"{i:064x}  {p.name}\n" for i, p in enumerate(folder.iterdir())))
    return folder


def make_run(run: Path, speed: float = 100.0) -> Path:
    """A finished run with one checkpoint."""
    make_checkpoint(run / "checkpoints" / "1-17")
    for pointer in ("last", "best"):
        (run / "checkpoints" / pointer).write_text("1-17\n")
    (run / "summary.csv").write_text(SUMMARY.format(speed))
    (run / "per_class.csv").write_text("class,accuracy\n0,50.0\n")
    (run / "result.json").write_text("{}")
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class TestComparison:
    def test_runs_that_differ_in_their_speed_alone_are_equal(self, tmp_path):
        a, b = make_run(tmp_path / "a", speed=100.0), make_run(tmp_path / "b", speed=7.0)
        assert differences(a, b) == []

    @pytest.mark.parametrize(
        ("file", "named"),
        [
            ("checkpoints/1-17/model.safetensors", "last model.safetensors"),
            ("checkpoints/1-17/ema.safetensors", "last ema.safetensors"),
            ("checkpoints/1-17/optimizer.safetensors", "best optimizer.safetensors"),
            ("per_class.csv", "per_class.csv"),
            ("result.json", "result.json"),
        ],
    )
    def test_a_single_changed_byte_is_noticed(self, tmp_path, file, named):
        a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
        changed = bytearray((b / file).read_bytes())
        changed[-1] ^= 1
        (b / file).write_bytes(bytes(changed))
        assert named in differences(b, a)

    def test_a_changed_loss_in_the_summary_is_noticed(self, tmp_path):
        a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
        (b / "summary.csv").write_text(SUMMARY.format(100.0).replace("2.5", "2.50000000001"))
        assert differences(b, a) == ["summary.csv"]

    def test_another_best_checkpoint_and_a_missing_file_are_noticed(self, tmp_path):
        a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
        (b / "checkpoints" / "best").unlink()
        assert "best" in differences(b, a)
        (b / "result.json").unlink()
        assert differences(b, a)[0].startswith("unfinished: ")

    def test_half_written_files_and_checkpoints_that_nobody_keeps_are_noticed(self, tmp_path):
        run = make_run(tmp_path / "run")
        assert left_behind(run) == []
        (run / "checkpoints" / ".77.last").write_text("1-17\n")
        for number in (18, 19, 20):
            make_checkpoint(run / "checkpoints" / f"1-{number}")
        assert left_behind(run) == [".77.last", "checkpoints 1-20 1-19 1-18 1-17"]


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGES)
    def test_damage_always_changes_a_file_and_leaves_a_linked_copy_alone(self, tmp_path, kind):
        folder = make_checkpoint(tmp_path / "1-17")
        before = content(folder)
        for seed in range(50):
            copy = linked(folder, tmp_path / f"copy {seed}")
            damage(copy, kind, random.Random(seed))
            assert content(copy) != before
        assert content(folder) == before

    def test_a_damaged_checkpoint_that_loads_is_a_fault(self, tmp_path, monkeypatch):
        """With a `load` that checks nothing, the figures must say so."""
        ground = Ground(tmp_path, tuple(FLAGS), make_run(tmp_path / "reference"))
        monkeypatch.setattr(checkpoint, "load", lambda folder: checkpoint.Checkpoint(folder, {}))
        findings = refused(ground, seed=0)
        assert findings.counts["damages loaded"] == 1
        assert findings.counts["damages refused"] == 0
        assert "loads" in findings.faults[0]


class TestProcesses:
    def test_a_kill_counts_only_where_the_process_was_alive(self, tmp_path):
        alive = launch(["-c", "import time; time.sleep(60)"], tmp_path / "log")
        assert kill(alive)
        over = launch(["-c", "pass"], tmp_path / "log")
        over.wait()
        assert not kill(over)

    def test_a_kill_takes_the_whole_group(self, tmp_path):
        code = "import os, time; print(os.fork(), flush=True); time.sleep(60)"
        process = launch(["-c", code], tmp_path / "log")
        while len((tmp_path / "log").read_text().split()) < 2:
            time.sleep(0.01)
        kill(process)
        child = max(map(int, (tmp_path / "log").read_text().split()))
        for _ in range(200):  # until whoever adopts orphans has taken notice
            if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
                return
            time.sleep(0.01)
        pytest.fail("the child lives on")

    def test_a_fork_gives_its_exit_code_and_its_output(self, tmp_path):
        def main():
            print(*sys.argv[1:])
            sys.exit(3)

        assert fork(main, ["a", "b"], tmp_path / "log").wait(60) == 3
        assert (tmp_path / "log").read_text() == "a b\n"

    def test_a_process_that_fails_is_a_fault_with_its_log(self, tmp_path):
        ground = Ground(tmp_path, (), make_run(tmp_path / "reference"))
        with Trial(ground, "some kind", seed=5) as trial:
            trial.messages.append("SIGKILL 0.5 s in")
            process = fork(lambda: print(1 / 0), [], trial.log)
            assert not trial.has_ended_well(process)
        (fault,) = trial.findings.faults
        assert "some kind (seed 5): exit code 1" in fault
        assert "SIGKILL 0.5 s in" in fault
        assert "ZeroDivisionError" in fault

    def test_an_end_with_a_traceback_is_not_reported_plainly(self, tmp_path):
        ground = Ground(tmp_path, (), tmp_path)
        with Trial(ground, "", 0) as trial:
            trial.log.write_text("error: run: no space\n")
            assert trial.is_reported_plainly(2)
            assert not trial.is_reported_plainly(1)
            trial.log.write_text("Traceback (most recent call last):\nerror: run: no space\n")
            assert not trial.is_reported_plainly(2)


class TestStages:
    def run_with(self, tmp_path, kind: str, fatal: int | None) -> tuple[int, list[str], Path]:
        """Save twice in a forked child whose writing is counted -> exit code, record, the saved file."""
        record, written = tmp_path / "record", tmp_path / "run" / "state.json"

        class Done:
            steps, epoch = 1, 0

        def save(run, state, settings, accelerator, progress, steps_per_epoch, lists, num_classes, keep):
            written.parent.mkdir(exist_ok=True)
            written.write_text("0123456789")

        def main():
            run_folder.save = save
            Stages(kind, fatal, record).install()
            for _ in range(2):
                run_folder.save(tmp_path, None, None, None, Done, 9, {}, 3, 2)
            written.with_name("elsewhere").write_text("not while a checkpoint is written")

        code = fork(main, [], tmp_path / "log").wait(60)
        return code, record.read_text().splitlines() if record.exists() else [], written

    def test_stages_are_counted_while_the_wished_checkpoint_is_written(self, tmp_path):
        code, stages, _ = self.run_with(tmp_path, "written again", None)
        assert code == 0, (tmp_path / "log").read_text()
        assert stages == ["mkdir run", "write_text state.json", "half of write_text state.json"]

    def test_the_process_dies_at_the_stage_with_half_of_the_bytes(self, tmp_path):
        code, stages, written = self.run_with(tmp_path, "written again", 3)
        assert code == -signal.SIGKILL
        assert stages == ["killed before half of write_text state.json"]
        assert written.read_text() == "01234"

    def test_a_stage_that_is_not_reached_kills_nothing(self, tmp_path):
        assert self.run_with(tmp_path, "written again", 4)[:2] == (0, [])


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
