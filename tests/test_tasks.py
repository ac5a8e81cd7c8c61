"""Task files: what may be left out, what is refused, and how a task is found."""

import re
from pathlib import Path

import pytest

from hyperscale.data import templates
from hyperscale.data.origins import AssetSource, FileSource, HubSource
from hyperscale.data.tasks import Task, list_tasks, load_task
from hyperscale.errors import DataError

TREC = """
description: What kind of thing a question asks for.
source: trec
input: "{text}\\nType:"
labels: {0: abbreviation, 1: entity, 2: description, 3: person, 4: place, 5: number}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[str]:
    path = write(folder, "bad", text)
    with pytest.raises(DataError) as caught:
        load_task(str(path))
    return [line.removeprefix(str(path)).lstrip(":") for line in str(caught.value).splitlines()]


def test_a_short_file_is_a_whole_task(tmp_path: Path):
    task = load_task(str(write(tmp_path, "trec", TREC)))
    assert (task.name, task.version, task.label_column, task.target) == ("trec", "1", "label", "{label}")
    assert task.labels is not None
    assert task.labels["3"] == "person"
    assert task.metrics == ("accuracy",)
    assert task.positive_label == "number"
    assert task.source == FileSource(path=str(tmp_path / "trec"))
    assert Task.model_validate(task.model_dump(mode="json")) == task  # as bundles keep it

    free = load_task(str(write(tmp_path, "free", 'source: {train: a.jsonl}\ninput: "{q}"\ntarget: "{a}"')))
    assert (free.metrics, free.label_column, free.labels) == (("exact_match",), None, None)
    inferred = load_task(
        str(write(tmp_path, "inferred", 'source: a.csv\ninput: "{q}"\ntarget: "{a}"\nmetrics: accuracy'))
    )
    assert (inferred.metrics, inferred.label_column) == (("accuracy",), "a")


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start = 'input: "{q}"\ntarget: "{a}"\nsource: '
    asset = load_task(str(write(tmp_path, "one", start + "{asset: words, subset: plural}")))
    assert asset.source == AssetSource(asset="words", subset="plural")
    hub = load_task(str(write(tmp_path, "two", start + "{kind: hub, path: nyu-mll/glue, name: sst2}")))
    assert hub.source == HubSource(path="nyu-mll/glue", name="sst2")
    monkeypatch.setenv("ROWS", "/data/rows")
    task = load_task(str(write(tmp_path, "three", start + "{train: '${ROWS}/a.jsonl', test: '../b.jsonl'}")))
    assert task.source == FileSource(train="/data/rows/a.jsonl", test=str(tmp_path.parent / "b.jsonl"))
    home = load_task(str(write(tmp_path, "four", start + "~/rows.jsonl")))
    assert isinstance(home.source, FileSource)
    assert home.source.path == str(Path.home() / "rows.jsonl")
    monkeypatch.delenv("ROWS")
    later = load_task(str(tmp_path / "three.yaml"))  # listing a task must not need its variables
    assert isinstance(later.source, FileSource)
    assert later.source.train == "${ROWS}/a.jsonl"


def test_a_hub_source_may_lie_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ROWS", raising=False)
    text = 'input: "{q}"\ntarget: "{a}"\nsource: {kind: hub, path: owner/set, folder: "${ROWS}/set"}'
    path = str(write(tmp_path, "one", text))

    def folder() -> Path | None:
        source = load_task(path).source
        assert isinstance(source, HubSource)
        return source.local_folder

    assert folder() is None
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    assert folder() is None
    (tmp_path / "rows" / "set").mkdir(parents=True)
    assert folder() == tmp_path / "rows" / "set"
    monkeypatch.setenv("ROWS", "rows")  # as everywhere in a task file, relative to it
    assert folder() == tmp_path / "rows" / "set"


def test_tagging_is_a_line(tmp_path: Path):
    task = load_task(str(write(tmp_path, "slots", "source: a.jsonl\ntagging: {tokens: words, tags: slots}")))
    assert (task.kind, task.input, task.target, task.metrics) == ("tagging", "{words}", "{slots}", ("span_f1",))
    assert task.max_new_tokens == 256
    for is_encoder_decoder, expected in ((True, "sentinels"), (False, "lines")):
        written = task.written_for(is_encoder_decoder)
        assert written.tagging is not None
        assert written.tagging.format == expected
        assert written.written_for(not is_encoder_decoder) == written
        assert Task.model_validate(written.model_dump(mode="json")) == written
    assert load_task("plural").written_for(True) == load_task("plural")


def test_every_mistake_of_a_file_is_reported_at_once(tmp_path: Path):
    messages = problems(
        tmp_path,
        'nme: x\nsource: {kind: fil, path: x}\ninput: "{text}}"\n'
        "metrics: [accurcy]\nlabels: {0: no, 1: yes}\nchat: 3\n",
    )
    assert [line.split(": ")[:2] for line in messages] == [
        ["2", "source.kind"],
        ["3", "input"],
        ["5", "labels"],
        ["4", "metrics[0]"],
        ["6", "chat"],
        ["1", "nme"],
    ]
    assert messages[0].endswith("'fil' is not allowed: must be one of file, asset, hub. Did you mean 'file'?")
    assert "'}' at character 7 has no partner" in messages[1]
    assert "put such words in quotes" in messages[2]
    assert messages[3].endswith("Did you mean 'accuracy'?")
    assert "Did you mean 'name'?" in messages[5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('source: a.jsonl\ninput: "{q}"', "target: required, but missing"),
        ('source: a.jsonl\ninput: "no column"\ntarget: "{a}"', "input: the template names no column"),
        ('source: {kind: file}\ninput: "{q}"\ntarget: "{a}"', "source: name the rows: path"),
        (
            'source: {path: a, train: b}\ninput: "{q}"\ntarget: "{a}"',
            "source: path and train, validation, test exclude",
        ),
        ('source: a\ninput: "{q}"\nlabels: {0: same, 1: same}', "labels: a classification needs at least two"),
        ('source: a\ninput: "{q}"\ntarget: "{q} {y}"\nlabel_column: y', "target of a classification may hold only"),
        ('source: a\ninput: "{q}"\nlabel_column: y\nmetrics: [f1]', "metric f1 needs positive_label"),
        ('source: a\ninput: "{q}"\nlabels: {0: a, 1: b}\npositive_label: c', "positive_label 'c' is not one of"),
        ('source: a\ninput: "{q}"\ntarget: "{a}"\nsystem: Be brief.', "system is only used with chat: true"),
        ("source: a\ntagging: {}\nlabels: {0: a, 1: b}", "tagging and labels exclude each other"),
        (
            'source: a\ntagging: {}\ntarget: "{tags}."',
            "target of tagging must be the tags alone, '{tags}'; leave it out",
        ),
        ('source: a\ntagging: {tokens: words}\ninput: "{tokens}"', "input must hold the words, '{words}'"),
        (
            "source: a\ntagging: {format: line}",
            "tagging.format: 'line' is not allowed: must be one of sentinels, lines",
        ),
        ('source: a\ninput: "{q}"\nlabels: {0: a, 1: b}\nround_to: 0.2', "round_to is for answers that are numbers"),
        ('source: a\ninput: "{q}"\ntarget: "{a}"\nmetrics: []', "metrics: needs at least 1 entry, has 0"),
        ("- a list", "a task is a mapping of keys to values, not list"),
    ],
)
def test_a_mistake_has_one_clear_line(tmp_path: Path, text: str, message: str):
    (line,) = problems(tmp_path, text)
    assert re.sub(r"^\d*:? ", "", line).startswith(message)


def test_malformed_yaml_names_the_line(tmp_path: Path):
    path = write(tmp_path, "broken", 'name: broken\ninput: "{q}\ntarget: x: y')
    with pytest.raises(DataError, match=r"broken\.yaml:\d+: not valid YAML"):
        load_task(str(path))


def test_tasks_are_found_by_path_by_file_and_by_name(tmp_path: Path):
    path = write(tmp_path, "trec", TREC)
    write(tmp_path, "other", "name: trec_fine\n" + TREC)
    write(tmp_path, "broken", "a: [")
    assert load_task("trec", [tmp_path]) == load_task(str(path))
    assert load_task("trec_fine", [str(tmp_path)]).name == "trec_fine"
    with pytest.raises(DataError, match=r"unknown task 'trek'\. Did you mean 'trec'\? Known: .*trec"):
        load_task("trek", [tmp_path])
    with pytest.raises(DataError, match=r"task file 'nowhere/trec\.yaml' does not exist"):
        load_task("nowhere/trec.yaml", [tmp_path])
    with pytest.raises(DataError, match=r"task folder '.*missing' does not exist"):
        load_task("trec", [tmp_path / "missing"])


def test_packaged_tasks_are_listed_and_hidden_by_files_of_the_same_name(tmp_path: Path):
    packaged = {task.name: task for task in list_tasks()}
    assert {"tweets", "movies", "products", "news", "past_tense", "plural"} <= packaged.keys()
    assert [name for name, task in packaged.items() if not re.search(r"[.?)]$", task.description)] == []
    assert all(load_task(name) == task for name, task in packaged.items())
    write(tmp_path, "movies", TREC)
    ours = {task.name: task for task in list_tasks([tmp_path])}
    assert ours.keys() == packaged.keys()
    assert ours["movies"].source == FileSource(path=str(tmp_path / "trec"))


def test_templates_fill_columns_and_nothing_else():
    template = templates.parse("{{literal}} {a} and { b c }: {a}")
    assert template.columns == ("a", "b c")
    assert template.render({"a": "{b c}", "b c": "2"}) == "{literal} {b c} and 2: {b c}"
    assert templates.parse("{a.__class__!r}").columns == ("a.__class__!r",)  # a name, not an expression
    for wrong in ("{", "a } b", "{}", "{ }", "{a{b}}"):
        with pytest.raises(ValueError, match="at character"):
            templates.parse(wrong)
    values = ["text", 3, 3.5, True, ["O", "B-x", 2]]
    assert [templates.text_of(value) for value in values] == ["text", "3", "3.5", "true", "O B-x 2"]
    for value, reason in ((None, "is null"), ({"a": 1}, "nested dict"), ([["a"]], "nested list")):
        with pytest.raises(ValueError, match=reason):
            templates.text_of(value)
