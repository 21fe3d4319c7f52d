"""Kernels of optional packages, measured where they are installed: FlashAttention-3, FlashAttention-4 and FlashInfer.

None is a dependency.  A package is called through its public function; a result is checked like any other before it is timed.
Of the three, runs that ship have measured FlashAttention-4 (4.0.0b36, its kernels for Hopper, which do not split keys: no decode).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import torch

#: Implementation -> the module it lives in.
PACKAGES = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute", "flashinfer": "flashinfer"}
#: Bytes of scratch that FlashInfer asks its callers for.
FLASHINFER_WORKSPACE = 128 * 2**20


def installed(impl: str) -> bool:
    """Whether a package can be imported here."""
    name = PACKAGES[impl]
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def versions() -> dict[str, str]:
    """Implementation -> the version of its package, of those that can be imported here."""
    owners = packages_distributions()
    return {
        impl: "+".join(sorted({f"{owner} {version(owner)}" for owner in owners.get(name.partition(".")[0], [])}))
        for impl, name in PACKAGES.items() if installed(impl)
    }  # fmt: skip


def forward(impl: str, q: Any, k: Any, v: Any, *, window: int = 0) -> Any:
    """Causal attention aligned to the last key: q (B, C, h, d), k (B, N, g, d), v (B, N, g, d_v) -> (B, C, h, d_v)."""
    package = import_module(PACKAGES[impl])
    if impl == "flashinfer":
        rows = [
            package.single_prefill_with_kv_cache(q[b], k[b], v[b], causal=True, window_left=window - 1 if window else -1)
            for b in range(q.shape[0])
        ]  # fmt: skip
        return torch.stack(rows)
    out = package.flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0) if window else (-1, -1))
    return out[0] if isinstance(out, tuple) else out


def paged_decode(q: Any, k: Any, v: Any, table: Any, lengths: Any) -> Callable[[], Any]:
    """FlashInfer's batched decode over pages, planned once: q (B, h, d), k and v (pages, page, g, d), table (B, pages of one)."""
    package = import_module(PACKAGES["flashinfer"])
    batch, pages = table.shape
    page, kv_heads, head_dim = k.shape[1:]
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    begins = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * pages
    last = ((lengths - 1) % page + 1).to(torch.int32)
    wrapper.plan(
        begins, table.reshape(-1).contiguous(), last, q.shape[1], kv_heads, head_dim, page, q_data_type=q.dtype, kv_data_type=k.dtype
    )
    return lambda: wrapper.run(q, (k, v))
