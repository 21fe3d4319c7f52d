"""A layer's steps, written once for both directions: forward in order, backward each step's gradient in reverse."""

from __future__ import annotations

from dataclasses import dataclass, field

from simulator.dtypes import W_BF16, WeightFormat
from simulator.kernels.elementwise import backward, norm
from simulator.kernels.gemm import batched_gemm, batched_gemm_backward, gemm, gemm_backward
from simulator.layers.layer import Direction
from simulator.units import Bytes, Num
from simulator.work import Op, Serial, Work


@dataclass(slots=True)
class Steps:
    """Collects the steps of a layer in forward order."""

    direction: Direction
    parts: list[Work] = field(default_factory=list)

    @property
    def is_backward(self) -> bool:
        """Whether gradients are asked for."""
        return self.direction is Direction.BACKWARD

    def norm(self, name: str, *, tokens: Num, width: Num) -> None:
        """The norm before a sub-block, with the residual addition."""
        self.stream(norm(name, tokens=tokens, width=width))

    def linear(self, name: str, *, m: Num, n: Num, k: Num, weight: WeightFormat = W_BF16, saved_bytes: Bytes = 0.0) -> None:
        """A product with a weight; backward both gradients, which free what was saved."""
        if self.is_backward:
            self.parts.append(gemm_backward(name, m=m, n=n, k=k, weight=weight, freed_bytes=saved_bytes))
        else:
            self.parts.append(gemm(name, m=m, n=n, k=k, weight=weight, saved_bytes=saved_bytes))

    def batched(self, name: str, *, members: Num, m: Num, n: Num, k: Num) -> None:
        """A product of each member with a weight of its own."""
        make = batched_gemm_backward if self.is_backward else batched_gemm
        self.parts.append(make(name, members=members, m=m, n=n, k=k))

    def stream(self, op: Op) -> None:
        """An elementwise step."""
        self.parts.append(backward(op) if self.is_backward else op)

    def forward_only(self, op: Work) -> None:
        """A step that has no gradient: a cache write, a selection."""
        if not self.is_backward:
            self.parts.append(op)

    def add(self, *ops: Work) -> None:
        """Steps that were made for the direction asked for."""
        self.parts.extend(ops)

    def serial(self) -> Work:
        """All of them, one after the other."""
        return Serial(self.parts[::-1] if self.is_backward else self.parts)
