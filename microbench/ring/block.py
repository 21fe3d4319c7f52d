"""One block of attention: some queries over some keys, forward to (output, LSE), backward from those of the whole row.

On a GPU the block is cuDNN's kernel, or FlashAttention-2's where cuDNN has none for it (keys before a causal block, or a
shape it refuses, or a window); elsewhere plain PyTorch in the element type of its inputs (bf16 is computed in fp32).  `join` adds two
partial outputs by their LSE: with m = log(e^a + e^b) the sum is e^(a - m) A + e^(b - m) B.

Legend: q [B, C, h, d], k and v [B, N, g, d], LSE [B, h, C] in fp32 (float64 for float64).  A causal block is aligned to its
last key: query i sees keys up to N - C + i, the last `window` of them where there is one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Partial(NamedTuple):
    """An output over some of the keys a row sees, and the log-sum-exp of its scores."""

    out: Any
    lse: Any


class Gradients(NamedTuple):
    """Of queries, keys and values."""

    q: Any
    k: Any
    v: Any


def wide(dtype: Any) -> Any:
    """The element type in which sums of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Any, k: Any, v: Any, *, causal: bool, window: int = 0) -> Partial:
    """Softmax(q k^T / sqrt(d)) v of the block, and its LSE."""
    if not q.is_cuda:
        return _plain(q, k, v, causal=causal, window=window)
    if not window and kernel_of(q.shape, k.shape, causal=causal) == "cudnn":
        return _cudnn(q, k, v, causal=causal)
    out, lse = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, **_sides(window)
    )[:2]
    return Partial(out, lse)


def _sides(window: int) -> dict[str, int]:
    """FlashAttention's window."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def backward(grads: Any, q: Any, k: Any, v: Any, whole: Partial, *, causal: bool, window: int = 0) -> Gradients:
    """Gradients of the block's inputs, from the output and LSE of the queries over all keys."""
    if not q.is_cuda:
        return _plain_backward(grads, q, k, v, whole, causal=causal, window=window)
    if not window and kernel_of(q.shape, k.shape, causal=causal, backwards=True) == "cudnn":
        return _cudnn_backward(grads, q, k, v, whole, causal=causal)
    _, seed, offset = _left_over("flash2", q.device)
    found = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
        grads, q, k, v, whole.out, whole.lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, seed, offset, **_sides(window)
    )
    return Gradients(*found)


def join(into: Partial, a: Partial, b: Partial) -> None:
    """Write the sum of two partial outputs; `into` may be either of them.  A row of `b` that saw nothing has LSE -inf."""
    if a.out.is_cuda:
        from microbench import kernels_triton  # noqa: PLC0415 (needs a GPU)

        kernels_triton.join(into, a, b)
        return
    lse = torch.logaddexp(a.lse, b.lse)
    kind = wide(a.out.dtype)
    total = sum(part.out.to(kind) * (part.lse - lse).exp().transpose(1, 2).unsqueeze(3) for part in (a, b))
    into.out.copy_(total)
    into.lse.copy_(lse)


class Sum:
    """The running sum of partial outputs of the same queries, kept wide; the last block's sum is written in their own type.

    A first block is widened by the join that follows it where that covers every row.
    """

    def __init__(self, first: Partial) -> None:
        self.narrow = first.out.dtype
        self.held = first

    def add(self, part: Partial, rows: slice, *, last: bool = False) -> None:
        """One more block, of the queries in `rows`."""
        held, kind = self.held, self.narrow if last else wide(self.narrow)
        into = held
        if held.out.dtype != kind:
            into = Partial(torch.empty(held.out.shape, dtype=kind, device=held.out.device), held.lse)
            for rest in (slice(0, rows.start), slice(rows.stop, None)):
                into.out[:, rest].copy_(held.out[:, rest])
        join(of_rows(into, rows), of_rows(held, rows), part)
        self.held = into

    def result(self) -> Partial:
        """Output in the blocks' type, and LSE."""
        return Partial(self.held.out.to(self.narrow), self.held.lse)


def of_rows(part: Partial, rows: slice) -> Partial:
    """Those queries' share."""
    return Partial(part.out[:, rows], part.lse[:, :, rows])


@cache
def kernel_of(queries: tuple[int, ...], keys: tuple[int, ...], *, causal: bool, backwards: bool = False) -> str:
    """What runs a block of this shape, found by trying: cuDNN, or FlashAttention-2."""
    if causal and queries[1] != keys[1]:
        return "flash2"  # PyTorch aligns cuDNN's mask to the first key
    q, k = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in (queries, keys))
    try:
        out, lse = _cudnn(q, k, k, causal=causal)
        if backwards:
            _cudnn_backward(q, q, k, k, Partial(out, lse), causal=causal)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return "flash2"
    return "cudnn"


def _cudnn(q: Any, k: Any, v: Any, *, causal: bool) -> Partial:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
        *(t.transpose(1, 2) for t in (q, k, v)), None, True, 0.0, causal, False
    )[:2]
    return Partial(out.transpose(1, 2), lse.view(lse.shape[:3]))


def _cudnn_backward(grads: Any, q: Any, k: Any, v: Any, whole: Partial, *, causal: bool) -> Gradients:
    axes, seed, offset = _left_over("cudnn", q.device)
    lse = whole.lse.contiguous()
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
        *(t.transpose(1, 2) for t in (grads, q, k, v, whole.out)), lse.unsqueeze(3) if axes > lse.dim() else lse, seed, offset,
        None, None, None, q.shape[1], k.shape[1], 0.0, causal,
    )  # fmt: skip
    return Gradients(*(t.transpose(1, 2) for t in found))


@cache
def _left_over(kernel: str, device: Any) -> tuple[int, Any, Any]:
    """Axes of a kernel's LSE and the (unused) dropout state that its backward wants back."""
    q = torch.zeros(1, 128, 1, 64, dtype=torch.bfloat16, device=device)
    if kernel == "cudnn":
        saved = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
            *(q.transpose(1, 2) for _ in range(3)), None, True, 0.0, True, False
        )
        return saved[1].dim(), saved[6], saved[7]
    saved = torch.ops.aten._flash_attention_forward(q, q, q, None, None, 128, 128, 0.0, True, False)  # noqa: SLF001
    return saved[1].dim(), saved[2], saved[3]


def _scores(q: Any, k: Any, *, causal: bool, window: int) -> Any:
    """[B, g, h / g, C, N]."""
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bcgrd,bngd->bgrcn", grouped, k) * q.shape[-1] ** -0.5
    if causal:
        every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        last = k.shape[1] - q.shape[1]
        hidden = every.triu(1 + last) | every.tril(last - window) if window else every.triu(1 + last)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _plain(q: Any, k: Any, v: Any, *, causal: bool, window: int) -> Partial:
    kind = wide(q.dtype)
    scores = _scores(q.to(kind), k.to(kind), causal=causal, window=window)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bgrcn,bngd->bcgrd", (scores - lse.unsqueeze(-1)).exp(), v.to(kind)).flatten(2, 3)
    return Partial(out.to(q.dtype), lse.flatten(1, 2))


def _plain_backward(grads: Any, q: Any, k: Any, v: Any, whole: Partial, *, causal: bool, window: int) -> Gradients:
    kind, groups = wide(q.dtype), k.shape[2]
    wide_q, wide_k, wide_v, d_out, out = (t.to(kind) for t in (q, k, v, grads, whole.out))
    shares = (_scores(wide_q, wide_k, causal=causal, window=window) - whole.lse.unflatten(1, (groups, -1)).unsqueeze(-1)).exp()
    d_out, out, grouped = (t.unflatten(2, (groups, -1)) for t in (d_out, out, wide_q))
    d_v = torch.einsum("bgrcn,bcgrd->bngd", shares, d_out)
    d_shares = torch.einsum("bcgrd,bngd->bgrcn", d_out, wide_v)
    delta = (d_out * out).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
    d_scores = shares * (d_shares - delta) * q.shape[-1] ** -0.5
    d_q = torch.einsum("bgrcn,bngd->bcgrd", d_scores, wide_k).flatten(2, 3)
    d_k = torch.einsum("bgrcn,bcgrd->bngd", d_scores, grouped)
    return Gradients(*(t.to(q.dtype) for t in (d_q, d_k, d_v)))
