"""Counter mode: the bytes DRAM really moved, read by Nsight Compute beside the bytes our formulas say.

`python -m microbench.counters OUT` starts `ncu` over a child that runs each case once between markers; caches are flushed
before every kernel and clocks left alone.  A machine that refuses counters is told so in one line.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from microbench.attention import over
from microbench.case import LONGEST_FITTED, Case, case
from microbench.environment import environment
from microbench.run import module_of
from simulator.data import observed
from simulator.hardware import gpu as part_named
from simulator.launch import launch

METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
#: A fill of one-byte numbers separates the cases: no kernel measured here is one.
MARKER = "FillFunctor<signed char>"
COLUMNS = ("kernel", "impl", "dtype", "shape", "kernels", "dram_bytes", "hbm_bytes", "launched_bytes")


def cases() -> list[Case]:
    """Products, prefill, decode and norms of several sizes."""
    found = [
        case("gemm", "cublas", dtype, m=m, n=n, k=k)
        for dtype, m, n, k in (
            ("bf16", 16, 28672, 4096), ("bf16", 256, 8192, 8192), ("bf16", 1024, 28672, 4096), ("bf16", 4096, 4096, 14336),
            ("bf16", 4096, 6144, 4096), ("bf16", 8192, 8192, 8192), ("bf16", 16384, 28672, 4096), ("bf16", 2048, 128256, 4096),
            ("bf16", 16384, 7168, 2304), ("bf16", 8192, 57344, 8192), ("fp8", 8192, 8192, 8192), ("fp8", 4096, 28672, 4096),
        )
    ]  # fmt: skip
    for layout, length in (
        ((32, 8, 128, 128), 2048), ((32, 8, 128, 128), 8192), ((8, 1, 128, 128), 32768), ((64, 8, 64, 64), 8192),
        ((32, 32, 128, 128), 16384), ((32, 8, 128, 128), 65536), ((8, 1, 128, 128), 131072), ((32, 32, 128, 128), 131072),
        ((64, 8, 64, 64), 131072), ((4, 1, 128, 128), 262144), ((4, 1, 128, 128), 524288),
    ):  # fmt: skip
        for impl in ("cudnn", "flash2"):
            found.append(over("attention", impl, "bf16", layout, tokens=length, context=length))
            if length in (2048, 8192, 16384, 131072) and (impl == "cudnn" or length < LONGEST_FITTED):
                found.append(over("attention_backward", impl, "bf16", layout, tokens=length, context=length))
    for impl, dtype in (("triton", "bf16"), ("triton", "fp8"), ("flash2", "bf16")):
        for batch, context in ((1, 131072), (16, 16384), (64, 4096)):
            found.append(over("decode_attention", impl, dtype, (32, 8, 128, 128), sequences=batch, tokens=1, context=context))
    for batch, context in ((1, 131072), (16, 16384)):
        found.append(over("latent_attention", "triton", "bf16", (128, 1, 576, 512), sequences=batch, tokens=1, context=context))
    for impl in ("norm", "activation", "copy"):
        found += [case("elementwise", impl, "bf16", rows=rows, width=4096) for rows in (4096, 16384, 65536)]
    return [*found, case("elementwise", "stream", "bf16", rows=1, width=2**30)]


def child() -> None:
    """Run every case once between markers (under ncu)."""
    device = torch.device("cuda", 0)
    marker = torch.empty(64, dtype=torch.int8, device=device)
    for which in cases():
        torch.cuda.empty_cache()
        prepared = module_of(which.kernel).prepare(which, device)
        prepared.run(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        marker.fill_(1)
        prepared.run(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del prepared
    torch.cuda.profiler.start()
    marker.fill_(1)
    torch.cuda.profiler.stop()


def parse(text: str) -> list[tuple[int, float]]:
    """The CSV of ncu -> for each stretch between markers, how many kernels and how many DRAM bytes.

    >>> head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    >>> lines = [head, '"0","FillFunctor<signed char>","dram__bytes_read.sum","byte","32"',
    ...     '"1","gemm","dram__bytes_read.sum","Mbyte","1.5"', '"1","gemm","dram__bytes_write.sum","byte","1,000"']
    >>> parse(chr(10).join(lines))
    [(1, 1501000.0)]
    """
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    found: list[tuple[set[str], float]] = []
    at = ""
    for row in csv.DictReader(io.StringIO("\n".join(lines[first:]))):
        if MARKER in row["Kernel Name"]:
            if row["ID"] != at:
                found.append((set(), 0.0))
            at = row["ID"]
            continue
        scale = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}[row["Metric Unit"]]
        kernels, moved = found[-1]
        found[-1] = (kernels | {row["ID"]}, moved + float(row["Metric Value"].replace(",", "")) * scale)
    return [(len(kernels), moved) for kernels, moved in found if kernels]


#: The share of the L2 cache that still holds written data when a kernel ends.
DIRTY = observed("dirty")


def written(which: Case) -> float:
    """Bytes a kernel writes last: its output."""
    if which.kernel == "gemm":
        return 2.0 * which["m"] * which["n"]
    if which.kernel == "elementwise":
        return float(module_of(which.kernel).op(which).hbm_bytes) / (3 if which.impl == "activation" else 2)
    return 2.0 * which["sequences"] * which["tokens"] * which["heads"] * which["v_head_dim"]


def expected(which: Case, gpu: str) -> float:
    """What the counters of one kernel on cold caches should show: launched traffic without what is still to be written back."""
    part = part_named(gpu)
    launched = launch(module_of(which.kernel).op(which), part)
    return float(launched.hbm_bytes) - min(written(which), DIRTY * float(part.l2_bytes))


def rows(parsed: Iterable[tuple[int, float]], gpu: str) -> list[dict[str, object]]:
    """Counted, compulsory and launched bytes side by side."""
    part = part_named(gpu)
    found = []
    for which, (kernels, moved) in zip(cases(), parsed, strict=False):
        op = module_of(which.kernel).op(which)
        found.append({
            "kernel": which.kernel, "impl": which.impl, "dtype": which.dtype, "shape": which.extents, "kernels": kernels,
            "dram_bytes": f"{moved:.6g}", "hbm_bytes": f"{float(op.hbm_bytes):.6g}",
            "launched_bytes": f"{float(launch(op, part).hbm_bytes):.6g}",
        })  # fmt: skip
    return found


def count(folder: Path) -> Path | str:
    """Count all cases into a file of `folder`, or say in a line why not."""
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        return "DRAM counters: not measured (needs a CUDA GPU and Nsight Compute's ncu on the PATH)"
    facts = environment(torch.device("cuda", 0))
    options = ["--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", METRICS]
    command = [ncu, *options, sys.executable, "-m", "microbench.counters", "--child"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (ncu, on this module)
    if '"ID"' not in done.stdout:
        reason = next((line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line.upper()), "no reason given")
        return f"DRAM counters: not measured; ncu says: {reason.strip()}"
    stamp = str(facts["date"]).replace(":", "").replace("-", "")
    file = folder / f"counters-{stamp}.csv"
    with file.open("x", encoding="utf-8", newline="") as out:
        out.writelines(f"# {key} = {value}\n" for key, value in facts.items())
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows(parse(done.stdout), str(facts["gpu"])))
    return file


if __name__ == "__main__":
    if "--child" in sys.argv:
        child()
    else:
        print(count(Path(sys.argv[1])))
