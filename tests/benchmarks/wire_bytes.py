"""What crosses the wire, by the counters of a network interface: `python tests/benchmarks/wire_bytes.py [RANKS]` (Linux, root).

Each rank is a process in a network namespace of its own; virtual Ethernet cables join them to a bridge.  gloo runs a ring
(pass-KV, forward and backward), an all-gather and Ulysses over it, and what the kernel counts as sent is held against the
simulator's wire bytes.  The counter adds frame headers and acknowledgements (66 bytes a segment of up to 64 KiB).

Run once with 3 ranks (torch 2.13, Linux 6.18; the most of any rank): ring +0.15 %, its backward +0.15 %, all-gather +0.30 %,
Ulysses +0.20 % over the prediction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
RUNS = 8


def sent_bytes(interface: str) -> int:
    """Bytes sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    message = f"{interface}: no such interface here"
    raise ValueError(message)


def rank_main(rank: int, ranks: int, file: Path) -> None:
    """One rank: every case, its counted and predicted bytes beside the counter's."""
    import torch
    import torch.distributed as dist

    from microbench.ring import context, ulysses
    from microbench.ring.program import over
    from microbench.ring.transport import Distributed
    from simulator.work import fold, quantity

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29400", rank=rank, world_size=ranks)
    found = []
    for module, impl, backward in (
        (context, "ring_kv.zigzag", False), (context, "ring_kv.zigzag", True), (context, "gather.zigzag", False), (ulysses, "ulysses", False),
    ):  # fmt: skip
        which = over(impl, (ranks, ranks, 256), ranks=ranks, tokens=1024, backward=backward)
        transport = Distributed.world()
        once = module.build(which, transport, torch.device("cpu"))
        once()
        dist.barrier()
        transport.counted.clear()
        before = sent_bytes(f"e{rank}")
        for _ in range(RUNS):
            once()
        dist.barrier()
        time.sleep(0.2)  # the last acknowledgements
        sent = sent_bytes(f"e{rank}") - before
        predicted = RUNS * float(fold(module.work(which), quantity("wire_bytes")))
        found.append({
            "case": f"{impl}{' backward' if backward else ''}", "sent": sent, "predicted": predicted, "counted": sum(transport.counted.values()),
        })  # fmt: skip
    file.write_text(json.dumps(found))
    dist.destroy_process_group()


def ip(*words: str, inside: int | None = None) -> None:
    """An `ip` command, here or in the namespace of a process."""
    entered = [] if inside is None else ["nsenter", "-t", str(inside), "-n"]
    subprocess.run([*entered, "ip", *words], check=True)


def bridge_main(ranks: int) -> int:
    """In a namespace of its own: the bridge, the cables, the ranks."""
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "set", "br0", "up")
    homes = [subprocess.Popen(["unshare", "-n", "sleep", "600"]) for _ in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            time.sleep(0.5)
            for rank, home in enumerate(homes):
                ip("link", "add", f"v{rank}", "type", "veth", "peer", "name", f"e{rank}")
                ip("link", "set", f"e{rank}", "netns", str(home.pid))
                ip("link", "set", f"v{rank}", "master", "br0", "up")
                ip("addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"e{rank}", inside=home.pid)
                ip("link", "set", f"e{rank}", "up", inside=home.pid)
                ip("link", "set", "lo", "up", inside=home.pid)
            files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
            running = [
                subprocess.Popen(
                    ["nsenter", "-t", str(home.pid), "-n", sys.executable, __file__, "rank", str(rank), str(ranks), str(files[rank])],
                    env=os.environ | {"GLOO_SOCKET_IFNAME": f"e{rank}"},
                )
                for rank, home in enumerate(homes)
            ]
            codes = [process.wait(timeout=300) for process in running]
            if any(codes):
                return 1
            rows = [json.loads(file.read_text()) for file in files]
        finally:
            for home in homes:
                home.kill()
    worst = 0.0
    for rank, row in enumerate(rows):
        for one in row:
            excess = one["sent"] / one["predicted"] - 1
            worst = max(worst, abs(excess))
            print(f"rank {rank}  {one['case']:24}  predicted {one['predicted']:13,.0f}  sent {one['sent']:13,}  {excess:+.2%}")
    print(f"worst {worst:.2%}")
    return int(worst > 0.02)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    elif sys.argv[1:2] == ["bridge"]:
        sys.exit(bridge_main(int(sys.argv[2])))
    else:
        sys.exit(subprocess.run(["unshare", "-n", sys.executable, __file__, "bridge", *(sys.argv[1:] or ["3"])], check=False).returncode)
