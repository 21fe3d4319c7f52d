"""Kernels that stream rows through memory: norms, rotary, activations, gathers, copies."""

from __future__ import annotations

from collections.abc import Mapping

from simulator.dtypes import BF16, INT8, DType
from simulator.units import Num
from simulator.work import Aside, Op


def elementwise(
    name: str,
    *,
    rows: Num,
    read: Num,
    written: Num,
    impl: str,
    dtype: DType = BF16,
    flops_per_element: float = 4.0,
    kept: Num = 0.0,
    alive: Num | None = None,
    handed: bool = True,
    extents: Mapping[str, Num] | None = None,
) -> Op:
    """`rows` rows that read and write so many elements each, and keep some for backward.  `alive` elements of a row exist while it
    runs (None: all that is read and written; fewer where it writes over what it read).  `handed`: the kernel before it wrote what
    it reads and the one after it reads what it writes, as within a layer; else its rows lie cold in memory.  `extents` are more names
    of its shape.

    bytes = rows (read + written) e; vector flops = flops_per_element x rows x read: never the limit.
    Source: FORMULAS 1.20 ("charge bytes, not FLOPs").
    """
    moved = rows * ((read + written) * dtype.bytes)
    held = moved if alive is None else rows * (alive * dtype.bytes)
    return Op(
        name, "elementwise", impl, dtype.name, hbm_bytes=moved,
        shape={"rows": rows, "row_bytes": (read + written) * dtype.bytes, "handed_bytes": held if handed else 0.0, **(extents or {})},
        aside=lambda: Aside(rows * (read * flops_per_element), held, rows * (kept * dtype.bytes)),
    )  # fmt: skip


def norm(name: str, *, tokens: Num, width: Num, dtype: DType = BF16) -> Op:
    """RMSNorm fused with the residual addition: read x and residual, write both (4 width elements).

    Keeps the residual and its output for backward.
    """
    return elementwise(name, rows=tokens, read=2 * width, written=2 * width, impl="norm", dtype=dtype, kept=2 * width)


def norm_in_place(name: str, *, tokens: Num, width: Num) -> Op:
    """RMSNorm within a block (of heads, of a latent), written over what it read: `width` elements, which backward needs."""
    return elementwise(name, rows=tokens, read=width, written=width, impl="norm", kept=width, alive=width)


def activation(name: str, *, tokens: Num, width: Num, dtype: DType = BF16) -> Op:
    """Gated activation: read gate and up (kept for backward), write the product."""
    return elementwise(name, rows=tokens, read=2 * width, written=width, impl="activation", dtype=dtype, kept=2 * width)


def backward(op: Op) -> Op:
    """The gradient of an elementwise op: reads its inputs, saved long before, and the incoming gradient, frees what it saved.

    Alive beside what was saved: a gradient for every tensor that the op read or wrote.
    """
    found = elementwise(
        f"{op.name} backward", rows=1.0, read=op.hbm_bytes, written=op.hbm_bytes * 0.5, impl=op.impl, dtype=INT8,
        kept=-op.saved_bytes, flops_per_element=2.0, handed=False,
    )  # fmt: skip
    own, forward = found.aside, op.aside
    found.aside = lambda: own()._replace(live_bytes=forward().live_bytes)
    return found


def rotary(name: str, *, tokens: Num, width: Num, dtype: DType = BF16) -> Op:
    """Rotate queries and keys in place: read and write `width` elements."""
    return elementwise(name, rows=tokens, read=width, written=width, impl="rotary", dtype=dtype, flops_per_element=3.0, alive=width)


def copy(name: str, *, rows: Num, width: Num, dtype: DType = BF16) -> Op:
    """Read and write `width` elements: gathers, cache writes, permutations."""
    return elementwise(name, rows=rows, read=width, written=width, impl="copy", dtype=dtype, flops_per_element=0.0)


def permute(name: str, *, tokens: Num, rows: Num, width: Num) -> Op:
    """Every token's row read once and written to its `rows / tokens` experts' rows."""
    extents = {"tokens": tokens, "routed": rows, "width": width}
    return elementwise(
        name, rows=1.0, read=tokens * width, written=rows * width, impl="permute", flops_per_element=0.0, extents=extents,
    )  # fmt: skip


def combine(name: str, *, tokens: Num, rows: Num, width: Num) -> Op:
    """Every token's `rows / tokens` experts' rows read, weighed and added into one row."""
    extents = {"tokens": tokens, "routed": rows, "width": width}
    return elementwise(
        name, rows=1.0, read=rows * width, written=tokens * width, impl="combine", flops_per_element=2.0, extents=extents,
    )  # fmt: skip


def add(name: str, *, rows: Num, width: Num) -> Op:
    """The sum of two tensors of `width` elements a row, written over one of them."""
    return elementwise(name, rows=rows, read=2 * width, written=width, impl="add", flops_per_element=0.5, alive=2 * width)


def join(name: str, *, rows: Num, heads: Num, plain: int, turned: int) -> Op:
    """Keys of `heads` heads put together: each head's own `plain` part beside the `turned` part that all heads share."""
    extents = {"heads": heads, "plain": float(plain), "turned": float(turned)}
    return elementwise(
        name, rows=rows, read=heads * plain + turned, written=heads * (plain + turned), impl="join", flops_per_element=0.0, extents=extents,
    )  # fmt: skip
