"""What a caller asks: a conversation, the text of it, and the turns that a decision depends on."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")

_INSTRUCTING = ("system", "developer")


@dataclass(frozen=True)
class Message:
    """One turn: a role out of `ROLES` and what is said."""

    role: str
    content: str


class Turns(NamedTuple):
    """A conversation as the router takes it: what is asked, with what leads up to it.

    How hard a turn is shows in what the user asks. What the model and its tools say after that is
    not read, so that a turn of tools is decided as the user's turn that it belongs to: the same
    texts, the same predictions, and no second run of the network.

    Attributes:
        instructions: what system and developer say before the question.
        earlier: the other turns before the question, oldest first.
        question: the user's last turn.
        after: what was said since.
    """

    instructions: tuple[str, ...]
    earlier: tuple[str, ...]
    question: str
    after: tuple[str, ...]

    @property
    def read(self) -> tuple[str, ...]:
        """All that a decision depends on."""
        return (*self.instructions, *self.earlier, self.question)


@dataclass(frozen=True)
class Prompt:
    """A conversation, oldest turn first; at least one message."""

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, text: str) -> "Prompt":
        """A single user turn."""
        return cls((Message("user", text),))

    @cached_property
    def text(self) -> str:
        """The whole of it, as the reward model reads it and as LLMs bill it.

        A single turn is read as it is, which is how the networks were trained. Of several, each is
        marked with its role; cutting from the middle then keeps the instructions and the last
        question.
        """
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(map(_marked, self.messages))

    @cached_property
    def turns(self) -> Turns:
        """The same as the router takes it; marked like `text`, but for a question that is all."""
        last = self._last
        before, question, after = (
            self.messages[:last],
            self.messages[last],
            self.messages[last + 1 :],
        )
        return Turns(
            tuple(_marked(turn) for turn in before if turn.role in _INSTRUCTING),
            tuple(_marked(turn) for turn in before if turn.role not in _INSTRUCTING),
            _marked(question) if before else question.content,
            tuple(map(_marked, after)),
        )

    @property
    def asked(self) -> str | Turns:
        """What the router reads: a single turn's text, or the turns of a conversation."""
        return self.messages[0].content if len(self.messages) == 1 else self.turns

    @property
    def question(self) -> str:
        """What the user asks in the last turn, without its mark."""
        return self.messages[self._last].content

    @property
    def after_tools(self) -> bool:
        """Whether tools spoke last, so that the model goes on with what it has begun."""
        return self.messages[-1].role == "tool"

    @cached_property
    def _last(self) -> int:
        """Which turn is the question.

        Where no user speaks, it is the last that is neither the model's nor a tool's; where nobody
        else speaks, the last of all.
        """
        roles = [message.role for message in self.messages]
        for wanted in (("user",), _INSTRUCTING):
            for index in reversed(range(len(roles))):
                if roles[index] in wanted:
                    return index
        return len(roles) - 1


def _marked(message: Message) -> str:
    return f"{message.role}: {message.content}"
