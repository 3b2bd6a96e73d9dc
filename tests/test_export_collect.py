"""Collecting answers from real HTTP servers, killed and interrupted for real."""

import asyncio
import json
import resource
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from math import inf
from pathlib import Path
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock

from bestroute.config import ConfigInvalid, Settings
from bestroute.upstream.providers import Sampling
from bestroute_export.__main__ import main
from bestroute_export.data import stream_prompts
from bestroute_export.gather.collect import PATIENCE, Collector
from bestroute_export.gather.collection import Collection
from bestroute_export.gather.command_line import shared
from bestroute_export.gather.journal import Entry, Journal, JournalInvalid
from bestroute_export.gather.limits import Budget, Limits, Pace
from bestroute_export.gather.prompts import read_prompts
from bestroute_export.rows import DataError, write_rows
from tests.upstreams import Call, Chunk, Upstream, finish, hangs, says, served_at, text, until

# What `bestroute-export collect` runs, without the imports of the other commands.
COMMAND = """
import argparse
from rich.console import Console
from bestroute_export.gather.collect_command import add_collect
parser = argparse.ArgumentParser()
add_collect(parser.add_subparsers())
options = parser.parse_args()
options.alone(options, Console())
"""
UNLIMITED = Limits(inf, {})


def prompts(directory: Path, count: int) -> Path:
    path = directory / "prompts.jsonl"
    rows = ({"id": f"q{i}", "prompt": f"What is {i} + 2?", "task": "sums"} for i in range(count))
    write_rows(path, rows)
    return path


def config(directory: Path, url: str, **provider: Any) -> Path:
    """A file with the models "small" and "large", a USD per million tokens, at one provider."""
    path = directory / "models.toml"
    values = {"base_url": url, **provider}
    lines = ["[providers.test]", *(f"{name} = {json.dumps(v)}" for name, v in values.items())]
    for model in ("small", "large"):
        price = "{ input_usd_per_mtok = 1, output_usd_per_mtok = 1 }"
        lines += [f"[models.{model}]", 'provider = "test"', f"price = {price}"]
    path.write_text("\n".join(lines))
    return path


def arguments(directory: Path, url: str, count: int = 3, **provider: Any) -> list[str]:
    return [
        "collect",
        f"--prompts={prompts(directory, count)}",
        f"--models={config(directory, url, **provider)}",
        f"--out={directory / 'out.jsonl'}",
        "--samples=2",
    ]


async def spawned(arguments: list[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COMMAND, *arguments), stdout=asyncio.subprocess.PIPE
    )


def outcome(run: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and output of the command line, run in this process."""
    code = 0
    try:
        main(run)
    except SystemExit as exit:
        code = int(exit.code or 0)
    return code, " ".join(capsys.readouterr().out.split())


def kept(directory: Path) -> list[Entry]:
    lines = (directory / "out.jsonl.journal").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def priced(url: str, *models: str, **provider: Any) -> Settings:
    settings = served_at(url, *models, **provider).model_dump()
    for model in settings["models"].values():
        model["price"] = {"input_usd_per_mtok": 1, "output_usd_per_mtok": 1}
    return Settings.model_validate(settings)


async def collected(
    directory: Path,
    settings: Settings,
    count: int,
    samples: int = 1,
    limits: Limits = UNLIMITED,
    max_output_tokens: int = 100,
) -> Collection:
    """What is there after one run, in this process."""
    with Journal(directory / "journal", {}) as journal:
        collection = Collection(prompts(directory, count), journal, [*settings.models], samples)
        limits = Limits(limits.max_cost_usd - collection.spent, limits.requests_per_minute)
        sampling = Sampling(max_output_tokens)
        async with aclosing(Collector(settings, sampling, limits)) as collector:
            await collector.run(collection.wanted, collection.record)
    return collection


# --- the command


def test_every_model_answers_every_prompt(
    llmock: LLMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llmock.reply("It is <answer>4</answer>.", times=None)
    code, out = outcome(arguments(tmp_path, llmock.base_url()), capsys)

    assert (code, len(llmock.requests)) == (0, 12)
    assert "spent $0.0" in out
    rows = list(stream_prompts(tmp_path / "out.jsonl"))
    assert [row.id for row in rows] == ["q0", "q1", "q2"]
    assert all(row.task == "sums" for row in rows)
    answers = [answer for row in rows for group in row.answers.values() for answer in group]
    assert len(answers) == 12
    assert {"It is <answer>4</answer>."} == {answer.text for answer in answers}
    assert {"stop"} == {answer.finish_reason for answer in answers}
    assert all(a.grade is None and a.tokens and a.input_tokens and a.cost_usd for a in answers)


def test_nothing_is_asked_twice(
    llmock: LLMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(tmp_path, llmock.base_url())
    outcome(run, capsys)
    first = (tmp_path / "out.jsonl").read_text()
    code, _ = outcome(run, capsys)

    assert (code, len(llmock.requests)) == (0, 12)
    assert first == (tmp_path / "out.jsonl").read_text()

    outcome([*run, "--samples=3"], capsys)

    assert len(llmock.requests) == 18


def test_a_rate_limit_is_waited_out(
    llmock: LLMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llmock.rate_limit(retry_after=0.3, times=2)
    started = time.monotonic()
    code, _ = outcome(arguments(tmp_path, llmock.base_url(), max_concurrency=1), capsys)

    assert code == 0
    assert time.monotonic() - started >= 0.6
    assert [429, 429, *[200] * 12] == [request.status for request in llmock.requests]


def test_what_failed_is_told_and_asked_again(
    llmock: LLMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llmock.context_overflow(times=2)
    run = arguments(tmp_path, llmock.base_url())
    code, out = outcome(run, capsys)

    assert code == 1
    assert "2 answers left to do" in out
    assert "maximum context" in out

    code, _ = outcome(run, capsys)

    assert (code, len(llmock.requests)) == (0, 14)


def test_a_key_comes_from_the_environment_only(
    llmock: LLMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(tmp_path, llmock.base_url(), api_key_env="NO_SUCH_VARIABLE")
    code, out = outcome(run, capsys)

    assert code == 2
    assert "[providers.test]: set NO_SUCH_VARIABLE in the environment" in out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--out=answers.csv"], "unknown format; name it .jsonl"),
        (["--requests-per-minute=tset=5"], 'no provider "tset"; did you mean "test"?'),
        (["--prompts=nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--out=/dev/null/out.jsonl"], "can't be opened: "),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_asked(
    llmock: LLMock,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    complaint: str,
) -> None:
    code, out = outcome([*arguments(tmp_path, llmock.base_url()), *more], capsys)

    assert (code, llmock.requests) == (2, [])
    assert complaint in out


# --- killed and interrupted


async def test_kill_9_loses_only_what_was_under_way(upstream: Upstream, tmp_path: Path) -> None:
    upstream.scripts = [says(f"answer {i}", tokens=3) for i in range(7)] + [hangs("half an ")]
    run = arguments(tmp_path, upstream.url, max_concurrency=3)
    process = await spawned(run)
    journal = tmp_path / "out.jsonl.journal"
    await until(lambda: len(upstream.calls) == 10)
    await until(lambda: journal.read_text().count("\n") == 8)
    process.kill()
    await process.communicate()
    with journal.open("a") as file:
        file.write('{"key":"torn')

    upstream.scripts = [says("another", tokens=3)]
    resumed = await spawned(run)
    await resumed.communicate()

    assert resumed.returncode == 0
    assert len(upstream.calls) == 10 + 5
    rows = list(stream_prompts(tmp_path / "out.jsonl"))
    texts = [a.text for row in rows for group in row.answers.values() for a in group]
    assert sorted(texts) == ["another"] * 5 + [f"answer {i}" for i in range(7)]
    assert all(len(group) == 2 for row in rows for group in row.answers.values())


async def test_the_first_ctrl_c_waits_for_what_is_under_way(
    upstream: Upstream, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> AsyncIterator[Chunk]:
        yield text("the ")
        await go_on.wait()
        yield text("end")
        yield finish()

    upstream.scripts = [script]
    process = await spawned(arguments(tmp_path, upstream.url, max_concurrency=2))
    assert process.stdout is not None
    await until(lambda: len(upstream.calls) == 2)
    process.send_signal(signal.SIGINT)
    async for line in process.stdout:
        if b"waited for" in line:
            break
    go_on.set()
    out, _ = await process.communicate()

    assert process.returncode == 130
    assert b"10 answers left to do" in out
    assert len(upstream.calls) == 2
    rows = list(stream_prompts(tmp_path / "out.jsonl"))
    assert [a.text for row in rows for group in row.answers.values() for a in group] == [
        "the end",
        "the end",
    ]


async def test_the_second_ctrl_c_drops_it_and_counts_what_it_cost(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.scripts = [hangs("half an answer")]
    process = await spawned(arguments(tmp_path, upstream.url, max_concurrency=2))
    assert process.stdout is not None
    await until(lambda: upstream.under_way == 2)
    process.send_signal(signal.SIGINT)
    async for line in process.stdout:
        if b"waited for" in line:
            break
    process.send_signal(signal.SIGINT)
    await process.communicate()

    assert process.returncode == 130
    assert [entry["error"] for entry in kept(tmp_path)] == ["cancelled"] * 2
    assert all(entry["cost_usd"] > 0 for entry in kept(tmp_path))


# --- limits


async def test_the_money_cap_is_never_passed(upstream: Upstream, tmp_path: Path) -> None:
    most_under_way = 0

    async def script(call: Call) -> AsyncIterator[Chunk]:
        nonlocal most_under_way
        most_under_way = max(most_under_way, upstream.under_way)
        await asyncio.sleep(0.02)
        async for chunk in says("4", tokens=400)(call):
            yield chunk

    upstream.scripts = [script]
    # A call costs 410 millionths of a dollar, and at most 1,000 for the answer and 79 or 80.
    settings = priced(upstream.url, "small")
    limits = Limits(2_500e-6, {})
    collection = await collected(tmp_path, settings, 12, 1, limits, max_output_tokens=1000)

    assert len(upstream.calls) == 4  # after which 1,640 are spent and less than 1,079 left
    assert most_under_way == 2
    assert collection.spent == pytest.approx(1_640e-6)
    assert collection.done() == {"small": 4}
    assert collection.notes == ["the money cap leaves no room for another call"]

    collection = await collected(tmp_path, settings, 12, 1, limits, max_output_tokens=1000)

    assert len(upstream.calls) == 4, "what earlier runs have spent counts"

    raised = await collected(tmp_path, settings, 12, 1, Limits(1.0, {}))

    assert raised.done() == {"small": 12}


async def test_money_is_limited_only_where_prices_are_known(upstream: Upstream) -> None:
    with pytest.raises(ConfigInvalid, match=r'set \[models."small".price\]'):
        Collector(served_at(upstream.url, "small"), Sampling(), Limits(1.0, {}))


async def test_a_refused_reservation_ends_all_that_wait() -> None:
    budget = Budget(cap=10.0)
    assert await budget.reserve(6.0)
    waiting = [asyncio.create_task(budget.reserve(5.0)) for _ in range(2)]
    await asyncio.sleep(0)
    budget.settle(6.0, 6.0)

    assert await asyncio.gather(*waiting) == [False, False]
    assert budget.exhausted


async def test_turns_keep_their_distance() -> None:
    pace = Pace(per_minute=6000)
    started = time.monotonic()
    for _ in range(6):
        await pace.turn()

    assert time.monotonic() - started >= 0.049


async def test_calls_under_way_are_limited(upstream: Upstream, tmp_path: Path) -> None:
    most = 0

    async def script(call: Call) -> AsyncIterator[Chunk]:
        nonlocal most
        most = max(most, upstream.under_way)
        await asyncio.sleep(0.01)
        yield text("4")
        yield finish()

    upstream.scripts = [script]
    await collected(tmp_path, priced(upstream.url, max_concurrency=3), 10)

    assert len(upstream.calls) == 20
    assert most == 3


def test_workers_share_the_limits() -> None:
    assert Limits(8.0, {"test": 60.0}).share(4) == Limits(2.0, {"test": 15.0})

    settings = served_at("http://127.0.0.1:1/v1", max_concurrency=6)

    assert shared(settings, 4).providers["test"].max_concurrency == 1
    with pytest.raises(ConfigInvalid, match="ask for --ray 6 at most"):
        shared(settings, 7)


# --- providers


async def test_a_model_that_fails_for_good_is_given_up_and_the_others_go_on(
    llmock: LLMock, upstream: Upstream, tmp_path: Path
) -> None:
    llmock.fail(401, times=None, message="no such key")
    good = priced(upstream.url, "small").model_dump()
    bad = priced(llmock.base_url(), "large", max_concurrency=1).model_dump()
    settings = Settings.model_validate(
        {
            "providers": {"good": good["providers"]["test"], "bad": bad["providers"]["test"]},
            "models": {
                "small": good["models"]["small"] | {"provider": "good"},
                "large": bad["models"]["large"] | {"provider": "bad"},
            },
        }
    )
    collection = await collected(tmp_path, settings, PATIENCE + 4, samples=2)

    assert collection.done() == {"small": 2 * (PATIENCE + 4), "large": 0}
    assert len(llmock.requests) == 2 * PATIENCE - 1
    assert [f"large: given up, {PATIENCE} prompts in a row failed"] == collection.notes
    assert collection.words["large"] == "bad: 401 no such key"


async def test_a_broken_answer_is_no_answer_but_has_its_price(
    llmock: LLMock, tmp_path: Path
) -> None:
    llmock.reply("Two and two is four.").disconnect(after_chunks=4)
    collection = await collected(tmp_path, priced(llmock.base_url(), "small"), 1)

    assert collection.done() == {"small": 0}
    assert collection.spent > 0


@pytest.mark.parametrize(("samples", "counts"), [("one_call", [3, 2]), ("many_calls", [1] * 5)])
async def test_only_what_is_missing_is_asked_for(
    upstream: Upstream, tmp_path: Path, samples: str, counts: list[int]
) -> None:
    async def script(call: Call) -> AsyncIterator[Chunk]:
        for index in range(call.body.get("n", 1)):
            yield text("4", index)
            yield finish(index)

    upstream.scripts = [script]
    settings = priced(upstream.url, "small", samples=samples)
    await collected(tmp_path, settings, 1, samples=3)
    collection = await collected(tmp_path, settings, 1, samples=5)

    assert collection.done() == {"small": 5}
    assert counts == [call.body.get("n", 1) for call in upstream.calls]


# --- prompts


def test_lines_of_text_are_prompts_by_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("What is 1 + 2?\n\nWhat is 2 + 2?\nWhat is 1 + 2?\n")
    first = list(read_prompts(path))
    path.write_text("Another?\nWhat is 2 + 2?\n")
    second = list(read_prompts(path))

    assert [row["prompt"] for row in first] == ["What is 1 + 2?", "What is 2 + 2?"]
    assert first[1] == second[1]


def test_an_id_belongs_to_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_rows(path, [{"id": "a", "prompt": "1?"}, {"id": "a", "prompt": "2?"}])
    with pytest.raises(DataError, match=r'line 2: the id "a" is there twice'):
        list(read_prompts(path))


async def test_a_changed_prompt_is_asked_anew(upstream: Upstream, tmp_path: Path) -> None:
    settings = priced(upstream.url, "small")
    await collected(tmp_path, settings, 1)
    path = tmp_path / "changed.jsonl"
    write_rows(path, [{"id": "q0", "prompt": "What is 5 + 2?"}])

    with Journal(tmp_path / "journal", {}) as journal:
        assert Collection(path, journal, ["small"], 1).done() == {"small": 0}


async def test_answers_of_other_models_stay(upstream: Upstream, tmp_path: Path) -> None:
    answers = [{"text": "3", "score": 0.0, "tokens": 1}]
    row = {"id": "q", "prompt": "?", "responses": {"old": answers}, "difficulty": 3}
    write_rows(tmp_path / "rows.jsonl", [row])
    with Journal(tmp_path / "journal", {}) as journal:
        collection = Collection(tmp_path / "rows.jsonl", journal, ["small"], 1)
        settings = priced(upstream.url, "small")
        async with aclosing(Collector(settings, Sampling(9), UNLIMITED)) as collector:
            await collector.run(collection.wanted, collection.record)
        [written] = collection.rows()

    assert answers == written["responses"]["old"]
    assert written["responses"]["small"][0]["text"] == "4"
    assert written["difficulty"] == 3


# --- the journal


def test_a_journal_gives_back_what_was_appended(tmp_path: Path) -> None:
    entries = [{"text": "ä\n"}, {"text": "b" * 70_000}, {"text": ""}]
    with Journal(tmp_path / "journal", {"n": 1}) as journal:
        places = [journal.append(entry) for entry in entries]
    with Journal(tmp_path / "journal", {"n": 1}) as journal:
        assert [*zip(places, entries, strict=True)] == [*journal.entries()]
        assert entries == [journal.read(place) for place in places]


@pytest.mark.parametrize("torn", [1, 40_000, 70_000])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "journal"
    with Journal(path, {}) as journal:
        journal.append({"text": "whole"})
        journal.append({"text": "x" * 80_000})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - torn)
    with Journal(path, {}) as journal:
        journal.append({"text": "next"})
        assert [entry for _, entry in journal.entries()] == [{"text": "whole"}, {"text": "next"}]


def test_a_torn_first_line_begins_the_journal_anew(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text('{"sett')
    with Journal(tmp_path / "journal", {"n": 1}) as journal:
        assert list(journal.entries()) == []
    with Journal(tmp_path / "journal", {"n": 1}):
        pass


def test_a_journal_belongs_to_its_settings(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {"n": 1}):
        pass
    with pytest.raises(JournalInvalid, match=r"(?s)begun with other settings.*name another"):
        Journal(tmp_path / "journal", {"n": 2})


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "journal", {}),
        pytest.raises(JournalInvalid, match="written by another process"),
    ):
        Journal(tmp_path / "journal", {})


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {}) as journal:
        journal.append({"n": 1})
    with (tmp_path / "journal").open("a") as file:
        file.write("garbage\n")
    with (
        Journal(tmp_path / "journal", {}) as journal,
        pytest.raises(JournalInvalid, match="line 3: damaged"),
    ):
        list(journal.entries())


def test_a_full_disk_ends_the_run_and_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = "make room and run the same again"

    def fill() -> None:
        with Journal(path, {}) as journal:
            journal.append({"n": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
            try:
                journal.append({"n": 2})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                with pytest.raises(JournalInvalid, match=words):
                    journal.append({"n": 3})  # never behind a torn line

    with pytest.raises(JournalInvalid, match=words):
        fill()
    with Journal(path, {}) as journal:
        assert [entry for _, entry in journal.entries()] == [{"n": 1}]


# --- many machines


@pytest.mark.timeout(600)  # Ray's start and its workers' imports take minutes on a busy machine
@pytest.mark.filterwarnings("ignore")  # Ray warns of itself
def test_ray_collects_and_labels_the_same(
    llmock: LLMock,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else one is left in the home
    llmock.reply("It is <answer>4</answer>.", times=None)
    run = arguments(tmp_path, llmock.base_url())
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        code, out = outcome([*run, "--ray=2"], capsys)
        assert code == 0, out
        assert len(llmock.requests) == 12
        references = tmp_path / "references.jsonl"
        write_rows(references, ({"id": f"q{i}", "reference_answer": i + 2} for i in range(3)))
        label = f"label --data={tmp_path}/out.jsonl --out={tmp_path}/graded.jsonl --grader=exact"
        code, out = outcome([*label.split(), f"--answers={references}", "--ray=1"], capsys)
        assert code == 0, out
    finally:
        ray.shutdown()

    rows = {row.id: row for row in stream_prompts(tmp_path / "graded.jsonl")}
    assert [rows[f"q{i}"].answers["small"][1].score for i in range(3)] == [0.0, 0.0, 1.0]
    code, _ = outcome(run, capsys)
    assert (code, len(llmock.requests)) == (0, 12), "one journal for both ways to run"
