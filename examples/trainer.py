"""Train adapters of three tasks with transformers' Trainer: the column `task_ids` names each row's task.

python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from words import TASKS, collate, dataset

import hyperscale as hs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    backbone = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = hs.adapt(backbone, ["lora"], task_names=TASKS)

    rows = Dataset.from_list(dataset(tokenizer))
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=max(1, options.steps // 2),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        print(f"loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
