"""The decision log: what is written of calls to a real server, and that nothing goes wrong."""

import asyncio
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pyarrow
import pytest
from pyarrow import parquet

from bestroute.app import serving
from bestroute.config import ConfigInvalid, DecisionLog, Server, Settings
from bestroute.traffic import directory, journal
from bestroute.traffic.decision_id import told
from bestroute.traffic.directory import Directory
from bestroute.traffic.journal import Journal, writing
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.test_workers import serving as processes
from tests.test_workers import wait_until
from tests.upstreams import Upstream, hangs, says, served_at, until

SECRET = "word1 word2 which nobody may read"


def read(directory: Path, kind: str = "decisions") -> list[dict[str, Any]]:
    """Every row of every file, by time of the file."""
    paths = sorted(directory.glob(f"{kind}-*.parquet"))
    return [row for path in paths for row in parquet.read_table(path).to_pylist()]


def logging_to(directory: Path, settings: Settings, **log: Any) -> Settings:
    return settings.model_copy(
        update={"decision_log": DecisionLog.model_validate({"directory": directory, **log})}
    )


def service(channel: grpc.aio.Channel) -> "routing_pb2_grpc.RoutingServiceAsyncStub":
    return routing_pb2_grpc.RoutingServiceStub(channel)


# -- what is written ---------------------------------------------------------------------------


async def test_a_decision_is_a_row(settings: Settings, tmp_path: Path) -> None:
    settings = logging_to(tmp_path / "log", settings, callers=True)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        policy = pb.RoutingPolicy(match_threshold=0.45)
        request = pb.RouteRequest(prompt="word1 word2", policy=policy, explain=True)
        response = await service(channel).Route(request)
        started_at = time.time()

    [row] = read(tmp_path / "log")
    assert row["decision_id"] == response.decision_id
    assert abs(row["time"].timestamp() - started_at) < 60
    assert row["time"].timestamp() == told(response.decision_id).time / 1000
    assert (row["bundle"], row["bundle_version"]) == ("tiny", "tiny-1")
    assert row["caller"] is not None
    assert (row["prompt"], row["prompt_tokens"], row["truncated"]) == (None, 2, False)
    assert (row["target"], row["target_value"]) == ("match_threshold", 0.45)
    assert (row["match_threshold"], row["quality_per_usd"]) == (0.45, None)
    assert (row["model"], row["samples"]) == ("small", 3)
    assert row["match_probability"] == pytest.approx(response.arm.match_probability)
    assert row["estimated_cost_usd"] == response.arm.estimated_cost_usd
    assert row["reference_model"] == "large"
    assert row["reference_cost_usd"] == response.reference.estimated_cost_usd
    assert row["fallback"] is None
    each = [arm.match_probability for arm in response.arms]
    assert row["match_probabilities"] == pytest.approx(each)
    assert row["expected_gains"] is None
    assert row["candidates"] is row["winner"] is row["cost_usd"] is None


async def test_every_message_of_a_stream_and_every_fallback_is_a_row(
    settings: Settings, tmp_path: Path
) -> None:
    settings = logging_to(tmp_path, settings)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:

        async def requests() -> Any:
            for prompt in ("easy", "hard hard", "broken", ""):
                yield pb.RouteStreamRequest(
                    request=pb.RouteRequest(request_id=prompt, prompt=prompt)
                )

        answers = {a.request_id: a.response async for a in service(channel).RouteStream(requests())}

    rows = {row["decision_id"]: row for row in read(tmp_path)}
    assert len(rows) == 3, "what was refused is no decision"
    of = {prompt: rows[answers[prompt].decision_id] for prompt in ("easy", "hard hard", "broken")}
    assert of["easy"]["fallback"] is None
    assert of["hard hard"]["fallback"] == "BELOW_THRESHOLD"
    assert (of["broken"]["fallback"], of["broken"]["model"]) == ("ROUTER_FAILED", "large")
    assert of["broken"]["match_probabilities"] is None
    assert not any(row["caller"] for row in rows.values()), "names are kept only if asked for"


async def test_with_hash_no_file_holds_a_prompt(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):  # a restart keeps the key
        async with (
            serving(logging_to(log, settings)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            for prompt in (SECRET, SECRET, "easy"):
                await service(channel).Route(pb.RouteRequest(prompt=prompt))

    rows = read(log)
    assert len(rows) == 6
    for value in (value for row in rows for value in row.values()):
        assert "nobody" not in str(value)
    for path in log.iterdir():
        assert b"nobody" not in path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600
    assert log.stat().st_mode & 0o777 == 0o700
    digests = [row["prompt_digest"] for row in rows]
    assert digests[0] == digests[1] == digests[3] == digests[4] != digests[2]
    # Who doesn't have the key can't try out what a prompt may have been.
    assert digests[0] != hashlib.blake2b(SECRET.encode(), digest_size=16).hexdigest()
    key = (log / "prompt.key").read_bytes()
    assert digests[0] == hashlib.blake2b(SECRET.encode(), digest_size=16, key=key).hexdigest()


async def test_prompts_are_kept_if_asked_for(settings: Settings, tmp_path: Path) -> None:
    settings = logging_to(tmp_path, settings, prompts="keep")
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        await service(channel).Route(pb.RouteRequest(prompt=SECRET))
    assert [row["prompt"] for row in read(tmp_path)] == [SECRET]


async def test_without_a_directory_nothing_is_kept(
    stub: "routing_pb2_grpc.RoutingServiceAsyncStub",
) -> None:
    response = await stub.Route(pb.RouteRequest(prompt="easy"))
    assert not response.decision_id
    assert not [each for each in threading.enumerate() if each.name == "decision-log"]


async def test_a_sample_is_kept(settings: Settings, tmp_path: Path) -> None:
    settings = logging_to(tmp_path, settings, sample=0.5)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        route = service(channel).Route
        answers = [await route(pb.RouteRequest(prompt=f"word{i}")) for i in range(60)]
    named = [answer.decision_id for answer in answers if answer.decision_id]
    assert 0 < len(named) < 60
    assert {row["decision_id"] for row in read(tmp_path)} == {*named}


# -- of a Generate -----------------------------------------------------------------------------


@pytest.fixture
def generating(tiny_bundle: Path, upstream: Upstream) -> Settings:
    """The tiny bundle's pool, served by the scriptable upstream."""
    served = served_at(upstream.url, "small", "medium", "large")
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    return served.model_copy(update={"bundle": tiny_bundle, "server": server})


def asks(samples: int = 2, **execution: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request=pb.RouteRequest(prompt="word1"),
        arm=pb.Arm(model="small", samples=samples),
        execution=pb.Execution(**execution),
    )


@pytest.mark.parametrize("answers", ["drop", "keep"])
async def test_what_was_drawn_is_in_the_decisions_row(
    generating: Settings, upstream: Upstream, tmp_path: Path, answers: str
) -> None:
    upstream.scripts = [says("bad", tokens=3), says("good good", tokens=4)]
    settings = logging_to(tmp_path, generating, answers=answers)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        events = [event async for event in service(channel).Generate(asks())]

    [row] = read(tmp_path)
    assert row["decision_id"] == events[0].decision.decision_id
    assert (row["model"], row["samples"], row["match_probability"]) == ("small", 2, None)
    drawn = {each["reward"]: each for each in row["candidates"]}
    assert set(drawn) == {-1.0, 2.0}
    best = drawn[2.0]
    assert best["text"] == ("good good" if answers == "keep" else None)
    assert (best["model"], best["finish_reason"], best["complete"]) == ("small", "stop", True)
    assert (best["input_tokens"], best["output_tokens"], best["estimated"]) == (10, 4, False)
    result = events[-1].result
    assert (row["winner"], row["cost_usd"]) == (result.candidate, result.cost_usd)
    assert result.candidate == best["index"]
    assert row["escalated"] is False


async def test_a_caller_who_leaves_leaves_a_row(
    generating: Settings, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.scripts = [hangs("good")]
    settings = logging_to(tmp_path, generating)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        answer = service(channel).Generate(asks(1))
        async for event in answer:
            if event.HasField("delta"):
                break
        answer.cancel()
        await until(lambda: not upstream.under_way)
    [row] = read(tmp_path)
    assert row["winner"] is row["cost_usd"] is None
    assert row["candidates"] == []


# -- files -------------------------------------------------------------------------------------


SCHEMA = pyarrow.schema({"value": pyarrow.string()})


def as_batch(rows: Any) -> pyarrow.RecordBatch:
    return pyarrow.RecordBatch.from_arrays([pyarrow.array(rows, pyarrow.string())], schema=SCHEMA)


def journal_in(path: Path, most: int = 1 << 30, rows: int = 100, seconds: float = 1e6) -> Any:
    return Journal("decisions", Directory(path, most), as_batch, rows, seconds)


def test_a_file_has_so_many_rows_and_is_there_whole_or_not(tmp_path: Path) -> None:
    kept = journal_in(tmp_path, rows=50)
    for index in range(120):
        assert kept.put(str(index))
    kept.work(pause=0)
    sizes = [parquet.read_metadata(p).num_rows for p in sorted(tmp_path.glob("*.parquet"))]
    assert sizes == [50, 50]
    kept.end()
    assert [row["value"] for row in read(tmp_path)] == [str(index) for index in range(120)]
    assert (kept.written, kept.dropped) == (120, 0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet", ""}  # "": the lock


def test_a_file_is_written_in_time(tmp_path: Path) -> None:
    kept = journal_in(tmp_path, seconds=0.05)
    kept.put("one")
    kept.work(pause=0)
    assert not read(tmp_path)
    time.sleep(0.06)
    kept.work(pause=0)
    assert len(read(tmp_path)) == 1


def test_all_files_together_stay_within_bounds(tmp_path: Path) -> None:
    bound = 20_000
    (tmp_path / "mine.parquet").write_bytes(b"x" * 50_000)
    kept = journal_in(tmp_path, most=bound, rows=10)
    newest = ""
    for index in range(60):
        for _ in range(10):
            newest = os.urandom(150).hex()  # can't be compressed below 150 bytes
            kept.put(newest)
        kept.work(pause=0)
        sizes = [path.stat().st_size for path in tmp_path.glob("decisions-*")]
        assert sum(sizes) <= bound
        assert read(tmp_path)[-1]["value"] == newest
        assert index < 10 or sum(sizes) > bound / 2
    assert (tmp_path / "mine.parquet").exists(), "whatever else lies there is not touched"
    assert kept.dropped == 0


def test_small_bounds_make_small_files(tmp_path: Path) -> None:
    """So many rows as a file may have would be more than all files may be."""
    bound = 50_000
    kept = journal_in(tmp_path, most=bound, rows=10_000)
    for _ in range(1000):
        kept.put(os.urandom(150).hex())
    kept.end()
    sizes = [path.stat().st_size for path in tmp_path.glob("decisions-*")]
    assert bound / 2 < sum(sizes) <= bound
    assert (kept.written, kept.dropped) == (1000, 0)


def test_processes_keep_the_bounds_together(tmp_path: Path) -> None:
    """While another one makes room, nobody writes."""
    kept = journal_in(tmp_path)
    kept.put("mine")
    other = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    ending = threading.Thread(target=kept.end)
    ending.start()
    time.sleep(0.3)
    assert not read(tmp_path)
    os.close(other)
    ending.join(30)
    assert len(read(tmp_path)) == 1


async def test_one_that_hangs_does_not_hang_the_others(
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls are answered, the server ends, and says what is lost; the next one says why not."""
    monkeypatch.setattr(directory, "_PATIENCE", 0.1)
    settings = logging_to(tmp_path, settings)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        other = os.open(tmp_path / ".lock", os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert (await service(channel).Route(pb.RouteRequest(prompt="easy"))).decision_id
    assert "lost rows of decisions: 1" in caplog.text
    assert not read(tmp_path)
    with pytest.raises(ConfigInvalid, match="another process has held"):
        async with serving(settings):
            pass
    os.close(other)


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    part = tmp_path / ".decisions-20260101T000000000000-1-0.parquet.part"
    part.write_bytes(b"half")
    kept = journal_in(tmp_path)
    kept.put("one")
    kept.end()
    assert not part.exists()
    assert len(read(tmp_path)) == 1


def test_a_disk_that_fails_is_told_once_and_costs_only_what_is_over_the_bounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_RETRY", 0.0)
    log = tmp_path / "log"
    kept = journal_in(log, rows=64)
    shutil.rmtree(log)
    for index in range(100):
        kept.put(str(index))
        kept.work(pause=0)
    assert [r.levelname for r in caplog.records] == ["ERROR"], caplog.text
    assert kept.dropped == 36
    log.mkdir()
    kept.end()
    assert [row["value"] for row in read(log)] == [str(index) for index in range(36, 100)]
    assert (kept.written, kept.dropped) == (64, 36)


def test_what_no_thread_comes_to_write_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_WAITING", 3)
    monkeypatch.setattr(journal, "MOST_WAITING_CHARACTERS", 100)
    kept = journal_in(tmp_path)
    assert [kept.put("x") for _ in range(4)] == [True, True, True, False]
    kept.work(pause=0)
    assert [kept.put("x", 60), kept.put("x", 60)] == [True, False]
    kept.work(pause=0)
    assert kept.put("x", 60)
    kept.end()
    assert (kept.written, kept.dropped) == (5, 2)


async def test_a_row_that_cannot_be_written_does_not_end_the_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = journal_in(tmp_path)
    async with writing(kept):
        kept.put(object())
        await until(lambda: kept.dropped == 1)
        kept.put("one")
    assert len(read(tmp_path)) == 1
    assert "lost rows of decisions" in caplog.text


# -- faults ------------------------------------------------------------------------------------


async def test_a_directory_that_goes_away_fails_no_call(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    settings = logging_to(log, settings, max_file_rows=2)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        shutil.rmtree(log)
        log.write_text("a file")
        for _ in range(5):
            assert (await service(channel).Route(pb.RouteRequest(prompt="easy"))).decision_id
        await until(lambda: "can't be written" in caplog.text)
    assert "lost rows of decisions" in caplog.text


async def test_a_directory_that_cannot_be_made_is_told_at_the_start(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    settings = logging_to(tmp_path / "file" / "log", settings)
    with pytest.raises(ConfigInvalid, match=r"decision_log\.directory = .* nothing can be written"):
        async with serving(settings):
            pass


async def test_a_missing_pyarrow_is_told_at_the_start(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rows", "journal", "schema"):
        monkeypatch.delitem(sys.modules, f"bestroute.traffic.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigInvalid, match=r"pip install 'bestroute\[log\]'"):
        async with serving(logging_to(tmp_path, settings)):
            pass


async def test_killed_workers_lose_only_what_was_not_rotated(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Two processes write into one directory; both are killed; every file can be read."""
    environment = {
        "BESTROUTE_DECISION_LOG__DIRECTORY": str(tmp_path),
        "BESTROUTE_DECISION_LOG__ROTATE_SECONDS": "0.2",
    }
    with processes(tiny_bundle, **environment) as running:

        async def asked(times: int) -> list[str]:
            own = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(running.address, options=own) as channel:
                route, request = service(channel).Route, pb.RouteRequest(prompt=SECRET)
                return [(await route(request)).decision_id for _ in range(times)]

        given = [i for ids in await asyncio.gather(*[asked(5) for _ in range(16)]) for i in ids]
        await asyncio.to_thread(wait_until, lambda: len(read(tmp_path)) == len(given))
        assert {row["decision_id"] for row in read(tmp_path)} == {*given}
        assert (
            len({name.split("-")[2] for name in os.listdir(tmp_path) if name.endswith("parquet")})
            == 2
        )

        late = await asked(20)
        for pid in running.workers().values():
            os.kill(pid, signal.SIGKILL)

    found = {row["decision_id"] for row in read(tmp_path)}
    assert {*given} <= found <= {*given, *late}
