"""What lives while a program runs, tensor by tensor: the account a caching allocator would keep, on any machine.

The program runs on the meta device, where tensors have a shape and no bytes and nothing is computed: that of a GPU, allocation for
allocation, with the Triton launches left out.  `python -m microbench.live mla.prefill` shows, for each such layer of `decoder`, what
its quantities predict, the traced peak, and the tensors alive at it.
"""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What PyTorch's caching allocator rounds a request up to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
BLOCK_BYTES = 512
META = torch.device("meta")


@dataclass(frozen=True)
class Tensor:
    """A storage: the bytes an allocator hands out for it, what made it, the shape it was made with."""

    held_bytes: int
    made_by: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """The most bytes held at once by a run, what was held before it, and what lived at the peak, largest first."""

    peak_bytes: int
    resident_bytes: int
    alive: tuple[Tensor, ...]


class Account(TorchDispatchMode):  # type: ignore[misc]
    """Every storage from the op that makes it until nothing refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, Tensor] = {}
        self.held_bytes = 0
        self.start()

    def start(self) -> None:
        """Look for the peak from here on."""
        self.peak_bytes, self.alive = self.held_bytes, tuple(self.living.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and enter what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor, str(func))
        return made

    def _enter(self, tensor: torch.Tensor, made_by: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 (its identity: views make new Python objects of one storage)
        if key in self.living:
            return
        self.living[key] = entry = Tensor(-(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES, made_by, tuple(tensor.shape))
        weakref.finalize(storage, self._leave, key)
        self.held_bytes += entry.held_bytes
        if self.held_bytes > self.peak_bytes:
            self.start()

    def _leave(self, key: int) -> None:
        self.held_bytes -= self.living.pop(key).held_bytes


def trace(build: Callable[[torch.device], Callable[[], Any]]) -> Trace:
    """The account of one run of what `build` makes, after a first run."""
    with torch.no_grad(), Account() as account:
        run = build(META)
        resident = account.held_bytes
        run()
        account.start()
        run()
        alive = sorted(account.alive, key=lambda tensor: -tensor.held_bytes)
        return Trace(account.peak_bytes, resident, tuple(alive))


class _Launcher:
    """A compiled kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """A launch."""
        return lambda *args, **kwargs: None  # noqa: ARG005 (any kernel's arguments)


class _Constant:
    def __init__(self, value: Any) -> None:
        self.value = value


@cache
def kernels() -> ModuleType:
    """`kernels_triton` with launches that do nothing: what its functions allocate, and no more.  Triton need not be there."""
    stand_in, language = ModuleType("triton"), ModuleType("triton.language")
    language.constexpr = _Constant  # type: ignore[attr-defined]
    stand_in.language, stand_in.jit = language, lambda _: _Launcher()  # type: ignore[attr-defined]
    stand_in.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()  # type: ignore[attr-defined]
    stand_in.cdiv = lambda a, b: -(-a // b)  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("microbench.kernels_unlaunched", Path(__file__).with_name("kernels_triton.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    found = {name: sys.modules.get(name) for name in ("triton", "triton.language")}
    sys.modules.update({"triton": stand_in, "triton.language": language})
    try:
        spec.loader.exec_module(module)
    finally:
        for name, known in found.items():
            if known is None:
                del sys.modules[name]
            else:
                sys.modules[name] = known
    return module


def main(names: list[str]) -> None:
    """Every layer and model of `decoder`, or those named; the tensors at the peak of those named."""
    from microbench import decoder  # noqa: PLC0415 (which runs on this module's kernels)

    for which in decoder.cases("full"):
        if names and which.impl not in names:
            continue
        found, ours = decoder.traced(which), decoder.peak_bytes_of(which)
        print(f"{which.impl:16}{which.extents:44}{ours / 1e6:11,.1f} MB predicted {found.peak_bytes / 1e6:11,.1f} MB traced"
              f" {ours / found.peak_bytes - 1:+7.2%}")
        for tensor in found.alive if names else ():
            if tensor.held_bytes >= found.peak_bytes / 1000:
                print(f"{tensor.held_bytes / 1e6:27,.1f} MB  {'x'.join(map(str, tensor.shape)):24}{tensor.made_by}")


if __name__ == "__main__":
    main(sys.argv[1:])
