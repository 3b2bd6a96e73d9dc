"""Conversations: what is remembered, and how turns follow on each other. Without a server."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.bundle import Bundle
from bestroute.config import ConfigInvalid, Settings
from bestroute.config import Sessions as SessionSettings
from bestroute.decision import Rules
from bestroute.errors import InvalidRequest
from bestroute.following import Following
from bestroute.manifest import Model
from bestroute.option import Decision, Fallback
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice, cost, prices
from bestroute.prompt import Message, Prompt
from bestroute.recent import Recent
from bestroute.session import Former, Hold, Past, Session, Standing, eased
from bestroute.sessions import Sessions
from bestroute.target import Policy
from bestroute.tokenizer import Tokenizer
from bestroute.upstream.completion import Completion
from bestroute.upstream.usage import Usage, reported_usage
from tests import tiny
from tests.upstreams import finish, text

ROW = np.array([0.3, 0.6, 0.8, 0.9, *tiny.GAINS, *tiny.OUTPUT_TOKENS], dtype=np.float32)
PROMPT = 100_000
"""Tokens: what a cache saves is then worth more than any difference of gains."""


class Clock:
    """Seconds, which a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def past(model: str = "small", samples: int = 3, tokens: int = 50, turns: int = 1) -> Past:
    return Past(turns, model, samples, tokens, "v", read=1, question=2, row=b"")


def priced(cached: float | None = None) -> dict[str, ModelPrice]:
    """Prices where what is cached costs this fraction of any other prompt token."""
    return {
        model.name: ModelPrice(
            model.input_usd_per_mtok,
            model.output_usd_per_mtok,
            InputBilling.PER_SAMPLE,
            None if cached is None else cached * model.input_usd_per_mtok,
        )
        for model in tiny.MODELS
    }


def whole(decision: Decision) -> tuple[object, ...]:
    """A decision to compare, its options one by one."""
    return (*decision[:4], tuple(decision.options))


@pytest.fixture(scope="module")
def trading(tmp_path_factory: pytest.TempPathFactory) -> Rules:
    bundle = tiny.write_trading(tmp_path_factory.mktemp("trading"))
    return Rules(Bundle.load(bundle).manifest, priced(0.1))


# What is remembered


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.booleans()), max_size=60),
    st.integers(1, 4),
)
def test_the_sessions_asked_about_last_are_remembered_for_their_time(
    asked: Sequence[tuple[int, int, bool]], most: int
) -> None:
    """Against a plain list of all that ran; sessions that fail to run are looked up only."""
    clock = Clock()
    sessions = Sessions(SessionSettings(max_sessions=most, idle_seconds=50.0), clock)
    ran: list[tuple[str, float]] = []

    for name, seconds, runs in asked:
        clock.now += seconds
        session = Session(f"{name}")
        alive = [each for each in ran if clock.now - each[1] <= 50][-most:]
        known = sessions.standing("caller", session).past
        assert (known is not None) == (session.id in [each for each, _ in alive])
        if runs:
            sessions.ran("caller", session, past())
            ran = [*((each, at) for each, at in ran if each != session.id), (session.id, clock.now)]
        assert len(sessions) <= most


def test_sessions_of_different_callers_never_meet() -> None:
    sessions = Sessions(SessionSettings())
    sessions.ran("alice", Session("1"), past())

    assert sessions.standing("alice", Session("1")).past is not None
    for caller, name in [("bob", "1"), ("alice1", ""), ("", "alice1"), ("alice", "2")]:
        assert sessions.standing(caller, Session(name)).past is None


def test_a_caller_who_connects_anew_keeps_its_session() -> None:
    sessions = Sessions(SessionSettings())
    sessions.ran("ipv4:192.0.2.1:567", Session("1"), past())

    assert sessions.standing("ipv4:192.0.2.1:890", Session("1")).past is not None
    assert sessions.standing("ipv4:192.0.2.2:567", Session("1")).past is None


def test_a_provider_s_cache_cools_before_the_session_is_forgotten() -> None:
    clock = Clock()
    settings = SessionSettings(cache_seconds=300.0, idle_seconds=3600.0)
    sessions = Sessions(settings, clock)
    sessions.ran("", Session("1"), past(tokens=50))

    found = []
    for clock.now in (300.0, 301.0, 3600.0, 3601.0):
        standing = sessions.standing("", Session("1"))
        found.append((standing.past is not None, standing.cached_tokens))

    assert found == [(True, 50), (True, 0), (True, 0), (False, 0)]


def test_turns_that_run_at_the_same_time_are_all_counted() -> None:
    sessions = Sessions(SessionSettings())
    for _ in range(3):
        sessions.ran("", Session("1"), past(turns=1))

    known = sessions.standing("", Session("1")).past

    assert known is not None
    assert known.turns == 3


def test_what_is_remembered_of_a_session_is_small_and_none_of_its_words() -> None:
    sessions = Sessions(SessionSettings())
    row = np.zeros(40, dtype=np.float32).tobytes()
    kept = Past(1, "small", 1, 1 << 20, "v", read=hash("a"), question=hash("b"), row=row)
    for index in range(1000):
        sessions.ran("caller", Session(f"secret {index}"), kept)

    [key, value] = next(iter(sessions._pasts.items()))
    held = [key, value, *(getattr(value, name) for name in Past.__slots__)]
    assert sum(map(sys.getsizeof, held)) < 800
    assert not any(b"secret" in each for each in held if isinstance(each, bytes))


# What turns do to each other


rows = st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(rows, rows, st.floats(0, 1))
def test_what_looks_harder_counts_at_once_and_what_looks_easier_by_and_by(
    now: "np.ndarray[tuple[int], np.dtype[np.float32]]",
    remembered: "np.ndarray[tuple[int], np.dtype[np.float32]]",
    momentum: float,
) -> None:
    found = eased(now, remembered, momentum, 3)

    assert found[3] == now[3]
    assert (found[:3] <= now[:3]).all()
    harder = now[:3] <= remembered[:3]
    assert np.allclose(found[:3][harder], now[:3][harder], atol=1e-6)
    between = np.minimum(now, remembered)[:3] - 1e-6
    assert (found[:3] >= between).all()


def test_a_hard_turn_is_forgotten_by_a_factor_per_turn() -> None:
    hard, easy = np.array([-1.0], dtype=np.float32), np.array([0.0], dtype=np.float32)
    seen, now = [], eased(hard, easy, 0.5, 1)
    for _ in range(3):
        now = eased(easy, now, 0.5, 1)
        seen.append(float(now[0]))

    assert seen == [-0.5, -0.25, -0.125]
    assert eased(easy, hard, 0.0, 1)[0] == 0
    assert eased(easy, hard, 1.0, 1)[0] == -1


def conversation(*turns: tuple[str, str]) -> Prompt:
    return Prompt(tuple(Message(role, content) for role, content in turns))


def test_only_a_row_of_the_same_bundle_is_gone_on_from(trading_bundle: Path) -> None:
    manifest = Bundle.load(trading_bundle).manifest
    hard = ROW.copy()
    hard[:8] -= 0.2
    asked = conversation(("user", "word1"))

    def gone_on(bundle: str, row: bytes) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        known = Past(1, "small", 1, 5, bundle, read=0, question=0, row=row)
        return Following(asked, Standing(False, 0.5, known), manifest).ease(ROW)

    assert (gone_on(manifest.version, hard.tobytes())[:8] < ROW[:8]).all()
    assert (gone_on("another", hard.tobytes()) == ROW).all()
    assert (gone_on(manifest.version, hard[:4].tobytes()) == ROW).all()


def test_the_same_turn_asked_again_counts_once(trading_bundle: Path) -> None:
    manifest = Bundle.load(trading_bundle).manifest
    first = Following(conversation(("user", "hard")), Standing(False, 0.5), manifest)
    first.ease(ROW - 0.2)
    asked = conversation(("user", "hard"), ("assistant", "word1"), ("user", "word2"))
    standing = Standing(False, 0.5, first.past("small", 1, 5))
    second = Following(asked, standing, manifest)
    eased_once = second.ease(ROW)
    again = Following(asked, standing._replace(past=second.past("small", 1, 9)), manifest)

    assert (eased_once[:8] < ROW[:8]).all()
    assert (again.ease(ROW) == eased_once).all()


# What switching costs


@given(
    st.sampled_from(["small", "medium", "large", "gone"]),
    st.integers(0, PROMPT),
    st.sampled_from(list(Hold)),
)
def test_no_option_ever_costs_more_in_a_session(
    trading: Rules, model: str, cached: int, hold: Hold
) -> None:
    alone = trading.decide(ROW, PROMPT, Policy())
    turn = trading.decide(ROW, PROMPT, Policy(), Former(model, 1, cached, hold))

    for now, before in zip(
        (*turn.options, turn.reference), (*alone.options, alone.reference), strict=True
    ):
        saved = before.estimated_cost_usd - now.estimated_cost_usd
        price = priced(0.1)[now.model]
        expected = now.samples * cached * 0.9 * price.input_usd_per_mtok / 1e6
        assert saved == pytest.approx(expected if now.model == model else 0, abs=1e-12)


def test_without_a_session_a_decision_is_what_it_was(trading: Rules) -> None:
    alone = trading.decide(ROW, 10, Policy())

    assert whole(alone) == whole(trading.decide(ROW, 10, Policy(), None))
    assert [option.estimated_cost_usd for option in alone.options] == pytest.approx(
        [41e-6, 123e-6, 305e-6, 610e-6]
    )


def test_staying_is_cheaper_by_what_the_cache_saves(trading: Rules) -> None:
    """Medium is worth most for a short prompt; for a long one its price weighs more."""
    policy = Policy(max_quality_drop=0.01)
    rate = trading.decide(ROW, 10, policy)
    cold = trading.decide(ROW, PROMPT, policy)
    warm = trading.decide(ROW, PROMPT, policy, Former("medium", 1, PROMPT))
    cool = trading.decide(ROW, PROMPT, policy, Former("medium", 1, 0))

    assert (rate.arm.model, rate.arm.samples) == ("medium", 1)
    assert (cold.arm.model, cold.arm.samples) == ("small", 1)
    assert (warm.arm.model, warm.arm.samples) == ("medium", 1)
    assert whole(cool) == whole(cold)


def test_without_a_price_for_what_is_cached_nothing_is_cheaper(trading_bundle: Path) -> None:
    rules = Rules(Bundle.load(trading_bundle).manifest, priced())

    turn = rules.decide(ROW, PROMPT, Policy(), Former("medium", 1, PROMPT))

    assert whole(turn) == whole(rules.decide(ROW, PROMPT, Policy()))


@pytest.mark.parametrize("threshold", [None, 0.5, 1.0])
def test_a_model_that_has_to_stay_stays_with_its_best_arm(
    trading: Rules, threshold: float | None
) -> None:
    policy = Policy(match_threshold=threshold)
    held = trading.decide(ROW, 10, policy, Former("small", 2, 0, Hold.MODEL))
    reference = trading.decide(ROW, 10, policy, Former("large", 1, 0, Hold.MODEL))

    assert (held.arm.model, held.arm.samples) == ("small", 3)
    assert held.fallback is None
    assert reference.arm == reference.reference
    assert reference.fallback is None


def test_an_arm_that_has_to_stay_gives_way_to_limits_alone(trading: Rules) -> None:
    former = Former("small", 3, 0, Hold.ARM)

    def arm(**limits: object) -> tuple[str, int]:
        policy = Policy(**limits)  # type: ignore[arg-type]
        found = trading.decide(ROW, 10, policy, former).arm
        return found.model, found.samples

    assert arm(match_threshold=1.0) == ("small", 3)
    assert arm(max_samples=2) == ("small", 1)
    assert arm(allowed_models=("medium",))[0] == "medium"
    assert arm(max_cost_usd=0.00011, match_threshold=0.0) == ("small", 1)


def test_a_reference_that_has_to_stay_gives_way_where_others_are_named(trading: Rules) -> None:
    former = Former("large", 1, 0, Hold.MODEL)
    named = trading.decide(ROW, 10, Policy(allowed_models=("small",)), former)
    dear = trading.decide(ROW, 10, Policy(max_cost_usd=0.001), former)

    assert trading.decide(ROW, 10, Policy(allowed_models=("large",)), former).arm.model == "large"
    assert whole(named) == whole(trading.decide(ROW, 10, Policy(allowed_models=("small",))))
    assert dear.arm.model != "large"


@pytest.mark.parametrize("hold", list(Hold))
@pytest.mark.parametrize(
    "limits", [{}, {"allowed_models": ("medium",)}, {"max_samples": 1}, {"max_cost_usd": 1e-6}]
)
def test_without_the_router_what_has_to_stay_stays_within_limits(
    trading: Rules, hold: Hold, limits: dict[str, object]
) -> None:
    policy = Policy(**limits)  # type: ignore[arg-type]
    decision = trading.without_router(10, policy, Former("small", 3, 0, hold))

    stays = hold is not Hold.NOTHING and not limits
    assert decision.arm.model == ("small" if stays else "large")
    assert decision.fallback is Fallback.ROUTER_FAILED


def test_the_request_s_own_arm_is_cheaper_too_where_it_stays(trading: Rules) -> None:
    warm = trading.fixed("medium", 2, PROMPT, Policy(), Former("medium", 1, PROMPT))
    cold = trading.fixed("medium", 2, PROMPT, Policy())

    saved = cold.arm.estimated_cost_usd - warm.arm.estimated_cost_usd
    assert saved == pytest.approx(2 * PROMPT * 0.9 * 0.5 / 1e6)
    assert warm.reference == cold.reference


# What a cached prompt costs


def test_the_price_of_a_cached_prompt_is_configured_or_listed() -> None:
    pool = [Model(name="gpt-4o", input_usd_per_mtok=1, output_usd_per_mtok=2, mean_output_tokens=9)]

    def cached(provider: dict[str, object], model: dict[str, object]) -> float | None:
        settings = Settings.model_validate(
            {
                "providers": {"acme": {"base_url": "http://127.0.0.1/v1", **provider}},
                "models": {"gpt-4o": {"provider": "acme", **model}},
            }
        )
        return prices(pool, settings)["gpt-4o"].cached_input_usd_per_mtok

    own = {"input_usd_per_mtok": 3, "output_usd_per_mtok": 4}
    assert cached({"price_id": "openai"}, {}) == pytest.approx(1.25)
    assert cached({"price_id": "openai"}, {"upstream": "gpt-4"}) == pytest.approx(30)
    assert cached({"price_id": "openai"}, {"price": own}) is None
    assert cached({}, {"price": {**own, "cached_input_usd_per_mtok": 0.5}}) == 0.5
    assert cached({}, {}) is None
    assert prices(pool, Settings())["gpt-4o"].cached_input_usd_per_mtok is None


def test_a_cached_prompt_can_t_cost_more(tmp_path: Path) -> None:
    file = tmp_path / "bestroute.toml"
    file.write_text(
        '[providers.acme]\nbase_url = "http://127.0.0.1/v1"\n[models.x]\nprovider = "acme"\n'
        "price = { input_usd_per_mtok = 1, output_usd_per_mtok = 1, "
        "cached_input_usd_per_mtok = 2 }\n"
    )
    with pytest.raises(ConfigInvalid, match="must be at most input_usd_per_mtok"):
        Settings.load(file)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_used_tokens_cost_what_their_kind_costs(fresh: int, cached: int, output: int) -> None:
    price = ModelPrice(2, 10, InputBilling.ONCE, 0.5)
    used = Usage(fresh + cached, output, cached_tokens=cached)

    assert cost(used, price) == pytest.approx((fresh * 2 + cached * 0.5 + output * 10) / 1e6)
    assert cost(used + used, price) == pytest.approx(2 * cost(used, price))


@pytest.mark.parametrize(
    ("details", "cached"),
    [
        ({"cached_tokens": 7}, 7),
        ({"cached_tokens": 10}, 10),
        ({"cached_tokens": 11}, 0),
        ({"cached_tokens": -1}, 0),
        ({"cached_tokens": True}, 0),
        ({"cached_tokens": 7.0}, 0),
        ({"cached_tokens": None}, 0),
        ({}, 0),
        (None, 0),
        ([7], 0),
    ],
)
def test_cached_tokens_are_those_of_the_provider_s_report(details: object, cached: int) -> None:
    said = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": details}

    assert reported_usage([said], 1) == Usage(10, 5, cached_tokens=cached)


def test_of_several_choices_the_first_carries_the_cached_prompt() -> None:
    completion = Completion([0, 1], prompt_characters=40, max_characters=1000)
    completion.accepted = True
    said = {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    for chunk in (text("4"), text("5", 1), finish(), finish(1), {"choices": [], "usage": said}):
        list(completion.read(chunk))

    assert [usage.cached_tokens for usage in completion.usages()] == [8, 0]
    assert sum(completion.usages(), Usage()) == Usage(10, 2, cached_tokens=8)


# What the router reads


SYSTEM, FIRST, ANSWER = ("system", "good"), ("user", "easy"), ("assistant", "hard")
QUESTION, CALLS, RESULT = ("user", "word1"), ("assistant", "word2"), ("tool", "word3")


@pytest.mark.parametrize("before", [(), (SYSTEM,), (SYSTEM, FIRST, ANSWER)])
def test_a_turn_of_tools_reads_as_the_user_s_turn_before_it(
    before: Sequence[tuple[str, str]],
) -> None:
    asked = conversation(*before, QUESTION)
    for after in ([CALLS, RESULT], [CALLS, RESULT, CALLS, RESULT]):
        turn = conversation(*before, QUESTION, *after)
        assert turn.turns.read == asked.turns.read
        assert turn.after_tools
        assert len(turn.turns.after) == len(after)
        assert len(turn.text) > len(asked.text)
    key = Recent[int].key
    assert key(*turn.turns.read) == key(
        *([asked.asked] if isinstance(asked.asked, str) else asked.asked.read)
    )


def test_a_single_turn_reads_as_it_is() -> None:
    for role in ("user", "system", "assistant", "tool"):
        prompt = conversation((role, "word1"))
        assert prompt.asked == prompt.text == "word1"


@pytest.mark.parametrize(
    ("turns", "question"),
    [
        ([SYSTEM, QUESTION, CALLS], "user: word1"),
        ([SYSTEM, CALLS, RESULT], "good"),
        ([CALLS, RESULT], "tool: word3"),
    ],
)
def test_the_question_is_whoever_s_turn_there_is(
    turns: Sequence[tuple[str, str]], question: str
) -> None:
    assert conversation(*turns).turns.question == question


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    bundle = tiny.write(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer(bundle / "tokenizer.json", max_tokens=32)


words = st.lists(st.integers(0, 99).map("word{}".format), max_size=50).map(" ".join)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), max_size=8))
def test_a_conversation_that_fits_reads_as_its_text(
    tokenizer: Tokenizer, before: Sequence[tuple[str, str]]
) -> None:
    """And one that doesn't is never over the limit, always cut, and ends with its question."""
    asked = conversation(*before, ("user", "hard easy")).turns
    encoded = tokenizer.conversation(asked.instructions, asked.earlier, asked.question)
    whole = tokenizer.prompt("\n\n".join(asked.read))

    assert encoded.prompt_tokens == whole.prompt_tokens
    assert len(encoded.ids) <= 32
    assert encoded.truncated == whole.truncated
    question = tokenizer.prompt(asked.question).ids[1:]
    assert encoded.ids[-len(question) :] == question
    if not encoded.truncated:
        assert encoded.ids == whole.ids
    else:
        assert len(encoded.ids) == 32


def test_a_long_conversation_keeps_instructions_question_and_the_latest_turns(
    tokenizer: Tokenizer,
) -> None:
    vocabulary = {tokenizer._ids(word)[0]: word for word in tiny.WORDS}
    turns = [f"word{i}" for i in range(40)]
    encoded = tokenizer.conversation(["good bad"], turns, "hard easy")
    read = [vocabulary[each] for each in encoded.ids[1:-1]]

    assert read == ["good", "bad", *turns[-26:], "hard", "easy"]
    assert encoded.truncated
    assert encoded.prompt_tokens == 44


def test_long_instructions_and_long_turns_leave_room_for_each_other(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.conversation(["good " * 100], ["bad " * 100], "hard " * 6)
    ids = encoded.ids[1:-1]
    good, bad, hard = (ids.count(tokenizer._ids(word)[0]) for word in ("good", "bad", "hard"))
    long = tokenizer.conversation(["good " * 100], ["bad " * 100], "hard " * 100)

    assert (good, bad, hard) == (12, 12, 6)
    assert long.ids[1:-1].count(tokenizer._ids("hard")[0]) == 27


def test_texts_that_are_divided_otherwise_have_keys_of_their_own() -> None:
    key = Recent[int].key
    divisions = [("ab",), ("a", "b"), ("a", "", "b"), ("ab", ""), ("", "ab"), ("b", "a")]

    assert len({key(*texts) for texts in divisions}) == len(divisions)


def test_a_policy_that_can_t_be_followed_is_refused_in_sessions_too(trading: Rules) -> None:
    with pytest.raises(InvalidRequest):
        trading.decide(ROW, 10, Policy(max_cost_usd=1e-12), Former("small", 1, 0, Hold.MODEL))
