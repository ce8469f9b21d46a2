"""Switch time against the physical limit: two models whose weights cross a PCIe-like link.

Copies go at 8 to 24 GiB/s, as over PCIe 3 to 5; what a sleep and a wake cost beside the copy is
what vLLM's cost. The limit of a switch is the sum of the two engines' own acts: on one GPU they
must not overlap (vllm#36753). `max` is the longer of them, the limit if they could. `early` is the
time from the last answer of one to the first of the other where its weights came back meanwhile.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from time import perf_counter

from bench.kit import Http, Report, Rpc, arguments, p50, scratch_box
from tests.e2e.harness import Box, SimModel

LINKS = (8.0, 24.0)
"""GiB/s: PCIe 3 x16 or 4 x8, and 4 x16."""
FIXED_S = {"sleep": 0.1, "wake": 0.15, "first step": 0.4}
"""What the simulator takes beside the copy (homegptd.sim.physics and .scheduler). The canary pays
for the first step, so that no client does: it is the warm-up."""
GOAL_SHARE, GOAL_S = 0.10, 0.05
HEAD = "router: {patience_s: 0, min_residency_s: 0, on_deadline: wait}\n"
TOKENS = 5000
"""Of the answer that is waited for: 5 s, and so longer than any weights take."""
A_GB, B_GB = 8.0, 16.0


def main() -> None:
    asked = arguments(__doc__, switches=6)
    columns = (
        "link", "n", "switch s", "limit s", "over %", "over ms", "max s", "early s", "in the goal",
    )  # fmt: skip
    report = Report("transfer", columns)
    for link in LINKS:
        with ExitStack() as stack:
            flags = ("--sim-pcie-gbps", f"{link:g}", "--sim-imports-s", "0", "--sim-compile-s", "0",
                     "--sim-load-gbps", "100", "--sim-pin-gbps", "100",
                     "--sim-tokens-per-s", "1000")  # fmt: skip
            small = "--gpu-memory-utilization", "0.5"
            models = (
                SimModel("a", "active", weights_gb=A_GB, awake_gb=60.0, flags=flags),
                SimModel("b", weights_gb=B_GB, awake_gb=60.0, flags=(*flags, *small)),
            )
            box = stack.enter_context(scratch_box(*models, speed=1.0, head=HEAD))
            daemon = stack.enter_context(box.daemon())
            daemon.ready(120.0)
            _measure(report, box, link, asked.switches, stack)
    report.notes.append("Goal: within 10 % + 50 ms of the limit (the sum).")
    report.show(as_json=asked.json)


def _measure(report: Report, box: Box, link: float, switches: int, stack: ExitStack) -> None:
    rpc = Rpc(box.socket)
    stack.callback(rpc.close)
    took: dict[str, list[float]] = {"a": [], "b": []}
    for number in range(switches):
        to = "ba"[number % 2]
        began = perf_counter()
        view = rpc.call("switch", model=to)
        assert view["state"] == "done", view
        took[to].append(perf_counter() - began)
    times = {"a": A_GB / link, "b": B_GB / link}
    limit = sum(times.values()) + sum(FIXED_S.values())
    both = [*took["a"], *took["b"]]
    over = p50(both) - limit
    longest = max(*times.values()) + FIXED_S["first step"]
    early = p50([_early(box, rpc) for _ in range(3)])
    good = "yes" if over <= GOAL_SHARE * limit + GOAL_S else "no"
    report.add(
        f"{link:g} GiB/s", len(both), p50(both), limit, over / limit * 100, over * 1e3, longest,
        early, good,
    )  # fmt: skip


def _early(box: Box, rpc: Rpc) -> float:
    """Seconds from the last answer of a to the first of b, whose weights come back meanwhile."""
    rpc.call("switch", model="a")
    with ThreadPoolExecutor() as pool:
        last = pool.submit(_answered_at, box, "a", TOKENS)
        while not rpc.call("status")["models"][0]["requests"]["running"]:
            pass
        first = pool.submit(_answered_at, box, "b", 1)
    return first.result() - last.result()


def _answered_at(box: Box, model: str, tokens: int) -> float:
    body = {"model": model, "prompt": "On and on", "max_tokens": tokens, "ignore_eos": True}
    with closing(Http(box.port)) as http:
        http.ask("POST", "/v1/completions", body)
    return perf_counter()


if __name__ == "__main__":
    main()
