"""Plain OpenAI requests through a real Envoy that asks us where they are to go.

Envoy runs deploy/envoy/ext_proc.yaml. The tiny bundle sends "easy" to small, which the provider
"local" serves, and "hard" to large, the reference, which is behind the default route.
"""

import asyncio
import gzip
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import yaml  # type: ignore[import-untyped]

from bestroute import engine
from bestroute.app import Running, serving
from bestroute.config import (
    Batching,
    CallerLimits,
    DecisionLog,
    Mesh,
    Metrics,
    Routing,
    Security,
    Server,
    Settings,
)
from bestroute.mesh.v1 import external_processor_pb2 as pb
from tests.extproc import EXAMPLE, Places, Upstreams, bootstrap, found, proxied
from tests.mesh import address, connections, needs_envoy, validated
from tests.upstreams import until

ISTIO = EXAMPLE.parents[1] / "istio" / "ext_proc.yaml"
PATH = "/v1/chat/completions"
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    with found() as places:
        yield places


@pytest.fixture(scope="module")
def opened(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An Envoy that lets requests pass if we are gone; patient, since the machine may be busy."""
    config = bootstrap(places, message_timeout="20s")
    with proxied(config, tmp_path_factory.mktemp("envoy")) as url:
        yield url


@pytest.fixture(scope="module")
def closed(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An Envoy that doesn't, and is as impatient as in the example."""
    config = bootstrap(places, failure_mode_allow=False)
    with proxied(config, tmp_path_factory.mktemp("envoy")) as url:
        yield url


@pytest.fixture
async def upstreams(places: Places) -> AsyncIterator[Upstreams]:
    upstreams = Upstreams()
    async with upstreams.serving(places):
        yield upstreams


@pytest.fixture
async def client(opened: str) -> AsyncIterator[httpx.AsyncClient]:
    """An application that knows nothing of us, and whose base URL is Envoy."""
    async with httpx.AsyncClient(base_url=opened, timeout=30) as client:
        yield client


@pytest.fixture
def settings(tiny_bundle: Path, places: Places) -> Settings:
    return Settings.model_validate(
        {
            "bundle": tiny_bundle,
            "server": {"listen": f"127.0.0.1:{places.adapter}", "drain_timeout": 5},
            "mesh": {"external_processing": True, "decision_timeout": 10},
            "providers": {
                "openai": {"base_url": "http://127.0.0.1:1/v1"},
                "local": {"base_url": "http://127.0.0.1:1/v1"},
            },
            "models": {
                "large": {"provider": "openai", "upstream": "gpt-large"},
                "small": {"provider": "local", "upstream": "org/Small-7B"},
            },
        }
    )


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Running]:
    async with serving(settings) as running:
        yield running


def asking(text: str = "easy", model: str = "bestroute/auto", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def ours(headers: Any) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.startswith("x-bestroute-")}


async def test_the_decision_chooses_route_and_model(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    easy = await client.post(PATH, json=asking("easy"))
    hard = await client.post(PATH, json=asking("hard"))

    cheap, dear = upstreams.seen
    assert (cheap.upstream, json.loads(cheap.body)) == ("local", asking("easy", "org/Small-7B"))
    assert (dear.upstream, json.loads(dear.body)) == ("reference", asking("hard", "gpt-large"))
    assert easy.json()["from"] == "local"
    told = ours(cheap.headers)
    assert told["x-bestroute-selected-model"] == "small"
    assert told["x-bestroute-selected-provider"] == "local"
    costs = [float(told[f"x-bestroute-{of}-cost-usd"]) for of in ("estimated", "reference")]
    assert 0 < costs[0] < costs[1]
    assert "x-bestroute-fallback-reason" not in told
    assert ours(easy.headers).items() <= told.items(), "clients are told what was decided"
    assert ours(easy.headers)["x-bestroute-selected-model"] == "small"
    assert ours(hard.headers)["x-bestroute-fallback-reason"] == "below_threshold"


async def test_only_the_models_name_of_a_body_is_changed(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    before = b'{ "temperature":1.0,"messages":[{"content":"easy \\u00e9","role":"user"}],\n"model":'
    after = ',"x":{"model":"bestroute/auto"},"last":"ü"}'.encode()

    await client.post(PATH, content=before + b'"bestroute/auto"' + after)

    assert upstreams.last.body == before + b'"org/Small-7B"' + after
    assert upstreams.last.headers["content-length"] == str(len(upstreams.last.body))


@pytest.mark.parametrize(
    ("model", "header", "reached"),
    [
        ("bestroute/auto", None, "local"),
        ("bestroute/match-0.97", None, "reference"),
        ("bestroute/match-97%", None, "reference"),
        ("bestroute/drop-2%", None, "local"),
        ("bestroute/save-40%", None, "local"),
        ("bestroute/auto", "match-0.97", "reference"),
        ("bestroute/match-0.5", "match-0.97", "local"),
    ],
)
async def test_a_target_comes_by_the_models_name_or_a_header(
    server: Running,
    client: httpx.AsyncClient,
    upstreams: Upstreams,
    model: str,
    header: str | None,
    reached: str,
) -> None:
    headers = {} if header is None else {"x-bestroute-target": header}

    response = await client.post(PATH, json=asking("easy", model), headers=headers)

    assert (response.status_code, response.json()["from"]) == (200, reached)


async def test_headers_set_limits_and_name_sessions(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    """A session that is sticky stays where its first turn went."""
    session = {"x-bestroute-session": "s", "x-bestroute-sticky": "true"}
    for text, headers in (
        ("easy", {"x-bestroute-models": "large"}),
        ("hard", {"x-bestroute-models": "small"}),  # which meets no target: the reference
        ("easy", session),
        ("hard", session),
        ("hard", {}),
    ):
        await client.post(PATH, json=asking(text), headers=headers)

    found = [each.upstream for each in upstreams.seen]
    assert found == ["reference", "reference", "local", "local", "reference"]


@pytest.mark.parametrize(
    ("model", "headers"),
    [
        ("bestroute/cheapest", {}),
        ("bestroute/match-2", {}),
        ("bestroute/save-99%", {}),
        ("bestroute/auto", {"x-bestroute-target": "cheapest"}),
        ("bestroute/auto", {"x-bestroute-models": "small,larg"}),
        ("bestroute/auto", {"x-bestroute-max-cost-usd": "cheap"}),
        ("bestroute/auto", {"x-bestroute-session": "s" * 300}),
    ],
)
async def test_a_target_that_there_is_not_is_the_clients_fault_and_says_so(
    server: Running, opened: str, upstreams: Upstreams, model: str, headers: dict[str, str]
) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{opened}/v1", api_key="sk", default_headers=headers
    ) as client:
        with pytest.raises(openai.BadRequestError) as failure:
            await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "easy"}]
            )

    assert failure.value.type == "invalid_request_error"
    assert failure.value.param
    assert not upstreams.seen


async def test_a_model_that_is_named_is_asked(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    """Who names a model of the pool gets it from who serves it; others are not ours."""
    for model in ("small", "large", "medium", "gpt-5"):
        await client.post(PATH, json=asking("hard", model))

    found = [(each.upstream, json.loads(each.body)["model"]) for each in upstreams.seen]
    assert found == [
        ("local", "org/Small-7B"),
        ("reference", "gpt-large"),
        ("reference", "medium"),
        ("reference", "gpt-5"),
    ]
    *_, medium, other = upstreams.seen
    assert ours(medium.headers) == {"x-bestroute-selected-model": "medium"}
    assert ours(other.headers) == {}


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/v1/embeddings"])
@pytest.mark.parametrize("model", ["gpt-5", "bestroute/auto"])
async def test_clients_cannot_choose_the_route(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams, path: str, model: str
) -> None:
    """Neither by what routes match, nor by what feedback or bills may be made of."""
    spoofed = {
        "X-Bestroute-Selected-Model": "small",
        "x-bestroute-selected-provider": "local",
        "x-bestroute-decision-id": "0" * 32,
        "x-bestroute-estimated-cost-usd": "0",
        "x-bestroute-fallback-reason": "none",
    }

    await client.post(path, json=asking("hard", model), headers=spoofed)

    assert upstreams.last.upstream == "reference"
    told = ours(upstreams.last.headers)
    assert not told.items() & {key.lower(): value for key, value in spoofed.items()}.items()
    assert "x-bestroute-decision-id" not in told


@pytest.mark.parametrize("how", ["Envoy", "us"])
async def test_spoofed_headers_are_stripped_by_either(
    how: str,
    places: Places,
    upstreams: Upstreams,
    settings: Settings,
    tmp_path: Path,
) -> None:
    """By Envoy where we are gone, and by us where Envoy doesn't."""
    config = bootstrap(places)
    if how == "us":
        [listener] = config["static_resources"]["listeners"]
        del listener["filter_chains"][0]["filters"][0]["typed_config"][
            "early_header_mutation_extensions"
        ]
    spoofed = {"x-bestroute-selected-model": "small"}
    with proxied(config, tmp_path) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            if how == "us":
                async with serving(settings):
                    await client.get("/v1/models", headers=spoofed)
                    await client.post(PATH, json=asking("hard", "gpt-5"), headers=spoofed)
            else:
                await client.get("/v1/models", headers=spoofed)
                await client.post(PATH, json=asking("hard", "gpt-5"), headers=spoofed)

    assert [each.upstream for each in upstreams.seen] == ["reference", "reference"]
    assert [ours(each.headers) for each in upstreams.seen] == [{}, {}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"{",
        b'{"model": "small"',
        b'{"model": 3}',
        b'[{"model": "small"}]',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
async def test_what_cannot_be_read_is_left_to_the_upstream(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams, content: bytes
) -> None:
    response = await client.post(PATH, content=content)

    assert response.status_code == 200
    assert (upstreams.last.upstream, upstreams.last.body) == ("reference", content)


async def test_what_is_compressed_passes_as_it_is(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    """aiohttp unpacks what its handlers read, and so shows that it has come whole."""
    packed = gzip.compress(json.dumps(asking()).encode())

    await client.post(PATH, content=packed, headers={"content-encoding": "gzip"})

    assert upstreams.last.headers["content-length"] == str(len(packed))
    assert json.loads(upstreams.last.body) == asking()


async def test_other_requests_pass(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    """Other methods and paths, with and without bodies; many at once, so that bodies race."""
    requests = [
        ("GET", "/v1/models", None),
        ("GET", PATH, None),
        ("DELETE", "/v1/files/1", None),
        ("POST", "/v1/embeddings", json.dumps(asking()).encode()),
        ("POST", "/v1/chat/completions/1", b"x" * 100_000),
        ("PUT", PATH, b"y" * 1000),
        ("POST", PATH, None),
    ]
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(client.request(method, path, content=content))
            for method, path, content in requests * 5
        ]

    assert {each.result().status_code for each in running} == {200}
    seen = sorted((each.method, each.path, each.body) for each in upstreams.seen)
    assert seen == sorted((m, p, content or b"") for m, p, content in requests * 5)


@pytest.mark.parametrize("query", ["", "?api-version=1"])
@pytest.mark.parametrize("before", ["/v1", "", "/openai/deployments/x"])
async def test_paths_may_have_anything_before_and_after(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams, before: str, query: str
) -> None:
    path = f"{before}/chat/completions{query}"

    await client.post(path, json=asking())

    assert (upstreams.last.upstream, upstreams.last.path) == ("local", path)


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
async def test_either_http_and_any_framing(
    server: Running, opened: str, upstreams: Upstreams, http2: bool, chunked: bool
) -> None:
    """HTTP/1.1 and HTTP/2; with a content-length, and in pieces of unknown total."""
    text = json.dumps(asking("easy"), indent=1).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(text), 7):
            yield text[at : at + 7]

    if http2:
        pytest.importorskip("h2", reason="pip install h2")
    async with httpx.AsyncClient(base_url=opened, http1=not http2, http2=http2) as client:
        response = await client.post(PATH, content=pieces() if chunked else text)

    assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert upstreams.last.upstream == "local"
    assert json.loads(upstreams.last.body) == asking("easy", "org/Small-7B")


async def test_trailers_pass(server: Running, opened: str, upstreams: Upstreams) -> None:
    """Of a request in chunks, which Envoy is free to drop, but must not stumble over."""
    host, _, port = opened.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(asking()).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n"
    writer.write(f"{head}connection: close\r\n\r\n{len(body):x}\r\n".encode() + body)
    writer.write(b"\r\n0\r\nx-sum: 1\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    await writer.wait_closed()

    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(upstreams.last.body) == asking("easy", "org/Small-7B")


async def test_a_streamed_answer_comes_piece_by_piece(
    server: Running, opened: str, upstreams: Upstreams
) -> None:
    """The second piece is sent only once the client has got the first."""
    upstreams.pieces = [
        json.dumps({"id": "1", "choices": [{"index": 0, "delta": {"content": text}}]})
        for text in ("one", "two", "three")
    ] + ["[DONE]"]
    got = []
    async with openai.AsyncOpenAI(base_url=f"{opened}/v1", api_key="sk") as client:
        upstreams.next.release()
        stream = await client.chat.completions.create(
            model="bestroute/auto", messages=[{"role": "user", "content": "easy"}], stream=True
        )
        async for chunk in stream:
            got.append(chunk.choices[0].delta.content)
            upstreams.next.release()

    assert got == ["one", "two", "three"]
    assert upstreams.last.upstream == "local"
    assert "authorization" not in upstreams.last.headers, "which is the reference's"


async def test_a_client_that_leaves_is_gone_for_everybody(
    server: Running, opened: str, upstreams: Upstreams
) -> None:
    """During the answer, and before the body is whole; the next one is served."""
    upstreams.pieces = ["1", "2"]
    upstreams.next.release()
    async with (
        httpx.AsyncClient(base_url=opened, timeout=30) as client,
        client.stream("POST", PATH, json=asking()) as response,
    ):
        await anext(response.aiter_bytes())
    await asyncio.wait_for(upstreams.left.wait(), 30)

    host, _, port = opened.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    upstreams.pieces = None
    async with httpx.AsyncClient(base_url=opened, timeout=30) as client:
        response = await client.post(PATH, json=asking())

    assert response.json()["from"] == "local"
    assert len(upstreams.seen) == 2, "half a request reaches nobody"


async def test_requests_at_once_do_not_meet(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    async def ask(index: int) -> None:
        text = ("easy", "hard")[index % 2] + f" word{index % 100}"
        response = await client.post(PATH, json=asking(text, seed=index))
        assert response.json()["from"] == ("local", "reference")[index % 2]

    async with asyncio.TaskGroup() as tasks:
        for index in range(60):
            tasks.create_task(ask(index))

    found = {json.loads(each.body)["seed"]: each.upstream for each in upstreams.seen}
    assert found == {index: ("local", "reference")[index % 2] for index in range(60)}


async def test_large_bodies_pass_up_to_envoys_limit(
    server: Running, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    """Pictures make them large; beyond the limit Envoy says so."""
    picture = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + "A" * 5_000_000},
    }
    parts = [{"type": "text", "text": "easy"}, picture]
    request = {"model": "bestroute/auto", "messages": [{"role": "user", "content": parts}]}

    fits = await client.post(PATH, json=request)
    picture["image_url"]["url"] *= 2  # type: ignore[index]
    too_large = await client.post(PATH, json=request)

    assert fits.json()["from"] == "local"
    assert len(upstreams.last.body) > 5_000_000
    assert (too_large.status_code, len(upstreams.seen)) == (413, 1)


class TestGone:
    """Nobody is there to decide."""

    async def test_open_asks_the_reference(
        self, client: httpx.AsyncClient, upstreams: Upstreams
    ) -> None:
        """Of everybody else's requests not a byte is touched."""
        other = json.dumps(asking("easy", "gpt-5")).encode()
        for content in (json.dumps(asking()).encode(), other, b"hello"):
            response = await client.post(PATH, content=content)
            assert response.status_code == 200
        await client.get("/v1/models")

        assert {each.upstream for each in upstreams.seen} == {"reference"}
        assert json.loads(upstreams.seen[0].body) == asking("easy", "large")
        assert upstreams.seen[0].headers["content-length"] == str(len(upstreams.seen[0].body))
        assert [each.body for each in upstreams.seen[1:]] == [other, b"hello", b""]

    async def test_closed_answers_503(self, closed: str, upstreams: Upstreams) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{closed}/v1", api_key="sk", max_retries=0
        ) as client:
            with pytest.raises(openai.InternalServerError) as failure:
                await client.chat.completions.create(
                    model="bestroute/auto", messages=[{"role": "user", "content": "easy"}]
                )

        assert (failure.value.status_code, failure.value.type) == (503, "server_error")
        assert not upstreams.seen

    async def test_killed_under_load_and_back(
        self, opened: str, upstreams: Upstreams, settings: Settings
    ) -> None:
        """Every request is answered, before, meanwhile and after."""
        answered: list[tuple[int, str]] = []
        over = asyncio.Event()

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=opened, timeout=30) as client:
                while not over.is_set():
                    response = await client.post(PATH, json=asking())
                    answered.append((response.status_code, response.json()["from"]))

        async def more() -> None:
            wanted = len(answered) + 20
            await until(lambda: len(answered) >= wanted)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask())
            for _ in range(2):
                async with serving(settings.model_copy(update={"server": _at_once(settings)})):
                    await more()
                await more()
            over.set()

        assert {status for status, _ in answered} == {200}
        assert {upstream for _, upstream in answered} == {"local", "reference"}


def _at_once(settings: Settings) -> Server:
    return settings.server.model_copy(update={"drain_timeout": 0.0})


class TestStalled:
    """Somebody accepts connections, and says nothing."""

    @pytest.fixture(autouse=True)
    def listening(self, places: Places) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", places.adapter)):
            yield

    async def test_open_passes_after_the_timeout(
        self, places: Places, upstreams: Upstreams, tmp_path: Path
    ) -> None:
        with proxied(bootstrap(places), tmp_path) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                response = await client.post(PATH, json=asking())

        assert response.json()["from"] == "reference"
        assert json.loads(upstreams.last.body)["model"] == "large"

    async def test_closed_answers_an_error(self, closed: str, upstreams: Upstreams) -> None:
        async with httpx.AsyncClient(base_url=closed, timeout=30) as client:
            response = await client.post(PATH, json=asking())

        assert response.status_code == 504
        assert response.json()["error"]["type"] == "server_error"
        assert not upstreams.seen


class TestUndecided:
    """We are there, and can't decide."""

    @pytest.fixture(params=[True, False], ids=["open", "closed"])
    def fail_open(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    @pytest.fixture
    def settings(self, settings: Settings, fail_open: bool) -> Settings:
        return settings.model_copy(
            update={
                "mesh": settings.mesh.model_copy(update={"fail_open": fail_open}),
                "routing": Routing(fail_open=False, cache_entries=0),
                "metrics": Metrics(listen="127.0.0.1:0"),
            }
        )

    async def check(
        self, response: httpx.Response, upstreams: Upstreams, fail_open: bool, status: int = 503
    ) -> str:
        """That it is the reference or an error; gives the error's code."""
        if fail_open:
            assert (response.status_code, response.json()["from"]) == (200, "reference")
            assert json.loads(upstreams.last.body)["model"] == "gpt-large"
            told = ours(upstreams.last.headers)
            assert told["x-bestroute-fallback-reason"] == "not_decided"
            return ""
        assert response.status_code == status
        assert not upstreams.seen
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["code"])

    async def test_a_router_that_fails(
        self,
        server: Running,
        client: httpx.AsyncClient,
        upstreams: Upstreams,
        fail_open: bool,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        response = await client.post(PATH, json=asking("broken"))

        assert await self.check(response, upstreams, fail_open) in ("", "internal")
        if not fail_open:
            assert "log" in response.json()["error"]["message"], "nobody's business what broke"
        assert "unexpected error" in caplog.text
        assert _errors(await _scraped(server)) == {"other": 1.0}

    async def test_a_full_queue_or_a_hanging_engine(
        self,
        settings: Settings,
        client: httpx.AsyncClient,
        upstreams: Upstreams,
        fail_open: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """One runs, one waits, the third has no place; the others' time ends."""
        run, going = engine._run_feeds, asyncio.Event()
        held = settings.model_copy(
            update={
                "batching": Batching(max_items=1, max_queue=1),
                "mesh": settings.mesh.model_copy(update={"decision_timeout": 0.1}),
            }
        )
        loop = asyncio.get_running_loop()

        def hang(session: Any, feeds: Any) -> Any:
            asyncio.run_coroutine_threadsafe(going.wait(), loop).result(20)
            return run(session, feeds)

        async with serving(held) as server:
            monkeypatch.setattr(engine, "_run_feeds", hang)
            try:
                async with asyncio.TaskGroup() as tasks:
                    asked = [
                        tasks.create_task(client.post(PATH, json=asking(f"easy word{index}")))
                        for index in range(4)
                    ]
                answers = [each.result() for each in asked]
            finally:
                going.set()
            errors = _errors(await _scraped(server))

        codes = [await self.check(each, upstreams, fail_open) for each in answers]
        assert set(codes) <= {"", "resource_exhausted", "deadline_exceeded", "unavailable"}
        assert sum(errors.values()) == 4
        assert set(errors) >= {"Overloaded"}

    async def test_no_time(
        self, settings: Settings, client: httpx.AsyncClient, upstreams: Upstreams, fail_open: bool
    ) -> None:
        mesh = settings.mesh.model_copy(update={"decision_timeout": 1e-9})
        async with serving(settings.model_copy(update={"mesh": mesh})) as server:
            response = await client.post(PATH, json=asking())
            errors = _errors(await _scraped(server))

        assert await self.check(response, upstreams, fail_open) in ("", "deadline_exceeded")
        assert errors == {"DeadlineExceeded": 1.0}

    async def test_no_text(
        self,
        server: Running,
        client: httpx.AsyncClient,
        upstreams: Upstreams,
        fail_open: bool,
    ) -> None:
        """A picture alone may be a good question; it is only not ours to decide."""
        picture = [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
        request = {"model": "bestroute/auto", "messages": [{"role": "user", "content": picture}]}

        response = await client.post(PATH, json=request)

        code = await self.check(response, upstreams, fail_open, 400)
        assert code in ("", "invalid_argument")


async def _scraped(server: Running, wanted: str = "") -> str:
    """The metrics, once they have something."""
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            scraped = (await client.get(f"http://{server.metrics}/metrics")).text
            if wanted in scraped:
                return scraped
            await asyncio.sleep(0.01)


def _errors(scraped: str) -> dict[str, float]:
    found = re.findall(r'bestroute_errors_total\{error="(\w+)"\} (\S+)', scraped)
    return {name: float(count) for name, count in found}


async def test_callers_are_those_that_the_proxy_names(
    settings: Settings, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    """Each has limits of its own, which hold although the server fails open."""
    limited = settings.model_copy(
        update={
            "security": Security(caller_metadata="x-caller"),
            "callers": {"greedy": CallerLimits(requests_per_second=0.001, burst=1)},
        }
    )
    async with serving(limited):
        found = [
            await client.post(PATH, json=asking(), headers={"x-caller": caller} if caller else {})
            for caller in ("greedy", "greedy", "modest", "modest", "", "")
        ]

    assert [each.status_code for each in found] == [200, 429, 200, 200, 200, 200]
    refused = found[1]
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) > 1


async def test_decisions_are_kept_and_counted(
    settings: Settings, client: httpx.AsyncClient, upstreams: Upstreams, tmp_path: Path
) -> None:
    watched = settings.model_copy(
        update={
            "metrics": Metrics(listen="127.0.0.1:0"),
            "decision_log": DecisionLog(directory=tmp_path),
        }
    )
    async with serving(watched) as server:
        response = await client.post(PATH, json=asking())
        await client.get("/v1/models")
        # Envoy goes on before our stream has ended.
        ended = 'bestroute_rpc_duration_seconds_count{code="OK",method="Process"} 2.0'
        scraped = await _scraped(server, ended)

    decision_id = response.headers["x-bestroute-decision-id"]
    assert re.fullmatch("[0-9a-f]{32}", decision_id)
    assert upstreams.seen[0].headers["x-bestroute-decision-id"] == decision_id
    assert 'bestroute_decisions_total{fallback="none",model="small",samples="1"} 1.0' in scraped


@asynccontextmanager
async def _refusing() -> AsyncIterator[int]:
    """The port of a replica that drains, for as long as the block lasts."""

    async def refuse(requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    server = grpc.aio.server()
    service, _, method = PROCESS[1:].partition("/")
    handlers: dict[str, Any] = {method: grpc.stream_stream_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


@asynccontextmanager
async def _gone() -> AsyncIterator[int]:
    """A port where nobody listens."""
    yield 1


@pytest.mark.parametrize("other", [_gone, _refusing])
async def test_a_replica_that_goes_is_not_noticed(
    settings: Settings, places: Places, upstreams: Upstreams, tmp_path: Path, other: Any
) -> None:
    """Of two replicas one is no use: Envoy asks the other, and every request is decided."""
    config = bootstrap(places, message_timeout="10s")
    [cluster] = [
        each for each in config["static_resources"]["clusters"] if each["name"] == "bestroute"
    ]
    del cluster["health_checks"]
    [endpoints] = cluster["load_assignment"]["endpoints"]
    async with other() as port:
        endpoints["lb_endpoints"].append({"endpoint": {"address": address(port)}})
        with proxied(config, tmp_path) as url:
            async with serving(settings), httpx.AsyncClient(base_url=url, timeout=30) as client:
                found = [await client.post(PATH, json=asking()) for _ in range(12)]

    assert [each.json()["from"] for each in found] == ["local"] * 12


async def test_what_has_begun_is_decided_while_the_server_drains(
    settings: Settings, opened: str, upstreams: Upstreams
) -> None:
    """A request whose body is still coming; another one that begins then goes the open way."""
    watched = settings.model_copy(update={"metrics": Metrics(listen="127.0.0.1:0")})
    body = json.dumps(asking()).encode()
    host, _, port = opened.removeprefix("http://").rpartition(":")
    started, stop = asyncio.Queue[Running](), asyncio.Event()

    async def serve() -> None:
        async with serving(watched) as running:
            started.put_nowait(running)
            await stop.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve())
        server = await started.get()
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}connection: close\r\n\r\n".encode() + body[:20])
        await _scraped(server, 'rpcs_in_flight{method="Process"} 1.0')
        stop.set()
        await asyncio.sleep(0.1)  # it refuses new calls at once, and stops after a while
        async with httpx.AsyncClient(base_url=opened, timeout=30) as client:
            late = await client.post(PATH, json=asking())
        writer.write(body[20:])
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        await writer.wait_closed()

    assert late.json()["from"] == "reference"
    assert b'"from": "local"' in answer


@pytest.mark.parametrize("key", ["right", "wrong"])
async def test_envoy_shows_a_key_of_its_own(
    settings: Settings, places: Places, upstreams: Upstreams, tmp_path: Path, key: str
) -> None:
    """What guards other calls guards these; the clients' own credentials stay with Envoy."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'envoy = "sha256:{hashlib.sha256(b"right").hexdigest()}"')
    guarded = settings.model_copy(update={"security": Security(api_keys_file=keys)})
    service = {
        "envoy_grpc": {"cluster_name": "bestroute"},
        "initial_metadata": [{"key": "authorization", "value": f"Bearer {key}"}],
    }
    config = bootstrap(places, message_timeout="20s", grpc_service=service)
    with proxied(config, tmp_path) as url:
        async with serving(guarded), httpx.AsyncClient(base_url=url, timeout=30) as client:
            response = await client.post(
                PATH, json=asking(), headers={"authorization": "Bearer right"}
            )

    assert response.json()["from"] == ("local" if key == "right" else "reference")


async def test_without_the_setting_nobody_is_served(
    settings: Settings, client: httpx.AsyncClient, upstreams: Upstreams
) -> None:
    async with serving(settings.model_copy(update={"mesh": Mesh()})):
        response = await client.post(PATH, json=asking())

    assert response.json()["from"] == "reference", "Envoy is told UNIMPLEMENTED, and fails open"


async def _process(server: Running, *messages: bytes) -> list[bytes]:
    """What comes back on a stream of our own."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        process: Any = channel.stream_stream(PROCESS)
        return [answer async for answer in process(iter(messages))]


HEADERS = pb.ProcessingRequest(
    request_headers=pb.HttpHeaders(
        headers=pb.HeaderMap(
            headers=[
                pb.HeaderValue(key=":method", value=b"POST"),
                pb.HeaderValue(key=":path", value=PATH.encode()),
            ]
        )
    )
).SerializeToString()


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([b"\xff\xff"], "not a envoy.service.ext_proc.v3.ProcessingRequest"),
        ([b""], "request_header_mode SEND"),
        ([b"\x1a\x00"], "request_header_mode SEND"),  # response headers
        ([pb.ProcessingRequest(request_body=pb.HttpBody()).SerializeToString()], "BUFFERED"),
        (
            [
                HEADERS,
                pb.ProcessingRequest(request_body=pb.HttpBody(body=b"{")).SerializeToString(),
            ],
            "BUFFERED",
        ),
    ],
)
async def test_an_envoy_that_is_set_up_otherwise_is_told(
    server: Running, messages: list[bytes], complaint: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=complaint) as failure:
        await _process(server, *messages)

    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_older_envoys_headers_are_read(server: Running) -> None:
    """It sends them as texts, and an empty stream is no request."""
    body = pb.HttpBody(body=json.dumps(asking()).encode(), end_of_stream=True)
    message = pb.ProcessingRequest(request_body=body).SerializeToString()

    _, answer = await _process(server, HEADERS, message)

    common = pb.ProcessingResponse.FromString(answer).request_body.response
    assert json.loads(common.body_mutation.body) == asking("easy", "org/Small-7B")
    assert await _process(server) == []


def test_istio_gets_the_same_filters() -> None:
    """What Envoy was tested with, under Istio's names of clusters."""
    example = connections(yaml.safe_load(EXAMPLE.read_text()))
    documents = list(yaml.safe_load_all(ISTIO.read_text()))
    [patches] = [
        each["spec"]["configPatches"] for each in documents if "configPatches" in each["spec"]
    ]
    values: dict[str, list[Any]] = {each["applyTo"]: [] for each in patches}
    for each in patches:
        values[each["applyTo"]].append(each["patch"]["value"])
    processing, lua = values["HTTP_FILTER"]
    service = processing["typed_config"]["grpc_service"]["envoy_grpc"]
    assert service["cluster_name"].startswith("outbound|50051||bestroute.")
    service["cluster_name"] = "bestroute"

    assert [processing, lua] == example["http_filters"][:2]
    [manager] = values["NETWORK_FILTER"]
    for name in ("early_header_mutation_extensions", "local_reply_config"):
        assert manager["typed_config"][name] == example[name]


def test_the_example_is_valid() -> None:
    """As it is shipped."""
    needs_envoy()

    done = validated(EXAMPLE)

    assert done.returncode == 0, done.stderr
