"""Matrix products, dense, batched and grouped: the projections of real models, as cuBLAS and CUTLASS run them through PyTorch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from microbench.case import Case, Prepared, case, l2_of, relative, sets_for
from simulator.dtypes import WEIGHT_FORMATS
from simulator.hf import load_model
from simulator.kernels.gemm import batched_gemm, gemm
from simulator.kernels.grouped_gemm import grouped_gemm
from simulator.parallel import Layout
from simulator.passes import Passes
from simulator.phases import Decode, System
from simulator.work import Op, fold

KERNELS: tuple[str, ...] = ("gemm", "batched_gemm", "grouped_gemm")
#: Whose projections are measured, on how many tensor-parallel ranks.
MODELS = (
    ("Meta-Llama-3.1-8B", 1), ("Meta-Llama-3.1-70B", 8), ("Meta-Llama-3.1-70B", 1), ("Meta-Llama-3.1-405B", 8),
    ("Qwen/Qwen2.5-14B-Instruct-1M", 1), ("Qwen/Qwen3-30B-A3B", 1), ("openai/gpt-oss-20b", 1), ("deepseek-ai/DeepSeek-V3", 8),
    ("mistralai/Mistral-7B-v0.1", 1),
)  # fmt: skip
ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
ODD_ROWS = (3, 77, 300, 1000, 3000, 5000)
MOST_FLOPS, MOST_BYTES = 3e13, 24e9
#: (experts, top_k, gate-up width, hidden) of layers whose experts are measured: Qwen3-30B-A3B, its EP8 slice, gpt-oss-20b,
#: Mixtral-8x7B, DeepSeek-V3 EP32.
EXPERTS = ((128, 8, 1536, 2048), (16, 8, 1536, 2048), (32, 4, 5760, 2880), (8, 2, 28672, 4096), (8, 8, 4096, 7168))
#: (heads, n, k) of absorbed products: W_UK and W_UV of DeepSeek-V2-Lite, of DeepSeek-V3 and of its TP8 slice have 16 or 128 heads.
ABSORBED = tuple((heads, n, k) for heads in (16, 128) for n, k in ((512, 128), (128, 512)))
#: fp8 products are measured from this many rows on.
FP8_LEAST_ROWS = 16


@cache
def layouts() -> tuple[tuple[int, int], ...]:
    """Every (n, k) of the models' forward products, in order of first appearance, multiples of 16 (which fp8 needs)."""
    found: dict[tuple[int, int], None] = {}
    for name, ranks in MODELS:
        work = System(load_model(name), Layout(tp=ranks)).work(Decode(1024.0))
        for op in fold(work, Passes(lambda _: 0.0)).longest:
            if op.kernel == "gemm" and "n" in op.shape:
                n, k = int(op.shape["n"]), int(op.shape["k"])
                if n % 16 == 0 and k % 16 == 0:
                    found[n, k] = None
    return tuple(found)


def cases(suite: str) -> list[Case]:
    """Projections over rows; odd rows; experts; anchors."""
    if suite == "tiny":
        return [
            case("gemm", "cublas", "bf16", m=8, n=64, k=32), case("batched_gemm", "cublas", "bf16", members=2, m=4, n=32, k=16),
            case("grouped_gemm", "cutlass", "bf16", m=32, n=32, k=16, experts=2),
        ]  # fmt: skip
    shapes = layouts()
    found = []
    rows: tuple[int, ...] = ROWS
    eight = shapes[::2]
    if suite == "quick":
        shapes, rows, eight = shapes[:10], (1, 64, 512, 4096, 16384), shapes[:4]
    for index, (n, k) in enumerate(shapes):
        chosen = rows if suite == "quick" else (*rows[index % 2 :: 2], ODD_ROWS[index % len(ODD_ROWS)])
        found += [case("gemm", "cublas", "bf16", m=m, n=n, k=k) for m in sorted(chosen) if _fits(m, n, k)]
    for index, (n, k) in enumerate(eight):
        chosen = rows if suite == "quick" else rows[index % 2 :: 2]
        found += [case("gemm", "cublas", "fp8", m=m, n=n, k=k) for m in chosen if m >= FP8_LEAST_ROWS and _fits(m, n, k)]
    for experts, top_k, n, k in EXPERTS if suite == "full" else EXPERTS[:1]:
        for tokens in (1, 8, 64, 512, 4096, 16384) if suite == "full" else (8, 512, 4096):
            for outputs, inputs in ((n, k), (k, n // 2)):
                m = tokens * top_k
                found.append(case("grouped_gemm", "cutlass", "bf16", m=m, n=outputs, k=inputs, experts=min(experts, m)))
    if suite == "full":
        for heads, n, k in ABSORBED:
            found += [case("batched_gemm", "cublas", "bf16", members=heads, m=m, n=n, k=k) for m in (1, 4, 16, 64, 256)]
        for m, n, k in ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 28672, 4096), (8192, 57344, 8192)):
            found += [case("gemm", "cublas", "bf16", regime=regime, m=m, n=n, k=k) for regime in ("burst", "sustained")]
        found += [case("gemm", "cublas", "fp8", regime=regime, m=8192, n=8192, k=8192) for regime in ("burst", "sustained")]
    return found


def _fits(m: int, n: int, k: int) -> bool:
    return 2.0 * m * n * k <= MOST_FLOPS and 2.0 * (m * n + m * k + n * k) <= MOST_BYTES


def op(which: Case) -> Op:
    """Quantities of the product."""
    m, n, k = (float(which[name]) for name in ("m", "n", "k"))
    weight = WEIGHT_FORMATS[which.dtype]
    if which.kernel == "grouped_gemm":
        found = grouped_gemm("experts", rows=m, experts=float(which["experts"]), n=n, k=k, weight=weight)
        found.impl = which.impl
        return found
    if which.kernel == "batched_gemm":
        return batched_gemm("batch", members=float(which["members"]), m=m, n=n, k=k)
    return gemm("gemm", m=m, n=n, k=k, weight=weight)


def prepare(which: Case, device: Any) -> Prepared:
    """Random activations and weights; every set has its own of both."""
    m, n, k = which["m"], which["n"], which["k"]
    sets, hot = sets_for(float(op(which).hbm_bytes), l2_of(device))
    if which.kernel == "grouped_gemm":
        experts = which["experts"]
        rows = torch.randn(sets, m, k, device=device, dtype=torch.bfloat16)
        weight = _scaled((sets, experts, n, k), device)
        ends = _ends(m, experts, device)
        return Prepared(lambda i: grouped(rows[i], weight[i], ends), sets, hot=hot)
    if which.kernel == "batched_gemm":
        members = which["members"]
        rows, weight = _scaled((sets, members, m, k), device, 1.0), _scaled((sets, members, k, n), device)
        out = torch.empty(members, m, n, device=device, dtype=torch.bfloat16)
        return Prepared(lambda i: torch.bmm(rows[i], weight[i], out=out), sets, hot=hot)
    x = _scaled((sets, m, k), device, 1.0)
    weight = _scaled((sets, n, k), device)
    out = torch.empty(sets if sets * m * n < MOST_BYTES / 4 else 1, m, n, device=device, dtype=torch.bfloat16)
    if which.dtype == "fp8" and device.type == "cuda":
        one = torch.ones((), device=device)
        x, weight = x.to(torch.float8_e4m3fn), (weight * 16).to(torch.float8_e4m3fn)
        return Prepared(
            lambda i: torch._scaled_mm(x[i], weight[i].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),  # noqa: SLF001
            sets, hot=hot,
        )  # fmt: skip
    return Prepared(lambda i: torch.mm(x[i], weight[i].t(), out=out[i % len(out)]), sets, hot=hot)


def grouped(rows: Any, weight: Any, ends: Any) -> Any:
    """Rows of expert e, rows[ends[e - 1]:ends[e]], times its weight (n, k): (m, n)."""
    if not rows.is_cpu:
        return torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)  # noqa: SLF001
    out = torch.empty(rows.shape[0], weight.shape[1], dtype=rows.dtype)
    first = 0
    for expert, last in enumerate(ends.tolist()):
        out[first:last] = rows[first:last] @ weight[expert].t()
        first = last
    return out


def _ends(rows: int, experts: int, device: Any) -> Any:
    """Where each expert's rows end: uniform routing, drawn once."""
    generator = torch.Generator().manual_seed(rows * 1000 + experts)
    counts = torch.bincount(torch.randint(experts, (rows,), generator=generator), minlength=experts)
    if rows == experts or rows < 4 * experts:
        counts = torch.ones(experts, dtype=torch.int64) * (rows // experts)
        counts[: rows - int(counts.sum())] += 1
    return counts.cumsum(0).to(torch.int32).to(device)


def _scaled(shape: tuple[int, ...], device: Any, spread: float = 0.03) -> Any:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(spread)



def error(which: Case, device: Any) -> float:
    """Against float64 on the same rounded inputs; rows as asked up to 256, poisoned output where there is one."""
    m, n, k = min(which["m"], 256), min(which["n"], 1024), min(which["k"], 1024)
    if which.kernel == "grouped_gemm":
        experts = min(which["experts"], 8)
        rows, weight = torch.randn(m, k, device=device, dtype=torch.bfloat16), _scaled((experts, n, k), device)
        ends = _ends(m, experts, device)
        got = grouped(rows, weight, ends).double()
        index = torch.bucketize(torch.arange(m, device=device), ends.to(torch.int64), right=True)
        want = torch.einsum("mk,mnk->mn", rows[:32].double(), weight[index[:32]].double())
        return relative(got[:32], want)
    if which.kernel == "batched_gemm":
        rows, weight = _scaled((4, m, k), device, 1.0), _scaled((4, k, n), device)
        out = torch.full((4, m, n), float("nan"), device=device, dtype=torch.bfloat16)
        torch.bmm(rows, weight, out=out)
        return relative(out.double(), rows.double() @ weight.double())
    x, weight = _scaled((m, k), device, 1.0), _scaled((n, k), device)
    if which.dtype == "fp8" and device.type == "cuda":
        one = torch.ones((), device=device)
        x, weight = x.to(torch.float8_e4m3fn), (weight * 16).to(torch.float8_e4m3fn)
        got = torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: SLF001
        return relative(got.double(), x.double() @ weight.double().t())
    out = torch.full((m, n), float("nan"), device=device, dtype=torch.bfloat16)
    torch.mm(x, weight.t(), out=out)
    return relative(out.double(), x.double() @ weight.double().t())
