"""Products of many experts' weights with the rows routed to them.

Legend: E experts, k experts per token, T tokens, n ranks that share the experts.
"""

from __future__ import annotations

import functools

import numpy as np

from simulator.dtypes import BF16, W_BF16, DType, WeightFormat
from simulator.units import Count, Num, maximum, minimum
from simulator.work import Aside, Op


def experts_hit(*, experts: Num, total_experts: int, top_k: int, tokens: Num) -> Count:
    """Expected number of `experts` (of `total_experts`) that receive at least one of `tokens`.

    X = experts (1 - (1 - k / E)^T), uniform independent routing; skew only lowers it.  Source: FORMULAS 1.19.

    >>> round(experts_hit(experts=256, total_experts=256, top_k=8, tokens=32), 1)
    163.3
    """
    return experts * (1 - (1 - top_k / total_experts) ** tokens)


@functools.cache
def _normal_maxima() -> tuple[np.ndarray, np.ndarray]:
    """E[max of n standard normals] for n = 2^0..2^12, by integrating n phi(z) Phi(z)^(n-1) z."""
    z = np.linspace(-9, 9, 20001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    below = np.cumsum(density) * (z[1] - z[0])
    sizes = 2.0 ** np.arange(13)
    return np.log2(sizes), np.array([np.trapezoid(n * density * below ** (n - 1) * z, z) for n in sizes])


def expected_maximum(ranks: Num) -> Num:
    """Standard deviations by which the busiest of `ranks` exceeds the mean: E[max of n normals], interpolated in log2 n.

    >>> round(float(expected_maximum(16)), 2)
    1.77
    """
    sizes, maxima = _normal_maxima()
    value = np.interp(np.log2(ranks), sizes, maxima)
    return float(value) if isinstance(ranks, (int, float)) else value


def busiest_rank(*, tokens: Num, top_k: int, total_experts: int, ranks: Num) -> tuple[Count, Count]:
    """Rows and distinct experts on the busiest of `ranks` ranks, each holding E / n experts.

    rows: mean T k / n plus E[max of n] standard deviations of the hypergeometric share of each token,
    variance T k p (1 - p) (E - k) / (E - 1), p = 1 / n, with a second-order skew term (z^2 - 1)(1 - 2p) / 6.
    experts: mean X / n plus the same of a binomial share, capped at E / n.  Uniform routing; real routing is skewed.
    Validity: T k / n >= 1 within 3 % of simulation.  Source: order statistics (derived); FORMULAS 5.4.

    >>> rows, hit = busiest_rank(tokens=32, top_k=8, total_experts=256, ranks=16)
    >>> round(rows, 1), round(hit, 1)
    (23.1, 13.4)
    """
    share = 1 / ranks
    local = total_experts / ranks
    z = expected_maximum(ranks)
    scatter = top_k * share * (1 - share) * ((total_experts - top_k) / max(total_experts - 1, 1))
    deviation = maximum(tokens * scatter, 0.0) ** 0.5
    rows = tokens * top_k * share + deviation * z + (z * z - 1) * (1 - 2 * share) / 6 * minimum(deviation, 1.0)
    rows = minimum(maximum(rows, tokens * top_k * share), tokens * minimum(top_k, local))
    missed = (1 - top_k / total_experts) ** tokens
    hit = local * (1 - missed)
    spread = maximum(hit * missed, 0.0) ** 0.5
    return rows, minimum(hit + 0.94 * z * spread, minimum(local, maximum(rows, 1.0)))


def grouped_gemm(
    name: str,
    *,
    rows: Num,
    experts: Num,
    n: Num,
    k: Num,
    weight: WeightFormat = W_BF16,
    out: DType = BF16,
    saved_bytes: Num = 0.0,
) -> Op:
    """`rows` routed rows in all, over `experts` experts that each hold a (k, n) weight.

    flops = 2 rows n k; bytes = experts k n weight + rows (k activation + n out).
    Source: FORMULAS 1.19, 3.6.
    """
    flops = rows * (n * (2.0 * k))
    outputs = rows * (n * out.bytes)
    return Op(
        name, "grouped_gemm", "", weight.math.name, tensor_flops=flops, model_flops=flops,
        hbm_bytes=experts * (n * (k * weight.bytes_per_element)) + rows * (k * weight.activation.bytes) + outputs,
        shape={"m": rows, "n": n, "k": k, "experts": experts, "weight_bytes": weight.bytes_per_element,
               "activation_bytes": weight.activation.bytes, "out_bytes": out.bytes},
        aside=lambda: Aside(live_bytes=rows * (k * BF16.bytes) + outputs, saved_bytes=saved_bytes),
    )  # fmt: skip


def grouped_gemm_backward(
    name: str, *, rows: Num, experts: Num, n: Num, k: Num, weight: WeightFormat = W_BF16, freed_bytes: Num = 0.0
) -> list[Op]:
    """Both products of the backward pass, as of `gemm_backward`: dX, then dW of each expert, k x n from rows / experts rows.

    Source: definition.
    """
    dx = grouped_gemm(f"{name} dX", rows=rows, experts=experts, n=k, k=n, weight=weight)
    dw = grouped_gemm(f"{name} dW", rows=experts * k, experts=experts, n=n, k=rows / maximum(experts, 1.0))
    alive = dx.aside
    dw.aside = lambda: Aside(live_bytes=alive().live_bytes, saved_bytes=-freed_bytes)
    return [dx, dw]
