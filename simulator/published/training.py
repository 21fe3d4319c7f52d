"""Training runs: refused until their conventions are converted into a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simulator.published.table import Asked, Measurement, refuse


def training(row: Measurement) -> Asked:  # noqa: ARG001 (every row has the same answer)
    """A training step as a whole: iteration time, MFU, memory, longest trainable sequence."""
    refuse("a training step: this source's conventions (recomputation, states, what its FLOPs count) are not converted yet")


SOURCES: Mapping[str, Callable[[Measurement], Asked]] = dict.fromkeys(
    (
        "activation-recomputation-paper", "arctic-alst", "deepspeed-fpdt", "easycontext-readme", "internevo", "llm-foundry",
        "megatron-bridge", "megatron-lm-llama-fp8", "megatron-lm-readme", "meta-model-card", "nemo-long-sequence", "simumax-b200",
        "torchtitan-2024-12", "torchtitan-async-tp", "usp-paper",
    ),
    training,
)  # fmt: skip
