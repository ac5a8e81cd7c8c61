"""The password of a tracker's URI reaches the tracker, and nothing that a run leaves behind."""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from hyperscale.cli import main
from tests import cluster
from tests.mlflow_server import free_port, mlflow_server
from tests.runs import write_tasks

PASSWORD = "p@ss/w0rd-hunter2"
FORMS = (PASSWORD, "p%40ss%2Fw0rd-hunter2", "p%40ss/w0rd-hunter2", "w0rd-hunter2")
FORMS += (base64.b64encode(f"user:{PASSWORD}".encode()).decode(),)
METHODS = {"hypernetwork": {}, "shared": {"settings": {"adaptation.generator.kind": "shared"}}}


@dataclass
class Place:
    """A folder with a server, runs and everything that their commands printed."""

    folder: Path
    port: int
    printed: dict[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"http://user:{PASSWORD}@127.0.0.1:{self.port}"

    def command(self, *arguments: object, **variables: str) -> str:
        """Run `hyperscale ARGUMENTS` in a process of its own; it must succeed. Return what it printed."""
        done = cluster.run(*arguments, environment=cluster.client_environment(**variables), folder=self.folder)
        self.printed[" ".join(map(str, arguments))] = done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def write(self, name: str, values: Mapping[str, object]) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(values))
        return path

    def names_of_runs(self) -> list[str]:
        client = MlflowClient(f"http://127.0.0.1:{self.port}")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return [str(run.info.run_name).partition("_lr")[0] for run in client.search_runs(experiments)]

    def leaks(self, *others: Path, but: Path) -> list[str]:
        """Return the files and outputs that hold the password in any form.

        `but`: the recipe that the user wrote; `others`: more folders to search.
        """
        needles = [form.encode() for form in FORMS]
        files = [path for folder in (self.folder, *others) for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 20
        leaking = [str(path) for path in files if path != but and any(form in path.read_bytes() for form in needles)]
        return leaking + [name for name, text in self.printed.items() if any(form in text for form in FORMS)]


@dataclass
class Terminal:
    """Runs commands in this process, which starts none; keeps what they print."""

    place: Place
    capture: pytest.CaptureFixture[str]

    def run(self, code: int, *arguments: object) -> str:
        """Run `hyperscale ARGUMENTS`, which must end with this exit code, and return what it printed."""
        ended = main([str(argument) for argument in arguments])
        output, errors = self.capture.readouterr()
        self.place.printed[" ".join(map(str, arguments))] = output + errors
        assert ended == code, output + errors
        return output + errors


@pytest.fixture
def terminal(place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.chdir(place.folder)
    return Terminal(place, capfd)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Iterator[Place]:
    folder, port = tmp_path_factory.mktemp("place"), free_port()
    with mlflow_server(folder, port):
        place = Place(folder, port)
        write_recipe(place, tiny_llama_folder)
        yield place


def write_recipe(place: Place, backbone: Path) -> Path:
    training = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 1, "evaluate_untouched": False}
    recipe = {
        "name": "base",
        "output": str(place.folder / "runs/base"),
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "adaptation": {"adapters": [{"kind": "lora", "rank": 2}]},
        "data": {"tasks": write_tasks(place.folder / "tasks")[:2], "validation_limit": 4},
        "training": training | {"optimizer": {"warmup_steps": 1, "learning_rate": 0.01}},
        "engine": {"kind": "local"},
        "cluster": {"workers": 1},
        "tracking": {"mlflow": {"uri": place.uri}},
    }
    return place.write("recipe.yaml", recipe)


def test_a_password_is_nowhere_in_what_runs_leave_behind(
    place: Place, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = place.folder / "recipe.yaml", place.folder / "runs/base"
    local = ("--launcher", "local")
    terminal.run(0, "train", recipe, *local)
    assert list((run / "bundles").iterdir())
    (run / "result.json").unlink()
    terminal.run(0, "train", recipe, *local, "--resume", "training.steps=4")

    # The recipe of a run folder has lost the password: it comes from the environment, or the run does not start.
    masked = yaml.safe_load((run / "recipe.yaml").read_text())["tracking"]["mlflow"]["uri"]
    assert masked == f"http://***@127.0.0.1:{place.port}"
    again = ("train", run / "recipe.yaml", *local, f"output={place.folder / 'runs/again'}", "name=again")
    adapt = ("adapt", run, "--task", place.folder / "tasks/plural.yaml", *local)
    for command in (again, adapt):
        assert "run folders hold no passwords" in terminal.run(2, *command)
    assert not (place.folder / "runs/again").exists()
    with monkeypatch.context() as variables:
        variables.setenv("MLFLOW_TRACKING_URI", place.uri)
        for command in (again, adapt, ("track", run)):
            terminal.run(0, *command)
    terminal.run(0, "evaluate", run)
    terminal.run(0, "export", run, "--output", place.folder / "exported")

    assert {"again", "base", "base-plural"} <= set(place.names_of_runs())
    assert place.leaks(but=recipe) == []


@pytest.mark.long
def test_a_password_is_nowhere_in_what_a_comparison_leaves_behind(place: Place) -> None:
    """Its children get the password in their environment."""
    recipe, local = place.folder / "recipe.yaml", ("--launcher", "local")
    comparison = {"recipe": str(recipe), "methods": METHODS, "baseline": "shared", "resamples": 100}
    comparison |= {"name": "two", "output": "results", "settings": {"training.steps": 2}}
    comparison |= {"learning_rates": [0.001], "seeds": [1], "split": "validation"}
    place.command("compare", place.write("comparison.yaml", comparison), *local, "--jobs", "2")
    assert {"hypernetwork", "shared", "two"} <= set(place.names_of_runs())
    assert len(list((place.folder / "results/recipes").iterdir())) == 2
    assert place.leaks(but=recipe) == []


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_password_is_nowhere_in_what_two_workers_leave_behind(place: Place, launcher: str) -> None:
    """Ray's own logs and files are searched too: the recipe of a run travels through it."""
    recipe, run = place.folder / "recipe.yaml", place.folder / "runs" / launcher
    words = ("--launcher", launcher, f"output={run}", f"name={launcher}", "cluster.workers=2", "engine.kind=zero")
    if launcher == "ray":
        with cluster.started_cluster(num_cpus=2) as head:
            place.command("train", recipe, *words, **head.environment | {"RAY_ADDRESS": head.address})
            leaks = place.leaks(head.folder, but=recipe)
    else:
        place.command("train", recipe, *words)
        leaks = place.leaks(but=recipe)
    assert launcher in place.names_of_runs()
    assert (run / "bundles/feeling/hyperscale.json").is_file()
    assert leaks == []
