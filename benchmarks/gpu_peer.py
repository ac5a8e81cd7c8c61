"""What a user would pick instead, on one device: PEFT's LoRA in transformers' Trainer over DeepSpeed ZeRO-3."""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from hyperscale.data.collate import Batch

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3},
}


def load(backbone: Path, model_class: str) -> Any:
    """Load a backbone as the peer's users do: `from_pretrained` under transformers' DeepSpeed integration."""
    _alone()
    kept = HfDeepSpeedConfig({**ZERO3, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    model = getattr(transformers, model_class).from_pretrained(backbone, dtype=torch.bfloat16)
    del kept  # transformers looks for it while it loads
    return model


class _StepTimer(TrainerCallback):
    def __init__(self, warm_up: int) -> None:
        self.seconds: list[float] = []
        self._warm_up = warm_up
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            if state.global_step == self._warm_up:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class _TrainerOnBatches(Trainer):
    """A Trainer that uses the batches it receives, uncollated."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_size=None)  # type: ignore[arg-type]


def step_seconds(
    backbone: Path, model_class: str, batch: Batch, checkpointing: bool, warm_up: int, measured: int
) -> tuple[float, int]:
    """Return the median seconds of a step on the same tokens each time, and the device's peak memory in bytes."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 (loading alone needs none)

    _alone()
    with tempfile.TemporaryDirectory(prefix="hyperscale-peer-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=warm_up + measured,
            per_device_train_batch_size=len(batch.input_ids),
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=True,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            use_cpu=not torch.cuda.is_available(),
            deepspeed=ZERO3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        model = getattr(transformers, model_class).from_pretrained(backbone, dtype=torch.bfloat16)
        is_seq2seq = model.config.is_encoder_decoder
        lora = LoraConfig(
            r=8,
            lora_alpha=8,
            target_modules=["q", "v"] if is_seq2seq else ["q_proj", "v_proj"],
            task_type="SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM",
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        inputs: Mapping[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }
        watch = _StepTimer(warm_up)
        data: Any = [inputs] * (warm_up + measured)
        _TrainerOnBatches(model=model, args=arguments, train_dataset=data, callbacks=[watch]).train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return statistics.median(watch.seconds[warm_up:]), peak


def _alone() -> None:
    """Describe a process group of one rank in the environment."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
