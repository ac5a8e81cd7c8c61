"""Train adapters of three tasks with Accelerate, on one process or several:

accelerate launch examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import TASKS, collate, dataset

import hyperscale as hs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    backbone = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = hs.adapt(backbone, ["lora"], task_names=TASKS)
    optimizer = torch.optim.AdamW(model.generator.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset(tokenizer), batch_size=4, shuffle=True, collate_fn=collate, generator=order)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for batch in loader:
            loss = model(**batch).loss  # the batch holds task_ids
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"epoch {epoch} loss {total / len(loader):.3f}")


if __name__ == "__main__":
    main()
