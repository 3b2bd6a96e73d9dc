"""The networks on a real Triton: the same answers and batches, and nobody waits for a lost one."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bestroute.app import serving
from bestroute.batching.watch import GIVE_UP
from bestroute.bundle import digest, served_name
from bestroute.config import Batching, ConfigInvalid, Routing, Server, Settings
from bestroute.config import Engine as EngineSettings
from bestroute.errors import BundleInvalid, EngineStalled
from bestroute.kserve.engine import RemoteEngine, open_engine
from bestroute.kserve.v2 import inference_pb2
from bestroute.router import open_router
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.certificates import Authority
from tests.triton import Triton, export, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FAILED = pb.FALLBACK_REASON_ROUTER_FAILED
SOON = 30.0
"""Seconds within which something that takes one or two has happened even on a busy machine."""

Bundles = dict[str, Path]


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The tiny bundle, and others that the repository has changed, each in its own way."""
    made = {"tiny": tiny_bundle}
    for name in ("narrow", "golden", "relabelled", "shapeless", "absent"):
        made[name] = tiny.write(tmp_path_factory.mktemp(name), version=f"{name}-1")
    return made


@pytest.fixture(scope="module")
def repository(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("models")

    def edit(bundle: str, old: str, new: str) -> None:
        for model in export(bundles[bundle], repository):
            config = repository / model / "config.pbtxt"
            text = config.read_text()
            assert old in text
            config.write_text(text.replace(old, new))

    export(bundles["tiny"], repository)
    edit("narrow", "max_batch_size: 64", "max_batch_size: 2")
    edit("relabelled", digest(bundles["relabelled"]), "f" * 64)
    edit("shapeless", "TYPE_INT64", "TYPE_INT32")
    for broken in ("relabelled", "shapeless"):  # of which the router is enough
        shutil.rmtree(repository / model_of(bundles[broken], "reward"))
    router, reward = export(bundles["golden"], repository)
    rewards = (repository / reward / "1" / "model.onnx").read_bytes()
    (repository / router / "1" / "model.onnx").write_bytes(rewards)
    config = repository / router / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [ 4 ]", "dims: [ -1 ]"))
    return repository


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    with running(repository, tmp_path_factory.mktemp("triton")) as triton:
        yield triton


@pytest.fixture(scope="module")
def mortal(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """A Triton of one bundle, for tests that take it away; they leave it running."""
    directory = tmp_path_factory.mktemp("mortal")
    export(bundles["tiny"], directory / "models")
    with running(directory / "models", directory) as triton:
        yield triton


def model_of(bundle: Path, network: str) -> str:
    return served_name(network, digest(bundle))


def at(address: str, bundle: Path, *, scheme: str = "grpc", **engine: object) -> Settings:
    """A server on a free port, its networks at an address."""
    return Settings(
        bundle=bundle,
        server=Server(listen="127.0.0.1:0", drain_timeout=5),
        engine=EngineSettings.model_validate(
            {"provider": "kserve", "endpoint": f"{scheme}://{address}", **engine}
        ),
        routing=Routing(cache_entries=0),
    )


class Caller:
    """A client of a running server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: routing_pb2_grpc.RoutingServiceAsyncStub
        self.stub = routing_pb2_grpc.RoutingServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    async def route(self, prompt: str, seconds: float | None = None) -> pb.RouteResponse:
        request = pb.RouteRequest(prompt=prompt, explain=True)
        return await self.stub.Route(request, timeout=seconds)

    async def becomes(self, status: int) -> None:
        """Wait until health says so."""
        async with asyncio.timeout(SOON):
            while True:
                if (await self._health.Check(health_pb2.HealthCheckRequest())).status == status:
                    return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[Caller]:
    async with (
        serving(settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield Caller(channel)


@pytest.fixture
async def remote(triton: Triton, bundles: Bundles) -> AsyncIterator[Caller]:
    """A server whose networks are on Triton."""
    async with served(at(triton.address, bundles["tiny"])) as caller:
        yield caller


@pytest.fixture
async def bereaved(mortal: Triton, bundles: Bundles) -> AsyncIterator[Caller]:
    """A server whose Triton may be taken away."""
    async with served(at(mortal.address, bundles["tiny"], endpoint_timeout=2)) as caller:
        yield caller


def prompts(count: int) -> list[str]:
    words = list(tiny.WORDS)
    return [" ".join(words[i % 9 : i % 9 + 1 + i % 13]) for i in range(count)]


async def test_answers_are_those_of_the_local_engine(
    remote: Caller, bundles: Bundles, settings: Settings
) -> None:
    """By every RPC that runs a network; a prompt that breaks the network fails alone."""
    sound = [prompt for prompt in prompts(40) if "broken" not in prompt]
    requests = [pb.RouteRequest(prompt=prompt, explain=True) for prompt in sound]
    scoring = pb.ScoreRequest(prompt="word1", responses=["good good", "bad", "easy word2"])

    async def answers(caller: Caller) -> tuple[list[list[float]], list[list[float]], list[float]]:
        routed = await asyncio.gather(*(caller.route(prompt) for prompt in sound))
        stream = caller.stub.RouteStream()
        for number, request in enumerate(requests):
            request.request_id = str(number)
            await stream.write(pb.RouteStreamRequest(request=request))
        await stream.done_writing()
        streamed = {int(each.response.request_id): each.response async for each in stream}
        assert FAILED not in {each.fallback_reason for each in routed}
        return (
            [[arm.match_probability for arm in each.arms] for each in routed],
            [[arm.match_probability for arm in streamed[i].arms] for i in range(len(sound))],
            list((await caller.stub.Score(scoring)).rewards),
        )

    async with served(settings) as local:
        expected = await answers(local)

    found = await answers(remote)

    for kind in range(3):
        np.testing.assert_allclose(
            np.array(found[kind]), np.array(expected[kind]), rtol=1e-5, atol=1e-6
        )
    both = await asyncio.gather(remote.route("broken"), remote.route("easy"))
    assert [each.fallback_reason for each in both] == [FAILED, 0]


async def test_what_waits_runs_together(remote: Caller, triton: Triton, bundles: Bundles) -> None:
    """Triton counts an execution per batch, and every input of it."""
    before = await counted(triton, bundles["tiny"])

    await asyncio.gather(*(remote.route(f"easy word{i % 100}") for i in range(200)))
    await remote.stub.Score(pb.ScoreRequest(prompt="word1", responses=["good"] * 60))

    after = await counted(triton, bundles["tiny"])
    (routed, route_runs), (scored, score_runs) = (
        (inputs - former_inputs, runs - former_runs)
        for (inputs, runs), (former_inputs, former_runs) in zip(after, before, strict=True)
    )
    assert (routed, scored) == (200, 60)
    assert route_runs < 200
    assert score_runs < 20


async def counted(triton: Triton, bundle: Path) -> list[tuple[int, int]]:
    """Inputs and runs of the router, and of the reward model."""
    networks = ("router", "reward")
    return [await asyncio.to_thread(triton.batches, model_of(bundle, name)) for name in networks]


async def test_max_batch_size_is_obeyed(triton: Triton, bundles: Bundles) -> None:
    narrow = at(triton.address, bundles["narrow"])

    async with open_router(narrow) as router:
        model = router.networks()["router"]
        await asyncio.gather(*(model.prompt(f"word{i}") for i in range(50)))

        assert model.counts.items == 50
        assert max(model.counts.sizes) <= 2
        assert model.counts.failed == 0

    wide = narrow.model_copy(update={"batching": Batching(max_items=3)})
    with pytest.raises(ConfigInvalid, match=r"max_items = 3, but model .* takes 2: lower it, or"):
        async with open_router(wide):
            pass


async def test_a_killed_endpoint_is_left_alone_until_it_is_back_with_the_same_bundle(
    bereaved: Caller, mortal: Triton, bundles: Bundles, tmp_path: Path
) -> None:
    """Under load, everyone has an answer in time: the network's or, without one, the reference."""
    stop = asyncio.Event()
    answered: list[tuple[float, int]] = []

    async def load() -> None:
        while not stop.is_set():
            start = time.monotonic()
            response = await bereaved.route("easy", 10)
            answered.append((time.monotonic() - start, response.fallback_reason))

    whole = mortal.repository
    async with asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(load())
        await asyncio.sleep(0.3)
        try:
            mortal.kill()
            await bereaved.becomes(NOT_SERVING)
            await asyncio.sleep(0.3)
            stop.set()

            export(bundles["absent"], tmp_path)
            mortal.repository = tmp_path
            await asyncio.to_thread(mortal.start)
            await asyncio.sleep(2.5)
            lost = await bereaved.route("easy")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await bereaved.stub.Score(pb.ScoreRequest(prompt="word1", responses=["good"]))
            await bereaved.becomes(NOT_SERVING)
        finally:
            stop.set()
            mortal.kill()
            mortal.repository = whole
            await asyncio.to_thread(mortal.start)
    await bereaved.becomes(SERVING)
    found = await bereaved.route("easy")

    assert {reason for _, reason in answered} == {0, FAILED}
    assert lost.fallback_reason == FAILED
    assert lost.arm.model == "large"
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert found.fallback_reason == 0
    assert max(seconds for seconds, _ in answered) < 5


async def test_nobody_waits_for_an_endpoint_that_hangs(bereaved: Caller, mortal: Triton) -> None:
    """Deadlines hold; the server itself stays, however long it takes, and recovers."""
    mortal.send(signal.SIGSTOP)
    try:
        early = await asyncio.gather(*(bereaved.route("easy", 1.5) for _ in range(10)))
        await bereaved.becomes(NOT_SERVING)
        await asyncio.sleep(2.5)  # over endpoint_timeout: the runs have failed
        start = time.monotonic()
        late = await asyncio.gather(*(bereaved.route("easy", 5) for _ in range(10)))
        took = time.monotonic() - start
        await bereaved.becomes(NOT_SERVING)
    finally:
        mortal.send(signal.SIGCONT)
    await bereaved.becomes(SERVING)
    after = await bereaved.route("easy")

    assert {each.fallback_reason for each in (*early, *late)} == {FAILED}
    assert took < 2
    assert after.fallback_reason == 0


def test_runs_end_before_a_stall_would_end_the_process() -> None:
    with pytest.raises(ValueError, match="endpoint_timeout"):
        EngineSettings(provider="kserve", endpoint="grpc://host:1", endpoint_timeout=GIVE_UP)


@pytest.mark.parametrize(
    ("bundle", "complaint"),
    [
        ("absent", r'has no model "r\w+-{own}"; it has .*{tiny}.*`bestroute-export bundle'),
        ("golden", "the router gives 1 columns, but the manifest's arms"),
    ],
)
async def test_another_bundle_is_refused(
    triton: Triton, bundles: Bundles, bundle: str, complaint: str
) -> None:
    """And the message says what to do."""
    own, known = digest(bundles[bundle])[:12], digest(bundles["tiny"])[:12]
    with pytest.raises(
        BundleInvalid, match=complaint.replace("{own}", own).replace("{tiny}", known)
    ):
        async with open_router(at(triton.address, bundles[bundle])):
            pass


@pytest.mark.parametrize(
    ("bundle", "complaint"),
    [
        ("relabelled", "is of the bundle with SHA-256 f{64}, not of this one"),
        ("shapeless", r"INT32 of 2 axes.*instead of input_ids and attention_mask, INT64 \[B, T\]"),
    ],
)
async def test_another_model_is_refused(
    triton: Triton, bundles: Bundles, bundle: str, complaint: str
) -> None:
    with pytest.raises(BundleInvalid, match=complaint):
        await opened(at(triton.address, bundles[bundle]))


async def opened(settings: Settings) -> RemoteEngine:
    assert settings.bundle is not None
    sha256 = digest(settings.bundle)
    return await open_engine(
        settings.engine,
        served_name("router", sha256),
        sha256,
        batching=Batching(max_padded_tokens=256),
        most=(8, 16_384),
        max_tokens=32,
    )


async def test_an_endpoint_that_is_not_there_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(
        ConfigInvalid, match=r"engine\.endpoint grpc://127\.0\.0\.1:1 can't be reached .*; start"
    ):
        await opened(at("127.0.0.1:1", tiny_bundle))


async def test_what_is_no_kserve_server_is_told(tiny_bundle: Path, settings: Settings) -> None:
    async with serving(settings) as running:
        with pytest.raises(ConfigInvalid, match=r"is no KServe-v2 server .*8001"):
            await opened(at(running.address, tiny_bundle))


async def test_tls(bundles: Bundles, tmp_path: Path) -> None:
    """By the authority that is configured and no other."""
    authority, other = Authority(), Authority("another")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    authority.issue("triton").write(certificate, key)
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    (tmp_path / "other.pem").write_bytes(other.certificate)
    repository = tmp_path / "models"
    _, reward = export(bundles["tiny"], repository)
    shutil.rmtree(repository / reward)
    options = {"grpc_use_ssl": 1, "grpc_server_cert": certificate, "grpc_server_key": key}

    with running(repository, tmp_path, **options) as secured:

        def by(authority: Path | None, scheme: str = "grpcs") -> Settings:
            return at(secured.address, bundles["tiny"], scheme=scheme, endpoint_ca=authority)

        async with await opened(by(tmp_path / "ca.pem")) as engine:
            assert len(await engine([[2, 3], [4]])) == 2
        for wrong in (by(tmp_path / "other.pem"), by(None), by(None, "grpc")):
            with pytest.raises(
                ConfigInvalid, match=r"can't be reached .*grpcs:// where it has TLS"
            ):
                await opened(wrong)
        with pytest.raises(ConfigInvalid, match="endpoint_ca can't be read"):
            await opened(by(tmp_path / "none.pem"))


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        ({"provider": "kserve"}, "set endpoint = 'grpc://host:8001'"),
        ({"endpoint": "grpc://host:1"}, "set provider = 'kserve', or leave the endpoint unset"),
        ({"provider": "kserve", "endpoint": "host:1"}, "must be grpc:// or grpcs://"),
        ({"provider": "kserve", "endpoint": "grpc://host"}, "must be grpc:// or grpcs://"),
        ({"provider": "kserve", "endpoint": "http://host:1"}, "must be grpc:// or grpcs://"),
        ({"provider": "kserve", "endpoint": "grpc://host:1/x"}, "must be grpc:// or grpcs://"),
        ({"provider": "kserve", "endpoint": "grpc://a@host:1"}, "must be grpc:// or grpcs://"),
        (
            {"provider": "kserve", "endpoint": "grpc://host:1", "precision": "fp16"},
            "precision is not for provider = 'kserve'",
        ),
        (
            {"provider": "kserve", "endpoint": "grpc://host:1", "endpoint_ca": "ca.pem"},
            "endpoint_ca is for an endpoint by TLS",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(engine: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigInvalid) as fault:
        Settings.load(None, {"engine": engine})

    assert complaint.lower() in str(fault.value).lower()


def test_no_onnx_runtime_is_needed(triton: Triton, tiny_bundle: Path) -> None:
    """A process whose networks run elsewhere; `bundle verify` checks the endpoint."""
    without = (
        "import sys; sys.modules['onnxruntime'] = None; from bestroute.__main__ import main; "
        f"sys.exit(main(['bundle', 'verify', {str(tiny_bundle)!r}]))"
    )
    engine = {
        "BESTROUTE_ENGINE__PROVIDER": "kserve",
        "BESTROUTE_ENGINE__ENDPOINT": f"grpc://{triton.address}",
    }
    done = subprocess.run(
        [sys.executable, "-c", without],
        env={**os.environ, **engine},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "its answers on kserve deviate by" in done.stdout


class StandIn(grpc.GenericRpcHandler):
    """A KServe-v2 server that is not Triton: it doesn't tell its configuration, and answers in
    typed contents, which the protocol allows. There is none in a package that could be run here.

    Attributes:
        ready: whether it says so of its model.
        failures: of the next runs.
        hangs: whether a run takes for ever.
        runs: seconds that each was given.
        asked: the latest of them.
    """

    def __init__(self) -> None:
        self.ready, self.hangs = True, False
        self.failures: list[grpc.StatusCode] = []
        self.runs: list[float | None] = []
        self.asked = inference_pb2.ModelInferRequest()

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        method: str = details.method
        answers: dict[str, Callable[..., object]] = {
            "ModelReady": self._ready,
            "ModelMetadata": self._metadata,
            "ModelInfer": self._infer,
        }
        answer = answers.get(method.rpartition("/")[2])
        return answer and grpc.unary_unary_rpc_method_handler(answer)

    async def _ready(self, _: bytes, __: object) -> bytes:
        return inference_pb2.ModelReadyResponse(ready=self.ready).SerializeToString()

    async def _metadata(self, _: bytes, __: object) -> bytes:
        tensor = inference_pb2.ModelMetadataResponse.TensorMetadata
        inputs = [
            tensor(name=name, datatype="INT64", shape=[-1, -1])
            for name in ("input_ids", "attention_mask")
        ]
        outputs = [tensor(name="output", datatype="FP32", shape=[-1, 2])]
        return inference_pb2.ModelMetadataResponse(
            inputs=inputs, outputs=outputs
        ).SerializeToString()

    async def _infer(
        self, request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]"
    ) -> bytes:
        self.runs.append(context.time_remaining())
        if self.hangs:
            await asyncio.Event().wait()
        if self.failures:
            await context.abort(self.failures.pop(0), "as asked")
        self.asked = inference_pb2.ModelInferRequest.FromString(request)
        items, _ = self.asked.inputs[0].shape
        values = inference_pb2.InferTensorContents(fp32_contents=[1.0, 2.0] * items)
        output = inference_pb2.ModelInferResponse.InferOutputTensor(
            name="output", shape=[items, 2], contents=values
        )
        return inference_pb2.ModelInferResponse(outputs=[output]).SerializeToString()


@asynccontextmanager
async def stand_in(bundle: Path, **options: Any) -> AsyncIterator[tuple[StandIn, RemoteEngine]]:
    handler, server = StandIn(), grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with await opened(at(f"127.0.0.1:{port}", bundle, **options)) as engine:
            yield handler, engine
    finally:
        await server.stop(None)


async def test_other_servers_do_as_well(tiny_bundle: Path) -> None:
    """They see padded ids and a mask, as a local engine's network does."""
    async with stand_in(tiny_bundle) as (server, engine):
        rows = await engine([[7], [8, 9]])

        assert [row.tolist() for row in rows] == [[1.0, 2.0]] * 2
        assert engine.max_items == 8  # as many as are of use, where the server sets no limit
        sent = [np.frombuffer(raw, np.int64).tolist() for raw in server.asked.raw_input_contents]
        assert sent == [[7, 0, 8, 9], [1, 0, 1, 1]]
        assert [(each.name, [*each.shape]) for each in server.asked.inputs] == [
            ("input_ids", [2, 2]),
            ("attention_mask", [2, 2]),
        ]


async def test_a_connection_that_breaks_is_tried_once_more(tiny_bundle: Path) -> None:
    async with stand_in(tiny_bundle) as (server, engine):
        server.failures, before = [grpc.StatusCode.UNAVAILABLE], len(server.runs)

        await engine([[1]])

        assert (len(server.runs) - before, engine.fault) == (2, None)


async def test_a_lost_server_is_not_asked_until_it_is_back(tiny_bundle: Path) -> None:
    async with stand_in(tiny_bundle) as (server, engine):
        server.ready, server.failures = False, [grpc.StatusCode.UNAVAILABLE] * 2
        with pytest.raises(EngineStalled):
            await engine([[1]])
        assert engine.fault is not None

        before = len(server.runs)
        for _ in range(5):
            with pytest.raises(EngineStalled):
                await engine([[1]])
        await asyncio.sleep(0.5)  # several looks
        assert len(server.runs) == before
        assert engine.fault is not None

        server.ready = True
        await found(engine)
        assert len(await engine([[1]])) == 1


async def test_a_run_has_the_time_that_is_configured_and_the_server_is_told(
    tiny_bundle: Path,
) -> None:
    async with stand_in(tiny_bundle, endpoint_timeout=1) as (server, engine):
        server.hangs = True
        async with asyncio.timeout(SOON):
            with pytest.raises(EngineStalled):
                await engine([[1]])
        assert server.runs[-1] is not None
        assert server.runs[-1] < 2

        server.hangs = False
        await found(engine)


async def test_a_server_that_goes_away_is_missed_before_anyone_asks(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bestroute.kserve.engine._IDLE_LOOKS", 0.1)
    async with stand_in(tiny_bundle) as (server, engine):
        await asyncio.sleep(0.3)
        assert engine.fault is None

        server.ready = False
        async with asyncio.timeout(SOON):
            while engine.fault is None:  # noqa: ASYNC110 - a value that tests alone wait for
                await asyncio.sleep(0.02)

        server.ready = True
        await found(engine)


async def found(engine: RemoteEngine) -> None:
    """Wait until a lost server is found again."""
    async with asyncio.timeout(SOON):
        while engine.fault is not None:  # noqa: ASYNC110 - a value that tests alone wait for
            await asyncio.sleep(0.02)


async def test_a_run_that_fails_by_itself_loses_nothing(tiny_bundle: Path) -> None:
    async with stand_in(tiny_bundle) as (server, engine):
        server.failures = [grpc.StatusCode.INTERNAL]
        with pytest.raises(RuntimeError, match="as asked"):
            await engine([[1]])
        assert engine.fault is None
        await engine([[1]])
