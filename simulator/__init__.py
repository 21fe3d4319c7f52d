"""What a long context costs: FLOPs, HBM traffic, cache bytes, communication, seconds and dollars.

Quantities (kernels, layers, model, parallel, phases) know no GPU; time (hardware, calibration, launch, timing) knows
no model; `estimate` is where they meet.
"""

from simulator.calibration import Calibration
from simulator.estimate import estimate, sweep
from simulator.hardware import cluster
from simulator.hf import load_model
from simulator.parallel import Layout
from simulator.phases import Decode, Mixed, Prefill, TrainStep
from simulator.planner import plan, size
from simulator.serving import Request

__version__ = "0.1.0"

__all__ = [
    "Calibration", "Decode", "Layout", "Mixed", "Prefill", "Request", "TrainStep", "cluster", "estimate", "load_model", "plan", "size",
    "sweep",
]  # fmt: skip
