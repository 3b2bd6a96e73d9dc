"""What an answer says of itself while it passes: its end, its tokens. Pure; does no I/O."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bestroute.upstream.completion import Completion, Ended, Finished
from bestroute.upstream.failures import CallFailed, Reason, clean
from bestroute.upstream.usage import Usage, estimated_tokens, reported_usage, shares

_NO_WORDS = frozenset(("id", "type", "data", "url"))
"""Members that an answer's length has nothing to do with: a sound or a picture is long anyway."""


class Heard(Completion):
    """What a relayed answer says of itself; unlike other completions it need not have a text.

    Args:
        candidates: the index that each of its choices goes by.
        prompt_characters: length of the prompt's texts.
        max_characters: most that an answer may have.
    """

    needs_text = False

    def __init__(
        self, candidates: Sequence[int], prompt_characters: int, max_characters: int
    ) -> None:
        super().__init__(candidates, prompt_characters, max_characters)
        self._touched = False

    @property
    def untouched(self) -> bool:
        """Whether nothing has come yet of any answer: text, reasoning, the use of a tool."""
        return not self._touched

    def hear(self, chunk: Any) -> tuple[bool, bool]:
        """Take in what passes; tells whether it has the final usage, and nothing else.

        Raises:
            CallFailed: it is an error, or too long an answer.
        """
        if not isinstance(chunk, dict):
            return False, False
        self._raise_error(chunk)
        found = chunk.get("choices")
        choices = (
            [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
        )
        for choice in choices:
            for _ in self._add(choice, choice.get("delta") or choice.get("message")):
                pass
        usage = chunk.get("usage")
        if not isinstance(usage, dict):
            return False, False
        self._running_total = usage
        return not choices or self.finished, not choices

    def ends(self) -> Sequence[Ended]:
        """The last word on every choice, if nothing else comes."""
        return list(self.end(None, self.spent, ""))

    def _add(self, choice: dict[str, Any], delta: object) -> Iterator[Finished]:
        index = choice.get("index") or 0
        known = type(index) is int and 0 <= index < len(self._answers)
        answer = self._answers[index if known else 0]
        if isinstance(delta, dict):
            self._touched = self._touched or any(v for k, v in delta.items() if k != "role")
            if isinstance(text := delta.get("content"), str) and text:
                answer.pieces.append(clean(text))
            answer.characters += _characters(delta)
            if answer.characters > self._max_characters:
                raise CallFailed(
                    Reason.TOO_LONG,
                    f"an answer of more than {self._max_characters} characters",
                    faulty=False,
                )
        if isinstance(reason := choice.get("finish_reason"), str) and reason:
            self._touched = True
            answer.finish_reason = answer.finish_reason or clean(reason[:50])
        return iter(())

    def usages(self) -> list[Usage]:
        """Per answer what it used: what the provider has said last, else estimated."""
        if not self.accepted:
            return [Usage() for _ in self._answers]
        weights = [estimated_tokens(answer.characters) for answer in self._answers]
        # It isn't held against the texts: tools, pictures and sounds have tokens as well.
        said = reported_usage([self._running_total], 1)
        if said is None:
            said, outputs = Usage(estimated_tokens(self._prompt_characters), 0, True), weights
        else:
            outputs = shares(said.output_tokens, weights)
        first, *others = outputs
        return [
            replace(said, output_tokens=first),
            *(Usage(0, tokens, said.estimated) for tokens in others),
        ]

    def complete(self) -> None:
        """The provider says that this is all, whether or not each answer has said so itself."""
        for answer in self._answers:
            answer.finish_reason = answer.finish_reason or "stop"


def _characters(delta: Mapping[str, Any]) -> int:
    """Of all that an answer's tokens are spent on."""
    total = 0
    for key, value in delta.items():
        if key == "role":
            continue
        if isinstance(value, str):
            total += len(value)
        elif value and isinstance(value, list | dict):
            total += sum(map(len, _strings(value)))
    return total


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in _NO_WORDS:
                yield from _strings(each)
