"""What a row of a data file holds, and how one departs from it; docs/data.md is the long form."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)

# pydantic reads typing's own TypedDict from Python 3.12 on only.
from typing_extensions import TypedDict

# Strict: "0.5" is no number and true is no score. Other fields than these are kept.
_CONFIG = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_Name = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=0)]


def _whole(text: str) -> str:
    """The text, unless it holds half of a surrogate pair, as JSON can: no tokenizer takes that."""
    if not text.isascii():
        text.encode()
    return text


_Text = Annotated[str, AfterValidator(_whole)]
_Split = Literal["train", "validation", "test"]


@with_config(_CONFIG)
class AnswerRow(TypedDict):
    """One sampled answer."""

    text: _Text
    score: NotRequired[Annotated[float, Field(ge=0, le=1)] | None]
    tokens: _Count
    input_tokens: NotRequired[_Count | None]
    cost_usd: NotRequired[Annotated[float, Field(ge=0)] | None]
    finish_reason: NotRequired[str | None]
    reward: NotRequired[float | None]


@with_config(_CONFIG)
class PromptRow(TypedDict):
    """A prompt and what each LLM answered."""

    id: _Name
    prompt: _Name
    split: NotRequired[_Split | None]
    task: NotRequired[str | None]
    task_split: NotRequired[str | None]
    responses: dict[_Name, Annotated[list[AnswerRow], Field(min_length=1)]]


@with_config(_CONFIG)
class PairRow(TypedDict):
    """A better and a worse answer to the same prompt."""

    pid: _Name
    prompt: _Name
    chosen: _Text
    rejected: _Text
    split: NotRequired[_Split | None]


@with_config(_CONFIG)
class PriceRow(TypedDict):
    """List prices in USD per million tokens."""

    input_per_mtok: Annotated[float, Field(ge=0)]
    output_per_mtok: Annotated[float, Field(ge=0)]


class Fault(NamedTuple):
    """One departure from the schema.

    Attributes:
        field: name of the field it is in; "" if the row as a whole is something else.
        message: where in the row, what is there, and what to write instead.
    """

    field: str
    message: str


class RowInvalid(ValueError):
    """A row departs from the schema.

    Attributes:
        faults: all of its departures, at least one.
    """

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults


def prompt_row(value: object) -> PromptRow:
    """Check a row of a file of prompts.

    Raises:
        RowInvalid: it departs from the schema.
    """
    return _checked(_PROMPT, value)


def pair_row(value: object) -> PairRow:
    """Check a row of a file of pairs.

    Raises:
        RowInvalid: it departs from the schema.
    """
    return _checked(_PAIR, value)


def price_table(value: object) -> dict[str, PriceRow]:
    """Check a table of prices by LLM.

    Raises:
        RowInvalid: it departs from the schema.
    """
    return _checked(_PRICES, value)


T = TypeVar("T")

_PROMPT = TypeAdapter(PromptRow)
_PAIR = TypeAdapter(PairRow)
_PRICES = TypeAdapter(dict[str, PriceRow])

_EXPECTED: Mapping[str, str] = {
    "id": "a string that no other row has",
    "pid": "the id of the prompt",
    "prompt": "the text that is sent to the LLMs",
    "split": '"train", "validation" or "test", or leave it out for a split by the prompt\'s text',
    "task": "the name of the prompt's task, or leave it out",
    "task_split": '"heldout" for a task that is kept from training, or leave it out',
    "responses": 'answers by LLM: {"LLM": [{"text": ..., "score": ..., "tokens": ...}, ...]}',
    "text": "the answer as a string of valid Unicode",
    "score": "a number from 0 to 1, or null while the answer is not graded",
    "tokens": "how many tokens the answer has, as a whole number",
    "input_tokens": "how many tokens the prompt has, as a whole number, or leave it out",
    "cost_usd": "what the answer cost in USD, 0 or more, or leave it out",
    "finish_reason": 'why the answer ends, such as "stop" or "length", or leave it out',
    "reward": "a finite number, or leave it out",
    "chosen": "the better answer as a string of valid Unicode",
    "rejected": "the worse answer as a string of valid Unicode",
    "input_per_mtok": "USD per million input tokens, 0 or more",
    "output_per_mtok": "USD per million output tokens, 0 or more",
}
_SHOWN = 40
"""Characters of a wrong value in a message."""


def _checked(adapter: TypeAdapter[T], value: object) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        faults = [_fault(detail["loc"], detail) for detail in error.errors(include_url=False)]
        raise RowInvalid(faults) from error


def _fault(place: tuple[int | str, ...], detail: Mapping[str, Any]) -> Fault:
    named = [part for part in place if part in _EXPECTED]
    field = str(named[-1]) if named else ""
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    if detail["type"] == "missing":
        return Fault(field, f"{path} is missing: write {_EXPECTED[field]}")
    shown = repr(detail["input"])
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    expected = _EXPECTED.get(field, "an object with the fields that docs/data.md describes")
    return Fault(field, f"{path or 'the row'} is {shown}: write {expected}")
