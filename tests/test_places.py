"""Local paths and URIs go through one type; `pathlib.Path` never sees what may be a URI."""

import ast
import re
from pathlib import Path

import pytest

from hyperscale.api.bundles import load_bundles
from hyperscale.cli import main
from hyperscale.errors import RunFolderError
from hyperscale.places import local_path, open_place

PACKAGE = Path(__file__).resolve().parent.parent / "hyperscale"

MAY_BE_A_URI = re.compile(
    r"output|folder|checkpoint|bundle|uri|place|root|source|result|target|\brun\b|(?<!\bos)\.path\b", re.IGNORECASE
)
MADE_HERE = ("tempfile.", "snapshot_download(", "str(resources.files(")

LOCAL_ONLY = {
    "compare/schedule.py: Path(comparison.folder)": "the folder of the comparison's file",
    "compare/schedule.py: Path(comparison.output)": "load_comparison makes it a local path",
    "compare/schedule.py: Path(recipe.output)": "it lies below the comparison's output",
    "compare/table.py: Path(outcome.comparison.output)": "load_comparison makes it a local path",
    "commands.py: Path(comparison.output)": "load_comparison makes it a local path",
    "config/comparison.py: Path(output)": "it has been made absolute",
    "config/loading.py: Path(os.path.expandvars(raw['output']))": "URIs are left out in the line before",
    "data/origins.py: Path(self.folder)": "the folder of a data set's files",
    "data/sources.py: Path(source.path)": "the folder of a task's rows",
    "terminal/task_listing.py: Path(source.path or source.train or '')": "a task's rows",
    "launch/torchrun.py: Path(folder)": "the node's own folder of error files",
    "places.py: Path(self.path)": "the one door, which asks first",
    "run/outcome.py: Path(bundle)": "bundles of a remote run are exported to this machine first",
    "tracking/mlflow_run.py: Path(uri.removeprefix('sqlite:///'))": "a database file",
    "tracking/wandb.py: Path(self._settings.folder)": "a folder of this machine by its documentation",
}


def paths_made_of_uris(files: dict[str, str]) -> list[str]:
    """Return `file: Path(…)` for every call whose argument's name says that it may be a URI."""
    calls = []
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path" and node.args:
                first = ast.unparse(node.args[0])
                if MAY_BE_A_URI.search(first) and not first.startswith(MADE_HERE):
                    calls.append(f"{name}: Path({', '.join(ast.unparse(part) for part in node.args)})")
    return calls


def test_no_path_is_made_of_what_may_be_a_uri() -> None:
    sources = {str(file.relative_to(PACKAGE)): file.read_text("utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    calls = paths_made_of_uris(sources)
    assert [call for call in calls if call not in LOCAL_ONLY] == [], "use open_place, or local_path with a clear error"
    assert [known for known in LOCAL_ONLY if known not in calls] == [], "no longer there: take it off the list"


def test_the_search_sees_the_mistakes_of_old() -> None:
    adapt = "folder = Path(before.output)\nchanges = {'output': str(folder.with_name('run-new'))}"
    page = "places['bundles'] = _nearby(str(Path(next(iter(result.bundles.values()))).parent))"
    assert len(paths_made_of_uris({"run/adapt.py": adapt})) == 1
    assert len(paths_made_of_uris({"run/outcome.py": page})) == 1


def test_a_place_is_the_same_for_paths_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(open_place("runs/../runs/demo/")) == f"{tmp_path}/runs/demo"
    assert open_place("..").local_path == tmp_path.parent
    remote = open_place("memory://bucket/run")
    assert str(remote.parent.child("other")) == "memory:///bucket/other"
    assert not remote.exists()
    with pytest.raises(RunFolderError, match="memory:///bucket/run is not on this machine"):
        _ = remote.local_path
    with pytest.raises(RunFolderError, match=r"nosuch://x: .*Use a path"):
        open_place("nosuch://x")


@pytest.mark.parametrize("uri", ["s3://bucket/run", Path("s3://bucket/run")], ids=["text", "path"])
def test_a_uri_for_a_local_path_is_an_error(uri: str | Path) -> None:
    with pytest.raises(RunFolderError, match=r"s3:/.* is a URI.*Give a local path"):
        local_path(uri)
    with pytest.raises(RunFolderError, match="is a URI"):
        load_bundles(uri)
    assert local_path("runs/a:b") == Path("runs/a:b")


def test_bundles_are_not_exported_into_a_folder_named_like_a_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "anything", "--output", "s3://bucket/bundles"]) != 0
    assert "s3:/bucket/bundles is a URI" in capsys.readouterr().err
    assert main(["predict", "s3://bucket/b", "--input", "rows.jsonl", "--output", "out.jsonl"]) != 0
    assert list(tmp_path.iterdir()) == []
