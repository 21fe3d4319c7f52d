"""Collectives and sends: what one rank puts on the wire.

Legend: n ranks of the group, S payload as nccl-tests counts it.
"""

from __future__ import annotations

from simulator.units import Bytes, where
from simulator.work import Group, Message

PATTERNS = {
    "all_reduce": "tensor reduced on every rank: ring 2 (n - 1) / n S",
    "all_gather": "gathered whole: (n - 1) / n S",
    "reduce_scatter": "whole before scattering: (n - 1) / n S",
    "all_to_all": "all a rank holds for the others and itself: (n - 1) / n S",
    "dispatch": "rows to the ranks of their experts, or back, by DeepEP's kernels: (n - 1) / n S",
    "send": "one buffer to one neighbour: S",
    "broadcast": "one buffer to all, passed on by each: S",
}


def message(name: str, pattern: str, *, group: Group, payload_bytes: Bytes) -> Message:
    """One rank's part in a collective.

    wire = S x {all_reduce 2 (n - 1) / n; all_gather, reduce_scatter, all_to_all, dispatch (n - 1) / n; send, broadcast 1}; one
    rank sends nothing.  Source: nccl-tests doc/PERFORMANCE.md; FORMULAS 5.1.

    >>> message("tp", "all_reduce", group=Group("tp", 8), payload_bytes=134217728).wire_bytes
    234881024.0
    """
    if pattern not in PATTERNS:
        known = ", ".join(PATTERNS)
        error = f"message pattern {pattern!r}: unknown; use one of {known}"
        raise ValueError(error)
    if pattern in ("send", "broadcast"):
        share = where(group.ranks > 1, 1.0, 0.0)
    else:
        share = group.others * 2.0 if pattern == "all_reduce" else group.others
    return Message(name, pattern, group, payload_bytes, wire_bytes=payload_bytes * share)
