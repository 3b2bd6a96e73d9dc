"""What has been collected and what is missing: prompts on one side, the journal on the other."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bestroute_export.gather.journal import Entry, Journal
from bestroute_export.gather.prompts import Fields, key_of, read_prompts

STOPPED = "stopped"
"""Key of an entry that says why something is no longer asked; shown, and not kept."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt, and how many answers it still lacks.

    Attributes:
        key: of the prompt in the journal.
        prompt: its text.
        missing: number of answers by model; models that lack none are left out.
    """

    key: str
    prompt: str
    missing: dict[str, int]


class Collection:
    """Answers of several models to the prompts of a file.

    Args:
        prompts: the file; see `prompts.read_prompts`.
        journal: holds the answers, and the failures that cost money.
        models: whose answers are wanted.
        samples: answers wanted per prompt and model.

    Attributes:
        spent: what everything in the journal did cost, in USD, failures included. What was under
            way when a process was killed is not in it.
        failures: by model, how many calls failed in this run.
        words: by model, what was said about the last of them.
        notes: why something was no longer asked in this run.

    Raises:
        DataError: the file can't be used, or the journal can't.
    """

    def __init__(
        self, prompts: Path, journal: Journal, models: Sequence[str], samples: int
    ) -> None:
        self._prompts, self._journal = prompts, journal
        self._models, self._samples = tuple(models), samples
        self._places: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        self.spent = 0.0
        self.failures: Counter[str] = Counter()
        self.words: dict[str, str] = {}
        self.notes: list[str] = []
        for place, entry in journal.entries():
            self._index(place, entry)
        self._keys = [_key(row) for row in read_prompts(prompts)]

    def record(self, entry: Entry) -> None:
        """Keep what a collector has to say."""
        if STOPPED in entry:
            self.notes.append(entry[STOPPED])
            return
        self._index(self._journal.append(entry), entry)
        if "error" in entry:
            self.failures[entry["model"]] += 1
            self.words[entry["model"]] = entry["error"]

    def wanted(self) -> Iterator[Wanted]:
        """What is missing now, in the order of the file."""
        for row in read_prompts(self._prompts):
            key = _key(row)
            lacking = {model: self._samples - self._count(key, model) for model in self._models}
            missing = {model: count for model, count in lacking.items() if count}
            if missing:
                yield Wanted(key, row["prompt"], missing)

    def done(self) -> dict[str, int]:
        """By model, how many of the wanted answers are there."""
        return {m: sum(self._count(key, m) for key in self._keys) for m in self._models}

    @property
    def wanted_per_model(self) -> int:
        """How many answers each model is to give in all."""
        return len(self._keys) * self._samples

    def rows(self) -> Iterator[Fields]:
        """The rows of the file with the answers there are; other models' are kept as they came."""
        for row in read_prompts(self._prompts):
            key = _key(row)
            drawn = {model: self._answers(key, model) for model in self._models}
            answered = {model: answers for model, answers in drawn.items() if answers}
            yield {**row, "responses": {**row["responses"], **answered}}

    def _count(self, key: str, model: str) -> int:
        return min(len(self._places.get((key, model), ())), self._samples)

    def _answers(self, key: str, model: str) -> list[Fields]:
        answers = []
        for place in self._places.get((key, model), ())[: self._samples]:
            entry = self._journal.read(place)
            answers.append({"text": entry.pop("text"), "score": None} | _without_key(entry))
        return answers

    def _index(self, place: int, entry: Entry) -> None:
        self.spent += entry["cost_usd"] or 0.0
        if "error" not in entry:
            self._places[entry["key"], entry["model"]].append(place)


def _key(row: Fields) -> str:
    return key_of(row["id"], row["prompt"])


def _without_key(entry: Entry) -> Fields:
    return {name: value for name, value in entry.items() if name not in ("key", "model")}
