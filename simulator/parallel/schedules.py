"""Schedules of a training pipeline: how long a step takes, what part of it is a bubble, what is in flight.

Legend: p stages, m microbatches of a step (per replica), v model chunks of a stage, F seconds of one microbatch's forward
on one stage, B of its backward (weight gradients included), W of the weight gradients alone, FB of a forward and a
backward run together.  A makespan is (work of a stage) + bubble; the closed forms equal schedules run step by step
(tests/test_schedules.py).  Neglected: sends between stages (give them as part of F and B), the optimizer.
Source: GPipe (1811.06965); PipeDream-Flush / Megatron-LM (2104.04473) for 1F1B and interleaved; Zero Bubble (2401.10241)
ZB-H1; deepseek-ai/DualPipe@3da1bbea README; FORMULAS 4.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from simulator.units import Count, Fraction, Num, Seconds, minimum

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe")


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """One of `SCHEDULES` over p stages; `chunks` only for interleaved."""

    name: str
    stages: Num
    microbatches: Num
    chunks: Num = 1.0

    def bubble_s(self, *, forward_s: Seconds, backward_s: Seconds, weight_s: Seconds = 0.0, together_s: Seconds | None = None) -> Seconds:
        """Seconds a stage idles in one step.

        gpipe and 1f1b (p - 1)(F + B); interleaved (p - 1)(F + B) / v; zero_bubble (p - 1)(F + B - 2 W);
        dualpipe (p / 2 - 1)(FB + B - 3 W).  Validity: equal stages, m >= p (dualpipe: m >= 2 p, both even); interleaved:
        m a multiple of p; zero_bubble: F = B - W = W, else a bound from below.

        >>> Schedule("1f1b", 16, 64).bubble_s(forward_s=1.0, backward_s=2.0)
        45.0
        """
        p, both = self.stages, forward_s + backward_s
        if self.name == "interleaved":
            return (p - 1) * both / self.chunks
        if self.name == "zero_bubble":
            return (p - 1) * (both - 2 * weight_s)
        if self.name == "dualpipe":
            return (p / 2 - 1) * ((both if together_s is None else together_s) + backward_s - 3 * weight_s)
        return (p - 1) * both

    def bubble_fraction(self) -> Fraction:
        """Bubble over ideal time with F = W = B / 2: (p - 1) / (v m) for the first three, as papers print it.

        >>> round(Schedule("1f1b", 16, 64).bubble_fraction(), 3), round(Schedule("interleaved", 16, 64, 8).bubble_fraction(), 4)
        (0.234, 0.0293)
        """
        return self.bubble_s(forward_s=1.0, backward_s=2.0, weight_s=1.0) / (3.0 * self.microbatches)

    def makespan_s(self, *, forward_s: Seconds, backward_s: Seconds, weight_s: Seconds = 0.0) -> Seconds:
        """Seconds of a step: m (F + B) + bubble.  What a forward and a backward gain by running together is left out."""
        return self.microbatches * (forward_s + backward_s) + self.bubble_s(forward_s=forward_s, backward_s=backward_s, weight_s=weight_s)

    def in_flight(self, stage: Num = 0.0) -> Count:
        """Microbatches whose activations a stage keeps at most, counted in whole stages.

        gpipe m; 1f1b min(m, p - i) on stage i; interleaved p + (p - 1) / v on the first; zero_bubble as 1f1b; dualpipe
        p + 1 on every stage (of two half-size directions: counted in its own microbatches).

        >>> Schedule("interleaved", 16, 64, 8).in_flight() / 16
        1.1171875
        """
        p, m = self.stages, self.microbatches
        if self.name == "gpipe":
            return m
        if self.name == "interleaved":
            return minimum(m, p * (1 + (p - 1) / (p * self.chunks)))
        if self.name == "dualpipe":
            return minimum(m, p + 1)
        return minimum(m, p - stage)

    @property
    def weight_copies(self) -> float:
        """Copies of the parameters a GPU holds: dualpipe runs both ends of the model on every rank."""
        return 2.0 if self.name == "dualpipe" else 1.0

    def refusals(self) -> Iterator[str]:
        """What the schedule cannot run."""
        p, m = int(self.stages), int(self.microbatches)
        if self.name not in SCHEDULES:
            yield f"--schedule {self.name}: unknown; use one of {', '.join(SCHEDULES)}"
        if self.name == "interleaved" and m % p:
            yield f"--schedule interleaved: {m} microbatches are no multiple of {p} stages; use {-(-m // p) * p}"
        if self.name == "dualpipe" and (p % 2 or m % 2 or m < 2 * p):
            yield f"--schedule dualpipe: {p} stages and {m} microbatches; both must be even and microbatches at least 2 x stages = {2 * p}"


def gpipe_makespan_s(forward_s: Sequence[Seconds], backward_s: Sequence[Seconds], microbatches: Num) -> Seconds:
    """Uneven stages under gpipe: sum F + (m - 1) max F + sum B + (m - 1) max B, exact (two permutation flow shops)."""
    ahead, back = _sum_and_largest(forward_s), _sum_and_largest(backward_s)
    return ahead[0] + back[0] + (microbatches - 1) * (ahead[1] + back[1])


def one_f_one_b_least_s(forward_s: Sequence[Seconds], backward_s: Sequence[Seconds], microbatches: Num) -> Seconds:
    """Uneven stages under 1f1b take at least max over stages i of sum of F before i + m (F_i + B_i) + sum of B before i;
    exact where stages are equal.
    """
    least: Seconds = 0.0
    before: Seconds = 0.0
    for ahead, back in zip(forward_s, backward_s, strict=True):
        least = _larger(least, before + microbatches * (ahead + back))
        before = before + ahead + back
    return least


def one_f_one_b_most_s(forward_s: Sequence[Seconds], backward_s: Sequence[Seconds], microbatches: Num) -> Seconds:
    """... and at most sum (F + B) + (m - 1) max (F + B); exact where stages are equal."""
    total, largest = _sum_and_largest([ahead + back for ahead, back in zip(forward_s, backward_s, strict=True)])
    return total + (microbatches - 1) * largest


def _larger(a: Num, b: Num) -> Num:
    return -minimum(-a, -b)


def _sum_and_largest(values: Sequence[Num]) -> tuple[Num, Num]:
    total, largest = values[0], values[0]
    for value in values[1:]:
        total, largest = total + value, _larger(largest, value)
    return total, largest
