"""Whole decoder layers, and a small whole model, made of the kernels measured one by one: does the sum of the ops predict them?

Dense (Llama-3.1-8B), experts (Qwen3-30B-A3B), latent (DeepSeek-V2-Lite): prefill of a prompt, decode of a batch under a CUDA
graph, and one forward and backward (dense).  Expert choices are drawn beforehand: top-k and sorting are not timed.
Weights are random; what a layer remembers lies in a paged cache.  `parts` are a layer's own ops as cases of the other modules:
measured beside the layer on one card, they say whether its time is their sum.  A tensor dies with its last reader, as in an engine
that compiles its layers: what a function is to free comes in a list, `given` or `handed`, so that no caller's name keeps it alive.

Legend: D hidden, h heads, g key-value heads, d head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import cycle
from math import gcd
from typing import Any

import torch

from microbench import attention, elementwise, gemm, live
from microbench.case import HANDED, Case, Prepared, case, relative
from microbench.elementwise import EPS
from microbench.gemm import grouped
from microbench.implementations import RUNS, as_run
from simulator.calibration import Calibration
from simulator.dtypes import BF16, C_BF16, FP32
from simulator.hardware import cluster
from simulator.hf import load_model
from simulator.kernels.attention import Segment
from simulator.layers import Attention, LatentAttention, MoE
from simulator.layers.layer import Direction, is_mixer, weight_bytes
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.passes import Passes
from simulator.phases import System
from simulator.timing import Clock
from simulator.work import Op, Serial, Work, fold, peak_bytes, quantity

KERNELS: tuple[str, ...] = ("decoder_layer", "model")
MODELS = {
    "dense": "meta-llama/Meta-Llama-3.1-8B", "moe": "Qwen/Qwen3-30B-A3B", "mla": "deepseek-ai/DeepSeek-V2-Lite", "small": "Qwen/Qwen3-1.7B",
}  # fmt: skip


def cases(suite: str) -> list[Case]:
    """Layers by kind and phase; the small model."""
    if suite == "tiny":
        return []
    quick = suite == "quick"
    found = []
    for kind in ("dense",) if quick else ("dense", "moe", "mla"):
        lengths = (8192,) if quick else (512, 2048, 8192, 32768)
        found += [case("decoder_layer", f"{kind}.prefill", "bf16", sequences=1, tokens=t, context=t) for t in lengths]
        for batch, context in ((8, 8192),) if quick else ((1, 8192), (16, 8192), (64, 4096), (1, 131072)):
            found.append(case("decoder_layer", f"{kind}.decode", "bf16", sequences=batch, tokens=1, context=context))
    if not quick:
        found += [case("decoder_layer", "dense.training", "bf16", sequences=1, tokens=t, context=t) for t in (2048, 8192, 16384)]
        found += [case("model", "small.prefill", "bf16", sequences=1, tokens=t, context=t) for t in (2048, 8192)]
        found += [case("model", "small.decode", "bf16", sequences=b, tokens=1, context=c) for b, c in ((1, 8192), (16, 8192))]
    return found


def segment_of(which: Case) -> Segment:
    """The segment of a case."""
    return Segment(
        float(which["sequences"]), float(which["tokens"]), float(which["context"] - which["tokens"]), split_kv=which.impl.endswith("decode")
    )


@cache
def model_of(kind: str) -> ModelSpec:
    """The model whose layer (the last of its stack) or whole is measured."""
    spec = load_model(MODELS[kind])
    return spec if kind == "small" else replace(spec, blocks=((1, spec.blocks[-1][1]),))


def work(which: Case) -> Work:
    """The simulator's own tree of the case, with the implementations that run here."""
    return as_run(_work(which))


def _work(which: Case) -> Work:
    kind, _, phase = which.impl.partition(".")
    spec, segment = model_of(kind), segment_of(which)
    if which.kernel == "model":
        return System(spec, Layout()).step((segment,))[0]
    layers = spec.blocks[0][1]
    forward = [layer.work(layer.whole((segment,)), cache=C_BF16) for layer in layers]
    if phase != "training":
        return Serial(forward)
    return Serial([*forward, *(layer.work(layer.whole((segment,)), Direction.BACKWARD, cache=C_BF16) for layer in reversed(layers))])


def op(which: Case) -> Op:
    """The sums of the tree, as one row."""
    tree = work(which)
    flops, moved = (float(fold(tree, quantity(name))) for name in ("flops", "hbm_bytes"))
    return Op(which.kernel, which.kernel, which.impl, which.dtype, tensor_flops=flops, model_flops=flops, hbm_bytes=moved)


#: A kernel that moves fewer bytes is bound by latency: what memory moves in the two microseconds that a launch takes.
LATENCY_BYTES = 8e6
#: Least share of products in a part's time, and least time at peak (50 us measured), below which a sample's events weigh 2 % and more.
BY_TENSOR, LASTING_S = 0.4, 30e-6


def leaves(which: Case) -> list[tuple[float, Op]]:
    """The ops of a case's tree, and how often each runs."""
    return [(float(count), op) for op, count in fold(work(which), Passes(lambda _: 0.0)).longest.items() if isinstance(op, Op)]


def parts(which: Case) -> list[tuple[float, Case]]:
    """The ops of a case that can be measured alone, as cases of the other modules, and how often each runs."""
    found: dict[Case, float] = {}
    for count, op in leaves(which):
        part = measurable(op)
        if part is not None:
            found[part] = found.get(part, 0.0) + count
    return [(count, part) for part, count in found.items()]


def in_company(which: Case) -> dict[Case, Case]:
    """The parts of a prefill or of training whose time the power limit decides, each with its case in the layer's company.

    An H200 at its peak decides which these are, so that every card and profile measures the same.
    """
    if which.impl.endswith("decode"):
        return {}
    clock, found = Clock(cluster("h200", 1), Calibration.none()), {}
    for _, op in leaves(which):
        part, seconds = measurable(op), float(clock.expected(op))
        if part is not None and seconds >= LASTING_S and float(clock.demand(op).get("tensor", 0.0)) >= BY_TENSOR * seconds:
            found[part] = part.beside(which)
    return found


def together(which: Case) -> list[Case]:
    """What says whether a layer's time is the sum of its parts: each of them alone, those in its company, the layer."""
    return [*(part for _, part in parts(which)), *in_company(which).values(), which]


def measurable(op: Op) -> Case | None:
    """The case that measures an op alone: the same kernel, the same extents, whole numbers of experts.  None where no module has one.

    A kernel that streams rows finds what the kernel before it wrote in the L2 cache, as far as that fits: above LATENCY_BYTES it is
    measured handed.  Below, latency decides, and some operand (gains, tables, slots) is as cold in a layer as in a rotation of
    inputs.  Products and attention cores read weights and caches that are cold.
    """
    impl, dtype = RUNS.get(op.kernel, op.impl), op.family[2]
    extent = {name: round(float(value)) for name, value in op.shape.items()}
    if op.kernel in gemm.KERNELS:
        extents = [name for name in ("members", "m", "n", "k", "experts") if name in extent]
        return Case(op.kernel, impl, dtype, tuple((name, extent[name]) for name in extents))
    if op.kernel in attention.KERNELS:
        layout = (extent["heads"], extent["kv_heads"], extent["head_dim"], extent["v_head_dim"])
        return attention.over(
            op.kernel, impl, dtype, layout, sequences=extent["sequences"], tokens=extent["tokens"], context=extent["keys"]
        )
    if op.kernel != "elementwise" or dtype != "bf16":
        return None
    regime = HANDED if float(op.hbm_bytes) > LATENCY_BYTES else "steady"
    if impl in elementwise.ROUTED:
        return case("elementwise", impl, dtype, regime=regime, tokens=extent["tokens"], routed=extent["routed"], width=extent["width"])
    if impl == "join":
        widths = {name: extent[name] for name in ("heads", "plain", "turned")}
        return case("elementwise", impl, dtype, regime=regime, rows=extent["rows"], **widths)
    one = float(elementwise.op(case("elementwise", impl, dtype, rows=1, width=1)).hbm_bytes)
    width = round(float(op.shape["row_bytes"]) / one)
    head_dim = gcd(width, elementwise.HEAD_DIM)
    heads = {"heads": width // head_dim, "head_dim": head_dim} if impl == "rotary" else {}
    return case("elementwise", impl, dtype, regime=regime, rows=extent["rows"], width=width, **heads)


def beside(suite: str = "full") -> list[Case]:
    """Every case of a suite after its parts, each part once alone, and once in each layer's company."""
    found: dict[Case, None] = {}
    for which in cases(suite):
        found |= dict.fromkeys(together(which))
    return list(found)


def prepare(which: Case, device: Any) -> Prepared:
    """Build the layer or model, run it once and note the most memory it held.

    Beside it lies the workspace that cuBLAS takes with its first product and keeps (32 MiB on Hopper).
    """
    if device.type == "cuda":
        _weights(device, 16, 16) @ _weights(device, 16, 16)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    run = build(which, device)
    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    return Prepared(lambda _: run(), 4 if which.impl.endswith("decode") else 1, captured=True, peak_bytes=float(peak))


def peak_bytes_of(which: Case) -> float:
    """Most bytes a case should hold: what lies there throughout, and the fold of what its ops hold in turn beside the residual stream
    (backward: its gradient).

    Neglected: slots, page tables and expert choices (a few bytes a token); partial outputs of a decode's splits (an fp32 row of values
    for each head of some 264 programs: at most 9 MB); what the allocator does not split from a block (at most 1 MiB a tensor).
    """
    kind, _, phase = which.impl.partition(".")
    stream = which["sequences"] * which["tokens"] * model_of(kind).hidden_size * BF16.bytes
    return resident_bytes(which) + stream + float(peak_bytes(work(which), keeps_saved=phase == "training"))


def resident_bytes(which: Case) -> float:
    """What lies there throughout: weights, caches and rotary tables of the layers; a layer's two inputs, or a model's embedding; in
    training no cache but the gradients of the weights.
    """
    kind, _, phase = which.impl.partition(".")
    spec, segment, training = model_of(kind), segment_of(which), phase == "training"
    held = 0.0
    for count, block in spec.blocks:
        for layer in block:
            share = layer.whole((segment,))
            held += count * float(weight_bytes(layer, share)) * (2 if training else 1)
            if is_mixer(layer):
                assert isinstance(layer, Attention | LatentAttention)
                turned = layer.qk_rope_head_dim if isinstance(layer, LatentAttention) else layer.rotary_dim
                cached = 0.0 if training else float(layer.state_bytes(share, C_BF16))
                held += count * (cached + which["context"] * turned * FP32.bytes)
    rows = spec.vocab_size if which.kernel == "model" else 2 * which["sequences"] * which["tokens"]
    return _copies(which) * held + rows * spec.hidden_size * BF16.bytes


def traced(which: Case) -> live.Trace:
    """What a case holds, by the account of its allocations on no GPU."""
    return live.trace(lambda device: build(which, device))


def kernels_of(device: Any) -> Any:
    """The Triton kernels, or on the meta device what they allocate."""
    if device.type == "meta":
        return live.kernels()
    from microbench import kernels_triton  # noqa: PLC0415 (needs a GPU)

    return kernels_triton


def _copies(which: Case) -> int:
    """How many copies of a decoding layer take turns, so that none finds its weights in the L2 cache."""
    return 4 if which.kernel == "decoder_layer" and which.impl.endswith("decode") else 1


def build(which: Case, device: Any) -> Callable[[], Any]:
    """A function of no arguments that runs the case once."""
    kind, _, phase = which.impl.partition(".")
    spec, batch, new, seen = model_of(kind), which["sequences"], which["tokens"], which["context"]
    stack: list[Block] = []
    for count, block in spec.blocks:
        for _ in range(count * _copies(which)):
            stack.append(Block(spec, block, batch, new, seen, device, like=stack[0] if stack else None))
    if which.kernel == "model":
        return Whole(spec, stack, batch * new, batch, device)
    x, residual = (torch.randn(batch * new, spec.hidden_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if phase == "training":
        stack[0].make_trainable()
        return lambda: stack[0].training(x, residual)
    turn = cycle(stack)
    return lambda: next(turn)([x, residual])


def _weights(device: Any, *shape: int) -> Any:
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)


class Block:
    """One decoder layer with its weights and cache.  Layers `like` another use its scratch, as those of an engine do."""

    def __init__(self, spec: ModelSpec, block: Any, batch: int, new: int, seen: int, device: Any, *, like: Block | None = None) -> None:
        self.kernels = kernels_of(device)
        self.mixer, self.channel = block
        self.scratch: Any = like.scratch if like else None
        self.width, self.batch, self.new, self.seen, self.device = spec.hidden_size, batch, new, seen, device
        self.norms = [torch.ones(self.width, device=device, dtype=torch.bfloat16) for _ in range(2)]
        pages = -(-seen // attention.PAGE)
        self.table = torch.randperm(batch * pages, device=device).to(torch.int32).view(batch, pages)
        positions = torch.arange(seen - new, seen, device=device).repeat(batch)
        owner = torch.arange(batch, device=device).repeat_interleave(new)
        self.slots = (self.table[owner, positions // attention.PAGE] * attention.PAGE + positions % attention.PAGE).to(torch.int32)
        self.positions = positions.to(torch.int32)
        self.lengths = torch.full((batch,), seen, device=device, dtype=torch.int32)
        self._mixer_weights(batch * pages)
        self._channel_weights()

    def _mixer_weights(self, pages: int) -> None:
        mixer, device, width = self.mixer, self.device, self.width
        if isinstance(mixer, LatentAttention):
            h, r, rope = mixer.num_attention_heads, mixer.kv_lora_rank, mixer.qk_rope_head_dim
            assert mixer.q_lora_rank is None, "queries come straight from the hidden state in the model measured here"
            self.query, self.down = _weights(device, h * mixer.qk_head_dim, width), _weights(device, r + rope, width)
            self.up = _weights(device, h * (mixer.qk_nope_head_dim + mixer.v_head_dim), r)
            self.o = _weights(device, width, h * mixer.v_head_dim)
            self.latent = _weights(device, pages, attention.PAGE, r + rope)
            self.inner = torch.ones(r, device=device, dtype=torch.bfloat16)
            self.rope = _table(self.seen, rope, device)
            if self.new == 1 and self.scratch is None:
                self.scratch = self.kernels.latent_scratch(self.batch, h, r, self.seen, self.kernels.head_block(h), device)
            return
        h, g, d = mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim
        self.qkv = _weights(device, (h + 2 * g) * d, width)
        self.o = _weights(device, width, h * d)
        self.cache = [_weights(device, pages, attention.PAGE, g, d) for _ in range(2)]
        self.rope = _table(self.seen, d, device)
        self.head_norm = torch.ones(d, device=device, dtype=torch.bfloat16)
        if self.new == 1 and self.scratch is None:
            self.scratch = self.kernels.paged_scratch(self.batch, h, g, d, self.seen, device)

    def _channel_weights(self) -> None:
        channel, device, width, tokens = self.channel, self.device, self.width, self.batch * self.new
        if not isinstance(channel, MoE):
            inner = channel.intermediate_size
            self.gate_up, self.down_proj = _weights(device, 2 * inner, width), _weights(device, width, inner)
            return
        experts, top, inner = channel.num_experts, channel.num_experts_per_tok, channel.moe_intermediate_size
        self.router = _weights(device, experts, width)
        self.gate_up, self.down_proj = _weights(device, experts, 2 * inner, width), _weights(device, experts, width, inner)
        chosen = torch.rand(tokens, experts, device=device).topk(top).indices.flatten()
        order = chosen.argsort(stable=True)
        self.sources = (order // top).to(torch.int32)
        self.places = order.argsort().view(tokens, top).to(torch.int32)
        self.ends = torch.searchsorted(chosen[order], torch.arange(experts, device=device), right=True).to(torch.int32)
        self.shares = torch.full((tokens, top), 1 / top, device=device, dtype=torch.bfloat16)
        if channel.shared_intermediate_size:
            inner = channel.shared_intermediate_size
            self.shared_up, self.shared_down = _weights(device, 2 * inner, width), _weights(device, width, inner)

    def make_trainable(self) -> None:
        """Buffers for the gradients of the weights in place of the cache."""
        self.cache = []
        self.gradients = {name: torch.empty_like(getattr(self, name)) for name in ("qkv", "o", "gate_up", "down_proj")}

    def __call__(self, given: list[Any]) -> tuple[Any, Any]:
        """norm, mixer, norm, channel mixer: the two tensors that go on.  `given` are input and residual."""
        x, residual = given
        given.clear()
        x, residual = self._norm(x, residual, 0)
        handed = [x]
        del x
        x, residual = self._norm(self.mixed(handed), residual, 1)
        handed = [x]
        del x
        return self.channelled(handed), residual

    def mixed(self, handed: list[Any]) -> Any:
        """The mixer alone."""
        return self._latent_mixer(handed) if isinstance(self.mixer, LatentAttention) else self._attention(handed)

    def channelled(self, handed: list[Any]) -> Any:
        """The channel mixer alone."""
        return self._experts(handed) if isinstance(self.channel, MoE) else self._mlp(handed)

    def share(self, other: Block) -> None:
        """Take the weights and the cache of another block of the same layer, whose prompts this one continues at their last token."""
        named = ("query", "down", "up", "inner", "latent") if isinstance(self.mixer, LatentAttention) else ("qkv", "cache", "head_norm")
        for name in (*named, "o", "table"):
            setattr(self, name, getattr(other, name))
        self.slots = other.slots.view(self.batch, -1)[:, -1].contiguous()

    def _norm(self, x: Any, residual: Any, which: int) -> tuple[Any, Any]:
        out, added = torch.empty_like(x), torch.empty_like(x)
        self.kernels.norm(x, residual, self.norms[which], out, added, EPS)
        return out, added

    def _attention(self, handed: list[Any]) -> Any:
        mixer: Attention = self.mixer
        h, g, d = mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim
        qkv = handed.pop() @ self.qkv.t()
        if mixer.qk_norm:
            self.kernels.head_norm(qkv, self.head_norm, h + g, d, EPS)
        self.kernels.rotary(qkv, self.rope, self.positions, h + g, d)
        self.kernels.write_cache(qkv[:, h * d :], self.slots, *self.cache)
        if self.new == 1:
            out = torch.empty(self.batch, h, d, device=qkv.device, dtype=qkv.dtype)
            query, (keys, values) = qkv[:, : h * d].unflatten(1, (h, d)), self.cache
            self.kernels.paged_decode(query, keys, values, self.table, self.lengths, out, self.scratch)
            return out.view(-1, h * d) @ self.o.t()
        core = attention.forward("cudnn", *self._heads(qkv))
        del qkv
        return core.reshape(-1, h * d) @ self.o.t()

    def _heads(self, qkv: Any) -> tuple[Any, Any, Any]:
        """Queries, keys and values of a row."""
        h, g = self.mixer.num_attention_heads, self.mixer.num_key_value_heads
        return qkv.view(self.batch, self.new, h + 2 * g, self.mixer.head_dim).split([h, g, g], 2)  # type: ignore[no-any-return]

    def _latent_mixer(self, handed: list[Any]) -> Any:
        x = handed.pop()
        mixer: LatentAttention = self.mixer
        h, r, dn, dr, dv = mixer.num_attention_heads, mixer.kv_lora_rank, mixer.qk_nope_head_dim, mixer.qk_rope_head_dim, mixer.v_head_dim
        # queries and latent lie in one row, so that one kernel turns both
        asked = h * (dn + dr)
        both = torch.empty(x.shape[0], asked + r + dr, device=x.device, dtype=x.dtype)
        latent, q = both[:, asked:], both[:, :asked].unflatten(1, (h, dn + dr))
        torch.mm(x, self.down.t(), out=latent)
        self.kernels.head_norm(latent, self.inner, 1, r, EPS)
        torch.mm(x, self.query.t(), out=both[:, :asked])
        tokens = x.shape[0]
        del x
        self.kernels.rotary(both[:, dn:], self.rope, self.positions, h + 1, dr, stride=dn + dr, last=asked + r - dn)
        self.kernels.scatter(latent, self.slots, self.latent.view(-1, r + dr))
        up = self.up.view(h, dn + dv, r)
        if self.new == 1:
            absorbed = torch.bmm(q[..., :dn].transpose(0, 1), up[:, :dn]).transpose(0, 1)
            query = torch.empty(self.batch, h, r + dr, device=both.device, dtype=both.dtype)
            self.kernels.assemble(absorbed, q[..., dn:], query)
            del absorbed, q, latent
            out = torch.empty(self.batch, h, r, device=both.device, dtype=both.dtype)
            block = self.kernels.head_block(h)
            self.kernels.latent_decode(query, self.latent, self.table, self.lengths, out, self.scratch, (dn + dr) ** -0.5, block)
            core = torch.empty(self.batch, h, dv, device=both.device, dtype=both.dtype)
            torch.bmm(out.transpose(0, 1), up[:, dn:].transpose(1, 2), out=core.transpose(0, 1))
            return core.view(-1, h * dv) @ self.o.t()
        expanded = (latent[:, :r] @ self.up.t()).unflatten(1, (h, dn + dv))
        keys = torch.empty(tokens, h, dn + dr, device=both.device, dtype=both.dtype)
        self.kernels.assemble_keys(expanded[..., :dn], latent[:, r:], keys)
        # values are read where the product wrote them
        core = attention.forward("cudnn", *(t.unflatten(0, (self.batch, self.new)) for t in (q, keys, expanded[..., dn:])))
        del both, latent, q, expanded, keys
        return core.reshape(-1, h * dv) @ self.o.t()

    def _mlp(self, handed: list[Any]) -> Any:
        gate_up = handed.pop() @ self.gate_up.t()
        inner = self._activated(gate_up)
        del gate_up
        return inner @ self.down_proj.t()

    def _activated(self, gate_up: Any) -> Any:
        inner = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, device=gate_up.device, dtype=gate_up.dtype)
        self.kernels.activation(gate_up, inner)
        return inner

    def _experts(self, handed: list[Any]) -> Any:
        x = handed.pop()
        x @ self.router.t()
        rows = torch.empty(self.sources.numel(), self.width, device=x.device, dtype=x.dtype)
        self.kernels.gather(x, self.sources, rows)
        if self.channel.shared_intermediate_size:
            handed.append(x)
        del x
        gate_up = grouped(rows, self.gate_up, self.ends)
        del rows
        inner = self._activated(gate_up)
        del gate_up
        rows = grouped(inner, self.down_proj, self.ends)
        del inner
        out = torch.empty(self.places.shape[0], self.width, device=rows.device, dtype=rows.dtype)
        self.kernels.combine(rows, self.places, self.shares, out)
        del rows
        if handed:
            gate_up = handed.pop() @ self.shared_up.t()
            inner = self._activated(gate_up)
            del gate_up
            out += inner @ self.shared_down.t()
        return out

    def training(self, x: Any, residual: Any) -> Any:
        """One forward that keeps what backward needs, and the backward: gradients of inputs and norms; those of the other weights
        go into their buffers.  The output stands for its own gradient.
        """
        kernels, mixer, into = self.kernels, self.mixer, self.gradients
        h, g, d = mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim
        first, added = self._norm(x, residual, 0)
        qkv = first @ self.qkv.t()
        kernels.rotary(qkv, self.rope, self.positions, h + g, d)
        saved = attention.saving("cudnn", *self._heads(qkv))
        core = saved[0].transpose(1, 2).reshape(-1, h * d)
        second, added_2 = self._norm(core @ self.o.t(), added, 1)
        gate_up = second @ self.gate_up.t()
        inner = self._activated(gate_up)
        grad = inner @ self.down_proj.t()

        d_inner = grad @ self.down_proj
        torch.mm(grad.t(), inner, out=into["down_proj"])
        del inner
        d_gate_up = torch.empty_like(gate_up)
        kernels.activation_backward(gate_up, d_inner, d_gate_up)
        del gate_up, d_inner
        d_second = d_gate_up @ self.gate_up
        torch.mm(d_gate_up.t(), second, out=into["gate_up"])
        del d_gate_up, second
        grad, d_norm_2 = kernels.norm_backward(added_2, self.norms[1], d_second, grad, EPS)
        del added_2, d_second
        d_core = grad @ self.o
        torch.mm(grad.t(), core, out=into["o"])
        parts = attention.backward("cudnn", d_core.view(self.batch, self.new, h, d), *self._heads(qkv), saved)[:3]
        del qkv, core, saved, d_core
        d_qkv = torch.cat([t.transpose(1, 2) for t in parts], 2).view(-1, (h + 2 * g) * d)
        del parts
        kernels.rotary(d_qkv, self.rope, self.positions, h + g, d, inverse=True)
        d_first = d_qkv @ self.qkv
        torch.mm(d_qkv.t(), first, out=into["qkv"])
        del d_qkv, first
        grad, d_norm = kernels.norm_backward(added, self.norms[0], d_first, grad, EPS)
        return grad, d_norm, d_norm_2


class Whole:
    """Embedding, blocks, last norm and the logits of the last token of each sequence."""

    def __init__(self, spec: ModelSpec, stack: list[Block], tokens: int, sequences: int, device: Any) -> None:
        self.stack, self.sequences = stack, sequences
        self.embedding = _weights(device, spec.vocab_size, spec.hidden_size)
        self.ids = torch.randint(spec.vocab_size, (tokens,), device=device, dtype=torch.int32)

    def __call__(self) -> Any:
        """Logits."""
        block = self.stack[0]
        x = torch.empty(self.ids.numel(), block.width, device=block.device, dtype=torch.bfloat16)
        block.kernels.gather(self.embedding, self.ids, x)
        given = [x, torch.zeros_like(x)]
        del x
        for layer in self.stack:
            given = [*layer(given)]
        x, residual = given
        given.clear()
        x, residual = block._norm(x, residual, 0)  # noqa: SLF001 (the same norm)
        return x.view(self.sequences, -1, block.width)[:, -1] @ self.embedding.t()


def _table(seen: int, width: int, device: Any) -> Any:
    angles = torch.arange(seen, device=device)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    return torch.cat([angles.cos(), angles.sin()], 1)


def error(which: Case, device: Any) -> float:
    """A dense layer against the same layer in plain float32 PyTorch, on 128 tokens; the mixer of a decoding layer against the last
    rows of its prefill; a latent mixer's prefill against plain float32.  Expert layers, the model and training are not compared.
    """
    kind, _, phase = which.impl.partition(".")
    if device.type != "cuda" or which.kernel == "model" or phase == "training" or (kind, phase) == ("moe", "prefill"):
        return 0.0
    spec, tokens, sequences = model_of(kind), 128, 1 if phase == "prefill" else 2
    block = Block(spec, spec.blocks[0][1], sequences, tokens, tokens, device)
    x, residual = (torch.randn(sequences * tokens, spec.hidden_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if (kind, phase) == ("dense", "prefill"):
        got, _ = block([x, residual])
        return relative(got.double(), _plain(block, x.float(), residual.float()).double())
    got = block.mixed([x])
    if phase == "prefill":
        return relative(got.double(), _plain_latent(block, x.float()).double())
    last = torch.arange(1, sequences + 1, device=device) * tokens - 1
    step = Block(spec, spec.blocks[0][1], sequences, 1, tokens, device)
    step.share(block)
    return relative(step.mixed([x[last]]).double(), got[last].double())


def _plain_latent(block: Block, x: Any) -> Any:
    mixer: LatentAttention = block.mixer
    h, r, dn, dr, dv = mixer.num_attention_heads, mixer.kv_lora_rank, mixer.qk_nope_head_dim, mixer.qk_rope_head_dim, mixer.v_head_dim
    q = (x @ block.query.float().t()).view(1, -1, h, dn + dr)
    latent, rope = (x @ block.down.float().t()).view(1, -1, 1, r + dr).split([r, dr], -1)
    cosine, sine = (t[None, :, None] for t in block.rope[: x.shape[0]].chunk(2, dim=-1))

    def turned(t: Any) -> Any:
        first, second = t.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    normed = latent * torch.rsqrt((latent * latent).mean(-1, keepdim=True) + EPS)
    plain, values = (normed[:, :, 0] @ block.up.float().t()).view(1, -1, h, dn + dv).split([dn, dv], -1)
    keys = torch.cat([plain, turned(rope).expand(-1, -1, h, -1)], -1)
    core = attention.reference(torch.cat([q[..., :dn], turned(q[..., dn:])], -1), keys, values, 0)
    return core.reshape(x.shape[0], -1) @ block.o.float().t()


def _plain(block: Block, x: Any, residual: Any) -> Any:
    mixer: Attention = block.mixer
    h, g, d = mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim

    def normed(t: Any) -> Any:
        return t * torch.rsqrt((t * t).mean(-1, keepdim=True) + EPS)

    residual = x + residual
    qkv = (normed(residual) @ block.qkv.float().t()).view(1, -1, h + 2 * g, d)
    first, second = qkv[:, :, : h + g].unflatten(3, (2, d // 2)).unbind(3)
    cosine, sine = (t[None, :, None] for t in block.rope[: x.shape[0]].chunk(2, dim=-1))
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    core = attention.reference(turned[:, :, :h], turned[:, :, h:], qkv[:, :, h + g :], 0).reshape(x.shape[0], -1)
    residual = residual + core @ block.o.float().t()
    gate, up = (normed(residual) @ block.gate_up.float().t()).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ block.down_proj.float().t()
