"""`bestroute doctor --config` asks real HTTP servers, which have what newcomers get wrong."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.doctoring import NOBODY, Doctor, Told

KEY = "sk-secret"


class Api:
    """An API that lists its models at /v1/models, to who has the key.

    Attributes:
        asked: paths.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.models = ["gpt-small", "gpt-medium", "gpt-large"]
        self.root = ""
        self.wants_key = False
        self.web_page = False

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.method} {request.path}")
        if request.path == "/v1/models":
            if self.wants_key and request.headers.get("Authorization") != f"Bearer {KEY}":
                return web.json_response({"error": {"message": "no"}}, status=401)
            return web.json_response({"data": [{"id": name} for name in self.models]})
        if self.web_page:
            return web.Response(text="<html>", content_type="text/html")
        raise web.HTTPNotFound


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    api, app = Api(), web.Application()
    app.router.add_route("*", "/{path:.*}", api.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.root = "http://{}:{}".format(*runner.addresses[0][:2])
    yield api
    await runner.cleanup()


@pytest.fixture
def examine(doctor: Doctor, tmp_path: Path, tiny_bundle: Path) -> Any:
    """Examines a configuration with the pool at one provider; small is called what is said."""

    async def run(base_url: str, *arguments: str, small: str = "gpt-small", key: str = "") -> Told:
        price = "price = { input_usd_per_mtok = 1.0, output_usd_per_mtok = 2.0 }"
        models = "".join(
            f'[models.{name}]\nprovider = "test"\nupstream = "{upstream}"\n{price}\n'
            for name, upstream in (
                ("small", small), ("medium", "gpt-medium"), ("large", "gpt-large")
            )
        )  # fmt: skip
        (file := tmp_path / "bestroute.toml").write_text(
            f"bundle = '{tiny_bundle}'\n[server]\nlisten = \"127.0.0.1:0\"\n"
            f'[providers.test]\nbase_url = "{base_url}"\n{key}\n{models}'
        )
        return await doctor("--config", file, *arguments)

    return run


async def test_an_api_that_is_there_is_well(examine: Any, api: Api) -> None:
    done = await examine(f"{api.root}/v1")

    assert (done.code, done.err) == (0, "")
    done.line("ok", f"{api.root}/v1 answers, and lists 3 models")
    assert api.asked == ["GET /v1/models"], "nothing that costs"


async def test_offline_asks_nobody(examine: Any, api: Api) -> None:
    done = await examine(f"{api.root}/v1", "--offline")

    assert done.code == 0
    assert api.asked == []


@pytest.mark.parametrize("web_page", [False, True])
@pytest.mark.parametrize("path", ["", "/", "/v1/v1", "/v1/chat/completions"])
async def test_versions_that_are_missing_or_doubled_are_told(
    examine: Any, api: Api, path: str, web_page: bool
) -> None:
    """Some servers answer anything with a web page."""
    api.web_page = web_page
    done = await examine(f"{api.root}{path}")

    assert done.code == 1
    done.line("FAIL", f'set base_url = "{api.root}/v1"')


async def test_the_end_of_the_path_is_added_by_us(examine: Any, api: Api) -> None:
    done = await examine(f"{api.root}/v1/chat/completions", "--offline")

    done.line("FAIL", "leave /chat/completions away")


async def test_models_under_another_name_are_told(examine: Any, api: Api) -> None:
    done = await examine(f"{api.root}/v1", small="gpt-smal")

    assert done.code == 0
    line = done.line("WARN", 'does not list the model "gpt-smal"')
    assert 'did you mean "gpt-small"?' in line


async def test_apis_without_a_list_are_told(examine: Any, api: Api) -> None:
    done = await examine(f"{api.root}/other")

    assert done.code == 0
    done.line("WARN", "has no list of models (HTTP 404 from /models)")
    assert api.asked == ["GET /other/models", "GET /other/v1/models"]


async def test_missing_keys_are_told(
    examine: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_API_KEY", raising=False)
    done = await examine(f"{api.root}/v1", key='api_key_env = "TEST_API_KEY"')

    assert done.code == 1
    done.line("FAIL", "providers.test: set TEST_API_KEY in the environment")
    assert api.asked == []


async def test_refused_keys_are_told_and_never_shown(
    examine: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.wants_key = True
    key = 'api_key_env = "TEST_API_KEY"'
    without = await examine(f"{api.root}/v1")
    monkeypatch.setenv("TEST_API_KEY", "sk-wrong")
    wrong = await examine(f"{api.root}/v1", key=key)
    monkeypatch.setenv("TEST_API_KEY", KEY)
    right = await examine(f"{api.root}/v1", key=key)

    without.line("FAIL", "wants a key: set api_key_env or api_key_file (HTTP 401)")
    wrong.line("FAIL", "refuses the key (HTTP 401)")
    assert right.code == 0
    assert "sk-" not in without.out + without.err + wrong.out + wrong.err + right.out


async def test_apis_that_are_away_are_told(examine: Any) -> None:
    done = await examine(f"http://{NOBODY}/v1")

    assert done.code == 1
    assert "is it up" in done.line("FAIL", f"http://{NOBODY}/v1 can't be reached")


async def test_apis_that_hang_are_told(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import ClientTimeout

    from bestroute.cli.doctor import upstreams

    monkeypatch.setattr(upstreams, "_TIMEOUT", ClientTimeout(total=0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = await examine(f"http://127.0.0.1:{silent.getsockname()[1]}/v1")

    done.line("FAIL", "does not answer within 0.3 s")


async def test_proxies_that_capture_this_machine_are_told(
    examine: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://{NOBODY}")
    captured = await examine(f"{api.root}/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    excepted = await examine(f"{api.root}/v1")

    captured.line("WARN", "go through the proxy in http_proxy; set no_proxy=127.0.0.1")
    assert excepted.code == 0


async def test_keys_in_the_clear_are_told(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", KEY)
    done = await examine("http://192.0.2.1/v1", "--offline", key='api_key_env = "TEST_API_KEY"')

    done.line("WARN", "the key travels to 192.0.2.1 in the clear; use https")
