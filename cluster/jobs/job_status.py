"""The status of a job's sweep: of its run directory, read here or on the cluster, and of the job itself."""

from typing import NamedTuple

from saescale.cluster.jobs.last_words import reason
from saescale.cluster.jobs.service import Service
from saescale.cluster.sweep.status import NoRun, SweepStatus, read_status, with_job
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import read_driver

HELPER_S = 120.0


class Look(NamedTuple):
    """`near`: it was read from here, so that looking again costs little."""

    status: SweepStatus
    near: bool


def look_at_job(service: Service, name: str) -> Look:
    """How far the sweep of a job is. Raises SaescaleError."""
    job = service.job(name)
    if job.state == "pending":
        return Look(with_job(None, job), near=True)
    near = _readable_here(job.run, name)
    try:
        status = _read(job.run) if near else _read_there(service, name, job.run)
    except SaescaleError:
        if job.state != "failed":
            raise
        status = None  # the cluster can read no more of it than it could run, and why that failed it has said
    return Look(with_job(status, job), near)


def _readable_here(run: str, job: str) -> bool:
    """Whether what lies at `run` here is what the job works on: any path may exist on two machines."""
    try:
        driver = read_driver(run)
    except SaescaleError:
        return False
    return files.local_path(run) is None or (driver is not None and driver.job == job)


def _read(run: str) -> SweepStatus | None:
    try:
        return read_status(run)
    except NoRun:
        return None


def _read_there(service: Service, job: str, run: str) -> SweepStatus | None:
    text = service.run_there(["status", run, "--json"], job, HELPER_S)
    if documents := [line for line in text.splitlines() if line.startswith("{")]:
        return SweepStatus.model_validate_json(documents[-1])
    said = reason(text) or "no reason given"
    if NoRun.SAID in said:
        return None
    raise SaescaleError(f"the cluster could not read {run}: {said}")
