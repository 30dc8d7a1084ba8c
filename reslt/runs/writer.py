"""A thread that writes to a run's folder while the run continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from reslt.core.phases import Phases
from reslt.core.turns import Turn, let_others_work_until, on_behalf_of, own_turn


class Writer:
    """A thread that runs jobs, functions that write files, one after another. If a job fails, those after it are skipped.

    As a context manager, it waits for all jobs at the end of the block, and drops an error that `finish` has not raised."""

    def __init__(self, phases: Phases | None = None):
        self.phases = phases
        self._thread = ThreadPoolExecutor(1, "writer")
        self._jobs: list[Future] = []
        self._failure: BaseException | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self._wait()
        self._thread.shutdown()

    @property
    def has_failed(self) -> bool:
        """Whether a job has failed. `finish` will raise its error."""
        return self._failure is not None

    def submit(self, job: Callable[[], object], title: str = "checkpoint") -> None:
        """Queue a job after those submitted before. `title`: its name in a trace."""
        self._jobs.append(self._thread.submit(self._run, job, title, own_turn()))

    def finish(self) -> None:
        """Wait until all jobs have ended. Raises the error of a job that failed."""
        self._wait()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _wait(self) -> None:
        let_others_work_until(lambda: all(job.done() for job in self._jobs))
        wait(self._jobs)
        self._jobs = []

    def _run(self, job: Callable[[], object], title: str, turn: Turn | None) -> None:
        if self._failure is not None:
            return
        since = self.phases.clock() if self.phases else 0.0
        with on_behalf_of(turn):
            try:
                job()
            except BaseException as failure:  # of any kind: the run must end with it
                self._failure = failure
        if self.phases:
            self.phases.add("writer", title, since, self.phases.clock())
