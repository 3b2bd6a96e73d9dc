"""What was counted, as Prometheus's metric families: names, help texts, labels."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.utils import floatToGoString

from bestroute.observe.bundles import Did
from bestroute.observe.histogram import Histogram
from bestroute.observe.metrics import Metrics, Stages

Labels = tuple[str, ...]


def bound(value: float) -> str:
    """The label "le" of a bucket, as Prometheus writes numbers."""
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def counters(name: str, text: str, names: Sequence[str], values: Mapping[Labels, float]) -> Metric:
    """A family of counters, by the values of their labels."""
    family = CounterMetricFamily(name, text, labels=names)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def gauges(name: str, text: str, names: Sequence[str], values: Mapping[Labels, float]) -> Metric:
    """A family of gauges, by the values of their labels."""
    family = GaugeMetricFamily(name, text, labels=names)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def histograms(
    name: str, text: str, names: Sequence[str], values: Mapping[Labels, Histogram]
) -> Metric:
    """A family of histograms, by the values of their labels."""
    family = HistogramMetricFamily(name, text, labels=names)
    for labels, histogram in values.items():
        buckets = [(bound(end), count) for end, count in histogram.cumulative()]
        family.add_metric(labels, buckets, histogram.sum)
    return family


def means(
    name: str, text: str, names: Sequence[str], values: Mapping[Labels, tuple[int, float]]
) -> Metric:
    """A family of summaries without quantiles, by the values of their labels: count and sum."""
    family = SummaryMetricFamily(name, text, labels=names)
    for labels, (count, total) in values.items():
        family.add_metric(labels, count_value=count, sum_value=total)
    return family


def noted(metrics: Metrics, provider_of: Mapping[str, str]) -> Iterator[Metric]:
    """What was counted request by request.

    Args:
        metrics: the counts. Each is copied at once, since the event loop goes on counting.
        provider_of: provider of each served model.
    """
    yield histograms(
        "bestroute_rpc_duration_seconds",
        "From an RPC's arrival to its end.",
        ("method", "code"),
        {(method, code.name): each for (method, code), each in dict(metrics.rpcs).items()},
    )
    yield gauges(
        "bestroute_rpcs_in_flight",
        "RPCs under way; for RouteStream, open streams.",
        ("method",),
        {(method,): count for method, count in dict(metrics.in_flight).items()},
    )
    yield counters(
        "bestroute_caller_rpcs",
        "RPCs of each caller that has limits of its own.",
        ("caller", "code"),
        {(caller, code.name): count for (caller, code), count in dict(metrics.callers).items()},
    )
    yield counters(
        "bestroute_errors",
        "RPCs and messages of RouteStreams that ended badly, by what went wrong.",
        ("error",),
        {(error,): count for error, count in dict(metrics.errors).items()},
    )
    yield histograms(
        "bestroute_stream_message_duration_seconds",
        "From a RouteStream message's arrival to its answer.",
        ("code",),
        {(code.name,): each for code, each in dict(metrics.messages).items()},
    )
    yield histograms(
        "bestroute_stage_duration_seconds",
        "Where the time of a network's calls went; calls answered from memory have no stages.",
        ("network", "stage"),
        {**_stages("router", metrics.router), **_stages("reward", metrics.reward)},
    )
    yield from _decisions(metrics)
    yield from _bundles(metrics.bundles.by_version())
    yield from _answers(metrics, provider_of)
    yield histograms(
        "bestroute_event_loop_lag_seconds",
        "How late the event loop ran what was due, looked at ten times a second.",
        (),
        {(): metrics.lag},
    )


def _stages(network: str, stages: Stages) -> dict[Labels, Histogram]:
    return {
        (network, "tokenize"): stages.tokenize,
        (network, "queue"): stages.queue,
        (network, "inference"): stages.inference,
    }


def _decisions(metrics: Metrics) -> Iterator[Metric]:
    yield counters(
        "bestroute_decisions",
        "Decisions by the arm that was chosen, and why it is not the one that meets the target.",
        ("model", "samples", "fallback"),
        {
            (model, str(samples), (fallback or "none").lower()): count
            for (model, samples, fallback), count in dict(metrics.decisions).items()
        },
    )
    yield counters(
        "bestroute_session_turns",
        "Turns of sessions, by why the model is the one of the turn before, or another.",
        ("reason", "changed"),
        {
            (reason.lower(), str(changed).lower()): count
            for (reason, changed), count in dict(metrics.session_turns).items()
        },
    )
    yield histograms(
        "bestroute_match_probability",
        "Predicted probability of chosen arms, other than the reference, to be as good as it.",
        (),
        {(): metrics.match_probability},
    )
    yield counters(
        "bestroute_estimated_cost_usd",
        "Estimated cost of what was decided.",
        (),
        {(): metrics.estimated_usd},
    )
    yield counters(
        "bestroute_reference_cost_usd",
        "Estimated cost of the same, had the reference answered it all.",
        (),
        {(): metrics.reference_usd},
    )
    yield counters(
        "bestroute_shadow_decisions",
        "In shadow mode, decisions by the arm that would have been run.",
        ("model", "samples"),
        {(model, str(n)): count for (model, n), (count, _) in dict(metrics.shadow).items()},
    )
    yield counters(
        "bestroute_shadow_cost_usd",
        "In shadow mode, estimated cost of what would have been run.",
        ("model", "samples"),
        {(model, str(n)): usd for (model, n), (_, usd) in dict(metrics.shadow).items()},
    )
    yield counters(
        "bestroute_shadow_saving_usd",
        "In shadow mode, what would have been saved where what would have been run costs less.",
        (),
        {(): metrics.shadow_saving_usd},
    )


def _bundles(did: Mapping[str, Did]) -> Iterator[Metric]:
    """What each bundle did, by its version."""
    yield counters(
        "bestroute_bundle_decisions",
        "Decisions by each bundle, and why they are not the arm that meets the target.",
        ("bundle", "fallback"),
        {
            (version, (fallback or "none").lower()): count
            for version, of in did.items()
            for fallback, count in dict(of.decisions).items()
        },
    )
    yield counters(
        "bestroute_bundle_errors",
        "Requests that a bundle could not answer, by what went wrong.",
        ("bundle", "error"),
        {(v, error): n for v, of in did.items() for error, n in dict(of.errors).items()},
    )
    yield counters(
        "bestroute_bundle_estimated_cost_usd",
        "Estimated cost of what each bundle decided.",
        ("bundle",),
        {(version,): of.estimated_usd for version, of in did.items()},
    )
    yield counters(
        "bestroute_bundle_reference_cost_usd",
        "Estimated cost of the same, had the reference answered it all.",
        ("bundle",),
        {(version,): of.reference_usd for version, of in did.items()},
    )
    yield counters(
        "bestroute_bundle_cost_usd",
        "What the Generates of each bundle cost, by the tokens that they used.",
        ("bundle",),
        {(version,): of.cost_usd for version, of in did.items()},
    )
    yield means(
        "bestroute_bundle_match_probability",
        "Predicted probability of what was chosen to be as good as the reference.",
        ("bundle",),
        {(version,): (of.probabilities, of.probability) for version, of in did.items()},
    )
    yield means(
        "bestroute_bundle_reward",
        "Rewards of answers that were drawn, by the bundle's own reward model.",
        ("bundle",),
        {(version,): (of.rewards, of.reward) for version, of in did.items()},
    )
    yield histograms(
        "bestroute_bundle_decision_duration_seconds",
        "Time that decisions spent in each bundle's router network, waits included.",
        ("bundle",),
        {(version,): of.seconds for version, of in did.items()},
    )
    yield histograms(
        "bestroute_bundle_generate_duration_seconds",
        "From the arrival of a Generate to its result.",
        ("bundle",),
        {(version,): of.answer_seconds for version, of in did.items()},
    )


def _answers(metrics: Metrics, provider_of: Mapping[str, str]) -> Iterator[Metric]:
    names = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

    def served(model: str) -> Labels:
        return ("chat", provider_of.get(model, "unknown"), model)

    yield counters(
        "bestroute_candidates",
        "Answers drawn from LLMs, by why they ended.",
        ("model", "finish_reason"),
        {labels: count for labels, count in dict(metrics.candidates).items()},
    )
    yield counters(
        "bestroute_cost_usd",
        "What the answers cost by the tokens that they used, failed and cancelled ones included.",
        ("model",),
        {(model,): usd for model, usd in dict(metrics.cost_usd).items()},
    )
    yield counters(
        "bestroute_fallbacks",
        "Models that gave no answer, by who was asked instead.",
        ("from", "to"),
        {labels: count for labels, count in dict(metrics.fallbacks).items()},
    )
    yield counters(
        "bestroute_escalations",
        "Results for which the reference was asked as well.",
        (),
        {(): metrics.escalations},
    )
    yield histograms(
        "gen_ai_client_operation_duration_seconds",
        "From when an answer was asked for to its end, waits and retries included.",
        (*names, "error_type"),
        {(*served(model), why): each for (model, why), each in dict(metrics.operations).items()},
    )
    yield histograms(
        "gen_ai_client_token_usage",
        "Tokens of a prompt or of an answer.",
        (*names, "gen_ai_token_type"),
        {(*served(model), kind): each for (model, kind), each in dict(metrics.tokens).items()},
    )
    yield histograms(
        "gen_ai_server_time_to_first_token_seconds",
        "From the arrival of a Generate to the first text of any candidate, by who answered.",
        names,
        {served(model): each for model, each in dict(metrics.first_token).items()},
    )
    yield histograms(
        "gen_ai_server_request_duration_seconds",
        "From the arrival of a Generate to its result, by who answered.",
        names,
        {served(model): each for model, each in dict(metrics.duration).items()},
    )
