"""What each kernel's FLOPs and bytes are, as texts that can be evaluated: the one place where formulas are written to be
read.

A text names the extents of `Op.shape` (of a message: payload_bytes and ranks); `element_bytes` is that of the kernel's math
type unless the shape gives one.  `substituted` puts the numbers in; evaluating either gives the op's own figure, which is
tested for every kernel.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from simulator.dtypes import DTYPES
from simulator.work import Leaf, Message


class Formula(NamedTuple):
    """FLOPs on the matrix pipes and compulsory HBM bytes of one kernel."""

    flops: str
    hbm_bytes: str


_IO = "sequences * tokens * heads * (head_dim + v_head_dim) * element_bytes"
_CORE = Formula("scores * 2 * (head_dim + v_head_dim)", f"{_IO} + live * row_bytes")
_CORE_BACKWARD = "scores * 2 * (3 * head_dim + 2 * v_head_dim)"
_GRADIENT = "sequences * tokens * heads * (v_head_dim * element_bytes + 4)"
_STREAM = "sequences * tokens * channels * state"

#: By kernel; a backward pass that does other work than the forward's has an entry of its own.
FORMULAS: dict[str, Formula] = {
    "gemm": Formula("2 * m * n * k", "m * k * activation_bytes + k * n * weight_bytes + m * n * out_bytes"),
    "batched_gemm": Formula("2 * members * m * n * k", "members * (m * k * activation_bytes + k * n * weight_bytes + m * n * out_bytes)"),
    "grouped_gemm": Formula("2 * m * n * k", "experts * k * n * weight_bytes + m * (k * activation_bytes + n * out_bytes)"),
    "attention": _CORE,
    "decode_attention": _CORE,
    "latent_attention": _CORE,
    "attention_backward": Formula(_CORE_BACKWARD, f"2 * {_IO} + {_GRADIENT} + 2 * live * row_bytes"),
    "sparse_attention": Formula(_CORE.flops, f"{_CORE.hbm_bytes} + index_bytes"),
    "sparse_attention backward": Formula(_CORE_BACKWARD, f"2 * {_IO} + {_GRADIENT} + 2 * live * row_bytes + index_bytes"),
    "index_scores": Formula(
        "passes * scored * heads * 2 * head_dim", "passes * (live * row_bytes + sequences * tokens * heads * head_dim * 2)",
    ),
    "recurrent_step": Formula("sequences * tokens * token_flops", "sequences * (tokens * token_bytes + 2 * state_bytes)"),
    "chunk_scan": Formula("sequences * tokens * token_flops", "sequences * (tokens * token_bytes + 2 * ceil(tokens / chunk) * state_bytes)"),
    "chunk_scan backward": Formula(
        "2.5 * sequences * tokens * token_flops", "sequences * (2 * tokens * token_bytes + 4 * ceil(tokens / chunk) * state_bytes)",
    ),
    "selective_scan": Formula(
        f"7 * {_STREAM}",
        "sequences * (tokens * (4 * channels + 2 * state) * element_bytes + channels * 2 * state * state_element_bytes)",
    ),
    "selective_scan backward": Formula(
        f"3 * 7 * {_STREAM}",
        "sequences * (2 * tokens * (4 * channels + 2 * state) * element_bytes + channels * 2 * state * state_element_bytes)",
    ),
    "long_convolution": Formula(
        "passes * sequences * channels * (10 * points * log2(points) + (6 + state) * points)",
        "passes * sequences * channels * 2 * (2 * tokens + prefix)",
    ),
    "long_convolution step": Formula(
        "passes * sequences * tokens * channels * 8 * state", "passes * sequences * channels * (2 * tokens * 2 + 2 * state * 4)",
    ),
    "elementwise": Formula("0", "rows * row_bytes"),
    "host": Formula("0", "0"),
}  # fmt: skip
#: What a rank puts on the wire, by pattern.
WIRES = {
    "all_reduce": "payload_bytes * 2 * (ranks - 1) / ranks",
    "all_gather": "payload_bytes * (ranks - 1) / ranks",
    "reduce_scatter": "payload_bytes * (ranks - 1) / ranks",
    "all_to_all": "payload_bytes * (ranks - 1) / ranks",
    "dispatch": "payload_bytes * (ranks - 1) / ranks",
    "send": "payload_bytes * min(ranks - 1, 1)",
    "broadcast": "payload_bytes * min(ranks - 1, 1)",
}


def texts(op: Leaf) -> dict[str, str]:
    """The op's formulas by attribute: flops and hbm_bytes of a kernel, wire_bytes of a message."""
    if isinstance(op, Message):
        return {"wire_bytes": WIRES[op.pattern]}
    variant = "backward" if op.shape.get("backward") else "step" if op.kernel == "long_convolution" and "points" not in op.shape else ""
    found = FORMULAS.get(f"{op.kernel} {variant}") or FORMULAS[op.kernel]
    return {"tensor_flops": found.flops, "hbm_bytes": found.hbm_bytes}


def extents(op: Leaf) -> dict[str, float]:
    """The numbers that its formulas name."""
    if isinstance(op, Message):
        return {"payload_bytes": _one(op.payload_bytes), "ranks": _one(op.group.ranks)}
    element = {"element_bytes": float(DTYPES[op.math].bytes)} if op.math in DTYPES else {}
    return element | {name: _one(value) for name, value in op.shape.items()}


def _one(value: Any) -> float:
    return float(np.mean(value))


_NAME = re.compile(r"[a-z_]\w*(?!\w*\()")


def substituted(text: str, numbers: Mapping[str, float]) -> str:
    """The formula with its numbers in place of its names.

    >>> substituted("2 * m * n * k", {"m": 8, "n": 16, "k": 0.5})
    '2 * 8 * 16 * 0.5'
    """
    return _NAME.sub(lambda name: exact(numbers[name[0]]), text)


def exact(value: float) -> str:
    """A number that reads back as itself."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))  # noqa: PLR2004


def readable(text: str) -> str:
    """A formula for people: times as x, thousands apart.

    >>> readable("2 * 8192 * ceil(0.5)")
    '2 x 8,192 x ceil(0.5)'
    """
    apart = re.sub(r"(?<![\w.])\d{4,}(?![\w.])", lambda digits: f"{int(digits[0]):,}", text)
    short = re.sub(r"\d+\.\d+(?:e[+-]?\d+)?", lambda number: f"{float(number[0]):,.6g}", apart)
    return short.replace(" * ", " x ")


_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., float]] = {"ceil": math.ceil, "min": min, "max": max, "log2": math.log2}


def evaluate(text: str, numbers: Mapping[str, float] | None = None) -> float:
    """The value of a formula, of names or substituted.

    >>> evaluate("2 * m * ceil(k / 3)", {"m": 5, "k": 7})
    30.0
    """
    return float(_value(ast.parse(text, mode="eval").body, numbers or {}))


def _value(node: ast.expr, numbers: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_value(part, numbers) for part in node.args))
    if isinstance(node, ast.Name):
        return numbers[node.id]
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, (int, float))
    return float(node.value)


__all__ = ["FORMULAS", "WIRES", "Formula", "evaluate", "exact", "extents", "readable", "substituted", "texts"]
