"""What ran: GPU, driver, clocks, power, software, commit, date.  Read through NVML where there is one."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microbench import packages


def environment(device: Any) -> dict[str, str | int | float]:
    """Facts of the machine, for the head of a file."""
    found: dict[str, str | int | float] = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type != "cuda":
        return {**found, "gpu": "cpu", "note": "a run without a GPU shows that the code runs; it says nothing of time"}
    part = torch.cuda.get_device_properties(device)
    found |= {
        "gpu": part.name, "sms": part.multi_processor_count, "l2_bytes": part.L2_cache_size, "usable_bytes": part.total_memory,
        "compute_capability": f"{part.major}.{part.minor}", "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()),
    }  # fmt: skip
    with suppress(ImportError):
        import triton  # noqa: PLC0415 (an optional part of torch)

        found["triton"] = triton.__version__
    return {**found, **packages.versions(), **Sensors(device).limits()}


def _commit() -> str:
    if "LONGCTX_COMMIT" in os.environ:
        return os.environ["LONGCTX_COMMIT"]
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()  # noqa: S603 (git, on our own folder)
    return "unknown"


@dataclass(frozen=True)
class Reading:
    """Clock of the SMs and power of the board at one moment; nan without NVML."""

    sm_clock_hz: float = float("nan")
    power_w: float = float("nan")


class Sensors:
    """The board's sensors.  Every reading is nan where NVML is missing."""

    def __init__(self, device: Any) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        with suppress(Exception):
            import pynvml  # noqa: PLC0415 (needed on a GPU machine only)

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)

    def read(self) -> Reading:
        """Now."""
        if self._nvml is None:
            return Reading()
        with suppress(Exception):
            clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM) * 1e6
            return Reading(float(clock), self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)
        return Reading()

    def limits(self) -> dict[str, str | int | float]:
        """Driver, memory, clock and power limits."""
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        found: dict[str, str | int | float] = {}
        for name, read in (
            ("driver", lambda: str(nvml.nvmlSystemGetDriverVersion())),
            ("capacity_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total)),
            ("max_clock_hz", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6),
            ("memory_clock_hz", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6),
            ("power_limit_w", lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3),
            ("temperature_c", lambda: int(nvml.nvmlDeviceGetTemperature(handle, 0))),
        ):
            with suppress(Exception):
                found[name] = read()
        return found
