"""The Ray cluster of a run: join it or start it here, and check that it has what the workers need."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.tracking import TrackingSettings
from hyperscale.errors import ResourceError, RunFolderError
from hyperscale.launch.resources import required_resources, several_nodes_problem, shortfall
from hyperscale.logger import get_logger
from hyperscale.places import open_place

_logger = get_logger(__name__)

# Ray reads these after its import, and its processes inherit them: no warning about a future default, no doubled
# prints, and a dead worker is noticed within half a second.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

_OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Training moves nothing through Ray's object store; its default would take 30 % of the memory."""
_CONNECT_SECONDS = 5.0
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def join_cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address` or at RAY_ADDRESS, or start one that ends, and is deleted, with the block.

    Raises:
        ResourceError: nothing answers there, or it cannot be started.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
    elif address and address != "local":
        _check_reachable(address)
        with _connected(address, address=address):
            yield
    else:
        with _private_token(), _scratch() as folder:
            own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "_temp_dir": folder}
            with _connected("this machine", address="local", **own):
                yield


@contextmanager
def _connected(where: str, **options: Any) -> Iterator[None]:
    verbose = _logger.isEnabledFor(logging.DEBUG)
    try:
        ray.init(logging_level=logging.INFO if verbose else logging.ERROR, log_to_driver=verbose, **options)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        ray.shutdown()
        raise ResourceError(_no_cluster(where, str(error).strip().splitlines()[0].rstrip("."))) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise `ResourceError` if nothing answers; Ray itself would try for more than two minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ResourceError(_no_cluster(address, str(error))) from error
    if host is None or port is None:  # `auto`, or a form that Ray parses itself
        return
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ResourceError(_no_cluster(address, error.strerror or str(error))) from error


def _no_cluster(where: str, reason: str) -> str:
    return (
        f"no Ray cluster at {where}: {reason}. Start one with 'ray start --head', correct cluster.address or "
        "RAY_ADDRESS, or train without Ray: --launcher torchrun"
    )


@contextmanager
def _private_token() -> Iterator[None]:
    """Protect a cluster of our own with a token that lives as long as it does.

    Ray would write one into the home directory, after which every later `ray start` there asks for it.
    """
    before = {name: os.environ.get(name) for name in _TOKEN_VARIABLES}
    is_chosen = any(before.values()) or (Path.home() / ".ray" / "auth_token").exists()
    if not is_chosen:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _scratch() -> Iterator[str]:
    """Give Ray a folder of its own, with its logs; `--debug` keeps it."""
    # Short, whatever TMPDIR says: the paths of Ray's sockets below it may have 107 characters at most.
    folder = tempfile.mkdtemp(prefix="hyperscale-ray-", dir="/tmp")
    try:
        yield folder
    finally:
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.debug("Ray's logs are in %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def check_capacity(cluster: ClusterSettings) -> None:
    """Raise `ResourceError` if the workers cannot fit on the cluster, even if nobody else used it."""
    problem = shortfall(cluster, [node["Resources"] for node in _alive_nodes()])
    if problem:
        raise ResourceError(problem)


def wait_for_resources(cluster: ClusterSettings, say: Callable[[str], None]) -> None:
    """Wait `cluster.wait_minutes` for what others use now; `ResourceError` if the cluster stays busy."""
    required = required_resources(cluster)
    end = time.monotonic() + 60 * cluster.wait_minutes
    while True:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        missing = {name: amount for name, amount in required.items() if free.get(name, 0.0) + 1e-6 < amount}
        if not missing:
            return
        used = ", ".join(f"{amount:g} {name} asked, {free.get(name, 0.0):g} free" for name, amount in missing.items())
        if time.monotonic() > end:
            raise ResourceError(
                f"the cluster is busy ({used}) and stayed so for cluster.wait_minutes={cluster.wait_minutes:g}; "
                "stop another job, wait longer, or ask for fewer workers"
            )
        say(f"waiting for the cluster: {used}")
        time.sleep(1.0)


def check_shared_folder(output: str, tracking: TrackingSettings) -> None:
    """Put a file into the run folder and let every other node look for it.

    Raises:
        RunFolderError: a node does not see it, or the tracking database is a file although there are several nodes.
    """
    nodes = _alive_nodes()
    if len(nodes) < 2:
        return
    place = open_place(output).child(f".seen-{uuid.uuid4().hex[:8]}")
    place.fs.pipe_file(place.path, b"")
    try:
        answers = [
            _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(place)
            )
            for node in nodes
        ]
        # Two nodes may have one name and one address: those of one machine.
        blind = [
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            for node, answer in zip(nodes, ray.get(answers, timeout=120), strict=True)
            if not answer
        ]
    finally:
        place.fs.rm_file(place.path)
    problem = several_nodes_problem(output, tracking, blind)
    if problem:
        raise RunFolderError(problem)


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    return open_place(path).exists()
