"""Attention whose tokens several GPUs share: rings of ring-flash-attention and BurstAttention, Ulysses x ring of USP."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simulator.dtypes import C_BF16
from simulator.hf import load_model
from simulator.kernels.attention import Bidirectional, Causal, Segment
from simulator.layers import Attention, Direction
from simulator.parallel import Layout
from simulator.parallel.scheme import mixing_of
from simulator.published.kernels import MS, TERA, burst_attention, ring_flash_single, timed
from simulator.published.table import Asked, Measurement, machine, refuse
from simulator.work import Serial, Work, run_by

#: How the functions of ring-flash-attention order and pass tokens.
_RINGS = {
    "ring_flash_attn": Layout(cp=8, order="contiguous"), "zigzag_ring_flash_attn": Layout(cp=8), "stripe_flash_attn": Layout(cp=8, order="striped"),
}  # fmt: skip
#: What runs these rings' blocks, forward and backward.
_FLASH2 = {"attention": "flash2", "attention_backward": "flash2"}
#: The four packs that its benchmark of packed samples takes in turn: a rank's tokens of each sample.
_PACKS = ((8192,), (256, 7392, 544), (4096, 4096), (3104, 3200, 1600, 160, 128))


def _core(row: Measurement, layout: Layout, *, causal: bool, training: bool, pack: tuple[int, ...] = ()) -> Work:
    """One attention call over the ranks of `layout`, forward or both ways; over packed samples if `pack` says what a rank holds of each."""
    heads, width = int(row.number("heads")), int(row.number("head_dim"))
    layer = Attention(heads * width, heads, int(row.number("kv_heads")), width, mask=Causal() if causal else Bidirectional())
    placed = layout.place(load_model("meta-llama/Meta-Llama-3.1-8B"))
    samples = [(1.0, own * float(layout.gpus)) for own in pack] or [(row.number("batch"), row.number("seq_len"))]
    held = placed.shard(layer, tuple(Segment(number, tokens, 0.0) for number, tokens in samples))
    ways = Direction if training else (Direction.FORWARD,)
    return run_by(Serial([mixing_of(placed.work(layer, held, C_BF16, way)) for way in ways]), _FLASH2)


def ring_flash(row: Measurement) -> Asked:
    """ring-flash-attention's README: iterations per second of one call over 8 GPUs; one GPU runs its own block only.

    Packed samples ("varlen"): the mean of four packs.  Source: zhuzilin/ring-flash-attention@89962823 benchmark/.
    """
    packed, training = "varlen" in row.notes, row.inputs["pass"].endswith("bwd")
    if row.n_gpus == "1" and not packed:
        return ring_flash_single(row)
    name = row.kernel_or_engine.split()[-1]
    if name == "llama3_flash_attn":
        refuse("ranks hold runs of the packed stream, wherever they cut samples: the busiest is not one of ours")
    layout = Layout() if row.n_gpus == "1" else _RINGS[name]
    calls = [_core(row, layout, causal=row.inputs["causal"] == "True", training=training, pack=pack) for pack in (_PACKS if packed else ((),))]
    return timed(Serial(calls), machine(row), len(calls) / float(row.value))


def burst(row: Measurement) -> Asked:
    """BurstAttention's README over 8 GPUs: pass-KV blocks without a mask (its passing of queries backward is not modelled)."""
    if row.n_gpus == "1":
        return burst_attention(row)
    training = row.inputs.get("pass", "fwd").endswith("bwd")
    work, on = _core(row, Layout(cp=8), causal=False, training=training), machine(row)
    counted = 4.0 * row.number("seq_len") ** 2 * row.number("head_dim") * row.number("heads") * row.number("batch") / 8
    rate = counted * (3.5 if training else 1.0) / (float(row.value) * TERA)
    return timed(work, on, float(row.value) * MS if row.kind == "kernel_time" else rate)


#: YunChang's names of the ring beneath its Ulysses.
_ORDERS = {"basic": "contiguous", "zigzag": "zigzag", "stripe": "striped"}
#: Up to here its rows show the host: 512 tokens take as long as 8,192.
_HOST_TOKENS = 8192


def usp(row: Measurement) -> Asked:
    """YunChang's picture: iterations per second of one forward call over 8 GPUs, Ulysses inside and a ring outside.

    Causal, though the picture does not print it: without the mask its longest rows would exceed the A100's peak.
    """
    if row.number("seq_len") <= _HOST_TOKENS:
        refuse("512 tokens take as long as 8,192: time of the host, which is not modelled here")
    order = _ORDERS[row.kernel_or_engine.partition("ring=")[2].split()[0]]
    u, ring = (int(part.partition("=")[2]) for part in row.parallelism.split(";"))
    work = _core(row, Layout(ulysses=u, cp=ring, order=order), causal=True, training=False)
    return timed(work, machine(row), 1 / float(row.value))


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {
    "ring-flash-attention-readme": ring_flash, "burstattention-readme": burst, "yunchang-usp": usp,
}  # fmt: skip
