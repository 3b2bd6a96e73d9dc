"""A queue that is fair to its callers: who asks for more than its share waits for itself.

Urgent entries go first, but none waits forever. Among equally urgent ones callers share by weight:
start-time fair queueing (Goyal, Vin and Cheng, 1996). Pure: it knows no clock and no event loop.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heapreplace
from typing import Generic, Protocol, TypeVar

from bestroute.call import Call, Priority

_MANY = 64
"""More callers than these aren't looked at one by one where an estimate will do."""

_CREEP = 1 / 8
"""Of its fair pace, what virtual time goes on by at least. So callers who come back under ever new
names leave the others an eighth of their share. Nearer to 1 it would overtake light callers, who
have one thing waiting at a time."""


class Reply(Protocol):
    """What an entry's caller waits for."""

    def done(self) -> bool:
        """Whether nobody waits any more: it was answered, or its caller has left."""


class Entry(Protocol):
    """Something that waits for its turn."""

    @property
    def call(self) -> Call:
        """Who asks, with what weight, how urgently."""

    @property
    def length(self) -> int:
        """What it costs, in tokens."""

    @property
    def since(self) -> float:
        """When it came, in seconds of the clock that `FairQueue.take` is told."""

    @property
    def reply(self) -> Reply:
        """Done once the entry is gone, which is then dropped where it is met."""


E = TypeVar("E", bound=Entry)


class _Flow(Generic[E]):
    """What one caller has waiting in one class, oldest first.

    Attributes:
        start: virtual start of the first entry; while there is none, the earliest of the next.
    """

    __slots__ = ("entries", "start", "weight")

    def __init__(self, start: float) -> None:
        self.entries: deque[E] = deque()
        self.start, self.weight = start, 1.0


class _Class(Generic[E]):
    """What is waiting with one priority.

    Attributes:
        flows: by caller. One with nothing waiting is known for as long as it is ahead of its share.
        held: entries of all flows.
        virtual: virtual time, at which new callers begin: the start of what was taken last.
        served: the tokens that it had while others were on a par with it.
    """

    __slots__ = ("flows", "held", "priority", "served", "virtual")

    def __init__(self, priority: Priority) -> None:
        self.priority, self.held = priority, 0
        self.forget()

    def forget(self) -> None:
        """Begin anew; nothing may be waiting."""
        self.flows: dict[str, _Flow[E]] = {}
        self.virtual, self.served = 0.0, 0

    def push(self, entry: E) -> None:
        call = entry.call
        flow = self.flows.get(call.caller)
        if flow is None:
            flow = self.flows[call.caller] = _Flow(self.virtual)
        elif not flow.entries:
            flow.start = max(flow.start, self.virtual)
        flow.weight = call.weight
        flow.entries.append(entry)
        self.held += 1

    def charge(self, flow: _Flow[E], length: int, weights: float) -> None:
        """Count what was taken of a flow while flows of these weights in all were waiting."""
        # Time goes on even if none but ever new callers are served, who all begin at this time.
        self.virtual = max(self.virtual + _CREEP * length / weights, flow.start)
        flow.start += length / flow.weight

    def drop_gone(self, flow: _Flow[E]) -> None:
        """Remove the entries that are gone from the front of a flow."""
        entries = flow.entries
        while entries and entries[0].reply.done():
            entries.popleft()
            self.held -= 1


class _Turns(Generic[E]):
    """Whose turn it is in a class, for the length of one take.

    Attributes:
        queue: a heap of the flows, by the virtual start of their first entries.
        weights: of all of them.
        oldest: when the entry that has waited longest came.
        level: the priority with which the class competes.
        shares: whether another class is on a par with it.
        served: as the class's, with what was taken since.
    """

    __slots__ = ("level", "of", "oldest", "queue", "served", "shares", "weights")

    def __init__(self, of: _Class[E]) -> None:
        self.of, self.level, self.served, self.shares = of, int(of.priority), of.served, False
        self.queue: list[tuple[float, float, int, _Flow[E]]] = []
        self.oldest, self.weights = float("inf"), 0.0
        idle: list[str] = []
        for place, (caller, flow) in enumerate(of.flows.items()):
            of.drop_gone(flow)
            if flow.entries:
                since = flow.entries[0].since
                if since < self.oldest:
                    self.oldest = since
                self.weights += flow.weight
                self.queue.append((flow.start, since, place, flow))
            elif flow.start <= of.virtual:
                idle.append(caller)
        for caller in idle:
            del of.flows[caller]
        heapify(self.queue)

    def next(self) -> tuple[_Flow[E], E]:
        """Remove the next entry; it and whose it is."""
        start, _, place, flow = self.queue[0]
        entry = flow.entries.popleft()
        self.of.held -= 1
        self.served += entry.length
        self.of.drop_gone(flow)
        if flow.entries:
            finish = start + entry.length / flow.weight
            heapreplace(self.queue, (finish, flow.entries[0].since, place, flow))
        else:
            heappop(self.queue)
        return flow, entry


class FairQueue(Generic[E]):
    """Entries in fair order.

    A class of priority goes before the lower ones. For each `aging` seconds that its oldest entry
    has waited, a class competes as the next higher one; classes on a par get equally many tokens.
    Within a class callers get tokens by weight, and what one caller has waiting stays in order. So
    with one class and one caller it is first come, first served.

    Args:
        aging: seconds that a class is worth.
    """

    def __init__(self, aging: float = 1.0) -> None:
        self._aging = aging
        self._classes: list[_Class[E]] = [_Class(priority) for priority in Priority]
        self._taken: list[tuple[_Turns[E], _Flow[E], int, int]] = []
        """Of what the latest take gave: whose it was, its length, and its id, which unlike itself
        keeps nothing alive."""

    def __len__(self) -> int:
        """How many are waiting, with those that are gone and weren't met yet."""
        high, normal, low = self._classes
        return high.held + normal.held + low.held

    def __iter__(self) -> Iterator[E]:
        """All that `len` counts; what one caller has in one class in order."""
        for each in self._classes:
            for flow in each.flows.values():
                yield from flow.entries

    def push(self, entry: E) -> None:
        """Add an entry behind the others of its caller and class."""
        into = self._classes[entry.call.priority]
        if self._taken or not into.held:
            self._settle()
        into.push(entry)

    def take(self, count: int, now: float) -> list[E]:
        """Remove the next entries; none that is gone.

        Args:
            count: most of them.
            now: the clock, in seconds.

        Returns:
            In fair order.
        """
        self._settle()
        waiting = [turns for each in self._classes if each.flows if (turns := _Turns(each)).queue]
        if len(waiting) > 1:
            self._set_levels(waiting, now)
        taken: list[E] = []
        while waiting and len(taken) < count:
            turns = waiting[0]
            if len(waiting) > 1:
                turns = min(waiting, key=lambda turns: (turns.level, turns.served))
            flow, entry = turns.next()
            taken.append(entry)
            self._taken.append((turns, flow, entry.length, id(entry)))
            if not turns.queue:
                waiting.remove(turns)
        return taken

    def put_back(self, entries: Sequence[E]) -> None:
        """Undo the taking of some entries: they have their old places again.

        Args:
            entries: of those that the latest `take` gave; nothing was pushed since.

        Raises:
            ValueError: they are others.
        """
        back = {id(entry): entry for entry in entries}
        kept = [each for each in self._taken if each[3] not in back]
        if len(kept) + len(back) != len(self._taken):
            raise ValueError("only what the latest take gave can be put back")
        for turns, flow, _, name in reversed(self._taken):
            if name in back:
                flow.entries.appendleft(back[name])
                turns.of.held += 1
        self._taken = kept

    def ahead(self, call: Call) -> int:
        """About how many entries would go before a new one of this call's caller and class.

        As if all cost the same, and none had waited long enough to compete as more urgent.
        """
        each = self._classes[call.priority]
        own = each.flows.get(call.caller)
        before = len(own.entries) if own else 0
        # By its turn the others have had as many, by weight, unless they have less waiting.
        turns = (before + 1) / call.weight
        if len(each.flows) > _MANY:
            before = int(min(before + turns * len(each.flows), each.held))
        else:
            for flow in each.flows.values():
                if flow is not own:
                    before += int(min(len(flow.entries), turns * flow.weight))
        return before + sum(higher.held for higher in self._classes[: call.priority])

    def evict(self, call: Call, count: int = 1) -> E | None:
        """Make room for one of the new entries of this call's caller and class, if that is fair.

        What gives way is the newest entry of the caller with the most waiting for its weight: in
        the lowest class, if that is lower than the newcomer's; else in the newcomer's, and only if
        that caller still has no less than the newcomer's will have. So a greedy caller displaces
        nobody in its own class, and no two displace each other in turn.

        Args:
            call: the newcomer.
            count: new entries that come together.

        Returns:
            What gave way, removed; it isn't gone. None: the newcomer is to be refused.
        """
        for each in reversed(self._classes[call.priority :]):
            least = 0.0
            if each.priority == call.priority:
                own = each.flows.get(call.caller)
                least = ((len(own.entries) if own else 0) + count) / call.weight
            while each.held:
                flow = max(each.flows.values(), key=_held_by_weight)
                if _held_by_weight(flow) <= least:
                    break
                entry = flow.entries.pop()
                each.held -= 1
                if not entry.reply.done():
                    return entry
        return None

    def _settle(self) -> None:
        """Charge for what was taken and not put back."""
        for turns, flow, length, _ in self._taken:
            turns.of.charge(flow, length, turns.weights)
            if turns.shares:
                turns.of.served += length
        self._taken = []
        if not len(self):
            for each in self._classes:
                each.forget()

    def _set_levels(self, waiting: Sequence[_Turns[E]], now: float) -> None:
        """Say with which priority each class competes."""
        for turns in waiting:
            turns.level = max(0, turns.of.priority - int((now - turns.oldest) / self._aging))
        level = min(turns.level for turns in waiting)
        competing = [turns for turns in waiting if turns.level == level]
        for turns in competing:
            turns.shares = len(competing) > 1
        # A class that doesn't compete saves nothing up for when it does.
        least = min(turns.served for turns in competing)
        for each in self._classes:
            if all(turns.of is not each for turns in competing):
                each.served = max(each.served, least)
        for turns in waiting:
            turns.served = turns.of.served


def _held_by_weight(flow: _Flow[E]) -> float:
    return len(flow.entries) / flow.weight
