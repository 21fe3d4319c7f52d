"""Position: what telling tokens apart costs, and how far each way of doing it reaches.

Letters: S tokens of the context, L tokens of a training sequence, d width of a head, D hidden width, m a distance between two tokens,
n_q and n_kv query and key-value heads, theta the rotary base, s an extension factor.
A scheme costs per token (`token_flops`, all heads) and per score (`pair_flops`, one query head), and in weights (`parameters`, the whole model
for tables of tokens, one layer else); `limit` is the first length it has nothing to say about, None where the formula goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from simulator.units import Bytes, Count, Flops, Num, Tokens, floor, maximum, minimum, where

Pairs = npt.NDArray[np.float64]


class Position(Protocol):
    """A way to tell positions apart."""

    @property
    def name(self) -> str:
        """What the literature calls it."""

    @property
    def limit(self) -> int | None:
        """Tokens it can tell apart at all."""

    def parameters(self) -> Count:
        """Weights it adds."""

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:
        """FLOPs per token of one layer (of the whole model for a table of tokens)."""

    def pair_flops(self) -> Flops:
        """FLOPs per (query, key) score of one head."""


@dataclass(frozen=True, slots=True)
class NoPosition:
    """NoPE: the causal mask alone orders tokens.  Costs nothing, extrapolates untrained (Kazemnejad et al. 2023)."""

    name = "NoPE"
    limit = None

    def parameters(self) -> Count:
        """None."""
        return 0.0

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:  # noqa: ARG002
        """None."""
        return 0.0

    def pair_flops(self) -> Flops:
        """None."""
        return 0.0


@dataclass(frozen=True, slots=True)
class Learned:
    """One learned vector per absolute position, added to the embedding once (GPT-2, BERT).

    weights = positions x D; one addition per hidden element; a position beyond the table does not exist.
    """

    positions: int
    hidden_size: int

    name = "learned absolute"

    @property
    def limit(self) -> int:
        """The table."""
        return self.positions

    def parameters(self) -> Count:
        """The table, once in the model."""
        return float(self.positions) * self.hidden_size

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:  # noqa: ARG002
        """One addition per element, once in the model."""
        return float(self.hidden_size)

    def pair_flops(self) -> Flops:
        """None."""
        return 0.0


@dataclass(frozen=True, slots=True)
class BucketBias:
    """T5: a learned scalar per head and bucket of distances, added to the score (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the others grow geometrically up to `max_distance`; all beyond share the last one.
    """

    heads: int
    num_buckets: int = 32
    max_distance: int = 128

    name = "T5 relative bias"
    limit = None

    def parameters(self) -> Count:
        """One scalar per head and bucket; the first layer's table serves all."""
        return float(self.heads) * self.num_buckets

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:  # noqa: ARG002
        """None."""
        return 0.0

    def pair_flops(self) -> Flops:
        """One addition."""
        return 1.0

    def bucket(self, distance: Num) -> Count:
        """The bucket of a distance m >= 0 of causal attention.

        m below B/2: m; else min(B/2 + floor(ln(2m/B) / ln(2M/B) x B/2), B - 1), with B buckets and the largest distance M.

        >>> [BucketBias(8).bucket(float(m)) for m in (0, 15, 16, 127, 128, 10**6)]
        [0.0, 15.0, 16.0, 31.0, 31.0, 31.0]
        """
        half = self.num_buckets / 2
        grown = half + floor(np.log(maximum(distance, 1.0) / half) / math.log(self.max_distance / half) * half)
        found: Count = where(distance < half, distance, minimum(grown, self.num_buckets - 1.0))
        return float(found) if np.ndim(found) == 0 else found


@dataclass(frozen=True, slots=True)
class RelativeVectors:
    """Shaw et al. 2018: a learned vector per distance, clipped at `clip` either side, added to keys (and values).

    Per score 2 d FLOPs for q . a_m, and 2 d more for the values; distances beyond the clip look alike.
    """

    head_dim: int
    clip: int
    values: bool = True

    name = "Shaw relative vectors"
    limit = None

    def parameters(self) -> Count:
        """2 clip + 1 vectors for keys, as many for values; shared by the heads of a layer."""
        return (2.0 * self.clip + 1) * self.head_dim * (2 if self.values else 1)

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:  # noqa: ARG002
        """None."""
        return 0.0

    def pair_flops(self) -> Flops:
        """A dot product for the key, and for the value."""
        return 2.0 * self.head_dim * (2 if self.values else 1)


@dataclass(frozen=True, slots=True)
class SinusoidBias:
    """Transformer-XL (Dai et al. 2019, section 3.3): scores (q + u) . k + (q + v) . W_R r_m, r_m a sinusoid.

    Per layer the matrix W_R (D x n_q d) and two vectors per head; per token the product W_R r_m (2 D n_q d) and two additions
    to the query; per score one more dot product, 2 d.
    """

    hidden_size: int
    heads: int
    head_dim: int

    name = "Transformer-XL relative"
    limit = None

    def parameters(self) -> Count:
        """W_R, u and v of one layer."""
        return float(self.heads) * self.head_dim * (self.hidden_size + 2)

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:  # noqa: ARG002
        """W_R times one sinusoid, and q + u, q + v."""
        return heads * (self.head_dim * (2.0 * self.hidden_size + 2))

    def pair_flops(self) -> Flops:
        """One more dot product."""
        return 2.0 * self.head_dim


@dataclass(frozen=True, slots=True)
class Alibi:
    """ALiBi (Press et al. 2022): score - slope_h x m.  One fused multiply-add per score, no weights.

    It reads beyond its training length, at the price of attention that fades: a head of slope a gives a token at distance m
    at most e^(-a m) of the weight of one beside it at equal content.
    """

    heads: int
    bias_max: float = 8.0

    name = "ALiBi"
    limit = None

    def parameters(self) -> Count:
        """None."""
        return 0.0

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:  # noqa: ARG002
        """None."""
        return 0.0

    def pair_flops(self) -> Flops:
        """One multiply-add."""
        return 2.0

    def slopes(self) -> Pairs:
        """2^(-8 k / n), k = 1..n for n a power of two; else those of the next power, odd places of it first... every other one.

        >>> Alibi(8).slopes()[[0, 7]].tolist()
        [0.5, 0.00390625]
        """
        whole = 2 ** math.ceil(math.log2(self.heads))
        found = 2.0 ** (-self.bias_max * np.arange(1, whole + 1) / whole)
        return found if whole == self.heads else np.concatenate([found[1::2], found[::2]])[: self.heads]

    def horizon(self, weight: float = 1e-3) -> Pairs:
        """Per head, the distance at which a token of equal content weighs `weight` of the newest: -ln(weight) / slope."""
        return -math.log(weight) / self.slopes()


# ---- rotary embeddings and how they are stretched


def wavelengths(rotary_dim: int, theta: float) -> Pairs:
    """Tokens of one turn of each pair of dimensions: 2 pi theta^(2 i / d), i = 0 .. d/2 - 1 (RoFormer, section 3.2.2).

    >>> round(float(wavelengths(128, 5e5)[-1]))
    2559196
    """
    found: Pairs = 2 * math.pi * theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    return found


class Scaling(Protocol):
    """How the frequencies of a rotary embedding are changed to reach further."""

    @property
    def name(self) -> str:
        """What configs call it."""

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:
        """Per pair, how many times slower it turns at a context of `length` tokens than the plain embedding."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by: scores grow by its square."""

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by."""


@dataclass(frozen=True, slots=True)
class Plain:
    """No scaling; choosing a larger theta and training on (ABF, Xiong et al. 2023) is this too."""

    name = "plain"
    attention_factor = 1.0
    softmax_factor = 1.0

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:  # noqa: ARG002
        """1 everywhere."""
        return np.ones(rotary_dim // 2)


@dataclass(frozen=True, slots=True)
class Linear:
    """Position interpolation: every pair s times slower (Chen et al. 2023)."""

    factor: float

    name = "linear (PI)"
    attention_factor = 1.0
    softmax_factor = 1.0

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:  # noqa: ARG002
        """S everywhere."""
        return np.full(rotary_dim // 2, self.factor)


def stretched_base(theta: float, factor: Num, rotary_dim: int) -> Num:
    """NTK-aware base: theta s^(d / (d - 2)): the slowest pair turns s times slower, the fastest as before.

    >>> round(stretched_base(1e4, 8, 128))
    82685
    """
    return theta * factor ** (rotary_dim / (rotary_dim - 2))


@dataclass(frozen=True, slots=True)
class NtkAware:
    """A larger base instead of slower positions (bloc97 2023): pair i slows by s^(2 i / (d - 2))."""

    factor: float

    name = "NTK-aware"
    attention_factor = 1.0
    softmax_factor = 1.0

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:  # noqa: ARG002
        """(theta' / theta)^(2 i / d)."""
        return wavelengths(rotary_dim, float(stretched_base(theta, self.factor, rotary_dim))) / wavelengths(rotary_dim, theta)


@dataclass(frozen=True, slots=True)
class DynamicNtk:
    """NTK-aware with the base following the length: s = f S / L - (f - 1) once S > L (transformers modeling_rope_utils.py)."""

    factor: float
    original_tokens: int

    name = "dynamic NTK"
    attention_factor = 1.0
    softmax_factor = 1.0

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:
        """As `NtkAware` at the length's own factor."""
        grown = max(self.factor * length / self.original_tokens - (self.factor - 1), 1.0)
        return NtkAware(grown).interpolation(rotary_dim, theta, length)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's temperature: 0.1 m ln s + 1, 1 for s <= 1.

    >>> round(magnitude(40), 5), round(magnitude(40) ** 2, 5)
    (1.36889, 1.87385)
    """
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN as its code does it: the share of interpolation is a ramp over the *index* of the pair (the paper writes it over turns).

    The ramp runs from dim(beta_fast), rounded down, to dim(beta_slow), rounded up (both kept as they are without `truncate`),
    dim(r) = d ln(L / (2 pi r)) / (2 ln theta): the index of the pair that turns r times in L tokens.
    Cosines and sines grow by `attention`, where the config does not say by 0.1 m ln s + 1 (over the same of `mscale_all_dim`);
    DeepSeek-V2 and V3 multiply the softmax scale by the square of the latter instead.
    Source: transformers modeling_rope_utils.py, DeepSeek-V3 inference/model.py precompute_freqs_cis.
    """

    factor: float
    original_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    scales_softmax: bool = False

    name = "YaRN"

    @property
    def attention_factor(self) -> float:
        """Growth of cosines and sines."""
        if self.attention is not None:
            return self.attention
        if self.mscale and self.mscale_all_dim:
            return magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)
        return magnitude(self.factor)

    @property
    def softmax_factor(self) -> float:
        """Growth of the softmax scale."""
        return magnitude(self.factor, self.mscale_all_dim) ** 2 if self.scales_softmax and self.mscale_all_dim else 1.0

    def ramp(self, rotary_dim: int, theta: float) -> tuple[float, float]:
        """First and last index of the ramp.

        >>> Yarn(40, 4096).ramp(64, 1e4)
        (10.0, 23.0)
        """

        def index(turns: float) -> float:
            return rotary_dim * math.log(self.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return float(max(low, 0)), float(min(high, rotary_dim - 1))

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:  # noqa: ARG002
        """1 / (g / s + 1 - g), g the ramp from 0 (kept) to 1 (s times slower)."""
        low, high = self.ramp(rotary_dim, theta)
        share: Pairs = np.clip((np.arange(rotary_dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
        return 1 / (share / self.factor + 1 - share)


@dataclass(frozen=True, slots=True)
class Llama3:
    """Llama 3.1: wavelengths below L / high stay, those above L / low slow s times, a blend in L / lambda between.

    Source: llama-models llama3/model.py apply_scaling; the frequency is blended, not the wavelength.
    """

    factor: float
    original_tokens: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    name = "Llama 3"
    attention_factor = 1.0
    softmax_factor = 1.0

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:  # noqa: ARG002
        """1 / ((1 - g) / s + g), g = (L / lambda - low) / (high - low) kept to 0..1; a step where low = high."""
        turns = self.original_tokens / wavelengths(rotary_dim, theta)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0) if span else (turns >= self.low_freq_factor) * 1.0
        return 1 / ((1 - kept) / self.factor + kept)


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE: factors per pair found by search, one set up to L tokens and one beyond; scores x (1 + ln s / ln L).

    Source: Ding et al. 2024; transformers modeling_rope_utils.py.
    """

    factor: float
    original_tokens: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention: float | None = None

    name = "LongRoPE"
    softmax_factor = 1.0

    @property
    def attention_factor(self) -> float:
        """sqrt(1 + ln s / ln L).

        >>> round(LongRope(32, 4096, (), ()).attention_factor, 5)
        1.19024
        """
        if self.attention is not None:
            return self.attention
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_tokens)) if self.factor > 1 else 1.0

    def interpolation(self, rotary_dim: int, theta: float, length: float) -> Pairs:  # noqa: ARG002
        """The set of the length."""
        chosen = self.long_factor if length > self.original_tokens else self.short_factor
        assert len(chosen) == rotary_dim // 2, f"{len(chosen)} factors for {rotary_dim // 2} pairs"
        return np.array(chosen, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Rotary:
    """RoPE: the first `rotary_dim` elements of queries and keys turned pair by pair; fewer than head_dim is partial RoPE.

    3 FLOPs per turned element (two products, one sum), no weights, nothing per score.  Every distance is legal, but a pair that never
    completed a turn in training meets angles it has not seen (`unseen`).
    """

    rotary_dim: int
    theta: float
    scaling: Scaling = Plain()

    limit = None

    @property
    def name(self) -> str:
        """RoPE and its scaling."""
        return "RoPE" if isinstance(self.scaling, Plain) else f"RoPE, {self.scaling.name}"

    def parameters(self) -> Count:
        """None."""
        return 0.0

    def token_flops(self, heads: Num, kv_heads: Num) -> Flops:
        """3 d_r (n_q + n_kv)."""
        return 3.0 * self.rotary_dim * (heads + kv_heads)

    def pair_flops(self) -> Flops:
        """None."""
        return 0.0

    def table_bytes(self, tokens: Tokens, element_bytes: float = 4.0) -> Bytes:
        """Cosines and sines of every position: 2 S d_r / 2 elements."""
        return 2 * tokens * (self.rotary_dim / 2) * element_bytes

    def interpolation(self, length: float) -> Pairs:
        """Per pair, how many times slower it turns than the plain embedding."""
        return self.scaling.interpolation(self.rotary_dim, self.theta, length)

    def periods(self, length: float) -> Pairs:
        """Tokens of a turn of each pair at a context of `length`."""
        return wavelengths(self.rotary_dim, self.theta) * self.interpolation(length)

    def unseen(self, trained: float, length: float) -> int:
        """Pairs that meet new angles at `length`: no full turn of theirs fits in `trained` tokens, and the positions, slowed as the scaling
        slows them, still pass `trained`.  At the training length itself: those that never completed a period.

        >>> Rotary(128, 1e4).unseen(4096, 8192), Rotary(128, 5e5).unseen(8192, 1048576)
        (18, 29)
        """
        slow = wavelengths(self.rotary_dim, self.theta) > trained
        return int(np.sum(slow & (length / self.interpolation(length) > trained)))

    def incomplete(self, trained: float) -> int:
        """Pairs whose plain wavelength is longer than `trained`.

        >>> Rotary(128, 1e4).incomplete(4096), Rotary(128, 5e5).incomplete(8192), Rotary(128, 5e5).incomplete(1048576)
        (18, 29, 5)
        """
        return int(np.sum(wavelengths(self.rotary_dim, self.theta) > trained))

    @property
    def logit_factor(self) -> float:
        """What the score of turned elements is multiplied by beside 1 / sqrt(d): the inverse of a softmax temperature."""
        return self.scaling.attention_factor**2 * self.scaling.softmax_factor

    def decay_bound(self, distances: Num, length: float = 0.0) -> Num:
        """Upper bound on how a score can depend on distance, over all queries and keys; *not* a score.

        B(m) = 2 / d sum over j = 1..d/2 of |sum over i < j of e^(i m theta_i)| (RoFormer eq. 36, 37).  Falls for a few thousand tokens, then
        oscillates about a floor; it does not go to zero.

        >>> [round(float(b), 2) for b in Rotary(128, 1e4).decay_bound(np.array([0.0, 50.0, 4096.0]))]
        [32.5, 12.63, 4.88]
        """
        angles = np.multiply.outer(np.asarray(distances, dtype=np.float64), 2 * math.pi / self.periods(length))
        partial = np.abs(np.cumsum(np.exp(1j * angles), axis=-1))
        bound: Num = partial.mean(axis=-1)
        return bound


@dataclass(frozen=True, slots=True)
class Temperature:
    """Llama 4: queries of NoPE layers grow with their position, q x (a ln(floor((p + 1) / f) + 1) + 1), 1 up to f tokens.

    One product per query element.  Source: llama-models llama4/model.py.
    """

    scale: float = 0.1
    floor_tokens: int = 8192

    def factor(self, tokens: Tokens) -> Num:
        """The growth at the last of `tokens` tokens.

        >>> round(float(Temperature().factor(1048576)), 4), round(float(Temperature().factor(10485760)), 4)
        (1.486, 1.7155)
        """
        return self.scale * np.log(floor(tokens / self.floor_tokens) + 1) + 1


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a model tells positions apart, as its config says: rotary layers by `theta` and `scaling`, windowed ones by `local_theta` where
    they differ, layers over compressed entries by `compressed`; `scheme` names what is not rotary.
    """

    scheme: str = "rotary"
    theta: float = 10_000.0
    scaling: Scaling = Plain()
    local_theta: float | None = None
    compressed: tuple[float, Scaling] | None = None
    temperature: Temperature | None = None
    bias_max: float = 8.0
    positions: int = 0
