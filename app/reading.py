"""The page "Size" of an encoder: one pass over a text, no cache, no next token."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import charts, parts, state
from simulator import reading_report
from simulator.question import Question, Read
from simulator.units import SECONDS


def show(question: Question, answer: Read, document: dict[str, Any]) -> None:
    """Verdict, figures, memory, ops, layouts."""
    found, told = answer.reading, state.plain(reading_report.verdict(answer.reading))
    if found.fits:
        st.success(f"**{told}**")
    else:
        st.error(f"**{told}**")
    served = found.served
    with st.grid(min_column_width=148):
        parts.metric("One text", served.alone.seconds if served else None, "s", "A forward pass over one text by itself.")
        parts.metric("Texts/s/GPU", served.texts_per_s_per_gpu if served else None, "", "With as many texts read together as wait and fit.")
        parts.metric("Tokens/s/GPU", served.tokens_per_s_per_gpu if served else None, "", "The same in tokens.")
        st.metric("Longest text", f"{found.longest:,}", help="Tokens: what positions and memory allow.", border=True, height="stretch")
        parts.metric("\\$ per 1M texts", served.usd_per_million_texts if served else None, "$", "US dollars per million texts, no GPU idle.", parts.NO_PRICE)
    if found.warnings:
        st.warning("\n".join(f"- {state.plain(text)}" for text in found.warnings))
    memory = charts.memory(document["memory_bytes_per_gpu"], float(found.cluster.gpu.usable_bytes))
    parts.draw(memory, "Memory of a GPU", "Weights, and the activations of the texts that are read together.")
    if served is not None:
        st.subheader("Why", anchor=False)
        parts.ops(served.alone)
    st.subheader("Layouts", anchor=False)
    names = {"layout": "layout", "fits": "fits", "texts_per_copy": "texts per copy", "step_s": "step", "mean_s": "mean answer"}
    shown = parts.alternatives(document)[list(names)].rename(columns=names)
    for name in ("step", "mean answer"):
        shown[name] = [SECONDS.show(value, 3) if value == value else "" for value in shown[name].astype(float)]  # noqa: PLR0124 (NaN is not itself)
    st.dataframe(shown, hide_index=True, placeholder="")
    st.subheader("Start it", anchor=False)
    for note in document["launch"]["notes"]:
        st.caption(state.plain(note))
    parts.downloads(question, document)
    parts.inputs(answer.inputs)
