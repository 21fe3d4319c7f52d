"""What one number costs to keep: element types, checkpoint formats with scales, cache formats.

Validity: `WeightFormat.bytes` spreads block scales evenly (exact when the blocks divide the matrix, which the
checkpoints in the catalog satisfy to 0.01 %).  Sources of each layout stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from simulator.units import Bytes, Count, Num, ceil, minimum


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
    that only an indexer reads.  The elements form `vectors` keys and values, for formats with a scale per vector.
    """

    elements: Num
    rope: Num = 0.0
    latent: bool = False
    index: bool = False
    vectors: Num = 1.0


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How a cache is stored.

    A stored row has elements x (bits + scale_bits / block) / 8 + rope x rope_bits / 8 + vectors x vector_bytes + row_bytes_extra bytes;
    `block` elements share `scale_bits` of scale (and zero point), a key or value vector has `vector_bytes` of its own.
    Indexer keys are stored in `index`, bits per element with their scales, where the format has its own layout for them.
    The newest `residual_tokens` rows stay in 16 bits.  Pages are padded to a multiple of `page_multiple` bytes.
    `latent_width`: made for latents of that many elements; `heads_only`: made for keys and values by head.
    """

    name: str
    bits: float
    compute: DType
    scale_bits: float = 0.0
    block: float = 1.0
    rope_bits: float | None = None
    vector_bytes: float = 0.0
    row_bytes_extra: float = 0.0
    index_bits: float | None = None
    residual_tokens: int = 0
    page_multiple: int = 1
    latent_width: int | None = None
    heads_only: bool = False
    source: str = ""

    @property
    def bits_per_element(self) -> float:
        """Bits of an element with its share of the scale, without what is kept per vector or row."""
        return self.bits + self.scale_bits / self.block

    def row_bytes(self, row: CacheRow) -> Bytes:
        """Bytes of one stored row in one layer."""
        if row.index and self.index_bits is not None:
            return row.elements * (self.index_bits / 8)
        bare = row.elements * (self.bits_per_element / 8)
        if row.index:
            return bare
        rope_bits = self.bits_per_element if self.rope_bits is None else self.rope_bits
        return bare + row.rope * (rope_bits / 8) + row.vectors * self.vector_bytes + self.row_bytes_extra

    def bytes(self, tokens: Num, row: CacheRow) -> Bytes:
        """Bytes of `tokens` rows: the stored ones and the residual window, of min(tokens, R) rows in 16 bits.

        An upper bound where the window empties as it fills (KIVI's keys: tokens mod R).

        >>> CACHE_FORMATS["fp8_ds_mla"].bytes(1, CacheRow(512, 64, latent=True))
        656.0
        >>> round(CACHE_FORMATS["kivi-2"].bytes(32768, CacheRow(1024)) * 8 / (32768 * 1024), 3)
        3.051
        """
        if not self.residual_tokens:
            return tokens * self.row_bytes(row)
        recent = minimum(tokens, float(self.residual_tokens))
        return (tokens - recent) * self.row_bytes(row) + recent * ((row.elements + row.rope) * 2.0)

    def residual_bytes(self, row: CacheRow) -> Bytes:
        """What a full residual window takes beyond its rows stored."""
        return self.bytes(float(self.residual_tokens), row) - self.residual_tokens * self.row_bytes(row)

    def page_bytes(self, rows: Num, row: CacheRow) -> Bytes:
        """Bytes of one page of `rows` stored rows."""
        whole = rows * self.row_bytes(row)
        return whole if self.page_multiple == 1 else ceil(whole / self.page_multiple) * self.page_multiple

    def refusal(self, rows: Iterable[CacheRow]) -> str | None:
        """Why this format cannot store these rows, and what can; None where it can."""
        for row in rows:
            if row.index:
                continue
            if self.latent_width is not None and not (row.latent and row.elements == self.latent_width):
                has = f"latents of {row.elements:g}" if row.latent else "keys and values by head"
                kin = [f.name for f in CACHE_FORMATS.values() if row.latent and f.latent_width == row.elements]
                return f"it stores latents of {self.latent_width} and the model keeps {has}; use {', '.join([*kin, 'fp8', 'bf16'])}"
            if self.heads_only and row.latent:
                return "it quantises keys and values by head and the model keeps latents; use fp8 or bf16"
        return None


def kivi(bits: int, group: int = 32, residual: int = 128) -> CacheFormat:
    """KIVI: keys quantised per channel over `group` tokens, values per token over `group` channels, fp16 scale and zero each.

    bits per element = b + 32 / g, and R tokens in 16 bits (Liu et al. 2024; jy-yuan/KIVI quant/new_pack.py, models/llama_kivi.py).

    >>> 16 / kivi(2).bits_per_element, round(16 / kivi(2, 128).bits_per_element, 2)
    (5.333333333333333, 7.11)
    """
    source = "KIVI (2402.02750), jy-yuan/KIVI@876b4d2d quant/new_pack.py, models/llama_kivi.py"
    return CacheFormat(f"kivi-{bits}", bits, BF16, 32, group, residual_tokens=residual, heads_only=True, source=source)


CACHE_FORMATS = {
    f.name: f
    for f in (
        CacheFormat("bf16", 16, BF16),
        CacheFormat("fp16", 16, FP16),
        CacheFormat("fp8", 8, FP8, source="one scale per tensor, below 0.01 %"),
        # one fp32 scale per token and head for keys, one for values
        CacheFormat("fp8_per_token_head", 8, FP8, vector_bytes=4, heads_only=True, source="vLLM 0.33 v1/kv_cache_interface.py"),
        CacheFormat("int8", 8, INT8, vector_bytes=4, heads_only=True, source="vLLM 0.33 v1/kv_cache_interface.py, int8_per_token_head"),
        # fp16 scale and minimum per 64 elements
        CacheFormat("int4", 4, BF16, 32, 64, heads_only=True, source="transformers 5.23 cache_utils.py QuantizedCache, q_group_size 64"),
        kivi(2),
        kivi(4),
        # 3-bit non-uniform codes; 1 % of the elements kept aside as fp16 value and 16-bit place; a 4-byte pointer per key and per value row
        CacheFormat("kvquant-3", 3 + 0.01 * 32, BF16, row_bytes_extra=8, heads_only=True, source="KVQuant (2401.18079) nuq3-1%"),
        # one e4m3 scale per 16, read back as fp8
        CacheFormat("nvfp4", 4, FP8, 8, 16, source="vLLM 0.33 kv_cache_interface.py; SGLang 0.5.23 modelopt_quant.py"),
        CacheFormat("mxfp4", 4, BF16, 8, 32, source="OCP MX 1.0: one e8m0 scale per 32"),
        # 512 e4m3 + 4 fp32 scales + 64 bf16 = 656 B; indexer keys 128 e4m3 + 1 fp32 scale = 132 B
        CacheFormat(
            "fp8_ds_mla", 8, BF16, 32, 128, 16, index_bits=8 + 32 / 128, latent_width=512, source="FlashMLA README, vLLM flashmla_sparse.py",
        ),
        # 448 e4m3 + 7 e8m0 scales + 1 pad + 64 bf16 = 584 B; indexer keys 128 e4m3 + 1 fp32 scale = 132 B
        CacheFormat(
            "fp8_ds_v4", 8, BF16, 8, 64, 16, row_bytes_extra=1, index_bits=8 + 32 / 128, page_multiple=576, latent_width=448,
            source="SGLang 0.5.23 deepseek_v4_memory_pool.py, vLLM 0.33 models/deepseek_v4/attention.py",
        ),
        # the same with indexer keys in fp4, one e8m0 scale per 32 = 68 B
        CacheFormat(
            "fp8_ds_v4_fp4_index", 8, BF16, 8, 64, 16, row_bytes_extra=1, index_bits=4 + 8 / 32, page_multiple=576, latent_width=448,
            source="SGLang 0.5.23 deepseek_v4_memory_pool.py get_dsv4_indexer_bytes_per_token",
        ),
    )
}  # fmt: skip
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
