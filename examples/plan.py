"""The cheapest of several clusters for one request.

python examples/plan.py
"""

from __future__ import annotations

from simulator import Request, cluster, load_model, size


def offers(name: str = "Llama-3.3-70B-Instruct") -> list[tuple[float, str]]:
    """Dollars of one request of 128K tokens, 8 at a time, on every cluster that holds it; the cheapest first."""
    model, request = load_model(name), Request(context=131072, concurrency=8, output=512)
    found = []
    for gpu, gpus in (("h100", 8), ("h200", 4), ("h200", 8), ("b200", 4), ("mi300x", 4), ("a100", 8)):
        plan = size(model, cluster(gpu, gpus=gpus), request)
        if plan.service is None or plan.service.usd_per_request is None:
            continue
        cost, first = plan.service.usd_per_request, plan.service.cold.seconds
        text = f"{gpus} x {gpu:7} {plan.best.layout!s:10} first token {first.value:5.1f} s   ${cost.low:.3f} to ${cost.high:.3f} per request"
        found.append((cost.value, text))
    return sorted(found)


if __name__ == "__main__":
    for dollars, told in offers():
        print(f"${dollars:.3f}  {told}")
