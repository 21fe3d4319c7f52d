"""Page "Size": does it fit, on which layout, how fast and how dear?"""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app import charts, parts, reading, state
from simulator import report, tables
from simulator.curves import cache_shares, over_context
from simulator.estimate import Estimate
from simulator.planner import UNLIMITED_TOKENS
from simulator.question import Answer, Question, Read
from simulator.question import answer as ask
from simulator.units import SECONDS, gib


@st.cache_resource(max_entries=64, ttl=120, show_spinner=False)
def answered(question: Question) -> Answer | Read:
    """The answer; plans hold arrays and are read only."""
    return ask(question)


@st.cache_resource(max_entries=64, ttl=120, show_spinner=False)
def documented(question: Question) -> dict[str, Any]:
    """Its document."""
    told: dict[str, Any] = answered(question).document()
    return told


@st.cache_resource(max_entries=64, ttl=120, show_spinner=False)
def pictures(question: Question) -> dict[str, charts.Spec]:
    """Every chart of the page."""
    answer, document = answered(question), documented(question)
    assert isinstance(answer, Answer)
    plan, context = answer.plan, answer.plan.request.context
    curve = over_context(plan, answer.inputs["price_usd_per_gpu_hour"])
    drawn = {
        "memory": charts.memory(document["memory_bytes_per_gpu"], float(plan.cluster.gpu.usable_bytes)),
        "cache": charts.cache(cache_shares(plan.model, context)),
        "ttft": charts.first_token(curve, context),
        "tpot": charts.next_token(curve, context),
    }
    if curve.usd_per_million_output is not None:
        drawn["price"] = charts.price(curve, context)
    return drawn


def page() -> None:
    """The page from top to bottom: verdict, figures, what must be known, pictures, tables, command."""
    notes = state.link_notes()
    try:
        question = state.sidebar()
        answer = answered(question)
    except ValueError as error:
        st.error(state.plain(str(error)), icon="⚠️")
        for note in notes:
            st.warning(state.plain(note))
        return
    for note in state.current(notes, question):
        st.warning(state.plain(note))
    if isinstance(answer, Read):
        reading.show(question, answer, documented(question))
        return
    plan = answer.plan
    told = state.plain(report.verdict(plan))
    if plan.fits:
        st.success(f"**{told}**")
    else:
        st.error(f"**{told}**")
    document = documented(question)
    _metrics(answer, document)
    if plan.warnings:
        st.warning("\n".join(f"- {state.plain(text)}" for text in plan.warnings))
    _pictures(question, answer)
    _why(answer)
    _layouts(answer, document)
    _start(question, answer, document)


# ---- figures


def _metrics(answer: Answer, document: dict[str, Any]) -> None:
    plan, service = answer.plan, answer.plan.service
    longest = "any length" if plan.longest.longest >= UNLIMITED_TOKENS else f"{plan.longest.longest:,}"
    with st.grid(min_column_width=148):
        if service is None:
            where = f"Tokens, for {plan.request.concurrency} at once, on {plan.longest.layout}."
            st.metric("Longest context", longest if plan.longest.longest else "none", help=where, border=True)
            st.metric("Smallest cluster", f"{plan.smallest_gpus} GPUs" if plan.smallest_gpus else "none", help="Of this GPU, up to 1,024.", border=True)
            st.metric("Short per GPU", gib(plan.best.short_bytes), help=f"On {plan.best.layout}.", border=True)
            return
        parts.metric("TTFT, cold", service.cold.seconds, "s", f"Time to first token of a prompt of {plan.request.prompt:,} tokens with nothing cached.")
        parts.metric("TPOT", service.decode.seconds, "s", f"Time per output token with {plan.request.concurrency} at {plan.request.context:,} tokens.")
        st.metric(
            "Concurrency", f"{document['max_concurrency']:.1f}", delta=f"up to {longest}", delta_color="off",
            delta_arrow="off", border=True,
            help=f"Requests of {plan.request.context:,} tokens that the cache of {plan.best.layout} holds. Below: the longest context that "
            f"{plan.request.concurrency} at once can have, on {plan.longest.layout}.",
        )  # fmt: skip
        parts.metric("Tokens/s/GPU", service.output_tokens_per_s_per_gpu, "", "Output tokens per second and GPU while decoding.")
        parts.metric("\\$ per 1M output", service.usd_per_million_output, "$", "US dollars per million output tokens, no GPU idle.", parts.NO_PRICE)


# ---- pictures


def _pictures(question: Question, answer: Answer) -> None:
    plan, drawn = answer.plan, pictures(question)
    slope = float(plan.model.cache_slope(float(plan.request.context)))
    with st.grid(min_column_width=420):
        parts.draw(drawn["memory"], "Memory of the fullest GPU", "As vLLM allocates it; the bar must end before the dashed and solid limits.")
        parts.draw(drawn["cache"], f"Cache: {slope:,.0f} B per further token", "By architecture and kind of layer, the mean per token over the asked context.")
    with st.grid(min_column_width=300):
        parts.draw(drawn["ttft"], "TTFT over context", "Cold prompt, the chosen layout kept. Ringed: asked. Dashed: longer than fits.")
        parts.draw(drawn["tpot"], "TPOT over context", f"{plan.request.concurrency} at once, the chosen layout kept.")
        if "price" in drawn:
            parts.draw(drawn["price"], "\\$ per million tokens", "Input by the cold prefill, output by the decode step at this concurrency.")
        else:
            st.info(parts.NO_PRICE)


# ---- tables


@st.fragment
def _why(answer: Answer) -> None:
    """The ops of the open tab; another is drawn when it is opened."""
    service = answer.plan.service
    st.subheader("Why", anchor=False)
    if service is None:
        st.info("No times for a request that does not fit.")
        return
    asked: dict[str, Estimate] = {"Cold prefill": service.cold, f"Prefill, {service.cached_tokens:,} cached": service.hit, "Decode step": service.decode}
    for tab, estimate in zip(st.tabs(list(asked), on_change="rerun"), asked.values(), strict=True):
        if tab.open:
            with tab:
                parts.ops(estimate)


def _engines(document: dict[str, Any], architecture: float) -> None:
    rows, notes = tables.engine_rows(document["cache"]["engines"], architecture)
    columns = ["engine", "one sequence, all ranks", "of architecture", "max concurrency", "tokens", "prefix grid"]
    st.dataframe(pd.DataFrame(rows, columns=columns), hide_index=True)
    logged = document["cache"]["engines"]["vllm"].get("log", [])
    st.caption(state.plain("; ".join([*notes, *(f"vLLM prints: {line}" for line in logged)])))


def _layouts(answer: Answer, document: dict[str, Any]) -> None:
    plan = answer.plan
    st.subheader("Layouts", anchor=False)
    if plan.tie and plan.runner_up:
        st.caption(state.plain(f"{plan.runner_up.layout} is a tie: the difference is inside the interval; fewer kinds of parallelism are preferred."))
    if plan.prefill_context:
        st.caption(state.plain(plan.prefill_context))
    names = {
        "layout": "layout", "fits": "fits", "max_concurrency": "max concurrency", "max_context_tokens": "longest context", "ttft_s": "TTFT", "tpot_s": "TPOT",
        "request_s": "mean request", "reason": "why not",
    }  # fmt: skip
    shown = parts.alternatives(document)[list(names)].rename(columns=names)
    for name in ("TTFT", "TPOT", "mean request"):
        shown[name] = [SECONDS.show(value, 3) if value == value else "" for value in shown[name].astype(float)]  # noqa: PLR0124 (NaN is not itself)
    st.dataframe(
        shown, hide_index=True, placeholder="",
        column_config={
            "max concurrency": st.column_config.NumberColumn(format="%.1f"), "longest context": st.column_config.NumberColumn(format="localized"),
            "why not": st.column_config.TextColumn(width="large"),
        },
    )  # fmt: skip
    if plan.refused:
        refused = ", ".join(f"{n} by {rule}" for rule, n in plan.refused.items())
        st.caption(state.plain(f"Left out by a rule: {refused}"))
    st.markdown("**One sequence as each engine holds it**")
    _engines(document, float(plan.model.cache_bytes(float(plan.request.context))))


def _start(question: Question, answer: Answer, document: dict[str, Any]) -> None:
    st.subheader("Start it", anchor=False)
    command, notes = report.launch(answer.plan)
    if command:
        st.code(command, language="bash", wrap_lines=True)
    for note in notes:
        st.caption(state.plain(note))
    parts.downloads(question, document)
    parts.inputs(answer.inputs)
