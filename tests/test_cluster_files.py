"""The files of cluster/: each is parsed by what will read it, and every hyperscale command in them is tried."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import hyperscale
from hyperscale.config.loading import load_recipe
from hyperscale.config.run import Recipe
from hyperscale.launch.resources import several_nodes_problem

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
IMAGE = f"hyperscale:{hyperscale.__version__}"
COMMAND = re.compile(r"(?:^|\s)hyperscale ([a-z]+ .*)")


def scalars(node: Any) -> Iterator[str]:
    """Yield every text inside a parsed YAML document."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from scalars(value)
    elif isinstance(node, list):
        for value in node:
            yield from scalars(value)


def shell_texts(path: Path) -> list[str]:
    """Return the parts of a file that a shell will read, continued lines joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return [scalar for document in yaml.safe_load_all(text) for scalar in scalars(document)]
    if path.suffix == ".md":
        return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return ["\n".join(line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#"))]


def commands(path: Path) -> list[list[str]]:
    """Return the words after `hyperscale` of every command line in a file."""
    lines = [line for text in shell_texts(path) for line in text.splitlines()]
    return [shlex.split(match[1]) for line in lines for match in COMMAND.finditer(line)]


def resolved(words: list[str]) -> Recipe:
    """Return the recipe that `train` or `submit` would run."""
    overrides = [word for word in words[2:] if re.match(r"[a-z_.]+=", word)]
    return load_recipe(words[1], overrides)


FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
WITH_COMMANDS = [path for path in FILES if commands(path)]


def test_every_way_onto_a_cluster_shows_a_command() -> None:
    names = {path.relative_to(CLUSTER).as_posix() for path in WITH_COMMANDS}
    assert names == {"README.md", "kuberay/rayjob.yaml", "slurm/job.sbatch"}


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.relative_to(CLUSTER).as_posix())
def test_commands_of_cluster_files_resolve_to_valid_recipes(path: Path) -> None:
    for words in commands(path):
        assert words[0] in {"train", "submit"}
        recipe = resolved(words)
        assert recipe.cluster.workers >= 1
        assert several_nodes_problem(recipe.output, recipe.tracking, []) is None, (
            "the command runs on more than one node"
        )
        assert any(word.startswith("output=") for word in words), "the shared run folder is named on the line"
        if "--address" in words:
            assert words[0] == "submit"
            assert words[words.index("--address") + 1].startswith("http")


def test_the_program_knows_the_verbs() -> None:
    program = "import sys; from hyperscale.cli import main; sys.exit(main())"
    for verb in sorted({words[0] for path in WITH_COMMANDS for words in commands(path)}):
        result = subprocess.run(
            [sys.executable, "-c", program, verb, "--help"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert verb in result.stdout


def test_ray_up_accepts_the_cluster_file() -> None:
    config = yaml.safe_load((CLUSTER / "ray/cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(config)
    validate_config(prepare_config(config))
    assert config["docker"]["image"] == IMAGE
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_rayjob_is_whole() -> None:
    claim, job = yaml.safe_load_all((CLUSTER / "kuberay/rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__, "KubeRay wants the version that is in the image"
    assert cluster["authOptions"] == {"mode": "token"}
    recipe = resolved(commands(CLUSTER / "kuberay/rayjob.yaml")[0])

    gpus = 0
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() == volumes.keys()
            assert recipe.output.startswith(mounts["runs"] + "/"), "the run folder lies on the volume"
            gpus += group.get("replicas", 0) * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert gpus == recipe.cluster.workers * recipe.cluster.gpus_per_worker

    env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert env["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert all(isinstance(value, str) for value in env.values()), "Ray refuses environment values that are not text"


def test_the_slurm_script_asks_for_what_the_run_uses() -> None:
    script = CLUSTER / "slurm/job.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", script.read_text(), flags=re.MULTILINE))
    assert "exclusive" in options, "`ray symmetric-run` ends in `ray stop`"
    assert options["ntasks-per-node"] == "1"
    recipe = resolved(commands(script)[0])
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == recipe.cluster.workers
    assert recipe.cluster.address == "auto", "symmetric-run sets no RAY_ADDRESS"
    help_text = subprocess.run(
        [sys.executable, "-m", "ray.scripts.symmetric_run", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("--address", "--min-nodes"):
        assert option in script.read_text()
        assert option in help_text


def test_the_image_holds_what_the_build_needs() -> None:
    text = (CLUSTER / "docker/Dockerfile").read_text().replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in instructions][:2] == ["ARG", "FROM"]

    copied = [source for word, rest in instructions if word == "COPY" for source in rest.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "hyperscale", "ds_configs"} <= set(copied)
    admitted = (CLUSTER / "docker/Dockerfile.dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in admitted, source

    for word, rest in instructions:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    pins = subprocess.run(
        ["grep", "-v", "^torch==", ROOT / "constraints.txt"], capture_output=True, text=True, check=True
    )
    assert "torch==" not in pins.stdout
    assert "ray==" in pins.stdout
    assert f"-t {IMAGE} ." in (CLUSTER / "README.md").read_text()
