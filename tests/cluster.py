"""A private Ray head for tests, and what else they need to run the command line as its users do.

Nothing here touches another cluster on the machine: own ports, own folder, own token, and only own processes are ended.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
HYPERSCALE = str(BIN / "hyperscale")
SECONDS = 240.0


@dataclass(frozen=True)
class Cluster:
    """A running Ray head."""

    address: str
    """For ray.init: `127.0.0.1:port`."""
    dashboard: str
    """For jobs: `http://127.0.0.1:port`."""
    folder: Path
    """Ray's files; every process of this cluster names it on its command line or in its environment."""
    environment: Mapping[str, str]
    """What a client needs, token included."""


@contextmanager
def started_cluster(num_cpus: int, dashboard: bool = False, **variables: str) -> Iterator[Cluster]:
    """Start a Ray head, whose workers see `variables`, and end it with the block."""
    # A short path, whatever pytest's is: Ray's sockets lie below it, and 107 characters are their limit.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    ports = iter(free_ports(4))
    port, dashboard_port = next(ports), next(ports)
    environment = client_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--num-cpus={num_cpus}",
        f"--temp-dir={folder}",
        "--object-store-memory=100000000",
        f"--include-dashboard={str(dashboard).lower()}",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={next(ports)}",
        f"--ray-client-server-port={next(ports)}",
        "--disable-usage-stats",
    ]
    log = folder / "start.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: (answers(port) and "Ray runtime started" in log.read_text()) or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        if dashboard:
            wait_for(lambda: answers(dashboard_port))
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", folder, environment)
    finally:
        end(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def another_node(cluster: Cluster, num_cpus: int, hidden: Path) -> Iterator[None]:
    """Add a node to a cluster that has an empty folder where the others have `hidden`; needs root."""
    join = [str(BIN / "ray"), "start", "--block", f"--address={cluster.address}", f"--num-cpus={num_cpus}"]
    script = 'mount -t tmpfs none "$0" && exec "$@"'
    (port,) = free_ports(1)
    log = cluster.folder / "node.log"
    with log.open("wb") as output:
        node = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, str(hidden), *join, f"--dashboard-agent-listen-port={port}"],
            env=dict(cluster.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()
        yield
    finally:
        end(node, cluster.folder)  # and with it the whole cluster, which is of no more use


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Stop a Ray node that we have started, and whatever of it outlives its first process."""
    process.kill()  # asked nicely, it takes 20 s
    left = processes_of(folder)
    for survivor in left:
        with suppress(psutil.Error):
            survivor.kill()
    psutil.wait_procs(left, timeout=10)
    process.wait()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that name a folder on their command line or in their environment."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(folder) in word for word in words):
                processes.append(process)
    return processes


def client_environment(**variables: str) -> dict[str, str]:
    """Return our environment without what would lead a command to another cluster, with our commands on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}", "OMP_NUM_THREADS": "1", **variables}


def run(
    *arguments: object, environment: Mapping[str, str], folder: Path, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run `hyperscale ARGUMENTS` to its end in `folder`."""
    command = [HYPERSCALE, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@contextmanager
def started_run(project: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start `hyperscale train recipe.yaml ARGUMENTS` in a project, its log in `log.txt`; kill what is left of it."""
    with (project / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            # A background job of a shell ignores Ctrl-C, and so would its children, this suite's among them.
            ["env", "--default-signal=INT", HYPERSCALE, "train", "recipe.yaml", *arguments],
            cwd=project,
            env=client_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    family = psutil.Process(process.pid)
    try:
        yield process
    finally:
        with suppress(psutil.Error):
            for member in [*family.children(recursive=True), family]:
                with suppress(psutil.Error):
                    member.kill()
        process.wait()


def errors(stderr: str) -> list[str]:
    """Return the lines that begin with `error:`, without it."""
    return [line.removeprefix("error: ") for line in stderr.splitlines() if line.startswith("error: ")]


def wait_for(condition: Callable[[], object], seconds: float = SECONDS, every: float = 0.1) -> None:
    """Wait until a condition holds; fail when it takes too long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:g} s in vain"
        time.sleep(every)


def answers(port: int) -> bool:
    """Return whether something listens on a port of this machine."""
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


def free_ports(number: int) -> Sequence[int]:
    """Return free ports outside 10002-19999, from which Ray gives its workers theirs."""
    with _bound(number) as sockets:
        return [bound.getsockname()[1] for bound in sockets]


@contextmanager
def _bound(number: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield sockets
    finally:
        for each in sockets:
            each.close()


RECIPE = """
name: small
output: run
backbone: {{name: "{backbone}", dtype: float32}}
adaptation: {{adapters: [{{kind: lora, rank: 2, alpha: 2, targets: [q, v]}}]}}
data: {{tasks: [./feeling.yaml], validation_limit: 4}}
training:
  {{steps: 6, batch_size: 4, micro_batch_size: 2, checkpoint_every: 2, optimizer: {{warmup_steps: 1}}}}
engine: {{kind: zero}}
cluster: {{workers: 2}}
tracking: {{mlflow: {{uri: "sqlite:///{folder}/mlflow.db"}}, progress: {{every_steps: 1}}}}
"""


def write_project(folder: Path, backbone: Path) -> Path:
    """Write a user's folder: rows, a task file that names them by a variable, and a recipe, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        f'{{"text": "the {noun} was {word}", "label": "{label}"}}\n'
        for noun in ("plot", "camera", "film", "screen", "music", "table", "day", "mill")
        for label, words in {"good": ("lovely", "great", "happy"), "bad": ("thin", "dead", "scratched")}.items()
        for word in words
    ]
    (folder / "feeling.jsonl").write_text("".join(rows))
    (folder / "feeling.yaml").write_text(
        'source: feeling.jsonl\ninput: "Review: {text}\\nSentiment:"\nlabels: {good: positive, bad: negative}\n'
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(backbone=backbone, folder=folder))
    return recipe
