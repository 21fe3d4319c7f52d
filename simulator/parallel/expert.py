"""Expert parallelism: whole experts on each of n ranks of the tensor x attention-data (x context) group.

With attention-data parallelism, and over ranks of context parallelism, rows travel: dispatch and combine are all-to-alls of the busiest rank's rows,
T k D e each way (FORMULAS 5.4).  Inside one tensor group every rank already holds all tokens: nothing travels but
the layer's all-reduce.  Over `ep_nodes` nodes a row crosses once for each distinct node its experts lie on and is handed
on inside (deepseek-ai/DeepEP@dd758caf, "normal" kernels); shared experts stay where the token is.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.dtypes import BF16, CacheFormat
from simulator.kernels.messages import message
from simulator.layers import MoE
from simulator.layers.layer import Direction, Layer, Slice
from simulator.model import ModelSpec
from simulator.parallel.scheme import Scheme, divisors, is_one
from simulator.units import Num, maximum, minimum, where
from simulator.work import Serial, Work


def distinct_nodes(*, nodes: Num, experts: int, top_k: int, limit: Num | None = None) -> Num:
    """Expected distinct nodes among the k experts of a token, E / g experts on each of g nodes.

    g (1 - C(E - E / g, k) / C(E, k)), uniform routing; a router that first picks `limit` nodes has only those to choose
    from: the same with g = limit and E limit / g experts.  Source: FORMULAS 5.4.

    >>> round(distinct_nodes(nodes=8, experts=256, top_k=8), 3), round(distinct_nodes(nodes=8, experts=256, top_k=8, limit=4), 2)
    (5.295, 3.63)
    """
    chosen = nodes if limit is None else minimum(nodes, limit)
    reachable = experts * chosen / nodes
    missed: Num = 1.0
    for i in range(top_k):
        missed = missed * maximum(reachable - experts / nodes - i, 0.0) / (reachable - i)
    return chosen * (1 - missed)


class Expert(Scheme):
    """`ep` ranks share the experts."""

    field = "ep"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Experts / n."""
        if not isinstance(layer, MoE) or is_one(self.degree):
            return held
        return held._replace(experts=held.experts / self.degree, expert_ranks=self.degree * 1.0)

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:  # noqa: ARG002
        """Dispatch in the expert's activation format, combine in bf16."""
        shares = self.layout.expert_shares
        if not isinstance(layer, MoE) or is_one(shares):
            return work
        rows = layer.routed(held)[0] * where(shares > 1, 1.0, 0.0)
        width = layer.expert_width
        there, back = width * layer.expert_weight.activation.bytes, width * BF16.bytes
        if not is_one(self.layout.ep_nodes):
            return self._by_nodes(work, layer, held, rows, (there, back))
        group = self.layout.groups["ep"]
        return Serial([
            message("dispatch", "all_to_all", group=group, payload_bytes=rows * there), work,
            message("combine", "all_to_all", group=group, payload_bytes=rows * back),
        ])  # fmt: skip

    def _by_nodes(self, work: Work, layer: MoE, held: Slice, rows: Num, row_bytes: tuple[float, float]) -> Work:
        """Between nodes once for each distinct node, inside a node once for each expert: the busiest rank's share of both."""
        layout = self.layout
        crossing = distinct_nodes(
            nodes=layout.ep_nodes, experts=layer.num_experts, top_k=layer.num_experts_per_tok, limit=getattr(layer, "topk_group", None)
        )
        busiest = rows / maximum(held.tokens * held.token_ranks / layout.ep * layer.num_experts_per_tok, 1e-9)
        # a rank's own tokens, each to its distinct nodes; its node is one of them as often as any other
        across = held.tokens * held.token_ranks / layout.ep * crossing * busiest
        far, near = layout.groups["ep_nodes"], layout.groups["ep_local"]
        there, back = row_bytes
        return Serial([
            message("dispatch between nodes", "dispatch", group=far, payload_bytes=across * there),
            message("dispatch inside", "dispatch", group=near, payload_bytes=rows * there), work,
            message("combine inside", "dispatch", group=near, payload_bytes=rows * back),
            message("combine between nodes", "dispatch", group=far, payload_bytes=across * back),
        ])  # fmt: skip

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """Experts must divide, the group is tensor x attention-data (x context), and nodes hold equal shares of it."""
        nodes = int(self.layout.ep_nodes)
        if nodes > 1 and int(self.degree) % nodes:
            yield f"--ep-nodes {nodes}: it divides the {int(self.degree)} expert ranks; use a divisor: {divisors(int(self.degree))}"
        n, group, ring = int(self.degree), int(self.layout.tp * self.layout.dp_attention), int(self.layout.cp)
        if n == 1:
            return
        experts = [layer.num_experts for layer in model.layers if isinstance(layer, MoE)]
        if not experts:
            yield f"--ep {n}: {model.name} has no experts; leave --ep out"
        elif experts[0] % n:
            yield f"--ep {n}: {model.name} has {experts[0]} experts; use a divisor: {divisors(experts[0])}"
        elif n not in (group, group * ring):
            also = f", or those of every --cp rank too: --ep {group * ring}" if ring > 1 else ""
            yield f"--ep {n}: experts are split over tp x dp-attention = {group} ranks{also}; use --ep {group} or leave it out"
