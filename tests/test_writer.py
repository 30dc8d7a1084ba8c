"""The thread that writes files while a run continues, and the phases of a run."""

import json
import threading

import pytest

from reslt.config.resolve import resolve
from reslt.core.errors import UserError
from reslt.core.phases import BOOKKEEPING, STEP, WAITING, Phases
from reslt.core.turns import Turns, own_turn
from reslt.runs.profile import require_place_of_trace
from reslt.runs.writer import Writer


def test_jobs_run_in_order_while_the_caller_continues():
    may_begin, done = threading.Event(), []
    with Writer() as writer:
        writer.submit(lambda: (may_begin.wait(10), done.append(1)))
        writer.submit(lambda: done.append(2))
        assert done == []
        may_begin.set()
        writer.finish()
        assert done == [1, 2]
        writer.submit(lambda: done.append(3))
    assert done == [1, 2, 3]


def test_after_a_job_that_fails_no_other_runs_until_its_error_is_raised():
    done = []
    with Writer() as writer:
        writer.submit(lambda: 1 / 0)
        writer.submit(lambda: done.append(2))
        with pytest.raises(ZeroDivisionError):
            writer.finish()
        assert (done, writer.has_failed) == ([], False)
        writer.submit(lambda: done.append(3))
        writer.finish()
    assert done == [3]


def test_a_job_belongs_to_the_run_that_submits_it():
    turns = []
    with Turns().taking_part() as turn, Writer() as writer:
        writer.submit(lambda: turns.append(own_turn()))
        writer.finish()
    assert turns == [turn]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def profiled():
    """Phases of 2 s of imports and two epochs. The first has 1 s of waiting, 3 s of steps interrupted by 0.5 s for a
    checkpoint, and 1 s of bookkeeping; the second has 2 s of waiting, 2 s of steps and 1 s of bookkeeping."""
    clock = Clock()
    phases = Phases(is_of_process=False, keeps_spans=True, clock=clock)
    for phase, seconds in (("imports", 2.0), (WAITING, 1.0), (STEP, 2.5)):
        phases.begin(phase)
        clock.now += seconds
    with phases.within("checkpoint"):
        clock.now += 0.5
    clock.now += 0.5
    phases.begin(BOOKKEEPING)
    clock.now += 1
    phases.end_epoch()
    for phase, seconds in ((WAITING, 2.0), (STEP, 2.0), (BOOKKEEPING, 1.0)):
        phases.begin(phase)
        clock.now += seconds
    phases.end_epoch()
    return phases


def test_phases_add_up_to_the_wall_time(profiled):
    """The sum is 12.5 s. The milliseconds per epoch are those of the second epoch, since the first is not counted."""
    rows = {line.split()[0]: line.split()[1:] for line in profiled.table().splitlines()[1:]}
    assert rows == {
        "imports": ["2.00", "16.0%"],
        "waiting": ["3.00", "24.0%", "2,000.0"],
        "step": ["5.00", "40.0%", "2,000.0"],
        "checkpoint": ["0.50", "4.0%", "0.0"],
        "bookkeeping": ["2.00", "16.0%", "1,000.0"],
        "sum": ["12.50", "100.0%"],
    }


def test_a_trace_contains_the_work_of_other_threads(profiled):
    profiled.add("writer", "checkpoint", 6.0, 7.5)
    events = json.loads(profiled.trace())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(names[e["tid"]], e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    assert spans[:4] == [
        ("run", "imports", 0, 2),
        ("run", "waiting", 2, 1),
        ("run", "step", 3, 2.5),
        ("run", "checkpoint", 5.5, 0.5),
    ]
    assert spans[-1] == ("writer", "checkpoint", 6, 1.5)


def test_the_phases_of_a_process_begin_before_its_first_import():
    assert Phases().began < Phases(is_of_process=False).began - 0.05  # pytest has taken longer to get here


def test_a_path_that_no_trace_can_be_written_to_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    require_place_of_trace(str(tmp_path / "new" / "trace.json"))
    require_place_of_trace(str(tmp_path / "file"))
    with pytest.raises(UserError, match="it is a folder; give a file"):
        require_place_of_trace(str(tmp_path))
    with pytest.raises(UserError, match=r"/file is not a folder that can be written to"):
        require_place_of_trace(str(tmp_path / "file" / "trace.json"))


def test_no_recipe_can_choose_a_file_for_the_trace_to_replace(tmp_path):
    (tmp_path / "r.yaml").write_text("profile_trace: precious.txt\n")
    with pytest.raises(UserError, match=r"profile_trace: a file cannot set it; .* flag, --profile-trace"):
        resolve(["--recipe", str(tmp_path / "r.yaml")])
