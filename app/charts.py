"""Vega-Lite specifications of the pictures, from values as the library gives them.  Units are told by axis labels, never by arithmetic here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simulator.curves import CacheShare, Curve
from simulator.figures import ContextWindow, LengthCost, Series
from simulator.units import show_tokens

Spec = dict[str, Any]

_TOKENS = (
    "datum.value >= 1048576 ? format(datum.value / 1048576, '~g') + 'M' : "
    "datum.value >= 1024 ? format(datum.value / 1024, '~g') + 'K' : format(datum.value, '~g')"
)
_SECONDS = (
    "datum.value >= 1 ? format(datum.value, ',') + ' s' : "
    "datum.value >= 0.001 ? format(datum.value * 1000, '~r') + ' ms' : format(datum.value * 1000000, '~r') + ' us'"
)
_DOLLARS = "'$' + (datum.value >= 1 ? format(datum.value, ',') : format(datum.value, '~r'))"
_GIB = "format(datum.value / 1073741824, '~r') + ' GiB'"
_BYTES = (
    "datum.value >= 1125899906842624 ? format(datum.value / 1125899906842624, '~r') + ' PiB' : "
    "datum.value >= 1099511627776 ? format(datum.value / 1099511627776, '~r') + ' TiB' : datum.value >= 1073741824 ? "
    "format(datum.value / 1073741824, '~r') + ' GiB' : datum.value >= 1048576 ? format(datum.value / 1048576, '~r') + ' MiB' : "
    "datum.value >= 1024 ? format(datum.value / 1024, '~r') + ' KiB' : format(datum.value, '~r') + ' B'"
)
_POWERS_OF_TWO = [2**k for k in range(41)]
_POWERS_OF_32 = [2.0**k for k in [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]]
_TENS = [10.0**k for k in range(-9, 25)]
_STEPS = [step * ten for ten in _TENS for step in (1, 2, 5)]
_TOP = {"orient": "top", "title": None, "columns": 2, "labelLimit": 400, "offset": 4, "padding": 0}
_TWENTY_GIB = [20 * 2**30 * k for k in range(400)]
_MUTED = "#8a8f98"
_MARKED = "#eb5757"


def _length(field: str, title: str, values: Sequence[float], *, every: int = 2) -> Spec:
    """A base-2 axis of tokens."""
    return {
        "field": field, "type": "quantitative", "title": title,
        "scale": {"type": "log", "base": 2, "domain": [min(values), max(values)]},
        "axis": {"values": _POWERS_OF_TWO[::every], "labelExpr": _TOKENS, "grid": False, "labelFlush": False},
    }  # fmt: skip


def _log(field: str, title: str | None, label: str, ticks: Sequence[float], domain: Sequence[float]) -> Spec:
    return {
        "field": field, "type": "quantitative", "title": title, "scale": {"type": "log", "domain": list(domain), "nice": False},
        "axis": {"values": [tick for tick in ticks if domain[0] <= tick <= domain[1]], "labelExpr": label, "labelLimit": 80, "labelOverlap": "greedy"},
    }  # fmt: skip


def _around(values: Sequence[float], ticks: Sequence[float]) -> list[float]:
    """The ticks that just enclose the values."""
    return [max(t for t in ticks if t <= min(values)), min(t for t in ticks if t >= max(values))]


def _chart(height: int, layers: list[Spec], rows: list[Spec] | None = None) -> Spec:
    return {"height": height, "data": {"values": rows or []}, "layer": layers}


# ---- Size


def memory(parts: dict[str, float], driver_bytes: float) -> Spec:
    """What one GPU holds, stacked, against what the engine may use and what the driver offers."""
    names = [name for name, size in parts.items() if size and name not in ("total", "usable")]
    rows = [{"part": name, "bytes": parts[name], "order": i, "gpu": "fullest GPU"} for i, name in enumerate(names)]
    limits = [{"limit": "the engine may use", "at": parts["usable"]}, {"limit": "the driver offers", "at": driver_bytes}]
    axis = {"labelExpr": _GIB, "values": _TWENTY_GIB, "grid": False, "labelOverlap": "greedy"}
    return {
        "height": 170,
        "layer": [
            {
                "data": {"values": rows}, "mark": {"type": "bar", "height": 34},
                "encoding": {
                    "x": {"field": "bytes", "type": "quantitative", "title": None, "axis": axis, "stack": "zero"},
                    "y": {"field": "gpu", "type": "nominal", "title": None, "axis": None},
                    "color": {"field": "part", "type": "nominal", "sort": names, "legend": {**_TOP, "columns": 5}},
                    "order": {"field": "order", "type": "quantitative"},
                    "tooltip": [{"field": "part"}, {"field": "bytes", "format": ",.0f", "title": "bytes"}],
                },
            },
            {
                "data": {"values": limits}, "mark": {"type": "rule", "strokeWidth": 2, "color": _MUTED},
                "encoding": {
                    "x": {"field": "at", "type": "quantitative"},
                    "strokeDash": {
                        "field": "limit", "type": "nominal", "sort": [limit["limit"] for limit in limits],
                        "legend": {**_TOP, "orient": "bottom", "symbolType": "stroke"},
                    },
                    "tooltip": [{"field": "limit"}, {"field": "at", "format": ",.0f", "title": "bytes"}],
                },
            },
        ],
    }  # fmt: skip


def cache(shares: Sequence[CacheShare]) -> Spec:
    """Bytes each kind of layer keeps per token of the context, all its layers together."""
    rows = [
        {"kind": f"{share.layers:,.0f} x {share.kind}", "keeps": share.keeps, "bytes": share.token_bytes, "sequence": share.sequence_bytes}
        for share in shares
    ]
    keeps, kinds = {share.keeps for share in shares}, {row["kind"] for row in rows}
    plain = {"labelExpr": "format(datum.value, ',') + ' B'", "tickCount": 4, "grid": False}
    return {
        "height": 90 + 30 * len(kinds), "data": {"values": rows},
        "mark": {"type": "bar", "height": 20},
        "encoding": {
            "x": {"field": "bytes", "type": "quantitative", "title": None, "axis": plain},
            "y": {"field": "kind", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 330}},
            "color": {"field": "keeps", "type": "nominal", "legend": _TOP if len(keeps) > 1 else None},
            "tooltip": [
                {"field": "kind"}, {"field": "keeps"}, {"field": "bytes", "format": ",.1f", "title": "bytes per token"},
                {"field": "sequence", "format": ",.0f", "title": "bytes of a sequence"},
            ],
        },
    }  # fmt: skip


def _over_context(curve: Curve, asked: int, lines: dict[str, Any], label: str) -> Spec:
    """Lines over the context, dashed where the requests no longer fit; the asked context ringed and its value told by the tooltip."""
    contexts, fits = curve.contexts.tolist(), curve.fits.tolist()
    rows = [
        {"context": context, "value": value, "line": name, "fits": fit, "asked": context == asked}
        for name, values in lines.items()
        for context, value, fit in zip(contexts, values.tolist(), fits, strict=True)
    ]
    domain = _around([row["value"] for row in rows], _STEPS)
    tens = [ten for ten in _TENS if domain[0] <= ten <= domain[1]]
    x, y = _length("context", "context, tokens", contexts), _log("value", None, label, tens if len(tens) > 2 else _STEPS, domain)  # noqa: PLR2004
    colour: Spec = {"field": "line", "type": "nominal", "sort": list(lines), "legend": _TOP if len(lines) > 1 else None}
    tooltip = [{"field": "line"}, {"field": "context", "format": ","}, {"field": "value", "format": ".4~g"}, {"field": "fits"}]
    line = {"x": x, "y": y, "color": colour, "tooltip": tooltip}
    # the last length that fits starts the dashed part, so the two join
    last = max((context for context, fit in zip(contexts, fits, strict=True) if fit), default=0.0)
    return _chart(
        240,
        [
            {"transform": [{"filter": "datum.fits"}], "mark": {"type": "line", "point": {"size": 22}, "clip": True}, "encoding": line},
            {
                "transform": [{"filter": f"!datum.fits || datum.context == {last}"}],
                "mark": {"type": "line", "strokeDash": [3, 4], "opacity": 0.7, "clip": True}, "encoding": line,
            },
            {
                "transform": [{"filter": "datum.asked"}],
                "mark": {"type": "point", "shape": "circle", "size": 130, "filled": False, "strokeWidth": 2.5, "color": _MARKED},
                "encoding": {"x": x, "y": y, "tooltip": tooltip},
            },
        ],
        rows,
    )  # fmt: skip


def first_token(curve: Curve, asked: int) -> Spec:
    """TTFT of a cold prompt over the context."""
    return _over_context(curve, asked, {"TTFT": curve.ttft_s}, _SECONDS)


def next_token(curve: Curve, asked: int) -> Spec:
    """TPOT over the context."""
    return _over_context(curve, asked, {"TPOT": curve.tpot_s}, _SECONDS)


def price(curve: Curve, asked: int) -> Spec:
    """Dollars per million tokens over the context."""
    return _over_context(curve, asked, {"output": curve.usd_per_million_output, "input": curve.usd_per_million_input}, _DOLLARS)


# ---- Attention


def _lines(x: str, title: str, at: Sequence[float], series: Sequence[Series], y: Spec, *, columns: int = 1, dashed: bool = True) -> Spec:
    rows = [
        {x: here, "value": value, "line": _named(line, dashed=dashed), "growth": line.growth}
        for line in series
        for here, value in zip(at, line.along.tolist(), strict=True)
    ]
    names = [_named(line, dashed=dashed) for line in series]
    encoding: Spec = {
        "x": _length(x, title, at), "y": y,
        "color": {"field": "line", "type": "nominal", "sort": names, "legend": {**_TOP, "columns": columns}},
        "tooltip": [
            {"field": "line"}, {"field": "growth", "title": "grows with"}, {"field": x, "format": ",.0f"}, {"field": "value", "format": ".4~g"},
        ],
    }
    if dashed:
        patterns = {"domain": ["N²", "N", "1"], "range": [[1, 0], [7, 3], [2, 3]]}
        encoding["strokeDash"] = {"field": "growth", "type": "nominal", "legend": None, "scale": patterns}
    layers: list[Spec] = [{"mark": {"type": "line", "clip": True, "strokeWidth": 2}, "encoding": encoding}]
    marks = [{x: line.mark, "line": _named(line, dashed=dashed)} for line in series if line.mark is not None]
    if marks:
        tip = [{"field": "line"}, {"field": x, "format": ",.0f", "title": "trained on"}]
        layers.append({
            "data": {"values": marks}, "mark": {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5, "opacity": 0.8},
            "encoding": {"x": encoding["x"], "color": encoding["color"], "tooltip": tip},
        })  # fmt: skip
    return _chart(380, layers, rows)


def _named(line: Series, *, dashed: bool) -> str:
    return f"{line.name} ({line.growth})" if dashed else line.name


_FLOPS = (
    "datum.value >= 1e18 ? format(datum.value / 1e18, '~r') + ' EFLOP' : datum.value >= 1e15 ? format(datum.value / 1e15, '~r') + ' PFLOP' : "
    "datum.value >= 1e12 ? format(datum.value / 1e12, '~r') + ' TFLOP' : format(datum.value / 1e9, '~r') + ' GFLOP'"
)


def compute(cost: LengthCost) -> Spec:
    """FLOPs of one prompt over its length."""
    domain = _around([v for line in cost.compute for v in line.along.tolist()], _TENS)
    y = _log("value", None, _FLOPS, _TENS, domain)
    return _lines("tokens", "tokens of the prompt", cost.tokens.tolist(), cost.compute, y)


def held(cost: LengthCost) -> Spec:
    """Bytes of one prompt over its length."""
    domain = _around([v for line in cost.memory for v in line.along.tolist()], _POWERS_OF_32)
    y = _log("value", None, _BYTES, _POWERS_OF_32[::2], domain)
    return _lines("tokens", "tokens of the prompt", cost.tokens.tolist(), cost.memory, y)


def decay(distances: Sequence[float], series: Sequence[Series]) -> Spec:
    """The bound on how a score may depend on distance."""
    y = {
        "field": "value", "type": "quantitative", "title": "bound, relative to distance 0", "scale": {"domain": [0, 1.05]}, "axis": {"format": ".1f"},
    }  # fmt: skip
    return _lines("distance", "distance between two tokens", distances, series, y, dashed=False)


def heads(document: dict[str, Any]) -> Spec:
    """Elements cached per token and layer by head type, on a log scale: bars from 1, so that they are drawn at all."""
    rows = [
        {
            "heads": t["name"], "what": t["what"], "elements": t["elements_per_token_per_layer"], "from": 1,
            "told": f"{t['elements_per_token_per_layer']:,.0f}  ({t['reduction']:.0f}x)",
        }
        for t in document["head_types"]
    ]  # fmt: skip
    order = [row["heads"] for row in rows]
    x = _log("from", "elements per token and layer", "format(datum.value, ',')", [1, 10, 100, 1000, 10_000, 100_000], [1, 200_000])
    y = {"field": "heads", "type": "nominal", "title": None, "sort": order}
    return _chart(
        190,
        [
            {
                "mark": {"type": "bar", "height": 22},
                "encoding": {
                    "x": x, "x2": {"field": "elements"}, "y": y,
                    "tooltip": [{"field": "heads"}, {"field": "what"}, {"field": "elements", "format": ","}],
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 6, "color": _MUTED, "fontSize": 12},
                "encoding": {"x": {**x, "field": "elements"}, "y": y, "text": {"field": "told"}},
            },
        ],
        rows,
    )  # fmt: skip


def windows(found: Sequence[ContextWindow]) -> Spec:
    """The largest window offered over time, every window as a dot, and what models were shown to use of theirs."""
    rows = [
        {
            "date": w.date, "model": w.model, "tokens": w.tokens, "told": show_tokens(w.tokens), "record": w.record, "what": "offered",
            "effective": w.effective_tokens, "source": w.source_url,
        }
        for w in found
    ]  # fmt: skip
    shown = [
        {
            "date": w.date, "model": w.model, "tokens": w.effective_tokens, "told": show_tokens(w.effective_tokens),
            "what": "shown to be used, at least" if w.effective_at_least else "shown to be used", "source": w.measure,
        }
        for w in found if w.effective_tokens is not None
    ]  # fmt: skip
    years = {"domain": [{"year": 2020, "month": 1}, {"year": 2028, "month": 3}]}
    x = {"field": "date", "type": "temporal", "title": None, "scale": years, "axis": {"format": "%Y", "tickCount": "year", "grid": False}}
    y = {**_length("tokens", "tokens", [1024, 2**24]), "axis": {"values": _POWERS_OF_TWO[10:25:2], "labelExpr": _TOKENS}}
    kinds = ["offered", "shown to be used", "shown to be used, at least"]
    tooltip = [
        {"field": "model"}, {"field": "what"}, {"field": "told", "title": "tokens"}, {"field": "date", "type": "temporal", "format": "%Y-%m-%d"},
        {"field": "source"},
    ]  # fmt: skip
    dots = {
        "x": x, "y": y, "tooltip": tooltip,
        "color": {"field": "what", "type": "nominal", "scale": {"domain": kinds}, "legend": {**_TOP, "columns": 3}},
        "shape": {"field": "what", "type": "nominal", "scale": {"domain": kinds, "range": ["circle", "diamond", "triangle-up"]}},
    }
    return {
        "height": 440,
        "layer": [
            {
                "data": {"values": rows}, "transform": [{"filter": "datum.record"}],
                "mark": {"type": "line", "interpolate": "step-after", "color": _MUTED, "strokeWidth": 2}, "encoding": {"x": x, "y": y},
            },
            {"data": {"values": [*rows, *shown]}, "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1}, "encoding": dots},
            {
                "data": {"values": rows}, "transform": [{"filter": "datum.record"}],
                "mark": {"type": "text", "align": "right", "dx": -8, "dy": -6, "color": _MUTED, "fontSize": 11},
                "encoding": {"x": x, "y": y, "text": {"field": "model"}},
            },
            {
                "data": {"values": rows}, "transform": [{"filter": "!datum.record && !datum.effective"}],
                "mark": {"type": "text", "align": "left", "dx": 9, "dy": -7, "color": _MUTED, "fontSize": 11},
                "encoding": {"x": x, "y": y, "text": {"field": "model"}},
            },
        ],
    }  # fmt: skip
