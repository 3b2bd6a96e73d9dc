"""What was lately found for a text, so that the same text is not read twice."""

import hashlib
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")
_SIZE = 16


class Recent(Generic[Value]):
    """The values of the texts asked for last. Exact: a text's value never changes.

    Texts are kept as digests (BLAKE2b, 16 bytes): short, and not to be read out of memory.

    Args:
        entries: most that are kept; the one not asked for the longest goes first. 0 keeps none.

    Attributes:
        hits: texts found.
        misses: texts not found.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._values: OrderedDict[bytes, Value] = OrderedDict()
        self.hits = self.misses = 0

    @staticmethod
    def key(text: str, *more: str) -> bytes:
        """What stands for a text, or for several in their order."""
        key = _digest(text)
        if not more:
            return key
        # Each by its own digest: joined, others that are divided otherwise might read the same.
        digests = b"".join((key, *map(_digest, more)))
        return hashlib.blake2b(digests, digest_size=_SIZE, person=b"several").digest()

    def get(self, key: bytes) -> Value | None:
        """The value, which counts as asked for now; None if there is none."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
            return None
        self._values.move_to_end(key)
        self.hits += 1
        return value

    def put(self, key: bytes, value: Value) -> None:
        """Keep a value."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._entries:
            self._values.popitem(last=False)

    def __len__(self) -> int:
        return len(self._values)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).digest()
