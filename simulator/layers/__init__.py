"""What one layer does: frozen dataclasses whose fields are named as in config.json.

Every layer answers the same questions: `whole(segments)` (its slice before sharding), `modules(slice)` (weights by
name and format), `kept(slice)` (what it remembers), `work(slice, direction)`.
A *mixer* mixes tokens; a *channel mixer* does not.
"""

from simulator.layers.attention import Attention
from simulator.layers.block_sparse import MixtureOfBlockAttention, NativeSparseAttention
from simulator.layers.compressed import CompressedAttention
from simulator.layers.deltanet import GatedDeltaNet, KimiDeltaAttention
from simulator.layers.embedding import Embedding, Head
from simulator.layers.hyper import HyperConnection, Linear, ParallelMixers
from simulator.layers.indexed_latent import IndexedLatentAttention
from simulator.layers.latent import LatentAttention
from simulator.layers.layer import Direction, Layer, Mixer, Module, Slice
from simulator.layers.linear_attention import LightningAttention, Retention
from simulator.layers.mlp import MLP, GatedMLP
from simulator.layers.moe import MoE
from simulator.layers.state_space import S4, Mamba, Mamba2, ShortConv

#: Every kind of layer; laws and contracts iterate over it.
REGISTRY: tuple[type, ...] = (
    Attention, LatentAttention, IndexedLatentAttention, CompressedAttention, NativeSparseAttention, MixtureOfBlockAttention,
    LightningAttention, Retention, GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, S4, ShortConv, ParallelMixers,
    GatedMLP, MLP, MoE, Linear, HyperConnection, Embedding, Head,
)  # fmt: skip

__all__ = [
    "MLP", "REGISTRY", "S4", "Attention", "CompressedAttention", "Direction", "Embedding", "GatedDeltaNet", "GatedMLP", "Head",
    "HyperConnection", "IndexedLatentAttention", "KimiDeltaAttention", "LatentAttention", "Layer", "LightningAttention", "Linear",
    "Mamba", "Mamba2", "Mixer", "MixtureOfBlockAttention", "MoE", "Module", "NativeSparseAttention", "ParallelMixers", "Retention",
    "ShortConv", "Slice",
]  # fmt: skip
