"""Small rewordings by fixed rules, under which a prompt asks for the same."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bestroute.policy import trade_off
from bestroute_export.evaluate import Choice
from bestroute_export.evaluation.study import Study
from bestroute_export.outcomes import Outcomes, costs
from bestroute_export.values import fit, predictions_of

SYNONYMS = {
    "answer": "reply",
    "calculate": "compute",
    "choose": "select",
    "compute": "calculate",
    "determine": "find",
    "find": "determine",
    "following": "below",
    "give": "provide",
    "problem": "exercise",
    "provide": "give",
    "question": "query",
    "return": "output",
    "select": "choose",
    "solve": "work out",
    "task": "job",
}
"""Words of instructions, each with one that would do as well."""

_WORD = re.compile(r"\b(" + "|".join(SYNONYMS) + r")\b", re.IGNORECASE)


def _synonym(found: re.Match[str]) -> str:
    word = SYNONYMS[found[0].lower()]
    return word.capitalize() if found[0][0].isupper() else word


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


REWORDINGS: Mapping[str, Callable[[str], str]] = {
    '"Please" in front': lambda text: f"Please {_lower_first(text)}",
    "a polite sentence in front": lambda text: f"Hello! Could you help me with this? {text}",
    '"Thank you." at the end': lambda text: f"{text} Thank you.",
    "a line break at the end": lambda text: f"{text}\n",
    "white space folded": lambda text: " ".join(text.split()),
    "no question marks": lambda text: text.replace("?", "."),
    "everything in small letters": str.lower,
    "synonyms of words of instruction": lambda text: _WORD.sub(_synonym, text),
}
"""Rewordings by description."""


def stability(study: Study, measured: Outcomes, rate: float) -> dict[str, float]:
    """How many decisions a rewording leaves as they are.

    On the prompts of the first fold, by a router fitted to the others.

    Args:
        study: the experiment.
        measured: what the arms gave.
        rate: quality per USD.

    Returns:
        Share by description of the rewording.
    """
    rest, held = np.flatnonzero(study.folds != 0), np.flatnonzero(study.folds == 0)
    inputs = [study.inputs[row] for row in rest]
    network = fit(inputs, measured.take(rest.tolist()), study.pool, study.folds[rest])
    texts = [study.prompts[row].text for row in held]

    def decided(texts: Sequence[str]) -> Choice:
        asked = [study.tokenizer.prompt(text) for text in texts]
        said = predictions_of(network, asked, len(study.pool.arms))
        lengths = np.array([row.prompt_tokens for row in asked], dtype=np.float64)
        estimates = costs(study.pool, lengths, said.tokens)
        return trade_off(said.gains, *estimates, rate)

    before = decided(texts)
    return {
        name: float((decided([reword(text) for text in texts]) == before).mean())
        for name, reword in REWORDINGS.items()
    }
