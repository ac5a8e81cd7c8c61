"""What bitsandbytes makes of some weights, kept in bitsandbytes_numbers.json so that a test needs no bitsandbytes.

`python -m tests.bitsandbytes_numbers` writes the file anew where it is installed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
SHAPES = ((64, 64), (96, 576), (37, 61), (1, 64), (3, 20), (5, 7), (640, 640))
"""With odd widths, an odd number of weights, fewer weights than a block, and several groups of blocks."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def weight_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return weights [shape] that look normally distributed, from integer arithmetic alone: the same everywhere."""
    numel = shape[0] * shape[1]
    state, numbers = seed, []
    for _ in range(numel):
        total = 0
        for _ in range(4):
            state = (state * 1103515245 + 12345) % 2**31
            total += state >> 16
        numbers.append(total - 2 * 2**15)
    weight = torch.tensor(numbers, dtype=torch.float32).view(shape) * 2.0**-19
    if numel > 4096:
        weight.view(-1)[128:192] = 0  # a block of zeros
        weight.view(-1)[777] = 3.0  # an outlier
    return weight


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def numbers_of(codes: Tensor, absmax: Tensor, scales: Tensor, offset: Tensor, values: Tensor) -> dict[str, Any]:
    """Return the digests of a quantized tensor's parts and a few of its numbers to read."""
    return {
        "codes": digest(codes),
        "absmax": digest(absmax),
        "scales": scales.tolist(),
        "offset": offset.item(),
        "values": digest(values),
        "first codes": codes.flatten()[:8].tolist(),
        "first absmax": absmax[:8].tolist(),
        "first values": values.flatten()[:4].tolist(),
    }


def numbers_of_bitsandbytes(weight: Tensor) -> dict[str, Any]:
    """Quantize and dequantize a weight by bitsandbytes."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    values = functional.dequantize_4bit(codes, state)
    return numbers_of(codes, state.absmax, state.state2.absmax, state.offset, values)


def main() -> None:
    """Write the file."""
    import bitsandbytes

    torch.set_num_threads(1)
    cases = {
        f"{rows}x{columns} {name}": numbers_of_bitsandbytes(weight_of((rows, columns), seed).to(dtype))
        for seed, (rows, columns) in enumerate(SHAPES)
        for name, dtype in DTYPES.items()
    }
    written = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, "cases": cases}
    FILE.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
