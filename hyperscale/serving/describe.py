"""Tasks that were never trained: their weights come from their descriptions."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoTokenizer

from hyperscale.data.corpus import pad_token_id
from hyperscale.data.descriptions import encode_descriptions
from hyperscale.data.tasks import Task, load_task
from hyperscale.errors import BundleError, DataError
from hyperscale.export.exporter import TrainedGenerator
from hyperscale.logger import get_logger
from hyperscale.model.backbone import load_dense, open_backbone
from hyperscale.model.description import text_features

_logger = get_logger(__name__)


def with_described_tasks(trained: TrainedGenerator, names: Sequence[str | Task]) -> TrainedGenerator:
    """Return a trained generator that also knows tasks by their descriptions; loads the backbone to read them.

    Args:
        names: tasks, task names or files; a classification must list its `labels`.

    Raises:
        BundleError: the generator does not read descriptions, or the backbone is another one now.
        DataError: a task is known already, has no description, or takes its labels from data.
    """
    if not trained.recipe.adaptation.reads_descriptions:
        raise BundleError(
            "descriptions need a generator trained with adaptation.task_encoder.kind=text; this one knows its tasks by "
            "number. Train the new task instead: hyperscale adapt"
        )
    is_encoder_decoder = trained.architecture.is_encoder_decoder
    folders = trained.recipe.data.task_folders
    loaded = [name if isinstance(name, Task) else load_task(name, folders) for name in names]
    tasks = [task.written_for(is_encoder_decoder) for task in loaded]
    for task in tasks:
        _check_describable(task, [known.name for known in trained.tasks])
    folder = open_backbone(trained.recipe.backbone)
    if folder.digest() != trained.backbone["digest"]:
        raise BundleError(f"{folder.path} is another backbone than the one that the checkpoint was trained with")
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    batch = encode_descriptions(tasks, tokenizer, pad_token_id(tokenizer))
    _logger.info("reading the descriptions with %s", trained.recipe.backbone.name)
    backbone = load_dense(folder, trained.recipe.backbone)
    features = text_features(backbone, folder.architecture, batch.input_ids, batch.attention_mask)
    encoder: torch.nn.Module = trained.generator.task_encoder  # type: ignore[assignment]
    encoder.append(features)  # type: ignore[operator]
    nothing = (None,) * len(tasks)
    origins = trained.origins or (None,) * len(trained.tasks)
    return replace(trained, tasks=(*trained.tasks, *tasks), origins=(*origins, *nothing))


def _check_describable(task: Task, known: Sequence[str]) -> None:
    if task.name in known:
        raise DataError(f"task '{task.name}' was trained; export it without --describe")
    if task.label_column is not None and task.labels is None:
        raise DataError(f"task '{task.name}' takes its labels from its rows, which are not read here; list labels")
