"""One file per engine: how it allocates, schedules and is launched."""

from simulator.engines.allocation import Allocation, Engine
from simulator.engines.sglang import Sglang
from simulator.engines.tensorrt_llm import TensorrtLlm
from simulator.engines.vllm import Vllm

#: Every engine, by the name users give.
REGISTRY: dict[str, type[Vllm] | type[Sglang] | type[TensorrtLlm]] = {"vllm": Vllm, "sglang": Sglang, "tensorrt_llm": TensorrtLlm}

#: Those whose steps, layouts and launch commands are modelled too.
SCHEDULED: dict[str, type[Vllm]] = {"vllm": Vllm}

__all__ = ["REGISTRY", "SCHEDULED", "Allocation", "Engine", "Sglang", "TensorrtLlm", "Vllm"]
