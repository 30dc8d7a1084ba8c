"""`reproduce --launcher slurm`: the jobs that are submitted, submitted again, and found by a later command."""

import json
import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from reproducing import accuracies, pretend, started, wait_until, write_recipe

from reslt.core.errors import UserError
from reslt.core.locks import is_locked
from reslt.reproduce import slurm
from reslt.reproduce.first_stage import share_first_stages
from reslt.reproduce.rows import of_recipes
from reslt.reproduce.schedule import Trainings
from reslt.reproduce.table_state import TableState


class Job:
    """A job of the stand-in for a cluster; it ends when its state is queried for the second time."""

    def __init__(self, cluster, number, folder):
        self.cluster, self.job_id, self.queries, self.folder = cluster, number, 0, Path(folder)
        self.paths = SimpleNamespace(result_pickle=self.folder / f"{number}.pkl", stderr=self.folder / f"{number}.err")
        self.watcher = SimpleNamespace(get_state=lambda id, mode: self.cluster.states.get(self.job_id, "RUNNING"))

    def done(self):
        self.queries += 1
        if self.queries == 2 and self.job_id not in self.cluster.states:
            self.cluster.end(self.job_id)
        return self.cluster.states.get(self.job_id, "RUNNING") not in ("RUNNING", "PREEMPTED")

    @property
    def state(self):
        return self.cluster.states[self.job_id]

    def result(self):
        return self.cluster.results[self.job_id]

    def cancel(self, check):
        self.cluster.canceled.append(self.job_id)


class Cluster:
    """A stand-in for submitit's executor. `scripts` maps an experiment to its ends, one per job: "done", a checkpoint's
    name (stopped with that checkpoint), a state of SLURM, or a message (failed). `most` is the cluster's limit of jobs."""

    def __init__(self, folder: Path, scripts: dict[str, list[str]], most: int = 99):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.scripts, self.most, self.at_once = folder, scripts, most, 0
        self.submitted, self.states, self.results, self.works, self.canceled = [], {}, {}, {}, []
        self.job_class = lambda folder, number: Job(self, number, folder)

    def submit(self, function, works):
        from submitit.core.utils import FailedJobError

        assert function is slurm.train_in_job
        running = len(self.works) - len(self.states)
        if running >= self.most:
            raise FailedJobError("sbatch: error:  QOSMaxSubmitJobPerUserLimit")
        number = str(len(self.works) + 1)
        self.works[number] = works
        self.submitted.append([Path(log).stem for _, log in works])
        self.at_once = max(self.at_once, running + 1)
        return Job(self, number, self.folder)

    def end(self, number):
        self.states[number], self.results[number] = "COMPLETED", {}
        for arguments, log in self.works[number]:
            how = self.scripts.get(Path(log).stem, ["done"])
            how = how.pop(0) if len(how) > 1 else how[0]
            flags = dict(zip(arguments[::2], arguments[1::2], strict=False))
            run = Path(flags["--output"]) / flags["--experiment"]
            if how.isupper():
                self.states[number] = how
                return
            if how == "done":
                shutil.rmtree(run, ignore_errors=True)
                pretend(flags["--recipe"], int(flags["--seed"]), run.parent, accuracies(1, 2, 3, 40))
            elif re.fullmatch(r"\d+-\d+", how):
                (run / "checkpoints").mkdir(parents=True, exist_ok=True)
                (run / "checkpoints/last").write_text(f"{how}\n")
            stopped = (128 + signal.SIGUSR1, "stopped by SIGUSR1")
            self.results[number][log] = (0, None) if how == "done" else stopped if how[0].isdigit() else (2, how)
        (self.folder / f"{number}.pkl").touch()


@pytest.fixture
def table(tiny, tmp_path):
    """table('a', 'b', seeds=2) -> TableState of these recipes."""

    def create(*names, seeds=1, method="ce"):
        recipes = [write_recipe(tmp_path / f"{name}.yaml", tiny, method="ce") for name in names]
        for file in recipes:
            file.write_text(file.read_text().replace("method: ce", f"method: {method}"))
        rows, _ = of_recipes(list(map(str, recipes))).rows(list(range(seeds)), str(tmp_path / "out"), [], {})
        return TableState("recipes", rows, tmp_path / "table")

    return create


def train(state: TableState, cluster: Cluster, jobs: int = 9, streams: int = 1, launcher="slurm") -> dict[str, str]:
    """Train the runs that remain -> {experiment: "40.0", or its error}."""
    launcher = slurm.Jobs(launcher, cluster, jobs, state.folder / "logs", streams)
    launcher.poll_seconds = 0
    ended, to_do = {}, state.to_do

    def finished(run, progress):
        ended[run.config.run.experiment] = progress.fault or str(progress.result.last["all"])

    Trainings(launcher, 0, len(to_do)).train(to_do, finished)
    return ended


def names_of(state: TableState) -> list[str]:
    return [run.config.run.experiment for run in state.to_do]


def records(output: Path) -> dict[str, str]:
    return {file.stem: json.loads(file.read_text())["job"] for file in output.glob("reproduce/jobs/*.json")}


class TestJobs:
    def test_jobs_limits_the_jobs_in_the_queue_and_streams_the_runs_of_each(self, table, tmp_path, capsys):
        """With two jobs of two runs at once, the fifth run is submitted alone after the first two have ended."""
        state = table("a", seeds=5)
        a, b, c, d, e = names_of(state)
        cluster = Cluster(tmp_path / "jobs", {})
        assert train(state, cluster, jobs=2, streams=2) == dict.fromkeys((a, b, c, d, e), "40.0")
        assert cluster.submitted == [[a, b], [c, d], [e]]
        assert cluster.at_once == 2
        out = capsys.readouterr().out
        assert f"[5/5] {tmp_path}/a.yaml seed 4: submitted, job 3, log: {tmp_path}/table/logs/{e}.log\n" in out
        assert f"[5/5] {tmp_path}/a.yaml seed 4: 40.0 at the last epoch" in out
        assert records(tmp_path / "out") == {}

    def test_few_runs_are_spread_over_the_jobs(self, table, tmp_path):
        state = table("a", seeds=4)
        cluster = Cluster(tmp_path / "jobs", {})
        train(state, cluster, jobs=2, streams=9)
        assert list(map(len, cluster.submitted)) == [2, 2]

    def test_a_first_stage_ends_before_the_runs_that_start_from_it_are_submitted(self, table, tmp_path):
        state = table("a", method="crt")
        state = TableState("recipes", share_first_stages(state.rows, str(tmp_path / "out"), []), state.folder)
        first, second = names_of(state)
        assert "first_stage" in first
        cluster = Cluster(tmp_path / "jobs", {first: ["error of the first"]})
        ended = train(state, cluster)
        assert ended[first] == f"error of the first, log: {tmp_path}/table/logs/{first}.log"
        assert ended[second] == f"the run that it starts from, {first}, has no result"
        assert cluster.submitted == [[first]]

    def test_a_run_that_a_time_limit_stops_is_submitted_again_as_long_as_it_progresses(self, table, tmp_path, capsys):
        """The second run leaves the same checkpoint twice."""
        state = table("a", seeds=2)
        a, b = names_of(state)
        cluster = Cluster(tmp_path / "jobs", {a: ["1-3", "1-5", "done"], b: ["1-2", "1-2"]})
        ended = train(state, cluster)
        assert ended[a] == "40.0"
        assert ended[b].startswith("stopped by SIGUSR1 without a new checkpoint, log: ")
        assert sorted(cluster.submitted) == [[a], [a], [a], [b], [b]]
        assert capsys.readouterr().out.count("seed 0: to be continued: stopped by SIGUSR1\n") == 2

    @pytest.mark.parametrize(("state_of_job", "times"), [("PREEMPTED", 2), ("NODE_FAIL", 2), ("CANCELLED", 1)])
    def test_a_job_that_the_cluster_ended_is_submitted_again_unless_it_was_canceled(
        self, table, tmp_path, state_of_job, times
    ):
        """The job's process could not report anything. SLURM might restart a preempted job by itself, so that job is
        canceled first."""
        state = table("a")
        (name,) = names_of(state)
        cluster = Cluster(tmp_path / "jobs", {name: [state_of_job, "done"]})
        at_end = cluster.end

        def end(number):
            (tmp_path / "out" / name / "checkpoints").mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name / "checkpoints/last").write_text(f"1-{number}\n")
            (cluster.folder / "1.err").write_text("slurmstepd: error: *** JOB 1 ON n1 ***\n")
            at_end(number)

        cluster.end = end
        (ended,) = train(state, cluster).values()
        assert len(cluster.submitted) == times
        assert cluster.canceled == (["1"] if state_of_job == "PREEMPTED" else [])
        if state_of_job == "CANCELLED":
            assert ended.startswith(
                f"job 1 has ended, CANCELLED: slurmstepd: error: *** JOB 1 ON n1 ***, {cluster.folder}"
            )

    def test_a_run_that_fails_does_not_end_the_others(self, table, tmp_path):
        """All three runs share a job."""
        state = table("a", seeds=3)
        a, b, c = names_of(state)
        ended = train(state, Cluster(tmp_path / "jobs", {b: ["no such model"]}), streams=3)
        assert ended == {a: "40.0", b: f"no such model, log: {tmp_path}/table/logs/{b}.log", c: "40.0"}

    def test_a_job_beyond_the_clusters_limit_waits_for_others_to_end(self, table, tmp_path):
        state = table("a", seeds=3)
        cluster = Cluster(tmp_path / "jobs", {}, most=1)
        assert set(train(state, cluster).values()) == {"40.0"}
        assert len(cluster.submitted) == 3
        with pytest.raises(
            UserError, match=r"rejects the job: sbatch: error: QOSMax\w+; adapt the settings of --slurm"
        ):
            train(table("b"), Cluster(tmp_path / "jobs2", {}, most=0))

    def test_after_an_interruption_the_jobs_continue_and_nothing_is_submitted_twice(self, table, tmp_path, capsys):
        """Ctrl-C arrives when two of three runs are submitted, before any job ends. Then a command for another table with
        one of these runs follows, and then the same command again."""
        cluster, state = Cluster(tmp_path / "jobs", {}), table("a", seeds=3)
        a, b, c = names_of(state)
        at_submit = cluster.submit

        def submit(function, works):
            if len(cluster.works) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return at_submit(function, works)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        cluster.submit = submit
        try:
            with pytest.raises(KeyboardInterrupt):
                train(state, cluster, jobs=2)
        finally:
            signal.signal(signal.SIGINT, before)
        assert (
            "the jobs continue; the same command finds them again, and `scancel 1 2` ends them"
            in capsys.readouterr().err
        )
        assert records(tmp_path / "out") == {a: "1", b: "2"}
        assert train(table("a", seeds=1), cluster) == {a: "40.0"}
        assert "seed 0: job 1 of an earlier call, log: " in capsys.readouterr().out
        assert records(tmp_path / "out") == {b: "2"}
        assert train(table("a", seeds=3), cluster, jobs=1) == {b: "40.0", c: "40.0"}
        assert cluster.submitted == [[a], [b], [c]]

    def test_a_job_that_failed_while_no_command_ran_is_submitted_again(self, table, tmp_path):
        state = table("a")
        (name,) = names_of(state)
        cluster = Cluster(tmp_path / "jobs", {name: ["out of memory", "done"]})
        slurm.Jobs("slurm", cluster, 1, state.folder / "logs").start(state.to_do)
        cluster.end("1")
        assert records(tmp_path / "out") == {name: "1"}
        assert train(state, cluster) == {name: "40.0"}
        assert cluster.submitted == [[name], [name]]


class TestInAJob:
    """`train_in_job`, with a stand-in for the process of a run."""

    @pytest.fixture
    def process(self, monkeypatch):
        """process(signal) -> the signals that the run receives; it ends at the first. `signal` is sent to this process."""
        numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}
        received = []

        def arrange(number):
            class Process:
                def __init__(self, arguments, log, variables):
                    self.process = SimpleNamespace(send_signal=received.append)

                def code_of(self, log):
                    if number and not received:
                        os.kill(os.getpid(), number)
                        return None
                    return 128 + received[0] if received else 2

            monkeypatch.setattr(slurm, "Process", Process)
            monkeypatch.setattr(slurm, "LOOK_SECONDS", 0)
            return received

        yield arrange
        for number in numbers:
            signal.signal(number, before[number])

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
    def test_the_warning_before_the_time_limit_reaches_the_run(self, tmp_path, process, number):
        received, log = process(number), tmp_path / "logs/a.log"
        found = slurm.train_in_job([(["--seed", "1"], str(log))])
        assert received == [signal.SIGUSR1]
        assert found[str(log)][0] == 138
        assert re.fullmatch(r"\$ \S+ \S+train.py --seed 1\n", log.read_text())

    def test_a_preempted_job_has_no_result(self, tmp_path, process):
        received = process(signal.SIGTERM)
        with pytest.raises(SystemExit):
            slurm.train_in_job([([], str(tmp_path / "a.log"))])
        assert received == [signal.SIGTERM]

    def test_a_run_that_fails_without_a_message_reports_its_exit_code(self, tmp_path, process):
        process(None)
        log = str(tmp_path / "a.log")
        code, reason = slurm.train_in_job([([], log)])[log]
        assert (code, reason) == (2, "exit code 2")


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--slurm", "partition=x"],
                "--slurm partition=x: it sets up the jobs of --launcher slurm; add that, or drop it",
            ),
            (
                ["--launcher", "slurm", "--slurm", "partitoin=x"],
                r"'partitoin' is not a setting \(did you mean partition\?\)",
            ),
            (["--launcher", "slurm", "--slurm", "partition"], "give a value, partition=VALUE"),
            (["--launcher", "slurm", "--slurm", "cpus-per-task=x"], "'x' is not a whole number"),
            (["--launcher", "slurm", "--slurm", "gpus_per_node=-1"], "'-1' is not a whole number from 0"),
            (["--launcher", "slurm", "--slurm", "mem_gb=nan"], "'nan' is not a number above 0"),
            (["--launcher", "slurm", "--slurm", "time=1h"], r"'1h' is not minutes, or \[D-\]HH:MM:SS"),
            (
                ["--launcher", "slurm"],
                "there is no sbatch, srun, sacct, scancel on this machine; start the command on a login",
            ),
        ],
    )
    def test_a_mistake_is_reported_before_anything_is_submitted(self, tiny, reproduce, tmp_path, arguments, message):
        recipe = write_recipe(tmp_path / "a.yaml", tiny)
        refused = reproduce("--recipes", recipe, "--output", tmp_path / "out", *arguments)
        assert refused.code == 2
        assert re.search(message, refused.err)
        assert not (tmp_path / "out").exists()

    def test_without_submitit_the_error_names_it(self, monkeypatch):
        monkeypatch.setattr(slurm, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="needs the package submitit; install it with: pip install submitit"):
            slurm.check_launcher("slurm")

    def test_settings_reach_the_file_that_sbatch_reads(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
        given = ["partition=gpu", "time=1-02:30:01", "mem-gb=1.5", "reservation=r", "setup=module load cuda"]
        executor = slurm.create_executor("slurm", tmp_path, slurm.parse_settings(given))
        lines = executor._make_submission_file_text("python -m x", "0").splitlines()
        options = {line for line in lines if line.startswith("#SBATCH")}
        assert options >= {
            f"#SBATCH --{option}"
            for option in (
                "partition=gpu", "time=1591", "mem=1536MB", "reservation=r", "gpus-per-node=1", "cpus-per-task=8",
                "signal=USR1@120", "job-name=reslt",
            )
        }  # fmt: skip
        assert lines.index("module load cuda") < next(k for k, line in enumerate(lines) if line.startswith("srun"))
        for given in ({"gres": "gpu:a100:1"}, {"gpus_per_node": 0}):
            assert "gpus_per_node" not in slurm.create_executor("slurm", tmp_path, given).parameters
            assert slurm.describe_jobs(given).endswith(f"{'gres=gpu:a100:1, ' * ('gres' in given)}cpus_per_task=8")


COMMANDS = {
    "sbatch": """\
id=$(($(ls "$SLURM_STAND_IN" | grep -c state) + 1)); state=$SLURM_STAND_IN/$id.state; echo RUNNING > $state
export SLURM_JOB_ID=$id SLURM_CPUS_PER_TASK=1
setsid bash -c "echo \\$\\$ > $SLURM_STAND_IN/$id.pid; bash '$1' && echo COMPLETED > $state || echo FAILED > $state" \
    < /dev/null > /dev/null 2>&1 &
echo Submitted batch job $id""",
    "srun": """\
while [[ $1 == --* ]]; do
    case $1 in --output) out=$2; shift 2;; --error) err=$2; shift 2;; *) shift;; esac
done
fill() { local name=${1//%j/$SLURM_JOB_ID}; echo "${name//%t/0}"; }
exec "$@" >> "$(fill "$out")" 2>> "$(fill "$err")\"""",
    "sacct": """\
echo 'JobID|State|NodeList'
for id in "$@"; do [ -f "$SLURM_STAND_IN/$id.state" ] && echo "$id|$(cat "$SLURM_STAND_IN/$id.state")|n1"; done; true""",
    "scancel": """\
for id in "$@"; do kill -- -$(cat "$SLURM_STAND_IN/$id.pid"); done""",
}


@pytest.fixture
def slurm_commands(tmp_path, monkeypatch) -> Path:
    """The folder with the states and processes of jobs that stand-ins for SLURM's commands start at once, on this
    machine."""
    folder = tmp_path / "slurm"
    for name, content in COMMANDS.items():
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    return folder


def processes_of(job: str, folder: Path) -> tuple[psutil.Process, psutil.Process]:
    """Wait for the process of submitit in a job and for its child, which trains; return both."""
    found = []

    def have_started() -> bool:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ() if "submitit.core._submit" in process.cmdline() else {}
                numbers = variables.get("SLURM_JOB_ID"), variables.get("SUBMITIT_LOCAL_JOB_ID")
                if str(folder) in process.cmdline() and job in numbers:
                    found.extend((process, child) for child in process.children() if "--recipe" in child.cmdline())
        return bool(found)

    wait_until(have_started)
    return found[0]


def pending(process: int) -> list[int]:
    """Return the signals that are pending for a process."""
    (line,) = [text for text in Path(f"/proc/{process}/status").read_text().splitlines() if text.startswith("ShdPnd")]
    return [number for number in range(1, 32) if int(line.split()[1], 16) >> (number - 1) & 1]


@pytest.mark.slow
class TestWithProcesses:
    """The command, submitit, and jobs that train one run or several at once."""

    @pytest.fixture(scope="class")
    def recipes_and_table(self, tmp_path_factory):
        """(flags, table.csv, table.md without its device) of three runs trained by `--launcher local`; the last run starts
        from the first."""
        folder = tmp_path_factory.mktemp("local")
        flags = []
        for name, method, epochs in (("a", "ce", 12), ("b", "reslt", 2), ("c", "crt", 12)):
            recipe = write_recipe(folder / f"{name}.yaml", "digits_lt", method="ce", epochs=epochs, eval_every=6)
            recipe.write_text(recipe.read_text().replace("method: ce", f"method: {method}"))
            flags.append(recipe)
        flags = ["--recipes", *flags, "--seeds", 0, "--limit-train", 64, "--batch-size", 32, "--checkpoint-seconds", 0]
        command = started(*flags, "--output", folder / "out")
        printed, errors = command.communicate()
        assert command.returncode == 0, printed + errors
        return flags, *self.table(folder / "out")

    def table(self, output: Path) -> tuple[str, list[str]]:
        folder = output / "reproduce/recipes"
        lines = (folder / "table.md").read_text().splitlines()
        return (folder / "table.csv").read_text(), [line for line in lines if "device of the last call" not in line]

    @pytest.mark.parametrize(("launcher", "streams"), [("slurm", 1), ("submitit-local", 2)])
    def test_a_command_that_is_killed_and_repeated_makes_the_same_table(
        self, recipes_and_table, tmp_path, slurm_commands, launcher, streams
    ):
        """The command is killed when a job has a checkpoint. When it is repeated, it finds the job, which then receives the
        warning before a time limit, and submits another job, which resumes the run."""
        flags, *table = recipes_and_table
        recipe, out = flags[1], tmp_path / "out"
        flags = [*flags, "--output", out, "--launcher", launcher, "--jobs", 2, "--streams", streams]
        run = out / f"{'-'.join(recipe.with_suffix('').parts[1:])}-seed0"
        command = started(*flags)
        wait_until(lambda: run.name in records(out) or command.poll() is not None)
        number = records(out)[run.name]
        job, training = processes_of(number, out / "reproduce/recipes/logs/jobs")
        wait_until(lambda: (run / "checkpoints/last").exists() or command.poll() is not None)
        training.suspend()  # until the command has started again, which takes seconds
        command.kill()
        command.wait()  # a local job may share the command's output until it ends
        assert is_locked(run)
        command, printed = started(*flags), ""
        while f"job {number} of an earlier call" not in printed:
            printed += command.stdout.readline()
            assert command.poll() is None
        job.send_signal(signal.SIGUSR2 if launcher == "submitit-local" else signal.SIGUSR1)
        wait_until(lambda: signal.SIGUSR1 in pending(training.pid))
        training.resume()
        more, errors = command.communicate(timeout=300)
        assert command.returncode == 0, printed + more + errors
        assert f"{recipe} seed 0: to be continued: stopped by SIGUSR1 in epoch" in more
        assert self.table(out) == tuple(table)
        assert run.name not in records(out)
        assert ("device of the last call: SLURM, gpus_per_node=1, cpus_per_task=8" in more) == (launcher == "slurm")
