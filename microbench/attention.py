"""Attention of new tokens over a context, forward and backward, by implementation; and decode over paged caches.

Implementations: math (PyTorch, scores in memory), efficient (CUTLASS memory-efficient), flash2 (FlashAttention-2 as PyTorch
ships it), cudnn; flash3, flash4 and flashinfer where installed (`packages`).  Decode: flash2 (split keys, contiguous cache) and
triton (our paged kernels, the layout vLLM uses), bf16 and fp8 caches; absorbed MLA by triton.
"""

from __future__ import annotations

from typing import Any

import torch

from microbench import packages
from microbench.case import Case, Prepared, case, l2_of, relative, sets_for
from simulator.dtypes import CACHE_FORMATS, DTYPES
from simulator.kernels.attention import Block, Causal, Segment, Window, attention
from simulator.kernels.latent_attention import latent_attention
from simulator.work import Op

KERNELS: tuple[str, ...] = ("attention", "attention_backward", "decode_attention", "latent_attention")
#: (heads, kv_heads, head_dim, v_head_dim).
HeadLayout = tuple[int, int, int, int]
#: Llama-3.1-8B, its MHA twin, MQA, Llama-70B TP8, Qwen2.5-14B-1M, gpt-oss, Gemma, Qwen2.5-7B-1M, MLA TP8, and two more widths.
LAYOUTS: tuple[HeadLayout, ...] = (
    (32, 8, 128, 128), (32, 32, 128, 128), (32, 1, 128, 128), (8, 1, 128, 128), (40, 8, 128, 128), (64, 8, 64, 64), (16, 8, 256, 256),
    (28, 4, 128, 128), (16, 16, 192, 128), (16, 2, 128, 128), (32, 32, 64, 64),
)  # fmt: skip
LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Sequences this short come in larger batches.
SHORT = 1024
PAGE = 16
#: Element types of a cache.
KINDS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
#: Largest cache a case allocates.
MOST_CACHE = 20e9


def over(
    kernel: str, impl: str, dtype: str, layout: HeadLayout, *, tokens: int, context: int, sequences: int = 1, window: int = 0,
    full: bool = False, regime: str = "steady",
) -> Case:  # fmt: skip
    """A case of `tokens` new tokens that end a context, for each of `sequences`; `full`: every token sees all of it.

    >>> over("attention", "cudnn", "bf16", (32, 8, 128, 128), tokens=512, context=2048).extents
    'sequences=1 tokens=512 context=2048 heads=32 kv_heads=8 head_dim=128 v_head_dim=128'
    """
    heads, kv_heads, head_dim, v_head_dim = layout
    windowed = {"window": window} if window else {"full": 1} if full else {}
    return case(
        kernel, impl, dtype, regime=regime, sequences=sequences, tokens=tokens, context=context, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, v_head_dim=v_head_dim, **windowed,
    )  # fmt: skip


def cases(suite: str) -> list[Case]:
    """Prefill, backward, chunks, windows, decode, lengths to 1M and beyond."""
    if suite == "tiny":
        small = (4, 2, 64, 64)
        return [
            over("attention", "math", "bf16", small, tokens=128, context=128),
            over("attention_backward", "math", "bf16", small, tokens=64, context=64),
        ]
    found: list[Case] = []
    quick = suite == "quick"
    for index, layout in enumerate(LAYOUTS[:4] if quick else LAYOUTS):
        for impl in ("cudnn", "flash2"):
            if impl == "flash2" and layout[2] != layout[3]:
                continue
            for length in (512, 4096, 16384) if quick else LENGTHS:
                batch = max(1, (16384 if length <= SHORT else 8192) // length)
                found.append(over("attention", impl, "bf16", layout, sequences=batch, tokens=length, context=length))
                if quick or (impl == "cudnn" or index % 2 == 0):
                    found.append(over("attention_backward", impl, "bf16", layout, sequences=batch, tokens=length, context=length))
            if not quick and layout in LAYOUTS[:4]:
                found += [over("attention", impl, "bf16", layout, tokens=n, context=n) for n in (512, 2048)]
    if quick:
        found.append(over("attention", "cudnn", "bf16", (8, 1, 128, 128), tokens=131072, context=131072))
        found += [_decode("triton", "bf16", (8, 1, 128, 128), b, c) for b, c in ((1, 131072), (8, 8192), (64, 8192), (1, 1048576))]
        if packages.installed("flash4"):
            found += [over("attention", "flash4", "bf16", layout, tokens=n, context=n) for layout in LAYOUTS[:4] for n in (512, 4096, 16384)]
            found += [over("attention", "flash4", "bf16", (8, 1, 128, 128), tokens=2048, context=c) for c in (32768, 131072)]
        return found
    return [*found, *_chunks_and_windows(), *_rectangles(), *_prefills(), *_decodes(), *_installed()]


def _installed() -> list[Case]:
    """Prefill, backward, chunks and decode of the optional packages that are here."""
    found = []
    for impl in filter(packages.installed, packages.PACKAGES):
        flash = impl != "flashinfer"
        for index, layout in enumerate(LAYOUTS if flash else LAYOUTS[:6]):
            for length in LENGTHS[1:]:
                batch = max(1, (16384 if length <= SHORT else 8192) // length) if flash else 1
                found.append(over("attention", impl, "bf16", layout, sequences=batch, tokens=length, context=length))
                if flash and index % 2 == 0:
                    found.append(over("attention_backward", impl, "bf16", layout, sequences=batch, tokens=length, context=length))
            found += [over("attention", impl, "bf16", layout, tokens=t, context=c) for t, c in ((512, 8192), (2048, 32768), (2048, 131072))]
            if not flash:
                grid = ((1, 8192), (1, 131072), (1, 1048576), (16, 8192), (16, 32768), (64, 8192), (256, 1024))
                found += [_decode(impl, dtype, layout, b, c) for dtype in KINDS for b, c in grid if b * c * layout[1] * 512 <= MOST_CACHE]
        for layout in ((32, 8, 128, 128), (64, 8, 64, 64)):
            for length, window in ((8192, 1024), (32768, 128), (32768, 4096)):
                found.append(over("attention", impl, "bf16", layout, tokens=length, context=length, window=window))
        if flash:
            found += [over("attention", impl, "bf16", (8, 1, 128, 128), tokens=length, context=length) for length in (131072, 524288)]
            found.append(over("attention", impl, "bf16", (4, 1, 128, 128), tokens=1048576, context=1048576))
            found.append(over("attention_backward", impl, "bf16", (8, 1, 128, 128), tokens=131072, context=131072))
    return found


def _chunks_and_windows() -> list[Case]:
    found = []
    chunks = [(t, c) for t in (512, 2048, 8192) for c in (8192, 16384, 32768, 131072, 1048576) if c > t]
    for index, (tokens, context) in enumerate(chunks):
        layout = ((32, 8, 128, 128), (8, 1, 128, 128), (64, 8, 64, 64))[index % 3] if context < 10**6 else (8, 1, 128, 128)
        found.append(over("attention", "flash2", "bf16", layout, tokens=tokens, context=context))
    for tokens, context, window in (
        (8192, 8192, 1024), (8192, 8192, 4096), (32768, 32768, 128), (32768, 32768, 4096), (8192, 32768, 4096), (131072, 131072, 1024),
    ):  # fmt: skip
        found += [
            over("attention", "flash2", "bf16", layout, tokens=tokens, context=context, window=window)
            for layout in ((32, 8, 128, 128), (64, 8, 64, 64))
        ]
    return found


def _rectangles() -> list[Case]:
    """Blocks without a mask: what a ring turns, what a chunk does before its own triangle, encoders."""
    found = []
    sizes = [(t, c) for t in (512, 2048, 8192) for c in (2048, 8192, 32768, 131072) if c >= t] + [(8192, 4096), (32768, 32768)]
    for index, layout in enumerate(((32, 8, 128, 128), (8, 1, 128, 128), (64, 8, 64, 64), (32, 32, 128, 128), (16, 16, 192, 128))):
        for tokens, context in sizes:
            found.append(over("attention", "cudnn", "bf16", layout, tokens=tokens, context=context, full=True))
            if index < 3 and tokens * context <= 2**28:  # noqa: PLR2004 (three layouts, 8K over 32K)
                found.append(over("attention_backward", "cudnn", "bf16", layout, tokens=tokens, context=context, full=True))
            if index < 2 and tokens >= 2048:  # noqa: PLR2004 (two layouts, the longer blocks)
                found.append(over("attention", "flash2", "bf16", layout, tokens=tokens, context=context, full=True))
    return found


def _prefills() -> list[Case]:
    """Other implementations, lengths beyond those of every layout, and the regimes."""
    both = KERNELS[:2]
    found = []
    for layout in ((32, 8, 128, 128), (64, 8, 64, 64)):
        for length in (512, 2048, 8192, 32768):
            found += [over(k, "efficient", "bf16", layout, tokens=length, context=length) for k in both]
    for length in (128, 512, 1024, 2048, 4096, 8192, 16384):
        found.append(over("attention", "math", "bf16", (8, 8, 128, 128), tokens=length, context=length))
    for length in (65536, 131072):
        for layout in ((32, 8, 128, 128), (8, 1, 128, 128), (64, 8, 64, 64), (16, 16, 192, 128)):
            found += [over(k, "cudnn", "bf16", layout, tokens=length, context=length) for k in both]
        found += [over(k, "flash2", "bf16", (8, 1, 128, 128), tokens=length, context=length) for k in both]
    for length in (524288, 1048576):
        found += [over(k, "cudnn", "bf16", (4, 1, 128, 128), tokens=length, context=length) for k in both]
        found.append(over("attention", "flash2", "bf16", (4, 1, 128, 128), tokens=length, context=length))
    for regime in ("burst", "sustained"):
        found += [over(k, "cudnn", "bf16", (32, 8, 128, 128), tokens=16384, context=16384, regime=regime) for k in both]
    return found


def _decode(impl: str, dtype: str, layout: HeadLayout, batch: int, context: int) -> Case:
    return over("decode_attention", impl, dtype, layout, sequences=batch, tokens=1, context=context)


def _decodes() -> list[Case]:
    found = []
    batches = (1, 4, 16, 64, 256)
    grid = [(b, c) for b in batches for c in (1024, 4096, 8192, 16384, 32768, 131072, 1048576, 2097152)]
    for layout in ((32, 8, 128, 128), (8, 1, 128, 128), (64, 8, 64, 64), (16, 2, 128, 128), (32, 32, 128, 128)):
        for impl, dtype in (("triton", "bf16"), ("triton", "fp8"), ("flash2", "bf16")):
            row = layout[1] * (layout[2] + layout[3]) * DTYPES[dtype].bytes
            for index, (batch, context) in enumerate(grid):
                if batch * context * row <= MOST_CACHE and ((impl, dtype) == ("triton", "bf16") or index % 2 == 0):
                    found.append(_decode(impl, dtype, layout, batch, context))
    for heads, chosen in ((16, (1, 16, 256)), (128, batches)):
        for batch, context in grid:
            if batch * context * 1152 <= MOST_CACHE and batch in chosen:
                found.append(
                    over("latent_attention", "triton", "bf16", (heads, 1, 576, 512), sequences=batch, tokens=1, context=context)
                )
    return found


def op(which: Case) -> Op:
    """Quantities of the core."""
    segment = Segment(
        float(which["sequences"]), float(which["tokens"]), float(which["context"] - which["tokens"]),
        split_kv=which.kernel in ("decode_attention", "latent_attention"),
    )  # fmt: skip
    if which.kernel == "latent_attention":
        return latent_attention(
            "core", segment, heads=float(which["heads"]), kv_lora_rank=which["v_head_dim"],
            rope_head_dim=which["head_dim"] - which["v_head_dim"], impl=which.impl,
        )  # fmt: skip
    window = which.get("window")
    mask: Causal | Window | Block = Window(window) if window else Causal()
    if which.get("full"):
        segment, mask = segment._replace(prefix=0.0), Block(float(which["context"]))
    return attention(
        "core", segment, heads=float(which["heads"]), kv_heads=float(which["kv_heads"]), head_dim=which["head_dim"],
        v_head_dim=which["v_head_dim"], mask=mask, cache=CACHE_FORMATS[which.dtype], impl=which.impl,
        backward=which.kernel == "attention_backward",
    )  # fmt: skip


def prepare(which: Case, device: Any) -> Prepared:
    """Random queries, keys and values; decode reads a cache whose pages are shuffled."""
    sets, hot = sets_for(float(op(which).hbm_bytes), l2_of(device), MOST_CACHE)
    if which.kernel in ("decode_attention", "latent_attention"):
        return _prepare_decode(which, device, sets, hot=hot)
    b, new, seen, h, g = (which[name] for name in ("sequences", "tokens", "context", "heads", "kv_heads"))
    q = _random((sets, b, new, h, which["head_dim"]), device)
    k = _random((sets, b, seen, g, which["head_dim"]), device)
    v = _random((sets, b, seen, g, which["v_head_dim"]), device)
    window, causal = which.get("window"), not which.get("full")
    if which.kernel == "attention":
        return Prepared(lambda i: forward(which.impl, q[i], k[i], v[i], window=window, causal=causal), sets, hot=hot)
    grads = _random((b, new, h, which["v_head_dim"]), device)
    saved = [saving(which.impl, q[i], k[i], v[i], causal=causal) for i in range(sets)]
    # autograd, through which packages are called, cannot be captured
    capturable = which.impl not in packages.PACKAGES
    return Prepared(lambda i: backward(which.impl, grads, q[i], k[i], v[i], saved[i], causal=causal), sets, graphable=capturable, hot=hot)


def forward(impl: str, q: Any, k: Any, v: Any, *, window: int = 0, causal: bool = True) -> Any:
    """Attention, causal ones aligned to the last key: q (B, C, h, d), k (B, N, g, d), v (B, N, g, d_v) -> (B, C, h, d_v)."""
    if impl in packages.PACKAGES:
        return packages.forward(impl, q, k, v, window=window)
    if impl == "flash2" and q.is_cuda:
        return _flash2(q, k, v, window, causal=causal)[0]
    if causal and (q.shape[1] != k.shape[1] or window):
        message = f"attention impl {impl!r}: PyTorch offers no chunk after a prefix and no window here; use flash2"
        raise ValueError(message)
    if impl == "cudnn":
        # what scaled_dot_product_attention comes down to
        return _cudnn(q, k, v, causal=causal, saves=False)[0].transpose(1, 2)
    with torch.nn.attention.sdpa_kernel(_backend(impl)):
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), *(_repeated(impl, t, q).transpose(1, 2) for t in (k, v)), is_causal=causal, enable_gqa=impl != "efficient"
        )
    return out.transpose(1, 2)


def _repeated(impl: str, t: Any, q: Any) -> Any:
    """The memory-efficient kernel knows no grouped heads: every query head gets its own view of the key-value head."""
    groups = q.shape[2] // t.shape[2]
    return t.repeat_interleave(groups, dim=2) if impl == "efficient" and groups > 1 else t


def _backend(impl: str) -> Any:
    backend = torch.nn.attention.SDPBackend
    named = {"math": backend.MATH, "efficient": backend.EFFICIENT_ATTENTION, "flash2": backend.FLASH_ATTENTION}
    return named[impl]


def _flash2(q: Any, k: Any, v: Any, window: int = 0, *, causal: bool = True) -> Any:
    return torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False,
        window_size_left=window - 1 if window else None, window_size_right=0 if window else None,
    )  # fmt: skip


def _cudnn(q: Any, k: Any, v: Any, *, causal: bool, saves: bool) -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
        *(t.transpose(1, 2) for t in (q, k, v)), None, saves, 0.0, causal, False
    )


def saving(impl: str, q: Any, k: Any, v: Any, *, causal: bool = True) -> Any:
    """What the backward of `impl` needs of the forward."""
    if impl == "flash2":
        return _flash2(q, k, v, causal=causal)
    if impl == "cudnn":
        return _cudnn(q, k, v, causal=causal, saves=True)
    if impl == "efficient":
        q, k, v = q.transpose(1, 2), _repeated(impl, k, q).transpose(1, 2), _repeated(impl, v, q).transpose(1, 2)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)  # noqa: SLF001
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return leaves, forward(impl, *leaves, causal=causal)


def backward(impl: str, grads: Any, q: Any, k: Any, v: Any, saved: Any, *, causal: bool = True) -> Any:
    """Gradients of q, k and v."""
    aten = torch.ops.aten
    if impl == "flash2":
        out, lse, seed, offset = saved[:4]
        return aten._flash_attention_backward(  # noqa: SLF001
            grads, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, seed, offset
        )
    if impl == "cudnn":
        out, lse, seed, offset = saved[0], saved[1], saved[6], saved[7]
        return aten._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
            grads.transpose(1, 2), *(t.transpose(1, 2) for t in (q, k, v)), out, lse, seed, offset, None, None, None,
            q.shape[1], k.shape[1], 0.0, causal,
        )  # fmt: skip
    if impl == "efficient":
        out, lse, seed, offset = saved
        q, k, v = q.transpose(1, 2), _repeated(impl, k, q).transpose(1, 2), _repeated(impl, v, q).transpose(1, 2)
        return aten._scaled_dot_product_efficient_attention_backward(  # noqa: SLF001
            grads.transpose(1, 2), q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], True
        )
    leaves, out = saved
    return torch.autograd.grad(out, leaves, grads, retain_graph=True)


def _prepare_decode(which: Case, device: Any, sets: int, *, hot: bool) -> Prepared:
    b, seen, h, g, d = (which[name] for name in ("sequences", "context", "heads", "kv_heads", "head_dim"))
    q = _random((sets, b, h, d), device)
    if which.impl == "flash2":
        k, v = (_random((sets, b, seen, g, d), device) for _ in range(2))
        return Prepared(lambda i: _flash2(q[i].unsqueeze(1), k[i], v[i]), sets, hot=hot)
    if which.impl == "flashinfer":
        tables = torch.stack([torch.randperm(b * -(-seen // PAGE), device=device).to(torch.int32).view(b, -1) for _ in range(sets)])
        k, v = (_random((sets, tables[0].numel(), PAGE, g, d), device, KINDS[which.dtype]) for _ in range(2))
        lengths = torch.full((b,), seen, device=device, dtype=torch.int32)
        planned = [packages.paged_decode(q[i], k[i], v[i], tables[i], lengths) for i in range(sets)]
        return Prepared(lambda i: planned[i](), sets, hot=hot)
    from microbench import kernels_triton as kernels  # noqa: PLC0415 (needs a GPU)

    out = torch.empty(b, h, which["v_head_dim"], device=device, dtype=torch.bfloat16)
    lengths = torch.full((b,), seen, device=device, dtype=torch.int32)
    pages = -(-seen // PAGE)
    tables = torch.stack([torch.randperm(b * pages, device=device).to(torch.int32).view(b, pages) for _ in range(sets)])
    if which.kernel == "latent_attention":
        cache = _random((sets, b * pages, PAGE, d), device)
        block = kernels.head_block(h)
        latent = kernels.latent_scratch(b, h, which["v_head_dim"], seen, block, device)
        return Prepared(lambda i: kernels.latent_decode(q[i], cache[i], tables[i], lengths, out, latent, d**-0.5, block), sets, hot=hot)
    kind = KINDS[which.dtype]
    k, v = (_random((sets, b * pages, PAGE, g, d), device, kind) for _ in range(2))
    scratch = kernels.paged_scratch(b, h, g, d, seen, device)
    return Prepared(lambda i: kernels.paged_decode(q[i], k[i], v[i], tables[i], lengths, out, scratch), sets, hot=hot)


def _random(shape: tuple[int, ...], device: Any, kind: Any = torch.bfloat16) -> Any:
    """Normal numbers, filled piece by piece so that no wider copy of the whole exists."""
    out = torch.empty(shape, device=device, dtype=kind)
    flat, step = out.view(-1), 1 << 28
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        piece.copy_(torch.randn(piece.numel(), device=device, dtype=torch.bfloat16)) if kind != torch.bfloat16 else piece.normal_()
    return out



def error(which: Case, device: Any) -> float:
    """Against float64 scores in full, at up to 192 new tokens after up to 192 others, 2 sequences, the case's own heads."""
    b, h, g, d, dv = (which[name] for name in ("sequences", "heads", "kv_heads", "head_dim", "v_head_dim"))
    b = min(b, 2)
    if which.kernel in ("decode_attention", "latent_attention"):
        return _decode_error(which, device, b)
    new = min(which["tokens"], 192)
    seen = new + min(which["context"] - which["tokens"], 192)
    window, causal = min(which.get("window"), 100), not which.get("full")
    q, k, v = _random((b, new, h, d), device), _random((b, seen, g, d), device), _random((b, seen, g, dv), device)

    def wanted(q: Any, k: Any, v: Any) -> Any:
        return reference(q, k, v, window, causal=causal)

    if which.kernel == "attention":
        return relative(forward(which.impl, q, k, v, window=window, causal=causal).double(), wanted(q.double(), k.double(), v.double()))
    grads = _random((b, new, h, dv), device)
    got = backward(which.impl, grads, q, k, v, saving(which.impl, q, k, v, causal=causal), causal=causal)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    wide_q, wide_k, wide_v = leaves
    want = torch.autograd.grad(wanted(wide_q, wide_k, wide_v), leaves, grads.double())
    return max(relative(_as_rows(a, w.shape).double(), w) for a, w in zip(got[:3], want, strict=True))


def _as_rows(got: Any, shape: Any) -> Any:
    """A gradient in the layout (B, N, heads, d), repeated heads summed."""
    if got.shape == shape:
        return got
    got = got.transpose(1, 2)
    return got if got.shape == shape else got.reshape(*shape[:3], -1, shape[3]).sum(3)


def _decode_error(which: Case, device: Any, b: int) -> float:
    small = dict(which.shape) | {"sequences": b, "context": 777}
    which = Case(which.kernel, which.impl, which.dtype, tuple(small.items()))
    h, g, d, dv, seen = (which[name] for name in ("heads", "kv_heads", "head_dim", "v_head_dim", "context"))
    q = _random((b, h, d), device)
    if which.impl == "flash2":
        k, v = _random((b, seen, g, d), device), _random((b, seen, g, d), device)
        return relative(_flash2(q.unsqueeze(1), k, v)[0].double(), reference(q.unsqueeze(1).double(), k.double(), v.double(), 0))
    pages = -(-seen // PAGE)
    table = torch.randperm(b * pages, device=device).to(torch.int32).view(b, pages)
    lengths = torch.full((b,), seen, device=device, dtype=torch.int32)
    if which.impl == "flashinfer":
        k, v = (_random((b * pages, PAGE, g, d), device, KINDS[which.dtype]) for _ in range(2))
        rows_k, rows_v = ((t.to(torch.bfloat16)[table.long()]).reshape(b, pages * PAGE, g, d)[:, :seen].double() for t in (k, v))
        got = packages.paged_decode(q, k, v, table, lengths)()
        return relative(got.double(), reference(q.unsqueeze(1).double(), rows_k, rows_v, 0)[:, 0])
    from microbench import kernels_triton as kernels  # noqa: PLC0415 (needs a GPU)

    out = torch.full((b, h, dv), float("nan"), device=device, dtype=torch.bfloat16)
    if which.kernel == "latent_attention":
        cache = _random((b * pages, PAGE, d), device)
        block = kernels.head_block(h)
        kernels.latent_decode(q, cache, table, lengths, out, kernels.latent_scratch(b, h, dv, seen, block, device), d**-0.5, block)
        rows = cache[table.long()].reshape(b, pages * PAGE, 1, d)[:, :seen].double()
        return relative(out.double(), reference(q.unsqueeze(1).double(), rows, rows[..., :dv], 0)[:, 0])
    kind = KINDS[which.dtype]
    k, v = (_random((b * pages, PAGE, g, d), device, kind) for _ in range(2))
    kernels.paged_decode(q, k, v, table, lengths, out, kernels.paged_scratch(b, h, g, d, seen, device))
    rows_k, rows_v = ((t.to(torch.bfloat16)[table.long()]).reshape(b, pages * PAGE, g, d)[:, :seen].double() for t in (k, v))
    return relative(out.double(), reference(q.unsqueeze(1).double(), rows_k, rows_v, 0)[:, 0])


def reference(q: Any, k: Any, v: Any, window: int, *, causal: bool = True) -> Any:
    """softmax(q k^T / sqrt(d)) v in the precision given, scores in full; causal ones from the last key backwards."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bchd,bnhd->bhcn", q, k) * q.shape[-1] ** -0.5
    positions = torch.arange(k.shape[1], device=q.device)
    distance = positions[None, :] - positions[k.shape[1] - q.shape[1] :, None]
    hidden = (distance > 0) | (distance <= -window if window else torch.zeros_like(distance, dtype=torch.bool))
    shown = scores.masked_fill(hidden, float("-inf")) if causal else scores
    return torch.einsum("bhcn,bnhd->bchd", shown.softmax(-1), v)
