"""The role of a generator's parameters: they compute codes, turn codes into weights, or are stored weights."""

from torch import nn

from hyperscale.model.generators.heads import Head, Heads, SiteHeads
from hyperscale.model.generators.independent import WeightTable


def head_weights(generator: nn.Module) -> frozenset[str]:
    """Return the parameter names of the weights, not the biases, of all heads in a generator."""
    return frozenset(
        f"{name}.linear.weight" if isinstance(module, Head) else f"{name}.weight"
        for name, module in generator.named_modules()
        if isinstance(module, Head | SiteHeads)
    )


def code_parameters(generator: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that compute codes: task encoder, layer and position embeddings, trunks.

    These are all but heads, their biases and stored weights. `independent` and `shared` have none.
    """
    others = (
        f"{name}.{parameter}"
        for name, module in generator.named_modules()
        if isinstance(module, Heads | SiteHeads | WeightTable)
        for parameter, _ in module.named_parameters()
    )
    return frozenset(name for name, _ in generator.named_parameters()).difference(others)
