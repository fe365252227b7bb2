"""Runs a PyTorch network that holds float32 or bfloat16 weights in float64, matrix by matrix.

The network's own code is run: every tensor that it uses, and every dtype that it names, is widened
on the way into an operation. So norms and softmaxes that ask for float32 by name are in float64 as
well, and memory holds one matrix more, or a part of one, not a second network.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROW = (torch.float32, torch.bfloat16, torch.float16)
AT_ONCE = 1 << 26
"""Entries of a matrix that are widened at once: 0.5 GB. An 8B model's head has ten times more."""
_CASTS = (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half)


class Double(TorchFunctionMode):
    """Widens what every function of PyTorch is given and gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute of a tensor
            return func(*args, **kwargs)
        if func is F.embedding:  # a lookup: only what it finds is widened
            return _wide(func(*args, **kwargs))
        if func is F.linear and args[1].numel() > AT_ONCE:
            return _linear(*args, **kwargs)
        func = torch.Tensor.double if func in _CASTS else func
        return _wide(func(*_wide(args), **_wide(kwargs)))


def _wide(tree: Any) -> Any:
    def widen(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.dtype in NARROW:
            return x.detach().double()
        return torch.float64 if isinstance(x, torch.dtype) and x in NARROW else x

    return tree_map(widen, tree)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    rows = max(1, AT_ONCE // weight.shape[1])
    x = _wide(x)
    out = torch.cat([F.linear(x, part.double()) for part in weight.split(rows)], -1)
    return out if bias is None else out + bias.double()


@contextmanager
def in_double(module: nn.Module | None = None) -> Iterator[None]:
    """Computes in float64 what runs inside, a network's rotary frequencies too.

    Those are buffers, made in float32 when the network was: 1e-7 of a turn at the first positions,
    and a hundred times that at position 100. So they are made anew in float64, and put back later.
    """
    kept = []
    with Double():
        for m in [] if module is None else module.modules():
            names = [n for n, _ in m.named_buffers(recurse=False) if n.endswith("inv_freq")]
            if not names or not type(m).__module__.startswith("transformers.models."):
                continue
            fresh = dict(type(m)(m.config).named_buffers())  # pyright: ignore  its constructor
            kept += [(m, n, m._buffers[n]) for n in names]
            m._buffers.update({n: fresh[n] for n in names})
        try:
            yield
        finally:
            for m, name, buffer in kept:
                m._buffers[name] = buffer


class Keep:
    """Notes what stages give, and puts something else in its place."""

    def __init__(self, instead: Mapping[str, np.ndarray]):
        self.instead = instead
        self.states: dict[str, np.ndarray] = {}

    def __call__(self, name: str, value: Any) -> Any:
        state = value[0] if isinstance(value, tuple) else value
        self.states[name] = as_array(state)
        if name not in self.instead:
            return value
        given = torch.from_numpy(self.instead[name]).to(state.dtype)
        return (given, *value[1:]) if isinstance(value, tuple) else given


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor as float32, or as float64 where `in_double` is in force."""
    return tensor.detach().float().cpu().numpy()
