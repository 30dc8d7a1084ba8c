"""Runs as jobs of a SLURM cluster, submitted through submitit. The jobs do not need this process. Imports no torch, since a
job imports this file too."""

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
PATIENCE_SECONDS = 60.0  # until a file that another machine wrote appears on a network disk
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
# Names of submitit's settings in its executor for SLURM
NAMES = {"timeout_min": "time", "mem_gb": "mem", "name": "job_name"}
DEFAULTS = {"timeout_min": 720, "gpus_per_node": 1, "cpus_per_task": 8, "signal_delay_s": 120, "name": "reslt"}


def parse_settings(given: list[str]) -> dict[str, object]:
    """['partition=gpu', 'time=2:00:00'] -> {'partition': 'gpu', 'timeout_min': 120}. Raises UserError."""
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if name not in SETTINGS:
            raise UserError(
                f"--slurm {text}: {name!r} is not a setting{did_you_mean(name, SETTINGS)}; give one of {', '.join(SETTINGS)}"
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
    """Return the resources of a job for the header of a table."""
    used = _with_defaults(settings)
    named = ("partition", "constraint", "gres", "gpus_per_node", "gpus_per_task", "cpus_per_task")
    return "SLURM, " + ", ".join(f"{name}={used[name]}" for name in named if name in used)


def _with_defaults(settings: dict[str, object]) -> dict[str, object]:
    """Return the settings with defaults; without gpus_per_node if GPUs are requested otherwise, or none are."""
    without = {"gpus_per_node"} if {"gpus_per_task", "gres"} & settings.keys() else set()
    merged = {name: value for name, value in DEFAULTS.items() if name not in without} | settings
    return {name: value for name, value in merged.items() if (name, value) != ("gpus_per_node", 0)}


def create_executor(launcher: str, folder: Path, settings: dict[str, object]):
    """Return submitit's executor. `folder`: for its files, on a disk that all machines share; `settings`: the result of
    `parse_settings`."""
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
    # srun takes the number of cores only from this variable
    setup = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *settings.pop("setup", [])]
    # At this signal, train.py writes a checkpoint and ends; submitit's default is another one.
    more = {"signal": f"USR1@{delay}"}
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
    unseen_since: float | None = None  # since when its end, but not its result, is known


class Jobs:
    """The launcher of runs on a cluster: `jobs` jobs at once, including queued ones, each with at most `streams` runs.

    A file records the job of each run, so that a later call finds the job, and submits nothing twice."""

    def __init__(self, launcher: str, executor, jobs: int, logs: Path, streams: int = 1):
        """`launcher`: one of LAUNCHERS, with its `executor` (see `create_executor`); `logs`: folder of the runs' logs."""
        self.launcher, self.executor, self.jobs, self.streams, self.logs = launcher, executor, jobs, streams, logs
        # between two looks for result files; submitit calls `sacct` itself, less and less often, once for all jobs
        self.poll_seconds = 5.0 if launcher == "slurm" else 1.0
        self.active: list[Job] = []
        self.most = jobs  # jobs at once; fewer while the cluster accepts no more

    def room(self) -> int:
        """Return the number of further runs that can be started now."""
        return max(self.most - len(self.active), 0) * self.streams

    def begun(self, runs: list[Run]) -> dict[Run, str]:
        """Return {run: description} of the runs with a queued or running job of an earlier call."""
        by_job: dict[tuple[str, str], list[Run]] = {}
        for run in runs:
            recorded = read_json(_record(run))
            if recorded.get("launcher") == self.launcher:
                by_job.setdefault((recorded["job"], recorded["folder"]), []).append(run)
        create = self.executor.job_class
        found = [Job(id, create(folder, id), of_job, is_own=False) for (id, folder), of_job in by_job.items()]
        begun = {}
        for job in found:  # submitit knows all jobs now, and asks for them in one call
            if self._has_ended(job):
                self._forget(job)
            else:
                self.active.append(job)
                begun |= dict.fromkeys(job.runs, f"job {job.id} of an earlier call")
        return begun

    def start(self, runs: list[Run]) -> dict[Run, str]:
        """Submit jobs for runs, up to the `room`. Return {run: description of its job}."""
        started = self.begun(runs)  # another call may just have submitted them
        for group in self._groups([run for run in runs if run not in started]):
            if (job := self._submit(group)) is None:
                break
            started |= dict.fromkeys(group, f"submitted, job {job.id}")
        return started

    def ended(self) -> list[Ended]:
        """Return the runs of jobs that have ended since the last call."""
        ended = []
        for job in list(self.active):
            if self._has_ended(job) and (found := self._result(job)) is not None:
                self.active.remove(job)
                self._forget(job)
                self.most = self.jobs
                ended += found
        return ended

    def stop(self) -> str:
        """Return a message on how to end the jobs, which continue."""
        if not self.active:
            return "no job is queued or running; the same command resumes"
        ids = " ".join(job.id for job in self.active)
        end = f"scancel {ids}" if self.launcher == "slurm" else f"kill {ids}"
        return f"the jobs continue; the same command finds them again, and `{end}` ends them"

    def log(self, run: Run) -> Path:
        """Return the file to which a run prints."""
        return self.logs / f"{run.config.run.experiment}.log"

    def _groups(self, runs: list[Run]) -> list[list[Run]]:
        """Divide runs among the jobs that may be submitted now; those of a job share a precision, as Accelerate requires."""
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
        """Submit a job. Return None if the cluster accepts no further job now. Raises UserError if it accepts none at all."""
        from submitit.core.utils import FailedJobError

        works = [(list(run.arguments), self._place_of_log(run)) for run in runs]
        try:
            with _signals_blocked():
                handle = self.executor.submit(train_in_job, works)
        except FailedJobError as fault:
            reason = " ".join(str(fault).split())
            if not self.active:
                raise UserError(f"the cluster rejects the job: {reason}; adapt the settings of --slurm") from None
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
        """Return whether a job has ended. A preempted job counts as ended, though the cluster may start it again."""
        if self.launcher == "slurm":
            return job.handle.done() or job.handle.watcher.get_state(job.id, mode="cache").startswith("PREEMPTED")
        return job.handle.done() if job.is_own else not _is_local_job(int(job.id))

    def _result(self, job: Job) -> list[Ended] | None:
        """Return the outcomes of the runs of a job; None if their files may not have appeared yet."""
        job.unseen_since = job.unseen_since or time.monotonic()
        is_late = time.monotonic() - job.unseen_since > PATIENCE_SECONDS
        if not job.handle.paths.result_pickle.exists():
            state = job.handle.state.split()[0] if self.launcher == "slurm" else "STOPPED"
            if state == "COMPLETED" and not is_late:
                return None
            if state == "PREEMPTED":
                job.handle.cancel(check=False)  # the run will be submitted again
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
        """Return the reason why a job without a result has ended: its state, and its last line of standard error."""
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
    """Train runs, (flags of train.py, log) each, in a job of the cluster. Several share a process. Return {log: (exit code,
    reason of the failure)}.

    SLURM's warning before the time limit is passed on, so that each run writes a checkpoint and ends. After SIGTERM, which
    precedes the end of a preempted job, there is no result: the cluster may start the job again, and it resumes."""
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
    """Return the file that records the job of a run, shared by all tables."""
    folder = run.config.run_folder
    return folder.parent / "reproduce" / "jobs" / f"{folder.name}.json"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Within the block, delay Ctrl-C and the end of the terminal for this process, and block them for the processes that it
    starts: an interrupted sbatch would leave a job with an unknown number."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_local_job(number: int) -> bool:
    """Return whether a process is a running job of submitit's local executor."""
    try:
        process = psutil.Process(number)
        return "submitit.local._local" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
