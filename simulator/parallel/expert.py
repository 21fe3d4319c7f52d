"""Expert parallelism: whole experts on each of n ranks of the tensor x attention-data group.

With attention-data parallelism, rows travel: dispatch and combine are all-to-alls of the busiest rank's rows,
T k D e each way (FORMULAS 5.4).  Inside one tensor group every rank already holds all tokens: nothing travels but
the layer's all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.dtypes import BF16, CacheFormat
from simulator.kernels.messages import message
from simulator.layers import MoE
from simulator.layers.layer import Layer, Slice
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, divisors, is_one
from simulator.units import where
from simulator.work import Serial, Work


class Expert(Scheme):
    """`ep` ranks share the experts."""

    field = "ep"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Experts / n."""
        if not isinstance(layer, MoE) or is_one(self.degree):
            return held
        return held._replace(experts=held.experts / self.degree, expert_ranks=self.degree * 1.0)

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat) -> Work:  # noqa: ARG002
        """Dispatch in the expert's activation format, combine in bf16."""
        if not isinstance(layer, MoE) or is_one(self.layout.dp_attention):
            return work
        rows = layer.routed(held)[0] * where(self.layout.dp_attention > 1, 1.0, 0.0)
        group = self.layout.groups["ep"]
        width = layer.expert_width
        return Serial([
            message("dispatch", "all_to_all", group=group, payload_bytes=rows * (width * layer.expert_weight.activation.bytes)),
            work, message("combine", "all_to_all", group=group, payload_bytes=rows * (width * BF16.bytes)),
        ])  # fmt: skip

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """Experts must divide, and the group is tensor x attention-data."""
        n, group = int(self.degree), int(self.layout.tp * self.layout.dp_attention)
        if n == 1:
            return
        experts = [layer.num_experts for layer in model.layers if isinstance(layer, MoE)]
        if not experts:
            yield f"--ep {n}: {model.name} has no experts; leave --ep out"
        elif experts[0] % n:
            yield f"--ep {n}: {model.name} has {experts[0]} experts; use a divisor: {divisors(experts[0])}"
        elif n != group:
            yield f"--ep {n}: experts are split over tp x dp-attention = {group} ranks; use --ep {group} or leave it out"
