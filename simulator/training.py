"""What training on length costs: useful FLOPs of a token, of a stage of a curriculum, and of an optimizer's own products.

Quantities only, of one device that holds everything.  A curriculum is a sequence of stages: the same model, other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.kernels.attention import Segment
from simulator.layers.layer import Direction
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import System
from simulator.units import Count, Flops, Num, Tokens
from simulator.work import fold, quantity


def token_flops(model: ModelSpec, tokens: Num) -> Flops:
    """Useful FLOPs to train on one token in a sequence of `tokens`, forward and backward.

    F(S) = 3/2 x backward(S) / S: backward is twice forward, and scores every token as training does, where a forward step
    scores one per sequence.  For full attention 6 N + 6 (S + 1) sum over layers of n_q d, N the weights that multiply a token.
    Neglected: recompute, the optimizer, masks between packed documents (they lower it).  Source: PaLM (2204.02311) appendix B,
    with causal pairs counted exactly; Llama 3 (2407.21783) section 3.

    >>> from simulator.hf import load_model
    >>> f"{token_flops(load_model('meta-llama/Meta-Llama-3.1-405B'), 131072.0):.3e}"
    '4.046e+12'
    """
    (work,) = System(model, Layout()).step((Segment(1.0, tokens, 0.0),), direction=Direction.BACKWARD)
    backward: Flops = fold(work, quantity("model_flops"))
    return 1.5 * backward / tokens


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """`steps` steps of `sequences` sequences of `length` tokens."""

    steps: Num
    sequences: Num
    length: Num

    @property
    def tokens(self) -> Tokens:
        """Steps x sequences x length.

        >>> Stage(1000, 1920, 32768).tokens
        62914560000
        """
        return self.steps * self.sequences * self.length

    def flops(self, model: ModelSpec) -> Flops:
        """Useful FLOPs of the stage."""
        return self.tokens * token_flops(model, self.length)


def newton_schulz_flops(*, rows: Count, columns: Count, iterations: int = 5) -> Flops:
    """FLOPs by which Muon orthogonalises one matrix of m x n, m <= n: i (4 m^2 n + 2 m^3).

    An iteration is X X^T (2 m^2 n), its square (2 m^3) and its product with X (2 m^2 n).  Source: Muon's Newton-Schulz
    iteration of degree five (Jordan et al. 2024); Kimi K2 runs 5, DeepSeek-V4 10.

    >>> newton_schulz_flops(rows=4096, columns=14336)
    5497558138880
    """
    return iterations * (4 * rows * rows * columns + 2 * rows**3)
