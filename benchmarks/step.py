"""A training step against PEFT, transformers' Trainer and DeepSpeed: SmolLM2-135M, 2 gloo ranks of one thread.

LoRA r = 8 on q and v on both sides, the same token ids, padding, dtype, clipping and AdamW; ours from the hypernetwork
for seven tasks, PEFT's one set for all. Every side computes all logits, but in the rows that say otherwise. The sides
run in process groups of their own and take turns, step by step.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write_report
from benchmarks.turns import Group

RANKS = 2
WARM_UP_STEPS = 3
"""First steps, not counted: DeepSpeed records the order of modules in two."""
ROUNDS = 5
SHORT_ROUNDS = 3
DTYPES = ("bfloat16", "float32")
PEERS = {
    "peft-zero3": "PEFT, ZeRO-3 by its defaults",
    "peft-tuned": "PEFT, ZeRO-3, persistence 0, plain attention",
    "peft-grouped": "PEFT, ZeRO-3, persistence 0, plain, bucketed",
    "peft-persistent": "PEFT, ZeRO-3, all persistent, plain attention",
    "peft-ddp": "PEFT, DDP, unsharded, plain attention",
}
TOGETHER = (
    ("ours", "ours by default", "peft-zero3", "peft-tuned", "peft-ddp"),
    ("ours for speed", "peft-persistent", "ours bucketed", "peft-grouped"),
)
"""Process groups that take turns in one run: all that a goal compares, and what 24 GiB hold at one time."""
GOALS = (
    ("none", "peft-zero3", 1.1),
    ("none", "peft-tuned", 1.0),
    ("none, bucketed", "peft-grouped", 1.0),
    ("auto", "peft-zero3", 1.5),
    ("auto", "peft-ddp", 0.95),
    ("all", "unsharded", 1 / 1.15),
)

Figures = dict[str, dict[str, list[float]]]
"""Row -> `seconds`, `processor` (seconds of rank 0's processor) and `tokens` (real ones, all ranks) of every step."""


def measure(dtype: str, names: Sequence[str], folder: Path, rounds: int) -> Figures:
    """Let groups of ours and peers take turns; return the figures of the counted steps."""
    groups = [
        Group(name, RANKS, "benchmarks.step_peft" if name in PEERS else "benchmarks.step_ours", [name, dtype], folder)
        for name in names
    ]
    series: Figures = {}
    try:
        for number in range(WARM_UP_STEPS + rounds):
            for group in groups:
                for row, figures in group.turn(number).items():
                    if number >= WARM_UP_STEPS:
                        for key, value in figures.items():
                            series.setdefault(row, {}).setdefault(key, []).append(value)
    finally:
        for group in groups:
            group.stop()
    return series


def table(results: Mapping[str, Figures]) -> str:
    """Return the medians, and each goal with what came out, as text."""
    lines = [f"{'dtype':<9} {'row':<48} {'step s':>7} {'cpu s':>7} {'tokens/s':>9}"]
    for dtype, rows in results.items():
        for row, figures in rows.items():
            seconds, processor = statistics.median(figures["seconds"]), statistics.median(figures["processor"])
            speed = sum(figures["tokens"]) / sum(figures["seconds"])
            lines.append(
                f"{dtype:<9} {PEERS.get(row, f'ours, {row}'):<48} {seconds:>7.2f} {processor:>7.2f} {speed:>9.0f}"
            )
    lines.append(
        "\nspeed of ours over the peer's, median of the rounds' own ratios: by the clock, by the processor's time"
    )
    for dtype, rows in results.items():
        for ours, peer, goal in GOALS:
            clock, processor = (ratio(rows, ours, peer, key) for key in ("seconds", "processor"))
            lines.append(f"{dtype:<9} {ours:<14} over {peer:<12} {clock:>6.2f} {processor:>6.2f}  goal {goal}")
    return "\n".join(lines)


def ratio(rows: Figures, ours: str, peer: str, key: str) -> float:
    """Return how many of our steps fit into one of the peer's."""
    pairs = zip(rows[peer][key], rows[ours][key], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def main() -> None:
    """Measure one dtype, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="this one alone")
    short = f"{SHORT_ROUNDS} counted rounds instead of {ROUNDS}"
    parser.add_argument("--short", action="store_const", const=SHORT_ROUNDS, default=ROUNDS, dest="rounds", help=short)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for dtype in [options.dtype] if options.dtype else DTYPES:
        results[dtype] = {}
        for names in TOGETHER:
            with tempfile.TemporaryDirectory(prefix="hyperscale-step-") as scratch:
                results[dtype].update(measure(dtype, names, Path(scratch), options.rounds))
        print(table({dtype: results[dtype]}), flush=True)
    write_report("step", {"benchmark": "step", "ranks": RANKS, "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
