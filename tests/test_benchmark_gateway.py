"""The benchmark of the gateway: its upstream, its requests, and what it makes of times."""

from pathlib import Path

import pytest

from benchmarks.gateway import CALLERS, Caller, answering, bodies, measured
from tests.gateways import asking, pool


@pytest.mark.parametrize("kind", ["a model's own name", "bestroute/auto streamed"])
async def test_both_ways_are_measured_for_either_number_of_callers(
    tiny_bundle: Path, kind: str
) -> None:
    async with answering() as url, asking(pool(tiny_bundle, url)) as gateway:
        prompts = (f"easy {number}" for number in range(10_000))
        asked = bodies("small", prompts)[kind]
        ways = Caller(gateway.session, url), Caller(gateway.session, f"{gateway.url}/v1")
        found = await measured(*ways, asked, rounds=1, calls=4)

    for load in ("1 caller", f"{CALLERS} callers"):
        assert found[load].keys() == {"bare", "gateway"}
        assert 0 < found[load]["bare"]["p50_ms"] <= found[load]["bare"]["p99_ms"]
    one = found["1 caller"]
    assert found["added_p50_ms"] == one["gateway"]["p50_ms"] - one["bare"]["p50_ms"]


async def test_a_call_that_fails_is_no_figure(tiny_bundle: Path) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "easy"}]}
    async with asking(pool(tiny_bundle, "http://127.0.0.1:1/v1")) as gateway:
        with pytest.raises(SystemExit, match="502"):
            await Caller(gateway.session, f"{gateway.url}/v1").call(body)
