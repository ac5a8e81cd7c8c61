"""Which layers of a backbone are quantized, and how many weights the stored tensors stand for."""

from collections.abc import Iterable
from functools import partial

from torch import nn

from hyperscale.config.backbone import Quantization
from hyperscale.model.architectures import Architecture
from hyperscale.model.quantized.four_bits import FourBitLinear, four_bits_of
from hyperscale.model.quantized.int8 import Int8Linear, int8_of
from hyperscale.model.shapes import whole_numel


def quantize_blocks(backbone: nn.Module, architecture: Architecture, how: Quantization) -> None:
    """Quantize the linear layers of all blocks, in place; on the meta device, only their shapes.

    Embeddings, norms and the head stay as they are, and so do weights that are in no linear layer (fused experts).
    """
    if how == "none":
        return
    quantized = int8_of if how == "int8" else partial(four_bits_of, kind=how)
    for stack in architecture.stacks:
        for block in backbone.get_submodule(stack.blocks).children():
            for path, module in list(block.named_modules()):
                if type(module) is nn.Linear:
                    owner, _, name = path.rpartition(".")
                    setattr(block.get_submodule(owner), name, quantized(module))


def num_weights(backbone: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> int:
    """Return the weights of a backbone, sharded or not, or of some of its parameters, as before quantization."""
    quantized = _weights_of_quantized(backbone)
    counted = backbone.parameters() if parameters is None else parameters
    return sum(quantized.get(id(one), whole_numel(one)) for one in counted)


def _weights_of_quantized(backbone: nn.Module) -> dict[int, int]:
    """Return the weights that quantized parameters stand for, by `id` of the parameter; scales stand for none."""
    numels: dict[int, int] = {}
    for module in backbone.modules():
        if isinstance(module, Int8Linear | FourBitLinear):
            own = {name: one for name, one in module.named_parameters(recurse=False) if name != "bias"}
            numels |= {id(one): 0 for one in own.values()}
            numels[id(own["weight"])] = module.out_features * module.in_features
    return numels
