"""Where jobs wait and run: Slurm's queue, or submitit's executor on this machine. Jobs are found by the queue itself
where there is one, never by a result that somebody waits for."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from mergesec.errors import UsageError
from mergesec.execution.claims import birth
from mergesec.execution.engines.array_worker import ending_file, work
from mergesec.execution.engines.local import no_interrupts
from mergesec.execution.failures import portable
from mergesec.files import write_atomic

ENDED = {
    "COMPLETED": "", "CANCELLED": "cancelled", "FAILED": "failed", "TIMEOUT": "reached its time limit",
    "OUT_OF_MEMORY": "out of memory", "NODE_FAIL": "its node was lost", "PREEMPTED": "preempted",
    "BOOT_FAIL": "its node did not start", "DEADLINE": "past its deadline", "REVOKED": "revoked",
    "UNKNOWN": "no longer in the queue",
}  # fmt: skip
"""States in which a job is no more, in words."""
BLAMED = {"FAILED", "OUT_OF_MEMORY", "UNKNOWN"}
"""Of those the ones that a step may be the reason of."""


class Silent(RuntimeError):
    """The queue does not answer now."""


class Queue(Protocol):
    """Jobs of one run."""

    name: str

    def submit(self, number: int) -> list[str]:
        """That many jobs more, as one array; UsageError if they are refused."""

    def states(self) -> dict[str, str]:
        """The state of each job that was ever submitted, as Slurm names it. Silent if nothing answers."""

    def cancel(self, waiting: bool = False) -> None:
        """End all jobs now, or only those that did not begin."""

    def last_words(self, job: str) -> str:
        """The end of what a job wrote."""


class _Submitted:
    """What both have: submitit's folder, and which jobs there were."""

    name = ""

    def __init__(self, folder: Path, options: Mapping[str, Any], minutes: float) -> None:
        self._folder, self._options, self._minutes = folder, dict(options), minutes
        self._record = folder / "array.json"
        self._jobs: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            told = json.loads(self._record.read_bytes())
            self._jobs = dict(told["jobs"]) if told["queue"] == self.name else {}

    def _keep(self, jobs: Mapping[str, Any]) -> None:
        self._jobs |= jobs
        write_atomic(self._record, json.dumps({"queue": self.name, "jobs": self._jobs}).encode())

    def last_words(self, job: str) -> str:
        for path in sorted((self._folder / "jobs").glob(f"{job}_*_log.err")):
            with suppress(OSError):
                lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                return portable(lines[-1])[:300] if lines else ""
        return ""


class SlurmQueue(_Submitted):
    """Slurm: its jobs are those of this run's name, so that none is lost if the driver dies while it submits."""

    name = "slurm"

    def __init__(self, folder: Path, options: Mapping[str, Any], minutes: float) -> None:
        super().__init__(folder, options, minutes)
        self._title = f"mergesec-{folder.name}"

    def submit(self, number: int) -> list[str]:
        from submitit import SlurmExecutor

        minutes = max(1, math.ceil(self._minutes))
        told = {"job_name": self._title, "time": minutes, **self._options}
        before = set(self._seen())
        try:
            executor = SlurmExecutor(self._folder / "jobs")
            executor.update_parameters(**told)
            jobs = executor.map_array(work, [str(self._folder)] * number)
        except Exception as error:
            said = " ".join(str(getattr(error, "stderr", "") or error).split())[-300:]
            raise UsageError("--slurm", f"the jobs were refused: {said or type(error).__name__}") from None
        ids = [str(job.job_id) for job in jobs]
        self._keep({job: time.time() for job in {*ids, *before}})
        return ids

    def states(self) -> dict[str, str]:
        seen = self._seen()
        lost = [job for job in self._jobs if job not in seen]
        accounts = _accounts(lost) if lost else {}
        return seen | {job: accounts.get(job, "UNKNOWN") for job in lost}

    def _seen(self) -> dict[str, str]:
        told = _ask("squeue", "--states=all", "-r", "-h", "-o", "%i|%T", f"--name={self._title}")
        return _read_states(told)

    def cancel(self, waiting: bool = False) -> None:
        with suppress(Silent):
            _ask("scancel", f"--name={self._title}", *(["--state=PENDING"] if waiting else []))


def _ask(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Silent(f"{command[0]}: {error}") from None
    if ran.returncode:
        raise Silent(f"{command[0]}: {' '.join(ran.stderr.split())[:200]}")
    return ran.stdout


def _accounts(jobs: list[str]) -> dict[str, str]:
    """States of jobs that left the queue, where Slurm keeps accounts."""
    with suppress(Silent):
        return _read_states(_ask("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(jobs)))
    return {}


def _read_states(told: str) -> dict[str, str]:
    """``12_3|CANCELLED by 0`` lines."""
    pairs = (line.split("|")[:2] for line in told.splitlines() if line.count("|"))
    return {job.strip(): state.split()[0].rstrip("+") for job, state in pairs if state.split()}


class LocalQueue(_Submitted):
    """No queue: submitit's processes on this machine, which outlive the driver; for tests and one machine."""

    name = "local"

    def submit(self, number: int) -> list[str]:
        from submitit import LocalExecutor

        executor = LocalExecutor(self._folder / "jobs")
        executor.update_parameters(timeout_min=self._minutes)
        with no_interrupts(), _no_streams():
            jobs = [executor.submit(work, str(self._folder)) for _ in range(number)]
        ids = [str(job.job_id) for job in jobs]
        self._keep({job: {"born": birth(int(job)), "until": time.time() + 60 * self._minutes} for job in ids})
        return ids

    def states(self) -> dict[str, str]:
        return {job: self._state(job, told) for job, told in self._jobs.items()}

    def _state(self, job: str, told: Mapping[str, Any]) -> str:
        with suppress(OSError):
            os.waitpid(int(job), os.WNOHANG)  # a child's end has to be heard
        if birth(int(job)) == told["born"]:
            return "RUNNING"
        if ending_file(self._folder, job).exists():
            return "COMPLETED"
        if told.get("cancelled"):
            return "CANCELLED"
        return "TIMEOUT" if time.time() >= told["until"] else "FAILED"

    def cancel(self, waiting: bool = False) -> None:
        for job, state in self.states().items():
            if state == "RUNNING" and not waiting:
                self._jobs[job]["cancelled"] = True
                with suppress(OSError):
                    os.kill(int(job), signal.SIGKILL)  # its worker leaves with it


@contextmanager
def _no_streams() -> Iterator[None]:
    """Processes started inside outlive this one, and must not hold its output open."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(nowhere)


def make_queue(folder: Path, options: Mapping[str, Any], minutes: float) -> Queue:
    """Slurm's, or where there is none this machine; ``cluster=slurm|local`` says which."""
    told = dict(options)
    asked = str(told.pop("cluster", "") or ("slurm" if shutil.which("sbatch") else "local"))
    if asked not in ("slurm", "local"):
        raise UsageError("--slurm", f"cluster={asked}; valid: slurm, local")
    if asked == "slurm" and not shutil.which("sbatch"):
        raise UsageError(
            "--slurm", "cluster=slurm, but there is no sbatch here; cluster=local runs on this machine"
        )
    if asked == "local":
        return LocalQueue(folder, told, minutes)
    return SlurmQueue(folder, told, minutes)


def run_name(grid: str, digest: str) -> str:
    """The name of a run's folder and jobs."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', grid)[:40]}-{digest[:12]}"
