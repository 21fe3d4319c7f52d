"""Serving: first token, next token and throughput of whole models.  Scored only, whatever the error.

Every engine's host work is taken as vLLM's, the one whose figures are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from simulator.calibration import Calibration
from simulator.dtypes import weight_format
from simulator.engines import Vllm
from simulator.estimate import Interval, estimate
from simulator.hardware import Cluster
from simulator.hf import with_formats
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Decode, Phase, Prefill
from simulator.published.caches import cache_size
from simulator.published.kernels import MS
from simulator.published.table import Asked, Measurement, machine, refuse, spec


def _placed(model: ModelSpec, layout: Layout, on: Cluster) -> None:
    """Refuse what the model forbids or the machine does not hold."""
    for refusal in layout.refusals(model):
        refuse(f"layout refused: {refusal.split(';')[0]}")
    if layout.gpus > on.gpus:
        refuse(f"the layout needs {layout.gpus:.0f} GPUs, the row states {on.gpus}")


def _seconds(model: ModelSpec, on: Cluster, layout: Layout, phase: Phase, calibration: Calibration) -> Interval:
    return estimate(model, on, layout, phase, engine=Vllm(), calibration=calibration).seconds


def _phase(model: ModelSpec, on: Cluster, layout: Layout, phase: Phase, seconds: float) -> Asked:
    _placed(model, layout, on)
    return Asked(seconds, "s", lambda calibration: _seconds(model, on, layout, phase, calibration), on)


def minference(row: Measurement) -> Asked:
    """MInference's README: seconds of a whole prefill of one prompt on one A100, Hugging Face with FlashAttention-2.
    The sparse methods are others' kernels; beyond 700K the cache goes to the host.
    """
    if "dense" not in row.kernel_or_engine:
        refuse(f"{row.kernel_or_engine.removeprefix('HF + ')}: not modelled")
    return _phase(spec(row.model), machine(row), Layout(), Prefill(row.number("seq_len")), float(row.value))


def tensorrt_2023(row: Measurement) -> Asked:
    """TensorRT-LLM's first table: ms to the first token of one prompt; peak output tokens/s per GPU at a stated batch.

    Throughput of a full batch b in steady state: b prefills and O steps make b O tokens, so a token costs
    (b prefill(I) + O decode(b, I + O / 2)) / (b O).
    """
    on, layout = machine(row), Layout(tp=row.number("tp"))
    model = with_formats(spec(row.model), "fp8" if on.gpu.supports("fp8") and row.dtype == "fp8" else None, None)
    if row.kind == "prefill_ttft":
        return _phase(model, on, layout, Prefill(row.number("seq_len"), row.number("batch")), float(row.value) * MS)
    prompt, output, batch = row.number("isl"), row.number("osl"), row.number("batch")
    _placed(model, layout, on)

    def answer(calibration: Calibration) -> Interval:
        fill = _seconds(model, on, layout, Prefill(prompt, 1.0), calibration).scaled(1 / output)
        step = _seconds(model, on, layout, Decode(prompt + output / 2, batch), calibration).scaled(1 / batch)
        return fill.plus(step).scaled(float(on.gpus))

    return Asked(1 / float(row.value), "s", answer, on)


def most_throughput(row: Measurement) -> Asked:  # noqa: ARG001 (every row has the same answer)
    """TensorRT-LLM's overview prints the best throughput over concurrencies it does not name."""
    refuse("peak throughput at a concurrency that is not stated")


_WEIGHTS = {"nvfp4": "nvfp4", "fp8": "fp8", "fp8_block": "fp8_block", "int4_wo": "int4", "bfloat16": "bf16"}


def waited(service_s: float, think_s: float, clients: float) -> float:
    """Mean seconds at a station that serves `clients` one at a time for `service_s`, each away for `think_s` in between.

    Exact mean-value analysis of a closed network: R(n) = S (1 + Q(n - 1)), Q(n) = n R(n) / (Z + R(n)).
    Source: Reiser and Lavenberg, JACM 27 (1980).

    >>> waited(1.0, 0.0, 8), round(waited(1.0, 100.0, 2), 3)
    (8.0, 1.01)
    """
    waiting, seconds = 0.0, service_s
    for present in range(1, max(1, round(clients)) + 1):
        seconds = service_s * (1 + waiting)
        waiting = present * seconds / (think_s + seconds)
    return seconds


def silicon(row: Measurement) -> Asked:
    """The served runs of aiconfigurator: means under closed-loop clients, prompt `seq_len`, output `osl`.

    Next token: one decode step of all clients, plus what the prefills of the others take from it, (b - 1) prefill / O.
    First token: a prefill behind those of the other clients of its replica, each away for its O next tokens (`waited`).
    """
    if row.inputs["mode"] != "agg":
        refuse(f"{row.inputs['mode']}: prefill and decode on separate GPUs are not modelled")
    on, shares = machine(row), float(row.inputs.get("attn_dp") or 1)
    layout = Layout(tp=row.number("tp"), pp=row.number("pp"), dp_attention=shares, ep=row.number("moe_ep"))
    if layout.tp * shares != row.number("moe_tp") * row.number("moe_ep"):
        refuse("attention and expert degrees do not make the same number of GPUs")
    weight = dict(part.split("=") for part in row.dtype.split(";") if "=" in part)["moe"]
    model = _stored(spec(row.model), _WEIGHTS[weight])
    prompt, output, clients = row.number("seq_len"), row.number("osl"), _clients(row)
    _placed(model, layout, on)

    def answer(calibration: Calibration) -> Interval:
        step = _seconds(model, on, layout, Decode(prompt + output / 2, clients), calibration)
        fill = _seconds(model, on, layout, Prefill(prompt), calibration)
        each = max(clients / shares, 1.0)
        next_token = step.plus(fill.scaled((each - 1) / output)) if each > 1 else step
        if row.kind == "decode_tpot":
            return next_token
        return fill.scaled(waited(fill.value, output * next_token.value, each) / fill.value)

    return Asked(float(row.value) * MS, "s", answer, on)


def _clients(row: Measurement) -> float:
    """Clients in all: `silicon_concurrency`, else the c of the run's name.  `batch` is per attention rank; where it is neither
    that nor the whole, the run was on more GPUs than the row states.
    """
    stated = re.search(r"silicon_concurrency=(\d+)", row.other_inputs) or re.search(r"_c(\d+)_", row.table_or_section)
    if stated is None:
        refuse("the number of clients is not stated")
    clients = float(stated[1])
    if clients != row.number("batch") * float(row.inputs.get("attn_dp") or 1):
        refuse("clients and batch do not agree: on how many replicas is not stated")
    return clients


def _stored(model: ModelSpec, weight: str) -> ModelSpec:
    """The model with its weights as the row names them, unless its checkpoint keeps some that way already."""
    if any(getattr(layer, "weight", None) == weight_format(weight) for layer in model.layers):
        return model
    return with_formats(model, weight, None)


#: Contexts between which a slope is taken: the figure's range.
_SLOPE_TOKENS = (8192.0, 131072.0)


def fp8_cache_blog(row: Measurement) -> Asked:
    """The vLLM blog on fp8 caches: inter-token latency of one sequence as slope x context + intercept (both in ms), and
    its mean over 20k-in 2k-out requests of 8 clients: a decode step and the others' prefills, 7 prefill / O.
    """
    if "skip" in row.dtype.lower():
        refuse("a cache in two formats, sliding layers apart, is not expressible")
    on = machine(row)
    model = with_formats(spec(row.model), None, "fp8" if "fp8" in row.dtype else None)
    near, far = _SLOPE_TOKENS
    if "slope" not in row.unit and "intercept" not in row.unit:
        prompt, output, clients = 20000.0, 2000.0, 8.0

        def mean(calibration: Calibration) -> Interval:
            step = _seconds(model, on, Layout(), Decode(prompt + output / 2, clients), calibration)
            return step.plus(_seconds(model, on, Layout(), Prefill(prompt), calibration).scaled((clients - 1) / output))

        return Asked(float(row.value) * MS, "s", mean, on)

    def fitted(calibration: Calibration) -> Interval:
        low = _seconds(model, on, Layout(), Decode(near), calibration)
        high = _seconds(model, on, Layout(), Decode(far), calibration)
        slope = (high.value - low.value) / (far - near)
        if "slope" in row.unit:
            return high.scaled(slope / high.value)
        return low.scaled((low.value - slope * near) / low.value)

    return Asked(float(row.value) * MS, "s", fitted, on)


def traces(row: Measurement) -> Asked:  # noqa: ARG001 (every row has the same answer)
    """LLMServingSim's runs of a request trace."""
    refuse("needs the request trace, which the source keeps apart")


def cache_sizes(row: Measurement) -> Asked:
    """Logs of caches, which `caches` compares; times to the first token in the same threads."""
    if row.kind == "kv_capacity":
        return cache_size(row)
    if row.kind == "prefill_ttft":
        return _phase(spec(row.model), machine(row), Layout(tp=row.number("tp")), Prefill(row.number("context_len")), float(row.value))
    return deployed(row)


def deployed(row: Measurement) -> Asked:
    """Deployment logs and blogs of single models: refused by GPU or model where the catalog lacks one."""
    spec(row.model)
    machine(row)
    refuse("layout or serving conditions are not stated")


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = {
    "minference-readme": minference, "tensorrt-llm-2023-12": tensorrt_2023, "tensorrt-llm-developer-guide": most_throughput,
    "tensorrt-llm-perf-overview": most_throughput, "aiconfigurator-silicon": silicon, "vllm-blog-fp8-kv": fp8_cache_blog,
    "llmservingsim-examples": traces, "vllm-blog-hpc-ops": deployed, "rtx6kpro-decode": deployed,
    **dict.fromkeys(
        (
            "alexellis-glm-5-3-flash-pr-1", "ds4-sm120-harness", "flashinfer-pr-3937", "hf-mem", "kimi-k3-16xrtx-pro-6000-log", "llmservingsim-meta",
            "mimo-v2-6-flash-deployment-log", "noonghunna-club-3090-612", "public-github-log", "qwen2-5-1m-blog", "rtx6kpro-startup",
            "sglang-pr-11309", "vllm-blog-deepseek-v4", "vllm-blog-llama-4", "vllm-issue-10517", "vllm-issue-21348", "vllm-issue-44376",
            "vllm-issue-51041", "vllm-recipes-pr-115", "yhfgyyf-vllm-deepseek-v4-sm89-41",
        ),
        cache_sizes,
    ),
}  # fmt: skip
__all__ = ["SOURCES", "cache_sizes"]
