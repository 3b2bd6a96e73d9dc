"""The models that can be asked: `GET /v1/models`."""

import difflib
import json
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from bestroute.call import Call
from bestroute.desk import Desk
from bestroute.errors import InvalidRequest
from bestroute.gateway.boundary import Reply
from bestroute.gateway.errors import UnknownModel
from bestroute.openai_request import PREFIX, target_of
from bestroute.router import Router
from bestroute.target import Policy

_TARGETS = {
    "auto": Policy(),
    "drop-1%": Policy(max_quality_drop=0.01),
    "save-40%": Policy(min_cost_saving=0.4),
}
"""Shown as models; there are as many as there are numbers."""
_LONGEST = 256
"""Characters of a model's name; what is close to a longer one would take long to find."""


class Models:
    """Tells of the models.

    Args:
        desk: where requests are served.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk, self._since = desk, int(time.time())

    async def list(self, reply: Reply, call: Call) -> web.StreamResponse:
        """All of them."""
        data = [self._model(name) for name in names(self._desk.live.router)]
        return reply.json(json.dumps({"object": "list", "data": data}).encode(), {})

    async def one(self, reply: Reply, call: Call) -> web.StreamResponse:
        """One of them, any target included."""
        name = reply.request.match_info["model"]
        try:
            target = target_of(name)
        except InvalidRequest as error:
            raise UnknownModel(f"the model {error.description}") from None
        if target is None:
            known(self._desk.live.router, name)
        return reply.json(json.dumps(self._model(name)).encode(), {})

    def _model(self, name: str) -> Mapping[str, Any]:
        router = self._desk.live.router
        told = {"id": name, "object": "model", "created": self._since, "owned_by": "bestroute"}
        if (price := router.prices.get(name)) is None:
            return told
        prices = {
            "input_usd_per_mtok": price.input_usd_per_mtok,
            "output_usd_per_mtok": price.output_usd_per_mtok,
            "reference": name == router.manifest.reference_model,
        }
        return {**told, "owned_by": "pool", "bestroute": prices}


def names(router: Router) -> list[str]:
    """What can be written for a model: targets in reach, and models that are served and not off."""
    targets = [PREFIX + target for target, policy in _TARGETS.items() if _in_reach(router, policy)]
    served, off = router.providers.models, router.rules.disabled
    pool = (model.name for model in router.manifest.models)
    return [*targets, *(name for name in pool if name in served and not off.has(name, 1))]


def _in_reach(router: Router, policy: Policy) -> bool:
    try:
        router.rules.check(policy)
    except InvalidRequest:
        return False
    return True


def known(router: Router, model: str) -> None:
    """Refuse a name that no provider serves.

    Raises:
        UnknownModel: names those that are close.
    """
    if model in router.providers.models:
        return
    there = names(router)
    close = difflib.get_close_matches(model[:_LONGEST], there, n=3)
    said = " or ".join(f'"{name}"' for name in close)
    hint = f"did you mean {said}?" if close else f"there are: {', '.join(there)}"
    raise UnknownModel(f'no provider here serves the model "{model[:_LONGEST]}"; {hint}')
