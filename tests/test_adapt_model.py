"""`hs.adapt`: adapters of several tasks on a transformers model that the caller holds."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

import hyperscale as hs
from hyperscale.errors import BackboneError, BundleError, ConfigError
from hyperscale.model.backbone import set_activation_checkpointing
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks
ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ["lora", {"kind": "bottleneck", "reduction": 4}]
TASKS = ("news", "mail", "films")
MIXED = [2, 0, 1, 2]


@pytest.fixture(params=["llama", "t5"])
def backbone(request: pytest.FixtureRequest) -> Any:
    """A model as a user holds it."""
    folder = request.getfixturevalue(f"tiny_{request.param}_folder")
    kind = AutoModelForCausalLM if request.param == "llama" else AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def model(backbone: Any) -> Any:
    adapted = hs.adapt(backbone, ADAPTERS, task_names=TASKS).eval()
    tiny.disturb(adapted.generator)
    return adapted


def batch() -> dict[str, Tensor]:
    ids = torch.arange(4 * 6).reshape(4, 6) % 50 + 10
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}


def gradients(model: Any) -> dict[str, Tensor]:
    gradients_by_name = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return gradients_by_name


@torch.no_grad()
def test_before_training_the_adapted_model_is_the_model(backbone: Any):
    expected = backbone(**batch()).logits
    adapted = hs.adapt(backbone, ADAPTERS, task_names=TASKS)
    assert torch.equal(adapted(**batch(), task_ids=MIXED).logits, expected)
    assert torch.equal(adapted.backbone(**batch()).logits, expected)


def test_each_sample_of_a_mixed_batch_gets_its_own_tasks_adapters(model: Any):
    mixed = model(**batch(), task_ids=MIXED).logits
    for row, task in enumerate(MIXED):
        with model.tasks(TASKS[task]):
            alone = model(**{name: values[row : row + 1] for name, values in batch().items()}).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed, model(**batch(), task_ids=[0]).logits, atol=1e-3)


def test_only_the_generator_trains(model: Any):
    with model.tasks(MIXED):
        model(**batch()).loss.backward()
    learned = gradients(model)
    assert learned
    assert all(name.startswith("generator.") for name in learned)
    assert {name for name, one in model.named_parameters() if one.requires_grad} >= set(learned)
    assert not any(one.requires_grad for one in model.backbone.parameters())


def test_checkpointed_blocks_run_again_with_the_same_adapters(model: Any):
    model.train()
    torch.manual_seed(0)
    model(**batch(), task_ids=MIXED).loss.backward()
    expected = gradients(model)
    set_activation_checkpointing(model.backbone)
    torch.manual_seed(0)
    loss = model(**batch(), task_ids=MIXED).loss
    loss.backward()  # outside of any `with`, as Trainer does it
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generate_answers_a_mixed_batch_as_each_sample_alone(model: Any, options: dict[str, int]):
    inputs = {name: values for name, values in batch().items() if name != "labels"}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    together = model.generate(**inputs, task_ids=MIXED, **settings).reshape(
        4, options.get("num_return_sequences", 1), -1
    )
    for row, task in enumerate(MIXED):
        with model.tasks(task):
            alone = model.generate(**{name: values[row : row + 1] for name, values in inputs.items()}, **settings)
        assert torch.equal(together[row], alone)


def test_adapters_leave_as_peft_folders(tiny_llama_folder: Path, tmp_path: Path):
    def backbone() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()

    model = hs.adapt(backbone(), [hs.LoraSettings(rank=4, alpha=16)], task_names=TASKS).eval()
    tiny.disturb(model.generator)
    folders = model.save_adapters(tmp_path)
    assert list(folders) == list(TASKS)
    for task, folder in folders.items():
        served = PeftModel.from_pretrained(backbone(), folder)
        torch.testing.assert_close(
            served(**batch()).logits, model(**batch(), task_ids=task).logits, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(BundleError, match="bottleneck adapters: PEFT has no such type"):
        hs.adapt(backbone(), ADAPTERS, num_tasks=1).save_adapters(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_failed_save_leaves_the_earlier_adapters(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    model = hs.adapt(backbone, [hs.LoraSettings(rank=4)], task_names=TASKS)
    folder = next(iter(model.save_adapters(tmp_path).values()))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tiny.disturb(model.generator)

    def full_disk(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(BundleError, match=r"adapter .* cannot be written: No space left"):
            model.save_adapters(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TASKS)


def test_the_state_is_the_generators_alone(model: Any, tmp_path: Path):
    state = model.state_dict()
    assert state.keys() == {f"generator.{name}" for name in model.generator.state_dict()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    tiny.disturb(model.generator)
    assert not all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_trainer_trains_saves_and_resumes(tiny_llama_folder: Path, tmp_path: Path):
    def trainer(steps: int) -> Trainer:
        backbone = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
        rows = [{"input_ids": [5 + n, 6, 7], "labels": [5 + n, 6, 7], "task_ids": n % 3} for n in range(12)]
        options = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return Trainer(hs.adapt(backbone, num_tasks=3), options, train_dataset=rows, eval_dataset=rows)

    whole = trainer(4)
    whole.train()
    assert whole.evaluate()["eval_loss"] > 0
    saved = tmp_path / "checkpoint-2" / "model.safetensors"
    assert saved.stat().st_size < 4 * sum(one.numel() for one in whole.model.generator.parameters()) + 20_000
    again = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_wrong_tasks_are_named(model: Any):
    with pytest.raises(ValueError, match=r"no task is chosen: pass task_ids"):
        model(**batch())
    with pytest.raises(ValueError, match=r"3 tasks for a batch of 4 samples"):
        model(**batch(), task_ids=[0, 1, 2])
    with pytest.raises(ValueError, match=r"no task 'mial'\. Did you mean 'mail'\? The model has: news, mail, films"):
        model(**batch(), task_ids="mial")
    with pytest.raises(ValueError, match=r"tasks \[3\]: give at least one, each from 0 to 2"):
        model(**batch(), task_ids=3)


def test_wrong_settings_are_named(tiny_llama_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with pytest.raises(ConfigError, match=r"adapt: adapters\[0\]\.rank: 0 is not allowed"):
        hs.adapt(model, [{"kind": "lora", "rank": 0}], num_tasks=2)
    with pytest.raises(ConfigError, match="target 'qq' cannot be used on a llama backbone"):
        hs.adapt(model, [{"kind": "lora", "targets": ["qq"]}], num_tasks=2)
    with pytest.raises(ConfigError, match="num_tasks None must be at least 1"):
        hs.adapt(model)
    with pytest.raises(ConfigError, match="num_tasks 2 contradicts task_names, which has 3"):
        hs.adapt(model, num_tasks=2, task_names=TASKS)
    model.config.model_type = "gpt2"
    with pytest.raises(BackboneError, match="'gpt2' are not supported"):
        hs.adapt(model, num_tasks=2)


@pytest.mark.parametrize(
    ("example", "options"),
    [("own_loop", ["--steps", "60"]), ("trainer", ["--steps", "60"]), ("accelerate_loop", ["--epochs", "12"])],
)
def test_examples_run_and_learn(example: str, options: list[str], tiny_llama_folder: Path, tmp_path: Path):
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), "--model", str(tiny_llama_folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"\bloss (?:[\d.]+ -> )?([\d.]+)", result.stdout)]
    first = float(re.search(r"\bloss ([\d.]+)", result.stdout)[1])  # type: ignore[index]
    assert losses[-1] < 0.9 * first, result.stdout
