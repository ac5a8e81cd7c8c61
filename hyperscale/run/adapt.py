"""`hyperscale adapt`: teach new tasks to the generator of an earlier run.

The new run is an ordinary run. Its recipe names the checkpoint in `start`, so it resumes, is tracked and exports like
any other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hyperscale.checkpoint.manifest import check_manifest
from hyperscale.checkpoint.store import Checkpoint, find_checkpoint, load_checkpoint
from hyperscale.config.loading import change_recipe, parse_recipe
from hyperscale.config.run import Recipe
from hyperscale.config.secrets import without_credentials
from hyperscale.errors import ConfigError
from hyperscale.export.exporter import restore_generator
from hyperscale.model.generators.generator import with_new_tasks
from hyperscale.places import open_place
from hyperscale.run.session import Session


def adapted_recipe(
    path: str, tasks: Sequence[str], train: str, old_share: float, overrides: Sequence[str] = ()
) -> Recipe:
    """Return the recipe of a run that teaches a checkpoint new tasks.

    Args:
        path: a checkpoint, or a run folder for its newest one.
        tasks: names or files of the new tasks.
        train: `new_tasks` or `everything`, as in `start.train`.
        old_share: share of the samples for the known tasks, divided equally among them; 0 with `new_tasks`.
        overrides: `dotted.key=value` for anything else. By default, `output` is next to the old run folder.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the checkpoint already knows a task, the share is out of range, or an override is wrong.
    """
    checkpoint_path = find_checkpoint(path)
    checkpoint = load_checkpoint(checkpoint_path, only=())
    before = parse_recipe(checkpoint.recipe, f"the recipe of {checkpoint_path}")
    known = before.data.tasks
    files = [str(Path(task).absolute()) if Path(task).suffix in (".yaml", ".yml") else task for task in tasks]
    trained = [task for task in files if task in known or Path(task).stem in checkpoint.manifest["tasks"]]
    if trained:
        raise ConfigError(
            f"--task {trained[0]}: the checkpoint was already trained on it; continue with: train RECIPE --resume"
        )
    if not 0 <= old_share < 1 or (old_share and train == "new_tasks"):
        raise ConfigError(
            f"--old-share {old_share:g}: must be at least 0 and less than 1. Without --train everything it must be 0, "
            "because the known tasks do not change then"
        )
    label = "-".join(Path(task).stem for task in files)
    folder = open_place(before.output)
    changes: Mapping[str, Any] = {
        "name": f"{before.name}-{label}",
        "output": str(folder.parent.child(f"{folder.name}-{label}")),
        "data.tasks": [*known, *files],
        "data.mixture.weights": [old_share / len(known)] * len(known) + [(1 - old_share) / len(files)] * len(files),
        "start": {"checkpoint": str(open_place(path))} | {"known_tasks": len(known), "train": train},
    }
    return change_recipe(before, changes, overrides, "the adapted recipe")


def begin_from_known_tasks(session: Session) -> list[Mapping[str, Any] | None]:
    """Load the generator that the recipe starts from; every rank calls this.

    Returns:
        For each task, the origin of its weights if this run does not change them, else None.

    Raises:
        CheckpointError: its backbone, sites, generator or tasks differ from those of this run.
    """
    start = session.recipe.start
    assert start is not None, "only a run with a start calls this"
    base = load_checkpoint(find_checkpoint(start.checkpoint), only=("generator",))
    present = {**session.manifest, "tasks": session.manifest["tasks"][: start.known_tasks]}
    check_manifest(base.manifest, present)
    generator = with_new_tasks(session.engine.model.generator, base.tensors["generator"])
    session.engine.load_state({"generator": generator, "optimizer": {}})
    new: list[Mapping[str, Any] | None] = [None] * (len(session.manifest["tasks"]) - start.known_tasks)
    return [*_origins(base, start.known_tasks), *new] if start.train == "new_tasks" else []


def _origins(base: Checkpoint, known: int) -> list[Mapping[str, Any]]:
    """Return, for each task, the run that trained its weights; it may be an ancestor of `base`."""
    own = {"recipe": without_credentials(base.recipe), "step": base.step}
    return [earlier or own for earlier in base.state.get("origins") or [None] * known]


def nearest_tasks(path: str, num_new: int, count: int = 3) -> dict[str, list[tuple[str, float]]]:
    """Return, for each of a checkpoint's last `num_new` tasks, the most similar tasks and their cosine, nearest first.

    The similarity is that of the task embeddings. Empty for a generator without task embeddings.
    """
    trained = restore_generator(load_checkpoint(find_checkpoint(path), only=("generator",)))
    encoder = getattr(trained.generator, "task_encoder", None)
    if encoder is None:
        return {}
    tasks = [task.name for task in trained.tasks]
    with torch.no_grad():
        codes = F.normalize(encoder(torch.arange(len(tasks))), dim=-1)
    cosines = codes @ codes.T
    return {
        name: sorted(
            ((other, float(cosines[tasks.index(name), place])) for place, other in enumerate(tasks) if other != name),
            key=lambda pair: -pair[1],
        )[:count]
        for name in tasks[-num_new:]
    }
