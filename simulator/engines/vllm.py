"""vLLM: what it allocates, what it prints, how it is launched.

The rules and their sources stand in data/engines/vllm.toml; the version they were read in is `Vllm.version`.
KV bytes per GPU = total x gpu_memory_utilization - weights - peak activations of the profile run - CUDA graphs.
The profile run is one step of max_num_batched_tokens tokens without attention, plus logits of max_num_seqs rows: it
does not grow with the context.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np

from simulator.data import data_path
from simulator.dtypes import BF16
from simulator.engines.allocation import Allocation, refuse
from simulator.engines.paging import Demand, check_kept
from simulator.engines.prefill_context import vllm_flag, vllm_refuses, vllm_way
from simulator.engines.vllm_pages import Group, Table, groups, pool_bytes, prefix_tokens, tables, weighed_blocks
from simulator.engines.vllm_releases import Rules, rules_of
from simulator.footprint import Footprint
from simulator.hardware import Cluster, Gpu
from simulator.layers import Attention, LatentAttention, MoE
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Decode, Host, Mixed, Phase, Prefill, System
from simulator.units import Bytes, Count, Num, Tokens, ceil, floor, maximum, where
from simulator.work import Op


@cache
def _facts() -> dict[str, Any]:
    return tomllib.loads(data_path("engines", "vllm.toml").read_text("utf-8"))


def _fact(table: str, name: str) -> Any:
    return _facts()[table][name]["value"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one engine (one data-parallel replica) holds.

    `blocks` are pool blocks of `block_bytes` on the tightest GPU; `per_sequence_bytes` what one request of
    `max_model_len` tokens takes of them per GPU.  `printed_concurrency` and `printed_tokens` are what an earlier release prints, where it
    does not count by the blocks of a request.
    """

    footprint: Footprint
    usable_bytes: Bytes
    available_bytes: Bytes
    block_bytes: Bytes
    blocks: Count
    blocks_per_sequence: Count
    max_model_len: int
    replicas: Count
    prefix_tokens: int = 1
    printed_concurrency: Num | None = None
    printed_tokens: Num | None = None

    @property
    def per_sequence_bytes(self) -> Bytes:
        """Bytes per GPU of one request."""
        return self.blocks_per_sequence * self.block_bytes

    @property
    def concurrency(self) -> Num:
        """Blocks over blocks per request, of one engine: VLLM's "Maximum concurrency"."""
        return self.blocks / self.blocks_per_sequence

    @property
    def whole_sequences(self) -> Count:
        """Requests that fit together over all replicas; one pool block is never handed out."""
        return floor(maximum(self.blocks - 1, 0.0) / self.blocks_per_sequence) * self.replicas

    @property
    def tokens(self) -> int:
        """VLLM's "GPU KV cache size" (concurrency x max_model_len, not a rate)."""
        return int(self._printed * self.max_model_len if self.printed_tokens is None else self.printed_tokens)

    @property
    def _printed(self) -> Num:
        return self.concurrency if self.printed_concurrency is None else self.printed_concurrency

    def at(self, index: int) -> Capacity:
        """One layout of an array of them."""

        def pick(value: Any) -> Any:
            return float(value[index]) if isinstance(value, np.ndarray) else value

        held = Footprint(*(pick(getattr(self.footprint, f.name)) for f in fields(Footprint)))
        numbers = {f.name: pick(getattr(self, f.name)) for f in fields(self) if f.name != "footprint"}
        return Capacity(footprint=held, **numbers)

    @property
    def log_lines(self) -> tuple[str, str]:
        """The two statements vLLM prints when it starts (on one line since 0.28)."""
        return (
            f"GPU KV cache size: {self.tokens:,} tokens",
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {self._printed:.2f}x",
        )


@dataclass(frozen=True)
class Vllm:
    """vLLM with its settings; None takes vLLM's own default for the GPU, and the newest release.

    `release` is one whose log is read: how it counts blocks; its other defaults are the newest's.
    """

    memory_fraction: float | None = None
    block_size: int | None = None
    chunk: int | None = None
    max_num_seqs: int | None = None
    prefix_caching: bool = True
    release: str | None = None

    name = "vllm"
    title = "vLLM"

    @property
    def version(self) -> str:
        """The version whose rules these are."""
        return self.release or str(_facts()["version"])

    @property
    def rules(self) -> Rules:
        """How the release counts."""
        return rules_of(_facts(), self.release)

    @property
    def fraction(self) -> float:
        """gpu_memory_utilization."""
        return self.memory_fraction if self.memory_fraction is not None else float(_fact("defaults", "gpu_memory_utilization"))

    def batch_class(self, gpu: Gpu) -> dict[str, Any]:
        """The default batch sizes of `vllm serve` on this GPU."""
        for entry in _facts()["defaults"]["batch_classes"]:
            if float(gpu.capacity_bytes) >= entry["least_gib"] * 2**30 and entry.get("except", "-") not in gpu.name:
                return dict(entry)
        message = "the last class of batch sizes takes every GPU"
        raise AssertionError(message)

    def step_tokens(self, gpu: Gpu) -> int:
        """max_num_batched_tokens."""
        return self.chunk or int(self.batch_class(gpu)["max_num_batched_tokens"])

    def sequences(self, gpu: Gpu) -> int:
        """max_num_seqs, never above max_num_batched_tokens."""
        return min(self.max_num_seqs or int(self.batch_class(gpu)["max_num_seqs"]), self.step_tokens(gpu))

    def block_tokens(self, model: ModelSpec, gpu: Gpu) -> int:
        """block_size, or the smallest the attention backend of the cache's format takes."""
        if self.block_size:
            return self.block_size
        latent = any(isinstance(layer, LatentAttention) for _, layer in model.mixers)
        # MLA: FlashMLA (64) for 8-bit caches on Hopper, FlashInfer MLA (32) on Blackwell, FlashAttention MLA (16) else
        if latent and gpu.architecture == "hopper" and model.cache.bits <= 8:  # noqa: PLR2004
            return 64
        if latent and gpu.architecture == "blackwell":
            return 32
        return int(_fact("defaults", "block_size"))

    # ---- host

    def host(self, phase: Phase) -> Host:
        """Host work of a step: scheduling, plus one launch per kernel unless a CUDA graph replays them all."""
        step, launch, replay = (float(_fact("host", n)) for n in ("step_s", "launch_s", "graph_launch_s"))
        largest = float(_fact("host", "largest_graph_tokens"))

        def work(launches: Count, tokens: Tokens) -> Op:
            replays = isinstance(phase, Decode)
            seconds = where(tokens <= largest, step + replay, step + launches * launch) if replays else step + launches * launch
            return Op("host step", "host", "vllm", "", shape={"seconds": seconds}, launches=0.0)

        return work

    # ---- capacity

    def footprint(self, model: ModelSpec, layout: Layout, cluster: Cluster, *, sequences: Num = 0.0, context: Num = 1.0) -> Footprint:
        """What the profile run leaves resident on the tightest GPU, and the caches of `sequences` (by architecture)."""
        system, gpu = System(model, layout), cluster.gpu
        tokens = float(self.step_tokens(gpu))
        # every rank of prefill context parallelism profiles a whole step
        held = system.footprint(sequences=sequences, context=context, step_tokens=tokens * layout.cp)
        latent = [(n, layer) for n, layer in model.counted if isinstance(layer, LatentAttention)]
        weights: Bytes = held.weights
        workspace: Bytes = 0.0
        if latent:
            n, layer = latent[0]
            heads = layer.num_attention_heads / layout.tp
            expanded = layer.qk_nope_head_dim + layer.v_head_dim
            expansion = float(_fact("memory", "latent_workspace_tokens")) * heads * expanded * BF16.bytes
            # the profile run holds the expansion beside the layer's queries and the residual stream
            beside = tokens * (2 * model.hidden_size + heads * layer.qk_head_dim) * BF16.bytes
            workspace = maximum(expansion + beside - held.activations, 0.0)
            if layer.weight.bits < BF16.bits:
                # absorbed copies of W_UK and W_UV are kept in bf16 beside the quantised projection
                weights = weights + n / layout.pp * layer.kv_lora_rank * heads * expanded * BF16.bytes
        logits = self.sequences(gpu) * model.vocab_size * float(_fact("memory", "logits_bytes_per_element"))
        engine = (0.0 if _is_dense(model) else float(_fact("memory", "graph_bytes"))) + float(_fact("memory", "other_bytes"))
        return Footprint(
            weights=weights, cache=held.cache, activations=maximum(held.activations, logits), workspace=workspace, engine=engine
        )

    def groups(self, model: ModelSpec) -> list[Group]:
        """Caches that share block tables."""
        return groups(model)

    def tables(self, model: ModelSpec, layout: Layout, gpu: Gpu) -> list[Table]:
        """Every group with its block, its pages and the blocks a request takes of it."""
        check_kept(model)
        copies = self.rules.state_copies if self.prefix_caching else int(_fact("memory", "state_copies_uncached"))
        return tables(
            model, layout, block=self.block_tokens(model, gpu), in_flight=self._in_flight(layout, gpu), state_copies=copies,
            v4_block=self.rules.v4_block,
        )  # fmt: skip

    def blocks_per_sequence(self, model: ModelSpec, layout: Layout, gpu: Gpu, tokens: Tokens) -> Count:
        """Pool blocks one request of `tokens` takes: every group its own."""
        return self._blocks(self.tables(model, layout, gpu))(tokens)

    @staticmethod
    def _blocks(found: list[Table]) -> Callable[[Tokens], Count]:
        def count(tokens: Tokens) -> Count:
            total: Count = 0.0
            for table in found:
                total = total + table.count(tokens)
            return total

        return count

    def _in_flight(self, layout: Layout, gpu: Gpu) -> Tokens:
        """Tokens scheduled but not yet computed: asynchronous scheduling keeps pp + 1 batches."""
        return (layout.pp + 1.0 if self.rules.in_flight == "all" else 1.0) * self.step_tokens(gpu)

    def capacity(
        self, model: ModelSpec, layout: Layout, cluster: Cluster, max_model_len: int, *, available_bytes: Bytes | None = None
    ) -> Capacity:
        """What vLLM has left for the cache (or `available_bytes`, as its log says), and what it makes of it; for one layout or an array of them."""
        gpu = cluster.gpu
        held = self.footprint(model, layout, cluster)
        usable = float(gpu.usable_bytes) * self.fraction
        available = usable - held.total if available_bytes is None else available_bytes
        found = self.tables(model, layout, gpu)
        pool = pool_bytes(model, layout, found, self.rules.v4_block)
        blocks = maximum(floor(available / pool), 0.0)
        concurrency = tokens = None
        if self.rules.weighed == "bytes":
            concurrency = blocks / weighed_blocks(model, found, float(max_model_len))
        if self.rules.printed == "groups":
            tokens = floor(blocks / len(found)) * min(float(np.max(table.block)) for table in found) * layout.dcp
        return Capacity(
            footprint=held, usable_bytes=usable, available_bytes=available, block_bytes=pool,
            blocks=blocks, blocks_per_sequence=self._blocks(found)(float(max_model_len)), max_model_len=max_model_len,
            replicas=layout.dp * layout.dp_attention * 1.0, prefix_tokens=prefix_tokens(found, layout.dcp),
            printed_concurrency=concurrency, printed_tokens=tokens,
        )  # fmt: skip

    def allocation(self, model: ModelSpec, layout: Layout, cluster: Cluster, max_model_len: int) -> Allocation:
        """`capacity` in the form every engine answers in."""
        if model.cache.name not in _facts()["cache_dtypes"]:
            known = ", ".join(_facts()["cache_dtypes"])
            raise refuse(self.title, self.version, f"no {model.cache.name} cache; it offers {known}")
        held = self.capacity(model, layout, cluster, max_model_len)
        found = self.tables(model, layout, cluster.gpu)
        return Allocation(
            engine=self.name, title=self.title, version=self.version, available_bytes=float(held.available_bytes),
            per_sequence_bytes=float(held.per_sequence_bytes), max_concurrency=float(held.concurrency), capacity_tokens=held.tokens,
            replicas=int(held.replicas), prefix_tokens=held.prefix_tokens, log=held.log_lines,
            note=_told(found, float(held.block_bytes), self._in_flight(layout, cluster.gpu)),
        )  # fmt: skip

    def longest(self, model: ModelSpec, layout: Layout, cluster: Cluster, capacity: Capacity, sequences: int = 1) -> Tokens:
        """The longest context at which `sequences` requests fit together, by bisection; 0 where not even one token."""
        each, blocks = ceil(sequences / capacity.replicas), self._blocks(self.tables(model, layout, cluster.gpu))
        low, high = 0.0 * capacity.blocks, 2.0**34 + 0.0 * capacity.blocks
        for _ in range(35):
            middle = floor((low + high + 1) / 2)
            fits = each * blocks(middle) <= capacity.blocks - 1
            low, high = where(fits, middle, low), where(fits, high, middle - 1)
        return low

    # ---- launching

    def arranged(self, layout: Layout) -> Layout:
        """The layout with its ranks of context parallelism doing what vLLM's do."""
        return replace(layout, **vllm_way())  # type: ignore[arg-type]

    def splits_prompts(self, model: ModelSpec) -> bool:
        """Whether it offers context parallelism of prefill for this model."""
        return vllm_refuses(model) is None

    def warnings(self, model: ModelSpec) -> list[str]:
        """What it does not offer of a model."""
        offered = _facts()["cache_dtypes"]
        if model.cache.name in offered:
            return []
        told = f"vLLM {self.version} offers no {model.cache.name} cache (only {', '.join(offered)})"
        return [f"{told}: its rows are counted in vLLM's blocks, there is no command"]

    def refusals(self, model: ModelSpec, layout: Layout, gpus_per_node: int = 8) -> Iterator[str]:
        """What vLLM refuses beyond the schemes' own rules."""
        tp, dcp, shares = int(layout.tp), int(layout.dcp), int(layout.dp_attention)
        rank = tp * int(layout.pp)
        if shares > 1 and shares * rank > gpus_per_node and (gpus_per_node % rank or shares * rank % gpus_per_node):
            yield (
                f"--dp-attention {shares}: vLLM deals whole data-parallel ranks of tp x pp = {rank} GPUs out evenly to nodes of "
                f"{gpus_per_node}; make them fill every node"
            )
        yield from self._context_refusals(model, layout)
        if model.model_type == "gpt_oss" and tp > 8:  # noqa: PLR2004
            yield f"--tp {tp}: vLLM splits gpt-oss's 8 key-value heads at most 8 ways"
        for layer in model.layers:
            if isinstance(layer, Attention) and dcp > 1:
                group = layer.num_attention_heads // layer.num_key_value_heads
                if tp <= layer.num_key_value_heads or group % dcp:
                    yield f"--dcp {dcp}: vLLM wants tp above {layer.num_key_value_heads} and dcp to divide {group} queries per head"
                    return

    def _context_refusals(self, model: ModelSpec, layout: Layout) -> Iterator[str]:
        """What it refuses of context parallelism: models, ways, and combinations that are not counted here."""
        cp, here = int(layout.cp), f"vLLM {self.version}"
        if layout.ulysses > 1:
            yield f"--ulysses {int(layout.ulysses)}: {here} does not exchange heads for tokens; use --tp, or --cp where the model has latent attention"
        if layout.helix > 1:
            yield f"--helix {int(layout.helix)}: {here} does not repeat queries over ranks that share a cache; use --dcp, which gathers them"
        if cp == 1:
            return
        refused = vllm_refuses(model)
        if refused:
            yield f"--cp {cp}: {here} splits a prompt's tokens {refused}; use --tp or --pp, and longctx compare-cp to see what rings would take"
            return
        for name, told in vllm_way().items():
            if getattr(layout, name) != told:
                yield f"--cp-{name} {getattr(layout, name)}: {here} knows one way, {told}; use --cp-{name} {told} or leave it out"
        if layout.dp_attention > 1:
            yield f"--dp-attention {int(layout.dp_attention)}: not counted together with --cp {cp}; use one of them"
        spread = int(layout.tp) * cp
        if any(isinstance(layer, MoE) for layer in model.layers) and layout.ep != spread:
            yield f"--cp {cp}: {here} cuts every expert's width over tp x cp ranks then, which is not counted here; add --ep {spread}"

    def reach_override(self, model: ModelSpec, context: int) -> str | None:
        """The `--hf-overrides` that lets vLLM go beyond what the config declares; None within it.

        YaRN is stretched, or put on a model without scaling; Llama 3's own scaling has no knob but the declared length.
        """
        declared = model.reach.declared_tokens
        if declared is None or context <= declared:
            return None
        rope = {k: v for k, v in model.reach.rope.items() if k != "dual_chunk_attention_config"}
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        original = rope.get("original_max_position_embeddings")
        if kind == "yarn" and isinstance(original, int):
            rope.pop("type", None)
            scaled = {**rope, "rope_type": "yarn", "factor": -(-context // original)}
            return json.dumps({"rope_parameters": scaled})
        if not kind and "rope_theta" in rope and context > 1.25 * declared:
            factor = -(-context * 100 // declared) / 100
            scaled = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": declared, "rope_theta": rope["rope_theta"]}
            return json.dumps({"rope_parameters": scaled})
        return json.dumps({"max_position_embeddings": context})

    def command(self, model: ModelSpec, layout: Layout, cluster: Cluster, *, context: int, concurrency: int) -> tuple[str | None, list[str]]:
        """A `vllm serve` line, and what one must know beside it."""
        notes: list[str] = []
        served = model.name
        if "dual_chunk_attention_config" in model.reach.rope:
            served = f"./{model.name.split('/')[-1]}"
            notes.append(
                "vLLM removed dual chunk attention (0.11): serve a local copy of the model whose config.json has no "
                "dual_chunk_attention_config; beyond its training length quality is then not the published one"
            )
        if cluster.gpu.vendor not in _facts()["vendors"]:
            notes.append(f"on {cluster.gpu.vendor} accelerators vLLM runs through a plugin that was not read here: its flags and its memory may differ")
        flags: list[tuple[str, Any]] = [("tensor-parallel-size", int(layout.tp))]
        if layout.pp > 1:
            flags.append(("pipeline-parallel-size", int(layout.pp)))
        if layout.cp > 1:
            flags.append((vllm_flag(), int(layout.cp)))
            if any("text model only" in told for told in model.warnings):
                flags.append(("language-model-only", None))
        shares = int(layout.dp_attention)
        nodes = -(-int(layout.gpus / layout.dp) // cluster.gpus_per_node)
        if shares > 1:
            flags.append(("data-parallel-size", shares))
        if layout.ep > 1:
            flags.append(("enable-expert-parallel", None))
        if layout.dcp > 1:
            flags.append(("decode-context-parallel-size", int(layout.dcp)))
        flags.append(("max-model-len", context))
        override = self.reach_override(model, context)
        if override:
            flags.append(("hf-overrides", override))
        if model.cache != model.checkpoint_cache or model.cache.bits < BF16.bits:
            flags.append(("kv-cache-dtype", _facts()["cache_dtypes"].get(model.cache.name, model.cache.name)))
        if model.cache.name not in _facts()["cache_dtypes"]:
            offered = ", ".join(_facts()["cache_dtypes"])
            return None, [f"no command: vLLM {self.version} has no {model.cache.name} cache; it offers {offered}"]
        if self.block_size:
            flags.append(("block-size", self.block_size))
        flags += [("gpu-memory-utilization", self.fraction), ("max-num-batched-tokens", self.step_tokens(cluster.gpu))]
        flags.append(("max-num-seqs", max(self.sequences(cluster.gpu), 1)))
        others = "the second node" if nodes == 2 else f"node r = 1..{nodes - 1}"  # noqa: PLR2004
        if nodes > 1 and shares > 1:
            local = shares // nodes
            flags += [("data-parallel-size-local", local), ("data-parallel-address", "$HEAD_IP"), ("data-parallel-rpc-port", 13345)]
            rank = f"{local}" if nodes == 2 else f"$((r * {local}))"  # noqa: PLR2004
            notes.append(f"on {others} add: --headless --data-parallel-start-rank {rank}")
        elif nodes > 1:
            flags += [("nnodes", nodes), ("node-rank", 0), ("master-addr", "$HEAD_IP")]
            notes.append(f"on {others}: the same with --node-rank {'1' if nodes == 2 else 'r'} --headless")  # noqa: PLR2004
        if layout.dp > 1:
            own = int(layout.gpus / layout.dp)
            notes.append(f"run {int(layout.dp)} such servers, each on its own {own} GPUs, behind a load balancer".replace(" 1 GPUs", " GPU"))
        if concurrency > self.sequences(cluster.gpu) * shares * int(layout.dp):
            notes.append(f"--max-num-seqs must be raised for {concurrency} concurrent requests")
        words = [f"--{name}" if value is None else f"--{name} {value if str(value).startswith('$') else shlex.quote(str(value))}" for name, value in flags]
        return " ".join(["vllm serve", shlex.quote(served), *words]), notes


def _told(found: list[Table], pool: float, in_flight: Tokens) -> str:
    """What the pages are, for people."""
    sizes = dict.fromkeys(f"{float(table.block):,.0f}" for table in found)
    told = f"blocks of {', '.join(sizes)} tokens, {pool / 2**20:.2f} MiB, {len(found)} group{'s' if len(found) > 1 else ''}"
    if any(table.group.demand in (Demand.WINDOW, Demand.CHUNK, Demand.RING) for table in found):
        told += f"; windows also hold the {float(in_flight):,.0f} tokens in flight"
    copies = {int(float(table.count(2.0**20))) for table in found if table.group.demand is Demand.STATE}
    if copies:
        told += f"; a state takes {copies.pop()} whole block{'s' if copies != {1} else ''} per group"
    return told


def _is_dense(model: ModelSpec) -> bool:
    """Dense models: no published log shows memory reserved for their CUDA graphs."""
    return not any(isinstance(layer, MoE) for layer in model.layers)


__all__ = ["Capacity", "Group", "Mixed", "Prefill", "Vllm"]
