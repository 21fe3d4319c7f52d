"""The same programs as processes of this machine, over gloo: what continuous integration runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from microbench.ring import context, halo, ulysses
from microbench.ring.transport import Distributed, Transport

#: Programs whose ranks all hand over as much; and those whose ranks do not.
MODULES, UNEVEN = (context, ulysses), (halo,)


def run(size: int, program: Callable[..., Any], *told: Any) -> list[Any]:
    """What `program(transport, *told)` returns (as JSON) in each of `size` processes; it must be importable."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_play, (size, folder, program, told), nprocs=size)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def _play(rank: int, size: int, folder: str, program: Callable[..., Any], told: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = program(Distributed.world(), *told)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # a thread of gloo that still winds up would abort the interpreter that leaves before it
    os._exit(0)


def agreement(transport: Transport, sizes: list[int]) -> list[dict[str, Any]]:
    """For groups of the first so many ranks: the error in float64 of every tiny case, and what a run hands over in bf16."""
    found, device = [], torch.device("cpu")
    for size in sizes:
        inside = transport.rank < size
        group = transport.group(range(size) if inside else [transport.rank])
        if not inside:
            continue
        for module in (*MODULES, *UNEVEN):
            for which in module.cases("tiny", size):
                error = module.error(which, group, device, torch.float64)
                once = module.build(which, group, device)
                group.counted.clear()
                once()
                found.append({"size": size, "case": which.key, "error": error, "counted": dict(group.counted)})
    return found


__all__ = ["MODULES", "UNEVEN", "agreement", "run"]
