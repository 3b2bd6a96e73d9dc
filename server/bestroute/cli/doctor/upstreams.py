"""The LLMs' APIs: are they there, do they take the key, do they know the models.

All that is asked is `GET {base_url}/models`, which costs nothing anywhere.
"""

import json
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from bestroute.addresses import is_loopback
from bestroute.cli.doctor.findings import Finding, fail, ok, warn
from bestroute.config import ConfigInvalid, Provider, Settings, instead

_TIMEOUT = aiohttp.ClientTimeout(total=5)
_MOST_BYTES = 1 << 22


class _Answer(NamedTuple):
    """What an API says of its models.

    Attributes:
        status: of HTTP.
        models: their names; None: it is no such list.
    """

    status: int
    models: list[str] | None


async def checks(settings: Settings, *, offline: bool) -> AsyncIterator[Finding]:
    """Every provider that serves a model.

    Args:
        settings: the configuration.
        offline: ask nobody.
    """
    used = {model.provider for model in settings.models.values()}
    for name in sorted(used):
        provider = settings.providers[name]
        for finding in _written(name, provider):
            yield finding
        try:
            secret = provider.api_key()
        except ConfigInvalid as error:
            yield fail(f"providers.{name}: {error}")
            continue
        if not offline:
            wanted = {
                model.upstream or pooled
                for pooled, model in settings.models.items()
                if model.provider == name
            }
            key = secret.get_secret_value() if secret else None
            for finding in await _asked(name, provider, key, wanted):
                yield finding


def _written(name: str, provider: Provider) -> Iterator[Finding]:
    """What the URL alone tells."""
    url = URL(str(provider.base_url))
    host = url.host or ""
    if url.path.rstrip("/").endswith("/chat/completions"):
        yield fail(f"providers.{name}.base_url: leave /chat/completions away, which is added to it")
    keyed = provider.api_key_env or provider.api_key_file
    if url.scheme == "http" and keyed and not is_loopback(host):
        yield warn(f"providers.{name}.base_url: the key travels to {host} in the clear; use https")
    if is_loopback(host) and url.scheme in getproxies() and not proxy_bypass(host):
        yield warn(
            f"providers.{name}.base_url is on this machine, but calls to it go through the proxy "
            f"in {url.scheme}_proxy; set no_proxy={host}"
        )


async def _asked(name: str, provider: Provider, key: str | None, wanted: set[str]) -> list[Finding]:
    base = URL(str(provider.base_url))
    where = f"providers.{name}: {base}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers, trust_env=True) as session:
        try:
            answer = await _models(session, base)
            if answer.models is None and answer.status not in (401, 403):
                for other in _others(base):
                    if (await _models(session, other)).models is not None:
                        return [fail(f'{where} is not where its API is; set base_url = "{other}"')]
        except TimeoutError:
            return [fail(f"{where} does not answer within {_TIMEOUT.total:g} s; is it up?")]
        except (aiohttp.ClientError, OSError) as error:
            why = str(error) or type(error).__name__
            return [fail(f"{where} can't be reached ({why}); is it up, and base_url right?")]
    if answer.status in (401, 403):
        shown = "refuses the key" if key else "wants a key: set api_key_env or api_key_file"
        return [fail(f"{where} {shown} (HTTP {answer.status})")]
    if answer.models is None:
        return [
            warn(
                f"{where} has no list of models (HTTP {answer.status} from /models), so whether it "
                "knows these is not known; try `bestroute generate --model`"
            )
        ]
    found = [ok(f"{where} answers, and lists {len(answer.models)} models")]
    for model in sorted(wanted):
        if model not in answer.models:
            words = instead(model, answer.models[:20])
            found.append(
                warn(f'providers.{name} does not list the model "{model}"{words}; see upstream = ')
            )
    return found


async def _models(session: aiohttp.ClientSession, base: URL) -> _Answer:
    url = base.joinpath("models").with_query(base.query)
    async with session.get(url, allow_redirects=False) as response:
        try:
            body = json.loads(await response.content.read(_MOST_BYTES))
            names = [str(each["id"]) for each in body["data"]] if response.status == 200 else None
        except (ValueError, KeyError, TypeError):
            names = None
        return _Answer(response.status, names)


def _others(base: URL) -> Iterator[URL]:
    """Where else it may be: most leave the version away, or have it twice."""
    path = base.path.rstrip("/")
    for end in ("/chat/completions", "/v1/chat/completions"):
        if path.endswith(end):
            yield base.with_path(path.removesuffix(end) or "/")
    if path.endswith("/v1/v1"):
        yield base.with_path(path.removesuffix("/v1"))
    elif path.endswith("/v1"):
        yield base.with_path(path.removesuffix("/v1") or "/")
    else:
        yield base.with_path(f"{path}/v1")
