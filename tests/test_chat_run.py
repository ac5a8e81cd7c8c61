"""Conversations beside an ordinary task: validated, trained, scored, exported, and answered from the bundles."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperscale.config.data import DataSettings
from hyperscale.data.collate import IGNORED, Layout, collate_examples
from hyperscale.data.corpus import load_corpus
from tests.command import run
from tests.runs import make_recipe, write_tasks
from tests.test_own_task import read_rows, shown_scores, write_rows

ROOT = Path(__file__).parents[1]
SYSTEM = {"role": "system", "content": "You answer in one word."}


def talk(number: int) -> list[dict[str, str]]:
    texts = (f"Is the film number {number} good?", "It is.", "And the music?", "lovely" if number % 2 else "dull")
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]


CHATS = [{"messages": [SYSTEM, *talk(number)]} for number in range(20)]
ORDERS = [
    {"instruction": "Write in capitals.", "input": f"word {number}", "output": f"WORD {number}"} for number in range(20)
]


def write_files(folder: Path, backbone: Path) -> Path:
    """Write two tasks of conversations, a classification and a recipe of three steps; return the recipe's file."""
    feeling, *_ = write_tasks(folder)
    write_rows(folder / "chats.jsonl", CHATS)
    write_rows(folder / "orders.jsonl", ORDERS)
    chats = {
        "source": "chats.jsonl",
        "conversation": True,
        "metrics": ["token_f1", "rougeL", "chrf"],
        "max_new_tokens": 5,
    }
    orders = {"source": "orders.jsonl", "conversation": True, "system": "Be exact.", "max_new_tokens": 5}
    (folder / "chats.yaml").write_text(yaml.safe_dump(chats))
    (folder / "orders.yaml").write_text(yaml.safe_dump(orders))
    tasks = [feeling, str(folder / "chats.yaml"), str(folder / "orders.yaml")]
    recipe = make_recipe(backbone, tasks, folder / "run", data={"validation_limit": 3}, training={"steps": 3})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return path


def test_train_evaluate_export_and_predict(
    tmp_path: Path, tiny_llama_folder: Path, tiny_t5_folder: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = write_files(tmp_path, tiny_llama_folder)
    valid = run(capsys, "validate", recipe)
    assert valid.code == 0, valid.err
    assert "chats         18 training rows       2 validation rows" in valid.out
    listed = run(capsys, "tasks", "--folder", tmp_path)
    (line,) = (line for line in listed.out.splitlines() if line.startswith("chats "))
    assert line.split()[1:6] == ["conversation", "token_f1,", "rougeL,", "chrf", "file"]
    shown = run(capsys, "tasks", "chats", "--folder", tmp_path)
    assert "prompt\n  system: You answer in one word.\n  user: Is the film number" in shown.out
    assert "  user: And the music?\nanswer\n  " in shown.out

    trained = run(capsys, "train", recipe, "--launcher", "local")
    assert trained.code == 0, trained.err
    names = ["feeling", "chats", "orders"]
    scores = shown_scores(trained.out, names)
    assert list(scores) == names
    evaluated = run(capsys, "evaluate", tmp_path / "run")
    assert shown_scores(evaluated.out, names) == scores
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert list(result["evaluations"][-1]["scores"]["chats"]) == ["token_f1", "rougeL", "chrf"]
    answers = [row for row in read_rows(tmp_path / "run/predictions/validation.jsonl") if row["task"] == "chats"]
    assert {row["reference"] for row in answers} <= {"lovely", "dull"}
    assert all(row["input"].endswith("user: And the music?") for row in answers)
    manifest = json.loads((tmp_path / "run/bundles/orders/hyperscale.json").read_text())
    assert (manifest["task"]["conversation"]["tools"], manifest["task"]["system"]) == ("tools", "Be exact.")

    # Who has the last word makes no difference: the last answer is what is asked for.
    shortened = [{"task": "chats", "messages": CHATS[0]["messages"][:count]} for count in (4, 5)]
    rows = [
        *shortened,
        {"task": "orders", **ORDERS[0]},
        {"task": "orders", "instruction": "Write in capitals.\n\nword 0"},
    ]
    write_rows(tmp_path / "questions.jsonl", [*rows, {"task": "feeling", "text": "the plot was thin"}])
    bundles = [tmp_path / "run/bundles" / name for name in names]
    place = ("--input", tmp_path / "questions.jsonl", "--output", tmp_path / "answers.jsonl")
    predicted = run(capsys, "predict", *bundles, *place)
    assert predicted.code == 0, predicted.err
    answered = [row["prediction"] for row in read_rows(tmp_path / "answers.jsonl")]
    assert answered[0] == answered[1] != ""
    assert answered[2] == answered[3] != ""
    assert answered[4] in ("positive", "negative")
    write_rows(
        tmp_path / "questions.jsonl", [{"task": "chats", "messages": [*shortened[0]["messages"], {"role": "user"}]}]
    )
    failed = run(capsys, "predict", *bundles, *place)
    assert failed.errors == [f"{tmp_path}/questions.jsonl:1: task 'chats': message 5: the user's turn has no content"]

    t5 = run(capsys, "validate", recipe, f"backbone.name={tiny_t5_folder}")
    assert t5.code != 0
    assert [error for error in t5.errors if "need a decoder-only backbone; an encoder-decoder has no chat" in error]


def test_bad_rows_and_missing_libraries_stop_a_run_with_one_message(
    tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recipe = write_files(tmp_path, tiny_llama_folder)
    write_rows(tmp_path / "chats.jsonl", [*CHATS, {"messages": CHATS[0]["messages"][:-1]}])
    failed = run(capsys, "train", recipe, "--launcher", "local")
    assert failed.code != 0
    assert [error.partition(";")[0] for error in failed.errors] == [
        f"{tmp_path}/chats.jsonl:21: task 'chats': the last turn is the user's"
    ]
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    failed = run(capsys, "validate", recipe)
    assert failed.code != 0
    assert "metric rougeL needs the package rouge-score: pip install 'hypernet-scale[metrics]'" in failed.errors[0]


def test_the_loss_is_transformers_own_with_these_labels(tmp_path: Path, tiny_llama_folder: Path):
    write_files(tmp_path, tiny_llama_folder)
    settings = DataSettings(tasks=(str(tmp_path / "chats.yaml"), str(tmp_path / "orders.yaml")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    corpus = load_corpus(settings, tokenizer, is_encoder_decoder=False)
    rows = [corpus.tasks[0].train.encoded[0], corpus.tasks[1].train.encoded[0]]
    batch = collate_examples(rows, [0, 1], Layout(tokenizer.pad_token_id, is_encoder_decoder=False))
    trained = [[token for token in row if token != IGNORED] for row in batch.labels.tolist()]
    first = tokenizer.decode(trained[0])
    assert (first.startswith("It is.</s>"), first.endswith("</s>"), first.count("</s>")) == (True, True, 2)
    assert tokenizer.decode(trained[1]).startswith("WORD ")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        theirs = model(**inputs, labels=batch.labels).loss
        likelihoods = model(**inputs).logits.log_softmax(-1)
    chosen = [
        likelihoods[row, place - 1, token]
        for row, labels in enumerate(batch.labels.tolist())
        for place, token in enumerate(labels)
        if token != IGNORED
    ]
    assert len(chosen) == sum(map(len, trained))
    assert -torch.stack(chosen).mean() == pytest.approx(theirs.item(), rel=1e-5)


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs/tasks.md").read_text()
    return [piece.partition("```")[0] for piece in page.split(f"```{language}\n")[1:]]


def test_task_files_and_rows_in_the_documentation(tmp_path: Path):
    from hyperscale.data.examples import renderer
    from hyperscale.data.rows import Row
    from hyperscale.data.tasks import load_task

    tasks = []
    for number, block in enumerate(blocks("yaml")):
        (tmp_path / f"task{number}.yaml").write_text(block)
        tasks.append(load_task(str(tmp_path / f"task{number}.yaml")))
    assert [task.kind for task in tasks] == ["conversation", "conversation", "tagging"]
    rows: list[Mapping[str, object]] = [json.loads(line) for line in "".join(blocks("json")).splitlines()]
    examples = [renderer(tasks[0]).example(Row(row, "docs")) for row in rows]
    assert [example.source for example in examples] == [
        "user: Why is the sky blue?",
        "user: Why is the sky blue?",
        "user: Translate into German.\n\nThe sky is blue.",
    ]
