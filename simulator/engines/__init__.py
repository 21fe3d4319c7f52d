"""One file per engine: how it allocates, schedules and is launched."""

from simulator.engines.vllm import Vllm

#: Every engine, by the name users give.
REGISTRY = {"vllm": Vllm}

__all__ = ["REGISTRY", "Vllm"]
