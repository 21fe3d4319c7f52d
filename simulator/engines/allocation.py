"""What an engine makes of the memory left for the cache: one answer for every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from simulator.hardware import Cluster
from simulator.model import ModelSpec
from simulator.parallel import Layout


@dataclass(frozen=True, slots=True)
class Allocation:
    """One engine (one data-parallel replica) at requests of `max_model_len` tokens.

    `per_sequence_bytes` is what one request takes per GPU of `available_bytes`; `capacity_tokens` what the engine prints as its size;
    `prefix_tokens` the grid on which a cached prefix is found; `note` what makes it differ from the architecture's bytes.
    """

    engine: str
    title: str
    version: str
    available_bytes: float
    per_sequence_bytes: float
    max_concurrency: float
    capacity_tokens: int
    replicas: int
    prefix_tokens: int
    log: tuple[str, ...]
    note: str = ""


class Engine(Protocol):
    """What every engine answers."""

    name: str
    title: str

    @property
    def version(self) -> str:
        """The version whose rules these are."""

    def allocation(self, model: ModelSpec, layout: Layout, cluster: Cluster, max_model_len: int) -> Allocation:
        """What it holds of requests of `max_model_len` tokens; ValueError where it does not offer the model, format or layout."""


def refuse(title: str, version: str, why: str) -> ValueError:
    """The one line for what an engine does not offer."""
    return ValueError(f"{title} {version}: {why}")
