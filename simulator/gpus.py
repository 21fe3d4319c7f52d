"""The accelerators known: memory, bandwidth, rates, link, price, and on what their times would rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulator.calibration import Calibration
from simulator.hardware import Gpu, catalog, cluster, gpu, own, price
from simulator.report import _head, _table
from simulator.units import gib, significant

if TYPE_CHECKING:
    from rich.console import Console

RATES = ("bf16", "fp8", "fp4", "int8")


def document(inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `gpus`; what is not known is null."""
    entries, warnings = [_entry(gpu(name), ships=True) for name in catalog() if name not in own()], []
    for name in own():
        try:
            entries.append(_entry(gpu(name), ships=False))
        except ValueError as error:
            warnings.append(str(error))
    return {**_head(inputs, warnings), "gpus": sorted(entries, key=lambda entry: str(entry["name"]))}


def _entry(part: Gpu, *, ships: bool) -> dict[str, Any]:
    cost, link = price(part), cluster(part).tiers[0]
    return {
        "name": part.name, "title": part.title, "vendor": part.vendor, "architecture": part.architecture, "ships": ships,
        "capacity_bytes": part.capacity_bytes, "usable_bytes": part.usable_bytes, "hbm_bytes_per_s": part.hbm_bytes_per_s or None,
        "dense_flops_per_s": {dtype: part.datasheet.get(dtype) for dtype in RATES},
        "peak_flops_per_s": {dtype: part.peak_flops_per_s(dtype) if part.supports(dtype) else None for dtype in RATES},
        "link": {"name": link.name, "bytes_per_s": link.bytes_per_s, "gpus": link.domain if link.kind != "network" else None},
        "gpus_per_node": part.gpus_per_node, "tdp_w": part.tdp_w or None,
        "price_usd_per_gpu_hour": {end: getattr(cost, end, None) for end in ("low", "typical", "high")},
        "calibration": Calibration.load(part).description,
        "unknown": [*part.assumed, *part.unknown(("tdp_w",))],
        "sources": {**part.sources, **{f"price.{k}": v for k, v in (cost.sources if cost else {}).items()}},
    }  # fmt: skip


def print_gpus(told: dict[str, Any], console: Console) -> None:
    """One line per accelerator."""
    for warning in told["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    rows = []
    for entry in told["gpus"]:
        dollars = entry["price_usd_per_gpu_hour"]["typical"]
        link = entry["link"]
        rows.append([
            entry["name"], gib(entry["capacity_bytes"]), f"{significant(entry['hbm_bytes_per_s'] / 1e12, 3)}" if entry["hbm_bytes_per_s"] else "?",
            *(f"{rate / 1e12:,.0f}" if rate else "" for rate in (entry["dense_flops_per_s"][d] for d in RATES)),
            f"{link['name']} {link['bytes_per_s'] / 1e9:,.0f}" + (f" x {link['gpus']:,}" if link["gpus"] else ""),
            f"{dollars:.2f}" if dollars is not None else "", _basis(entry),
        ])  # fmt: skip
    columns = ["name", "memory", "TB/s", *RATES, "first link GB/s x GPUs", "$/h", "basis"]
    _table(console, f"{len(rows)} accelerators", columns, rows)
    console.print(
        "Rates: dense TFLOP/s (int8: TOP/s) of the datasheet; link: one direction per GPU, and how many GPUs it joins; $/h: typical, on demand,\n"
        "where a dated price was found.  Assumed: figures that times need are not published and taken in proportion to an H200; times carry wide\n"
        "intervals.  Sources, and what is not known: longctx gpus --json.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _basis(entry: dict[str, Any]) -> str:
    """On what a time rests, in few words."""
    told: str = entry["calibration"]
    if "not published" in told:
        return "assumed"
    lender = told.partition(" borrows the shape of ")[2]
    if lender:
        return f"borrows {lender.partition(':')[0]}"
    return "documented priors" if "documented priors" in told else told.removeprefix(f"{entry['name']}: ")


__all__ = ["document", "print_gpus"]
