"""Copies between a GPU's memory and its host's: offloaded caches, restored prefixes."""

from __future__ import annotations

from simulator.units import Bytes
from simulator.work import Op

DIRECTIONS = ("to_device", "to_host")


def host_copy(name: str, *, moved_bytes: Bytes, direction: str) -> Op:
    """`moved_bytes` through the GPU's host link, pinned memory on the host's side.

    bytes: each read and written once; the link carries them once.  Neglected: pageable memory, which is staged.
    Source: definition; FORMULAS 5.9.

    >>> host_copy("restore", moved_bytes=1e9, direction="to_device").hbm_bytes
    1000000000.0
    """
    if direction not in DIRECTIONS:
        message = f"direction {direction!r}: unknown; use one of {', '.join(DIRECTIONS)}"
        raise ValueError(message)
    return Op(name, "host_copy", direction, "", hbm_bytes=moved_bytes, shape={"bytes": moved_bytes})
