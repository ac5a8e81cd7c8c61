"""`hyperscale submit`: a recipe as a Ray job on a cluster elsewhere."""

import asyncio
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from hyperscale.config.loading import find_recipe
from hyperscale.errors import ConfigError, ResourceError

_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""`ray job stop` sends SIGTERM and kills after 3 s by default: too short to close the trackers."""


def submit_job(address: str, arguments: Sequence[str], working_dir: Path | None, follow: bool) -> int:
    """Submit `hyperscale train …` to the cluster's job server.

    Args:
        address: of the dashboard, `http://head:8265`.
        arguments: the arguments after `hyperscale train` on the cluster; a recipe's path is relative to `working_dir`.
        working_dir: a folder to upload (recipes, task files, data), without what its .gitignore excludes;
            None = nothing is sent.
        follow: print the job's log until it ends.

    Returns:
        0 if the job succeeded or is not followed, else 1.

    Raises:
        ConfigError: `output` would lie in the job's temporary folder.
        ResourceError: no job server answers there, or it rejects the job.
    """
    _require_durable_output(arguments, working_dir)
    runtime: dict[str, Any] = {"env_vars": dict(_STOP)}
    if working_dir is not None:
        runtime["working_dir"] = str(working_dir)
    logging.getLogger("ray").setLevel(logging.WARNING)  # it logs the upload, line by line
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=f"hyperscale train {shlex.join(arguments)}", runtime_env=runtime)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ResourceError(
            f"no job could be submitted to {address}: {reason}. Give the dashboard's address, http://HEAD:8265, "
            "with --address; a cluster with token authentication needs RAY_AUTH_MODE=token and its token here too"
        ) from error
    print(f"submitted as {job}; stop it with: ray job stop --address {address} {job}", flush=True)
    if not follow:
        return 0
    asyncio.run(_print_log(client, job))
    status = client.get_job_status(job)
    reason = "" if status == JobStatus.SUCCEEDED else f" ({_why(client.get_job_info(job).message)})"
    print(f"job {job}: {status.value}{reason}", flush=True)
    return 0 if status == JobStatus.SUCCEEDED else 1


def _require_durable_output(arguments: Sequence[str], working_dir: Path | None) -> None:
    """On the cluster a relative path would lie in the job's working directory, which Ray deletes after the job."""
    recipe, *rest = arguments
    sent = working_dir / recipe if working_dir else None
    path = sent if sent and sent.is_file() else find_recipe(recipe)
    overrides = [word.removeprefix("output=") for word in rest if word.startswith("output=")]
    output = overrides[-1] if overrides else str(yaml.safe_load(path.read_text("utf-8"))["output"])
    if "://" not in output and not output.startswith(("/", "~", "$")):
        where = "the override" if overrides else str(path)
        raise ConfigError(
            f"{where}: output={output} is a relative path, which a job would lose with its temporary folder; give an "
            "absolute path that all nodes share, or a URI such as s3://bucket/run: output=/shared/runs/NAME"
        )


def _why(message: str | None) -> str:
    """Return the first line of Ray's message about a job's end; its other lines repeat the log."""
    return (message or "no reason given").strip().splitlines()[0].rstrip(".,: ")


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()
