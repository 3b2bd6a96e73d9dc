"""What the web page is told, as JSON has it. Pure."""

import math
import time
from dataclasses import asdict
from typing import Any

from bestroute.best_of_n import FellBack, Result
from bestroute.candidate import Candidate
from bestroute.desk import Decided
from bestroute.observe.history import MINUTE, History, Period
from bestroute.option import Option
from bestroute.order import Routed
from bestroute.pass_through import Event
from bestroute.pricing import cost
from bestroute.router import Router
from bestroute.upstream.completion import Delta, Retried
from bestroute.upstream.usage import Usage

Json = dict[str, Any]

_MOST_PERIODS = 72


def pool(router: Router) -> Json:
    """What a router chooses from, and what each setting of its rule was measured to give."""
    manifest, served = router.manifest, router.providers.models
    trade_offs = manifest.trade_offs
    return {
        "bundle": {"name": manifest.name, "version": manifest.version},
        "reference": manifest.reference_model,
        "models": [
            {
                "name": model.name,
                "served": model.name in served,
                "input_usd_per_mtok": router.prices[model.name].input_usd_per_mtok,
                "output_usd_per_mtok": router.prices[model.name].output_usd_per_mtok,
            }
            for model in manifest.models
        ],
        "arms": [_arm(option, router) for option in router.rules.arms()],
        "trade_offs": [p.model_dump() for p in trade_offs.curve] if trade_offs else None,
        "thresholds": [point.model_dump() for point in manifest.curve],
    }


def decision(routed: Routed, router: Router) -> Json:
    """A decision, with every arm that there was to choose from."""
    decided, timing = routed.decision, routed.timing
    return {
        "arm": _arm(decided.arm, router),
        "reference": _arm(decided.reference, router),
        "criterion": asdict(decided.criterion),
        "fallback": decided.fallback.name.lower() if decided.fallback else None,
        "prompt_tokens": routed.prompt_tokens,
        "truncated": routed.truncated,
        "bundle_version": router.manifest.version,
        "seconds": timing and timing.tokenize + timing.queue + timing.inference,
        "remembered": timing is not None and timing.batch_size == 0,
        "shadow": routed.shadow and _arm(routed.shadow, router),
        "arms": [_arm(each, router) for each in decided.options],
    }


def event(happened: Event, decided: Decided) -> Json:
    """What happened to an answer in the making: an object of one member, named after it."""
    router = decided.router
    match happened:
        case Delta():
            return {"delta": {"candidate": happened.candidate, "text": happened.text}}
        case Retried():
            return {
                "retry": {
                    "candidates": happened.candidates,
                    "model": happened.model,
                    "attempt": happened.attempt,
                    "delay": happened.delay,
                    "cause": str(happened.cause),
                }
            }
        case Candidate():
            return {
                "candidate": {
                    "index": happened.index,
                    "model": happened.model,
                    "text": happened.text,
                    "reward": happened.reward,
                    "usage": _usage(happened.usage),
                    "cost_usd": cost(happened.usage, router.prices[happened.model]),
                    "finish_reason": happened.finish_reason,
                    "error": None if happened.error is None else str(happened.error),
                }
            }
        case FellBack():
            return {
                "fallback": {
                    "failed_model": happened.failed_model,
                    "model": happened.model,
                    "samples": happened.samples,
                    "cause": str(happened.cause),
                }
            }
        case Result():
            return {
                "result": {
                    "candidate": happened.candidate,
                    "model": happened.model,
                    "usage": _usage(happened.usage),
                    "cost_usd": happened.cost_usd,
                    "reference_cost_usd": (decided.routed.decision.reference.estimated_cost_usd),
                    "time_to_first_token": happened.time_to_first_token,
                    "duration": happened.duration,
                    "escalated": happened.escalated,
                }
            }
        case _:
            raise AssertionError("the page has no request of its own to be passed through")


def series(history: History, hours: int) -> Json:
    """The last hours in steps of some minutes, such as had anything in them, and together."""
    step = MINUTE * math.ceil(hours * 60 / _MOST_PERIODS)
    periods: dict[float, Period] = {}
    total = Period(0)
    for minute in history.minutes(hours * 60):
        start = minute.start // step * step
        if not minute.eventless:
            periods.setdefault(start, Period(start)).add(minute)
            total.add(minute)
    return {
        "now": time.time(),
        "hours": hours,
        "since": history.started,
        "step": step,
        "periods": [_period(each) for each in periods.values()],
        "total": _period(total),
    }


def _arm(option: Option, router: Router) -> Json:
    disabled = router.rules.disabled.has(option.model, option.samples)
    return {**option._asdict(), "disabled": disabled}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "estimated": usage.estimated,
    }


def _period(period: Period) -> Json:
    return {
        "start": period.start,
        "decisions": period.decisions,
        "estimated_usd": period.estimated_usd,
        "reference_usd": period.reference_usd,
        "answers": period.answers,
        "answers_usd": period.answers_usd,
        "answers_reference_usd": period.answers_reference_usd,
        "errors": period.errors,
        "failovers": period.failovers,
        "arms": [
            {"model": model, "samples": samples, "decisions": count}
            for (model, samples), count in period.arms.most_common()
        ],
    }
