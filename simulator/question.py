"""A question about serving and its answer: what `longctx size` and the app's first page ask alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simulator import planner, reading, reading_report, report, tables
from simulator.engines import Vllm
from simulator.hardware import Cluster, cluster
from simulator.hardware import price as listed
from simulator.hf import load_model, with_formats
from simulator.model import ModelSpec
from simulator.planner import Plan
from simulator.reading import Reading
from simulator.serving import Request

#: Degrees that multiply into a number of GPUs.
_MULTIPLIES = ("tp", "pp", "dp", "dp_attention", "cp", "ulysses")


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, as written: None is the default.  `degrees` holds (name, degree) of those insisted on, `ways` (name, word)
    how context parallelism should do it.
    """

    model: str
    gpu: str = "h200"
    gpus: int | None = None
    context: int = 131_072
    concurrency: int = 1
    output: int | None = None
    prefix_hit: float = 0.9
    degrees: tuple[tuple[str, int], ...] = ()
    weights: str | None = None
    cache: str | None = None
    block_size: int | None = None
    memory_fraction: float | None = None
    chunk: int | None = None
    price_usd_per_gpu_hour: float | None = None
    ways: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The plan with every input resolved."""

    plan: Plan
    inputs: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The keys of `size`, every engine's allocation among them."""
        found = self.plan
        held = tables.engines(found.model, found.best.layout, found.cluster, found.request.context, [found.engine])
        return report.size_document(found, self.inputs, held)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """An encoder's answer with every input resolved."""

    reading: Reading
    inputs: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The keys of `size`; null where an encoder has no such thing."""
        return reading_report.document(self.reading, self.inputs)


def answer(question: Question) -> Answer | Read:
    """`ask`, or for an encoder `reading.read`.  Errors: ValueError with value, rule and remedy."""
    spec = _model(question)
    return _read(question, spec) if reading.reads_at_once(spec) else _asked(question, spec)


def ask(question: Question) -> Answer:
    """Does it fit, how, how fast, how dear.  Errors: ValueError with value, rule and remedy; for an encoder too, see `answer`."""
    return _asked(question, _model(question))


def _model(question: Question) -> ModelSpec:
    return with_formats(load_model(question.model), question.weights, question.cache)


def _machine(question: Question) -> Cluster:
    product, degrees = 1, dict(question.degrees)
    for name in _MULTIPLIES:
        product *= degrees.get(name, 1)
    return cluster(question.gpu, product if question.gpus is None else question.gpus)


def _weights(question: Question, spec: ModelSpec) -> str:
    return question.weights or (spec.quantization if spec.quantization != "none" else spec.embedding.weight.name)


def _priced(question: Question, machine: Cluster) -> dict[str, Any]:
    """Dollars per GPU-hour and who says so."""
    price, known = question.price_usd_per_gpu_hour, listed(machine.gpu)
    return {
        "price_usd_per_gpu_hour": price if price is not None else machine.price_usd_per_gpu_hour,
        "price_source": "given" if price is not None else (known.sources.get("typical") if known else None),
    }


def _asked(question: Question, spec: ModelSpec) -> Answer:
    context, degrees, machine = question.context, dict(question.degrees), _machine(question)
    engine = Vllm(question.memory_fraction, question.block_size, question.chunk)
    written = question.output if question.output is not None else min(1024, max(1, context // 8))
    if written >= context:
        message = f"--output {written}: it is part of --context {context}; use a smaller number"
        raise ValueError(message)
    request = Request(context, question.concurrency, written, question.prefix_hit)
    if question.ways and degrees.get("cp", 1) == 1:
        name, word = question.ways[0]
        message = f"--cp-{name} {word}: it says how ranks of --cp share tokens; give --cp too, or leave it out"
        raise ValueError(message)
    fixed: dict[str, Any] = {**degrees, **dict(question.ways)}
    found = planner.size(spec, machine, request, engine=engine, fixed=fixed, price_usd_per_gpu_hour=question.price_usd_per_gpu_hour)
    inputs = {
        "model": spec.name, "gpu": machine.gpu.name, "gpus": machine.gpus, "context": context, "concurrency": question.concurrency,
        "output": written, "prefix_hit": question.prefix_hit, **degrees,
        **{f"cp_{name}": word for name, word in question.ways}, "weights": _weights(question, spec), "cache": spec.cache.name,
        "block_size": engine.block_tokens(spec, machine.gpu), "memory_fraction": engine.fraction, "chunk": engine.step_tokens(machine.gpu),
        "max_num_seqs": engine.sequences(machine.gpu), "engine": f"vllm {engine.version}", **_priced(question, machine),
    }  # fmt: skip
    return Answer(found, inputs)


def _read(question: Question, spec: ModelSpec) -> Read:
    if question.output:
        message = f"--output {question.output}: {spec.name} reads a text at once and writes nothing; leave it out"
        raise ValueError(message)
    machine, priced = _machine(question), _priced(question, _machine(question))
    request = Request(question.context, question.concurrency, 0, 0.0)
    found = reading.read(
        spec, machine, request, memory_fraction=question.memory_fraction, fixed=dict(question.degrees),
        price_usd_per_gpu_hour=priced["price_usd_per_gpu_hour"],
    )  # fmt: skip
    inputs = {
        "model": spec.name, "gpu": machine.gpu.name, "gpus": machine.gpus, "context": question.context, "concurrency": question.concurrency,
        **dict(question.degrees), "weights": _weights(question, spec), "memory_fraction": Vllm(question.memory_fraction).fraction, **priced,
    }  # fmt: skip
    return Read(found, inputs)
