"""Training runs: what a source prints of an optimizer step, as that step's seconds or as the bytes of its fullest GPU.

A rate in tokens/s/GPU and a utilisation of the same run are the same seconds: B S / (rate x GPUs), and B S f / (FLOP/s x GPUs) with f
the FLOPs a token that the source counts.  A row whose run did what `TrainStep` does not do is refused, with what that is.
Scored only; Adam throughout.  Neglected in fp8: scales, and the casts of what is multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from simulator import train_step
from simulator.calibration import Calibration
from simulator.dtypes import BF16, FP32
from simulator.estimate import Interval, estimate
from simulator.hardware import Cluster
from simulator.hf import load_model, with_formats
from simulator.layers import MLP, Attention
from simulator.layers.layer import parameters
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.parallel.sharded_data import ShardedData
from simulator.phases import System, TrainStep
from simulator.published.kernels import MS
from simulator.published.table import Asked, Measurement, machine, refuse, spec
from simulator.training import token_flops

TERA = 1e12


def _run(model: ModelSpec, on: Cluster, layout: Layout, step: TrainStep, seconds: float, *, attention: str = "") -> Asked:
    """The question of a step of measured `seconds`, its attention by the implementation named, else by what the GPU's generation runs;
    refused where it is not a step that we model.
    """
    _placed(model, on, layout, step)
    return Asked(seconds, "s", lambda calibration: estimate(model, on, layout, step, calibration=_running(calibration, attention)).seconds, on)


def _running(calibration: Calibration, attention: str) -> Calibration:
    """The calibration of a machine whose attention is another implementation's."""
    if not attention:
        return calibration
    rest = {family: constants for family, constants in calibration.families.items() if train_step.TRAINED.get(family[0]) != family[1]}
    ran = {(kernel, usual, ""): calibration.constants((kernel, attention, "bf16")) for kernel, usual in train_step.TRAINED.items()}
    return replace(calibration, families={**rest, **ran})


def _placed(model: ModelSpec, on: Cluster, layout: Layout, step: TrainStep) -> None:
    for refusal in [*layout.refusals(model), *train_step.refusals(System(model, layout), step)]:
        refuse(f"a training step: {refusal.split(';')[0]}")
    if layout.gpus != on.gpus:
        refuse(f"a training step: the stated degrees make {layout.gpus:.0f} GPUs, the row states {on.gpus}")


def _batch(row: Measurement) -> Mapping[str, float]:
    """What a row says of its batch: global, micro and ga (gradient accumulation)."""
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", row.batch)}


def _replicas(row: Measurement, gpus: float) -> float:
    """Replicas of the model, of so many GPUs each."""
    if float(row.n_gpus) % gpus:
        refuse(f"a training step: {row.n_gpus} GPUs are no multiple of the stated degrees, {gpus:.0f}")
    return float(row.n_gpus) / gpus


# ---- MosaicML llm-foundry

#: Layers, width and heads.  Source: mosaicml/llm-foundry scripts/train/yamls/pretrain/mpt-*.yaml; the vocabulary there is 50368, an MLP
#: is four times as wide, products and norms have biases and positions are learned.
MPT = {
    "MPT-125m": (12, 768, 12), "MPT-350m": (24, 1024, 16), "MPT-760m": (24, 1536, 12), "MPT-1b": (24, 2048, 16), "MPT-3b": (32, 2560, 20),
    "MPT-7b": (32, 4096, 32), "MPT-13b": (40, 5120, 40), "MPT-30b": (48, 7168, 56), "MPT-70b": (80, 8192, 64),
}  # fmt: skip
_MPT_VOCABULARY = 50368
#: FSDP's strategies as the stages of ZeRO.
_FSDP = {"FULL_SHARD": 3, "SHARD_GRAD_OP": 2}


@cache
def mpt(name: str, positions: int) -> ModelSpec:
    """An MPT of llm-foundry's benchmarks with so many learned positions."""
    layers, width, heads = MPT[name]
    found = load_model(
        {
            "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": width, "n_heads": heads, "n_layers": layers, "expansion_ratio": 4,
            "max_seq_len": positions, "vocab_size": _MPT_VOCABULARY, "learned_pos_emb": True, "attn_config": {"alibi": False},
        }
    )  # fmt: skip
    ((_, (mixer, channels)),) = found.blocks
    assert isinstance(mixer, Attention)
    assert isinstance(channels, MLP)
    biased = replace(mixer, attention_bias=True, output_bias=True, norm_parameters=2), replace(channels, mlp_bias=True, norm_parameters=2)
    return replace(
        found, name=name, blocks=((layers, biased),), embedding=replace(found.embedding, positions=positions),
        head=replace(found.head, norm_parameters=2),
    )  # fmt: skip


def llm_foundry(row: Measurement) -> Asked:
    """MosaicML's MPT tables: FSDP over all GPUs, blocks checkpointed whole where the row says so.

    "DEFAULT" gathers weights in bf16 and reduces gradients in fp32, "PURE" does both in bf16 (Composer's get_mixed_precision); every
    microbatch gathers and reduces.  MFU counts 6 N + 12 L D S a token: N all parameters, positions and the embedding among them, and
    attention in full, of the dense rate of the precision; HFU is not compared.  Attention is FlashAttention 1 in Triton, the default of
    submit_benchmarks.py whenever the tables were written (2023-06 to 2024-01), by a compiler from before Hopper (triton_pre_mlir):
    there it runs as FlashAttention 1 does, by Ampere's instructions.
    """
    sizes, name = _batch(row), row.model
    if name not in MPT:
        refuse(f"model {name}: its layers are not known")
    tokens = row.number("seq_len")
    model, on = mpt(name, int(tokens)), machine(row)
    fp8 = row.dtype == "amp_fp8"
    if row.kind == "train_mfu":
        layers, width, _ = MPT[name]
        counted = 6 * row.number("params") + 12 * layers * width * tokens
        rate = float(row.value) / 100 * float(on.gpu.datasheet_flops_per_s("fp8" if fp8 else "bf16")) / counted
    else:
        rate = float(row.value)
    step = TrainStep(
        tokens, sizes["global"], "full" if row.inputs["act_ckpt"] == "True" else "none", _FSDP[row.inputs["fsdp"]], micro=sizes["micro"],
        gradient=FP32 if row.inputs["mp_mode"] == "DEFAULT" else BF16,
    )
    layout = Layout(dp=row.number("dp"))
    formatted = with_formats(model, "fp8" if fp8 else "bf16", None)
    attention = "triton" if on.gpu.architecture == "ampere" else "flash1"
    return _run(formatted, on, layout, step, sizes["global"] * tokens / (rate * on.gpus), attention=attention)


# ---- NVIDIA Megatron-Bridge and Megatron-LM


def megatron_bridge(row: Measurement) -> Asked:
    """Megatron-Bridge's summaries: AdamW with states shared by the replicas (ZeRO-1), gradients reduced in bf16 beside the backward,
    interleaved where VP is stated, sequence parallelism with tensor parallelism, experts over neighbouring replicas with balanced
    routing; the recipes of Llama 3 and Qwen3 recompute nothing.

    Sources: scripts/performance/configs/llama, qwen.  "Model TFLOP" counts forward and backward once, causal pairs, all but the
    input embedding (70B: 449 GFLOP a token at 8192).  Rows go to experts in the format of their
    products.  FP8 and MXFP8 multiply every linear layer of a block in fp8, attention in bf16.
    """
    if row.model not in _BRIDGED:
        refuse(f"a training step: which modules the recipe of {row.model} recomputes is not stated, or single ones, which is not modelled")
    if "LoRA" in row.table_or_section:
        refuse("a training step: weights that are not trained (LoRA) are not modelled")
    if "SFT" in row.table_or_section:
        refuse("a training step: SFT packs documents whose lengths are not stated")
    if row.dtype == "NVFP4":
        refuse("a training step: which layers an NVFP4 recipe keeps in other formats is not stated")
    if int(row.inputs.get("fsdp") or 0):
        refuse("a training step: its recipe moves the activations of 20 or 40 layers to the host, which is not modelled")
    return _megatron(row, spec(_BRIDGED[row.model]), _batch(row))


_BRIDGED = {
    "LLAMA3_70B": "meta-llama/Meta-Llama-3.1-70B", "LLAMA3.1_405B": "meta-llama/Meta-Llama-3.1-405B", "Qwen3_30B_a3B": "Qwen/Qwen3-30B-A3B",
    "Qwen3_235B_a22B": "Qwen/Qwen3-235B-A22B",
}  # fmt: skip
_LLAMAS = {"LLAMA3-70B": "meta-llama/Meta-Llama-3.1-70B", "LLAMA3-8B": "meta-llama/Meta-Llama-3.1-8B"}


def _megatron(row: Measurement, model: ModelSpec, sizes: Mapping[str, float], *, all_pairs: bool = False) -> Asked:
    """A pre-training step of Megatron on the row's degrees, its FLOPs counted with causal pairs or with all."""
    tensor, pipeline, ring = (row.number(name) for name in ("tp", "pp", "cp"))
    on, tokens = machine(row), row.number("seq_len")
    experts = 1.0 if row.inputs["ep"] == "n/a" else row.number("ep")
    sharing = max(experts / tensor, 1.0)
    layout = Layout(
        tp=tensor, pp=pipeline, cp=ring, sp=tensor, dp=_replicas(row, tensor * pipeline * ring * sharing), ep=experts, dp_attention=sharing
    )
    stated = row.inputs.get("vp", "n/a")
    chunks = 1 if stated == "n/a" else int(stated)
    step = TrainStep(tokens, sizes["global"], schedule="interleaved" if chunks > 1 else "1f1b", chunks=chunks, micro=sizes["micro"])
    rate = float(row.value)
    if row.kind == "train_mfu":
        mixed = sum(count * mixer.num_attention_heads * mixer.head_dim for count, mixer in model.mixers if isinstance(mixer, Attention))
        rate *= TERA / (float(token_flops(model, tokens)) + (6 * (tokens - 1) * mixed if all_pairs else 0))
    formatted = with_formats(model, "bf16" if row.dtype.lower() == "bf16" else "fp8", None)
    return _run(formatted, on, layout, step, sizes["global"] * tokens / (rate * on.gpus))


def megatron_llama_fp8(row: Measurement) -> Asked:
    """Megatron-LM's Llama examples in fp8: as `megatron_bridge`, but its FLOPs count attention in full (70B: 481 GFLOP a token).

    Source: examples/llama/train_llama3_8b_h100_fp8.sh (distributed optimizer, gradients reduced in bf16, all overlapped, no recomputation).
    """
    return _megatron(row, spec(_LLAMAS[row.model]), _batch(row), all_pairs=True)


# ---- SimuMax's real runs


def simumax(row: Measurement) -> Asked:
    """SimuMax's runs of Megatron-LM on a B200 node: models cut to a few layers, one sequence a microbatch, nothing recomputed, ZeRO-1
    with gradients in fp32, reduced after the backward (no overlap); context parallelism by all-to-all of heads (Ulysses), experts
    over neighbouring replicas, as many rows to each (capacity factor 1).

    Memory is the most that PyTorch allocated on any rank, in GiB.  Sources: configs/strategy, simu_tools/megatron_scripts.
    """
    found = re.match(r"(\w+) truncated to (\d+) layers", row.model)
    if found is None or found[1] not in _CUT:
        refuse(f"model {row.model} is not in the catalog")
    model, on = cut(found[1], int(found[2])), machine(row)
    tensor, experts = row.number("tp"), row.number("ep")
    layout = Layout(
        tp=tensor, sp=tensor, pp=row.number("pp"), dp=row.number("dp") / experts, ulysses=row.number("cp"), ep=experts, dp_attention=experts
    )
    step = TrainStep(row.number("seq_len"), _batch(row)["gbs"], gradient=FP32, overlaps=False)
    if row.kind == "train_step":
        return _run(model, on, layout, step, float(row.value) * MS)
    _placed(model, on, layout, step)
    held = float(train_step.footprint(System(model, layout), step).total)
    return Asked(float(row.value) * 2.0**30, "B", lambda _: Interval(held, held, held, "analytic"), on)


_CUT = {
    "llama3_70b": "meta-llama/Meta-Llama-3.1-70B", "llama3_405b": "meta-llama/Meta-Llama-3.1-405B", "deepseekv2": "deepseek-ai/DeepSeek-V2",
    "deepseekv3": "deepseek-ai/DeepSeek-V3",
}  # fmt: skip


@cache
def cut(name: str, layers: int) -> ModelSpec:
    """A model of so many layers, of DeepSeek's the first of them dense, in bf16; SimuMax's 405B has 16 key-value heads."""
    whole = with_formats(spec(_CUT[name]), "bf16", None)
    if len(whole.blocks) > 1:
        (_, dense), (_, sparse) = whole.blocks
        return replace(whole, blocks=((1, dense), (layers - 1, sparse)), extra=())
    ((_, (mixer, channels)),) = whole.blocks
    assert isinstance(mixer, Attention)
    heads = 16 if name == "llama3_405b" else mixer.num_key_value_heads
    return replace(whole, blocks=((layers, (replace(mixer, num_key_value_heads=heads), channels)),))


# ---- InternEvo

_INTERN_LAYERS, _INTERN_WIDTH, _INTERN_VOCABULARY = 32, 4096, 103168


@cache
def internlm() -> ModelSpec:
    """InternLM-7B.  Source: InternLM/InternEvo configs/7B_sft.py; an MLP of 8/3 of the width in multiples of 256, biases in attention."""
    found = load_model(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _INTERN_WIDTH, "num_hidden_layers": _INTERN_LAYERS,
            "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": _INTERN_VOCABULARY,
            "attention_bias": True, "tie_word_embeddings": False, "max_position_embeddings": 2048,
        }
    )  # fmt: skip
    ((_, (mixer, channels)),) = found.blocks
    assert isinstance(mixer, Attention)
    return replace(found, name="InternLM-7B", blocks=((_INTERN_LAYERS, (replace(mixer, output_bias=True), channels)),))


def internevo(row: Measurement) -> Asked:
    """InternEvo's 7B on A100 nodes that 4 x 100 Gb/s join: optimizer states shared by all replicas (zero1 = -1) or by neighbours of
    them, messages beside the layers; tensor parallelism without sequence parallelism; FlashAttention 1.0.5 (doc/en/install.md of 2023-07,
    when the tables were written).

    TFLOPS count k L (24 D^2 + 4 S D) + 6 D V a token (Megatron, SC21), k = 4 where blocks are recomputed and 3 elsewhere.
    """
    if row.kind == "train_memory":
        refuse("a training step: whether allocated, reserved or the driver's memory is printed is not stated")
    sizes, tokens, tensor = _batch(row), row.number("seq_len"), row.number("tp")
    again = row.inputs.get("act_ckpt", row.inputs.get("checkpoint", "")).upper() == "TRUE"
    replicas = _replicas(row, tensor)
    batch = sizes["micro"] * sizes["ga"] * replicas
    sharers = float(re.match(r"-?\d+", row.inputs["zero1"])[0])  # type: ignore[index]
    rate = float(row.value)
    if row.kind == "train_mfu":
        layers, width = _INTERN_LAYERS, _INTERN_WIDTH
        counted = (4 if again else 3) * layers * (24 * width**2 + 4 * tokens * width) + 6 * width * _INTERN_VOCABULARY
        rate = rate * TERA / counted
    step = TrainStep(
        tokens, batch, "full" if again else "none", micro=sizes["micro"], sharers=None if sharers < 0 else min(sharers, replicas)
    )
    on = _joined(machine(row), 4 * 12.5e9)
    return _run(internlm(), on, Layout(tp=tensor, dp=replicas), step, batch * tokens / (rate * on.gpus), attention="flash1")


def _joined(on: Cluster, node_bytes_per_s: float) -> Cluster:
    """The machine with so much network a node."""
    *inner, network = on.tiers
    return replace(on, tiers=(*inner, replace(network, bytes_per_s=node_bytes_per_s / on.gpus_per_node)))


# ---- what is refused whole


def _refused(reason: str) -> Callable[[Measurement], Asked]:
    def asked(row: Measurement) -> Asked:  # noqa: ARG001 (every row has the same answer)
        refuse(f"a training step: {reason}")

    return asked


def torchtitan(row: Measurement) -> Asked:
    """Torchtitan's reports: selective checkpointing of every other product, and a board of its own (H100 96 GB at 500 W)."""
    if "full" not in row.inputs["activation_checkpointing"]:
        refuse("a training step: checkpointing of every other matrix product (selective) is not modelled")
    if row.kind == "train_memory":
        refuse("a training step: activations kept for fp8 products are not modelled")
    machine(row)
    refuse("a training step: tensor parallelism in step with its products (async TP) is not modelled")


def long_sequences(row: Measurement) -> Asked:
    """NeMo's long-sequence tables."""
    if row.kind == "ratio" or "not stated" in row.parallelism:
        refuse("a training step: the parallel mapping without context parallelism is not stated")
    refuse("a training step: what is recomputed is not stated")


def recomputation_paper(row: Measurement) -> Asked:
    """Korthikanti et al. 2022, whose attention is not fused; weights, gradients in fp32 and Adam of a GPU's layers (18 bytes a parameter),
    without embedding and head, by its formula for GPT's layers with their biases.
    """
    if row.other_inputs != "weights+grads+Adam":
        refuse("a training step: attention that keeps its scores and dropout masks (not fused) is not modelled in training")
    width, heads, layers = (int(found) for found in re.findall(r"(?:hidden|heads|layers)=(\d+)", row.model))
    mixer = Attention(width, heads, heads, width // heads, attention_bias=True, output_bias=True, norm_parameters=2)
    block = (mixer, MLP(width, 4 * width, mlp_bias=True, norm_parameters=2))
    count = layers * sum(float(parameters(layer, layer.whole(()))) for layer in block) / (row.number("tp") * row.number("pp"))
    held = float(ShardedData(0, 1, gradient=FP32).footprint(count).total)
    return Asked(float(row.value) * 2.0**30, "B", lambda _: Interval(held, held, held, "analytic"), machine(row))


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {
    "llm-foundry": llm_foundry, "megatron-bridge": megatron_bridge, "megatron-lm-llama-fp8": megatron_llama_fp8, "simumax-b200": simumax,
    "internevo": internevo, "torchtitan-2024-12": torchtitan, "torchtitan-async-tp": torchtitan, "nemo-long-sequence": long_sequences,
    "activation-recomputation-paper": recomputation_paper,
    "arctic-alst": _refused("optimizer states and checkpoints kept on the host, and MLPs in tiles, are not modelled"),
    "easycontext-readme": _refused("states kept on the host are not modelled"),
    "deepspeed-fpdt": _refused("a lower bound; attention in chunks with keys and values on the host is not modelled"),
    "usp-paper": _refused("how the 16 ranks split into Ulysses and ring, recomputation and what MFU counts are not stated"),
    "megatron-lm-readme": _refused("the parallel degrees are not in the text"),
    "meta-model-card": _refused("GPU-hours of whole runs: batch, layout and lengths of the stages are not stated"),
}  # fmt: skip
__all__ = ["MPT", "SOURCES", "cut", "internlm", "mpt"]
