"""Train adapters of three tasks in a loop of your own, each batch a mixture of the tasks.

python examples/own_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import TASKS, collate, dataset, prompt

import hyperscale as hs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    backbone = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = hs.adapt(backbone, [hs.LoraSettings(rank=8)], task_names=TASKS)
    model.print_trainable_parameters()

    rows = dataset(tokenizer)
    optimizer = torch.optim.AdamW(model.generator.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(1, options.steps + 1):
        batch = collate([rows[row] for row in torch.randperm(len(rows), generator=order)[:8].tolist()])
        with model.tasks(batch.pop("task_ids")):
            loss = model(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.generator.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f}")

    model.eval()
    prompts = tokenizer([prompt("walk")] * len(TASKS), return_tensors="pt")
    with model.tasks(TASKS):  # one prompt, a different task for each sample
        answers = model.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    for task, answer in zip(TASKS, answers[:, prompts["input_ids"].shape[1] :], strict=True):
        print(f"{task}: {tokenizer.decode(answer, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main()
