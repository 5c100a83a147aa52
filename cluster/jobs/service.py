"""Sweeps as jobs of a Ray cluster, through the REST interface of its dashboard (Ray Jobs).

Every command finds the cluster in the same way: --address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS where that is
an http(s) address. A token is sent wherever Ray finds one: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
A job gets its secrets from the environment of the cluster's machines; nothing of this machine's environment goes there.
"""

import asyncio
import json
import logging
import os
import re
import shlex
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saescale.cluster.crew.token import refused, use_token
from saescale.cluster.jobs.address import no_dashboard, reach, resolve_address, shown
from saescale.cluster.jobs.last_words import reason
from saescale.cluster.jobs.package import EXTENSION, SWEEP, write_code, write_sweep
from saescale.cluster.sweep.spec import NO_STORE, SweepSpec
from saescale.cluster.sweep.status import JobStatus
from saescale.scaling.laws.settings import FitSettings
from saescale.storage import files
from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.subjects.texts.text import PYTHON_PROSE

# How long a driver that is told to stop may take until Ray kills it: its workers save their checkpoints meanwhile.
STOP_WAIT_S = 60
POLL_S = 0.5
HELPER_KEPT_S = 15.0
_SETTINGS = FitSettings()
_PROGRAM = ("-P", "-m", "saescale.cluster.cli")  # -P: nothing of the folder it starts in is taken for a package
_HELPER = "saescale_for"  # key of the metadata of a job that only answers a question


class Service:
    """The jobs of one Ray cluster. Whatever goes wrong is one SaescaleError, which never holds the token."""

    def __init__(self, address: str | None) -> None:
        self.url = resolve_address(address)
        self.address = shown(self.url)
        reach(self.url, self.address)
        # Ray lets its environment win over the argument; what the user typed shall win.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        use_token()
        from ray.job_submission import JobSubmissionClient

        # What Ray tells of its uploads is of no use to who submits a sweep.
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._asking():
            self.client = JobSubmissionClient(self.url)

    def submit(
        self,
        spec: SweepSpec,
        extension: SweepSpec | None = None,
        settings: FitSettings = _SETTINGS,
        python: str = "python",
        retry_failed: bool = False,
    ) -> str:
        """Starts the sweep as a job and returns its id. `python` is the interpreter on the cluster.

        Uploads what `write_sweep` and `write_code` say. The job's driver takes no CPU or GPU and runs on the head node,
        also where that offers none. Raises SaescaleError where a store or the run directory would be another folder
        there.
        """
        require_shared(spec, extension)
        job = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', spec.name)[:40]}-{uuid.uuid4().hex[:8]}"
        command = [python, *_PROGRAM, "sweep", SWEEP, "--bootstraps", str(settings.bootstraps)]
        if extension is not None:
            command += ["--extend", EXTENSION]
        if retry_failed:
            command += ["--retry-failed"]
        with tempfile.TemporaryDirectory(prefix="saescale-") as folder, self._asking():
            for own in write_sweep(Path(folder) / "sweep", spec, extension):
                command += ["--architecture-file", own]
            return self.client.submit_job(
                # `exec`: the shell that Ray puts around it would not pass the signal on that asks it to stop.
                entrypoint=f"exec {shlex.join(command)}",
                submission_id=job,
                runtime_env={
                    "working_dir": str(Path(folder) / "sweep"),
                    # Apart from the sweep, so that the kernels compiled for one job are found by the next.
                    "py_modules": [str(module) for module in write_code(Path(folder) / "code")],
                    "env_vars": {"SAESCALE_JOB": job, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                },
                metadata={
                    "saescale": version("saescale"), "sweep": spec.name, "run": spec.out, "cells": str(spec.size),
                    "python": python,
                },
            )  # fmt: skip

    def jobs(self) -> list[JobStatus]:
        """saescale's sweeps on this cluster, the newest first."""
        with self._asking():
            found = [_job_status(details) for details in self.client.list_jobs() if _is_sweep(details)]
        return sorted(found, key=lambda job: job.submitted_at or 0.0, reverse=True)

    def job(self, job: str) -> JobStatus:
        """Raises SaescaleError where the cluster has no such sweep."""
        return _job_status(self.details(job))

    def details(self, job: str) -> Any:
        """Ray's JobDetails of a sweep. Raises SaescaleError where the cluster has no such sweep."""
        try:
            with self._asking():
                details = self.client.get_job_info(job)
        except _NotFound:
            details = None
        if details is None or not _is_sweep(details):
            raise SaescaleError(
                f"no sweep {job} on the cluster at {self.address}; `saescale list --address {self.address}` names them"
            )
        return details

    def stop(self, job: str, timeout: float = STOP_WAIT_S + 30.0) -> JobStatus:
        """Asks the job to stop, and returns when it has ended, its workers' checkpoints saved."""
        found = self.job(job)
        if found.active:
            with self._asking():
                self.client.stop_job(job)
        deadline = time.monotonic() + timeout
        while (found := self.job(job)).active:
            if time.monotonic() > deadline:
                raise SaescaleError(f"{job} has not ended {timeout:.0f} s after it was told to; tell it again")
            time.sleep(POLL_S)
        return found

    def logs(self, job: str) -> str:
        """What the job's driver has printed."""
        self.job(job)
        with self._asking():
            return self.client.get_job_logs(job)

    async def follow(self, job: str) -> AsyncIterator[str]:
        """What it prints, as it comes, until it ends. Goes on by itself where the connection breaks."""
        import aiohttp

        self.job(job)
        printed = 0
        whole = False
        while not whole or self.job(job).active:
            seen, whole = 0, False
            with suppress(RuntimeError, aiohttp.ClientError, OSError):
                async for text in self.client.tail_job_logs(job):
                    # Each connection tells everything from the beginning.
                    new = text[max(0, printed - seen) :]
                    seen += len(text)
                    printed = max(printed, seen)
                    if new:
                        yield new
                whole = True  # as long as the job has ended
            if not whole:
                await asyncio.sleep(POLL_S)
                self.job(job)  # a cluster that is gone is not waited for

    def run_there(self, arguments: list[str], job: str, timeout: float) -> str:
        """Runs a short `saescale` command on the cluster for `job`, and returns what it printed.

        It is a job of its own, with the code that runs here; those that ended before are removed.
        """
        python = self.details(job).metadata.get("python", "python")
        helper = f"for-{job}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory(prefix="saescale-") as folder, self._asking():
            # Not what the job brought: Ray forgets that some minutes after its end.
            modules = [str(module) for module in write_code(Path(folder))]
            self.client.submit_job(
                entrypoint=f"exec {shlex.join([python, *_PROGRAM, *arguments])}",
                submission_id=helper,
                runtime_env={"py_modules": modules},
                metadata={_HELPER: job},
            )
            deadline = time.monotonic() + timeout
            while not self.client.get_job_status(helper).is_terminal():
                if time.monotonic() > deadline:
                    self.client.stop_job(helper)
                    raise SaescaleError(
                        f"{self.address} did not run a job of a moment within {timeout:.0f} s; look at the cluster "
                        "(`ray status`)"
                    )
                time.sleep(POLL_S)
            text = self.client.get_job_logs(helper)
            self._remove_helpers()
            return text

    def _remove_helpers(self) -> None:
        """Those that have ended for a while: Ray looks at its jobs every second, and one that it finds removed too
        early it lists again, as failed."""
        for details in self.client.list_jobs():
            ended = details.end_time is not None and time.time() - details.end_time / 1000 > HELPER_KEPT_S
            if ended and _HELPER in (details.metadata or {}):
                # Another client may have been faster.
                with suppress(RuntimeError):
                    self.client.delete_job(str(details.submission_id))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What the cluster or the way to it answers wrongly becomes one line; no library's message is repeated that
        could hold a header."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise refused(self.address) from None
        except requests.exceptions.InvalidHeader:
            raise SaescaleError("the token holds characters that no token has; look at RAY_AUTH_TOKEN") from None
        except (requests.exceptions.JSONDecodeError, requests.exceptions.HTTPError, json.JSONDecodeError):
            raise no_dashboard(self.address) from None
        except (ConnectionError, requests.exceptions.RequestException) as error:
            if not hasattr(self, "client"):  # something answered there a moment ago
                raise no_dashboard(self.address) from None
            raise SaescaleError(
                f"the connection to {self.address} failed ({type(error).__name__}); see that the cluster is up"
            ) from None
        except RuntimeError as error:
            text = one_line(error)
            if "status code 404" in text:
                raise _NotFound(text) from None
            if "returned 404" in text:
                raise no_dashboard(self.address) from None
            raise SaescaleError(f"{self.address}: {text[-500:]}") from None


class _NotFound(SaescaleError):
    """The cluster has no such job."""


def require_shared(spec: SweepSpec, extension: SweepSpec | None = None) -> None:
    """Raises SaescaleError where a store, also of an extension, or the run directory would be another folder on the
    cluster."""
    stores = {url: None for of in (spec, extension) if of is not None and of.store != NO_STORE for url in of.stores}
    lives = [live for of in (spec, extension) if of is not None for live in of.lives.values()]
    read = [(f"store.live.{name}", getattr(live, name)) for live in lives for name in ("corpus", "hidden_states")]
    read = [(name, url) for name, url in read if url not in (None, PYTHON_PROSE)]
    for name, url in (*(("store", url) for url in stores), ("out", spec.out), *read):
        relative = files.local_path(url) is not None and not os.path.isabs(url.removeprefix("file://"))
        if relative or url.startswith("memory:"):
            raise SaescaleError(
                f"{name}: {url} would be another place on the cluster; give a URL (s3://...) or the absolute path of a "
                "folder that all its nodes share"
            )


def _is_sweep(details: Any) -> bool:
    return {"saescale", "sweep", "run"} <= set(details.metadata or {}) and details.submission_id is not None


def _job_status(details: Any) -> JobStatus:
    state = details.status.value.lower()
    return JobStatus(
        id=details.submission_id,
        sweep=details.metadata["sweep"],
        run=details.metadata["run"],
        state=state,
        message=reason(details.message or "", details.metadata.get("python", "python")) if state == "failed" else None,
        submitted_at=None if details.start_time is None else details.start_time / 1000,
        ended_at=None if details.end_time is None else details.end_time / 1000,
    )
