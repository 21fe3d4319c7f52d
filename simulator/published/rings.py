"""Attention whose tokens several GPUs share: rings of ring-flash-attention and BurstAttention, Ulysses x ring of USP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from simulator.calibration import Calibration
from simulator.dtypes import C_BF16
from simulator.estimate import Interval
from simulator.hf import load_model
from simulator.kernels.attention import Bidirectional, Causal, Segment
from simulator.layers import Attention, Direction
from simulator.parallel import Layout
from simulator.parallel.scheme import mixing_of
from simulator.published.kernels import MS, TERA, burst_attention, ring_flash_single, timed
from simulator.published.table import Asked, Measurement, machine, refuse
from simulator.work import Serial, Work

#: How the functions of ring-flash-attention order and pass tokens.
_RINGS = {
    "ring_flash_attn": Layout(cp=8, order="contiguous"), "zigzag_ring_flash_attn": Layout(cp=8), "stripe_flash_attn": Layout(cp=8, order="striped"),
    "llama3_flash_attn": Layout(cp=8, passing="gather"),
}  # fmt: skip


def _core(row: Measurement, layout: Layout, *, causal: bool, training: bool) -> Work:
    """One attention call over the ranks of `layout`, forward or both ways."""
    heads, width = int(row.number("heads")), int(row.number("head_dim"))
    layer = Attention(heads * width, heads, int(row.number("kv_heads")), width, mask=Causal() if causal else Bidirectional())
    placed = layout.place(load_model("meta-llama/Meta-Llama-3.1-8B"))
    held = placed.shard(layer, (Segment(row.number("batch"), row.number("seq_len"), 0.0),))
    ways = Direction if training else (Direction.FORWARD,)
    return Serial([mixing_of(placed.work(layer, held, C_BF16, way)) for way in ways])


def _with_flash2(asked: Asked) -> Asked:
    """The same question with the constants of FlashAttention-2 for every attention core."""

    def answer(calibration: Calibration) -> Interval:
        kernels = ("attention", "attention_backward")
        families = {**calibration.families, **{(k, "", "bf16"): calibration.constants((k, "flash2", "bf16")) for k in kernels}}
        return asked.answer(replace(calibration, families=families))

    return replace(asked, answer=answer)


def ring_flash(row: Measurement) -> Asked:
    """ring-flash-attention's README: iterations per second of one call over 8 GPUs; one GPU runs its own block only."""
    if row.n_gpus == "1":
        return ring_flash_single(row)
    if "varlen" in row.notes:
        refuse("packed samples: their lengths are not restated")
    layout = _RINGS[row.kernel_or_engine.split()[-1]]
    work = _core(row, layout, causal=row.inputs["causal"] == "True", training=row.inputs["pass"].endswith("bwd"))
    return _with_flash2(timed(work, machine(row), 1 / float(row.value)))


def burst(row: Measurement) -> Asked:
    """BurstAttention's README over 8 GPUs: pass-KV blocks without a mask (its passing of queries backward is not modelled)."""
    if row.n_gpus == "1":
        return burst_attention(row)
    training = row.inputs.get("pass", "fwd").endswith("bwd")
    work, on = _core(row, Layout(cp=8), causal=False, training=training), machine(row)
    counted = 4.0 * row.number("seq_len") ** 2 * row.number("head_dim") * row.number("heads") * row.number("batch") / 8
    rate = counted * (3.5 if training else 1.0) / (float(row.value) * TERA)
    return _with_flash2(timed(work, on, float(row.value) * MS if row.kind == "kernel_time" else rate))


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
    return _with_flash2(timed(work, machine(row), 1 / float(row.value)))


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {
    "ring-flash-attention-readme": ring_flash, "burstattention-readme": burst, "yunchang-usp": usp,
}  # fmt: skip
