"""What runs here of a kernel whose op leaves the implementation open: PyTorch's own, and the Triton kernels of this package."""

from __future__ import annotations

from simulator.work import Work, run_by

#: Kernel -> implementation.
RUNS = {
    "gemm": "cublas", "batched_gemm": "cublas", "grouped_gemm": "cutlass", "attention": "cudnn", "attention_backward": "cudnn",
    "decode_attention": "triton", "latent_attention": "triton",
}  # fmt: skip
#: Kernels of which one implementation is known, whatever it is called.
PLAIN = ("gemm", "batched_gemm")


def as_run(tree: Work) -> Work:
    """The same tree, its ops named by what runs them here: engines have other kernels, which stand for unnamed ones."""
    return run_by(tree, {kernel: impl for kernel, impl in RUNS.items() if kernel not in PLAIN})
