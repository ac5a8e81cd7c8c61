"""The other side of the step benchmark: PEFT's LoRA under transformers' Trainer, over DeepSpeed ZeRO-3 or DDP."""

import os
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.batches import batches_of, bucket, recipe_of
from benchmarks.step import RANKS, ROUNDS, WARM_UP_STEPS
from benchmarks.turns import TurnFollower
from hyperscale.data.collate import Batch
from hyperscale.model.backbone import DTYPES, open_backbone


class StepTimer(TrainerCallback):
    """Waits for its turn before each step and reports how long the step took."""

    def __init__(self, folder: str, tokens: list[int]) -> None:
        self._turns = TurnFollower(folder)
        self._tokens = tokens
        self._start = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 0:
            self._turns.wait(state.global_step)
        dist.barrier()
        self._start = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        if dist.get_rank() == 0:
            number = state.global_step - 1
            figures = {"seconds": seconds, "processor": processor, "tokens": self._tokens[number]}
            self._turns.done(number, {sys.argv[1]: figures})


class TrainerOnBatches(Trainer):
    """A Trainer that uses the batches it receives, uncollated."""

    def __init__(self, batches: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(**options)
        self._batches = batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]


def deepspeed_config(peer: str) -> dict[str, Any] | None:
    """Return the peer's DeepSpeed JSON: what one must say, and what it tunes.

    Blocks as leaves (`set_z3_leaf_modules`) are not among it: DeepSpeed 0.19.8 lets a leaf's trained parameters go
    before their gradients are made, and the backward pass fails.
    """
    if peer == "peft-ddp":
        return None
    tuned = {
        "peft-tuned": {"stage3_param_persistence_threshold": 0},
        "peft-grouped": {"stage3_param_persistence_threshold": 0},
        "peft-persistent": {
            "stage3_param_persistence_threshold": 10**15,
            "stage3_model_persistence_threshold": 10**15,
        },
    }
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, **tuned.get(peer, {})},
    }


def inputs_of(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def main() -> None:
    """Be one rank: `peer dtype folder` on the command line."""
    peer, dtype, folder = sys.argv[1:]
    torch.set_num_threads(1)
    config = deepspeed_config(peer)
    if config:
        import deepspeed  # noqa: PLC0415 (DDP has none)

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of compiling; ours has none either
    recipe = recipe_of(dtype, RANKS, bucket(peer == "peft-grouped"))
    with tempfile.TemporaryDirectory(prefix="hyperscale-peft-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=WARM_UP_STEPS + ROUNDS,
            per_device_train_batch_size=recipe.training.micro_batch_size,
            learning_rate=recipe.training.optimizer.learning_rate,
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch",
            bf16=config is not None and dtype == "bfloat16",
            use_cpu=True,
            ddp_backend=None if config else "gloo",
            deepspeed=config,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        attention = {} if peer == "peft-zero3" else {"attn_implementation": "eager"}
        path = open_backbone(recipe.backbone).path
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **attention)
        lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        # In fp32, PEFT's default, the adapters make DeepSpeed refuse a bf16 backbone.
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        steps = [batches_of(recipe, rank, WARM_UP_STEPS + ROUNDS) for rank in range(RANKS)]
        mine = [inputs_of(batch) for batches in steps[int(os.environ["RANK"])] for batch in batches]
        tokens = [sum(rank[number][0].num_tokens for rank in steps) for number in range(WARM_UP_STEPS + ROUNDS)]
        trainer = TrainerOnBatches(
            mine, model=model, args=arguments, train_dataset=mine, callbacks=[StepTimer(folder, tokens)]
        )
        trainer.train()


if __name__ == "__main__":
    main()
