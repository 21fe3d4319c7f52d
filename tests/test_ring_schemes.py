"""The algorithms that share a layer, run on logical ranks and on processes: results of one device, messages as predicted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from simulator.work import Message, Work, fold, quantity
from tests.support import leaves

torch = pytest.importorskip("torch")

from microbench.case import Case  # noqa: E402
from microbench.ring import collectives, decode, experts, handover, tensor  # noqa: E402
from microbench.ring.transport import Local, Transport  # noqa: E402

MODULES = (collectives, decode, handover, experts, tensor)
RANKS = (1, 2, 3, 4, 8)
CPU = torch.device("cpu")
TINY = [pytest.param(m, c, id=f"{c.kernel}-{c.impl}-{c['ranks']}") for m in MODULES for n in RANKS for c in m.cases("tiny", n)]


def predicted(work: Work) -> dict[str, float]:
    """Payload bytes by pattern of one rank's messages."""
    found: Counter[str] = Counter()
    for times, op in leaves(work):
        if isinstance(op, Message) and op.payload_bytes:
            found[op.pattern] += times * op.payload_bytes
    return dict(found)


def counted(module: Any, which: Case) -> list[dict[str, int]]:
    """What each logical rank hands over in one run."""

    def program(transport: Transport) -> dict[str, int]:
        run = module.build(which, transport, CPU)
        transport.counted.clear()
        run()
        return dict(transport.counted)

    return Local.run(which["ranks"], program)


@pytest.mark.parametrize(("module", "which"), TINY)
def test_every_rank_finds_what_one_device_finds(module: Any, which: Case) -> None:
    errors = Local.run(which["ranks"], lambda transport: module.error(which, transport, CPU, torch.float64))
    assert max(errors) < 1e-10


def exactly(which: Case) -> bool:
    """Whether every rank's messages are known beforehand: not of rows routed by chance."""
    return which.get("balanced", 1) == 1


@pytest.mark.parametrize(("module", "which"), [p for p in TINY if exactly(p.values[1])])
def test_every_rank_hands_over_what_is_predicted(module: Any, which: Case) -> None:
    work = module.work(which)
    if which["ranks"] == 1:
        assert counted(module, which) == [{}]
        assert fold(work, quantity("wire_bytes")) == 0
    else:
        found = counted(module, which)
        # the last stage of a pipeline has nobody to hand over to
        if which.kernel == "pipeline_handover":
            assert found.pop() == {}
        assert found == [predicted(work)] * len(found)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("module", MODULES)
def test_cases_for_gpus_have_work_and_names_of_their_own(module: Any, ranks: int) -> None:
    found = module.cases("ring", ranks)
    assert len({c.key for c in found}) == len(found)
    for which in found:
        assert which["ranks"] == ranks
        flops, moved, wire = (fold(module.work(which), quantity(name)) for name in ("flops", "hbm_bytes", "wire_bytes"))
        assert flops + moved + wire > 0
        assert math.isfinite(flops + moved + wire)


# ---- decoding over a shared cache


def test_helix_hands_over_the_same_whatever_the_context() -> None:
    """Counted, not only predicted."""
    short, long = (counted(decode, decode._case("helix", 4, 2, context, (16, 4, 16))) for context in (64, 4096))
    assert short == long
    assert set(short[0]) == {"all_to_all"}


@pytest.mark.parametrize(("heads", "cache_ranks"), [((16, 4, 16), 2), ((16, 2, 16), 4), ((16, 4, 16), 1)])
def test_helix_ranks_may_share_tokens_and_heads_at_once(heads: tuple[int, int, int], cache_ranks: int) -> None:
    which = decode._case("helix", 4 if cache_ranks < 4 else 8, 2, 101, heads, cache_ranks)
    errors = Local.run(which["ranks"], lambda transport: decode.error(which, transport, CPU, torch.float64))
    assert max(errors) < 1e-10
    if cache_ranks > 1:
        assert counted(decode, which) == [predicted(decode.work(which))] * which["ranks"]


@pytest.mark.parametrize("impl", decode.IMPLS)
def test_unequal_shares_of_a_context_merge_to_the_same(impl: str) -> None:
    which = decode._case(impl, 3, 2, 100, (6, 1 if impl == "dcp" else 3, 16))
    errors = Local.run(3, lambda transport: decode.error(which, transport, CPU, torch.float64))
    assert max(errors) < 1e-10


# ---- experts


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_send_every_row_there_and_what_came_back(ranks: int) -> None:
    which = experts._case(ranks, 16, (32, 4 * ranks, 2, 24), 0)
    row = 32 * 2
    arrived = [0] * ranks
    for source in range(ranks):
        for expert in experts.choices(which, source).flatten().tolist():
            arrived[expert // 4] += 1
    assert [c["all_to_all"] for c in counted(experts, which)] == [(16 * 2 + came) * row for came in arrived]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_busiest_of_drawn_ranks_has_the_rows_predicted(ranks: int) -> None:
    """In the mean over draws; its dispatch and its combine are then the messages of the work."""
    which = experts._case(ranks, 64, (32, 64, 8, 24), 0)
    found = []
    for draw in range(60):
        rows = torch.cat([experts.choices(which, draw * ranks + r).flatten() for r in range(ranks)])
        found.append(int(torch.bincount(rows // (64 // ranks), minlength=ranks).max()))
    assert sum(found) / len(found) * 2 * 32 * 2 == pytest.approx(predicted(experts.work(which))["all_to_all"], rel=0.01)


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 1), (4, 3), (8, 16)])
def test_balanced_choices_give_every_rank_and_expert_as_many_rows(ranks: int, tokens: int) -> None:
    which = experts._case(ranks, tokens, (32, 8 * ranks, 8, 24), 1)
    rows = torch.cat([experts.choices(which, r) for r in range(ranks)])
    assert all(len(set(token.tolist())) == 8 for token in rows)
    to_ranks = torch.bincount(rows.flatten() // 8, minlength=ranks)
    assert to_ranks.tolist() == [tokens * 8] * ranks
    to_experts = torch.bincount(rows.flatten(), minlength=8 * ranks)
    assert int(to_experts.max() - to_experts.min()) <= 1


# ---- processes


#: What every process runs: each tiny case once, for its error and for what it hands over.
PROGRAM = """
import json, os, sys, datetime
import torch
import torch.distributed as dist
from microbench.ring import collectives, decode, experts, handover, tensor
from microbench.ring.transport import Distributed

rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
cpu, found = torch.device("cpu"), []
for module in (collectives, decode, handover, experts, tensor):
    for which in module.cases("tiny", size):
        error = module.error(which, Distributed.world(), cpu, torch.float64)
        transport = Distributed.world()
        run = module.build(which, transport, cpu)
        transport.counted.clear()
        run()
        found.append([which.key, error, dict(transport.counted)])
dist.barrier()
dist.destroy_process_group()
print(json.dumps(found), flush=True)
# a thread of gloo that still winds up would abort the interpreter that leaves before it
os._exit(0)
"""


@pytest.mark.parametrize("size", [2, 4])
def test_processes_find_and_hand_over_what_threads_do(size: int, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(size), str(tmp_path / "store")],
            cwd=Path(collectives.__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for rank in range(size)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(err for _, err in told)
    ranks = [json.loads(out) for out, _ in told]
    cases = [(module, which) for module in MODULES for which in module.cases("tiny", size)]
    assert [key for key, _, _ in ranks[0]] == [which.key for _, which in cases]
    for index, (module, which) in enumerate(cases):
        assert max(rank[index][1] for rank in ranks) < 1e-10, which.key
        assert [rank[index][2] for rank in ranks] == counted(module, which), which.key
