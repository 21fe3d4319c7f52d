"""Data parallelism of training with sharded states: plain replicas, ZeRO-1, 2, 3 (FSDP), and hybrid sharding.

Legend: P parameters of a rank's replica (after tensor and pipeline splits), n ranks that share its states, r groups of n
that hold the same shards (hybrid; 1 otherwise), e bytes of an element.  Of the states of mixed-precision Adam stage 1
shares the optimizer's, stage 2 also gradients, stage 3 also weights, gathered layer by layer.
Wire bytes of a rank a step, in (n - 1) / n P e: stage 0 to 2 two (an all-reduce, or a reduce-scatter of gradients and an
all-gather of weights), stage 3 three (weights forward, weights backward, gradients), two if weights are kept after forward.
Source: ZeRO (1910.02054) section 7; PyTorch FSDP (2304.11277); FORMULAS 4.3, 5.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simulator.dtypes import BF16, DType
from simulator.footprint import Footprint
from simulator.kernels.messages import message
from simulator.layers.layer import Direction
from simulator.units import Count, Num
from simulator.work import Group, Message, Overlap, Serial, Work

#: Bytes a parameter of Adam's states: fp32 master weight and two fp32 moments.
ADAM_BYTES = 12.0
#: Of Muon's: fp32 master weight and one momentum.
MUON_BYTES = 8.0
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True, eq=False)
class ShardedData:
    """`ranks` ranks with their own sequences share states by `stage`; `replicas` such groups repeat the shards.

    `stride` is the distance of neighbours of a group in rank order; groups of a hybrid are ranks x stride apart.
    """

    stage: int
    ranks: Num
    replicas: Num = 1.0
    stride: Num = 1.0
    keeps_weights: bool = False
    weight: DType = BF16
    gradient: DType = BF16
    optimizer_bytes: float = ADAM_BYTES

    @property
    def group(self) -> Group:
        """The ranks that share shards."""
        return Group("data", self.ranks * 1.0, self.stride)

    @property
    def across(self) -> Group:
        """The ranks that hold the same shard."""
        return Group("replicas", self.replicas * 1.0, self.ranks * self.stride)

    def footprint(self, parameters: Count, gathered: Count = 0.0) -> Footprint:
        """States of one rank; stage 3 holds `gathered` parameters (two layers with prefetch) whole beside its shard.

        Bytes a parameter with bf16 and Adam: 16; 4 + 12 / n; 2 + 14 / n; 16 / n.  Muon: 4 fewer of the optimizer's 12.

        >>> ShardedData(3, 1024).footprint(405e9).total / 1e9
        6.328125
        """
        n = self.ranks
        held = [parameters / n if self.stage >= least else parameters for least in (3, 2, 1)]
        whole = gathered if self.stage == 3 and not self.keeps_weights else 0.0  # noqa: PLR2004 (the stage that shares weights)
        if self.stage == 3 and self.keeps_weights:  # noqa: PLR2004
            whole = parameters
        return Footprint(
            weights=(held[0] + whole) * self.weight.bytes, gradients=held[1] * self.gradient.bytes, optimizer=held[2] * self.optimizer_bytes
        )

    def around(self, work: Work, parameters: Count, direction: Direction) -> Work:
        """A layer's work with its share of the traffic: the next layer's weights arrive, and the last one's gradients leave,
        while it computes.
        """
        beside = self.beside(parameters, direction)
        return Overlap([work, Serial(beside)]) if beside else work

    def beside(self, parameters: Count, direction: Direction) -> list[Message]:
        """The messages of a layer itself; updated weights go once, after the step."""
        return [m for m in self.messages(parameters, direction) if m.name != "updated weights"]

    def messages(self, parameters: Count, direction: Direction) -> list[Message]:
        """What a rank sends for a layer of `parameters`: forward, or backward with what precedes the next step."""
        weights, gradients = parameters * self.weight.bytes, parameters * self.gradient.bytes
        found: list[Message] = []
        if self.stage == 3 and (direction is Direction.FORWARD or not self.keeps_weights):  # noqa: PLR2004
            found.append(message("gather weights", "all_gather", group=self.group, payload_bytes=weights))
        if direction is Direction.FORWARD:
            return found
        if self.stage == 0:
            found.append(message("reduce gradients", "all_reduce", group=self.group, payload_bytes=gradients))
            return found
        found.append(message("scatter gradients", "reduce_scatter", group=self.group, payload_bytes=gradients))
        if not (isinstance(self.replicas, (int, float)) and self.replicas == 1):
            found.append(message("reduce shards", "all_reduce", group=self.across, payload_bytes=gradients / self.ranks))
        if self.stage < 3:  # noqa: PLR2004
            found.append(message("updated weights", "all_gather", group=self.group, payload_bytes=weights))
        return found

    def refusals(self) -> Iterator[str]:
        """Known stage; only shards can be repeated."""
        if self.stage not in STAGES:
            yield f"--zero {self.stage}: unknown; use one of {', '.join(map(str, STAGES))}"
        if self.stage == 0 and self.replicas != 1:
            yield "--zero 0: replicas share nothing that could be repeated; use --zero 1, 2 or 3 for hybrid sharding"


