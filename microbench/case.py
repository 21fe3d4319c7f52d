"""What is measured: a kernel, an implementation, an element type, a shape; and which rows may be fitted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from simulator.work import Op

#: Contexts beyond this many tokens are never fitted: they test the extrapolation.
LONGEST_FITTED = 32_768
#: The regime of a kernel whose inputs another kernel has just written: one set of them, in the L2 cache as far as it fits.
HANDED = "handed"
#: The regime of a part in the company of its layer begins so, and goes on with the layer.
IN = "in"


@dataclass(frozen=True)
class Case:
    """One measurement to make.  `shape` holds integers by name; `regime` is steady (the power limit has settled),
    sustained (a second and more), burst (after an idle pause), handed (as steady, on inputs that were just written) or "in" and a
    layer (the layer runs before every sample: the board's clock and power are the layer's).
    """

    kernel: str
    impl: str
    dtype: str
    shape: tuple[tuple[str, int], ...]
    regime: str = "steady"

    def __getitem__(self, name: str) -> int:
        """An extent."""
        return dict(self.shape)[name]

    def get(self, name: str, default: int = 0) -> int:
        """An extent, or `default` where the shape has none of this name."""
        return dict(self.shape).get(name, default)

    @property
    def extents(self) -> str:
        """The shape as text: "m=4096 n=28672 k=8192"."""
        return " ".join(f"{name}={value}" for name, value in self.shape)

    @property
    def key(self) -> str:
        """What makes the case this one."""
        return f"{self.kernel} {self.impl} {self.dtype} {self.regime} {self.extents}"

    @property
    def company(self) -> Case | None:
        """The layer in whose company the part is measured, None where it runs alone.

        >>> part, layer = case("gemm", "cublas", "bf16", m=8192), case("decoder_layer", "moe.prefill", "bf16", tokens=8192)
        >>> part.beside(layer).regime, part.beside(layer).company == layer
        ('in decoder_layer moe.prefill bf16 tokens=8192', True)
        """
        kind, *layer = self.regime.split()
        if kind != IN:
            return None
        kernel, impl, dtype, *extents = layer
        return Case(kernel, impl, dtype, shape_of(extents))

    def beside(self, layer: Case) -> Case:
        """The same in the company of `layer`."""
        return replace(self, regime=f"{IN} {layer.kernel} {layer.impl} {layer.dtype} {layer.extents}")

    @property
    def held(self) -> str:
        """Why the row is kept from the fit, "" where it may be fitted; decided by hashes of the shape alone.

        length: beyond 32,768 tokens.  layout: a quarter of the (n, k) or head layouts, whole.  size: a fifth of the rest.
        """
        shape = dict(self.shape)
        if max(shape.get("context", 0), shape.get("tokens", 0)) > LONGEST_FITTED:
            return "length"
        layout = " ".join(f"{name}={value}" for name, value in self.shape if name in _LAYOUT)
        if layout and _hashed(layout) % 4 == 0:
            return "layout"
        return "size" if _hashed(self.extents) % 5 == 0 else ""


_LAYOUT = ("n", "k", "experts", "heads", "kv_heads", "head_dim", "v_head_dim")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shape_of(extents: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """A shape from its text: ["m=4096", "n=28672"]."""
    return tuple((name, int(value)) for name, _, value in (extent.partition("=") for extent in extents))


def case(kernel: str, impl: str, dtype: str, *, regime: str = "steady", **shape: int) -> Case:
    """A case from named extents.

    >>> case("gemm", "cublas", "bf16", m=1, n=4096, k=4096).extents
    'm=1 n=4096 k=4096'
    """
    return Case(kernel, impl, dtype, tuple(shape.items()), regime)


@dataclass(frozen=True)
class Prepared:
    """A case ready to run: `run(i)` launches it on the i-th of `sets` input sets.

    `graphable`: it may be captured in a CUDA graph; `captured`: it always is, however long, because engines do.  `hot`: its
    inputs stay in the L2 cache.  `peak_bytes`: the most memory one launch held, where the case measured that.
    """

    run: Callable[[int], Any]
    sets: int = 1
    graphable: bool = True
    captured: bool = False
    hot: bool = False
    peak_bytes: float = 0.0


class Module(Protocol):
    """What every module of kernels offers."""

    KERNELS: tuple[str, ...]

    def cases(self, suite: str) -> list[Case]:
        """The cases of a suite: tiny, quick or full."""

    def op(self, which: Case) -> Op:
        """Its quantities."""

    def prepare(self, which: Case, device: Any) -> Prepared:
        """Random inputs, enough sets of them that none is found in the L2 cache."""

    def error(self, which: Case, device: Any) -> float:
        """Relative error of a small relative of the case against a float64 or float32 reference, on poisoned outputs."""


def sets_for(moved_bytes: float, l2_bytes: float, most_bytes: float = 8e9) -> tuple[int, bool]:
    """How many input sets keep a rotation out of the L2 cache, and whether that failed (hot).

    Three caches' worth, at most 512 sets and `most_bytes`.

    >>> sets_for(1e9, 6e7), sets_for(1e5, 6e7)
    ((1, False), (512, True))
    """
    wanted = -(-3 * l2_bytes // max(moved_bytes, 1.0))
    sets = int(max(1, min(wanted, 512, most_bytes // max(moved_bytes, 1.0))))
    if moved_bytes < 3 * l2_bytes and sets == 1:
        sets = 2
    return sets, sets * moved_bytes < 1.5 * l2_bytes


def l2_of(device: Any) -> float:
    """Bytes of the device's L2 cache; on a CPU a token size, so that little memory is taken."""
    if device.type != "cuda":
        return 1e4
    import torch  # noqa: PLC0415 (cases are listed and read where there is no torch)

    return float(torch.cuda.get_device_properties(device).L2_cache_size)


def relative(got: Any, want: Any) -> float:
    """|got - want| / |want| in the Euclidean norm."""
    return float((got - want).norm() / want.norm())
