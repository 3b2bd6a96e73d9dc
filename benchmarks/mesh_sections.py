"""The page's tables of the gateway, of Envoy and of changes under load, from kept records."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.sections import Record, origin, table


def quantiles(found: Mapping[str, Any]) -> str:
    """Median and 99th percentile in ms."""
    return f"{found['p50_ms']:.2f} / {found['p99_ms']:.2f}"


def gateway(record: Record) -> Iterator[str]:
    """What the gateway adds to an upstream call."""
    yield (
        "Median / 99th percentile in ms of one caller, the same call bare and through the "
        "gateway, in turn, and calls per second of 32; streamed: 50 pieces, to the last; "
        f"{origin(record)}.\n"
    )
    rows = [
        [
            name,
            quantiles(found["1 caller"]["bare"]),
            quantiles(found["1 caller"]["gateway"]),
            f"{found['added_p50_ms']:+.2f}",
            f"{found['32 callers']['gateway']['per_second']:,.0f}",
        ]
        for name, found in record["figures"].items()
    ]
    yield from table(["request", "bare", "gateway", "added", "per second"], rows)


def processing(record: Record) -> Iterator[str]:
    """What ext_proc adds to a request through Envoy."""
    yield (
        "Median / 99th percentile in ms through the same Envoy without and with our ext_proc: one "
        "caller; 16 whose upstream takes 50 to 150 ms, without those; 16 flat out; "
        f"{origin(record)}.\n"
    )
    rows = [
        [
            name,
            quantiles(found["plain"]),
            quantiles(found["asking"]),
            f"{found['added_ms']:+.2f}",
            f"{found['asking']['per_second']:,.0f}",
        ]
        for name, found in record["figures"].items()
    ]
    yield from table(["load", "without", "with", "added", "per second"], rows)


def rolling(record: Record) -> Iterator[str]:
    """Restarts behind Envoy, and load reports."""
    runs, shares = record["figures"]["runs"], record["figures"]["shares"]
    yield (
        "Two replicas behind an Envoy, restarted one after the other, ten times each; median / "
        f"99th percentile in ms; {origin(record)}.\n"
    )
    rows = [
        [
            name,
            *(quantiles(found) for found in run["methods"].values()),
            f"{sum(found['calls'] for found in run['methods'].values()):,}",
            str(sum(run["failed"].values())),
        ]
        for name, run in runs.items()
    ]
    methods = list(next(iter(runs.values()))["methods"])
    yield from table(["", *methods, "calls", "failed"], rows)
    yield "One of the two is kept busy from elsewhere:\n"
    yield from table(
        ["calls given", "to the idler", "median / p99 ms"],
        [[name, f"{found['idler']:.0%}", quantiles(found)] for name, found in shares.items()],
    )


def reloads(record: Record) -> Iterator[str]:
    """Bundles, canaries, kill switch and shadow mode changed under load."""
    figures = record["figures"]
    memory = figures["resident_mb"]
    yield (
        f"{figures['reloads']} changes of bundle, canary, kill switch and shadow mode in "
        f"{figures['reload_seconds']:.0f} s under load: {figures['failed']} calls failed, "
        f"{figures['wrong']} answers were of a wrong version, resident memory {memory[0]:.0f} MB, "
        f"then {memory[-1]:.0f} MB; median / 99th percentile in ms; {origin(record)}.\n"
    )
    methods = [name.removesuffix(", quiet") for name in figures if name.endswith(", quiet")]
    rows = [
        [each, quantiles(figures[f"{each}, quiet"]), quantiles(figures[f"{each}, reloads"])]
        for each in methods
    ]
    yield from table(["", "quiet", "changing"], rows)


def kserve(record: Record) -> Iterator[str]:
    """Networks on a Triton."""
    yield (
        "MiniLM-L6 as router, here and on a Triton (Python backend, one instance) on the same two "
        f"cores; {origin(record)}.\n"
    )
    rows = [
        [
            name.replace("-", ", ") + " callers",
            f"{found['per_second']:,.0f}",
            quantiles(found),
            f"{found['front_ms']:.2f}",
        ]
        for name, found in record["figures"].items()
        if name != "runs"
    ]
    yield from table(["", "answers per second", "median / p99 ms", "front end's CPU ms"], rows)


def of(records: Mapping[str, Record]) -> Iterator[str]:
    """All sections for which there are records."""
    all_of_them: tuple[tuple[str, str, Callable[[Record], Iterator[str]]], ...] = (
        ("The OpenAI-compatible gateway", "gateway", gateway),
        ("Envoy's ext_proc", "processing", processing),
        ("Rolling restarts and load reports", "rolling", rolling),
        ("Changes under load", "reloads", reloads),
        ("A remote engine", "kserve-minilm", kserve),
    )
    for heading, name, section in all_of_them:
        if name in records:
            yield f"### {heading}\n"
            yield from section(records[name])
