"""What moving a request's cache takes beside computing it: back from host memory, and from prefill to decode machines.

A prefix comes back through every GPU's own host link, each its rows, copies too; a hand-over leaves through every GPU's NIC
layer by layer while the next ones compute, each row once.  Formulas in `parallel.transfer`; FORMULAS 5.9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from simulator.calibration import Calibration
from simulator.engines.vllm import Vllm
from simulator.estimate import bare
from simulator.hardware import Cluster
from simulator.kernels.host_copy import host_copy
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.parallel.transfer import exposed_hand_over_s, handed_over_bytes, send_cache
from simulator.phases import Prefill, System
from simulator.timing import Clock, seconds_expected
from simulator.units import SECONDS, gib


@dataclass(frozen=True, slots=True)
class Moves:
    """Seconds, expected: `restore_s` of `cached` tokens against `recompute_s`; `exposed_s` of a hand-over of `sent_bytes` per GPU
    that takes `send_s` at once.  None where there is nothing cached, no known host link, or no network to send over.
    """

    cached: int
    restored_bytes: float
    restore_s: float | None
    recompute_s: float | None
    sent_bytes: float
    send_s: float | None
    exposed_s: float | None

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cached_tokens": self.cached, "restored_bytes_per_gpu": self.restored_bytes, "restore_from_host_s": self.restore_s,
            "recompute_s": self.recompute_s, "handed_over_bytes_per_gpu": self.sent_bytes, "hand_over_s": self.send_s,
            "hand_over_exposed_s": self.exposed_s,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        found = []
        if self.restore_s is not None and self.recompute_s is not None:
            better = "restoring" if self.restore_s < self.recompute_s else "computing"
            found.append(
                f"{self.cached:,} cached tokens kept in host memory come back in {SECONDS.show(self.restore_s, 2)} ({gib(self.restored_bytes)} per GPU), "
                f"computed again in {SECONDS.show(self.recompute_s, 2)}: {better} is faster"
            )
        if self.send_s is not None and self.exposed_s is not None:
            found.append(
                f"handed over to decode machines: {gib(self.sent_bytes)} per GPU in {SECONDS.show(self.send_s, 2)}, "
                f"{SECONDS.show(self.exposed_s, 2)} of it after the prefill (layer by layer)"
            )
        return found


def moves(
    model: ModelSpec, layout: Layout, cluster: Cluster, *, prompt: int, cached: int, prefill_s: float, engine: Vllm, calibration: Calibration
) -> Moves:
    """Of one request of `prompt` tokens whose whole prefill takes `prefill_s`, with a prefix of `cached`."""
    clock, system = Clock(cluster, calibration), System(model, layout)
    restored, restore, again = 0.0, None, None
    if cached:
        restored = float(system.resident(sequences=1.0, context=float(cached)).cache)
        whole = Prefill(float(cached), 1.0, 0.0, float(engine.step_tokens(cluster.gpu)))
        again = float(bare(model, cluster, layout, whole, calibration=calibration, engine=engine, with_footprint=False).seconds)
        if cluster.gpu.host_bytes_per_s:
            restore = float(clock.expected(host_copy("restore", moved_bytes=restored, direction="to_device")))
    sent = float(handed_over_bytes(model, layout, float(prompt)))
    last = cluster.tiers[-1] if cluster.tiers else None
    if last is None or last.kind != "network" or not sent:
        return Moves(cached, restored, restore, again, sent, None, None)
    # the decode machines are as many again, beyond the scale-up domain
    both = replace(cluster, gpus=2 * max(cluster.gpus, cluster.gpus_per_node))
    at_once = float(seconds_expected(send_cache(sent, both.gpus / 2), Clock(both, calibration)))
    layers = max(len(model.order) // int(layout.pp), 1)
    exposed = float(exposed_hand_over_s(cache_bytes=sent, prefill_s=prefill_s, layers=layers, bytes_per_s=sent / at_once))
    return Moves(cached, restored, restore, again, sent, at_once, exposed)


__all__ = ["Moves", "moves"]
