"""From traffic to data: a server's decision log, joined with feedback, trains a bundle."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.progress import Progress

from bestroute.app import serving
from bestroute.config import Server, Settings
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from bestroute_export.__main__ import main
from bestroute_export.bundling import write_bundle
from bestroute_export.data import DataError, read_prompts
from bestroute_export.pipeline import Pipeline
from bestroute_export.recipe import Recipe
from bestroute_export.traffic import graded_rows, summarize
from bestroute_export.train import TrainConfig
from bestroute_export.validate.check import check_file
from bestroute_export.values import ValueConfig
from bestroute_export.verify import verify
from tests.test_decision_log import logging_to
from tests.test_export_pipeline import backbone as backbone
from tests.upstreams import Call, Chunk, Upstream, finish, served_at, text, usage

# A bundle is trained; on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(600)

PROMPTS = [f"{'easy' if index % 2 else 'hard'} word{index}" for index in range(100)]


async def answers(call: Call) -> AsyncIterator[Chunk]:
    """large is always good, small mostly where it is easy."""
    prompt = call.body["messages"][0]["content"]
    skill = 0.8 if "easy" in prompt else 0.2
    good = call.body["model"] == "large" or random.random() < skill
    yield text("good word1" if good else "bad word1")
    yield finish()
    yield usage(2, 2)


def settings_for(bundle: Path, upstream: Upstream, log: Path, **options: Any) -> Settings:
    upstream.scripts = [answers]
    served = served_at(upstream.url, "small", "large", max_concurrency=64)
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    settings = served.model_copy(update={"bundle": bundle, "server": server})
    return logging_to(log, settings, **options)


async def generate(
    stub: "routing_pb2_grpc.RoutingServiceAsyncStub",
    prompt: str,
    arm: pb.Arm | None = None,
    judged: bool = True,
) -> None:
    """Ask, and tell whether the answer is good."""
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt=prompt), arm=arm)
    decision_id, answer = "", ""
    async for event in stub.Generate(request):
        decision_id = decision_id or event.decision.decision_id
        answer = event.result.text or answer
    if judged:
        quality = float("good" in answer)
        await stub.Feedback(pb.FeedbackRequest(decision_id=decision_id, quality=quality))


async def test_a_bundle_is_trained_from_traffic(
    tiny_bundle: Path,
    upstream: Upstream,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random.seed(1)
    log, rows = tmp_path / "log", tmp_path / "traffic.jsonl.gz"
    settings = settings_for(tiny_bundle, upstream, log, prompts="keep", answers="keep")
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        for prompt in PROMPTS:
            async with asyncio.TaskGroup() as calls:
                for model in ("small", "small", "large"):
                    calls.create_task(generate(stub, prompt, pb.Arm(model=model, samples=1)))

    await asyncio.to_thread(main, ["import-log", str(log), "--out", str(rows)])
    await asyncio.to_thread(main, ["validate", str(rows), "--reference", "large"])
    assert "300 decisions on 100 different prompts" in capsys.readouterr().out
    report = check_file(rows, reference="large")
    assert not report.wrong
    assert {m.name: m.prompts for m in report.models} == {"small": 100, "large": 100}
    read = {each.text: each.answers for each in read_prompts(rows)}
    assert set(read) == set(PROMPTS)
    for drawn in read.values():
        assert [len(drawn[model]) for model in ("small", "large")] == [2, 1]
        for answer in (*drawn["small"], *drawn["large"]):
            assert answer.score == float("good" in answer.text)
            assert (answer.tokens, answer.finish_reason) == (2, "stop")

    manifest = await asyncio.to_thread(trained, rows, backbone, tmp_path)
    assert {arm.model for arm in manifest.arms} == {"small"}
    assert manifest.training is not None
    splits = report.splits
    assert manifest.training.prompts == splits["train"] + splits["validation"]
    assert all(check.passed for check in verify(tmp_path / "bundle"))


def trained(rows: Path, backbone: Path, tmp_path: Path) -> Any:
    prices = tmp_path / "prices.json"
    price = {"small": 0.1, "large": 3.0}
    prices.write_text(
        json.dumps({m: {"input_per_mtok": p, "output_per_mtok": p} for m, p in price.items()})
    )
    recipe = Recipe(
        backbone=backbone,
        reference="large",
        max_samples=2,
        router_folds=3,
        reward_tokens=24,
        router=ValueConfig(max_tokens=16),
        reward=TrainConfig(
            epochs=1, batch=16, learning_rate=3e-3, head_learning_rate=1e-2, first_layer=0
        ),
        resamples=20,
    )
    pipeline = Pipeline(rows, tmp_path / "work", recipe, Progress(disable=True), prices)
    return write_bundle(pipeline, tmp_path / "bundle", "traffic", "1", {})


async def test_answers_that_nobody_judged_have_no_score(
    tiny_bundle: Path, upstream: Upstream, tmp_path: Path
) -> None:
    """Of several answers only the winner is judged; a Route has none; a later verdict counts."""
    settings = settings_for(tiny_bundle, upstream, tmp_path, prompts="keep", answers="keep")
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        await generate(stub, "easy word1", pb.Arm(model="large", samples=3))
        await generate(stub, "easy word2", pb.Arm(model="large", samples=1), judged=False)
        routed = await stub.Route(pb.RouteRequest(prompt="easy word3"))
        for quality in (0.0, 0.5):
            told = pb.FeedbackRequest(decision_id=routed.decision_id, quality=quality)
            await stub.Feedback(told)

    every = {row["prompt"]: row for row in graded_rows(tmp_path, graded_only=False)}
    scores = {
        prompt: [answer["score"] for group in row["responses"].values() for answer in group]
        for prompt, row in every.items()
    }
    assert sorted(scores["easy word1"], key=str) == [1.0, None, None]
    assert scores["easy word2"] == [None]
    assert every["easy word3"]["responses"] == {}
    [graded] = graded_rows(tmp_path, graded_only=True)
    assert graded["prompt"] == "easy word1"
    assert len(graded["responses"]["large"]) == 1
    summary = summarize(tmp_path)
    assert (summary.decisions, summary.with_feedback, summary.with_answers) == (3, 2, 2)
    assert summary.bundles == {"tiny-1": 3}


async def test_digests_only_measure(
    tiny_bundle: Path, upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "log", tmp_path / "out.jsonl"
    settings = settings_for(tiny_bundle, upstream, log)
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        for _ in range(3):
            await generate(stub, "easy")

    await asyncio.to_thread(main, ["import-log", str(log)])
    assert "3 decisions on 1 different prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["import-log", str(log), "--out", str(out)])
    assert ended.value.code == 2
    assert 'decision_log.prompts = "keep"' in capsys.readouterr().out.replace("\n", " ")
    assert not out.exists()


def test_expected_and_observed_quality_are_compared_by_arm(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Offline, with the last verdict on each decision, and without what another model answered."""
    from pyarrow import Table, parquet

    from bestroute.traffic.schema import DECISION, FEEDBACK_ROW

    def decision(decision_id: str, winner: str | None, **values: Any) -> dict[str, Any]:
        drawn = winner and [{"index": 0, "model": winner, "text": None, "complete": True}]
        row = {"decision_id": decision_id, "prompt_digest": "d", "bundle_version": "1"}
        return {**row, "model": "small", "samples": 1, "candidates": drawn, "winner": 0, **values}

    decisions = [
        decision("a", None, expected_quality=0.9),
        decision("b", "small", expected_quality=0.9),
        decision("c", "large", expected_quality=0.9),
        decision("d", "small", expected_quality=None),
    ]
    told = [("a", 2, 1.0), ("a", 1, 0.0), ("b", 1, 0.0), ("c", 1, 0.0), ("d", 1, 0.0), ("?", 1, 0)]
    feedback = [{"decision_id": d, "time": t, "quality": q} for d, t, q in told]
    for name, rows, schema in (
        ("decisions-1", decisions, DECISION),
        ("feedback-1", feedback, FEEDBACK_ROW),
    ):
        parquet.write_table(Table.from_pylist(rows, schema), tmp_path / f"{name}.parquet")

    summary = summarize(tmp_path)

    assert summary.with_feedback == 4
    [arm] = summary.arms
    assert (arm.model, arm.samples, arm.outcomes, arm.observed) == ("small", 1, 2, 0.5)
    assert arm.expected == pytest.approx(0.9)
    assert summary.calibration_error == pytest.approx(0.4)


def test_a_directory_without_a_log_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no decisions"):
        summarize(tmp_path)
    (tmp_path / "decisions-1.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"decisions-1\.parquet can't be read"):
        summarize(tmp_path)
