"""Tasks that were never trained, by their descriptions: `python -m benchmarks.held_out RUN TASK...`.

RUN was trained with `adaptation.task_encoder.kind: text`. The validation rows of each task are answered with the
adapter made from its own description, with those made from the descriptions of `RANDOM` tasks of the run drawn by
chance, and with the backbone alone; beside them what always giving the most common answer scores.
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import write_report
from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.config.data import DataSettings
from hyperscale.data.corpus import Corpus, load_corpus
from hyperscale.data.metrics import score
from hyperscale.data.tasks import Task, load_task
from hyperscale.engine.collective import SingleProcess
from hyperscale.export.exporter import TrainedGenerator, export_bundles, restore_generator
from hyperscale.inference.answers import Answerer, Question
from hyperscale.serving.describe import with_described_tasks
from hyperscale.serving.load import LoadedBundles, load_bundles
from hyperscale.tracking.metrics import main_score
from hyperscale.training.evaluation import majority_record

RANDOM = 3
ROWS = 300
BATCH = 64
OWN = "own"


def write_variants(task: Task, trained: TrainedGenerator, folder: Path) -> dict[str, Path]:
    """Write the task's file again under other names, with its own description and with those of other tasks."""
    others = random.Random(0).sample([known.description for known in trained.tasks], RANDOM)
    texts = {OWN: task.description, **{f"random_{number}": text for number, text in enumerate(others, start=1)}}
    files = {}
    for variant, text in texts.items():
        raw = task.model_dump(mode="json") | {
            "name": f"{task.name}_{variant}",
            "description": text,
        }
        files[variant] = folder / f"{raw['name']}.yaml"
        files[variant].write_text(yaml.safe_dump(raw), encoding="utf-8")
    return files


def measure(run: str, name: str, folder: Path) -> dict[str, Any]:
    """Return the main score of a task, in percent, by the adapter that answers."""
    trained = restore_generator(load_checkpoint(find_checkpoint(run), only=("generator",)))
    files = write_variants(load_task(name, trained.recipe.data.task_folders), trained, folder)
    described = with_described_tasks(trained, [str(path) for path in files.values()])
    names = [path.stem for path in files.values()]
    bundles = export_bundles(described, folder / "bundles", names)
    loaded = load_bundles([bundles[name] for name in names])
    settings = DataSettings(
        tasks=tuple(str(path) for path in files.values()),
        max_source_tokens=trained.recipe.data.max_source_tokens,
        max_target_tokens=trained.recipe.data.max_target_tokens,
        validation_limit=ROWS,
    )
    corpus = load_corpus(settings, loaded.tokenizer, loaded.model.architecture.is_encoder_decoder)
    by_adapter = dict(zip(files, answered(corpus, loaded, adapted=True), strict=True))
    chance = [of_variant for variant, of_variant in by_adapter.items() if variant != OWN]
    majority = main_score(majority_record(corpus).scores[names[0]])
    return {
        "rows": len(corpus.tasks[0].validation.encoded),
        "majority": majority,
        "none": answered(corpus, loaded, adapted=False)[0],
        "random": chance,
        OWN: by_adapter[OWN],
    }


def answered(corpus: Corpus, loaded: LoadedBundles, adapted: bool) -> list[float]:
    """Return the main score of each task of the corpus; its place is its bundle's."""
    tokenizers = [one.tokenizer for one in corpus.tasks]
    answerer = Answerer(loaded.model, SingleProcess(), loaded.device, tokenizers, corpus.layout, BATCH, lambda *_: None)
    scores = []
    for index, one in enumerate(corpus.tasks):
        examples = one.validation.examples
        pairs = zip(examples, one.validation.encoded, strict=True)
        questions = [Question(index, encoded, example.candidates) for example, encoded in pairs]
        with torch.no_grad():
            answers = answerer(questions, adapted=adapted)
        value = main_score(score(one.task, answers, [example.target for example in examples]))
        assert value is not None, f"{one.task.name} has no main score"
        scores.append(value)
    return scores


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [
        f"| task | rows | majority | backbone alone | {RANDOM} random descriptions (mean) | own description |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        chance = ", ".join(f"{one:.1f}" for one in result["random"])
        lines.append(
            f"| {name} | {result['rows']} | {result['majority']:.1f} | {result['none']:.1f} "
            f"| {chance} ({statistics.fmean(result['random']):.1f}) | {result[OWN]:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the tasks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder or a checkpoint")
    parser.add_argument("tasks", nargs="+", metavar="task", help="names or files of tasks that the run did not train")
    options = parser.parse_args()
    results = {}
    for name in options.tasks:
        with tempfile.TemporaryDirectory(prefix="held-out-") as scratch:
            results[name] = measure(options.run, name, Path(scratch))
    print(table(results))
    write_report("held_out", {"benchmark": "held_out", "run": options.run, "results": results})


if __name__ == "__main__":
    main()
