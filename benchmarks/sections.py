"""The page's tables of everything but the comparisons: lines of Markdown from a kept record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose first column is text, the others numbers; ends with an empty line."""
    yield f"| {' | '.join(header)} |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def origin(record: Record) -> str:
    """When, of which commit and where a record was made."""
    changed = " with changes" if record["uncommitted_changes"] else ""
    return (
        f"{record['date'][:10]}, commit {record['commit']}{changed}, on {record['machine']['cpu']}"
    )


def stages(record: Record, shape: str) -> Iterator[str]:
    """Where the time of a Route goes."""
    loads = record["figures"]
    yield f"{shape}. Mean us of each stage (share of the round trip); {origin(record)}.\n"
    names = list(next(iter(loads.values()))["stages"])
    rows = [[name, *(_stage(found["stages"][name]) for found in loads.values())] for name in names]
    rows += [
        ["round trip", *(f"{found['round_trip']['mean_us']:,.0f}" for found in loads.values())],
        [
            "Routes per second",
            *(f"{found['plain']['per_second']:,.0f}" for found in loads.values()),
        ],
        [
            "server's CPU us per Route",
            *(f"{found['plain']['cpu_us_per_call']:,.0f}" for found in loads.values()),
        ],
    ]
    yield from table(["stage", *loads], rows)
    yield f"![Stages](results/{record['benchmark']}.svg)\n"


def _stage(found: Mapping[str, float]) -> str:
    return f"{found['mean_us']:,.0f} ({found['share']:.0%})"


def ceiling(record: Record) -> Iterator[str]:
    """What one core takes with an engine that costs nothing."""
    targets = record["settings"]["targets_per_second"]
    yield (
        "Messages per CPU second of the server, with an engine that costs nothing, beside a server "
        f"of gRPC for Python that echoes the same bytes; {origin(record)}.\n"
    )
    rows = [
        [
            name,
            f"{each['echo']['per_core_second']:,.0f}",
            f"{each['bestroute']['per_core_second']:,.0f}",
            f"{each['ratio']:.2f}",
            f"{targets[name.partition(',')[0]]:,}",
        ]
        for name, each in record["figures"].items()
    ]
    yield from table(["load", "echo", "bestroute", "ratio", "target"], rows)


def overload(record: Record, shape: str) -> Iterator[str]:
    """Goodput, shedding and recovery at a multiple of the capacity."""
    settings, found = record["settings"], record["figures"]
    calls = sum(found["outcomes"].values())
    recovered = found["recovery_seconds"]
    yield (
        f"{shape}: {settings['factor']:g} times the capacity for {settings['seconds']:g} s, each "
        f"call with a deadline of {settings['deadline_ms']:g} ms; {origin(record)}.\n"
    )
    outcomes = ", ".join(f"{code} {n / calls:.0%}" for code, n in found["outcomes"].items())
    shed = found["shed_p50_ms"]
    rows = [
        ["capacity within the deadline", f"{found['capacity_per_second']:,.0f} per second"],
        ["offered", f"{found['offered_per_second']:,.0f} per second"],
        [
            "goodput",
            f"{found['goodput_per_second']:,.0f} per second, {found['goodput_share']:.0%} of the "
            "capacity",
        ],
        ["outcomes", outcomes],
        ["shed after, median / p99", "-" if shed is None else _quantiles(found, "shed")],
        ["recovered after", "not" if recovered is None else f"{recovered:.2f} s"],
    ]
    yield from table(["", ""], rows)


def _quantiles(found: Mapping[str, float], name: str) -> str:
    return f"{found[f'{name}_p50_ms']:.1f} / {found[f'{name}_p99_ms']:.1f} ms"


def lag(record: Record, shape: str) -> Iterator[str]:
    """How late the event loop is."""
    callers = record["settings"]["callers"]
    yield f"{shape}, {callers} calls or messages under way; {origin(record)}.\n"
    rows = [
        [
            name,
            f"{each['answers_per_second']:,.0f}",
            *(f"{each[figure]:.2f}" for figure in ("p50_ms", "p99_ms", "max_ms")),
        ]
        for name, each in record["figures"].items()
    ]
    yield from table(["load", "answers/s", "median ms", "p99 ms", "most ms"], rows)


def generate(record: Record) -> Iterator[str]:
    """What Generate adds to the LLMs' own time."""
    found = record["figures"]
    yield (
        "Median / p99 in ms from the upstream's last byte of the last answer needed to the "
        "caller's result, and where n = 1, which isn't scored, also from its first piece to the "
        "first delta; beside the openai client called directly, and one Score of one answer; "
        f"{origin(record)}.\n"
    )
    rows = [
        [
            f"{title}, {row['callers']} callers, n = {row['samples']}, {moment}",
            *(_ms(row[side][key]) for side in ("generate", "direct")),
            _ms(row["score"]),
        ]
        for name, title in (("overhead", "synthetic"), ("standin", "stand-in LLM"))
        for row in found.get(name, ())
        for key, moment in (("first", "first"), ("after", "last"))
        if key == "after" or row["samples"] == 1
    ]
    yield from table(["load", "Generate", "openai alone", "one Score"], rows)
    batches, score = found["batches"], found["score"]
    yield (
        f"Answers scored per second: {score['per_second']:.1f} by Score one at a time, "
        f"{batches['per_second']:.1f} by {batches['callers']} Generates at once with n = "
        f"{batches['samples']}, in batches of {batches['batch_size_mean']:.1f} on average, "
        f"{batches['batch_size_max']} at most.\n"
    )
    for name, what in (
        ("early_stop", "Early stop, where the first answer is good enough"),
        ("cancelled", "A caller who leaves half way"),
    ):
        row = found[name]
        yield (
            f"{what}: {row['share_not_bought']:.0%} of the tokens of whole answers not bought; the "
            f"upstream wrote {row['late_tokens_per_answer_mean']:.1f} tokens per answer too many, "
            f"and was left after {_ms(row['stopped'])} ms (median / p99).\n"
        )


def _ms(found: Mapping[str, float]) -> str:
    return f"{found['p50_ms']:.1f} / {found['p99_ms']:.1f}"


def growth(record: Record) -> Iterator[str]:
    """How times and memory grow."""
    yield (
        "Exponents: 1 is linear, 2 quadratic, - where it does not rise in every round; "
        f"{origin(record)}.\n"
    )
    rows = []
    for found in record["figures"].values():
        if "sizes" not in found:
            continue
        for metric, values in found["medians"].items():
            spans = [each for each in found["exponents"].get(metric, []) if each is not None]
            rows.append(
                [
                    f"{found['title']}, {found['sizes'][0]:,} to {found['sizes'][-1]:,}: "
                    f"{metric.replace('_', ' ')}",
                    f"{values[0]:,.3g}",
                    f"{values[-1]:,.4g}",
                    f"{sorted(spans)[len(spans) // 2]:.2f}" if spans else "-",
                ]
            )
    yield from table(["", "at the smallest", "at the largest", "exponent"], rows)
    yield "![Growth](results/growth.svg)\n"


SHAPES = {
    "ngrams": "The default bundle's router (hashed n-grams)",
    "minilm": "MiniLM-L6 as router",
    "deberta": "A router in the shape of DeBERTa-v3-small, with random weights",
}


def of(records: Mapping[str, Record]) -> Iterator[str]:
    """All sections for which there are records, newest of each kind by name."""
    by_shape: tuple[tuple[str, str, Callable[[Record, str], Iterator[str]]], ...] = (
        ("Where the time of a Route goes", "stages", stages),
        ("Overload", "overload", overload),
        ("Lag of the event loop", "lag", lag),
    )
    for heading, prefix, section in by_shape:
        found = {
            title + more: record
            for shape, title in SHAPES.items()
            for suffix, more in (("", ""), ("-limited", "; server.max_pending set"))
            if (record := records.get(f"{prefix}-{shape}{suffix}"))
        }
        if found:
            yield f"### {heading}\n"
        for title, record in found.items():
            yield from section(record, title)
    once: tuple[tuple[str, str, Callable[[Record], Iterator[str]]], ...] = (
        ("What one core takes", "ceiling", ceiling),
        ("Generate", "generate", generate),
        ("Growth", "growth", growth),
    )
    for heading, name, one in once:
        if name in records:
            yield f"### {heading}\n"
            yield from one(records[name])
