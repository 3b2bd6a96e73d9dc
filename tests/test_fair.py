"""The fair queue against a slow model of itself, and against what it promises."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestroute.call import Call, Priority
from bestroute.fair import FairQueue

COSTS = st.integers(1, 500)
CALLERS = st.sampled_from("abcd")
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}


@dataclass
class Reply:
    gone: bool = False

    def done(self) -> bool:
        return self.gone


@dataclass(eq=False)
class Entry:
    call: Call
    length: int = 10
    since: float = 0.0
    reply: Reply = field(default_factory=Reply)


Queue = FairQueue[Entry]


def call(caller: str = "a", weight: float = 1.0, priority: Priority = Priority.NORMAL) -> Call:
    return Call(caller=caller, weight=weight, priority=priority)


def queue_of(entries: Iterable[Entry]) -> Queue:
    queue: Queue = FairQueue()
    for entry in entries:
        queue.push(entry)
    return queue


def drained(queue: Queue, now: float = 0.0) -> list[Entry]:
    entries = []
    while taken := queue.take(1, now):
        entries += taken
    return entries


class Model:
    """Start-time fair queueing of one class, as it is defined, by looking at everything."""

    def __init__(self) -> None:
        self.waiting: list[Entry] = []
        self.finish: dict[str, float] = {}
        self.virtual = 0.0

    def push(self, entry: Entry) -> None:
        caller = entry.call.caller
        if all(other.call.caller != caller for other in self.waiting):
            self.finish[caller] = max(self.finish.get(caller, 0.0), self.virtual)
        self.waiting.append(entry)

    def take(self, count: int, chosen: Callable[[int], bool]) -> tuple[list[Entry], list[Entry]]:
        before, finish = list(self.waiting), dict(self.finish)
        taken: list[Entry] = []
        weights = sum(WEIGHTS[name] for name in {entry.call.caller for entry in self.waiting})
        while self.waiting and len(taken) < count:
            heads = {entry.call.caller: entry for entry in reversed(self.waiting)}
            first = min(
                heads.values(), key=lambda entry: (self.finish[entry.call.caller], entry.since)
            )
            self.finish[first.call.caller] += first.length / first.call.weight
            self.waiting.remove(first)
            taken.append(first)
        kept = [entry for place, entry in enumerate(taken) if chosen(place)]
        self.waiting = [entry for entry in before if entry not in kept]
        self.finish = finish
        for entry in kept:
            start = self.finish[entry.call.caller]
            self.virtual = max(self.virtual + entry.length / weights / 8, start)
            self.finish[entry.call.caller] = start + entry.length / entry.call.weight
        if not self.waiting:
            self.finish, self.virtual = {}, 0.0
        return taken, kept


@given(
    st.lists(
        st.one_of(
            st.tuples(CALLERS, COSTS),
            st.tuples(st.integers(1, 5), st.integers(0, 31)),
        ),
        max_size=60,
    )
)
@settings(deadline=None)
def test_order_is_that_of_the_model(steps: list[tuple[str | int, int]]) -> None:
    queue, model = Queue(), Model()
    for now, (what, number) in enumerate(steps):
        if isinstance(what, str):
            entry = Entry(call(what, WEIGHTS[what]), number, float(now))
            queue.push(entry)
            model.push(entry)
            continue
        expected, kept = model.take(what, lambda place, bits=number: bool(bits >> place & 1))  # type: ignore[misc]
        taken = queue.take(what, float(now))
        assert taken == expected
        queue.put_back([entry for entry in taken if entry not in kept])
        assert len(queue) == len(model.waiting)
    assert drained(queue) == model.take(len(model.waiting), lambda _: True)[0]


@given(st.lists(COSTS), st.data())
@settings(deadline=None)
def test_one_caller_is_served_in_order(costs: list[int], data: st.DataObject) -> None:
    entries = [Entry(call(), cost, float(place)) for place, cost in enumerate(costs)]
    queue, served = Queue(), list[Entry]()
    for entry in entries:
        queue.push(entry)
        if data.draw(st.booleans()):
            taken = queue.take(data.draw(st.integers(1, 4)), entry.since)
            keep = data.draw(st.integers(0, len(taken)))
            queue.put_back(taken[keep:])
            served += taken[:keep]
    assert served + drained(queue) == entries


@given(
    st.lists(st.tuples(st.sampled_from([0.5, 1.0, 3.0]), COSTS), min_size=2, max_size=5),
    st.integers(1, 8),
    st.data(),
)
@settings(deadline=None)
def test_callers_share_by_weight_while_they_wait(
    callers: list[tuple[float, int]], count: int, data: st.DataObject
) -> None:
    """The bound of Goyal et al., theorem 1, whatever is chosen of what was taken."""
    queue = Queue()
    for name, (weight, most) in enumerate(callers):
        for place in range(200):
            cost = 1 + (place * 7919) % most
            queue.push(Entry(call(str(name), weight), cost, float(place)))
    served = Counter[str]()
    for _ in range(100 // count):
        taken = queue.take(count, 0.0)
        chosen = data.draw(st.integers(1, count))
        queue.put_back(taken[chosen:])
        served.update({"": 0})
        for entry in taken[:chosen]:
            served[entry.call.caller] += entry.length
    had = [served[str(name)] / weight for name, (weight, _) in enumerate(callers)]
    slack = [most / weight for weight, most in callers]
    for i in range(len(callers)):
        for j in range(i):
            assert abs(had[i] - had[j]) <= slack[i] + slack[j]


def test_to_come_back_at_once_gains_nothing() -> None:
    queue = queue_of(Entry(call("patient"), 10) for _ in range(500))
    queue.push(Entry(call("eager"), 100))
    served = Counter[str]()
    for _ in range(300):
        (entry,) = queue.take(1, 0.0)
        served[entry.call.caller] += entry.length
        if entry.call.caller == "eager":
            queue.push(Entry(call("eager"), 100))
    assert abs(served["eager"] - served["patient"]) <= 110


def test_to_stay_away_saves_nothing_up() -> None:
    queue = queue_of(Entry(call(name), 10) for name in ["rare", *["steady"] * 60])
    queue.take(1, 0.0)
    queue.take(30, 0.0)
    for _ in range(20):
        queue.push(Entry(call("rare"), 10))
    next_ones = Counter(entry.call.caller for entry in queue.take(10, 0.0))
    assert abs(next_ones["rare"] - next_ones["steady"]) <= 2


def test_ever_new_callers_starve_nobody() -> None:
    queue = queue_of(Entry(call("patient"), 10) for _ in range(100))
    for name in range(10):
        queue.push(Entry(call(f"first {name}"), 10))
    served, share = 0, 0.0
    for step in range(500):
        share += 1 / len({entry.call.caller for entry in queue})
        (entry,) = queue.take(1, float(step))
        served += entry.call.caller == "patient"
        queue.push(Entry(call(f"new {step}"), 10, float(step)))
    assert served >= share / 8 - 1


def test_to_ask_one_at_a_time_loses_little() -> None:
    queue = queue_of(Entry(call(str(n)), 100) for n in range(9) for _ in range(100))
    queue.push(Entry(call("light"), 10))
    served = Counter[str]()
    for _ in range(1000):
        (entry,) = queue.take(1, 0.0)
        served[entry.call.caller] += entry.length
        if entry.call.caller == "light":
            queue.push(Entry(call("light"), 10))
    assert served["light"] > 0.9 * served["0"]


def test_classes_go_in_order() -> None:
    entries = [Entry(call(str(p), priority=p), since=-p / 10) for p in reversed(Priority)]
    assert [e.call.priority for e in queue_of(entries).take(3, 0.0)] == list(Priority)


@given(
    st.sampled_from([Priority.NORMAL, Priority.LOW]),
    st.integers(1, 4),
    st.floats(0.01, 0.3),
    st.booleans(),
)
@settings(deadline=None)
def test_nothing_waits_forever(low: Priority, count: int, step: float, same_caller: bool) -> None:
    """Beside a higher class that is never empty; aging is a second for each class of difference."""
    queue, now = Queue(), 0.0
    late = Entry(call("a" if same_caller else "b", priority=low))
    queue.push(late)
    for _ in range(200):
        while len(queue) < 20:
            queue.push(Entry(call("a", priority=Priority.HIGH), 10, now))
        taken = queue.take(count, now)
        if late in taken:
            break
        now += step
    assert low * 1.0 <= now <= low * 1.0 + 2 * step


def test_what_has_aged_leaves_the_urgent_their_half() -> None:
    queue = queue_of(Entry(call("bulk", priority=Priority.LOW)) for _ in range(500))
    order = []
    for step in range(100):
        now = 10.0 + step / 100
        queue.push(Entry(call("urgent", priority=Priority.HIGH), 10, now))
        order += [entry.call.caller for entry in queue.take(2, now)]
    assert Counter(order) == {"urgent": 100, "bulk": 100}


def test_a_class_saves_nothing_up() -> None:
    """While it has nothing waiting, whether one other class is served or two that share."""
    for others in ([Priority.NORMAL], [Priority.HIGH, Priority.NORMAL]):
        queue = queue_of(Entry(call(priority=p)) for p in others for _ in range(200))
        for _ in range(50):
            queue.take(1, 10.0)
        for _ in range(50):
            queue.push(Entry(call(priority=Priority.LOW)))
        served = Counter(entry.call.priority for entry in queue.take(30, 10.0))
        assert all(
            abs(served[p] - 30 / len([*others, "low"])) <= 1 for p in [*others, Priority.LOW]
        )


@given(st.lists(st.tuples(CALLERS, st.sampled_from(Priority), COSTS), max_size=30), st.data())
@settings(max_examples=300, deadline=None)
def test_putting_all_back_changes_nothing(
    pushes: list[tuple[str, Priority, int]], data: st.DataObject
) -> None:
    def filled() -> Queue:
        return queue_of(
            Entry(call(name, WEIGHTS[name], priority), cost, place / 10)
            for place, (name, priority, cost) in enumerate(pushes)
        )

    def places(entries: list[Entry]) -> list[tuple[float, int]]:
        return [(entry.since, entry.length) for entry in entries]

    plain, tried = filled(), filled()
    now, count = len(pushes) / 10, data.draw(st.integers(1, 10))
    while plain:
        tried.put_back(tried.take(data.draw(st.integers(0, 40)), now))
        assert len(tried) == len(plain)
        assert places(tried.take(count, now)) == places(plain.take(count, now))
    assert not tried


def test_only_what_was_taken_can_be_put_back() -> None:
    queue = queue_of([Entry(call()), Entry(call())])
    (taken,) = queue.take(1, 0.0)
    with pytest.raises(ValueError, match="latest take"):
        queue.put_back([Entry(call())])
    queue.put_back([taken])
    with pytest.raises(ValueError, match="latest take"):
        queue.put_back([taken])


@given(st.lists(st.tuples(CALLERS, st.booleans()), max_size=40), st.integers(1, 5))
@settings(deadline=None)
def test_the_gone_are_never_taken(pushes: list[tuple[str, bool]], count: int) -> None:
    entries = [Entry(call(name), since=float(i)) for i, (name, _) in enumerate(pushes)]
    queue = queue_of(entries)
    for entry, (_, gone) in zip(entries, pushes, strict=True):
        entry.reply.gone = gone
    assert set(queue) == set(entries)
    served = []
    while taken := queue.take(count, 0.0):
        served += taken
    assert sorted(served, key=entries.index) == [entry for entry in entries if not entry.reply.gone]
    assert len(queue) == 0
    assert list(queue) == []


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 20)), max_size=8),
    st.sampled_from("abcdefghi"),
)
@settings(deadline=None)
def test_ahead_is_about_what_goes_before(held: list[tuple[str, int]], newcomer: str) -> None:
    queue = queue_of(Entry(call(name)) for name, count in held for _ in range(count))
    high = [Entry(call("z", priority=Priority.HIGH)) for _ in range(3)]
    for entry in high:
        queue.push(entry)
    queue.push(Entry(call("z", priority=Priority.LOW)))
    ahead = queue.ahead(call(newcomer))
    new = Entry(call(newcomer))
    queue.push(new)
    assert abs(drained(queue).index(new) - ahead) <= len({name for name, _ in held})


def test_ahead_of_many_callers_is_bounded_by_turns() -> None:
    queue = queue_of(Entry(call("greedy")) for _ in range(1000))
    for name in range(100):
        queue.push(Entry(call(str(name))))
    assert queue.ahead(call("new")) <= 102
    assert queue.ahead(call("greedy")) == 1100


class TestEviction:
    def test_the_greediest_gives_way_with_its_newest(self) -> None:
        greedy = [Entry(call("greedy"), since=float(i)) for i in range(5)]
        queue = queue_of([*greedy, *(Entry(call("modest")) for _ in range(3))])
        assert queue.evict(call("new")) is greedy[-1]
        assert len(queue) == 7
        assert greedy[-1] not in set(queue)

    def test_weight_counts(self) -> None:
        heavy = [Entry(call("heavy", 4.0)) for _ in range(6)]
        light = [Entry(call("light", 1.0)) for _ in range(3)]
        assert queue_of([*heavy, *light]).evict(call("new")) is light[-1]

    @pytest.mark.parametrize(("held", "gives_way"), [(1, True), (2, True), (3, False), (9, False)])
    def test_the_greedy_displace_nobody(self, held: int, gives_way: bool) -> None:
        queue = queue_of(Entry(call("other")) for _ in range(4))
        for _ in range(held):
            queue.push(Entry(call("newcomer")))
        victim = queue.evict(call("newcomer"))
        assert (victim is not None) == gives_way
        assert victim is None or victim.call.caller == "other"

    def test_what_comes_together_counts_together(self) -> None:
        queue = queue_of(Entry(call("other")) for _ in range(4))
        assert queue.evict(call("newcomer"), 4) is None
        assert queue.evict(call("newcomer"), 3) is not None

    def test_lower_classes_give_way_first(self) -> None:
        low = Entry(call("modest", priority=Priority.LOW))
        queue = queue_of([*(Entry(call("greedy")) for _ in range(5)), low])
        assert queue.evict(call("other", priority=Priority.LOW)) is None
        assert queue.evict(call("greedy")) is low
        assert queue.evict(call("greedy")) is None
        assert queue.evict(call("greedy", priority=Priority.HIGH)) is not None

    def test_the_lowest_class_gives_way_before_the_greediest(self) -> None:
        low = Entry(call("modest", priority=Priority.LOW))
        queue = queue_of([*(Entry(call("greedy")) for _ in range(5)), low])
        assert queue.evict(call("new")) is low

    def test_higher_classes_never_do(self) -> None:
        queue = queue_of(Entry(call("greedy", priority=Priority.HIGH)) for _ in range(9))
        assert queue.evict(call("new")) is None

    def test_the_gone_are_not_counted_for(self) -> None:
        entries = [Entry(call("greedy"), since=float(i)) for i in range(6)]
        queue = queue_of(entries)
        for entry in entries[3:]:
            entry.reply.gone = True
        assert queue.evict(call("new")) is entries[2]
        for entry in entries:
            entry.reply.gone = True
        assert queue.evict(call("new", priority=Priority.HIGH)) is None
        assert len(queue) == 0

    @given(st.lists(st.sampled_from("aaaaaabbc"), min_size=200, max_size=300))
    @settings(max_examples=30, deadline=None)
    def test_a_full_queue_comes_to_be_shared(self, asks: list[str]) -> None:
        """Each in turn takes what the one with most has too much; none takes back."""
        queue, evicted = Queue(), Counter[str]()
        for name in asks:
            if len(queue) == 12:
                victim = queue.evict(call(name))
                if victim is None:
                    continue
                evicted[victim.call.caller] += 1
                assert victim.call.caller != name
            queue.push(Entry(call(name)))
        held = Counter(entry.call.caller for entry in queue)
        wanted = Counter(asks)
        most = max(held.values())
        assert all(most - held[name] <= 1 or held[name] == wanted[name] for name in wanted)
        assert sum(evicted.values()) <= 12


def test_callers_with_nothing_waiting_are_forgotten() -> None:
    def size(callers: int) -> int:
        queue = queue_of(Entry(call("always")) for _ in range(10))
        for name in range(callers):
            queue.push(Entry(call(f"{name:06}"), since=float(name)))
            queue.push(Entry(call("always"), since=float(name)))
            queue.take(2, float(name))
        return len(pickle.dumps(queue))

    assert size(3000) < size(300) * 1.1


@given(st.lists(st.tuples(CALLERS, st.sampled_from(Priority), COSTS), max_size=30))
@settings(deadline=None)
def test_an_empty_queue_keeps_nothing(pushes: list[tuple[str, Priority, int]]) -> None:
    queue = Queue()
    for name, priority, cost in pushes:
        queue.push(Entry(call(name, WEIGHTS[name], priority), cost))
    drained(queue)
    queue.take(1, 0.0)
    assert len(pickle.dumps(queue)) == len(pickle.dumps(Queue()))
