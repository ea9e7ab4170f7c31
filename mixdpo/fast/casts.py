"""Casts of frozen weights to the compute dtype, once and not in every forward pass: the same numbers.

Autocast casts the weights of linear layers each time that a layer runs, and keeps a cast only within one pass and only
of weights that learn.
"""

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def cast_once(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight.to(dtype); of a frozen parameter it is kept until the parameter changes, moves or learns."""
    if weight.requires_grad or weight.dtype == dtype or not isinstance(weight, torch.nn.Parameter):
        return weight.to(dtype)
    state = weight._version, weight.data_ptr(), dtype
    kept = getattr(weight, "kept_cast", None)
    if kept is None or kept[0] != state:
        kept = state, weight.detach().to(dtype)
        weight.kept_cast = kept                                             # type: ignore[attr-defined]
    return kept[1]


def cast_linears(model: Module, dtype: torch.dtype) -> Module:
    """A frozen twin of a model for many passes under autocast: linear layers have their weights in `dtype`. All other
    parameters, which autocast does not touch, are the model's own, as are all in float32. Equals the model to the bit,
    as long as the model does not change."""
    linear = {id(p) for module in model.modules() if isinstance(module, nn.Linear)
              for p in module.parameters(recurse=False)}
    twins = {id(p): nn.Parameter(p.detach().to(dtype) if id(p) in linear else p.detach(), requires_grad=False)
             for p in model.parameters()}
    return copy.deepcopy(model, twins)                                      # takes these where it meets the parameters
