"""The pages and what they have in common."""

from __future__ import annotations

import streamlit as st

from app import attention, size

st.set_page_config(page_title="longctx", page_icon="🧮", layout="wide")
st.navigation(
    [
        st.Page(size.page, title="Size", url_path="size", default=True),
        st.Page(attention.page, title="Attention", url_path="attention"),
    ],
    position="top",
).run()
