"""What the algorithms of this package share: drawn tensors, and a model of one block for the simulator's schemes."""

from __future__ import annotations

from typing import Any

import torch

from simulator.layers import Embedding, Head
from simulator.layers.layer import Layer
from simulator.model import ModelSpec


def drawn(seed: int, shape: tuple[int, ...], device: Any, dtype: Any, spread: float = 1.0) -> Any:
    """The same normal numbers on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(device=device, dtype=dtype)


def filled(shape: tuple[int, ...], device: Any, dtype: Any = torch.bfloat16, spread: float = 1.0) -> Any:
    """Normal numbers drawn where they are used."""
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, spread)


def one_block(hidden: int, *layers: Layer) -> ModelSpec:
    """A stack of one block, for a layout to be placed on."""
    vocabulary = 256
    return ModelSpec("one block", hidden, vocabulary, ((1, layers),), Embedding(vocabulary, hidden), Head(vocabulary, hidden))
