"""What callers may have: a rate of requests, and what their answers may cost. In memory."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Self

from bestroute.addresses import machine
from bestroute.config import CallerLimits
from bestroute.errors import Overloaded, SpendLimitReached

_DAY = 86_400.0

_MOST_ACCOUNTS = 10_000
"""Of callers without a section of their own; whoever has not called for longest is forgotten."""


class Account:
    """What one caller has had. Times are given, so that nothing here waits or looks at a clock.

    The rate is GCRA (the leaky bucket as a meter, ITU-T I.371): `_due` is when the caller would be
    owed nothing more had it called evenly, and may be at most `burst` requests ahead of now.

    Args:
        limits: what the caller may have.

    Attributes:
        spent: USD since midnight UTC of the day last asked about.
    """

    __slots__ = ("_ahead", "_day", "_due", "_interval", "limits", "spent")

    def __init__(self, limits: CallerLimits) -> None:
        self._day = 0.0
        self.spent = 0.0
        self.limit(limits)

    def limit(self, limits: CallerLimits) -> None:
        """Have these limits hold from now on; nothing is owed by the former rate."""
        self.limits = limits
        self._due = 0.0
        rate = limits.requests_per_second
        self._interval = 1 / rate if rate else 0.0
        burst = limits.burst or max(1.0, rate or 0.0)
        self._ahead = (burst - 1) * self._interval

    def wait(self, now: float) -> float:
        """Count a request, if it may be made now.

        Args:
            now: seconds of a clock that never goes back.

        Returns:
            0, or the seconds after which to try again; then nothing was counted.
        """
        due = max(self._due, now)
        if due - now > self._ahead + 1e-9:
            return due - now - self._ahead
        self._due = due + self._interval
        return 0.0

    def left(self, now: float) -> float:
        """USD that may still be spent today.

        Args:
            now: seconds since the epoch.
        """
        day = now // _DAY
        if day != self._day:
            self._day, self.spent = day, 0.0
        limit = self.limits.usd_per_day
        return float("inf") if limit is None else limit - self.spent

    def spend(self, usd: float, now: float) -> None:
        """Count what was spent; below 0: what was counted too much."""
        self.left(now)
        self.spent = max(0.0, self.spent + usd)


class Bill:
    """What one Generate costs its caller, while it is under way.

    At first that is what it was estimated to cost, so that many at once can't spend what each
    finds left; at its end, what it did cost. Where the caller leaves, what its LLMs will bill is
    not known: then it is the larger of the two.

    Args:
        account: the caller's; None: it may spend what it likes.
    """

    __slots__ = ("_account", "_charged", "_real")

    def __init__(self, account: Account | None) -> None:
        self._account = account
        self._charged = self._real = 0.0

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            SpendLimitReached: nothing is left to be spent today.
        """
        self._check(0.0)
        return self

    def expect(self, usd: float) -> None:
        """It will cost about this much.

        Raises:
            SpendLimitReached: that is more than is left today.
        """
        self._check(usd)
        self._charge(usd)

    def add(self, usd: float) -> None:
        """A part of it did cost this much."""
        self._real += usd
        self._charge(max(self._charged, self._real))

    def total(self, usd: float) -> None:
        """All of it did cost this much, and no less than its parts."""
        self._real = max(usd, self._real)
        self._charge(self._real)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # not CancelledError, not GeneratorExit
            self._charge(self._real)

    def _check(self, usd: float) -> None:
        if self._account is None:
            return
        now = time.time()
        left = self._account.left(now)
        if left <= 0 or usd > left:
            limit = self._account.limits.usd_per_day
            raise SpendLimitReached(
                f"this caller may spend ${limit:g} a day, of which ${max(0.0, left):.3g} are left; "
                "the next day begins at midnight UTC",
                _DAY - now % _DAY,
            )

    def _charge(self, usd: float) -> None:
        if self._account is not None:
            self._account.spend(usd - self._charged, time.time())
        self._charged = usd


class Allowances:
    """The accounts of all callers.

    Args:
        limits: by a caller's name; "default" holds for each of all others.
    """

    def __init__(self, limits: Mapping[str, CallerLimits]) -> None:
        self._named: dict[str, Account] = {}
        self._others: OrderedDict[str, Account] = OrderedDict()
        self.limit(limits)

    def limit(self, limits: Mapping[str, CallerLimits]) -> None:
        """Have other limits hold from now on; accounts are kept."""
        self._default = limits.get("default", CallerLimits())
        for name in self._named.keys() - limits.keys():
            self._others[machine(name)] = self._named.pop(name)
        for account in self._others.values():
            if account.limits != self._default:
                account.limit(self._default)
        for name, own in limits.items():
            if name != "default":
                known = self._named.get(name) or self._others.pop(machine(name), None)
                self._named[name] = account = known or Account(own)
                if account.limits != own:
                    account.limit(own)
        self._rated = any(own.requests_per_second for own in limits.values())
        self._billed = any(own.usd_per_day is not None for own in limits.values())

    def request(self, caller: str) -> None:
        """Count a request.

        Raises:
            Overloaded: the caller is over its rate.
        """
        if not self._rated:
            return
        account = self._account(caller)
        if wait := account.wait(time.monotonic()):
            rate = account.limits.requests_per_second
            raise Overloaded(
                f"this caller may make {rate:g} requests per second; try again in {wait:.3g} s",
                wait,
            )

    def bill(self, caller: str) -> Bill:
        """What a Generate of a caller is charged to; enter it."""
        return Bill(self._account(caller) if self._billed else None)

    def _account(self, caller: str) -> Account:
        if account := self._named.get(caller):
            return account
        key = machine(caller)  # another connection is no other allowance
        if (account := self._others.get(key)) is None:
            account = self._others[key] = Account(self._default)
            if len(self._others) > _MOST_ACCOUNTS:
                self._others.popitem(last=False)
        else:
            self._others.move_to_end(key)
        return account
