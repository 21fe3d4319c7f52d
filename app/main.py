"""The pages and what they have in common."""

from __future__ import annotations

import gc

import streamlit as st

from app import attention, size


@st.cache_resource(show_spinner=False)
def settled() -> None:
    """What is loaded by now lives as long as the server: walking it again in full collections takes as long as an answer."""
    gc.collect()
    gc.freeze()


st.set_page_config(page_title="longctx", page_icon="🧮", layout="wide")
settled()
st.navigation(
    [
        st.Page(size.page, title="Size", url_path="size", default=True),
        st.Page(attention.page, title="Attention", url_path="attention"),
    ],
    position="top",
).run()
