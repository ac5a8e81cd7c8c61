"""Whole shapes of parameters. A sharded parameter's own tensor is empty until it is gathered."""

from typing import Any, cast

import torch
from torch import nn


def record_whole_shape(parameter: nn.Parameter, shape: torch.Size) -> None:
    """Record the whole shape of a parameter before it is sharded."""
    cast(Any, parameter).whole_shape = shape


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, sharded or not."""
    shape: torch.Size = getattr(parameter, "whole_shape", parameter.shape)
    return shape


def whole_numel(parameter: nn.Parameter) -> int:
    """Return the number of elements of the whole parameter, sharded or not."""
    return whole_shape(parameter).numel()
