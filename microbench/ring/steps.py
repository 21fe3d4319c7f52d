"""The steps of a layer that no rank shares: on a GPU the fused kernels that the simulator counts, elsewhere plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch


def _kernels() -> Any:
    from microbench import kernels_triton  # noqa: PLC0415 (needs a GPU)

    return kernels_triton


def norm(x: Any, residual: Any, gain: Any, eps: float) -> tuple[Any, Any]:
    """RMS norm of x + residual, and that sum."""
    if x.is_cuda:
        out, added = torch.empty_like(x), torch.empty_like(x)
        _kernels().norm(x, residual, gain, out, added, eps)
        return out, added
    added = x + residual
    return added * torch.rsqrt((added * added).mean(-1, keepdim=True) + eps) * gain, added


def norm_backward(added: Any, gain: Any, d_out: Any, d_added: Any, eps: float) -> tuple[Any, Any]:
    """Gradients by x (and the residual) and by the gain, from those of both outputs of `norm`."""
    if added.is_cuda:
        return _kernels().norm_backward(added, gain, d_out, d_added, eps)  # type: ignore[no-any-return]
    scale = torch.rsqrt((added * added).mean(-1, keepdim=True) + eps)
    normed, inner = added * scale, d_out * gain
    return d_added + scale * (inner - normed * (inner * normed).mean(-1, keepdim=True)), (d_out * normed).sum(0)


def rotary(x: Any, table: Any, positions: Any, heads: int, head_dim: int, *, inverse: bool = False) -> None:
    """Rotate the first `heads` heads of each row in place; `table` [positions, head_dim] holds cosines and sines."""
    if x.is_cuda:
        _kernels().rotary(x, table, positions, heads, head_dim, inverse=inverse)
        return
    turned = x[:, : heads * head_dim].view(-1, heads, 2, head_dim // 2)
    cosine, sine = (t.to(x.dtype)[:, None] for t in table[positions.long()].chunk(2, -1))
    if inverse:
        sine = -sine
    first, second = turned[:, :, 0].clone(), turned[:, :, 1].clone()
    turned[:, :, 0], turned[:, :, 1] = first * cosine - second * sine, second * cosine + first * sine


def rotary_table(tokens: int, head_dim: int, device: Any, dtype: Any) -> Any:
    """Cosines and sines of positions 0 to `tokens`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    turns = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=wide) / head_dim)
    angles = torch.arange(tokens, device=device, dtype=wide)[:, None] * turns
    return torch.cat([angles.cos(), angles.sin()], 1)


def activation(gate_up: Any) -> Any:
    """silu(gate) * up of the two halves."""
    if gate_up.is_cuda:
        out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), device=gate_up.device, dtype=gate_up.dtype)
        _kernels().activation(gate_up, out)
        return out
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def activation_backward(gate_up: Any, d_out: Any) -> Any:
    """The gradient of `activation` by both halves."""
    if gate_up.is_cuda:
        d_gate_up = torch.empty_like(gate_up)
        _kernels().activation_backward(gate_up, d_out, d_gate_up)
        return d_gate_up
    gate, up = gate_up.chunk(2, -1)
    share = torch.sigmoid(gate)
    return torch.cat([d_out * up * share * (1 + gate * (1 - share)), d_out * gate * share], -1)


def gather(source: Any, index: Any) -> Any:
    """source[index]."""
    if source.is_cuda:
        out = torch.empty((index.numel(), source.shape[1]), device=source.device, dtype=source.dtype)
        if index.numel():
            _kernels().gather(source, index, out)
        return out
    return source[index.long()]


def combine(rows: Any, index: Any, shares: Any) -> Any:
    """Of each token the sum over its experts j of shares[t, j] x rows[index[t, j]]."""
    if rows.is_cuda:
        out = torch.empty((index.shape[0], rows.shape[1]), device=rows.device, dtype=rows.dtype)
        _kernels().combine(rows, index, shares, out)
        return out
    return (rows[index.long()] * shares.unsqueeze(-1)).sum(1)
