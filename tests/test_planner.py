"""Which layout is chosen, and what is said of the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Calibration, Layout
from simulator.engines import Vllm
from simulator.parallel import REGISTRY
from simulator.planner import Plan, layouts, plan, refusals, size, smallest, stack
from simulator.serving import Request, latency, serve
from tests.support import MAIN, machine, model

LLAMA, V3 = "meta-llama/Meta-Llama-3.1-70B", "deepseek-ai/DeepSeek-V3"
DEGREES = tuple(scheme.field for scheme in REGISTRY)


def sized(name: str, gpus: int, request: Request, **given: object) -> Plan:
    return size(model(name), machine("h200", gpus), request, **given)  # type: ignore[arg-type]


# ---- the grid


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("gpus", [1, 2, 8, 12, 16])
def test_every_layout_of_the_grid_uses_the_gpus_and_none_comes_twice(name: str, gpus: int) -> None:
    found = list(layouts(model(name), gpus, Vllm()))
    assert found
    assert all(layout.gpus == gpus for layout in found)
    assert len({tuple(getattr(x, d) for d in DEGREES) for x in found}) == len(found)


def test_many_layouts_are_one_of_arrays() -> None:
    chosen = [Layout(tp=8), Layout(tp=4, pp=2), Layout(dp=8)]
    together = stack(chosen)
    for degree in DEGREES:
        assert list(np.broadcast_to(getattr(together, degree), len(chosen))) == [getattr(x, degree) for x in chosen]


# ---- the choice

QUESTIONS = [(8, Request(131_072)), (8, Request(32_768, 64)), (16, Request(1_048_576)), (16, Request(200_000, 12, 4096, 0.5)), (1, Request(8192))]


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(("gpus", "request_"), QUESTIONS, ids=str)
def test_the_choice_obeys_the_rules_fits_and_is_as_fast_as_any(name: str, gpus: int, request_: Request) -> None:
    found = sized(name, gpus, request_)
    for candidate in found.candidates:
        assert candidate.layout.gpus == gpus
        assert refusals(found.model, candidate.layout, found.engine, 8) == []
        assert candidate.fits == (candidate.capacity.whole_sequences >= request_.concurrency)
        assert candidate.fits == (candidate.longest >= request_.context)
        assert (candidate.speed is not None) == candidate.fits
    fitting = [c.speed.latency_s for c in found.candidates if c.speed is not None]
    assert found.fits == bool(fitting)
    assert found.longest.longest == max(c.longest for c in found.candidates)
    assert any(c.layout is found.best.layout for c in found.candidates)
    if found.fits:
        assert found.best.speed is not None
        assert found.best.speed.latency_s <= 1.03 * min(fitting) * (1 + 1e-12)
        assert found.binding_constraint is None
        assert found.service is not None
        assert found.service.decode.layout is found.best.layout
        # the times by which layouts are compared are those that are shown
        assert found.best.speed.ttft_s == pytest.approx(found.service.cold.seconds.value, rel=1e-9)
        assert found.best.speed.tpot_s == pytest.approx(found.service.decode.seconds.value, rel=1e-9)
    else:
        assert found.binding_constraint in ("weights", "cache")
        assert found.service is None
        assert found.best.short_bytes > 0


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("request_", [Request(131_072), Request(1_048_576, 4)], ids=str)
def test_the_smallest_cluster_fits_and_a_smaller_one_does_not(name: str, request_: Request) -> None:
    engine = Vllm()
    found = smallest(model(name), machine("h200", 8), request_, engine)
    assert found is not None
    assert sized(name, found, request_).fits
    for fewer in [n for n in (1, 2, 4, 8, 16, 24, 32) if n < found]:
        try:
            assert not sized(name, fewer, request_).fits, fewer
        except ValueError as refused:
            assert "--" in str(refused)


@pytest.mark.parametrize("name", MAIN[:4])
def test_more_requests_or_longer_ones_never_need_fewer_gpus(name: str) -> None:
    def needed(request: Request) -> int:
        return smallest(model(name), machine("h200", 8), request, Vllm()) or 10**6

    assert needed(Request(65_536)) <= needed(Request(262_144)) <= needed(Request(1_048_576))
    assert needed(Request(131_072, 1)) <= needed(Request(131_072, 8)) <= needed(Request(131_072, 64))


@pytest.mark.parametrize("fixed", [{"tp": 8}, {"tp": 4, "pp": 2}, {"dp": 2}, {"tp": 8, "pp": 1, "dp": 1}], ids=str)
def test_degrees_the_user_insists_on_are_kept(fixed: dict[str, int]) -> None:
    found = sized(LLAMA, 8, Request(32_768), fixed=fixed)
    for candidate in found.candidates:
        assert all(getattr(candidate.layout, d) == n for d, n in fixed.items())


@pytest.mark.parametrize(("fixed", "words"), [({"tp": 6}, "--tp 6"), ({"tp": 16}, "16 GPUs"), ({"tp": 4, "dp": 4}, "make the product equal"), ({"dp_attention": 8}, "--dp-attention 8")], ids=str)
def test_degrees_that_make_no_layout_are_refused(fixed: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sized(LLAMA, 8, Request(32_768), fixed=fixed)


def test_what_is_left_out_is_counted_by_its_rule() -> None:
    found = sized(V3, 16, Request(131_072))
    assert sum(found.refused.values()) + len(found.candidates) == len(list(layouts(model(V3), 16, Vllm())))
    assert all(rule.startswith("--") for rule in found.refused)


# ---- serving


@given(st.integers(2, 2**20), st.floats(0, 1), st.sampled_from([16, 64, 128]))
def test_a_cached_prefix_is_whole_blocks_and_never_the_last_token(context: int, hit: float, block: int) -> None:
    request = Request(context, output=1, prefix_hit=hit)
    cached = request.cached(block)
    assert 0 <= cached < request.prompt
    assert cached <= hit * request.prompt
    assert cached % block == 0 or cached == request.prompt - 1
    assert request.prompt + request.output == context or context == 1


@pytest.mark.parametrize(("concurrency", "each"), [(1, 1), (8, 8), (9, 9), (16, 16)])
def test_requests_that_arrive_together_wait_for_half_of_the_others(concurrency: int, each: int) -> None:
    assert latency(Layout(tp=8), Request(1000, concurrency, 100), 2.0, 0.5) == (each + 1) / 2 * 2.0 + 100 * 0.5
    assert latency(Layout(dp=8), Request(1000, concurrency, 100), 2.0, 0.5) == (-(-each // 8) + 1) / 2 * 2.0 + 100 * 0.5


@pytest.mark.parametrize(("name", "layout"), [(LLAMA, Layout(tp=8)), (LLAMA, Layout(tp=4, dp=2)), (V3, Layout(dp_attention=8, ep=8)), ("openai/gpt-oss-120b", Layout(pp=2, tp=2, ep=2, dp=2))], ids=str)
def test_prices_are_gpu_hours_over_tokens(name: str, layout: Layout) -> None:
    """FORMULAS 7.7: $ per million tokens = n $/h / 3600 / throughput x 1e6; energy = n P / throughput."""
    request, part = Request(65_536, 16, 1024, 0.9), machine("h200", 8)
    found = serve(model(name), layout, part, request, engine=Vllm(), calibration=Calibration.load(part.gpu), price_usd_per_gpu_hour=2.5)
    assert found.usd_per_million_output is not None
    assert found.usd_per_million_input is not None
    assert found.usd_per_million_cached is not None
    output, told = 16 / found.decode.seconds.value, found.output_tokens_per_s_per_gpu.value * 8
    assert told == pytest.approx(output)
    assert found.usd_per_million_output.value == pytest.approx(8 * 2.5 / 3600 / output * 1e6)
    assert found.joules_per_output_token.value == pytest.approx(8 * part.gpu.tdp_w / output)
    replicas = layout.dp * layout.dp_attention
    prefilled = replicas * request.prompt / found.cold.seconds.value
    assert found.input_tokens_per_s_per_gpu.value * 8 == pytest.approx(prefilled)
    assert found.usd_per_million_input.value == pytest.approx(8 * 2.5 / 3600 / prefilled * 1e6)
    assert 0 < found.usd_per_million_cached.value < found.usd_per_million_input.value
    assert found.hit.seconds.value < found.cold.seconds.value
    nothing = serve(model(name), layout, part, request, engine=Vllm(), calibration=Calibration.load(part.gpu), price_usd_per_gpu_hour=None)
    assert nothing.usd_per_million_output is None


# ---- everything that was considered


@pytest.mark.parametrize("name", [LLAMA, V3, "openai/gpt-oss-120b"])
@pytest.mark.parametrize(("gpus", "request_"), [(8, Request(131_072)), (16, Request(1_048_576, 2)), (16, Request(200_000, 400))], ids=str)
def test_a_plan_has_every_layout_of_the_grid_with_its_verdict_and_begins_with_what_size_chooses(name: str, gpus: int, request_: Request) -> None:
    options, chosen = plan(model(name), machine("h200", gpus), request_, detailed=2), sized(name, gpus, request_)
    assert sorted(str(x.layout) for x in options) == sorted(str(x) for x in layouts(model(name), gpus, Vllm()))
    assert str(options[0].layout) == str(chosen.best.layout)
    assert [x.fits for x in options] == sorted((x.fits for x in options), reverse=True)
    for place, option in enumerate(options):
        rules = refusals(model(name), option.layout, chosen.engine, 8)
        assert option.verdict.startswith("refused: " + rules[0] if rules else "fits: " if option.fits else "does not fit: ")
        assert option.fits == (not rules and option.holds >= request_.concurrency and option.longest >= request_.context)
        assert (option.speed is not None) == option.fits
        assert (option.service is not None) == (option.fits and place < 2)
    if chosen.service is not None:
        assert options[0].service is not None
        assert options[0].service.decode.seconds == chosen.service.decode.seconds
        assert options[0].service.cold.seconds.value == pytest.approx(options[0].speed.ttft_s, rel=1e-9)  # type: ignore[union-attr]
        times = [x.speed.latency_s for x in options if x.speed is not None]
        assert times[0] <= 1.03 * min(times)


def test_a_plan_of_degrees_that_break_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="--tp 3: "):
        plan(model(LLAMA), machine("h200", 8), Request(131_072), fixed={"tp": 3})
