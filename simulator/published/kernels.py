"""Kernel microbenchmarks: one function per family of sources turns a row into the kernel's work and measured seconds.

A rate in FLOP/s is turned back into seconds with the FLOPs its author counted, so predicted and measured are times
throughout.  A single timed kernel is our launched op without host work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from simulator.calibration import Calibration
from simulator.dtypes import BF16, CACHE_FORMATS, DTYPES, WEIGHT_FORMATS, CacheFormat, DType, WeightFormat
from simulator.estimate import Interval, interval
from simulator.hardware import Cluster
from simulator.kernels.attention import Bidirectional, Causal, Segment, attention
from simulator.kernels.elementwise import elementwise
from simulator.kernels.gemm import gemm
from simulator.kernels.latent_attention import latent_attention
from simulator.kernels.unfused_attention import unfused_attention
from simulator.layers.layer import Direction, Mixer
from simulator.passes import Passed, Passes, by_kernel
from simulator.published.table import Asked, Measurement, machine, refuse, spec
from simulator.timing import Clock, bounded, calibrated
from simulator.work import Repeat, Serial, Together, Work, fold

MS, US, TERA, GIGA = 1e-3, 1e-6, 1e12, 1e9


def timed(work: Work, on: Cluster, seconds: float) -> Asked:
    """A row that times `work` on one GPU of `on`."""

    def answer(calibration: Calibration) -> Interval:
        clock = Clock(on, calibration)
        lower, value, passes = fold(work, Together(bounded(clock), calibrated(clock), Passes(clock.expected)))
        return interval(by_kernel(passes, clock.expected), calibration, float(value), float(lower))

    return Asked(seconds, "s", answer, on)


def _attention(row: Measurement, *, impl: str, causal: bool, training: bool, dtype: DType) -> Work:
    """Attention of equal sequences, forward or forward and backward; `impl` "unfused" stores its scores."""
    heads, segment = row.number("heads"), Segment(row.number("batch"), row.number("seq_len"), 0.0)
    shape = {"heads": heads, "head_dim": int(row.number("head_dim")), "dtype": dtype}
    if impl == "unfused":
        return unfused_attention("attention", segment, causal=causal, backward=training, **shape)  # type: ignore[arg-type]
    rest = {"kv_heads": row.number("kv_heads"), "mask": Causal() if causal else Bidirectional(), "impl": impl}
    passes = [attention("attention", segment, **shape, **rest, backward=backward) for backward in ((False, True) if training else (False,))]  # type: ignore[arg-type]
    return Serial(passes)


def _both(row: Measurement) -> bool:
    """Whether a row times forward and backward together."""
    return row.inputs.get("pass", "fwd").endswith("bwd")


#: What the authors of attention benchmarks call a kernel -> `Op.impl`.
IMPLEMENTATIONS = {
    "FlashAttention-1": "flash1", "FlashAttention-2": "flash2", "FlashAttention-3": "flash3", "FlashAttention Triton": "triton", "Triton": "triton",
    "xformers cutlass": "cutlass", "cuDNN": "cudnn", "PyTorch standard attention": "unfused", "standard attention": "unfused",
    "TileLang": "tilelang", "FlashAttention single GPU": "flash2",
}  # fmt: skip


def flash_attention_charts(row: Measurement) -> Asked:
    """The bar charts of the flash-attention repository.

    FLOPs counted: 4 s^2 d h b, half of it if causal; forward + backward counts 3.5 forwards.  fp16.
    """
    causal, training = row.inputs["causal"] == "True", _both(row)
    counted = 4.0 * row.number("seq_len") ** 2 * row.number("head_dim") * row.number("heads") * row.number("batch")
    counted *= (0.5 if causal else 1.0) * (3.5 if training else 1.0)
    work = _attention(row, impl=_implementation(row), causal=causal, training=training, dtype=DTYPES["fp16"])
    return timed(work, machine(row), counted / (float(row.value) * TERA))


def _implementation(row: Measurement) -> str:
    impl = IMPLEMENTATIONS.get(row.kernel_or_engine)
    if impl is None:
        refuse(f"{row.kernel_or_engine}: not modelled")
    return impl


def burst_attention(row: Measurement) -> Asked:
    """BurstAttention's README: times, and the same times as rates of 4 s^2 d h b (not halved: 324 ms are 215 TFLOP/s),
    forward + backward 3.5 forwards.  Rows of one GPU.
    """
    training = _both(row)
    work = _attention(row, impl=_implementation(row), causal=False, training=training, dtype=BF16)
    if row.kind == "kernel_time":
        return timed(work, machine(row), float(row.value) * MS)
    counted = 4.0 * row.number("seq_len") ** 2 * row.number("head_dim") * row.number("heads") * row.number("batch")
    return timed(work, machine(row), counted * (3.5 if training else 1.0) / (float(row.value) * TERA))


def tilelang_sinks(row: Measurement) -> Asked:
    """TileLang's attention with sinks: causal forward, 4 s^2 d h b halved, bf16."""
    counted = 2.0 * row.number("seq_len") ** 2 * row.number("head_dim") * row.number("heads") * row.number("batch")
    impl = "triton" if "Triton" in row.kernel_or_engine else "tilelang"
    return timed(_attention(row, impl=impl, causal=True, training=False, dtype=BF16), machine(row), counted / (float(row.value) * TERA))


def ring_flash_single(row: Measurement) -> Asked:
    """ring-flash-attention's README: iterations per second of one attention call; one GPU runs its own block only."""
    work = _attention(row, impl="flash2", causal=row.inputs["causal"] == "True", training=_both(row), dtype=BF16)
    return timed(work, machine(row), 1 / float(row.value))


def unstated_attention(row: Measurement) -> Asked:  # noqa: ARG001 (every row has the same answer)
    """Sources that do not say whether pairs are halved: a factor of two."""
    refuse("attention: causal or not is not stated, a factor of two")


def _product(row: Measurement, weight: str) -> Work:
    m, n, k = (row.number(name) for name in "MNK")
    return gemm("gemm", m=m, n=n, k=k, weight=WEIGHT_FORMATS[weight])


def _timed_product(row: Measurement, weight: str) -> Asked:
    """2 M N K FLOPs per measured second, or the time itself."""
    work, on = _product(row, weight), machine(row)
    if row.kind == "kernel_tflops":
        return timed(work, on, 2.0 * row.number("M") * row.number("N") * row.number("K") / (float(row.value) * TERA))
    return timed(work, on, float(row.value) * {"ms": MS, "us": US}[row.unit])


def products(row: Measurement) -> Asked:
    """Matrix products in the row's type; TileLang heads its column (s) and prints ms, which the row's unit already says."""
    return _timed_product(row, row.dtype)


def deep_gemm(row: Measurement) -> Asked:
    """DeepGEMM's README: one time printed as 2 M N K per second and as (M K + K N) + 2 M N bytes per second."""
    if row.kind == "kernel_tflops":
        return _timed_product(row, "fp8_block")
    m, n, k = (row.number(name) for name in "MNK")
    return timed(_product(row, "fp8_block"), machine(row), (k * (m + n) + 2 * m * n) / (float(row.value) * GIGA))


def best_products(row: Measurement) -> Asked:
    """The best product over shapes that mamf-finder found: M x N x K."""
    m, n, k = (float(text) for text in row.inputs["MxNxK"].split("x"))
    work = gemm("gemm", m=m, n=n, k=k, weight=WEIGHT_FORMATS[row.dtype])
    return timed(work, machine(row), 2.0 * m * n * k / (float(row.value) * TERA))


#: BabelStream: arrays touched per element, 2^25 doubles each (its default; the guide does not restate the size).
_STREAMS = {"Copy": (1, 1), "Mul": (1, 1), "Add": (2, 1), "Triad": (2, 1), "Dot": (2, 0)}


def azure(row: Measurement) -> Asked:
    """Azure's guide: cuBLASLt fp8 products, BabelStream (bytes moved per second), NCCL all-reduce (bus bandwidth)."""
    if row.table_or_section == "GEMM CuBLASLt":
        return _timed_product(row, "fp8")
    if row.table_or_section == "HBM Bandwidth":
        read, written = _STREAMS[row.kernel_or_engine.split()[-1]]
        op = elementwise("stream", rows=2.0**25, read=read, written=written, impl="copy", dtype=DType("fp64", 64), handed=False)
        return timed(op, machine(row), float(op.hbm_bytes) / (float(row.value) * GIGA))
    if row.table_or_section == "NV Bandwidth":
        refuse("copies over the host link or peer to peer are no kernel here")
    if row.kind == "comm_busbw":
        from simulator.published.collectives import bus_bandwidth  # noqa: PLC0415 (they import `timed` from here)

        return bus_bandwidth(row)
    return unstated_attention(row)


def flash_mla(row: Measurement) -> Asked:
    """FlashMLA's README: cache sizes, and "up to" rates without a shape."""
    from simulator.published.serving import cache_sizes  # noqa: PLC0415 (it imports from here)

    if row.kind != "kv_capacity":
        refuse("a best rate without its shape")
    return cache_sizes(row)


def infersim(row: Measurement) -> Asked:
    """InferSim's bench_data, microseconds.  Products are fp8 (their MFU is of the fp8 peak).  Decode attention has one
    query token per sequence over `context_len` keys; prefill is causal.  Its library is FlashAttention-3 or FlashInfer, which
    is not recorded per row: the first is asked.
    """
    on, seconds = machine(row), float(row.value) * US
    if row.model == "GEMM":
        return timed(_product(row, "fp8"), on, seconds)
    if row.model.startswith("dsa"):
        refuse("sparse attention of DeepSeek-V3.2 as a bare kernel: its library is not recorded")
    if row.model == "mla decode":
        held = Segment(row.number("batch"), 1.0, row.number("context_len") - 1, split_kv=True)
        return timed(latent_attention("core", held, heads=row.number("heads"), kv_lora_rank=512, rope_head_dim=64), on, seconds)
    return timed(_cached_attention(row, impl="flash3"), on, seconds)


def _cached_attention(row: Measurement, *, impl: str, cache: str = "bf16", dtype: DType = BF16) -> Work:
    new, context = row.number("seq_len"), row.number("context_len")
    held = Segment(row.number("batch"), new, context - new, split_kv=new == 1)
    return attention(
        "core", held, heads=row.number("heads"), kv_heads=row.number("kv_heads"), head_dim=int(row.number("head_dim")),
        dtype=dtype, cache=CACHE_FORMATS[cache], impl=impl,
    )  # fmt: skip


_BACKENDS = {"fa3": "flash3", "trtllm_mha": "trtllm", "flashinfer": "flashinfer"}
_PRECISIONS = {"bfloat16": "bf16", "bf16": "bf16", "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}


def aiconfigurator(row: Measurement) -> Asked:
    """The collected kernels of aiconfigurator, milliseconds: attention cores, whole mixers of one layer ("module"), NCCL calls.

    A module is our mixer of that layer with the heads of one rank, without the all-reduce behind it.  `context_len` counts
    the new tokens.
    """
    if "collective" in row.inputs:
        from simulator.published.collectives import timed_collective  # noqa: PLC0415 (they import `timed` from here)

        return timed_collective(row)
    seconds = float(row.value) * MS
    if "/attention/" in row.table_or_section:
        query, stored = (part.split("=")[1] for part in row.dtype.split(";"))
        work = _cached_attention(
            row, impl=_BACKENDS[row.kernel_or_engine.split()[-1]], cache=_PRECISIONS[stored], dtype=DTYPES[_PRECISIONS[query]]
        )
        return timed(work, machine(row), seconds)
    return timed(_inside(row) or _mixer(row), machine(row), seconds)


#: Kernels timed by themselves -> the kernel of ours, a leaf of the mixer, and the implementation where one kernel has several.
_INNER = {
    "fp8_paged_mqa_logits": ("index_scores", ""), "flash_mla_sparse_fwd": ("sparse_attention", ""),
    "chunk_gated_delta_rule": ("chunk_scan", "delta"), "causal_conv1d_fn": ("elementwise", "convolution"),
}  # fmt: skip


def _inside(row: Measurement) -> Work | None:
    """The leaves of a mixer that are the kernel a row times by itself; None for a whole module."""
    named = next((ours for theirs, ours in _INNER.items() if row.kernel_or_engine.endswith(theirs)), None)
    if named is None:
        return None
    kernel, impl = named
    passes: Passed = fold(_mixer(row), Passes(lambda _: 0.0))
    leaves = [(op, count) for op, count in passes.longest.items() if op.kernel == kernel and (not impl or op.impl == impl)]
    if not leaves:
        refuse(f"{row.kernel_or_engine.split()[-1]}: no such kernel in our mixer, not modelled yet")
    return Serial([Repeat(count, op) for op, count in leaves])


def _mixer(row: Measurement) -> Work:
    """One mixer of the model a row names, with the heads of one rank, which need not divide the model's own."""
    model, (weight, cache) = spec(row.model), _formats(row)
    ratio, shares = row.inputs.get("compress_ratio") or "1", "skip_indexer" in row.inputs.get("op", "")
    linear = "k_heads" in row.inputs
    found = [
        mixer for _, mixer in model.with_formats(weight=weight, cache=None).mixers
        if (ratio == "1" or getattr(mixer, "compress_ratio", None) == int(ratio)) and getattr(mixer, "indexer_shared", False) == shares
        and hasattr(mixer, "linear_num_value_heads") == linear
    ]  # fmt: skip
    if not found:
        refuse(f"{row.model} has no mixer of {row.inputs.get('op', 'linear attention')}, not modelled yet")
    names = {"linear_num_key_heads": "k_heads", "linear_num_value_heads": "v_heads"} if linear else {"num_attention_heads": "heads"}
    mixer: Mixer = replace(found[0], **{ours: int(row.number(theirs)) for ours, theirs in names.items()})  # type: ignore[type-var]
    new = row.number("seq_len")
    held = Segment(row.number("batch"), new, row.number("context_len") - new, split_kv=new == 1)
    return mixer.work(mixer.whole((held,)), Direction.FORWARD, cache=cache)


def _formats(row: Measurement) -> tuple[WeightFormat, CacheFormat]:
    """Formats of projections and cache, "bfloat16;kv=fp8;gemm=fp8_block"; bf16 where a row states none."""
    stated = dict(part.split("=") for part in row.dtype.split(";") if "=" in part)
    return WEIGHT_FORMATS[_PRECISIONS[stated.get("gemm", "bf16")]], CACHE_FORMATS[_PRECISIONS[stated.get("kv", "bf16")]]


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {
    "flashattention-2-readme": flash_attention_charts, "flashattention-3-readme": flash_attention_charts,
    "tilelang-attention-sink": tilelang_sinks,
    "pytorch-benchmark": unstated_attention, "llmcompass-matmul": products, "tilelang-readme": products,
    "deepgemm-readme": deep_gemm, "ml-engineering-mamf": best_products, "azure-benchmarking-guide": azure, "flashmla-readme": flash_mla,
    "infersim": infersim, "aiconfigurator-kernels": aiconfigurator,
}  # fmt: skip
