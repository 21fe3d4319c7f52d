"""Kernels that stream rows: norm, rotary, activation, gathers, sums, keys put together, plain copies; copies between host and device;
empty launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from microbench.case import HANDED, Case, Prepared, case, l2_of, relative, sets_for
from simulator.kernels import elementwise
from simulator.kernels.host_copy import host_copy
from simulator.work import Op

KERNELS: tuple[str, ...] = ("elementwise", "host_copy", "launch")
WIDTHS = (2048, 4096, 8192, 16384)
ROWS = (1, 16, 128, 1024, 4096, 16384, 65536)
#: Rows handed from kernel to kernel: a width of 4096 fills an H200's L2 cache from 1,900 (norm) to 3,800 (copy) on.
HANDED_ROWS = (128, 256, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096)
STREAMS = ("read", "write", "stream")
#: Between tokens and the rows of their experts.
ROUTED = ("permute", "combine")
#: Small kernels that take turns in one graph: what is more than the sum of each by itself is the cost of going from kernel to kernel.
TURNS = (
    case("elementwise", "norm", "bf16", rows=1, width=2048),
    case("elementwise", "rotary", "bf16", rows=1, width=4608, heads=36, head_dim=128),
    case("elementwise", "copy", "bf16", rows=1, width=1024),
    case("elementwise", "permute", "bf16", tokens=1, routed=8, width=2048),
    case("elementwise", "activation", "bf16", rows=8, width=768),
    case("elementwise", "combine", "bf16", tokens=1, routed=8, width=2048),
)
TURN = case("launch", "turns", "bf16", rows=1)
#: Width of a rotated head where a case names none.
HEAD_DIM = 128
EPS = 1e-5


def cases(suite: str) -> list[Case]:
    """Each kernel over rows and widths; streams over sizes; host copies; launches."""
    if suite == "tiny":
        return [
            *(case("elementwise", impl, "bf16", rows=8, width=64) for impl in ("norm", "activation", "copy", "add", "stream", "read", "write")),
            *(case("elementwise", impl, "bf16", tokens=4, routed=8, width=64) for impl in ROUTED),
            case("elementwise", "join", "bf16", rows=8, heads=2, plain=64, turned=32),
            case("elementwise", "rotary", "bf16", rows=8, width=128, heads=2),
            case("host_copy", "to_device", "bf16", bytes=1 << 12),
            case("launch", "eager", "bf16", rows=1),
            TURN,
        ]
    quick = suite == "quick"
    found = []
    for index, width in enumerate(WIDTHS[1:2] if quick else WIDTHS):
        for impl in ("norm", "activation", "copy"):
            rows = (16, 4096, 16384) if quick else ROWS
            found += [case("elementwise", impl, "bf16", rows=r, width=width) for r in rows if r * width < 2**30]
        heads = (10, 40, 72, 9)[index]
        found += [case("elementwise", "rotary", "bf16", rows=r, width=128 * heads, heads=heads) for r in ((16, 4096) if quick else ROWS)]
    sizes = (20, 24, 28, 32) if quick else tuple(range(16, 35, 2))
    found += [case("elementwise", impl, "bf16", rows=1, width=2**s // 2) for impl in STREAMS for s in sizes]
    wanted = (512, 2048) if quick else HANDED_ROWS
    for impl in ("norm", "activation", "copy"):
        found += [case("elementwise", impl, "bf16", regime=HANDED, rows=r, width=4096) for r in wanted]
    for heads in (32, 72):
        found += [case("elementwise", "rotary", "bf16", regime=HANDED, rows=r, width=128 * heads, heads=heads) for r in wanted]
    if not quick:
        found += _between()
    sizes = (20, 28) if quick else (12, 16, 20, 24, 28, 30)
    found += [case("host_copy", impl, "bf16", bytes=2**s) for impl in ("to_device", "to_host") for s in sizes]
    return found + [case("launch", impl, "bf16", rows=1) for impl in ("eager", "graph", "turns")]


def _between() -> list[Case]:
    """What stands between the products of some layers: rows to experts and back, keys put together, sums."""
    found = []
    for regime, counts in (("steady", (1, 16, 128, 1024, 8192, 32768)), (HANDED, (256, 512, 1024, 2048, 8192, 32768))):
        for experts, width in ((8, 2048), (4, 2880)):
            for impl in ROUTED:
                found += [case("elementwise", impl, "bf16", regime=regime, tokens=t, routed=experts * t, width=width) for t in counts]
        for heads in (16, 128):
            found += [case("elementwise", "join", "bf16", regime=regime, rows=r, heads=heads, plain=128, turned=64) for r in counts]
        for width in (2048, 7168):
            found += [case("elementwise", "add", "bf16", regime=regime, rows=r, width=width) for r in counts]
    return found


def op(which: Case) -> Op:
    """Quantities: what is read and written once, found in memory or, in the regime for it, where the kernel before left it."""
    found = _op(which)
    if which.kernel == "elementwise":
        found.shape = {**found.shape, "handed_bytes": float(found.live_bytes) if which.regime == HANDED else 0.0}
    return found


def _op(which: Case) -> Op:
    if which.kernel == "host_copy":
        return host_copy("copy", moved_bytes=float(which["bytes"]), direction=which.impl)
    if which.kernel == "launch":
        return elementwise.copy("launch", rows=1.0, width=1.0)
    if which.impl in ROUTED:
        between = elementwise.permute if which.impl == "permute" else elementwise.combine
        return between(which.impl, tokens=float(which["tokens"]), rows=float(which["routed"]), width=float(which["width"]))
    rows = float(which["rows"])
    if which.impl == "join":
        return elementwise.join("join", rows=rows, heads=float(which["heads"]), plain=which["plain"], turned=which["turned"])
    width = float(which["width"])
    if which.impl in STREAMS:
        read, written = {"read": (width, 0.0), "write": (0.0, width), "stream": (width, width)}[which.impl]
        return elementwise.elementwise(which.impl, rows=rows, read=read, written=written, impl=which.impl)
    if which.impl == "rotary":
        return elementwise.rotary("rotary", tokens=rows, width=width)
    if which.impl in ("copy", "add"):
        by_rows = elementwise.copy if which.impl == "copy" else elementwise.add
        return by_rows(which.impl, rows=rows, width=width)
    by_tokens = elementwise.norm if which.impl == "norm" else elementwise.activation
    return by_tokens(which.impl, tokens=rows, width=width)


def prepare(which: Case, device: Any) -> Prepared:
    """Random rows; gathers draw distinct rows of a table twice as long."""
    if which.kernel == "host_copy":
        return _host_copy(which, device)
    if which.impl == "turns":
        members = [prepare(member, device) for member in TURNS]
        return Prepared(lambda i: [one.run(i % one.sets) for one in members], max(one.sets for one in members), hot=True)
    if which.kernel == "launch":
        cell = torch.zeros(1, device=device)
        return Prepared(lambda _: cell.zero_(), graphable=which.impl == "graph", hot=True)
    sets, hot = sets_for(float(op(which).hbm_bytes), l2_of(device))
    if which.regime == HANDED:
        sets, hot = 1, True
    run = _kernel(which, device, sets)
    return Prepared(run, sets, hot=hot)


def _kernel(which: Case, device: Any, sets: int) -> Callable[[int], Any]:
    inputs = _inputs(which, device, sets)
    if which.impl in ROUTED or which.impl == "join":
        return _moved(which, device, inputs)
    rows, width = which["rows"], which["width"]
    if which.impl == "add":
        return lambda i: inputs["x"][i].add_(inputs["residual"][i])
    if which.impl == "stream":
        source, out = inputs["x"], torch.empty(sets, rows, width, device=device, dtype=torch.bfloat16)
        return lambda i: out[i].copy_(source[i])
    if which.impl == "read":
        source = inputs["x"].view(torch.int32) if width % 2 == 0 else inputs["x"]
        return lambda i: source[i].amax()
    if which.impl == "write":
        out = torch.empty(sets, rows, width, device=device, dtype=torch.bfloat16)
        return lambda i: out[i].fill_(1.5)
    if device.type != "cuda":
        return lambda i: expected(which, {name: value[i] for name, value in inputs.items()})
    from microbench import kernels_triton as kernels  # noqa: PLC0415 (needs a GPU)

    out = torch.empty(sets, rows, width, device=device, dtype=torch.bfloat16)
    x = inputs["x"]
    if which.impl == "norm":
        added = torch.empty_like(out)
        return lambda i: kernels.norm(x[i], inputs["residual"][i], inputs["weight"][i], out[i], added[i], EPS)
    if which.impl == "activation":
        return lambda i: kernels.activation(x[i], out[i])
    if which.impl == "rotary":
        return lambda i: kernels.rotary(x[i], inputs["table"][i], inputs["index"][i], which["heads"], which.get("head_dim", HEAD_DIM))
    return lambda i: kernels.gather(x[i], inputs["index"][i], out[i])


def _moved(which: Case, device: Any, inputs: dict[str, Any]) -> Callable[[int], Any]:
    """Rows to experts and back, and keys put together."""
    if device.type != "cuda":
        return lambda i: expected(which, {name: value[i] for name, value in inputs.items()})
    from microbench import kernels_triton as kernels  # noqa: PLC0415 (needs a GPU)

    out = torch.empty(len(inputs["x"]), *_result(which), device=device, dtype=torch.bfloat16)
    x = inputs["x"]
    if which.impl == "permute":
        return lambda i: kernels.gather(x[i], inputs["index"][i], out[i])
    if which.impl == "combine":
        return lambda i: kernels.combine(x[i], inputs["index"][i], inputs["share"][i], out[i])
    return lambda i: kernels.assemble_keys(x[i], inputs["turned"][i], out[i])


def _result(which: Case) -> tuple[int, ...]:
    """The shape of what a case writes."""
    if which.impl == "join":
        return which["rows"], which["heads"], which["plain"] + which["turned"]
    if which.impl in ROUTED:
        return which["routed" if which.impl == "permute" else "tokens"], which["width"]
    return which["rows"], which["width"]


def _routing(which: Case, device: Any, sets: int) -> dict[str, Any]:
    """Rows of every token, sorted by expert: a random order, in which a token's own rows lie apart."""
    tokens, routed, width = which["tokens"], which["routed"], which["width"]
    if routed % tokens:
        message = f"routed={routed}: is not a multiple of tokens={tokens}"
        raise ValueError(message)
    orders = [torch.randperm(routed, device=device) for _ in range(sets)]
    if which.impl == "permute":
        sources = torch.stack([(order // (routed // tokens)).to(torch.int32) for order in orders])
        return {"x": torch.randn(sets, tokens, width, device=device, dtype=torch.bfloat16), "index": sources}
    return {
        "x": torch.randn(sets, routed, width, device=device, dtype=torch.bfloat16),
        "index": torch.stack([order.view(tokens, -1).to(torch.int32) for order in orders]),
        "share": torch.rand(sets, tokens, routed // tokens, device=device).to(torch.bfloat16),
    }


def _inputs(which: Case, device: Any, sets: int) -> dict[str, Any]:
    if which.impl in ROUTED:
        return _routing(which, device, sets)
    rows = which["rows"]
    if which.impl == "join":
        heads, plain, turned = which["heads"], which["plain"], which["turned"]
        return {  # values lie beside the keys' own parts
            "x": torch.randn(sets, rows, heads, 2 * plain, device=device, dtype=torch.bfloat16)[..., :plain],
            "turned": torch.randn(sets, rows, turned, device=device, dtype=torch.bfloat16),
        }
    width = which["width"]
    columns = 2 * width if which.impl == "activation" else width
    height = 2 * rows if which.impl == "copy" else rows
    found = {} if which.impl == "write" else {"x": torch.randn(sets, height, columns, device=device, dtype=torch.bfloat16)}
    if which.impl in ("norm", "add"):
        found["residual"] = torch.randn(sets, rows, width, device=device, dtype=torch.bfloat16)
    if which.impl == "norm":
        found["weight"] = torch.rand(sets, width, device=device, dtype=torch.bfloat16)
    if which.impl == "copy":
        found["index"] = torch.stack([torch.randperm(height, device=device)[:rows].to(torch.int32) for _ in range(sets)])
    if which.impl == "rotary":
        head_dim = which.get("head_dim", HEAD_DIM)
        angles = torch.rand(rows, head_dim // 2, device=device) * 6.28
        found["table"] = torch.cat([angles.cos(), angles.sin()], 1).expand(sets, rows, head_dim)
        found["index"] = torch.arange(rows, device=device, dtype=torch.int32).expand(sets, rows)
    return found


def expected(which: Case, given: dict[str, Any]) -> Any:
    """The kernel's result by plain PyTorch, in the precision of the inputs."""
    x = given["x"]
    if which.impl == "norm":
        added = x + given["residual"]
        return added * torch.rsqrt((added * added).mean(-1, keepdim=True) + EPS) * given["weight"]
    if which.impl == "add":
        return x + given["residual"]
    if which.impl == "join":
        return torch.cat([x, given["turned"][:, None].expand(-1, x.shape[1], -1)], -1)
    if which.impl == "combine":
        return (given["share"][..., None] * x[given["index"].long()]).sum(1)
    if which.impl == "activation":
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    if which.impl == "rotary":
        first, second = x.view(x.shape[0], -1, 2, which.get("head_dim", HEAD_DIM) // 2).unbind(2)
        cosine, sine = (t[:, None].to(x.dtype) for t in given["table"].chunk(2, dim=-1))
        return torch.stack([first * cosine - second * sine, second * cosine + first * sine], 2).reshape(x.shape)
    return x[given["index"].long()]


def error(which: Case, device: Any) -> float:
    """Against the same in float64, on up to 64 rows, outputs poisoned by the allocator's fill."""
    if which.kernel != "elementwise" or which.impl in STREAMS or device.type != "cuda":
        return 0.0
    from microbench import kernels_triton as kernels  # noqa: PLC0415 (needs a GPU)

    small = dict(which.shape)
    if which.impl in ROUTED:
        small |= {"tokens": 48, "routed": 48 * (which["routed"] // which["tokens"])}
    else:
        small["rows"] = min(which["rows"], 64)
    which = Case(which.kernel, which.impl, which.dtype, tuple(small.items()))
    given = {name: value[0] for name, value in _inputs(which, device, 1).items()}
    want = expected(which, {n: v.double() if v.is_floating_point() else v for n, v in given.items()})
    out = torch.full(_result(which), float("nan"), device=device, dtype=torch.bfloat16)
    if which.impl == "norm":
        kernels.norm(given["x"], given["residual"], given["weight"], out, torch.empty_like(out), EPS)
    elif which.impl == "activation":
        kernels.activation(given["x"], out)
    elif which.impl == "rotary":
        out = given["x"].clone()
        kernels.rotary(out, given["table"].contiguous(), given["index"], which["heads"], which.get("head_dim", HEAD_DIM))
    elif which.impl == "add":
        out = given["x"].clone().add_(given["residual"])
    elif which.impl == "join":
        kernels.assemble_keys(given["x"], given["turned"], out)
    elif which.impl == "combine":
        kernels.combine(given["x"], given["index"], given["share"], out)
    else:
        kernels.gather(given["x"], given["index"], out)
    return relative(out.double(), want)


def _host_copy(which: Case, device: Any) -> Prepared:
    pinned = torch.empty(which["bytes"], dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(which["bytes"], dtype=torch.uint8, device=device)
    if which.impl == "to_device":
        return Prepared(lambda _: there.copy_(pinned, non_blocking=True), graphable=False)
    return Prepared(lambda _: pinned.copy_(there, non_blocking=True), graphable=False)
