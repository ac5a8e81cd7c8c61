"""DeepSpeed's own JSON: reads it, completes it from the recipe, and reports contradictions between the two.

Its fields are not modelled here: DeepSpeed's own names and defaults hold.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hyperscale.assets.presets import find_preset
from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.engine import EngineSettings
from hyperscale.config.training import TrainingSettings
from hyperscale.errors import EngineError
from hyperscale.planning.memory import Sharding

_OURS = {
    "optimizer": "training.optimizer",
    "scheduler": "training.optimizer.schedule",
    "gradient_clipping": "training.optimizer.clip_norm",
    "activation_checkpointing": "engine.activation_checkpointing",
    "fp16": "backbone.dtype (bfloat16 or float32)",
}

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""DeepSpeed would make an int8 shard with a scale of storage that is not filled yet: every weight would load as 0."""


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a preset of ds_configs/ or a JSON file.

    Raises:
        EngineError: no such preset or file, or not a JSON object.
    """
    path = Path(name_or_path) if name_or_path.endswith(".json") else find_preset(name_or_path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EngineError(f"engine.ds_config: {path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EngineError(f"engine.ds_config: {path} cannot be read: {reason}") from error
    if not isinstance(raw, dict):
        raise EngineError(f"engine.ds_config: {path} holds {type(raw).__name__}, not a JSON object")
    return raw


def complete_ds_config(
    raw: Mapping[str, Any],
    training: TrainingSettings,
    backbone: BackboneSettings,
    world_size: int,
    block_numel: int,
    outer_numel: int = 0,
) -> dict[str, Any]:
    """Fill in what the recipe decides.

    Args:
        raw: DeepSpeed's JSON, where "auto" or a missing key means: from the recipe.
        block_numel: parameters of the largest transformer block; the live limit follows from it, since DeepSpeed's
            default of 10^9 elements would keep a small backbone gathered.
        outer_numel: parameters outside the blocks. They too count as live; without room for them DeepSpeed would fetch
            all of the next block but a norm.

    Raises:
        EngineError: all contradictions at once, each with both values.
    """
    problems = [
        f"'{key}' is set in the DeepSpeed JSON, but the recipe decides it: remove it and use {ours}"
        for key, ours in _OURS.items()
        if _decides(raw.get(key))
    ]
    micro = training.micro_batch_size
    required = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.batch_size // (micro * world_size),
        "train_batch_size": training.batch_size,
    }
    done = {key: value for key, value in raw.items() if key not in _OURS}
    for key, value in required.items():
        problems += _fill(done, key, value, key)
    bf16 = _section(raw, "bf16", problems)
    problems += _fill(bf16, "enabled", backbone.dtype == "bfloat16", "bf16.enabled")
    done["bf16"] = bf16
    zero = _section(raw, "zero_optimization", problems)
    problems += _fill(zero, "stage", 3, "zero_optimization.stage")
    problems += _unsupported(zero, backbone.quantization)
    _fill_live_limits(zero, block_numel, outer_numel)
    done["zero_optimization"] = zero
    if problems:
        raise EngineError("engine.ds_config contradicts the recipe: " + "; ".join(problems))
    done.setdefault("steps_per_print", 10**9)
    return _without_auto(done)


def _unsupported(zero: Mapping[str, Any], quantization: str) -> list[str]:
    """Name what the loader of shards cannot do."""
    problems = [
        f"'zero_optimization.{key}' cannot be used with a frozen backbone, whose weights would load as zeros: remove "
        "it and use backbone.quantization=int8"
        for key in _QUANTIZED
        if zero.get(key, "auto") not in (False, "auto")
    ]
    if quantization != "none" and zero.get("stage3_use_all_reduce_for_fetch_params", "auto") not in (False, "auto"):
        problems.append(
            "'zero_optimization.stage3_use_all_reduce_for_fetch_params' gathers integers and scales as one dtype, so "
            f"it does not work with backbone.quantization={quantization}: remove it"
        )
    offload = zero.get("offload_param")
    if isinstance(offload, Mapping) and offload.get("device") == "nvme":
        problems.append(
            "'zero_optimization.offload_param.device' is 'nvme', but a frozen backbone cannot be loaded onto a disk: "
            "use 'cpu' (engine.ds_config=zero3_offload), more workers or backbone.quantization=int8"
        )
    return problems


def _decides(value: Any) -> bool:
    """Return whether a key that the recipe decides is set to anything but "off" or "auto"."""
    return _decides(value.get("enabled", True)) if isinstance(value, dict) else bool(value) and value != "auto"


def _section(raw: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, Any]:
    section = raw.get(key, {})
    if isinstance(section, dict):
        return dict(section)
    problems.append(f"'{key}' is {section!r} there, but must be a section")
    return {}


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Leave every other "auto" to DeepSpeed's defaults: only transformers' integration understands the word."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def _fill(section: dict[str, Any], key: str, value: Any, path: str) -> list[str]:
    present = section.get(key, "auto")
    section[key] = value
    return [] if present in ("auto", value) else [f"'{path}' is {present!r} there but {value!r} by the recipe"]


def _fill_live_limits(zero: dict[str, Any], block_numel: int, outer_numel: int) -> None:
    limits = {
        "stage3_prefetch_bucket_size": block_numel,
        "stage3_max_live_parameters": 2 * block_numel + outer_numel,
        "stage3_max_reuse_distance": 0,
    }
    for key, limit in limits.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = limit


def read_sharding(engine: EngineSettings, world_size: int, device: Literal["cpu", "cuda"], nodes: int = 1) -> Sharding:
    """Return how the run's DeepSpeed JSON spreads the shards. The unsharded engine counts as one rank.

    CPU ranks of one node read ordinary shards from each other's memory (engine/shared_shards.py).
    """
    if engine.kind == "local":
        return Sharding(world_size=1)
    zero = read_ds_config(engine.ds_config).get("zero_optimization", {})
    offload = (zero.get("offload_param") or {}).get("device", "none")
    group_size = zero.get("zero_hpz_partition_size", 1)
    node_shards = 1 if group_size == "auto" else int(group_size)
    in_place = device == "cpu" and world_size > 1 and nodes == 1 and node_shards == 1 and shares_shards()
    return Sharding(world_size, offload != "none", node_shards, in_place)


def shares_shards() -> bool:
    """Return whether ranks may read each other's shards from memory: yes, unless `HYPERSCALE_SHARED_SHARDS` is 0."""
    return os.environ.get("HYPERSCALE_SHARED_SHARDS", "1") != "0"
