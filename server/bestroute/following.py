"""One turn of a session: what is known before it is decided, and what is remembered of it. Pure."""

from bestroute.manifest import Manifest
from bestroute.prompt import Prompt
from bestroute.session import Former, Hold, Past, Reason, Row, Standing, Turn, eased, reason


class Following:
    """A turn of a session, which follows on what was decided before.

    Args:
        prompt: the conversation up to this turn.
        standing: where the session stands.
        manifest: of the bundle that decides.

    Attributes:
        row: what to decide by without asking the router, float32 [K]: in a turn of tools what the
            user's turn was decided by; None: it has to be asked.
    """

    def __init__(self, prompt: Prompt, standing: Standing, manifest: Manifest) -> None:
        past = standing.past
        self._standing, self._manifest = standing, manifest
        # Hashes of Python's are keyed anew in each process, as sessions are kept by each process.
        self._read, self._question = hash(prompt.turns.read), hash(prompt.question)
        self._hold = Hold.NOTHING
        self._remembered: Row | None = None
        if past is not None:
            self._remembered = past.predicted(manifest.version, manifest.router_outputs)
            self._hold = Hold.MODEL if standing.sticky else Hold.NOTHING
            # Not only what was read has to be known but the question: an agent may shorten the
            # turns before it under way, or bring tools' results along with a new question.
            if prompt.after_tools and past.question == self._question:
                self._hold = Hold.ARM
        self.row = self._remembered if self._hold is Hold.ARM else None
        self._decided_by = self.row

    def ease(self, row: Row) -> Row:
        """What to decide by where the router has been asked and gives a row, float32 [K]."""
        past, remembered = self._standing.past, self._remembered
        if past is not None and remembered is not None:
            if past.read == self._read:  # asked again: the turn has counted
                row = remembered
            else:
                manifest = self._manifest
                worth = len(manifest.arms) * (2 if manifest.trade_offs else 1)
                row = eased(row, remembered, self._standing.momentum, worth)
        self._decided_by = row
        return row

    def former(self, prompt_tokens: int) -> Former | None:
        """What ran the turn before, for a decision about a prompt of so many tokens."""
        past = self._standing.past
        if past is None:
            return None
        return Former(past.model, past.samples, self._cached(prompt_tokens), self._hold)

    def turn(
        self, model: str, prompt_tokens: int, *, may_stay: bool, fell_back: bool, requested: bool
    ) -> Turn:
        """What the session did to a decision.

        Args:
            model: that was chosen.
            prompt_tokens: of the whole conversation.
            may_stay: whether the former model might have been chosen.
            fell_back: whether the router model failed, so that the reference answers.
            requested: whether the request named the arm.
        """
        past, hold = self._standing.past, self._hold
        if past is None:
            return Turn(1, None, False, Reason.NEW, 0)
        why = (
            Reason.REQUESTED
            if requested
            else reason(past, model, hold, may_stay=may_stay, fell_back=fell_back)
        )
        changed, cached = model != past.model, self._cached(prompt_tokens)
        return Turn(past.turns + 1, past.model, changed, why, cached)

    def past(self, model: str, samples: int, prompt_tokens: int) -> Past:
        """As what the session is to be remembered once so many samples of a model have run."""
        former, version = self._standing.past, self._manifest.version
        row, read = b"", 0
        if self._decided_by is not None:
            row, read = self._decided_by.tobytes(), self._read
        elif former is not None and former.bundle == version:
            row, read = former.row, former.read  # this turn was not read, and may yet be
        turns = 1 if former is None else former.turns + 1
        return Past(turns, model, samples, prompt_tokens, version, read, self._question, row)

    def _cached(self, prompt_tokens: int) -> int:
        return min(self._standing.cached_tokens, prompt_tokens)
