"""When a circuit breaker opens and closes, by an independent account of what it has seen."""

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bestroute.upstream.breaker import SHARE, WINDOW, Admission, Breaker, State

FAILURES, PAUSE = 3, 10.0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def calls(breaker: Breaker, *failed: bool | None, wait: float = 0.0) -> None:
    """Calls one after the other."""
    for each in failed:
        admission = breaker.admit()
        assert admission is not None
        breaker.ended(admission, failed=each, wait=wait)


def opened(clock: Clock, wait: float = 0.0) -> Breaker:
    breaker = Breaker(FAILURES, PAUSE, clock)
    calls(breaker, *[True] * FAILURES, wait=wait)
    assert breaker.state is State.OPEN
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker(FAILURES, PAUSE, Clock())

    calls(breaker, True, True, False, True, None, True)
    assert breaker.state == "closed"
    calls(breaker, True)
    assert breaker.state == "open"
    assert breaker.admit() is None


def test_half_of_the_last_calls_open_it() -> None:
    breaker = Breaker(FAILURES, PAUSE, Clock())

    calls(breaker, *[True, False] * (WINDOW // 2 - 1))
    assert breaker.state == "closed", "too few to tell a share"
    calls(breaker, False, True)
    assert breaker.state == "open"


def test_after_the_pause_one_call_tries_it() -> None:
    clock = Clock()
    breaker = opened(clock)

    clock.now += PAUSE - 0.1
    assert breaker.admit() is None
    assert breaker.wait == pytest.approx(0.1)
    clock.now += 0.1
    assert (breaker.state, breaker.admits) == (State.HALF_OPEN, True)
    probe = breaker.admit()
    assert probe is not None
    assert breaker.admit() is None, "one at a time"
    breaker.ended(probe, failed=False)
    assert breaker.state is State.CLOSED


def test_a_failed_trial_opens_it_anew_and_one_without_an_end_leaves_room_for_another() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += PAUSE

    calls(breaker, None)
    assert breaker.state is State.HALF_OPEN
    calls(breaker, True)
    assert (breaker.state, breaker.wait) == (State.OPEN, PAUSE)


@pytest.mark.parametrize(("wait", "pause"), [(1.0, PAUSE), (60.0, 60.0)])
def test_it_stays_open_for_as_long_as_it_was_asked_to(wait: float, pause: float) -> None:
    assert opened(Clock(), wait).wait == pause


def test_calls_from_before_it_opened_tell_nothing() -> None:
    clock = Clock()
    breaker = Breaker(FAILURES, PAUSE, clock)
    late = [breaker.admit() for _ in range(2)]
    calls(breaker, *[True] * FAILURES)
    clock.now += PAUSE

    for admission, failed in zip(late, (True, False), strict=True):
        assert admission is not None
        breaker.ended(admission, failed=failed)
        assert breaker.state is State.HALF_OPEN


def test_one_that_is_never_to_open_does_not() -> None:
    breaker = Breaker(None, PAUSE, Clock())
    calls(breaker, *[True] * 100)

    assert breaker.state is State.CLOSED


@dataclass
class Account:
    """What a breaker has seen since it last changed."""

    ends: list[bool] = field(default_factory=list)
    opened_at: float | None = None
    pause: float = PAUSE
    trial: Admission | None = None

    def trips(self) -> bool:
        last = self.ends[-WINDOW:]
        share = len(last) == WINDOW and last[-1] and sum(last) / WINDOW >= SHARE
        return share or (len(self.ends) >= FAILURES and all(self.ends[-FAILURES:]))


class Breaking(RuleBasedStateMachine):
    """Any calls, ending in any order and any way, while time goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(FAILURES, PAUSE, self.clock)
        self.account = Account()
        self.current: list[Admission] = []
        self.outdated: list[Admission] = []

    @rule(seconds=st.sampled_from([0.5, 4.0, PAUSE, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def call(self) -> None:
        expected = self.expected() is State.CLOSED or (
            self.expected() is State.HALF_OPEN and self.account.trial is None
        )
        assert self.breaker.admits is expected
        admission = self.breaker.admit()
        assert (admission is not None) is expected
        if admission is not None:
            self.current.append(admission)
            if self.account.opened_at is not None:
                self.account.trial = admission

    @precondition(lambda self: self.current)
    @rule(data=st.data(), failed=st.sampled_from([True, True, False, None]))
    def end(self, data: st.DataObject, failed: bool | None) -> None:
        admission = self.current.pop(data.draw(st.integers(0, len(self.current) - 1)))
        wait = data.draw(st.sampled_from([0.0, 25.0]))
        self.breaker.ended(admission, failed=failed, wait=wait)
        account = self.account
        if account.trial is not None:
            account.trial = None
            if failed is not None:
                self.change(opens=failed, wait=wait)
        elif failed is not None:
            account.ends.append(failed)
            if account.trips():
                self.change(opens=True, wait=wait)

    @precondition(lambda self: self.outdated)
    @rule(failed=st.sampled_from([True, False, None]))
    def end_late(self, failed: bool | None) -> None:
        self.breaker.ended(self.outdated.pop(), failed=failed)

    def change(self, *, opens: bool, wait: float) -> None:
        at = self.clock.now if opens else None
        self.account = Account(opened_at=at, pause=max(PAUSE, wait))
        self.outdated += self.current
        self.current.clear()

    def expected(self) -> State:
        at = self.account.opened_at
        if at is None:
            return State.CLOSED
        return State.OPEN if self.clock.now < at + self.account.pause else State.HALF_OPEN

    @invariant()
    def agrees(self) -> None:
        assert self.breaker.state is self.expected()
        assert (self.breaker.wait > 0) is (self.expected() is State.OPEN)


test_any_history = Breaking.TestCase
