"""The command line against real servers, and the annotated configuration file."""

import asyncio
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import grpc
import onnxruntime
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import BaseModel

from bestroute import app
from bestroute.app import Running, serving
from bestroute.bundle import DEFAULT_BUNDLE
from bestroute.cli import main, parser
from bestroute.config import Settings
from bestroute.execution import PROVIDERS
from bestroute.v1 import routing_pb2 as pb
from tests import tiny
from tests.scripted import Context, scripted
from tests.upstreams import (
    Upstream,
    Wire,
    events,
    hangs,
    refused,
    says,
    served_at,
    streamed,
    text,
)

REFUSED = "127.0.0.1:1"
"""Nothing listens here: the port is reserved."""


@dataclass
class Done:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Awaitable[Done]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process, beside the server's event loop."""

    async def run(*arguments: str) -> Done:
        code = await asyncio.to_thread(exit_code, arguments)
        return Done(code, *capsys.readouterr())

    return run


def exit_code(arguments: tuple[str, ...]) -> int:
    try:
        return main(arguments)
    except SystemExit as exit:  # argparse's way out
        return int(exit.code or 0)


@pytest.fixture
def ask(run: Run, server: Running) -> Run:
    """Runs a command that asks the real server."""

    async def ask(command: str, *arguments: str) -> Done:
        return await run(command, "--address", server.address, *arguments)

    return ask


async def spawn(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
    """Start the command line in a process of its own, as a shell does."""
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = (sys.executable, "-m", "bestroute", *arguments)
    return await asyncio.create_subprocess_exec(*command, **{**pipes, **options})


def is_one_line(text: str) -> bool:
    return text.startswith("bestroute: ") and text.count("\n") == 1


# route and score


async def test_route_shows_the_decision(ask: Run) -> None:
    done = await ask("route", "easy good")

    assert done.code == 0
    assert done.out.startswith("small, 1 sample\n")
    assert "0.982 to match large; threshold 0.500" in done.out
    assert "$0.0000502 estimated, 96.7 % less than large at $0.00151" in done.out
    assert "2 tokens" in done.out
    assert re.search(r"tokenize \S+ ms, queue \S+ ms, inference \S+ ms in a batch of 1", done.out)
    assert "tiny-1" in done.out
    assert done.err == ""


async def test_route_says_why_it_fell_back(ask: Run) -> None:
    below = await ask("route", "hard hard")
    over = await ask("route", "hard hard", "--max-cost", "0.0001")

    assert below.out.startswith("large, 1 sample\n")
    assert "no allowed arm reached the threshold" in below.out
    assert "the reference is over the highest cost" in over.out


async def test_explain_lists_every_arm_cheapest_first(ask: Run) -> None:
    done = await ask("route", "word1", "--match-threshold", "0.45", "--explain")

    table = done.out.partition("\n\n")[2].splitlines()
    rows = [(cells[0], cells[1], cells[-1]) for line in table[1:] if (cells := line.split())]
    assert rows == [
        ("small", "1", "%"),
        ("small", "3", "chosen"),
        ("medium", "1", "%"),
        ("medium", "2", "%"),
        ("large", "1", "reference"),
    ]


async def test_a_trade_off_is_explained(run: Run, settings: Settings, trading_bundle: Path) -> None:
    trading = settings.model_copy(update={"bundle": trading_bundle})
    async with serving(trading) as running:

        async def ask(*arguments: str) -> Done:
            return await run("route", "--address", running.address, *arguments)

        gain = await ask("word1 better", "--explain")
        left = await ask("worse worse")
        threshold = await ask("easy", "--match-threshold", "0.5")

    assert gain.out.startswith("medium, 1 sample\n")
    assert "+0.100 expected against large; one dollar is worth 50 of quality" in gain.out
    assert "about 120 tokens" in gain.out
    assert re.search(r"^small +1 +0.269 +\+0.040 +80 +\$0.0000402 +98.7 %", gain.out, re.MULTILINE)
    assert re.search(r"^medium .* chosen *$", gain.out, re.MULTILINE)
    assert left.out.startswith("large, 1 sample\n")
    assert "no allowed arm is worth more than the reference" in left.out
    assert "trade-off  one dollar is worth 50 of quality" in left.out
    assert "to match large; threshold 0.500" in threshold.out


async def test_policy_flags_reach_the_service(ask: Run) -> None:
    done = await ask("route", "easy", "--allow", "medium", "--allow", "large", "--max-samples", "1")

    assert done.out.startswith("medium, 1 sample\n")


@pytest.mark.parametrize(
    ("target", "threshold"),
    [("--max-quality-drop", 0.5), ("--min-cost-saving", 0.5), ("--match-threshold", 0.25)],
)
async def test_each_target_is_passed_on(ask: Run, target: str, threshold: float) -> None:
    done = await ask("route", "easy", target, str(threshold), "--json")

    expected = {"--max-quality-drop": 0.2, "--min-cost-saving": 0.5, "--match-threshold": 0.25}
    assert json.loads(done.out)["match_threshold"] == expected[target]


async def test_json_is_one_line_with_the_protos_names_and_nothing_else(ask: Run) -> None:
    done = await ask("route", "easy ünïcode", "--json", "--explain")

    assert done.out.count("\n") == 1
    decision = json.loads(done.out)
    assert decision["arm"]["samples"] == 1
    assert decision["truncated"] is False
    assert decision["bundle_version"] == "tiny-1"
    assert len(decision["arms"]) == 4
    assert done.err == ""


async def test_a_dash_reads_the_prompt_from_stdin(server: Running) -> None:
    process = await spawn("route", "-", "--json", "--address", server.address)
    out, err = await process.communicate(b"word1 word2\nword3\n")

    assert process.returncode == 0, err
    assert json.loads(out)["prompt_tokens"] == 3


async def test_score_shows_every_reward(ask: Run) -> None:
    done = await ask("score", "word1", "bad", "good\ngood " + "word1 " * 100)

    lines = done.out.splitlines()
    assert lines[1].split() == ["bad", "-1.000"]
    assert lines[2].startswith("good good word1")
    assert lines[2].split()[-3:] == ["2.000", "best,", "cut"]


async def test_score_as_json(ask: Run) -> None:
    done = await ask("score", "word1", "bad", "good", "--json")

    assert json.loads(done.out)["best"] == 1


# generate


@pytest.fixture
async def pool(settings: Settings, upstream: Upstream) -> AsyncIterator[Running]:
    """A real server whose models are all at the scripted upstream."""
    served = served_at(upstream.url, "small", "medium", "large")
    both = served.model_copy(update={"bundle": settings.bundle, "server": settings.server})
    async with serving(both) as running:
        yield running


async def test_one_sample_goes_straight_to_stdout(
    run: Run, pool: Running, upstream: Upstream
) -> None:
    upstream.scripts = [says("the ", "answer", tokens=2)]

    done = await run("generate", "easy", "--address", pool.address)

    assert done.code == 0
    assert done.out == "the answer\n"
    assert done.err.startswith("small, 1 sample: $0.0000501 estimated")
    assert "candidate 0 of small; $0.00000200 paid" in done.err
    assert "than the reference at $0.00150; 12 tokens; first text after" in done.err


async def test_the_best_of_several_goes_to_stdout(
    run: Run, pool: Running, upstream: Upstream
) -> None:
    upstream.scripts = [says("bad"), says("good ", "good"), says("good")]

    done = await run(
        "generate", "word1", "--model", "small", "--samples", "3", "--address", pool.address
    )

    assert done.out == "good good\n"
    rewards = re.findall(r"candidate \d of small: reward (\S+), \d+ tokens?, stop", done.err)
    assert sorted(rewards) == ["-1.000", "1.000", "2.000"]


async def test_options_reach_the_llm(run: Run, pool: Running, upstream: Upstream) -> None:
    options = {"--temperature": "0.5", "--top-p": "0.9", "--max-output-tokens": "7", "--seed": "-3"}
    flags = [text for option in options.items() for text in option]

    await run("generate", "easy", "--address", pool.address, *flags)

    body = upstream.calls[0].body
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.5, 0.9, -3)
    assert 7 in (body.get("max_tokens"), body.get("max_completion_tokens"))


async def test_escalation_replaces_a_bad_answer(
    run: Run, pool: Running, upstream: Upstream
) -> None:
    upstream.scripts = [says("bad"), says("good")]

    done = await run(
        "generate", "word1", "--model", "small", "--escalate", "--address", pool.address
    )

    assert done.out == "good\n"
    assert "the reference was asked as well" in done.err


async def test_a_model_and_escalate_go_through_the_arm_s_gate(
    run: Run, settings: Settings, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.scripts = [says("1"), says("2"), says("3"), says("4")]
    served = served_at(upstream.url, "small", "large")
    gated = tiny.write(tmp_path, gates=[tiny.GATE])
    both = served.model_copy(update={"bundle": gated, "server": settings.server})
    flags = ["--model", "small", "--samples", "3", "--escalate"]
    async with serving(both) as running:
        strict = await run("generate", "word1", *flags, "--address", running.address)
        upstream.calls.clear()
        lax = [*flags, "--max-quality-drop", "0.1"]
        taken = await run("generate", "word1", *lax, "--address", running.address)

    assert strict.out == "4\n"
    assert "the reference was asked as well" in strict.err
    assert taken.out in {"1\n", "2\n", "3\n"}
    assert "the reference was asked as well" not in taken.err


async def test_generate_as_json_is_one_event_per_line(
    run: Run, pool: Running, upstream: Upstream
) -> None:
    upstream.scripts = [says("the ", "answer", tokens=2)]

    done = await run("generate", "easy", "--json", "--address", pool.address)

    kinds = [next(iter(json.loads(line))) for line in done.out.splitlines()]
    assert kinds == ["decision", "delta", "delta", "candidate", "result"]
    assert done.err == ""


async def test_retries_and_fallbacks_are_told(
    run: Run, settings: Settings, upstream: Upstream, wire: Wire
) -> None:
    """What came of the first answer was printed already; the second begins on its own line."""
    wire.replies = [refused(503, b"busy", retry_after="0"), streamed(events(text("half"))[:-14])]
    upstream.scripts = [says("the answer")]
    served = served_at(wire.url, "small")
    well = served_at(upstream.url, "large")
    both = Settings.model_validate(
        {
            "bundle": settings.bundle,
            "server": settings.server.model_dump(),
            "providers": {
                "bad": served.providers["test"].model_dump(),
                "good": well.providers["test"].model_dump(),
            },
            "models": {"small": {"provider": "bad"}, "large": {"provider": "good"}},
        }
    )
    async with serving(both) as running:
        done = await run("generate", "easy", "--address", running.address)

    assert done.out == "half\nthe answer\n"
    assert "small failed: bad: 503 busy; asked again in 0.0 s" in done.err
    assert "What was printed of the answer is not all of it." in done.err
    assert "small gave no answer: bad: " in done.err
    assert "; large is asked instead" in done.err


async def test_no_answer_from_any_llm(run: Run, settings: Settings) -> None:
    served = served_at(f"http://{REFUSED}/v1", "small", "large", max_retries=0)
    both = served.model_copy(update={"bundle": settings.bundle, "server": settings.server})
    async with serving(both) as running:
        done = await run("generate", "easy", "--address", running.address)

    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("bestroute: ")
    assert "Traceback" not in done.err


async def test_ctrl_c_stops_the_llm(pool: Running, upstream: Upstream) -> None:
    upstream.scripts = [hangs("the beginning")]
    process = await spawn("generate", "easy", "--address", pool.address)
    assert process.stdout is not None
    await process.stdout.readexactly(len("the beginning"))
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()

    assert process.returncode == 130
    assert b"Traceback" not in err
    await asyncio.wait_for(upstream.calls[0].left.wait(), 5)


async def test_a_terminal_shows_candidates_while_they_are_written(
    pool: Running, upstream: Upstream
) -> None:
    upstream.scripts = [says("word1 ", "word2 ", "good", delay=0.4), says("bad", delay=0.8)]
    ours, theirs = pty.openpty()
    arguments = ("generate", "word1", "--model", "small", "--samples", "2")
    process = await spawn(*arguments, "--address", pool.address, stderr=theirs)
    out, _ = await process.communicate()
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)

    assert process.returncode == 0
    assert out == b"word1 word2 good\n"
    assert re.search(r"candidate 0\S*\s+\S*word1", shown)
    assert "reward -1.000" in shown


# Errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["arms"], "invalid choice"),
        (["route"], "PROMPT"),
        (["route", "x", "--match-threshold", "0.5", "--min-cost-saving", "0.5"], "not allowed"),
        (["route", "x", "--match-threshold", "high"], "invalid float"),
        (["route", "x", "--max-samples", "0"], "0 is not in 1 ..."),
        (["route", "x", "--max-samples", "many"], "'many' is not an integer"),
        (["route", "x", "--timeout", "0"], "'0' is not a number of seconds above 0"),
        (["route", "x", "--timeout", "soon"], "'soon' is not a number of seconds"),
        (["route", "\udcff"], "not UTF-8"),
        (["score", "x"], "RESPONSE"),
        (["generate", "x", "--samples", "2"], "--samples needs --model"),
        (["serve", "--provider", "tpu"], "invalid choice"),
        (["serve", "--config", "/nowhere.toml"], "examples/bestroute.toml"),
        (["bundle"], "COMMAND"),
    ],
)
async def test_wrong_usage_is_explained(run: Run, arguments: list[str], told: str) -> None:
    done = await run(*arguments)

    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


async def test_serving_what_is_not_there() -> None:
    process = await spawn("serve", "--bundle", "/nowhere")
    _, err = await process.communicate()

    assert process.returncode == 2
    assert err.decode().splitlines()[-1].startswith("bestroute: /nowhere/manifest.json can't be")
    assert b"Traceback" not in err


async def test_stdin_that_is_not_text() -> None:
    process = await spawn("route", "-")
    _, err = await process.communicate(b"\xff")

    assert process.returncode == 2
    assert b"stdin is not UTF-8" in err


async def test_what_the_service_refuses_is_wrong_usage(ask: Run) -> None:
    done = await ask("route", "easy", "--allow", "smal")

    assert done.code == 2
    assert is_one_line(done.err)
    assert "policy.allowed_models[0]" in done.err


@pytest.mark.parametrize("arguments", [["route", "x"], ["score", "x", "y"], ["generate", "x"]])
async def test_an_absent_service_can_be_started(run: Run, arguments: list[str]) -> None:
    done = await run(*arguments, "--address", REFUSED)

    assert done.code == 1
    assert is_one_line(done.err)
    assert f"{REFUSED} can't be reached" in done.err
    assert "`bestroute serve`" in done.err


async def test_another_service_at_the_address(run: Run) -> None:
    async with scripted() as address:
        done = await run("route", "x", "--address", address)

    assert done.code == 1
    assert "is not a bestroute service" in done.err


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "is overloaded; try again in 1 s"),
        (grpc.StatusCode.INTERNAL, "answered INTERNAL: told"),
    ],
)
async def test_failures_of_the_service(run: Run, code: grpc.StatusCode, told: str) -> None:
    async def route(request: pb.RouteRequest, context: Context) -> None:
        await context.abort(code, "told")

    async with scripted(Route=route) as address:
        done = await run("route", "x", "--address", address)

    assert done.code == 1
    assert is_one_line(done.err)
    assert told in done.err


async def test_a_service_that_does_not_answer(run: Run) -> None:
    async def route(request: pb.RouteRequest, context: Context) -> None:
        await asyncio.sleep(60)

    async with scripted(Route=route) as address:
        done = await run("route", "x", "--address", address, "--timeout", "0.2")

    assert done.code == 1
    assert "within 0.2 s; see --timeout" in done.err


async def test_a_reader_who_has_seen_enough(tiny_bundle: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = await spawn("bundle", "show", str(tiny_bundle), stdout=write)
    os.close(write)
    _, err = await process.communicate()

    assert process.returncode == 1
    assert err == b""


@pytest.mark.parametrize(
    "command",
    [
        "",
        "serve",
        "route",
        "score",
        "generate",
        "doctor",
        "top",
        "health",
        "bundle",
        "bundle show",
        "bundle verify",
    ],
)
async def test_help_has_examples_that_parse(
    run: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await run(*command.split(), "--help")

    assert done.code == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for example in done.out.partition("examples:\n")[2].splitlines():
        _, _, rest = re.split(r" [|<>] ", example)[0].partition("bestroute ")
        assert rest.startswith(command)
        parser().parse_args(shlex.split(rest))


async def test_version(run: Run) -> None:
    assert re.fullmatch(r"bestroute \d+\.\d+\.\d+\n", (await run("--version")).out)


# doctor


async def test_doctor_finds_all_well(ask: Run) -> None:
    done = await ask("doctor")

    assert done.code == 0
    lines = done.out.splitlines()
    assert [line[:6] for line in lines[:3]] == ["ok    "] * 3
    assert "bundle tiny-1: 4 arms of 3 models, reference large" in lines[2]
    assert done.err == ""


async def test_doctor_tries_every_provider(ask: Run) -> None:
    done = await ask("doctor")

    found = [line.split(maxsplit=1) for line in done.out.splitlines()[-3:]]
    assert [name for name, _ in found] == ["cpu", "cuda", "tensorrt"]
    assert found[0][1] == "runs networks here"
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        assert all("install 'bestroute[gpu]'" in reason for _, reason in found[1:])


async def test_doctor_says_it_in_json(ask: Run, run: Run) -> None:
    well, away = await ask("doctor", "--json"), await run("doctor", "--json", "--address", REFUSED)

    assert (well.code, well.err, away.code, away.err) == (0, "", 1, "")
    found, lost = json.loads(well.out), json.loads(away.out)
    assert (found["well"], lost["well"], lost["address"]) == (True, False, REFUSED)
    assert {check["passed"] for check in found["checks"]} == {True}
    assert "can't be reached" in lost["checks"][0]["finding"]
    assert found["providers"] == lost["providers"]
    assert found["providers"][0] == {"provider": "cpu", "fault": None}


async def test_a_quiet_doctor_says_nothing_of_the_well(ask: Run) -> None:
    done = await ask("doctor", "--quiet")

    assert (done.code, done.out, done.err) == (0, "", "")


async def test_doctor_finds_nobody(run: Run) -> None:
    done = await run("doctor", "--quiet", "--address", REFUSED)

    assert done.code == 1
    assert done.err.startswith(f"FAIL  {REFUSED} can't be reached")
    assert "`bestroute serve`" in done.err


async def test_doctor_finds_a_draining_service(run: Run) -> None:
    """The real one drains too briefly to be asked in the middle of it."""
    server = grpc.aio.server()
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    await healths.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    await healths.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    done = await run("doctor", "--address", f"127.0.0.1:{port}")
    await server.stop(None)

    assert done.code == 1
    assert 'FAIL  health: not serving as "", "readiness"' in done.err
    assert '"liveness"' not in done.err


def test_a_quiet_doctor_loads_nothing_heavy() -> None:
    """It runs every few seconds in a container that should use its CPU for answers."""
    heavy = {"numpy", "onnxruntime", "openai", "aiohttp", "pydantic", "tokenizers", "rich"}
    code = f"""
import sys
from bestroute.cli import main
main(["doctor", "--quiet", "--address", "{REFUSED}"])
print(*{heavy} & set(sys.modules))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


# bundle


async def test_bundle_show_prints_what_it_holds(run: Run, tiny_bundle: Path) -> None:
    done = await run("bundle", "show", str(tiny_bundle))

    assert done.code == 0
    assert done.out.startswith("tiny tiny-1\n")
    assert re.search(r"^large +3 +15 +100 tokens +reference$", done.out, re.MULTILINE)
    assert re.search(r"^small +1, 3 samples", done.out, re.MULTILINE)
    assert re.search(r"^0.500 \* +50.0 % +1.0 % +2.0 % +█{15} *$", done.out, re.MULTILINE)
    assert "cost_saving" in done.out
    assert done.err == ""


async def test_a_long_curve_is_thinned_but_keeps_the_default(run: Run, tmp_path: Path) -> None:
    manifest = json.loads((tiny.write(tmp_path) / "manifest.json").read_text())
    point = manifest["curve"][0]
    manifest["curve"] = [{**point, "match_threshold": n / 1000} for n in range(1001)]
    manifest["default_match_threshold"] = 0.333
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    done = await run("bundle", "show", str(tmp_path))

    thresholds = re.findall(r"^(\d\.\d{3})( \*)? ", done.out, re.MULTILINE)
    assert len(thresholds) == 13
    assert thresholds[0] == ("0.000", "")
    assert ("0.333", " *") in thresholds
    assert thresholds[-1] == ("1.000", "")


async def test_bundle_show_draws_the_trade_offs_and_what_they_promise(
    run: Run, trading_bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((trading_bundle / "manifest.json").read_text())
    strictest, second, *_ = manifest["trade_offs"]["curve"]
    strictest["quality_per_usd"], second["quality_drop_upper"] = -1e9, 0.02
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    done = await run("bundle", "show", str(tmp_path))

    promised = re.findall(r"^(-?\d\S*(?: \*)?) .* (\S+ %)  [ █]*$", done.out, re.MULTILINE)
    assert promised == [
        ("-1e+09", "0.0 %"),
        ("0", "2.0 %"),
        ("50 *", "2.0 %"),
        ("200", "4.0 %"),
        ("1000", "11.0 %"),
    ]
    assert "* default quality per USD: 50" in done.out
    assert "smallest drop promised: 2.0 %, saving 60.0 % at 50" in done.out


async def test_bundle_show_lists_what_gates_promise(run: Run, tmp_path: Path) -> None:
    useless = tiny.GATE.trade_offs.model_copy(update={"curve": tiny.GATE.trade_offs.curve[:1]})
    gates = [
        tiny.GATE,
        tiny.GATE.model_copy(update={"arm": tiny.ARMS[0], "trade_offs": useless}),
    ]

    done = await run("bundle", "show", str(tiny.write(tmp_path, gates=gates)))

    listed = done.out.partition("\nGates")[2].partition("\n\n")[0].splitlines()
    assert listed[1].startswith("arm ")
    assert re.fullmatch(r"small, 3 samples +2\.0 % +40\.0 % +20 *", listed[2])
    assert re.fullmatch(r"small, 1 sample +saves nothing *", listed[3])


async def test_without_gates_none_are_shown(run: Run, tiny_bundle: Path) -> None:
    assert "Gates" not in (await run("bundle", "show", str(tiny_bundle))).out


async def test_bundle_show_as_json_is_the_manifest(run: Run, tiny_bundle: Path) -> None:
    done = await run("bundle", "show", str(tiny_bundle), "--json")

    assert done.out.count("\n") == 1
    assert json.loads(done.out) == json.loads((tiny_bundle / "manifest.json").read_text())


async def test_bundle_verify_compares_the_golden_answers(run: Run, tiny_bundle: Path) -> None:
    done = await run("bundle", "verify", str(tiny_bundle))

    assert done.code == 0
    assert done.out.count("\n") == 1
    assert "tiny tiny-1 can be served; its answers on cpu deviate by" in done.out


async def test_a_damaged_bundle_is_not_verified(
    run: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))
    with (damaged / "router.onnx").open("ab") as file:
        file.write(b"x")

    done = await run("bundle", "verify", str(damaged))

    assert done.code == 1
    assert is_one_line(done.err)
    assert "router.onnx has SHA-256" in done.err


@pytest.mark.parametrize("verb", ["show", "verify"])
async def test_no_bundle_at_that_path(run: Run, tmp_path: Path, verb: str) -> None:
    done = await run("bundle", verb, str(tmp_path))

    assert done.code == 1
    assert is_one_line(done.err)


@pytest.mark.skipif(not DEFAULT_BUNDLE.exists(), reason="no bundle is embedded yet")
@pytest.mark.parametrize("verb", ["show", "verify"])
async def test_the_embedded_bundle_is_the_default(run: Run, verb: str) -> None:
    assert (await run("bundle", verb)).code == 0


async def test_verify_needs_a_valid_environment(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTROUTE_ENGINE__PROVIDER", "tpu")

    done = await run("bundle", "verify", str(tiny_bundle))

    assert done.code == 2
    assert is_one_line(done.err)


# serve; that it serves and drains is tested with the server


async def test_flags_of_serve_win_over_the_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Settings] = []

    def start(load: Callable[[], Settings], file: Path | None) -> int:
        started.append(load())
        return 0

    monkeypatch.setattr(app, "run", start)
    file = tmp_path / "bestroute.toml"
    file.write_text('log_level = "ERROR"\n[engine]\nthreads = 3\n[server]\nlisten = "x:1"\n')

    flags = ["--listen", "127.0.0.1:0", "--bundle", str(tmp_path), "--provider", "cuda"]
    more = ["--log-level", "DEBUG"]
    assert (await run("serve", "--config", str(file), *flags, *more)).code == 0
    assert (await run("serve", "--threads", "2")).code == 0

    assert started[0].server.listen == "127.0.0.1:0"
    assert started[0].bundle == tmp_path
    assert (started[0].engine.provider, started[0].engine.threads) == ("cuda", 3)
    assert started[0].log_level == "DEBUG"
    assert started[1] == Settings(engine=started[1].engine)
    assert started[1].engine.threads == 2


# examples/bestroute.toml


EXAMPLE = Path(__file__).parents[1] / "examples" / "bestroute.toml"
ALTERNATIVES = {"jwks_file"}
"""Settings that can't be beside another one, and so are only mentioned."""


@pytest.fixture(scope="module")
def uncommented() -> dict[str, Any]:
    """The example with every setting switched on."""
    return tomllib.loads(re.sub(r"(?m)^#(?=\[|\w+ = )", "", EXAMPLE.read_text()))


def test_the_example_changes_nothing_as_it_stands() -> None:
    assert Settings.load(EXAMPLE) == Settings()


def test_every_setting_of_the_example_is_valid(uncommented: dict[str, Any]) -> None:
    engine = uncommented["engine"]
    remote = {name: value for name, value in engine.items() if name.startswith("endpoint")}
    local = {name: value for name, value in engine.items() if name not in remote}
    Settings.model_validate({**uncommented, "engine": local})
    Settings.model_validate({"engine": {"provider": "kserve", **remote}})


def test_the_example_has_every_setting_with_its_default(uncommented: dict[str, Any]) -> None:
    compare(Settings, [uncommented])


def compare(section: type[BaseModel], shown: list[dict[str, Any]]) -> None:
    """Each field of the section is in one of the tables shown, with its default if it has one."""
    for name, field in section.model_fields.items():
        values = [table[name] for table in shown if name in table]
        if name in ALTERNATIVES:
            assert f" {name} = " in EXAMPLE.read_text(), f"{name} is not in the example's comments"
            continue
        assert values, f"{section.__name__}.{name} is not in the example"
        inner = [
            part
            for part in (field.annotation, *get_args(field.annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if not inner:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert default is None or field.is_required() or values == [default]
        elif field.annotation is inner[0] or name == "price":
            compare(inner[0], values)
        else:  # a table of names
            compare(inner[0], [table for named in values for table in named.values()])
