"""The composition root: builds and connects every object of a run, in the same way under any launcher.

Engine and trackers are imported only when a recipe names them, so a machine needs only what its recipe uses.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoTokenizer

from hyperscale.checkpoint.manifest import build_manifest, check_manifest
from hyperscale.checkpoint.store import Checkpoint, CheckpointStore, find_checkpoint, load_checkpoint
from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.run import Recipe
from hyperscale.config.tracking import TrackingSettings
from hyperscale.data.corpus import check_same_rows, load_corpus
from hyperscale.data.descriptions import DescriptionBatch, encode_descriptions
from hyperscale.engine.base import Engine
from hyperscale.engine.collective import Collective, SingleProcess, TorchCollective
from hyperscale.engine.host_memory import keep_freed_memory
from hyperscale.engine.local import LocalEngine
from hyperscale.engine.optimizer import GeneratorOptimizer
from hyperscale.engine.step import TrainingStep
from hyperscale.errors import EngineError, RunStopped
from hyperscale.export.exporter import export_bundles, restore_generator
from hyperscale.export.remote import put_bundle
from hyperscale.logger import get_logger, set_up_logging
from hyperscale.model.backbone import DTYPES, BackboneFolder, load_dense, open_backbone, set_activation_checkpointing
from hyperscale.model.build import Blueprint
from hyperscale.model.description import text_features
from hyperscale.model.generators.generator import keep_known_tasks
from hyperscale.places import open_place
from hyperscale.planning.generated import generates_site_by_site, tasks_of_a_step
from hyperscale.planning.memory import describe_run
from hyperscale.planning.parts import find_parts
from hyperscale.run.adapt import begin_from_known_tasks
from hyperscale.run.context import RunIdentity, RunResult, WorkerContext
from hyperscale.run.session import Session, TrainingRun, notifying_listeners
from hyperscale.terminal.progress import ProgressSender
from hyperscale.tracking.jsonl import read_entries
from hyperscale.tracking.provenance import package_versions
from hyperscale.tracking.trackers import open_trackers, record_comparison, record_end
from hyperscale.training.callbacks import Callback, EvaluationRecord, RunOutcome
from hyperscale.training.evaluation import majority_record, split_of

if TYPE_CHECKING:
    from hyperscale.engine.deepspeed_names import DeepSpeedEngine

_logger = get_logger(__name__)


def train_worker(recipe: Recipe, context: WorkerContext) -> RunResult | None:
    """Train, evaluate and export on this rank; every worker of the run calls this with the same recipe.

    It continues from the newest complete checkpoint in the run folder, if there is one.

    Returns:
        The result on rank 0, which is also written to the run folder; None elsewhere.

    Raises:
        RunStopped: `context.stop` was asked for; the step that was running is saved.
    """
    start = time.monotonic()
    session = _open_session(recipe, context)
    checkpoint = _newest_checkpoint(session)
    origins = begin_from_known_tasks(session) if checkpoint is None and recipe.start else ()
    run = TrainingRun(session, checkpoint, _listeners(session) if session.is_first else (), origins)
    with _leaving_together(session), notifying_listeners(run) as outcome:
        run.train()
        bundles = _export(session) if recipe.export.enabled else {}
        outcome.append(RunOutcome("finished", recipe.training.steps, time.monotonic() - start, bundles=bundles))
    return run.result(time.monotonic() - start, bundles) if session.is_first else None


@contextmanager
def _leaving_together(session: Session) -> Iterator[None]:
    """Keep the ranks of a stopped run until rank 0 has notified its listeners: launchers end those that are left."""
    try:
        yield
    except RunStopped:
        session.engine.collective.barrier()
        raise


def evaluate_worker(
    recipe: Recipe, context: WorkerContext, checkpoint: Checkpoint, stage: str
) -> list[EvaluationRecord]:
    """Score the tasks of a checkpoint and the majority class again; every worker of the group calls this."""
    session = _open_session(recipe, context, may_lack_test=True)
    check_manifest(checkpoint.manifest, session.manifest)
    session.engine.load_state(checkpoint.tensors)
    return [
        majority_record(session.corpus, split_of(stage)),
        session.evaluator()(checkpoint.step, stage).record,
    ]


def _open_session(recipe: Recipe, context: WorkerContext, may_lack_test: bool = False) -> Session:
    set_up_logging(rank=context.rank)
    device = _device(recipe.cluster, context)
    sender = ProgressSender(context.progress)
    sender.phase("opening the backbone")
    folder = open_backbone(recipe.backbone)
    sender.phase("reading the tasks")
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    corpus = load_corpus(
        recipe.data,
        tokenizer,
        folder.architecture.is_encoder_decoder,
        with_test=recipe.training.evaluate_test,
        may_lack_test=may_lack_test,
    )
    sender.phase(f"loading {recipe.backbone.name} ({recipe.engine.kind} engine, {context.world_size} workers)")
    collective = TorchCollective(device) if context.world_size > 1 else SingleProcess()
    check_same_rows(collective.gather(corpus.describe()))
    descriptions = None
    if recipe.adaptation.reads_descriptions:
        tasks = [loaded.task for loaded in corpus.tasks]
        descriptions = encode_descriptions(tasks, tokenizer, corpus.layout.pad_token_id)
    engine = build_engine(recipe, folder, collective, device, len(corpus.tasks), descriptions)
    manifest = build_manifest(
        site_map=engine.model.site_map.to_json(),
        generator=recipe.adaptation.model_dump(mode="json"),
        tasks=corpus.names,
        backbone={
            "name": recipe.backbone.name,
            "digest": folder.digest(),
            "path": str(folder.path),
            "is_local": Path(recipe.backbone.name).is_dir() or "/" not in recipe.backbone.name,
            "model_type": folder.architecture.model_type,
            "multimodal": folder.multimodal and folder.multimodal.model_type,
            "quantization": recipe.backbone.quantization,
        },
        versions=package_versions(),
    )
    store = CheckpointStore(recipe.output, recipe.training.keep_checkpoints)
    return Session(recipe, context, corpus, engine, sender, store, manifest)


def _device(cluster: ClusterSettings, context: WorkerContext) -> torch.device:
    if cluster.gpus_per_worker:
        if not torch.cuda.is_available():
            raise EngineError(
                f"cluster.gpus_per_worker is {cluster.gpus_per_worker:g}, but worker {context.rank} sees no "
                "CUDA device; set it to 0 to run on CPUs, or install a torch that fits the driver (hyperscale doctor)"
            )
        # Under Ray a worker sees only its own GPU; under torchrun it sees all GPUs of the node.
        torch.cuda.set_device(context.local_rank if torch.cuda.device_count() > context.local_rank else 0)
        return torch.device("cuda", torch.cuda.current_device())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed searches for other devices and warns
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    return torch.device("cpu")


def build_engine(
    recipe: Recipe,
    folder: BackboneFolder,
    collective: Collective,
    device: torch.device,
    num_tasks: int,
    descriptions: DescriptionBatch | None = None,
) -> Engine:
    """Load the backbone and connect it to a new generator; every rank must call this.

    Args:
        descriptions: of all tasks, for a task encoder that reads them. The backbone turns them into features.

    Raises:
        BackboneError: the backbone's folder cannot be used.
        EngineError: the engine cannot run on this machine.
        ConfigError: a setting does not fit the backbone or the engine.
    """
    deepspeed_engine: DeepSpeedEngine | None = None
    backbone: nn.Module
    if recipe.engine.kind == "zero":
        from hyperscale.engine.deepspeed_names import release_all
        from hyperscale.engine.residency import agree_on_resident
        from hyperscale.engine.zero import ZeroEngine, shard_backbone

        backbone, deepspeed_engine = shard_backbone(
            folder, recipe.backbone, recipe.engine, recipe.training, device, collective.world_size
        )
    else:
        dense = load_dense(folder, recipe.backbone)
        if recipe.engine.activation_checkpointing:
            set_activation_checkpointing(dense, recipe.engine.offload_checkpoints)
        backbone = dense.to(device)  # type: ignore[arg-type]  # transformers' annotation hides nn.Module's
    blueprint = Blueprint.of_backbone(backbone, folder.architecture, recipe.adaptation.adapters)
    for kind in blueprint.kinds:
        _logger.info("%s adapters act on %s", kind.name, ", ".join(blueprint.site_map.targets_of(kind.name)))
    features = None
    if descriptions is not None:
        ids, mask = descriptions.input_ids.to(device), descriptions.attention_mask.to(device)
        features = text_features(backbone, folder.architecture, ids, mask)
        if deepspeed_engine is not None:
            release_all(deepspeed_engine)
    generator = blueprint.build_generator(recipe.adaptation, num_tasks, recipe.seed, features).to(device)
    step_tasks = tasks_of_a_step(recipe.data, recipe.training.batch_size, recipe.cluster.workers)
    itemsize = DTYPES[recipe.backbone.dtype].itemsize
    by_site = generates_site_by_site(recipe.engine, recipe.adaptation, blueprint, step_tasks, itemsize)
    model = blueprint.adapt(backbone, generator, by_site)
    start = recipe.start
    fixed = keep_known_tasks(generator, start.known_tasks) if start and start.train == "new_tasks" else {}
    optimizer = GeneratorOptimizer(generator, recipe.training.optimizer, recipe.training.steps, fixed)
    step = TrainingStep(model, optimizer, collective, device, recipe.training, num_tasks, recipe.seed)
    if deepspeed_engine is None:
        if device.type == "cpu":
            keep_freed_memory()
        return LocalEngine(step)
    parts = find_parts(backbone, folder.architecture)
    residency = agree_on_resident(recipe.engine, partial(describe_run, recipe, folder), parts, collective, device)
    if device.type == "cpu" and not residency.returns_memory:
        keep_freed_memory()
    return ZeroEngine(step, deepspeed_engine, parts, residency.parts, residency.returns_memory)


def _newest_checkpoint(session: Session) -> Checkpoint | None:
    """Load the newest complete checkpoint. Rank 0 chooses it, because object stores may list files differently."""
    collective = session.engine.collective
    if session.is_first:
        session.store.sweep()
    path = collective.from_first(session.store.latest() if session.is_first else None)
    if path is None:
        return None
    checkpoint = session.store.load(path)
    check_manifest(checkpoint.manifest, session.manifest)
    session.engine.load_state(checkpoint.tensors)
    _logger.info("continuing from %s", path)
    return checkpoint


def record_end_of_run(tracking: TrackingSettings, output: str, run: RunIdentity, status: str, message: str) -> None:
    """Record the end of a run whose rank 0 could not record it; the driver calls this.

    `status`: `failed` or `stopped`.
    """
    outcome = RunOutcome(status, _last_step(output), 0.0, message=message[:500])
    record_end(tracking, str(open_place(output).parent), run.key, outcome)


def _last_step(folder: str) -> int:
    try:
        return max((entry.step for entry in read_entries(folder)), default=0)
    except OSError:
        return 0


def record_comparison_run(
    tracking: TrackingSettings, output: str, name: str, metrics: Mapping[str, float], files: Sequence[Path]
) -> None:
    """Record a comparison in the trackers of one of its runs, whose folder is `output`; the driver calls this."""
    record_comparison(tracking, str(open_place(output).parent), name, metrics, files)


def _listeners(session: Session) -> Sequence[Callback]:
    recipe = session.recipe
    run = session.context.run
    tags = {"hyperscale.launcher": session.context.launcher, **package_versions()}
    if run.commit:
        tags["git_commit"] = run.commit
    root = str(open_place(recipe.output).parent)
    return [session.sender, *open_trackers(recipe.tracking, recipe.output, root, run.key, tags)]


def _export(session: Session) -> dict[str, str]:
    """Write the bundles of the newest checkpoint on rank 0; an object store gets them through a temporary folder."""
    if not session.is_first:
        return {}
    session.sender.phase("exporting the bundles")
    trained = restore_generator(load_checkpoint(find_checkpoint(session.recipe.output), only=("generator",)))
    target = open_place(session.recipe.output).child("bundles")
    if target.is_local:
        return {name: str(folder) for name, folder in export_bundles(trained, target.local_path).items()}
    with tempfile.TemporaryDirectory(prefix="hyperscale-") as scratch:
        written = export_bundles(trained, Path(scratch))
        for name, folder in written.items():
            put_bundle(folder, target.child(name))
    return {name: str(target.child(name)) for name in written}
