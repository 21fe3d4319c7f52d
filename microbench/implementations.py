"""What runs here of a kernel whose op leaves the implementation open: PyTorch's own, and the Triton kernels of this package."""

from __future__ import annotations

from simulator.work import Leaf, Op, SecondsSerial, Work, fold

#: Kernel -> implementation.
RUNS = {
    "gemm": "cublas", "batched_gemm": "cublas", "grouped_gemm": "cutlass", "attention": "cudnn", "attention_backward": "cudnn",
    "decode_attention": "triton", "latent_attention": "triton",
}  # fmt: skip
#: Kernels of which one implementation is known, whatever it is called.
PLAIN = ("gemm", "batched_gemm")


def as_run(tree: Work) -> Work:
    """The same tree, its ops named by what runs them here: engines have other kernels, which stand for unnamed ones."""

    def name(op: Leaf) -> float:
        if isinstance(op, Op) and op.kernel not in PLAIN:
            op.impl = op.impl or RUNS.get(op.kernel, "")
        return 0.0

    fold(tree, SecondsSerial(name))
    return tree
