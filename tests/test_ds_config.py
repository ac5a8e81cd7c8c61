"""DeepSpeed's JSON, completed from the recipe; contradictions refused by name."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from hyperscale.assets.presets import preset_folder
from hyperscale.config.run import Recipe
from hyperscale.engine.ds_config import complete_ds_config, read_ds_config
from hyperscale.errors import ConfigError, EngineError

BLOCK, OUTER = 1234, 56


def recipe(resident: str = "none", dtype: str = "bfloat16") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "output": "/runs/r",
            "backbone": {"name": "b", "dtype": dtype},
            "data": {"tasks": ["t"]},
            "training": {"steps": 10, "batch_size": 24, "micro_batch_size": 2},
            "engine": {"resident": resident},
            "cluster": {"workers": 3},
        }
    )


def complete(raw: dict[str, Any], resident: str = "none", dtype: str = "bfloat16") -> dict[str, Any]:
    settings = recipe(resident, dtype)
    return complete_ds_config(
        raw, settings.training, settings.backbone, world_size=3, block_numel=BLOCK, outer_numel=OUTER
    )


@pytest.mark.parametrize("path", sorted(preset_folder().glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("resident", ["none", "all"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_preset_is_completed(path: Path, resident: str, dtype: str):
    raw = read_ds_config(path.stem)
    assert raw == read_ds_config(str(path)) == json.loads(path.read_text())
    done = complete(raw, resident, dtype)
    assert '"auto"' not in json.dumps(done)
    assert (done["train_batch_size"], done["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert done["gradient_accumulation_steps"] == 4
    assert done["bf16"]["enabled"] is (dtype == "bfloat16")
    assert raw == json.loads(path.read_text())  # what was given is left alone
    zero = done["zero_optimization"]
    assert zero["stage"] == 3
    for key, value in raw["zero_optimization"].items():
        assert zero[key] == value
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["stage3_prefetch_bucket_size"] == BLOCK
    assert zero["stage3_max_live_parameters"] == 2 * BLOCK + OUTER
    assert zero["stage3_max_reuse_distance"] == 0


def test_an_empty_file_is_enough_and_what_we_do_not_decide_stays():
    assert complete({})["zero_optimization"]["stage"] == 3
    own = {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 77,
            "reduce_bucket_size": "auto",
            "offload_param": {"device": "cpu", "pin_memory": "auto"},
        },
        "bf16": {"enabled": "auto"},
        "comms_logger": {"enabled": True},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
    }
    done = complete(own)
    assert done["zero_optimization"]["stage3_max_live_parameters"] == 77
    assert done["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "reduce_bucket_size" not in done["zero_optimization"]  # DeepSpeed itself does not know "auto"
    assert (done["comms_logger"], done["wall_clock_breakdown"], done["steps_per_print"]) == ({"enabled": True}, True, 5)


def test_what_agrees_with_the_recipe_or_is_off_may_be_there():
    done = complete(
        {
            "train_batch_size": 24,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 4,
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "activation_checkpointing": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "optimizer": None,
        }
    )
    assert not {"fp16", "gradient_clipping", "optimizer", "activation_checkpointing"} & done.keys()


def test_all_contradictions_are_named_at_once_with_both_values():
    contradicting = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "gradient_clipping": 1.0,
        "activation_checkpointing": {"partition_activations": True},
        "fp16": {"enabled": True},
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }
    with pytest.raises(EngineError) as caught:
        complete(contradicting)
    message = str(caught.value)
    assert message.startswith("engine.ds_config contradicts the recipe: ")
    assert message.count("; ") == len(contradicting) - 1
    for key, ours in {
        "optimizer": "training.optimizer",
        "scheduler": "training.optimizer.schedule",
        "gradient_clipping": "training.optimizer.clip_norm",
        "activation_checkpointing": "engine.activation_checkpointing",
        "fp16": "backbone.dtype",
    }.items():
        assert f"'{key}' is set in the DeepSpeed JSON, but the recipe decides it: remove it and use {ours}" in message
    for key, there, ours in (
        ("train_batch_size", 32, 24),
        ("train_micro_batch_size_per_gpu", 4, 2),
        ("gradient_accumulation_steps", 1, 4),
        ("bf16.enabled", False, True),
        ("zero_optimization.stage", 2, 3),
    ):
        assert f"'{key}' is {there!r} there but {ours!r} by the recipe" in message
    with pytest.raises(EngineError, match=r"'bf16' is True there, but must be a section; 'zero_opt.*' is 3 there"):
        complete({"bf16": True, "zero_optimization": 3})


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_deepspeeds_own_quantization_is_an_error(key: str, quantization: str):
    """Every weight of the backbone would be zero."""
    training, backbone = recipe().training, recipe().backbone.model_copy(update={"quantization": quantization})
    for value in (True, False, "auto"):
        message = f"'zero_optimization.{key}' cannot be used .*: remove it and use backbone.quantization=int8"
        with pytest.raises(EngineError, match=message) if value is True else nullcontext():
            raw = {"zero_optimization": {key: value}}
            complete_ds_config(raw, training, backbone, world_size=3, block_numel=BLOCK, outer_numel=OUTER)


def test_offloading_shards_to_disk_is_an_error():
    with pytest.raises(EngineError, match="is 'nvme', but a frozen backbone cannot be loaded onto a disk: use 'cpu'"):
        complete({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}})
    complete({"zero_optimization": {"offload_param": {"device": "cpu"}}})


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no DeepSpeed preset 'zero33': the shipped ones .*Did you mean 'zero3'\?"):
        read_ds_config("zero33")
    file = tmp_path / "mine.json"
    with pytest.raises(EngineError, match=r"engine.ds_config: .*mine.json cannot be read: No such file or directory$"):
        read_ds_config(str(file))
    file.write_text('{\n  "bf16": {},\n}')
    with pytest.raises(EngineError, match=r"mine.json:3: not valid JSON: "):
        read_ds_config(str(file))
    file.write_text("[1, 2]")
    with pytest.raises(EngineError, match=r"mine.json holds list, not a JSON object"):
        read_ds_config(str(file))
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(EngineError, match=r"mine.json cannot be read: it is not UTF-8 text"):
        read_ds_config(str(file))
