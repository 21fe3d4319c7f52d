"""What pages show alike: metrics with their intervals, charts under a title, tables of ops, downloads."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app import charts, state
from simulator import report
from simulator.curves import op_shares
from simulator.estimate import Estimate, Interval
from simulator.question import Question
from simulator.units import SECONDS

NO_PRICE = "no price is known for this GPU: give one under 'Layout, engine, price'"


def metric(label: str, interval: Interval | None, unit: str, hint: str, missing: str = "") -> None:
    """A value, and below it the 80 % interval."""
    if interval is None:
        st.metric(label, "-", help=f"{hint} {missing}".strip(), border=True, height="stretch")
        return
    st.metric(
        label, state.plain(report.show(interval, unit)), delta=state.plain(report.span(interval, unit)), delta_color="off", delta_arrow="off",
        help=f"{hint} 80 % interval below; basis: {interval.basis}.", border=True, height="stretch",
    )  # fmt: skip


def draw(spec: charts.Spec, title: str, note: str = "") -> None:
    """A chart under its title."""
    with st.container(gap="xsmall"):
        st.markdown(f"**{title}**", help=note or None)
        st.vega_lite_chart(spec, width="stretch")


def ops(estimate: Estimate) -> None:
    """A time, and the ops it is made of."""
    st.caption(state.plain(
        f"{report.show(estimate.seconds)} (80 %: {report.span(estimate.seconds)}); bound {SECONDS.show(estimate.lower, 3)}, nothing overlapped "
        f"{SECONDS.show(estimate.upper, 3)}. Most waits for {estimate.binding()}. Calibration: {estimate.calibration.description}"
    ))  # fmt: skip
    rows = [
        {
            "op": op.name, "times": op.count, "time": SECONDS.show(op.seconds, 2), "share": op.share_percent, "bound / time": op.bound_percent,
            "what binds": op.bound_by, "basis": op.basis,
        }
        for op in op_shares(estimate)
    ]  # fmt: skip
    percent = {name: st.column_config.ProgressColumn(name, format="%.1f %%", min_value=0.0, max_value=100.0) for name in ("share", "bound / time")}
    st.dataframe(pd.DataFrame(rows), hide_index=True, column_config={**percent, "times": st.column_config.NumberColumn(format="localized")}, height=318)


def alternatives(document: dict[str, Any]) -> pd.DataFrame:
    """Every layout considered."""
    return pd.DataFrame(document["alternatives"])


def downloads(question: Question, document: dict[str, Any]) -> None:
    """The same question for a terminal, and the answer as files, made when they are asked for."""
    st.markdown("**The same question in a terminal** (the address of this page is a link to it)")
    st.code(state.as_command(question), language="bash", wrap_lines=True)
    name = f"longctx-{question.model.split('/')[-1]}-{state.short(question.context)}"
    with st.container(horizontal=True):
        st.download_button("Answer, JSON", lambda: report.emit(document), f"{name}.json", "application/json", on_click="ignore")
        st.download_button("Layouts, CSV", lambda: alternatives(document).to_csv(index=False), f"{name}-layouts.csv", "text/csv", on_click="ignore")


@st.fragment
def inputs(told: dict[str, Any]) -> None:
    """Every input with its default, drawn when it is opened."""
    shown = st.expander("Inputs and defaults", on_change="rerun")
    if shown.open:
        with shown:
            st.dataframe(pd.DataFrame({"input": list(told), "value": [str(value) for value in told.values()]}), hide_index=True)
