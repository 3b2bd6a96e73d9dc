"""Grading answers: exactly, by a verifier, by a judge over real HTTP, by a reward model on disk."""

import json
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock

from bestroute.config import ConfigInvalid
from bestroute.prompt import Message
from bestroute_export.__main__ import main
from bestroute_export.data import stream_prompts
from bestroute_export.gather import judge
from bestroute_export.gather.graders import Exact, Grade, GraderInvalid, Verifier, normalized
from bestroute_export.gather.journal import Journal, JournalInvalid
from bestroute_export.gather.judge import Judge
from bestroute_export.gather.label import Labeller, Labels
from bestroute_export.gather.limits import Limits
from bestroute_export.gather.prompts import Fields
from bestroute_export.rows import write_rows
from tests.upstreams import Call, Chunk, Upstream, finish, says, served_at, text

UNLIMITED = Limits(math.inf, {})
QUESTION: Fields = {"id": "q", "prompt": "What is 2 + 2?"}


def data(directory: Path, answers: Iterable[str], **fields: Any) -> Path:
    """A file with a prompt, and answers of one model to it."""
    path = directory / "data.jsonl"
    group = [{"text": text, "score": None, "tokens": 1} for text in answers]
    write_rows(path, [QUESTION | fields | {"responses": {"small": group}}])
    return path


def scores(path: Path) -> list[float | None]:
    return [answer.grade for row in stream_prompts(path) for answer in row.answers["small"]]


def outcome(run: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and output of the command line, run in this process."""
    code = 0
    try:
        main(run)
    except SystemExit as exit:
        code = int(exit.code or 0)
    return code, " ".join(capsys.readouterr().out.split())


def arguments(path: Path, grader: str, *more: str) -> list[str]:
    out = path.with_name("out.jsonl")
    return ["label", f"--data={path}", f"--out={out}", f"--grader={grader}", *more]


# --- exact


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ("Paris", "paris"),
        (" New \n York\t", "new york"),
        ("I think <answer>5</answer>, no, <ANSWER> six\n</ANSWER>.", "six"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("1,000.50", Decimal("1000.5")),
        ("+3", Decimal(3)),
        ("3.", Decimal(3)),
        (".5", Decimal("0.5")),
        ("-0", Decimal(0)),
        ("1e3", Decimal(1000)),
        ("1,00", "1,00"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("", ""),
    ],
)
def test_what_counts_of_an_answer(answer: str, counts: str | Decimal) -> None:
    assert normalized(answer) == counts


def test_long_numbers_are_compared_to_the_last_digit() -> None:
    assert normalized("1" * 60 + "2") != normalized("1" * 60 + "3")


async def test_exact_match() -> None:
    prompt = QUESTION | {"reference_answer": 4}

    assert [g.score for g in await Exact().grade(prompt, ["4.0", "four"])] == [1.0, 0.0]


async def test_without_a_reference_nothing_is_graded() -> None:
    assert [Grade(None, "the row has no reference_answer")] == await Exact().grade(QUESTION, ["4"])


def test_references_come_from_the_rows_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(data(tmp_path, ["4", "5"], reference_answer="4"), "exact")
    code, out = outcome(run, capsys)

    assert (code, scores(tmp_path / "out.jsonl")) == (0, [1.0, 0.0])
    assert "2 of 2 answers graded" in out

    write_rows(tmp_path / "references.jsonl", [{"id": "q", "reference_answer": 5}])
    code, _ = outcome([*run, f"--answers={tmp_path / 'references.jsonl'}"], capsys)

    assert (code, scores(tmp_path / "out.jsonl")) == (0, [0.0, 1.0])


def test_a_reference_without_an_id_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "references.jsonl", [{"reference_answer": 5}])
    run = arguments(data(tmp_path, ["4"]), "exact", f"--answers={tmp_path / 'references.jsonl'}")
    code, out = outcome(run, capsys)

    assert code == 2
    assert "line 1: write an id and a reference_answer" in out


# --- verifier


def half(prompt: Fields, answer: str) -> float:
    if answer == "raise":
        raise RuntimeError("no idea")
    worth: float = {"too much": 2.0, "nan": math.nan}.get(answer) or prompt["worth"]
    return worth


async def test_a_verifier_grades() -> None:
    graded = await Verifier(f"{__name__}:half").grade(
        QUESTION | {"worth": 0.5}, ["a", "raise", "too much", "nan"]
    )

    assert [grade.score for grade in graded] == [0.5, None, None, None]
    assert graded[1].error == "the verifier raised RuntimeError: no idea"
    assert graded[2].error == "the verifier gave 2.0; it must give a number in [0, 1]"


def test_a_verifier_is_found_in_the_current_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lengths_of_ours.py").write_text("def short(row, text): return len(text) < 3\n")
    monkeypatch.chdir(tmp_path)
    run = arguments(data(tmp_path, ["4", "four"]), "verifier", "--verifier=lengths_of_ours:short")
    code, _ = outcome(run, capsys)

    assert (code, scores(tmp_path / "out.jsonl")) == (0, [1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("math", "write it as module:function"),
        ("no_such_module:f", "can't be imported: No module named"),
        ("math:no_such_function", "can't be imported"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_verifier_that_is_none(name: str, complaint: str) -> None:
    with pytest.raises(GraderInvalid, match=complaint):
        Verifier(name)


# --- judge


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Right. <grade>10</grade>", 1.0),
        ("<grade> 0 </grade>\n", 0.0),
        ("7", None),
        ("<grade>11</grade>", None),
        ("<grade>7.5</grade>", None),
        ("<grade>-1</grade>", None),
        ("<grade>3</grade> or <grade>4</grade>", None),
        ("<grade>3</grade> I think", None),
        ("", None),
    ],
)
def test_only_a_reply_that_ends_with_its_only_grade_counts(reply: str, score: float | None) -> None:
    assert judge.score_of(reply) == score


async def test_a_judge_is_asked_once_more_and_then_left(llmock: LLMock) -> None:
    settings = served_at(llmock.base_url(), max_concurrency=1)
    jury = Judge(settings, "large", UNLIMITED)
    llmock.reply("Fine. <grade>8</grade>")
    llmock.reply("It is a four.").reply("<grade>4</grade>")
    llmock.reply("No.", times=2)
    graded = [(await jury.grade(QUESTION, ["4"]))[0] for _ in range(3)]

    assert [grade.score for grade in graded] == [0.8, 0.4, None]
    assert graded[2].error == "no grade in: 'No.'"
    assert len(llmock.requests) == 5

    llmock.fail(400, message="no", times=2)
    failed = await jury.grade(QUESTION, ["4"])
    await jury.aclose()

    assert [Grade(None, "test: 400 no")] == failed
    assert len(llmock.requests) == 7


async def test_what_a_judge_is_asked(upstream: Upstream) -> None:
    upstream.scripts = [says("Hm."), says("<grade>5</grade>")]
    jury = Judge(served_at(upstream.url), "large", UNLIMITED)
    await jury.grade(QUESTION | {"reference_answer": "four"}, ["It is 4."])
    await jury.aclose()

    first, second = (call.body["messages"] for call in upstream.calls)
    assert [message["role"] for message in first] == ["system", "user"]
    assert all(part in first[1]["content"] for part in ("2 + 2?", "four", "It is 4."))
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": "Hm."}
    assert "<grade>" in second[3]["content"]


def test_without_a_reference_the_judge_sees_none() -> None:
    asked = judge.question(QUESTION, "4")

    assert isinstance(asked.messages[1], Message)
    assert "correct_answer" not in asked.text


def test_an_unknown_judge() -> None:
    with pytest.raises(ConfigInvalid, match='no model "lrage"; did you mean "large"'):
        Judge(served_at("http://127.0.0.1:1/v1"), "lrage", UNLIMITED)


def test_what_a_judge_failed_on_is_told_and_tried_again(
    llmock: LLMock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models.toml"
    url = llmock.base_url()
    models.write_text(f'[providers.test]\nbase_url = "{url}"\n[models.big]\nprovider = "test"\n')
    path = data(tmp_path, ["4", "four", "4"])
    run = arguments(path, "judge", "--judge=big", f"--models={models}")
    llmock.reply("No.", times=4)
    code, out = outcome(run, capsys)

    assert (code, scores(tmp_path / "out.jsonl")) == (1, [None] * 3)
    assert "2 not graded: no grade in: 'No.'" in out

    llmock.reply("<grade>9</grade>", times=None)
    code, _ = outcome(run, capsys)

    assert (code, scores(tmp_path / "out.jsonl")) == (0, [0.9] * 3)
    assert len(llmock.requests) == 4 + 2, "equal answers are graded once"


async def test_calls_of_a_judge_are_as_many_as_its_provider_takes(
    upstream: Upstream, tmp_path: Path
) -> None:
    async def script(call: Call) -> AsyncIterator[Chunk]:
        assert upstream.under_way <= 2
        yield text("<grade>5</grade>")
        yield finish()

    upstream.scripts = [script]
    settings = served_at(upstream.url, max_concurrency=2)
    with Journal(tmp_path / "journal", {}) as journal:
        labels = Labels(data(tmp_path, map(str, range(9))), journal, {})
        labeller = Labeller(partial(Judge, settings, "small", UNLIMITED))
        await labeller.work(labels.ungraded(Judge.answers_at_once), labels.record)
        await labeller.aclose()

    assert len(upstream.calls) == 9
    assert not labels.errors


# --- once each


class Counting(Verifier):
    """Fails on the k-th call, as if the process had died."""

    def __init__(self, dies_at: int) -> None:
        self.calls, self.dies_at = 0, dies_at

    async def grade(self, prompt: Fields, answers: Any) -> list[Grade]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise GraderInvalid("died")
        return [Grade(1.0) for _ in answers]


async def test_a_run_goes_on_where_it_died(tmp_path: Path) -> None:
    path = data(tmp_path, map(str, range(8)))
    graders = []
    for dies_at in (4, 0):
        graders.append(Counting(dies_at))
        with Journal(tmp_path / "journal", {}) as journal:
            labels = Labels(path, journal, {})
            labeller = Labeller(partial(lambda grader: grader, graders[-1]))
            try:
                await labeller.work(labels.ungraded(1), labels.record)
            except GraderInvalid:
                assert dies_at
            rows = list(labels.rows())

    assert [grader.calls for grader in graders] == [4, 5]
    assert {1.0} == {answer["score"] for answer in rows[0]["responses"]["small"]}


def test_ctrl_c_keeps_what_is_graded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graded: list[str] = []

    def grade(prompt: Fields, answer: str) -> float:
        graded.append(prompt["id"])
        if graded == ["q0", "q1"]:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    monkeypatch.setattr(sys.modules[__name__], "half", grade)
    path = tmp_path / "data.jsonl"
    answers = {"small": [{"text": "4", "score": None, "tokens": 1}]}
    write_rows(path, ({"id": f"q{i}", "prompt": f"{i}?", "responses": answers} for i in range(4)))
    run = arguments(path, "verifier", f"--verifier={__name__}:half")
    code, out = outcome(run, capsys)

    assert code == 130
    assert "the same command goes on from here" in out
    assert graded == ["q0", "q1"]
    assert outcome(run, capsys)[0] == 0
    assert graded == ["q0", "q1", "q2", "q3"]


def test_scores_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data(tmp_path, ["4", "5"], reference_answer="4")
    row = json.loads(path.read_text())
    row["responses"]["small"][0]["score"] = 0.25
    write_rows(path, [row])
    outcome(arguments(path, "exact"), capsys)

    assert scores(tmp_path / "out.jsonl") == [0.25, 0.0]


def test_a_file_is_graded_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data(tmp_path, ["4", "5"], reference_answer="4")
    code, _ = outcome([*arguments(path, "exact"), f"--out={path}"], capsys)

    assert (code, scores(path)) == (0, [1.0, 0.0])


def test_grades_of_another_grader_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data(tmp_path, ["4"], reference_answer="4")
    outcome(arguments(path, "exact"), capsys)
    run = arguments(path, "verifier", f"--verifier={__name__}:half")

    assert outcome(run, capsys)[0] == 2
    assert issubclass(JournalInvalid, ValueError)


@pytest.mark.parametrize("grader", ["verifier", "judge", "reward"])
def test_a_grader_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], grader: str
) -> None:
    code, out = outcome(arguments(data(tmp_path, ["4"]), grader), capsys)

    assert code == 2
    assert f"--grader {grader} needs --" in out


# --- reward model


@pytest.fixture(scope="session")
def reward_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights, and a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    directory = tmp_path_factory.mktemp("reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "2", "4", "5", "+", "?", "four", "it"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(directory)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
            num_labels=1,
            initializer_range=1.0,
        )
    ).save_pretrained(directory)
    return directory


async def test_a_reward_does_not_depend_on_its_batch(reward_directory: Path) -> None:
    from bestroute_export.gather.reward_model import RewardModel

    model = RewardModel(reward_directory, None)
    answers = ["4", "it is four", "5 " * 100, "", "four"]
    together = [grade.score for grade in await model.grade(QUESTION, answers)]
    alone = [(await model.grade(QUESTION, [answer]))[0].score for answer in answers]

    assert together == pytest.approx(alone, abs=1e-6)
    assert len({*together}) == 5
    assert all(score is not None and 0 < score < 1 for score in together)


async def test_a_range_maps_rewards_linearly(reward_directory: Path) -> None:
    from bestroute_export.gather.reward_model import RewardModel, score_of

    [logistic] = await RewardModel(reward_directory, None).grade(QUESTION, ["4"])
    [linear] = await RewardModel(reward_directory, (-50.0, 50.0)).grade(QUESTION, ["4"])

    assert logistic.score is not None
    assert linear.score == pytest.approx(
        0.5 + math.log(logistic.score / (1 - logistic.score)) / 100
    )
    assert [score_of(reward, (1.0, 5.0)) for reward in (-3.0, 2.0, 7.0)] == [0.0, 0.25, 1.0]
    assert [score_of(reward, None) for reward in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]


async def test_a_chat_template_is_used_where_there_is_one(
    reward_directory: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from bestroute_export.gather.reward_model import RewardModel

    plain = RewardModel(reward_directory, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_directory)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} + {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(reward_directory / name)
    chat = RewardModel(tmp_path, None)

    assert await plain.grade(QUESTION, ["4"]) != await chat.grade(QUESTION, ["4"])


def test_a_directory_that_holds_no_reward_model(tmp_path: Path) -> None:
    from bestroute_export.gather.reward_model import RewardModel

    with pytest.raises(GraderInvalid, match="is no model directory"):
        RewardModel(tmp_path, None)
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(GraderInvalid, match="code of its own; read it, then pass --trust"):
        RewardModel(tmp_path, None)


def test_a_missing_library_is_named(
    reward_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bestroute_export.gather.reward_model import RewardModel

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GraderInvalid, match=r"pip install 'bestroute\[hf\]'"):
        RewardModel(reward_directory, None)


def test_the_command_grades_with_a_reward_model(
    reward_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data(tmp_path, ["4", "four"])
    code, _ = outcome(arguments(path, "reward", f"--reward-model={reward_directory}"), capsys)
    first, second = scores(tmp_path / "out.jsonl")

    assert code == 0
    assert first is not None
    assert second is not None
    assert first != second
