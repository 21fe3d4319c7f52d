"""Decode time over batch and context, as a pandas DataFrame.

python examples/sweep_to_dataframe.py [FILE.csv]
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

from simulator import Decode, Layout, cluster, load_model
from simulator.estimate import sweep


def table() -> pd.DataFrame:
    """One row per batch and context: milliseconds per token, its bound, GiB per GPU and whether they fit."""
    model, machine = load_model("Qwen2.5-14B-Instruct-1M"), cluster("h200", gpus=8)
    context, batch = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(13, 21), 2.0 ** np.arange(8)))
    found = sweep(model, machine, Layout(tp=8), Decode(context=context, batch=batch))
    return pd.DataFrame({
        "context": context.astype(int), "batch": batch.astype(int), "ms_per_token": found.seconds * 1e3, "bound_ms": found.lower * 1e3,
        "gib_per_gpu": found.total_bytes / 2**30, "fits": found.total_bytes <= machine.gpu.usable_bytes,
        "tokens_per_s": batch / found.seconds,
    })  # fmt: skip


if __name__ == "__main__":
    frame = table()
    if len(sys.argv) > 1:
        frame.to_csv(sys.argv[1], index=False)
    best = frame[frame.fits].sort_values("tokens_per_s").groupby("context").tail(1).sort_values("context")
    print(best.round(2).to_string(index=False))
