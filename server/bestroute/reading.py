"""What the router network makes of a conversation, which may be remembered."""

from bestroute.call import Call
from bestroute.following import Following
from bestroute.prompt import Prompt, Turns
from bestroute.recent import Recent
from bestroute.text_model import Reading, TextModel, Timing

_REMEMBERED = Timing(0.0, 0.0, 0.0, 0)


class Reader:
    """Has prompts read.

    Args:
        model: the router network.
        entries: readings that are remembered, those asked for last.

    Attributes:
        recent: what is remembered.
    """

    def __init__(self, model: TextModel, entries: int) -> None:
        self._model = model
        self.recent = Recent[Reading](entries)

    async def read(self, prompt: Prompt, call: Call) -> tuple[Reading, Timing]:
        """The router model's output for a prompt, which may be remembered.

        Raises:
            Exception: as `TextModel.prompt`.
        """
        asked = prompt.asked
        key = Recent.key(asked) if isinstance(asked, str) else Recent.key(*asked.read)
        reading, timing = self.recent.get(key), _REMEMBERED
        if reading is None:
            reading, timing = await self._model.prompt(asked, call)
            self.recent.put(key, reading)
        if not isinstance(asked, str):
            more = await self._tokens_after(asked)
            reading = reading._replace(prompt_tokens=reading.prompt_tokens + more)
        return reading, timing

    async def read_on(
        self, prompt: Prompt, call: Call, follow: Following
    ) -> tuple[Reading, Timing]:
        """As `read`, in the light of what the session's turns before were like."""
        if follow.row is not None:
            asked = prompt.turns
            known = self.recent.get(Recent.key(*asked.read))
            read = known or await self._model.encode(asked)
            tokens = read.prompt_tokens + await self._tokens_after(asked)
            return Reading(follow.row, tokens, read.truncated), _REMEMBERED
        reading, timing = await self.read(prompt, call)
        return reading._replace(row=follow.ease(reading.row)), timing

    async def _tokens_after(self, turns: Turns) -> int:
        """Tokens that are not read but paid for: what was said after the question."""
        if not turns.after:
            return 0
        return (await self._model.encode("\n\n".join(turns.after))).prompt_tokens
