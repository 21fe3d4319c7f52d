"""Serving in steady state: first token, next tokens, throughput, dollars, energy.

Requests of one shape, `concurrency` of them at a time.  A replica prefills one prompt after another and then decodes
all of its sequences together, so with b requests on a replica the mean request takes (b + 1) / 2 prefills and O steps.
Neglected: steps that mix a prefill chunk with decodes (they add a decode's attention to a prefill's linear layers),
queueing of random arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.calibration import Calibration
from simulator.engines import Vllm
from simulator.estimate import Estimate, Interval, bare, estimate, sweep
from simulator.hardware import Cluster
from simulator.model import ModelSpec
from simulator.parallel import Layout
from simulator.phases import Decode, Prefill
from simulator.units import Seconds, ceil


@dataclass(frozen=True, slots=True)
class Request:
    """What one request looks like: `context` tokens in all, `output` of them generated, a share `prefix_hit` of the
    prompt found in the prefix cache.
    """

    context: int
    concurrency: int = 1
    output: int = 1024
    prefix_hit: float = 0.9

    @property
    def prompt(self) -> int:
        """Tokens to prefill."""
        return max(1, self.context - self.output)

    def cached(self, block: int) -> int:
        """Prompt tokens found in the prefix cache: whole blocks, never the last token."""
        return min(int(self.prefix_hit * self.prompt) // block * block, self.prompt - 1)


@dataclass(frozen=True, slots=True)
class Speed:
    """What a layout offers, without rows: seconds of a cold prefill, of a decode step, and of the mean request."""

    ttft_s: Seconds
    tpot_s: Seconds
    latency_s: Seconds


def speed(
    model: ModelSpec, layout: Layout, cluster: Cluster, request: Request, *, engine: Vllm, calibration: Calibration
) -> Speed:
    """The expected times by which layouts are compared; for one layout or an array of them."""

    def seconds(phase: Prefill | Decode) -> Seconds:
        return sweep(model, cluster, layout, phase, calibration=calibration, engine=engine, workers=1, with_footprint=False).seconds

    ttft, tpot = seconds(_prefill(request, engine, cluster, 0)), seconds(_decode(request))
    return Speed(ttft, tpot, latency(layout, request, ttft, tpot))


def latency(layout: Layout, request: Request, ttft_s: Seconds, tpot_s: Seconds) -> Seconds:
    """Seconds from arrival to last token of the mean of `concurrency` requests that arrive together."""
    each = ceil(request.concurrency / (layout.dp * layout.dp_attention * 1.0))
    return (each + 1) / 2 * ttft_s + request.output * tpot_s


def _prefill(request: Request, engine: Vllm, cluster: Cluster, cached: int) -> Prefill:
    return Prefill(float(request.prompt), 1.0, float(cached), float(engine.step_tokens(cluster.gpu)))


def _decode(request: Request) -> Decode:
    return Decode(float(request.context), float(request.concurrency))


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """The full answer for one layout."""

    cold: Estimate
    hit: Estimate
    decode: Estimate
    cached_tokens: int
    input_tokens_per_s_per_gpu: Interval
    output_tokens_per_s_per_gpu: Interval
    usd_per_million_input: Interval | None
    usd_per_million_cached: Interval | None
    usd_per_million_output: Interval | None
    usd_per_request: Interval | None
    joules_per_output_token: Interval | None
    joules_per_input_token: Interval | None


def serve(
    model: ModelSpec, layout: Layout, cluster: Cluster, request: Request, *, engine: Vllm, calibration: Calibration,
    price_usd_per_gpu_hour: float | None,
) -> Service:  # fmt: skip
    """Times, rates and prices of `request` on `layout`.

    $ per million tokens = price x GPUs / 3600 x seconds x 1e6 / tokens (FORMULAS 7.7): input by the cold prefill,
    output by the decode step at the asked concurrency, cached by what a cached prefix adds to prefilling the rest.
    Energy is a bound: every GPU at its TDP; none where that is not known.
    """
    block = engine.block_tokens(model, cluster.gpu)
    cached = request.cached(block)

    def ask(phase: Prefill | Decode) -> Estimate:
        return estimate(model, cluster, layout, phase, engine=engine, calibration=calibration)

    cold, hit, decode = ask(_prefill(request, engine, cluster, 0)), ask(_prefill(request, engine, cluster, cached)), ask(_decode(request))
    uncached = Prefill(float(request.prompt - cached), 1.0, 0.0, float(engine.step_tokens(cluster.gpu)))
    fresh_s = float(bare(model, cluster, layout, uncached, engine=engine, calibration=calibration, with_footprint=False).seconds)
    replica = float(layout.replica_gpus)
    shares = float(layout.dp * layout.dp_attention)
    gpus = replica * shares
    # a prefill occupies its replica, a decode step all of them
    input_seconds = cold.seconds.scaled(replica / request.prompt)
    output_seconds = decode.seconds.scaled(gpus / request.concurrency)
    extra = max(hit.seconds.value - fresh_s, 0.0)
    scale = extra / hit.seconds.value * replica / max(cached, 1)
    cached_seconds = hit.seconds.scaled(scale)
    per_second = None if price_usd_per_gpu_hour is None else price_usd_per_gpu_hour / 3600

    def dollars(seconds: Interval) -> Interval | None:
        return None if per_second is None else seconds.scaled(per_second * 1e6)

    watts = float(cluster.gpu.tdp_w)
    request_seconds = cold.seconds.scaled(replica).plus(output_seconds.scaled(request.output))
    return Service(
        cold=cold, hit=hit, decode=decode, cached_tokens=cached,
        input_tokens_per_s_per_gpu=input_seconds.inverse(), output_tokens_per_s_per_gpu=output_seconds.inverse(),
        usd_per_million_input=dollars(input_seconds), usd_per_million_cached=dollars(cached_seconds),
        usd_per_million_output=dollars(output_seconds),
        usd_per_request=None if per_second is None else request_seconds.scaled(per_second),
        joules_per_output_token=output_seconds.scaled(watts) if watts else None,
        joules_per_input_token=input_seconds.scaled(watts) if watts else None,
    )  # fmt: skip
