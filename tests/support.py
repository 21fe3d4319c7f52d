"""What several tests share: the models that stand for the catalog, the layouts they allow, and the leaves of a tree."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from simulator.hardware import Cluster, cluster
from simulator.hf import catalog, load_model
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.work import Later, Leaf, Message, Op, Overlap, Pipeline, Repeat, Select, Serial, Work

#: One of each architecture: dense GQA, MHA, window, alternating windows with sinks, chunks, MLA, MoE, QK-norm, biases.
MAIN = (
    "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-70B",
    "meta-llama/Meta-Llama-3.1-405B",
    "mistralai/Mistral-7B-v0.1",
    "openai/gpt-oss-120b",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "deepseek-ai/DeepSeek-V3",
    "moonshotai/Kimi-K2-Instruct",
    "Qwen/Qwen3-235B-A22B",
    "Qwen/Qwen2.5-14B-Instruct-1M",
)
#: One of each stack that mixes otherwise: indexers, compression, delta rules, Mamba, lightning, KDA, searched blocks.
HYBRID = (
    "deepseek-ai/DeepSeek-V3.2",
    "deepseek-ai/DeepSeek-V4-Flash",
    "zai-org/GLM-5.2",
    "Qwen/Qwen3-Next-80B-A3B",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "MiniMaxAI/MiniMax-M1",
    "ai21labs/Jamba-v0.1",
    "microsoft/Samba-1.3B",
    "nvidia/Nemotron-3-Nano",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
)
EVERY = tuple(catalog())


@functools.cache
def model(name: str) -> ModelSpec:
    return load_model(name)


@functools.cache
def machine(gpu: str = "h200", gpus: int = 1) -> Cluster:
    return cluster(gpu, gpus)


def allows(spec: ModelSpec, layout: Layout) -> bool:
    return not list(layout.refusals(spec))


@functools.cache
def legal(name: str, most: int = 64) -> tuple[Layout, ...]:
    """Every layout of powers of two that the model allows on at most `most` GPUs."""
    degrees = (1, 2, 4, 8, 16)
    found = []
    for tp, pp, dp, shares in itertools.product(degrees, (1, 2, 3, 4), (1, 2), degrees):
        if tp * pp * dp * shares > most:
            continue
        for ep in sorted({1, tp * shares}):
            for dcp in (1, 2, 4):
                layout = Layout(tp=tp, pp=pp, dp=dp, ep=ep, dcp=dcp, dp_attention=shares)
                if allows(model(name), layout):
                    found.append(layout)
    return tuple(found)


def eight(name: str) -> Layout:
    """The model over the 8 GPUs of a node: tensor-parallel, its experts whole where their scale blocks do not split."""
    return next(x for x in (Layout(tp=8), Layout(tp=8, ep=8)) if allows(model(name), x))


def leaves(work: Work) -> list[tuple[float, Leaf]]:
    """Every leaf of a tree without runs, with how often it runs."""
    if isinstance(work, (Op, Message)):
        return [(1.0, work)]
    if isinstance(work, (Serial, Overlap)):
        return [leaf for part in work.parts for leaf in leaves(part)]
    if isinstance(work, Repeat):
        return [(times * float(np.sum(work.count)), leaf) for times, leaf in leaves(work.work)]
    if isinstance(work, Select):
        return leaves(work.a if np.all(work.mask) else work.b)
    if isinstance(work, Later):
        return leaves(work.make())
    assert isinstance(work, Pipeline)
    return [(times * float(np.sum(flow.count) * work.rounds), leaf) for flow in work.flows for stage in flow.stages for times, leaf in leaves(stage)]


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-300)


__all__ = ["EVERY", "HYBRID", "MAIN", "allows", "eight", "leaves", "legal", "machine", "model", "relative"]
