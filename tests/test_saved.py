"""What a layer keeps for backward is what autograd keeps of the same layer, kernel by fused kernel, written in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from microbench.live import META, Account  # noqa: E402
from simulator.dtypes import C_BF16  # noqa: E402
from simulator.kernels.attention import Segment  # noqa: E402
from simulator.layers import Attention, GatedMLP, LatentAttention, MoE  # noqa: E402
from simulator.layers.layer import Direction, Layer  # noqa: E402
from simulator.work import PeakBytes, Serial, Work, fold  # noqa: E402

#: So many tokens that the weights are small beside the activations.
TOKENS, D = 16384, 256


class Norm(torch.autograd.Function):
    """Sum with the residual, then the norm: backward starts from the sum."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any) -> Any:
        added = torch.empty_like(x)
        ctx.save_for_backward(added)
        return torch.empty_like(residual), added

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_added: Any) -> Any:
        (added,) = ctx.saved_tensors
        d_x = torch.empty_like(added)
        return d_x, d_x


class Fused(torch.autograd.Function):
    """Any kernel that keeps what it reads: an activation, a norm within a block."""

    @staticmethod
    def forward(ctx: Any, x: Any, width: int) -> Any:
        ctx.save_for_backward(x)
        return x.new_empty(x.shape[0], width)

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None


class Moved(torch.autograd.Function):
    """Rows moved to experts or back, where `scores` weigh them: indices alone are kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, rows: int, scores: Any = None) -> Any:
        ctx.rows = x.shape[0]
        return x.new_empty(rows, x.shape[1])

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        return d_out.new_empty(ctx.rows, d_out.shape[1]), None, None


def weight(*shape: int) -> Any:
    return torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=True)


def attention(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (t.unflatten(0, (1, TOKENS)).transpose(1, 2) for t in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)[0]
    return out.transpose(1, 2).reshape(TOKENS, -1)


def grouped_query(layer: Attention) -> Callable[[Any], Any]:
    h, g, d = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
    qkv, o = weight((h + 2 * g) * d, D), weight(D, h * d)

    def run(x: Any) -> Any:
        row = (x @ qkv.t()).unflatten(1, (h + 2 * g, d))
        turned, v = row.split([h + g, g], 1)
        if layer.qk_norm:
            turned = Fused.apply(turned, (h + g) * d).unflatten(1, (h + g, d))
        return attention(*turned.split([h, g], 1), v) @ o.t()

    return run


def latent(layer: LatentAttention) -> Callable[[Any], Any]:
    h, r, dn, dr, dv, rq = (
        layer.num_attention_heads, layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim, layer.q_lora_rank or 0
    )  # fmt: skip
    down, query, up, o = weight(r + dr + rq, D), weight(h * (dn + dr), rq or D), weight(h * (dn + dv), r), weight(D, h * dv)

    def run(x: Any) -> Any:
        made = x @ down.t()
        # the part of the keys that is turned is not normed; it lies in the same row
        inner, rope = Fused.apply(made, r + rq), made[:, :dr]
        asked = inner[:, r:].contiguous() if rq else x
        q = (asked @ query.t()).unflatten(1, (h, dn + dr))
        plain, v = (inner[:, :r].contiguous() @ up.t()).unflatten(1, (h, dn + dv)).split([dn, dv], 2)
        keys = torch.cat([plain, rope[:, None].expand(-1, h, -1)], 2)
        return attention(q, keys, v.contiguous()) @ o.t()

    return run


def mlp(layer: GatedMLP) -> Callable[[Any], Any]:
    inner = layer.intermediate_size
    gate_up, down = weight(2 * inner, D), weight(D, inner)
    return lambda x: Fused.apply(x @ gate_up.t(), inner) @ down.t()


def experts(layer: MoE) -> Callable[[Any], Any]:
    e, inner, shared = layer.num_experts, layer.moe_intermediate_size, layer.shared_intermediate_size
    router, gate_up, down = weight(e, D), weight(e, D, 2 * inner), weight(e, inner, D)
    ends = torch.empty(e, device=META, dtype=torch.int32)
    beside = mlp(GatedMLP(D, shared)) if shared else None

    def run(x: Any) -> Any:
        scores = x @ router.t()
        rows = Moved.apply(x, TOKENS * layer.num_experts_per_tok)
        inner_rows = Fused.apply(torch._grouped_mm(rows, gate_up, offs=ends), inner)
        out = Moved.apply(torch._grouped_mm(inner_rows, down, offs=ends), TOKENS, scores)
        return out + beside(x) if beside else out

    return run


LAYERS: dict[str, tuple[Layer, Callable[[Any], Callable[[Any], Any]]]] = {
    "grouped-query attention": (Attention(D, 8, 2, 64, rotary_dim=64), grouped_query),
    "normed heads": (Attention(D, 8, 2, 64, rotary_dim=64, qk_norm=True), grouped_query),
    "every head its own keys": (Attention(D, 8, 8, 32, rotary_dim=32), grouped_query),
    "latent attention": (LatentAttention(D, 8, None, 128, 64, 32, 64), latent),
    "latent queries": (LatentAttention(D, 8, 192, 128, 64, 32, 64), latent),
    "gated MLP": (GatedMLP(D, 1024), mlp),
    "experts": (MoE(D, 16, 4, 128), experts),
    "shared experts": (MoE(D, 16, 4, 128, shared_intermediate_size=256), experts),
}


def ways(layer: Layer) -> list[Work]:
    """Forward and backward."""
    held = layer.whole((Segment(1.0, float(TOKENS), 0.0),))
    return [layer.work(held, direction, cache=C_BF16) for direction in Direction]


def rows(*, trained: bool) -> Any:
    return torch.empty(TOKENS, D, device=META, dtype=torch.bfloat16, requires_grad=trained)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_what_autograd_keeps(name: str) -> None:
    layer, program = LAYERS[name]
    with Account() as account:
        run, x, residual = program(layer), rows(trained=True), rows(trained=True)
        before = account.held_bytes
        normed, added = Norm.apply(x, residual)
        out = run(normed)
        del normed
        kept = account.held_bytes - before - out.untyped_storage().nbytes()
    forward, backward = ways(layer)
    assert fold(forward, PeakBytes(keeps_saved=True))[0] == pytest.approx(kept, rel=1e-3)
    assert fold(Serial([forward, backward]), PeakBytes(keeps_saved=True))[0] == pytest.approx(0.0, abs=1.0)
    assert added.shape == x.shape


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_hold_what_autograd_holds(name: str) -> None:
    """Beside the gradient of the residual stream, and the output, which the caller still names here.  An attention kernel's
    workspace is no tensor of the program's; gradients of weights are under a hundredth here.
    """
    layer, program = LAYERS[name]
    with Account() as account:
        run, x, residual, gradient = program(layer), rows(trained=True), rows(trained=True), rows(trained=False)
        before = account.held_bytes
        account.start()
        normed, added = Norm.apply(x, residual)
        out = run(normed)
        del normed
        torch.autograd.backward([out, added], [gradient, gradient])
    inside = 0.0
    if not isinstance(layer, (GatedMLP, MoE)):
        h, d, v = layer.num_attention_heads, getattr(layer, "head_dim", 96), getattr(layer, "v_head_dim", getattr(layer, "head_dim", 0))
        inside = TOKENS * h * (4.0 * d + (2.0 * (d + v) if layer.whole(()).kv_heads < h and isinstance(layer, Attention) else 0.0))
    ours = fold(Serial(ways(layer)), PeakBytes(keeps_saved=True))[1] - inside + out.untyped_storage().nbytes()
    assert ours == pytest.approx(account.peak_bytes - before, rel=1e-2)
