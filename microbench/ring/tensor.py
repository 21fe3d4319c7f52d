"""A dense decoder layer shared by the n ranks of a tensor group, forward and backward.

- "tp": residual stream and norms on every rank; products split by columns, then by rows; an all-reduce after each sub-block,
  backward of the gradient by the sub-block's input, beside the weight gradient of the column-split product.
- "tp_sp": residual stream and norms on T / n tokens of each rank; an all-gather before each sub-block and a reduce-scatter
  after.  Backward gathers the gradient, and the input again (only its share was kept) beside the input gradient; the
  reduce-scatter of that runs beside the weight gradient (Megatron-LM, core/tensor_parallel/layers.py; 2205.05198).

Legend: T tokens, D hidden, h heads, g key-value heads, d head_dim, F width, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from microbench import attention
from microbench.case import Case, case, relative
from microbench.elementwise import EPS
from microbench.ring import steps
from microbench.ring.shapes import drawn, filled, one_block
from microbench.ring.transport import DONE, Pending, Transport
from simulator.dtypes import C_BF16
from simulator.kernels.attention import Segment
from simulator.layers import Attention, GatedMLP
from simulator.layers.layer import Direction
from simulator.parallel import Layout
from simulator.work import Serial, Work

KERNELS: tuple[str, ...] = ("tensor_layer", "tensor_layer_backward")
IMPLS = ("tp", "tp_sp")
#: (hidden, heads, key-value heads, head_dim, width): Llama-3.1-8B, Llama-3.1-70B.
SHAPES = ((4096, 32, 8, 128, 14336), (8192, 64, 8, 128, 28672))
TOKENS = (512, 2048, 8192, 32768)
#: The longest whose backward is measured: of longer ones a rank of two keeps too much.
LONGEST_BACKWARD = 16384


def cases(suite: str, ranks: int) -> list[Case]:
    """Both directions of both schemes over tokens."""
    if suite == "tiny":
        return [_case(kernel, impl, ranks, 4 * ranks, (24, ranks * 2, ranks, 8, 6 * ranks)) for kernel in KERNELS for impl in IMPLS]
    found = []
    for kernel in KERNELS:
        for impl in IMPLS:
            for shape in SHAPES:
                found += [_case(kernel, impl, ranks, t, shape) for t in TOKENS if kernel == KERNELS[0] or t <= LONGEST_BACKWARD]
    return found


def _case(kernel: str, impl: str, ranks: int, tokens: int, shape: tuple[int, int, int, int, int]) -> Case:
    hidden, h, g, d, width = shape
    return case(kernel, impl, "bf16", ranks=ranks, tokens=tokens, hidden=hidden, heads=h, kv_heads=g, head_dim=d, width=width)


def work(which: Case) -> Work:
    """Attention and feed-forward of one rank with their messages; backward in reverse."""
    n, hidden = which["ranks"], which["hidden"]
    layers = (
        Attention(hidden, which["heads"], which["kv_heads"], which["head_dim"], rotary_dim=which["head_dim"]),
        GatedMLP(hidden, which["width"]),
    )
    placed = Layout(tp=n, sp=n if which.impl == "tp_sp" else 1).place(one_block(hidden, *layers))
    segment = (Segment(1.0, float(which["tokens"]), 0.0),)
    backward = which.kernel == "tensor_layer_backward"
    direction = Direction.BACKWARD if backward else Direction.FORWARD
    order = layers[::-1] if backward else layers
    return Serial([placed.work(layer, placed.shard(layer, segment), C_BF16, direction) for layer in order])


@dataclass
class Weights:
    """A layer's weights, or a rank's share: qkv [(h + 2 g) d, D], o [D, h d], gate_up [2 F, D], down [D, F], two gains [D]."""

    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    gains: tuple[Any, Any]

    @staticmethod
    def of(which: Case, device: Any, dtype: Any, ranks: int = 1) -> Weights:
        """Random, of a whole layer or of one of `ranks` ranks."""
        hidden, h, g, d, width = (which[name] for name in ("hidden", "heads", "kv_heads", "head_dim", "width"))
        rows = ((h + 2 * g) * d // ranks, h * d // ranks, 2 * width // ranks, width // ranks)
        return Weights(
            filled((rows[0], hidden), device, dtype, hidden**-0.5), filled((hidden, rows[1]), device, dtype, (h * d) ** -0.5),
            filled((rows[2], hidden), device, dtype, hidden**-0.5), filled((hidden, rows[3]), device, dtype, width**-0.5),
            (torch.ones(hidden, device=device, dtype=dtype), torch.ones(hidden, device=device, dtype=dtype)),
        )  # fmt: skip

    def share(self, which: Case, rank: int, ranks: int) -> Weights:
        """A rank's heads and its columns of the feed-forward."""
        h, g, d = (which[name] for name in ("heads", "kv_heads", "head_dim"))
        q, k, v = self.qkv.split([h * d, g * d, g * d])
        gate, up = self.gate_up.chunk(2)

        def mine(*parts: Any) -> Any:
            return torch.cat([part.chunk(ranks)[rank] for part in parts]).contiguous()

        columns = (t.chunk(ranks, dim=1)[rank].contiguous() for t in (self.o, self.down))
        return Weights(mine(q, k, v), next(columns), mine(gate, up), next(columns), self.gains)


class Rank:
    """One rank's share of the layer, its inputs, and what forward keeps for backward."""

    def __init__(self, which: Case, transport: Transport, device: Any, dtype: Any, weights: Weights) -> None:
        n = transport.size
        self.transport, self.weights, self.shared = transport, weights, which.impl == "tp_sp"
        self.heads, self.kv_heads, self.width = which["heads"] // n, which["kv_heads"] // n, which["head_dim"]
        self.tokens, hidden = which["tokens"], which["hidden"]
        self.local = self.tokens // n if self.shared else self.tokens
        self.core = "cudnn" if device.type == "cuda" else "math"
        self.x, self.residual, self.d_out, self.d_residual = (filled((self.local, hidden), device, dtype) for _ in range(4))
        self.table = steps.rotary_table(self.tokens, self.width, device, dtype)
        self.positions = torch.arange(self.tokens, device=device, dtype=torch.int32)
        self.cache = torch.empty((self.tokens, 2 * self.kv_heads * self.width), device=device, dtype=dtype)
        self.kept: dict[str, Any] = {}

    def gathered(self, share: Any) -> tuple[Any, Pending]:
        """All tokens of what a rank has of its own: itself without sequence parallelism."""
        if not self.shared:
            return share, DONE
        whole = torch.empty((self.tokens, share.shape[1]), device=share.device, dtype=share.dtype)
        return whole, self.transport.all_gather(whole, share)

    def reduced(self, partial: Any) -> tuple[Any, Pending]:
        """The sum of all ranks' `partial`, of all tokens or of this rank's."""
        if not self.shared:
            return partial, self.transport.all_reduce(partial)
        share = torch.empty((self.local, partial.shape[1]), device=partial.device, dtype=partial.dtype)
        return share, self.transport.reduce_scatter(share, partial)

    def forward(self, *, keep: bool = False) -> tuple[Any, Any]:
        """The layer's output and the residual stream; with `keep` what backward needs stays."""
        normed, added = steps.norm(self.x, self.residual, self.weights.gains[0], EPS)
        if keep:
            self.kept |= {"normed": normed, "added": added}
        out = _waited(self.reduced(self._attention(_waited(self.gathered(normed)), keep=keep)))
        normed, added = steps.norm(out, added, self.weights.gains[1], EPS)
        if keep:
            self.kept |= {"normed_2": normed, "added_2": added}
        return _waited(self.reduced(self._mlp(_waited(self.gathered(normed)), keep=keep))), added

    def _heads(self, qkv: Any) -> tuple[Any, Any, Any]:
        h, g = self.heads, self.kv_heads
        rows = qkv.view(1, -1, h + 2 * g, self.width)
        return rows[:, :, :h], rows[:, :, h : h + g], rows[:, :, h + g :]

    def _attention(self, x: Any, *, keep: bool) -> Any:
        qkv = x @ self.weights.qkv.t()
        steps.rotary(qkv, self.table, self.positions, self.heads + self.kv_heads, self.width)
        self.cache.copy_(qkv[:, self.heads * self.width :])
        q, k, v = self._heads(qkv)
        if keep:
            saved = attention.saving(self.core, q, k, v)
            core = _rows(saved[0].transpose(1, 2) if self.core == "cudnn" else saved[1].detach())
            self.kept |= {"qkv": qkv, "saved": saved, "core": core}
        else:
            core = _rows(attention.forward(self.core, q, k, v))
        return core @ self.weights.o.t()

    def _mlp(self, x: Any, *, keep: bool) -> Any:
        gate_up = x @ self.weights.gate_up.t()
        inner = steps.activation(gate_up)
        if keep:
            self.kept |= {"gate_up": gate_up, "inner": inner}
        return inner @ self.weights.down.t()

    def backward(self) -> tuple[Any, Weights]:
        """Gradients by the layer's input (and residual) and by this rank's weights."""
        kept, weights = self.kept, self.weights
        grad = _waited(self.gathered(self.d_out))
        d_inner = grad @ weights.down
        d_down = grad.t() @ kept["inner"]
        d_gate_up = steps.activation_backward(kept["gate_up"], d_inner)
        grad, d_gate = self._columns(d_gate_up, weights.gate_up, kept["normed_2"])
        added, d_gain_2 = steps.norm_backward(kept["added_2"], weights.gains[1], grad, self.d_residual, EPS)
        grad = _waited(self.gathered(added))
        d_core = (grad @ weights.o).view(1, -1, self.heads, self.width)
        d_o = grad.t() @ kept["core"]
        gradients = attention.backward(self.core, d_core, *self._heads(kept["qkv"]), kept["saved"])[:3]
        d_qkv = torch.cat([_rows(t.transpose(1, 2) if self.core == "cudnn" else t) for t in gradients], 1)
        steps.rotary(d_qkv, self.table, self.positions, self.heads + self.kv_heads, self.width, inverse=True)
        grad, d_qkv_weight = self._columns(d_qkv, weights.qkv, kept["normed"])
        grad, d_gain = steps.norm_backward(kept["added"], weights.gains[0], grad, added, EPS)
        return grad, Weights(d_qkv_weight, d_o, d_gate, d_down, (d_gain, d_gain_2))

    def _columns(self, grad: Any, weight: Any, normed: Any) -> tuple[Any, Any]:
        """Both gradients of a column-split product: the input is gathered beside the first, the first summed beside the second."""
        given, arriving = self.gathered(normed)
        partial = grad @ weight
        arriving.wait()
        out, summed = self.reduced(partial)
        d_weight = grad.t() @ given
        summed.wait()
        return out, d_weight


def _waited(pair: tuple[Any, Pending]) -> Any:
    pair[1].wait()
    return pair[0]


def _rows(t: Any) -> Any:
    """(1, T, heads, d) as T rows."""
    return t.reshape(t.shape[1], -1)


def build(which: Case, transport: Transport, device: Any) -> Callable[[], Any]:
    """One rank with random weights and inputs; for backward the forward has run once."""
    rank = Rank(which, transport, device, torch.bfloat16, Weights.of(which, device, torch.bfloat16, transport.size))
    if which.kernel == "tensor_layer":
        return rank.forward
    rank.forward(keep=True)
    return rank.backward


def error(which: Case, transport: Transport, device: Any, dtype: Any) -> float:
    """The largest error of a rank's outputs, or of its gradients, against PyTorch's own of the whole layer in float64."""
    n, r = transport.size, transport.rank
    small = {"tokens": min(which["tokens"], 16 * n), "hidden": min(which["hidden"], 64), "width": min(which["width"], 16 * n)}
    which = Case(which.kernel, which.impl, which.dtype, tuple((dict(which.shape) | small).items()))
    hidden, tokens = which["hidden"], which["tokens"]
    like = Weights.of(which, device, dtype)
    products = (like.qkv, like.o, like.gate_up, like.down)
    qkv, o, gate_up, down = (drawn(seed, tuple(t.shape), device, dtype, t.shape[1] ** -0.5) for seed, t in enumerate(products))
    whole = Weights(qkv, o, gate_up, down, (drawn(8, (hidden,), device, dtype) + 2, drawn(9, (hidden,), device, dtype) + 2))
    rank = Rank(which, transport, device, dtype, whole.share(which, r, n))
    inputs = [drawn(seed, (tokens, hidden), device, dtype) for seed in range(20, 24)]
    own = slice(r * rank.local, (r + 1) * rank.local) if rank.shared else slice(None)
    rank.x, rank.residual, rank.d_out, rank.d_residual = (t[own].contiguous() for t in inputs)
    leaves = [t.double().clone().requires_grad_() for t in (inputs[0], whole.qkv, whole.o, whole.gate_up, whole.down, *whole.gains)]
    want = _plain(which, leaves, inputs[1].double(), rank.table.double())
    got = rank.forward(keep=True)
    if which.kernel == "tensor_layer":
        return max(relative(mine.double(), alone[own].detach()) for mine, alone in zip(got, want, strict=True))
    gradients = torch.autograd.grad(want, leaves, [t.double() for t in inputs[2:]])
    d_x, mine = rank.backward()
    for gain in mine.gains if rank.shared else ():
        # of its own tokens only: summed once a step, with the gradients of the optimiser
        transport.all_reduce(gain).wait()
    d_whole, (d_qkv, d_o, d_gate_up, d_down, d_gain, d_gain_2) = gradients[0], gradients[1:]
    share = Weights(d_qkv, d_o, d_gate_up, d_down, (d_gain, d_gain_2)).share(which, r, n)
    pairs = [(d_x, d_whole[own]), (mine.qkv, share.qkv), (mine.o, share.o), (mine.gate_up, share.gate_up), (mine.down, share.down)]
    return max(relative(a.double(), b) for a, b in [*pairs, *zip(mine.gains, share.gains, strict=True)])


def _plain(which: Case, leaves: list[Any], residual: Any, table: Any) -> tuple[Any, Any]:
    """The whole layer in plain PyTorch: output and residual stream."""
    x, w_qkv, w_o, w_gate_up, w_down, gain, gain_2 = leaves
    h, g, d = (which[name] for name in ("heads", "kv_heads", "head_dim"))

    def normed(t: Any, scale: Any) -> Any:
        return t * torch.rsqrt((t * t).mean(-1, keepdim=True) + EPS) * scale

    added = x + residual
    qkv = (normed(added, gain) @ w_qkv.t()).view(1, -1, h + 2 * g, d)
    first, second = qkv[:, :, : h + g].unflatten(3, (2, d // 2)).unbind(3)
    cosine, sine = (t[None, :, None] for t in table.chunk(2, -1))
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    core = attention.reference(turned[:, :, :h], turned[:, :, h:], qkv[:, :, h + g :], 0).reshape(x.shape[0], -1)
    added = added + core @ w_o.t()
    gate, up = (normed(added, gain_2) @ w_gate_up.t()).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w_down.t(), added
