"""Matrix product of activations with a weight.

Legend: m rows (tokens), n outputs, k inputs; b members of a batch of products.
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


def batched_gemm(name: str, *, members: Num, m: Num, n: Num, k: Num) -> Op:
    """A batch of b products (m, k) x (k, n) -> (m, n) in bf16, each with its own weight.

    flops = 2 b m n k; bytes = b (m k activation + k n weight + m n out), each once.
    Source: definition; one launch of cublasGemmStridedBatchedEx.

    >>> batched_gemm("absorb k", members=16, m=1, n=512, k=128).hbm_bytes
    2117632.0
    """
    flops = members * (m * (n * (2.0 * k)))
    inputs, outputs = members * (m * (k * BF16.bytes)), members * (m * (n * BF16.bytes))
    return Op(
        name, "batched_gemm", "", BF16.name, tensor_flops=flops, model_flops=flops,
        hbm_bytes=inputs + members * (n * (k * BF16.bytes)) + outputs,
        shape={"members": members, "m": m, "n": n, "k": k, "weight_bytes": BF16.bytes, "activation_bytes": BF16.bytes,
               "out_bytes": BF16.bytes},
        aside=lambda: Aside(live_bytes=inputs + outputs),
    )  # fmt: skip


def batched_gemm_backward(name: str, *, members: Num, m: Num, n: Num, k: Num) -> Work:
    """Both products of the backward pass of each member.  Source: definition."""
    return Serial([batched_gemm(f"{name} dX", members=members, m=m, n=k, k=n), batched_gemm(f"{name} dW", members=members, m=k, n=n, k=m)])


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

    `freed_bytes` of saved activations are released.  dX is made first, so that it lives beside dY until dW is made; X was
    saved, and dW goes into the buffer that holds gradients.  Both operands of dW are activations in the format of the product (in fp8
    training all three products are fp8).  Source: definition; Transformer Engine's recipes.
    """
    dx = gemm(f"{name} dX", m=m, n=k, k=n, weight=weight)
    both = weight if weight is W_BF16 else WeightFormat(weight.activation.name, weight.activation.bits, weight.math, weight.activation)
    dw = gemm(f"{name} dW", m=k, n=n, k=m, weight=both, out=gradient)
    alive = dx.aside
    dw.aside = lambda: Aside(live_bytes=alive().live_bytes, saved_bytes=-freed_bytes)
    return Serial([dx, dw])
