"""What others count themselves, as it was a moment ago: the router with all below it, and traffic.

Taken on the event loop, so that a scrape's thread reads what is finished. A router that is replaced
takes its counts along; what they were is kept, since counters must never fall.
"""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from weakref import ref

from prometheus_client.core import HistogramMetricFamily, Metric

from bestroute import __version__
from bestroute.live import Live
from bestroute.observe.families import Labels, bound, counters, gauges
from bestroute.router import Router
from bestroute.traffic.traffic import Figures, Traffic
from bestroute.upstream.breaker import State
from bestroute.upstream.failures import Reason

Key = tuple[str, ...]
"""A metric's name, and its labels' values."""

_COUNTERS: dict[str, tuple[str, Labels]] = {
    "bestroute_network_inputs": ("Inputs that a network has run.", ("network",)),
    "bestroute_network_refused": (
        "Inputs that were not run: not accepted, evicted for somebody with more right, or late.",
        ("network", "reason"),
    ),
    "bestroute_network_failed_runs": ("Batches that a network failed on.", ("network",)),
    "bestroute_engine_stalls": ("Batches that did not come back in time.", ("network",)),
    "bestroute_batch_tokens": ("Tokens in batches, without padding.", ("network",)),
    "bestroute_batch_padded_tokens": ("Tokens in batches, with padding.", ("network",)),
    "bestroute_remembered": ("Prompts, by whether they were asked lately.", ("result",)),
    "bestroute_provider_calls": ("Calls to a provider, retries among them.", ("provider",)),
    "bestroute_provider_failures": (
        "Calls that failed, answers without text, and calls kept away by a breaker.",
        ("provider", "reason"),
    ),
    "bestroute_provider_retries": ("Calls that were made again.", ("provider",)),
    "bestroute_provider_tokens": ("Tokens used, estimated where unknown.", ("provider", "type")),
    "bestroute_feedback": ("Feedback, by the kind of its source.", ("source",)),
    "bestroute_decision_log_rows": (
        "Rows of the decision log, by whether they were written or lost.",
        ("kind", "result"),
    ),
}
_GAUGES: dict[str, tuple[str, Labels]] = {
    "bestroute_queue_depth": ("Inputs that wait for a network.", ("network",)),
    "bestroute_inputs_running": ("Inputs in batches that a network runs now.", ("network",)),
    "bestroute_provider_calls_in_flight": ("Calls to a provider under way.", ("provider",)),
    "bestroute_provider_breaker_state": (
        "1 for the state that the circuit breaker of a provider's model is in.",
        ("provider", "model", "state"),
    ),
    "bestroute_serving": ("Whether requests can be answered; as health says it.", ()),
    "bestroute_bundle_info": (
        "The bundle that serves, and the canary that gets a share of its traffic.",
        ("role", "name", "version"),
    ),
    "bestroute_canary_serving": (
        "Whether the canary that is configured serves; else the bundle serves all requests.",
        (),
    ),
    "bestroute_canary_share": ("Share of the traffic that the canary is to get.", ()),
    "bestroute_shadow_mode": ("Whether the reference answers whatever is decided.", ()),
    "bestroute_disabled_arm": ("1 for each arm, or model, that is switched off.", ("arm",)),
    "bestroute_drift_decisions": ("Prompts of the last hour, which drift is measured by.", ()),
    "bestroute_drift_psi": (
        "Population stability index of the last hour's prompts against the training data.",
        ("input",),
    ),
    "bestroute_calibration_error": (
        "Expected calibration error of the last day's feedback.",
        (),
    ),
    "bestroute_calibration_outcomes": (
        "Feedback of the last day, by the arm that had answered.",
        ("model", "samples"),
    ),
    "bestroute_expected_quality": (
        "Mean quality that was expected of the answers with feedback of the last day.",
        ("model", "samples"),
    ),
    "bestroute_observed_quality": (
        "Mean quality that their feedback says they had.",
        ("model", "samples"),
    ),
}
_FIGURES_PERIOD = 1.0
"""Seconds between two looks at traffic's figures, which take longer to compute."""
_SIZE = "bestroute_batch_size"
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Snapshots:
    """Looks at what serves.

    Args:
        live: what serves.
        traffic: what watches what it is asked.
    """

    def __init__(self, live: Live, traffic: Traffic) -> None:
        self._live, self._traffic = live, traffic
        self._figures: Figures | None = None
        self._figured = 0.0
        # Routers are not held: they are large, and who replaces them wants them gone.
        self._latest: list[tuple[ref[Router], Counter[Key]]] = []
        self._former = Counter[Key]()
        self._now: tuple[Counter[Key], dict[Key, float]] = Counter[Key](), {}

    def take(self) -> None:
        """Look now."""
        router, canary = self._live.router, self._live.canary
        serving = [router] if canary is None else [router, canary]
        for known, counts in self._latest:
            if not any(known() is each for each in serving):
                self._former.update(counts)
        self._latest = [(ref(each), _counted(each)) for each in serving]
        totals = self._former.copy()
        for _, counts in self._latest:
            totals.update(counts)
        levels = _measured(router)
        self._add_operations(levels)
        if self._figures is None or time.monotonic() - self._figured > _FIGURES_PERIOD:
            self._figures, self._figured = self._traffic.figures(router.manifest), time.monotonic()
        _add(self._figures, totals, levels)
        self._now = totals, levels

    def _add_operations(self, levels: dict[Key, float]) -> None:
        """Add the canary, and what operators overrule."""
        live = self._live
        levels["bestroute_shadow_mode",] = float(live.operations.shadow)
        for arm in live.operations.disabled_arms:
            levels["bestroute_disabled_arm", arm] = 1.0
        if live.canary_serves is not None:
            levels["bestroute_canary_serving",] = float(live.canary_serves)
            levels["bestroute_canary_share",] = live.share
        if (canary := live.canary) is not None:
            manifest = canary.manifest
            levels["bestroute_bundle_info", "canary", manifest.name, manifest.version] = 1.0
            for network, model in canary.networks().items():
                levels["bestroute_queue_depth", network] += model.counts.waiting
                levels["bestroute_inputs_running", network] += model.counts.running
            for provider, of in canary.providers.counts().items():
                key = "bestroute_provider_calls_in_flight", provider
                levels[key] = levels.get(key, 0.0) + of.in_flight

    def families(self) -> Iterator[Metric]:
        """What was last seen."""
        totals, levels = self._now
        by_name = _by_name(totals)
        for name, (text, labels) in _COUNTERS.items():
            yield counters(name, text, labels, by_name[name])
        yield _sizes(by_name[_SIZE])
        by_name = _by_name(levels)
        for name, (text, labels) in _GAUGES.items():
            yield gauges(name, text, labels, by_name[name])
        yield counters(
            "bestroute_bundle_reloads",
            "How often another bundle or other settings were to take over, by whether they did.",
            ("result",),
            {("ok",): self._live.replaced, ("failed",): self._live.failed},
        )
        yield gauges("bestroute_build_info", "What runs.", ("version",), {(__version__,): 1.0})


def _by_name(values: Mapping[Key, float]) -> defaultdict[str, dict[Labels, float]]:
    found = defaultdict[str, dict[Labels, float]](dict)
    for (name, *labels), value in values.items():
        found[name][tuple(labels)] = value
    return found


def _sizes(values: Mapping[Labels, float]) -> Metric:
    """The histogram of batch sizes, from how often each was."""
    family = HistogramMetricFamily(_SIZE, "Inputs in a batch.", labels=("network",))
    buckets = defaultdict[str, list[float]](lambda: [0] * (len(_SIZES) + 1))
    items = Counter[str]()
    for (network, size), count in values.items():
        buckets[network][bisect_left(_SIZES, int(size))] += count
        items[network] += int(size) * int(count)
    ends = [bound(end) for end in (*_SIZES, float("inf"))]
    for network, counts in buckets.items():
        cumulative = list(zip(ends, accumulate(counts), strict=True))
        family.add_metric((network,), cumulative, items[network])
    return family


def _counted(router: Router) -> Counter[Key]:
    """What only rises, by what it is called."""
    totals = Counter[Key]()
    for network, model in router.networks().items():
        counts = model.counts
        totals["bestroute_network_inputs", network] = counts.items
        totals["bestroute_network_refused", network, "not_accepted"] = counts.refused
        totals["bestroute_network_refused", network, "evicted"] = counts.evicted
        totals["bestroute_network_refused", network, "late"] = counts.late
        totals["bestroute_network_failed_runs", network] = counts.failed
        totals["bestroute_engine_stalls", network] = counts.stalls
        totals["bestroute_batch_tokens", network] = counts.tokens
        totals["bestroute_batch_padded_tokens", network] = counts.padded_tokens
        for size, runs in counts.sizes.items():
            totals[_SIZE, network, str(size)] = runs
    hits, misses = router.remembered
    totals["bestroute_remembered", "hit"] = hits
    totals["bestroute_remembered", "miss"] = misses
    for provider, of in router.providers.counts().items():
        totals["bestroute_provider_calls", provider] = of.calls
        for reason in Reason:
            totals["bestroute_provider_failures", provider, reason.value] = of.failures[reason]
        refused = "bestroute_provider_failures", provider, Reason.BREAKER_OPEN.value
        totals[refused] = of.refused_by_breaker
        totals["bestroute_provider_retries", provider] = of.retries
        totals["bestroute_provider_tokens", provider, "input"] = of.input_tokens
        totals["bestroute_provider_tokens", provider, "output"] = of.output_tokens
    return totals


def _measured(router: Router) -> dict[Key, float]:
    """What rises and falls, by what it is called."""
    manifest = router.manifest
    levels: dict[Key, float] = {
        ("bestroute_serving",): float(router.fault() is None),
        ("bestroute_bundle_info", "stable", manifest.name, manifest.version): 1.0,
    }
    for network, model in router.networks().items():
        levels["bestroute_queue_depth", network] = model.counts.waiting
        levels["bestroute_inputs_running", network] = model.counts.running
    for provider, of in router.providers.counts().items():
        levels["bestroute_provider_calls_in_flight", provider] = of.in_flight
        for name, now in of.breakers.items():
            for state in State:
                key = "bestroute_provider_breaker_state", provider, name, state.value
                levels[key] = float(state is now)
    return levels


def _add(figures: Figures, totals: Counter[Key], levels: dict[Key, float]) -> None:
    """Add what traffic tells."""
    for source, count in figures.feedback.items():
        totals["bestroute_feedback", source] = count
    for kind, (written, lost) in figures.rows.items():
        totals["bestroute_decision_log_rows", kind, "written"] = written
        totals["bestroute_decision_log_rows", kind, "lost"] = lost
    if (prompts := figures.prompts) is not None:
        levels["bestroute_drift_decisions",] = prompts.decisions
        for name, index in prompts.stability_index.items():
            levels["bestroute_drift_psi", name] = index
    if (calibration := figures.calibration) is not None:
        levels["bestroute_calibration_error",] = calibration.error
        for (model, samples), of in calibration.by_arm.items():
            arm = model, str(samples)
            levels["bestroute_calibration_outcomes", *arm] = of.outcomes
            if of.outcomes:
                levels["bestroute_expected_quality", *arm] = of.expected
                levels["bestroute_observed_quality", *arm] = of.observed
