"""What one layer does: frozen dataclasses whose fields are named as in config.json.

Every layer answers the same questions: `whole(segments)` (its slice before sharding), `modules(slice)` (weights by
name and format), `cache_row(slice)` and `stored_tokens` (what it remembers), `work(slice, direction)`.
A *mixer* mixes tokens; a *channel mixer* does not.
"""

from simulator.layers.attention import Attention
from simulator.layers.embedding import Embedding, Head
from simulator.layers.latent import LatentAttention
from simulator.layers.layer import Direction, Layer, Mixer, Module, Slice
from simulator.layers.mlp import GatedMLP
from simulator.layers.moe import MoE

#: Every kind of layer; laws and contracts iterate over it.
REGISTRY: tuple[type, ...] = (Attention, LatentAttention, GatedMLP, MoE, Embedding, Head)

__all__ = [
    "REGISTRY", "Attention", "Direction", "Embedding", "GatedMLP", "Head", "LatentAttention", "Layer", "Mixer", "MoE",
    "Module", "Slice",
]  # fmt: skip
