"""Matrix product of activations with a weight.

Legend: m rows (tokens), n outputs, k inputs.
"""

from __future__ import annotations

from typing import TypedDict

from simulator.dtypes import BF16, W_BF16, DType, WeightFormat
from simulator.units import Num
from simulator.work import Aside, Op, Serial, Work


class Size(TypedDict):
    """Extents of a product: (m, k) x (k, n)."""

    m: Num
    n: Num
    k: Num


def gemm(
    name: str,
    *,
    m: Num,
    n: Num,
    k: Num,
    weight: WeightFormat = W_BF16,
    out: DType = BF16,
    saved_bytes: Num = 0.0,
) -> Op:
    """(m, k) x (k, n) -> (m, n).

    flops = 2 m n k; bytes = m k activation + k n weight + m n out, each once.
    Neglected: bias (n values), dynamic activation scales of fp8 (1/128 of the input).
    Source: definition; FORMULAS 3.6.

    >>> gemm("qkv", m=1, n=10240, k=8192).tensor_flops
    167772160.0
    """
    flops = m * (n * (2.0 * k))
    outputs = m * (n * out.bytes)
    return Op(
        name, "gemm", "", weight.math.name, tensor_flops=flops, model_flops=flops,
        hbm_bytes=m * (k * weight.activation.bytes) + n * (k * weight.bytes_per_element) + outputs,
        shape={"m": m, "n": n, "k": k, "weight_bytes": weight.bytes_per_element, "activation_bytes": weight.activation.bytes,
               "out_bytes": out.bytes},
        aside=lambda: Aside(live_bytes=m * (k * BF16.bytes) + outputs, saved_bytes=saved_bytes),
    )  # fmt: skip


def gemm_backward(
    name: str,
    *,
    m: Num,
    n: Num,
    k: Num,
    weight: WeightFormat = W_BF16,
    gradient: DType = BF16,
    freed_bytes: Num = 0.0,
) -> Work:
    """Both products of the backward pass: dX = dY W^T and dW = X^T dY, 2 m n k each.

    `freed_bytes` of saved activations are released.  Source: definition.
    """
    dx = gemm(f"{name} dX", m=m, n=k, k=n, weight=weight)
    return Serial([dx, gemm(f"{name} dW", m=k, n=n, k=m, out=gradient, saved_bytes=-freed_bytes)])
