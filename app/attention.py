"""Page "Attention": four pictures of long context recomputed, and a recipe priced choice by choice."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app import charts, state
from simulator import compare, figures, tables
from simulator.dtypes import CACHE_FORMATS
from simulator.units import BYTES, FLOPS, parse_tokens

#: The twin of the figure: as many heads as in the example it recomputes.
TWIN = {"heads": 128, "head_dim": 128, "kv_heads": 8, "latent": 512, "rope": 64, "layers": 61}


@st.cache_resource(max_entries=8, show_spinner=False)
def drawn(context: int) -> dict[str, Any]:
    """Charts and tables of the page."""
    cost, (distances, lines) = figures.length_cost(), figures.decay()
    twin = {**TWIN, "context": context}
    heads = tables.head_types_document(compare.head_types(**twin, cache=CACHE_FORMATS["bf16"]), {**twin, "cache": "bf16"})
    return {
        "cost": cost, "compute": charts.compute(cost), "held": charts.held(cost), "decay": charts.decay(distances.tolist(), lines),
        "reaches": figures.reaches(context), "heads": heads, "head chart": charts.heads(heads), "windows": figures.context_windows(),
        "window chart": charts.windows(figures.context_windows()), "recipe": figures.recipe(context),
    }  # fmt: skip


def page() -> None:
    """Four figures, then the recipe."""
    with st.sidebar:
        text = st.text_input(
            "Context of the recipe", value="1M", key="at", bind="query-params", help="Tokens, as 128K or 1M: what the numbers of the recipe are for.",
        )  # fmt: skip
    try:
        context = parse_tokens((text or "1M").strip())
        found = drawn(context)
    except ValueError as error:
        st.error(state.plain(str(error)), icon="⚠️")
        return
    _length(found)
    _reach(found)
    _heads(found)
    _windows(found)
    _recipe(found, context)


def _length(found: dict[str, Any]) -> None:
    cost: figures.LengthCost = found["cost"]
    st.subheader("1. Attention grows with N², memory with N", anchor=False)
    name = cost.model.name.split("/")[-1]
    at = cost.tokens.tolist().index(2**20)
    dense, cache = float(cost.compute[0].along[at]), float(cost.memory[1].along[at])
    st.caption(state.plain(
        f"One prompt of {name}. At 1M tokens: {FLOPS.show(dense)} in attention over every pair, {BYTES.show(cache)} of cache. A fused kernel computes "
        "the same pairs and never writes the scores; a window or a sparse choice computes fewer. Axes are logarithmic."
    ))  # fmt: skip
    with st.grid(min_column_width=400):
        _draw(found["compute"], "Compute: useful FLOPs to prefill one prompt")
        _draw(found["held"], "Memory: bytes of one prompt, and of the weights")


def _reach(found: dict[str, Any]) -> None:
    st.subheader("2. RoPE bounds what distance may do, NoPE does not", anchor=False)
    st.caption(
        "An upper bound over all queries and keys on how a score can depend on distance (RoFormer, section 3.4.3), relative to distance 0. "
        "It is not the score: a trained head may stay far below it. It falls, then oscillates about a floor; it does not reach zero. "
        "Dashed: the length a model's frequencies were trained on."
    )
    _draw(found["decay"], "Bound on a score over distance")
    rows = [
        {
            "model": r.model, "layers": r.layers, "trained on": r.trained_tokens, "declared": r.declared_tokens, "shown to use": r.effective,
            "unfinished pairs": r.pairs_without_a_period, "in words": r.told,
        }
        for r in found["reaches"]
    ]  # fmt: skip
    whole = st.column_config.NumberColumn(format="localized")
    st.dataframe(
        pd.DataFrame(rows).astype(dict.fromkeys(("trained on", "declared", "unfinished pairs"), "Int64")), hide_index=True, placeholder="",
        column_config={
            "trained on": whole, "declared": whole, "shown to use": st.column_config.TextColumn(width=130),
            "unfinished pairs": st.column_config.NumberColumn(help="Pairs of dimensions that never completed a turn in training: angles never seen."),
            "in words": st.column_config.TextColumn(width="large"),
        },
    )  # fmt: skip


def _heads(found: dict[str, Any]) -> None:
    st.subheader("3. Fewer keys and values per token", anchor=False)
    asked = found["heads"]["inputs"]
    st.caption(state.plain(
        f"Elements cached per token and layer with {asked['heads']} heads of {asked['head_dim']}; GQA keeps {asked['kv_heads']} key-value heads, "
        f"MLA a latent of {asked['latent']} and {asked['rope']} rotary. In brackets: times fewer than MHA."
    ))  # fmt: skip
    _draw(found["head chart"], "Cache of one token in one layer")
    told = [f"{t['name']} {BYTES.show(t['cache_bytes_per_sequence'])}" for t in found["heads"]["head_types"]]
    st.caption(state.plain(f"Cache of {asked['layers']} such layers at {asked['context']:,} tokens in {asked['cache']}: {', '.join(told)}."))


def _windows(found: dict[str, Any]) -> None:
    st.subheader("4. Windows on offer, and how much of them is used", anchor=False)
    st.caption(
        "The line is the largest window offered so far. Diamonds and triangles: the length a model was shown to use (RULER, score of at least 85.6 %)."
    )
    _draw(found["window chart"], "Context windows over time")
    with st.expander("Rows and sources"):
        rows = [
            {
                "date": w.date, "model": w.model, "window": w.tokens, "shown to use": w.effective_tokens, "at least": w.effective_at_least, "notes": w.notes,
                "source": w.source_url,
            }
            for w in found["windows"]
        ]  # fmt: skip
        whole = st.column_config.NumberColumn(format="localized")
        shown = pd.DataFrame(rows).astype({"shown to use": "Int64"})
        st.dataframe(shown, hide_index=True, placeholder="", column_config={"window": whole, "shown to use": whole})


def _recipe(found: dict[str, Any], context: int) -> None:
    st.subheader(f"5. The recipe, choice by choice, at {context:,} tokens", anchor=False)
    rows = [
        {"choice": c.what, "2020": c.then, "now": c.now, "here": c.number, "times": tables.times(c.factor)}
        for c in found["recipe"]
    ]  # fmt: skip
    st.caption(tables.RECIPE_NOTE)
    st.table(pd.DataFrame(rows).set_index("choice"))


def _draw(spec: charts.Spec, title: str) -> None:
    with st.container(gap="xsmall"):
        st.markdown(f"**{title}**")
        st.vega_lite_chart(spec, width="stretch")
