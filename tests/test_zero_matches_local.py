"""Two real ranks of ZeRO-3 do what plain PyTorch does in one process."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.config.backbone import BackboneSettings
from hyperscale.config.run import Recipe
from hyperscale.engine import sharded_load
from hyperscale.engine.base import Engine, StepResult
from hyperscale.engine.deepspeed_names import shard_of
from hyperscale.engine.ds_config import read_ds_config
from hyperscale.engine.zero import ZeroEngine, shard_backbone
from hyperscale.errors import BackboneError
from hyperscale.inference.answers import Answerer, Question
from hyperscale.model.backbone import DTYPES, load_dense, open_backbone
from hyperscale.model.shapes import whole_numel
from tests import tiny
from tests.gathers import held_elements
from tests.ranks import Ranks
from tests.runs import CPU, corpus_of, engine_of, loader_of, make_recipe


@pytest.fixture
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in tiny.FAMILIES:
        return tiny.tiny_family(tmp_path / request.param, request.param)
    return request.getfixturevalue(f"tiny_{request.param}_folder")


@dataclass(frozen=True)
class Trained:
    """What five steps and an evaluation left behind on one rank."""

    steps: list[StepResult]
    generator: Mapping[str, Tensor]
    answers: list[str]
    held: list[int]
    """Backbone elements on this rank after loading, after each step and after the evaluation."""
    shard: int
    """Elements of its share alone, padding included."""


def train(recipe: Recipe) -> Trained:
    engine, corpus = engine_of(recipe), corpus_of(recipe)
    collective = engine.collective
    loader = loader_of(recipe, corpus, collective.rank, collective.world_size)
    held, steps = [held_by(engine)], []
    for step in range(recipe.training.steps):
        steps.append(engine.train_step(loader.next_step(), step))
        held.append(held_by(engine))
    # Untrained, the adapters would hardly change an answer; the same disturbance everywhere makes them matter.
    generator = {name: tensor.detach().clone() for name, tensor in engine.model.generator.state_dict().items()}
    tiny.disturb(engine.model.generator)
    tokenizers = [loaded.tokenizer for loaded in corpus.tasks]
    answerer = Answerer(engine.model, collective, CPU, tokenizers, corpus.layout, 3, lambda *_: None)
    questions = [
        Question(index, encoded, example.candidates)
        for index, loaded in enumerate(corpus.tasks)
        for example, encoded in zip(loaded.validation.examples, loaded.validation.encoded, strict=True)
    ]
    with engine.evaluating():
        answers = answerer(questions)
    held.append(held_by(engine))
    whole = [whole_numel(one) for one in engine.model.backbone.parameters()]
    return Trained(steps, generator, answers, held, sum(-(-size // collective.world_size) for size in whole))


def held_by(engine: Engine) -> int:
    return held_elements(engine.model.backbone) if isinstance(engine, ZeroEngine) else 0


ACCUMULATED = {"training": {"micro_batch_size": 2}}  # two micro-batches on each of two ranks
AT_ONCE = {"training": {"micro_batch_size": 4}}
INT8 = {"backbone": {"quantization": "int8"}}
NF4 = {"backbone": {"quantization": "nf4"}}
CHECKPOINTED = {"engine": {"activation_checkpointing": True}}
SUM = {
    "training": {
        "micro_batch_size": 4,
        "loss": "token_sum",
        "label_smoothing": 0.1,
        "optimizer": {"warmup_steps": 1, "learning_rate": 3e-4},
    }
}
SLOW = {"optimizer": {"warmup_steps": 1, "learning_rate": 3e-4}}
"""At a higher rate AdamW makes of 1e-7 in a gradient near 0 more than the tolerance within five steps."""
EVERY_KIND = {
    "adaptation": {
        "generator": {"kind": "hypernetwork"},
        "adapters": [
            {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["all"]},
            {"kind": "ia3", "targets": ["feed_forward"]},
            {"kind": "bottleneck", "reduction": 4, "layer_norm": True},
            {"kind": "norm_delta"},
            {"kind": "prefix", "length": 3},
        ],
    }
}
QUICK = ("gemma2", "olmo3", "umt5-checkpointed-int8")
"""Of the cases of other families, those of `make test`: everything that no LLaMA and no T5 has is in them."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family}{name}": (family, changes)
    for family in ("llama", "t5")
    for name, changes in {
        "": AT_ONCE,
        "-accumulated": ACCUMULATED,
        "-checkpointed": AT_ONCE | CHECKPOINTED,
        "-accumulated-checkpointed": ACCUMULATED | CHECKPOINTED,
        "-site-by-site": ACCUMULATED | {"engine": {"activation_checkpointing": True, "generated_budget": "0B"}},
        "-resident": AT_ONCE | {"engine": {"resident": "all"}},
        "-int8": AT_ONCE | INT8,
        "-int8-accumulated-checkpointed": ACCUMULATED | CHECKPOINTED | INT8,
    }.items()
} | {
    "t5-independent-samples": (
        "t5",
        {
            "adaptation": {"generator": {"kind": "independent"}},
            "training": {"loss": "square_mean", "label_smoothing": 0.1, "micro_batch_size": 2},
        },
    ),
    **{
        f"{family}-every-kind{name}": (
            family,
            AT_ONCE
            | changes
            | {
                "adaptation": {
                    "generator": {"kind": generator},
                    "adapters": [
                        {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q", "v"]},
                        {"kind": "vera", "rank": 8},
                        {"kind": "ia3"},
                        {"kind": "bottleneck", "reduction": 4, "layer_norm": True},
                        {"kind": "norm_delta"},
                        {"kind": "prefix", "length": 3},
                    ],
                }
            },
        )
        for family in ("llama", "t5")
        for name, generator, changes in (
            ("", "hypernetwork", {}),
            ("-per-layer-checkpointed-sum", "per_layer", CHECKPOINTED | SUM),
            ("-independent", "independent", {}),
            ("-nf4-accumulated-checkpointed", "hypernetwork", ACCUMULATED | CHECKPOINTED | NF4),
        )
    },
    "llama-shared-samples": (
        "llama",
        {
            "adaptation": {"generator": {"kind": "shared"}},
            "training": {"loss": "sample_mean", "micro_batch_size": 2},
        },
    ),
}


def recipes(
    backbone: Path, tasks: list[str], output: Path, changes: Mapping[str, Mapping[str, Any]]
) -> tuple[Recipe, Recipe]:
    """Return the recipe of two sharded ranks and that of the reference."""
    base = make_recipe(backbone, tasks, output).model_dump(mode="json")
    changed = {name: base[name] | dict(fields) for name, fields in changes.items()}
    ranks = {"cluster": base["cluster"] | {"workers": 2}}
    zero = {"resident": "none"} | changed.get("engine", {}) | {"kind": "zero"}
    local = zero | {"kind": "local"}
    return (
        Recipe.model_validate(base | changed | ranks | {"engine": zero}),
        Recipe.model_validate(base | changed | {"engine": local}),
    )


OF_FAMILIES = [
    pytest.param(family, changes, id=f"{family}{name}", marks=() if f"{family}{name}" in QUICK else pytest.mark.long)
    for family in tiny.FAMILIES
    for name, changes in {
        "": {"training": AT_ONCE["training"] | SLOW} | EVERY_KIND,
        "-checkpointed-int8": {"training": ACCUMULATED["training"] | SLOW} | CHECKPOINTED | INT8 | EVERY_KIND,
    }.items()
]


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [*(pytest.param(*case, id=name) for name, case in CASES.items()), *OF_FAMILIES],
    indirect=["backbone"],
)
def test_five_steps(two_ranks: Ranks, backbone: Path, tasks: list[str], tmp_path: Path, changes: dict[str, Any]):
    sharded, alone = recipes(backbone, tasks, tmp_path, changes)
    first, second = two_ranks.run(train, sharded)
    assert_same_training(first, second, train(alone))
    if sharded.engine.resident == "none":
        assert set(first.held) == set(second.held) == {first.shard}
    else:
        assert set(first.held) == set(second.held) == {3 * first.shard}  # besides its share the whole


def assert_same_training(first: Trained, second: Trained, reference: Trained) -> None:
    for got, expected in zip(first.steps, reference.steps, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert dict(got.task_losses) == pytest.approx(dict(expected.task_losses), rel=1e-5)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert (got.tokens, got.samples) == (expected.tokens, expected.samples)
        assert got.learning_rate == expected.learning_rate
    assert len({step.loss for step in first.steps}) == len(first.steps)
    assert first.steps == second.steps
    for name, expected in reference.generator.items():
        assert (first.generator[name] - expected).abs().max() <= 1e-4, name
        assert torch.equal(first.generator[name], second.generator[name]), name
    assert first.answers == second.answers == reference.answers
    assert len(set(first.answers)) > 2


def test_five_steps_with_the_vocabulary_in_four_bits(two_ranks: Ranks, tasks: list[str], tmp_path: Path):
    path = tiny.tiny_llama(tmp_path / "backbone", hidden_size=64)
    engine = {"activation_checkpointing": True, "resident": "none"}
    changes = {"engine": engine, "backbone": {"quantization": "nf4_all"}}
    sharded, alone = recipes(path, tasks, tmp_path, changes)
    first, second = two_ranks.run(train, sharded)
    assert_same_training(first, second, train(alone))
    assert set(first.held) == set(second.held) == {first.shard}


@pytest.mark.parametrize("backbone", ["llama"], indirect=True)
def test_unsharded_ranks(two_ranks: Ranks, backbone: Path, tasks: list[str], tmp_path: Path):
    _, alone = recipes(backbone, tasks, tmp_path, {})
    pair = alone.model_copy(update={"cluster": alone.cluster.model_copy(update={"workers": 2})})
    assert_same_training(*two_ranks.run(train, pair), train(alone))


def gathered(path: Path, dtype: str, quantization: str = "none") -> dict[str, Tensor]:
    """Shard a backbone and return each parameter, gathered, under all its names."""
    settings = {"name": str(path), "dtype": dtype, "quantization": quantization}
    recipe = make_recipe(path, ["none"], path, backbone=settings, cluster={"workers": 2})
    backbone, _ = shard_backbone(
        open_backbone(recipe.backbone), recipe.backbone, recipe.engine, recipe.training, CPU, 2
    )
    tensors = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        one: Any = parameter
        one.all_gather([one])
        tensors[name] = one.detach().clone()
        one.partition([one])
    return tensors


def test_sharded_weights_are_the_stored_ones(
    two_ranks: Ranks, tiny_llama_folder: Path, tiny_t5_folder: Path, tmp_path: Path
):
    parts = tmp_path / "parts"
    open_backbone_model(tiny_t5_folder, "float32").save_pretrained(parts, max_shard_size="30KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    cases = [
        (tiny_llama_folder, "float32"),
        (tiny_llama_folder, "bfloat16"),
        (tiny.tiny_llama(tmp_path / "untied", tie_word_embeddings=False), "float32"),
        (tiny_t5_folder, "bfloat16"),
        (tiny.tiny_t5(tmp_path / "tied", tie_word_embeddings=True, feed_forward_proj="relu"), "float32"),
        (parts, "float32"),
    ]
    for path, dtype in cases:
        expected = dict(open_backbone_model(path, dtype).named_parameters(remove_duplicate=False))
        for actual in two_ranks.run(gathered, path, dtype):
            assert actual.keys() == expected.keys()
            for name, tensor in expected.items():
                assert actual[name].dtype == DTYPES[dtype]
                assert torch.equal(actual[name], tensor), (path, name)


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "int8"), ("bfloat16", "int8"), ("float32", "int4"), ("bfloat16", "nf4"), ("bfloat16", "nf4_all")],
)
def test_shards_of_integers_are_those_of_the_whole_tensors(
    two_ranks: Ranks, tiny_llama_folder: Path, tiny_t5_folder: Path, tmp_path: Path, dtype: str, quantization: str
):
    """An odd width cuts rows and blocks between the ranks."""
    odd = tiny.tiny_llama(tmp_path / "odd", intermediate_size=63)
    paths = [tiny_llama_folder, tiny_t5_folder, odd]
    if quantization == "nf4_all":
        paths = [tiny.tiny_llama(tmp_path / "tied", hidden_size=64), tiny.tiny_t5(tmp_path / "untied", d_model=64)]
    for path in paths:
        settings = BackboneSettings.model_validate({"name": str(path), "dtype": dtype, "quantization": quantization})
        expected = dict(load_dense(open_backbone(settings), settings).named_parameters(remove_duplicate=False))
        scale_bits = set() if quantization == "int8" else {torch.int32}
        assert {torch.int8, DTYPES[dtype]} | scale_bits == {tensor.dtype for tensor in expected.values()}
        for actual in two_ranks.run(gathered, path, dtype, quantization):
            assert actual.keys() == expected.keys()
            for name, tensor in expected.items():
                assert actual[name].dtype == tensor.dtype
                assert torch.equal(actual[name], tensor), (path, name)


def open_backbone_model(path: Path, dtype: str) -> Any:
    folder = open_backbone(BackboneSettings(name=str(path)))
    return folder.model_class.from_pretrained(path, dtype=DTYPES[dtype])


def loading_error(path: Path) -> str:
    with pytest.raises(BackboneError) as error:
        gathered(path, "float32")
    return str(error.value)


def test_wrong_weights_are_named(two_ranks: Ranks, tiny_llama_folder: Path, tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(tiny_llama_folder / "model.safetensors")
    for folder, change, pattern in (
        ("missing", {}, "no file of .* holds the tensor"),
        ("misshapen", {name: weights[name][:, :-1].contiguous()}, r"has shape \[64, 31\], .* makes it \[64, 32\]"),
    ):
        path = Path(shutil.copytree(tiny_llama_folder, tmp_path / folder))
        others = {key: tensor for key, tensor in weights.items() if key != name}
        save_file(others | change, path / "model.safetensors", metadata={"format": "pt"})
        for message in two_ranks.run(loading_error, path):
            assert name in message
            assert re.search(pattern, message), message


def loading_error_with_integers(path: Path) -> str:
    """Load with shards of 8-bit integers, as DeepSpeed's own quantization leaves them: floats round to 0 there."""
    convert = sharded_load.convert

    def quantizing(partitioner: Any, parameter: torch.nn.Parameter) -> None:
        convert(partitioner, parameter)
        shard = shard_of(parameter)
        shard.data = shard.data.to(torch.int8)

    sharded_load.convert = quantizing
    try:
        return loading_error(path)
    finally:
        sharded_load.convert = convert


def test_a_shard_that_does_not_hold_its_files_numbers_is_named(two_ranks: Ranks, tiny_llama_folder: Path):
    for message in two_ranks.run(loading_error_with_integers, tiny_llama_folder):
        assert re.search(r"the shard of 'model\.embed_tokens\.weight' holds torch\.int8 \[0, 0, 0\]", message), message


@pytest.mark.parametrize(
    ("backbone", "preset", "changes", "quantization"),
    [
        ("llama", "zero3_offload", {}, "none"),
        ("t5", "zero3_offload", {}, "int8"),
        ("llama", "zero3_offload", {}, "nf4"),
        # Once: DeepSpeed makes these groups once in a process.
        ("t5", "zero3_hpz", {"zero_hpz_partition_size": 2}, "int8"),
    ],
    indirect=["backbone"],
)
def test_presets(
    two_ranks: Ranks,
    backbone: Path,
    tasks: list[str],
    tmp_path: Path,
    preset: str,
    changes: dict[str, Any],
    quantization: str,
):
    """Here DeepSpeed's own gathers run, of integers beside other dtypes too."""
    raw = read_ds_config(preset)
    raw["zero_optimization"] |= changes
    path = tmp_path / f"{preset}.json"
    path.write_text(json.dumps(raw))
    changed = {"engine": {"ds_config": str(path)}, "backbone": {"quantization": quantization}}
    sharded, alone = recipes(backbone, tasks, tmp_path, changed)
    assert_same_training(*two_ranks.run(train, sharded), train(alone))
