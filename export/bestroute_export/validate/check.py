"""Checks of a whole file: a typed report of its problems and of what it can train."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bestroute_export.data import Price
from bestroute_export.rows import Row, read_rows
from bestroute_export.schema import AnswerRow, RowInvalid, pair_row, prompt_row
from bestroute_export.validate.findings import Findings, Problem
from bestroute_export.validate.repeats import Repeats
from bestroute_export.validate.tally import Model, Resolution, Tally
from bestroute_export.validate.verdicts import Verdict, verdicts

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Report:
    """What a file holds.

    Attributes:
        rows: how many rows it has.
        sound: how many of them have the fields of docs/data.md; all below counts only these.
        splits: rows by split.
        problems: what is wrong first.
        models: by name; none in a file of pairs.
        reference: the LLM to match; None in a file of pairs, or if it has no answers.
        resolution: of the reference's mean quality.
        verdicts: what the data can and can't train; none for a file of pairs.
    """

    rows: int
    sound: int
    splits: Mapping[str, int]
    problems: tuple[Problem, ...]
    models: tuple[Model, ...] = ()
    reference: Model | None = None
    resolution: Resolution | None = None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def wrong(self) -> bool:
        """Whether anything must be mended."""
        return any(problem.wrong for problem in self.problems)


def check_file(
    path: Path, prices: Mapping[str, Price] | None = None, reference: str | None = None
) -> Report:
    """Check a file of prompts, or of pairs if its first row has a chosen answer.

    Arguments as in `check_prompts`.

    Raises:
        DataError: the file can't be read.
    """
    first = next(read_rows(path), None)
    if first is not None and isinstance(first.value, dict) and "chosen" in first.value:
        return check_pairs(read_rows(path))
    return check_prompts(read_rows(path), prices, reference)


def check_prompts(
    rows: Iterable[Row], prices: Mapping[str, Price] | None = None, reference: str | None = None
) -> Report:
    """Check a file of prompts, row by row and as a whole.

    Args:
        rows: of the file.
        prices: by LLM; None leaves prices out of the check.
        reference: the LLM to match; None takes the best of those that answered most prompts.
    """
    findings, repeats, count = Findings(), Repeats(), 0
    tallies: dict[str, Tally] = {}
    pools: list[tuple[str, frozenset[str]]] = []
    for row in rows:
        count += 1
        if (prompt := _checked(row, prompt_row, findings)) is None:
            continue
        repeats.prompt(row.where, prompt, findings)
        pools.append((row.where, frozenset(prompt["responses"])))
        for name, answers in prompt["responses"].items():
            tallies.setdefault(name, Tally(name)).add(row.where, answers)
            _check_answers(f"{row.where}, {name}", answers, findings)
    models = tuple(
        tallies[name].model(len(pools), (prices or {}).get(name)) for name in sorted(tallies)
    )
    matched = _reference(models, reference)
    _check_number(len(pools), findings)
    _check_pools(pools, tallies, findings)
    _check_samples(tallies.values(), findings)
    if models:
        _check_reference(matched, reference, models, len(pools), findings)
    if prices is not None:
        _check_prices(models, matched, findings)
    resolution = tallies[matched.name].resolution() if matched else None
    return Report(
        rows=count,
        sound=len(pools),
        splits=repeats.splits,
        problems=findings.problems(),
        models=models,
        reference=matched,
        resolution=resolution,
        verdicts=verdicts(models, matched, resolution, len(pools), prices is not None)
        if matched
        else (),
    )


def check_pairs(rows: Iterable[Row]) -> Report:
    """Check a file of pairs."""
    findings, repeats, count, sound = Findings(), Repeats(), 0, 0
    for row in rows:
        count += 1
        if (pair := _checked(row, pair_row, findings)) is None:
            continue
        sound += 1
        repeats.pair(row.where, pair, findings)
        if pair["chosen"] == pair["rejected"]:
            findings.wrong("equal answers", f"{row.where}: both answers are equal: drop the row")
        elif not pair["chosen"].strip():
            findings.wrong("empty answer", f"{row.where}: the better answer is empty: drop the row")
    _check_number(sound, findings)
    return Report(count, sound, repeats.splits, findings.problems())


def _checked(row: Row, check: Callable[[object], Checked], findings: Findings) -> Checked | None:
    if row.fault:
        findings.wrong("unreadable row", f"{row.where}: {row.fault}")
        return None
    try:
        return check(row.value)
    except RowInvalid as error:
        for fault in error.faults:
            kind = f"field {fault.field}" if fault.field else "no row"
            findings.wrong(kind, f"{row.where}: {fault.message}")
        return None


def _check_answers(where: str, answers: Sequence[AnswerRow], findings: Findings) -> None:
    for index, answer in enumerate(answers):
        if not answer["text"].strip():
            findings.notable(
                "empty answer", f"{where}[{index}]: no text: right if the LLM said nothing"
            )
        elif not answer["tokens"]:
            findings.wrong(
                "no tokens", f"{where}[{index}]: a text of 0 tokens: write how many it has"
            )
        if answer.get("score") is None:
            findings.notable(
                "not graded", f"{where}[{index}]: no score: run `bestroute-export label`"
            )
        if unknown := answer.keys() - AnswerRow.__annotations__.keys():
            names = ", ".join(sorted(unknown))
            findings.notable(
                "unknown field of an answer",
                f"{where}[{index}]: {names}: not read, and lost when the file is written again",
            )


def _check_number(sound: int, findings: Findings) -> None:
    if not sound:
        findings.wrong("no rows", "not one row can be used: mend the above, or write some")


def _check_pools(
    pools: Sequence[tuple[str, frozenset[str]]], tallies: Mapping[str, Tally], findings: Findings
) -> None:
    """Compare the LLMs of each row with those that at least half of the rows have."""
    having = {name: tally.rows_with.total() for name, tally in tallies.items()}
    usual = frozenset(name for name, rows in having.items() if 2 * rows >= len(pools))
    for where, pool in pools:
        if missing := usual - pool:
            findings.notable(
                "missing answers",
                f"{where}: none of {', '.join(sorted(missing))}: collect them, drop the row, "
                "or leave these LLMs out of the pool",
            )
        for name in sorted(pool - usual):
            findings.notable(
                "rare LLM",
                f"{where}: answers of {name}, which {having[name]:,} of {len(pools):,} rows have: "
                "mend its name, or collect the others",
            )


def _check_samples(tallies: Iterable[Tally], findings: Findings) -> None:
    for tally in tallies:
        if len(tally.rows_with) > 1:
            most, fewest = max(tally.rows_with), min(tally.rows_with)
            findings.notable(
                "ragged samples",
                f"{tally.first_with[fewest]}: {tally.name} has {fewest} of {most} answers, as in "
                f"{tally.rows_with[fewest]:,} rows in all: "
                f"collect the others, or go without n > {fewest}",
            )


def _reference(models: Sequence[Model], name: str | None) -> Model | None:
    if name is not None:
        return next((model for model in models if model.name == name), None)
    return max(models, key=lambda model: (model.prompts, model.score or 0), default=None)


def _check_reference(
    reference: Model | None,
    name: str | None,
    models: Sequence[Model],
    rows: int,
    findings: Findings,
) -> None:
    if reference is None:
        names = ", ".join(model.name for model in models)
        findings.wrong("reference", f"no answers of {name}: name one of {names}")
    elif reference.prompts < rows:
        findings.wrong(
            "reference",
            f"{reference.name} answered only {reference.prompts:,} of {rows:,} prompts: "
            "collect the others, drop the rows, or name another reference",
        )


def _check_prices(models: Sequence[Model], reference: Model | None, findings: Findings) -> None:
    for model in models:
        if model.price is None:
            add = findings.wrong if model == reference else findings.notable
            add("no price", f"{model.name}: write its price, or it can't be in the pool")
