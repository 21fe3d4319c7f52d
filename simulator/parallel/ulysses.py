"""Ulysses: u ranks hold different tokens outside the core and different heads inside it.

An all-to-all turns tokens / u x heads into tokens x heads / u for queries, keys and values, another turns the outputs
back.  Key-value heads below u are repeated before they travel; a latent, which no head split divides, is gathered whole.
Wire bytes of a rank, forward: (u - 1) / u x T / u x (2 n_q + 2 max(n_kv, u)) d e.  u divides the heads of a tensor rank.
With context parallelism over the same sequences it is USP: u ranks inside, a ring of n outside (2405.07719).
Source: DeepSpeed-Ulysses (2309.14509); FORMULAS 5.7.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulator.dtypes import BF16, CacheFormat
from simulator.kernels.messages import message
from simulator.layers import Attention, LatentAttention
from simulator.layers.layer import Direction, Layer, Mixer, Slice, is_mixer
from simulator.model import ModelSpec
from simulator.parallel.context import made, resident
from simulator.parallel.scheme import Scheme, divisors, has_mixing, is_one, mixing_of, with_mixing
from simulator.units import ceil, maximum
from simulator.work import Serial, Work


class Ulysses(Scheme):
    """`ulysses` ranks exchange tokens for heads around the core."""

    field = "ulysses"

    def shard(self, held: Slice, layer: Layer) -> Slice:
        """Tokens / u (decoding: sequences / u).  What is resident lies by heads: key-value heads / u, one at least; latents whole."""
        u = self.degree
        if is_one(u):
            return held
        if resident(held):
            return held._replace(kv_heads=maximum(held.kv_heads / u, 1.0)) if is_mixer(layer) else held
        return held._replace(segments=tuple(
            s._replace(sequences=ceil(s.sequences / u)) if s.split_kv else s._replace(new_tokens=s.new_tokens / u) for s in held.segments
        ))  # fmt: skip

    def spread(self, held: Slice) -> Slice:
        """Inside the core: every token of the group, heads / u."""
        u = self.degree
        if is_one(u):
            return held
        return held._replace(
            segments=tuple(
                s._replace(sequences=s.sequences * u) if s.split_kv else s._replace(new_tokens=s.new_tokens * u) for s in held.segments
            ),
            heads=held.heads / u, kv_heads=maximum(held.kv_heads / u, 1.0),
        )  # fmt: skip

    def around(self, work: Work, layer: Layer, held: Slice, cache: CacheFormat, direction: Direction) -> Work:
        """Two all-to-alls around the core; backward the same four tensors' gradients."""
        u = self.degree
        if is_one(u) or not is_mixer(layer):
            return work
        if not has_mixing(work):
            return work
        alone = is_one(self.layout.cp)
        core = mixing_of(layer.work(self.spread(held), direction, cache=cache)) if alone else mixing_of(work)
        group, tokens = self.layout.groups["ulysses"], held.tokens
        queries, outputs = made(layer, held)
        before: list[Work] = []
        if isinstance(layer, LatentAttention):
            latent = tokens * u * self._row(layer, held)
            before.append(message("gather latents", "all_gather", group=group, payload_bytes=latent))
            rows = queries * BF16.bytes
        else:
            repeated = maximum(u / held.kv_heads, 1.0)
            rows = queries * BF16.bytes + self._row(layer, held) * repeated
        before.append(message("tokens to heads", "all_to_all", group=group, payload_bytes=tokens * rows))
        after = message("heads to tokens", "all_to_all", group=group, payload_bytes=tokens * outputs * BF16.bytes)
        return with_mixing(work, Serial([*before, core, after]))

    @staticmethod
    def _row(layer: Mixer, held: Slice) -> float:
        row = layer.cache_row(held)
        return (row.elements + row.rope) * BF16.bytes  # type: ignore[return-value]

    def refusals(self, model: ModelSpec) -> Iterator[str]:
        """It cannot outgrow the heads of a tensor rank."""
        u, t = int(self.degree), int(self.layout.tp)
        if u == 1:
            return
        for layer in model.layers:
            if isinstance(layer, (Attention, LatentAttention)) and (layer.num_attention_heads // t) % u:
                heads = layer.num_attention_heads // t
                yield (
                    f"--ulysses {u}: {model.name} has {heads} attention heads on a rank of --tp {t}; use a divisor: {divisors(heads)}, "
                    f"or a ring, which has no such limit (--cp)"
                )
                return
        if any(is_mixer(layer) and not isinstance(layer, (Attention, LatentAttention)) for layer in model.layers):
            yield f"--ulysses {u}: {model.name} has mixers whose heads are not exchanged here; use --cp"
        if self.layout.dcp > 1 or self.layout.helix > 1:
            yield f"--ulysses {u}: the cache is split over its ranks already; leave --dcp and --helix out"
