"""Training runs: refused with the reason until a training step can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simulator import phases
from simulator.published.table import Asked, Measurement, refuse


def training(row: Measurement) -> Asked:  # noqa: ARG001 (every row has the same answer)
    """A training step as a whole: iteration time, MFU, memory, longest trainable sequence."""
    stands = "exists, its conventions are not converted yet" if hasattr(phases, "TrainStep") else "is not modelled yet"
    refuse(f"a training step {stands}")


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = dict.fromkeys(
    (
        "activation-recomputation-paper", "arctic-alst", "deepspeed-fpdt", "easycontext-readme", "internevo", "llm-foundry",
        "megatron-bridge", "megatron-lm-llama-fp8", "megatron-lm-readme", "meta-model-card", "nemo-long-sequence", "simumax-b200",
        "torchtitan-2024-12", "torchtitan-async-tp", "usp-paper",
    ),
    training,
)  # fmt: skip
