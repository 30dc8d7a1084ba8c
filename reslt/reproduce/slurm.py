"""Runs as jobs of a SLURM cluster, submitted through submitit; the jobs do not need this process. Loads no torch: a job
imports this file too."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from reslt.core.errors import UserError
from reslt.core.files import read_json, write_atomically
from reslt.core.log import logger
from reslt.core.spelling import did_you_mean
from reslt.reproduce.jobs import Ended, Group, Process, begin_log, environment, reason_of
from reslt.reproduce.rows import Run

LAUNCHERS = ("slurm", "submitit-local")
NEEDED = ("sbatch", "srun", "sacct", "scancel")
LOOK_SECONDS = 0.5  # in a job, between two looks for the end of its runs
PATIENCE_SECONDS = 60.0  # until a file that another machine has written is seen on a network disk
STOPPED_STATES = ("PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "STOPPED")  # the last: submitit-local


def _minutes(text: str) -> int:
    """90, 1:30:00 or 2-00:00:00 -> minutes, rounded up. Raises ValueError."""
    if text.isdecimal():
        return int(text)
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not found:
        raise ValueError
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def _count(text: str) -> int:
    """Return a whole number from 0. Raises ValueError."""
    if not text.isdecimal():
        raise ValueError
    return int(text)


def _gigabytes(text: str) -> float:
    """Return a number above 0. Raises ValueError."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


# Settings of a job under submitit's names, most of which are sbatch's
SETTINGS: dict[str, Callable[[str], object]] = {
    "timeout_min": _minutes, "time": _minutes, "gpus_per_node": _count, "gpus_per_task": _count, "cpus_per_task": _count,
    "cpus_per_gpu": _count, "mem_gb": _gigabytes, "mem": str, "mem_per_gpu": str, "mem_per_cpu": str, "partition": str,
    "account": str, "qos": str, "constraint": str, "gres": str, "exclude": str, "nodelist": str, "reservation": str,
    "comment": str, "wckey": str, "mail_type": str, "mail_user": str, "signal_delay_s": _count, "name": str,
    "setup": lambda command: [command],
}  # fmt: skip
NAMES = {"timeout_min": "time", "mem_gb": "mem", "name": "job_name"}  # of submitit's settings in its executor for SLURM
DEFAULTS = {"timeout_min": 720, "gpus_per_node": 1, "cpus_per_task": 8, "signal_delay_s": 120, "name": "reslt"}


def parse_settings(given: list[str]) -> dict[str, object]:
    """['partition=gpu', 'time=2:00:00'] -> {'partition': 'gpu', 'timeout_min': 120}. Raises UserError."""
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if name not in SETTINGS:
            raise UserError(
                f"--slurm {text}: there is no setting {name!r}{did_you_mean(name, SETTINGS)}; there are {', '.join(SETTINGS)}"
            )
        if not equals or not value:
            raise UserError(f"--slurm {text}: give a value, {name}=VALUE")
        try:
            settings["timeout_min" if name == "time" else name] = SETTINGS[name](value)
        except ValueError:
            kinds = {
                _count: "a whole number from 0",
                _gigabytes: "a number above 0",
                _minutes: "minutes, or [D-]HH:MM:SS",
            }
            kind = kinds[SETTINGS[name]]
            raise UserError(f"--slurm {text}: {value!r} is not {kind}") from None
    return settings


def check_launcher(launcher: str) -> None:
    """Raise UserError if jobs cannot be submitted from this machine."""
    if find_spec("submitit") is None:
        raise UserError(f"--launcher {launcher} needs the package submitit; install it with: pip install submitit")
    if launcher == "slurm" and (missing := [command for command in NEEDED if shutil.which(command) is None]):
        raise UserError(
            f"--launcher slurm: there is no {', '.join(missing)} on this machine; start the command on a login node of the "
            "cluster, or train here with --launcher local"
        )


def describe_jobs(settings: dict[str, object]) -> str:
    """Return what a job has, for a table's header."""
    used = _with_defaults(settings)
    named = ("partition", "constraint", "gres", "gpus_per_node", "gpus_per_task", "cpus_per_task")
    return "SLURM, " + ", ".join(f"{name}={used[name]}" for name in named if name in used)


def _with_defaults(settings: dict[str, object]) -> dict[str, object]:
    """Return the settings, and a default for each other; no GPUs per machine if they are requested otherwise, or none."""
    without = {"gpus_per_node"} if {"gpus_per_task", "gres"} & settings.keys() else set()
    merged = {name: value for name, value in DEFAULTS.items() if name not in without} | settings
    return {name: value for name, value in merged.items() if (name, value) != ("gpus_per_node", 0)}


def create_executor(launcher: str, folder: Path, settings: dict[str, object]):
    """Return submitit's executor. `folder`: for its files, on a disk that all machines share; `settings`: as
    `parse_settings` returns them."""
    import submitit

    settings = _with_defaults(settings)
    delay = settings["signal_delay_s"]
    if launcher != "slurm":
        executor = submitit.LocalExecutor(folder)
        gpus = settings.get("gpus_per_node", 0)
        executor.update_parameters(timeout_min=settings["timeout_min"], gpus_per_node=gpus, signal_delay_s=delay)
        return executor
    if "mem_gb" in settings:
        settings["mem_gb"] = f"{round(settings['mem_gb'] * 1024)}MB"
    # srun takes the number of cores from this variable alone
    setup = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *settings.pop("setup", [])]
    more = {"signal": f"USR1@{delay}"}  # at which train.py writes a checkpoint and ends; submitit's own is another
    more |= {name: settings.pop(name) for name in ("reservation",) if name in settings}
    executor = submitit.SlurmExecutor(folder)
    named = {NAMES.get(name, name): value for name, value in settings.items()}
    executor.update_parameters(**named, setup=setup, additional_parameters=more)
    return executor


@dataclass
class Job:
    """A job of the cluster, and the runs that it trains."""

    id: str
    handle: object  # submitit's
    runs: list[Run]
    is_own: bool = True  # of this call
    unseen_since: float | None = None  # when its end was known, but not its result


class Jobs:
    """The launcher of runs on a cluster: `jobs` jobs at once, queued ones included, each with at most `streams` runs.

    The number of the job of each run is in a file, so that a later call finds the job: nothing is submitted twice."""

    def __init__(self, launcher: str, executor, jobs: int, logs: Path, streams: int = 1):
        """`launcher`: one of LAUNCHERS, with its `executor` (see `create_executor`); `logs`: folder of the runs' logs."""
        self.launcher, self.executor, self.jobs, self.streams, self.logs = launcher, executor, jobs, streams, logs
        # for files of results; submitit asks `sacct` more and more rarely, once for all jobs
        self.poll_seconds = 5.0 if launcher == "slurm" else 1.0
        self.active: list[Job] = []
        self.most = jobs  # at once; fewer if the cluster accepts no more

    def room(self) -> int:
        """Return how many more runs can be started now."""
        return max(self.most - len(self.active), 0) * self.streams

    def begun(self, runs: list[Run]) -> dict[Run, str]:
        """Return the runs whose jobs, of an earlier call, are queued or running."""
        by_job: dict[tuple[str, str], list[Run]] = {}
        for run in runs:
            recorded = read_json(_record(run))
            if recorded.get("launcher") == self.launcher:
                by_job.setdefault((recorded["job"], recorded["folder"]), []).append(run)
        create = self.executor.job_class
        found = [Job(id, create(folder, id), of_job, is_own=False) for (id, folder), of_job in by_job.items()]
        begun = {}
        for job in found:  # submitit knows all of them by now, and asks once
            if self._has_ended(job):
                self._forget(job)
            else:
                self.active.append(job)
                begun |= dict.fromkeys(job.runs, f"job {job.id} of an earlier call")
        return begun

    def start(self, runs: list[Run]) -> dict[Run, str]:
        """Submit jobs for runs, at most as many as there is room for. Return how each is trained."""
        started = self.begun(runs)  # by another call, a moment ago
        for group in self._groups([run for run in runs if run not in started]):
            if (job := self._submit(group)) is None:
                break
            started |= dict.fromkeys(group, f"submitted, job {job.id}")
        return started

    def ended(self) -> list[Ended]:
        """Return the runs whose jobs have ended since the last call."""
        ended = []
        for job in list(self.active):
            if self._has_ended(job) and (found := self._result(job)) is not None:
                self.active.remove(job)
                self._forget(job)
                self.most = self.jobs
                ended += found
        return ended

    def stop(self) -> str:
        """Return how the jobs, which continue, can be ended."""
        if not self.active:
            return "no job is queued or running; the same command resumes"
        ids = " ".join(job.id for job in self.active)
        end = f"scancel {ids}" if self.launcher == "slurm" else f"kill {ids}"
        return f"the jobs continue; the same command finds them again, and `{end}` ends them"

    def log(self, run: Run) -> Path:
        """Return the file to which a run prints."""
        return self.logs / f"{run.config.run.experiment}.log"

    def _groups(self, runs: list[Run]) -> list[list[Run]]:
        """Divide runs among the jobs that may be submitted now, each with runs of one precision, which Accelerate shares."""
        free = self.room() // self.streams
        if not (free and runs):
            return []
        by_precision: dict[str, list[Run]] = {}
        for run in runs:
            by_precision.setdefault(run.config.run.mixed_precision, []).append(run)
        size = min(-(-len(runs) // free), self.streams)
        groups = [alike[k : k + size] for alike in by_precision.values() for k in range(0, len(alike), size)]
        return groups[:free]

    def _submit(self, runs: list[Run]) -> Job | None:
        """Submit a job. Return None if the cluster accepts no more of this user now. Raises UserError if it accepts none."""
        from submitit.core.utils import FailedJobError

        works = [(list(run.arguments), self._place_of_log(run)) for run in runs]
        try:
            with _signals_blocked():
                handle = self.executor.submit(train_in_job, works)
        except FailedJobError as fault:
            reason = " ".join(str(fault).split())
            if not self.active:
                raise UserError(f"the cluster does not accept the job: {reason}; see --slurm") from None
            logger.warning(f"the cluster accepts no more than {len(self.active)} jobs now: {reason}")
            self.most = len(self.active)
            return None
        job = Job(handle.job_id, handle, runs)
        self.active.append(job)
        recorded = {"launcher": self.launcher, "job": job.id, "folder": str(self.executor.folder)}
        for run in runs:
            write_atomically(_record(run), json.dumps(recorded) + "\n")
        return job

    def _has_ended(self, job: Job) -> bool:
        """Return whether a job has ended. A preempted one may be started again by the cluster: it counts as ended."""
        if self.launcher == "slurm":
            return job.handle.done() or job.handle.watcher.get_state(job.id, mode="cache").startswith("PREEMPTED")
        return job.handle.done() if job.is_own else not _is_local_job(int(job.id))

    def _result(self, job: Job) -> list[Ended] | None:
        """Return how the runs of a job have ended; None if this may not be seen yet."""
        job.unseen_since = job.unseen_since or time.monotonic()
        is_late = time.monotonic() - job.unseen_since > PATIENCE_SECONDS
        if not job.handle.paths.result_pickle.exists():
            state = job.handle.state.split()[0] if self.launcher == "slurm" else "STOPPED"
            if state == "COMPLETED" and not is_late:
                return None
            if state == "PREEMPTED":
                job.handle.cancel(check=False)  # it is submitted again
            return [Ended(run, self._why(job, state), state in STOPPED_STATES) for run in job.runs]
        try:
            by_log = job.handle.result()
        except RuntimeError:  # submitit's own: the function failed
            return [Ended(run, self._why(job, "FAILED")) for run in job.runs]
        ended = []
        for run in job.runs:
            code, reason = by_log[self._place_of_log(run)]
            if code == 0 and not (run.config.run_folder / "result.json").exists() and not is_late:
                return None
            ended.append(Ended(run, reason, was_stopped=code == 128 + signal.SIGUSR1))
        return ended

    def _why(self, job: Job, state: str) -> str:
        """Return why a job without a result has ended: its state, and the last line that it printed to standard error."""
        errors = job.handle.paths.stderr
        last = f": {reason_of(1, errors, 0)}, {errors}" if errors.is_file() and errors.stat().st_size else ""
        return f"job {job.id} has ended, {state}{last}"

    def _forget(self, job: Job) -> None:
        for run in job.runs:
            if read_json(_record(run)).get("job") == job.id:
                _record(run).unlink(missing_ok=True)

    def _place_of_log(self, run: Run) -> str:
        return str(self.log(run).absolute())


def train_in_job(works: list[tuple[list[str], str]]) -> dict[str, tuple[int, str | None]]:
    """Train runs (flags of train.py, log) in a job of the cluster: several share a process. Return {log: (exit code, why it
    failed)}.

    SLURM's warning before the time limit is passed on, so that each run writes a checkpoint and ends. After SIGTERM, which
    precedes the end of a preempted job, there is no result: the cluster may start the job again, which continues."""
    variables, signals = environment(0, 1, []), []
    begins = {log: begin_log(Path(log), arguments) for arguments, log in works}
    if len(works) == 1:
        [(arguments, log)] = works
        process = Process(arguments, Path(log), variables)
    else:
        process = Group(Path(works[0][1]).with_name(f"streams-job-{os.getpid()}.log"), variables)
        for arguments, log in works:
            process.train(arguments, Path(log))

    def pass_on(number: int, frame: object) -> None:
        signals.append(number)
        is_warning = number in (signal.SIGUSR1, signal.SIGUSR2)  # the latter is submitit's own
        process.process.send_signal(signal.SIGUSR1 if is_warning else signal.SIGTERM)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, pass_on)
    codes: dict[str, int] = {}
    while len(codes) < len(works):
        time.sleep(LOOK_SECONDS)
        for log in begins.keys() - codes.keys():
            if (code := process.code_of(Path(log))) is not None:
                codes[log] = code
    if isinstance(process, Group):
        process.connection.close()
        process.process.wait()
    if any(codes.values()) and signal.SIGTERM in signals:
        raise SystemExit(128 + signal.SIGTERM)
    return {log: (code, reason_of(code, Path(log), begins[log]) if code else None) for log, code in codes.items()}


def _record(run: Run) -> Path:
    """Return the file with the number of a run's job, shared by all tables."""
    folder = run.config.run_folder
    return folder.parent / "reproduce" / "jobs" / f"{folder.name}.json"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Within the block, Ctrl-C and the end of the terminal reach neither this process, until its end, nor the processes that
    it starts, ever: an interrupted sbatch would leave a job whose number nobody knows."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_local_job(number: int) -> bool:
    """Return whether a process is the one that submitit's local executor starts for a job."""
    try:
        process = psutil.Process(number)
        return "submitit.local._local" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
