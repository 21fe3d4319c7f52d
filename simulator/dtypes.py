"""What one number costs to keep: element types, checkpoint formats with scales, cache formats.

Validity: `WeightFormat.bytes` spreads block scales evenly (exact when the blocks divide the matrix, which the
checkpoints in the catalog satisfy to 0.01 %).  Sources of each layout stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.units import Bytes, Count, Num


@dataclass(frozen=True, slots=True)
class DType:
    """One element: its width in bits and the name of the tensor-core rate that multiplies it."""

    name: str
    bits: float

    @property
    def bytes(self) -> float:
        """Bytes of one element."""
        return self.bits / 8


DTYPES = {
    d.name: d
    for d in (
        DType("fp32", 32), DType("tf32", 32), DType("bf16", 16), DType("fp16", 16), DType("fp8", 8), DType("int8", 8),
        DType("fp4", 4), DType("int4", 4),
    )
}  # fmt: skip
BF16, FP16, FP32, FP8, INT8, FP4 = (DTYPES[n] for n in ("bf16", "fp16", "fp32", "fp8", "int8", "fp4"))


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one weight matrix is stored and what its product is computed in.

    `scale_bits` are spent per `block` elements.  `math` is the element type of the product: a weight-only format
    (mxfp4 with bf16 activations) multiplies in bf16, a W8A8 format in fp8.
    """

    name: str
    bits: float
    math: DType
    activation: DType
    scale_bits: float = 0.0
    block: float = 1.0

    @property
    def bytes_per_element(self) -> float:
        """Bytes of one stored weight, its share of the block scale included."""
        return (self.bits + self.scale_bits / self.block) / 8

    def bytes(self, parameters: Count) -> Bytes:
        """Bytes of `parameters` weights."""
        return parameters * self.bytes_per_element


WEIGHT_FORMATS = {
    f.name: f
    for f in (
        WeightFormat("fp32", 32, FP32, FP32),
        WeightFormat("bf16", 16, BF16, BF16),
        WeightFormat("fp16", 16, FP16, FP16),
        # per-tensor or per-channel scales: below 0.01 % of the weights
        WeightFormat("fp8", 8, FP8, FP8),
        # 128 x 128 blocks, one fp32 scale each (DeepSeek-V3 config.json, weight_block_size)
        WeightFormat("fp8_block", 8, FP8, FP8, 32, 128 * 128),
        # weight only: OCP MX, one e8m0 scale per 32 (gpt-oss config.json, quant_method mxfp4)
        WeightFormat("mxfp4", 4, BF16, BF16, 8, 32),
        # NVFP4: one e4m3 scale per 16; W4A4 where the GPU has the rate
        WeightFormat("nvfp4", 4, FP4, FP4, 8, 16),
        WeightFormat("int8", 8, INT8, INT8),
        # weight only, fp16 scale per group of 128 (AWQ, GPTQ)
        WeightFormat("int4", 4, BF16, BF16, 16 + 4, 128),
        # weight only, symmetric, bf16 scale per group of 32 (Kimi-K2 Thinking config.json)
        WeightFormat("int4_g32", 4, BF16, BF16, 16, 32),
        # fp4 experts with one e8m0 scale per 32, multiplied in fp8 (DeepSeek-V4 config.json, expert_dtype fp4; report 4.2)
        WeightFormat("mxfp4_fp8", 4, FP8, FP8, 8, 32),
    )
}
W_BF16 = WEIGHT_FORMATS["bf16"]


@dataclass(frozen=True, slots=True)
class CacheRow:
    """What one token leaves in one layer's cache on one GPU: `elements` of key, value or latent, and `rope` elements
    of a rotary part that some formats keep wider.  `latent` rows may use formats made for MLA; `index` rows are keys
    that only an indexer reads.
    """

    elements: Num
    rope: Num = 0.0
    latent: bool = False
    index: bool = False


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How a cache row is stored.

    bytes(row) = elements * (bits + scale_bits / block) / 8 + rope * rope_bits / 8
    """

    name: str
    bits: float
    compute: DType
    scale_bits: float = 0.0
    block: float = 1.0
    rope_bits: float | None = None
    latent_only: bool = False

    def row_bytes(self, row: CacheRow) -> Bytes:
        """Bytes of one token's row in one layer."""
        rope_bits = self.bits if self.rope_bits is None else self.rope_bits
        return row.elements * ((self.bits + self.scale_bits / self.block) / 8) + row.rope * (rope_bits / 8)

    def bytes(self, tokens: Num, row: CacheRow) -> Bytes:
        """Bytes of `tokens` rows.

        >>> CACHE_FORMATS["fp8_ds_mla"].bytes(1, CacheRow(512, 64, latent=True))
        656.0
        """
        return tokens * self.row_bytes(row)


CACHE_FORMATS = {
    f.name: f
    for f in (
        CacheFormat("bf16", 16, BF16),
        CacheFormat("fp16", 16, FP16),
        CacheFormat("fp8", 8, FP8),
        CacheFormat("int8", 8, INT8),
        # 512 e4m3 + 4 fp32 scales + 64 bf16 = 656 B (FlashMLA README, vLLM flashmla_sparse.py)
        CacheFormat("fp8_ds_mla", 8, BF16, 32, 128, 16, latent_only=True),
    )
}
C_BF16 = CACHE_FORMATS["bf16"]


def weight_format(name: str) -> WeightFormat:
    """The weight format called `name`."""
    if name not in WEIGHT_FORMATS:
        message = f"weight format {name!r}: unknown; use one of {', '.join(WEIGHT_FORMATS)}"
        raise ValueError(message)
    return WEIGHT_FORMATS[name]


def cache_format(name: str) -> CacheFormat:
    """The cache format called `name`."""
    if name not in CACHE_FORMATS:
        message = f"cache format {name!r}: unknown; use one of {', '.join(CACHE_FORMATS)}"
        raise ValueError(message)
    return CACHE_FORMATS[name]


def dtype(name: str) -> DType:
    """The element type called `name`."""
    if name not in DTYPES:
        message = f"dtype {name!r}: unknown; use one of {', '.join(DTYPES)}"
        raise ValueError(message)
    return DTYPES[name]
