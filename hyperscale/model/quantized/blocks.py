"""Which layers of a backbone are quantized, and how many weights the stored tensors stand for."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hyperscale.config.backbone import Quantization
from hyperscale.errors import BackboneError
from hyperscale.model.architectures import Architecture
from hyperscale.model.quantized.codes import BLOCK, FourBitKind, FourBits
from hyperscale.model.quantized.four_bits import FourBitEmbedding, FourBitLinear, FourBitWeight, four_bits_of
from hyperscale.model.quantized.int8 import Int8Linear, int8_of
from hyperscale.model.shapes import whole_numel


def quantize_backbone(backbone: PreTrainedModel, architecture: Architecture, how: Quantization) -> None:
    """Quantize the linear layers of all blocks, in place; on the meta device, only their shapes.

    Norms stay as they are, and so do weights that are in no linear layer (fused experts). The embedding and the head
    are quantized by `nf4_all` alone.

    Raises:
        BackboneError: `nf4_all` cannot store the embedding or the head of this backbone.
    """
    if how == "none":
        return
    if how == "nf4_all":
        _quantize_vocabulary(backbone)
    for stack in architecture.stacks:
        for block in backbone.get_submodule(stack.blocks).children():
            for path, module in list(block.named_modules()):
                if type(module) is nn.Linear:
                    _replace(block, path, _quantized(module, how))


def _quantized(linear: nn.Linear, how: Quantization) -> nn.Linear:
    if how == "int8":
        return int8_of(linear)
    kind: FourBitKind = "int4" if how == "int4" else "nf4"
    return FourBitLinear(linear, four_bits_of(linear.weight, kind), kind)


def _quantize_vocabulary(backbone: PreTrainedModel) -> None:
    """Quantize the input embedding, wherever it is used, and the head; tied weights stay one."""
    embedding: Any = backbone.get_input_embeddings()
    head: Any = backbone.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or embedding.embedding_dim % BLOCK:
        raise BackboneError(
            f"backbone.quantization=nf4_all takes a plain embedding and head whose width is a multiple of {BLOCK}; "
            f"this backbone has {type(embedding).__name__} and {type(head).__name__} of width "
            f"{embedding.embedding_dim}: use nf4, which leaves both as they are"
        )
    of_embedding = _as_parameters(four_bits_of(embedding.weight, "nf4"))
    is_tied = head.weight is embedding.weight
    of_head = of_embedding if is_tied else _as_parameters(four_bits_of(head.weight, "nf4"))
    weight = embedding.weight
    for path, module in list(backbone.named_modules(remove_duplicate=False)):
        if module is head:
            _replace(backbone, path, FourBitLinear(head, of_head, "nf4"))
        elif type(module) is nn.Embedding and module.weight is weight:
            _replace(backbone, path, FourBitEmbedding(module, of_embedding, "nf4"))


def _as_parameters(stored: FourBits) -> FourBits:
    return FourBits(*(nn.Parameter(tensor, requires_grad=False) for tensor in stored))


def _replace(root: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(root.get_submodule(owner), name, layer)


def num_weights(backbone: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> int:
    """Return the weights of a backbone, sharded or not, or of some of its parameters, as before quantization."""
    quantized = _weights_of_quantized(backbone)
    counted = backbone.parameters() if parameters is None else parameters
    return sum(quantized.get(id(one), whole_numel(one)) for one in counted)


def _weights_of_quantized(backbone: nn.Module) -> dict[int, int]:
    """Return the weights that quantized parameters stand for, by `id` of the parameter; scales stand for none."""
    numels: dict[int, int] = {}
    for module in backbone.modules():
        if isinstance(module, Int8Linear | FourBitWeight):
            own = {name: one for name, one in module.named_parameters(recurse=False) if name != "bias"}
            numels |= {id(one): 0 for one in own.values()}
            if isinstance(module, FourBitWeight):
                numels[id(own["weight"])] = module.num_rows * module.width
            else:
                numels[id(own["weight"])] = module.out_features * module.in_features
    return numels
