"""The published measurements as rows: read, with what each may be used for, and the names they use for what we know."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NoReturn

from simulator.calibration import Calibration
from simulator.data import data_path
from simulator.estimate import Interval
from simulator.hardware import Cluster, cluster
from simulator.hf import load_model
from simulator.model import ModelSpec

#: Kinds that time one kernel or one collective; all others are end to end.
MICROBENCHMARKS = ("comm_busbw", "kernel_gbps", "kernel_tflops", "kernel_time")


class NotComparableError(Exception):
    """A row that states too little, or of something we do not model; the message is the reason."""


def refuse(reason: str) -> NoReturn:
    """Say why a row is not compared."""
    raise NotComparableError(reason)


@dataclass(frozen=True)
class Measurement:
    """One published number with its inputs, as printed."""

    id: str
    reference: str
    table_or_section: str
    kind: str
    model: str
    hardware: str
    n_gpus: str
    parallelism: str
    seq_len: str
    context_len: str
    batch: str
    heads: str
    dtype: str
    kernel_or_engine: str
    other_inputs: str
    value: str
    unit: str
    notes: str

    @property
    def source(self) -> str:
        """The key of its source in `sources.csv`."""
        return self.reference.partition("#")[0]

    @property
    def series(self) -> str:
        """The curve it is a point of."""
        return f"{self.table_or_section} | {self.hardware} | {self.kernel_or_engine}"

    @cached_property
    def inputs(self) -> Mapping[str, str]:
        """`other_inputs`, `heads` and `parallelism` as a mapping: "M=64;N=2112" -> {"M": "64", "N": "2112"}."""
        parts = f"{self.parallelism};{self.heads};{self.other_inputs}".split(";")
        return dict(part.strip().split("=", 1) for part in parts if "=" in part)

    def number(self, name: str) -> float:
        """An input as a number; its first digits where a unit follows."""
        text = self.inputs.get(name) or getattr(self, name, "") or ""
        found = re.match(r"\s*[\d.]+", text)
        if found is None:
            refuse(f"{name} is not stated")
        return float(found[0])

    @property
    def shape(self) -> str:
        """What was measured, in one line."""
        sizes = {"s": self.seq_len, "context": self.context_len, "b": self.batch}
        stated = [f"{name}={text}" for name, text in sizes.items() if text]
        told = [self.model, *stated, self.heads, self.parallelism, self.dtype, self.other_inputs]
        return "; ".join(text for text in told if text and text not in ("n/a", "none"))[:120]


@dataclass(frozen=True)
class Asked:
    """A row as a question to the simulator: the measured value in base units, and who answers it under a calibration.

    `unit` is "s", "B" or "tokens".  `answer` gives our value with its 80 % interval.  `explanation` is why an exact one may differ.
    """

    measured: float
    unit: str
    answer: Callable[[Calibration], Interval]
    cluster: Cluster | None = None
    explanation: str = ""


@cache
def measurements() -> tuple[Measurement, ...]:
    """Every row of `data/published/measurements.csv`."""
    with data_path("published", "measurements.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Measurement(**row) for row in csv.DictReader(file))


@cache
def addresses() -> Mapping[str, str]:
    """Where each reference can be read; empty where nobody wrote it down."""
    with data_path("published", "sources.csv").open(encoding="utf-8", newline="") as file:
        return {row["reference"]: row["address"] for row in csv.DictReader(file)}


@cache
def _split() -> Mapping[tuple[str, str, str], str]:
    with data_path("published", "SPLIT.csv").open(encoding="utf-8", newline="") as file:
        return {(row["source"], row["kind"], row["series"]): row["role"] for row in csv.DictReader(file)}


def role(row: Measurement) -> str:
    """"fit" or "score": what `SPLIT.csv` lets a row be used for."""
    split = _split()
    whole = split.get((row.source, row.kind, ""))
    return whole if whole is not None else split[row.source, row.kind, row.series]


@cache
def fitted_sources() -> frozenset[str]:
    """Sources any row of which may be fitted to."""
    return frozenset(source for (source, _, _), role_ in _split().items() if role_ == "fit")


#: What their authors call a GPU -> our name; the first pattern that matches counts.  A board whose clocks or memory
#: differ from the catalog's (H100 with HBM2e at 500 W, A100 40 GB where memory counts) is another GPU.
_GPUS = (
    (r"H100-96GB", "h100_96gb_hbm2e"), (r"GH200", "gh200"), (r"GB200", "gb200"), (r"GB300", "gb300"), (r"B300", "b300"), (r"B200", "b200"),
    (r"H200", "h200"), (r"H100", "h100"), (r"H800", "h800"), (r"H20\b", "h20"), (r"A800", "a800"), (r"A100-40GB|a100_40gb", "a100_40gb"),
    (r"A100", "a100"), (r"MI300X", "mi300x"), (r"MI355X", "mi355x"), (r"L40S", "l40s"),
)  # fmt: skip


def machine(row: Measurement, gpus: int | None = None) -> Cluster:
    """The GPUs a row was measured on."""
    name = next((ours for pattern, ours in _GPUS if re.search(pattern, row.hardware, re.IGNORECASE)), row.hardware)
    count = gpus if gpus is not None else int(row.n_gpus or 1)
    try:
        found = cluster(name, count)
    except ValueError:
        message = f"GPU {name} is not in the catalog"
        raise NotComparableError(message) from None
    if found.gpu.assumed:
        message = f"GPU {name}: {', '.join(found.gpu.assumed)} not published"
        raise NotComparableError(message)
    return found


#: What their authors call a model, where the catalog's own search would not find it or would find another.
_MODELS = {
    # its architecture; only the rotary base differs, which costs nothing
    "Llama-3-8B-Instruct-1M (Gradient 1048k)": "meta-llama/Meta-Llama-3.1-8B",
    "Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B",
    # LLaMA-7B is Llama-2-7b's architecture; "LLaMA-70B" exists as Llama 2 only
    "LLaMA-7B": "meta-llama/Llama-2-7b-hf",
    "LLaMA-70B": "meta-llama/Llama-2-70b-hf",
    "Qwen2.5-14B-Instruct-1M": "Qwen/Qwen2.5-14B-Instruct-1M",
    "Llama-4-Scout bf16": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "Llama-4-Maverick-FP8": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    # the row's formats make the checkpoint
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "zhipuai/GLM-5": "zai-org/GLM-5",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B-Instruct",
}


@cache
def spec(name: str) -> ModelSpec:
    """The model a row is about."""
    try:
        return load_model(_MODELS.get(name, name))
    except ValueError as error:
        message = f"model {name}: several of the catalog match" if "several match" in str(error) else f"model {name} is not in the catalog"
        raise NotComparableError(message) from None
