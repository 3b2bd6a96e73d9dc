"""The page of results: text made from figures."""

from collections.abc import Iterator, Sequence

from bestroute_export.evaluation.figures import Account, LossResults, PolicyFigures, Results
from bestroute_export.evaluation.losses_report import section
from bestroute_export.evaluation.markdown import anchor, interval, percent, points, table
from bestroute_export.evaluation.policies import (
    AT_MEAN_LENGTHS,
    BASELINE,
    MIXED,
    SERVED,
    SINGLE,
    gated,
)

LISTED = (10, 20, 40, 60)
"""Savings in per cent at which drops are listed, as BEST-Route does."""

INTRODUCTION = """\
# Results

Written by `bestroute-export evaluate`; don't edit. Everything on this page comes from

    bestroute-export evaluate experiments/*.toml --data DATA

where DATA holds the files that the experiments name. The figures themselves are in
[results/](results/) as JSON.

How it is measured:

- **Out of fold.** Prompts are cut into {folds} folds. What is said of a prompt is learned and
  calibrated on the other folds. "By task" keeps whole tasks together, so that every prompt is of a
  task never seen.
- **Saving and drop.** Saving is 1 - cost / the reference's cost, summed over prompts; drop is
  1 - mean quality / the reference's. Prompts are billed once per sample.
- **Two ways to count costs.** *At mean lengths* every answer costs as if it had its LLM's mean
  length, as published figures usually do. *At real lengths* it costs what the lengths of the
  sampled answers say. No policy knows real lengths when it decides: ours predicts them, or takes
  the mean.
- **Two ways to pick the setting** (threshold or rate). *Picked here*: the one that saves most
  within the drop on the very predictions it is measured on, as baselines are usually reported; it
  flatters. *Held out*: for each fold the one that does so on the other folds, with the drop that
  this then had.
- **Brackets** are 95 % bootstrap intervals over prompts ({resamples} resamples), the setting picked
  anew in each where it is "picked here".
- **Rules.** A *threshold* takes the cheapest arm predicted to match the reference at least so
  surely, which is BEST-Route's rule. A *trade-off* takes the arm of which expected gain in quality
  plus rate x expected saving is largest, or the reference if that is below 0. *Gated* is without
  a router: some answers of one LLM are drawn for every prompt, and taken if a linear model of
  their agreement and length finds them worth it at the rate; else the reference is asked as well.
  All answers are paid for, and any of those that convinced is kept.
- **Baselines.** TF-IDF (words and word pairs, sublinear, in at least two prompts) with one
  scikit-learn logistic regression per arm (C = 1, soft labels). The 32 nearest prompts by frozen
  MiniLM-L6 embedding (mean over tokens, cosine). N-label, N-class, clusters and Hybrid are cheap
  stand-ins for BEST-Route's baselines: linear models or 50-means on the same TF-IDF features, not
  fine-tuned encoders. The oracle knows expected qualities and takes the cheapest arm that is as
  good as the reference.
"""

LIMITS = """\
## Limits

- Lengths of answers in these files are characters / 4: the sources record no usage. Prices are
  list prices.
- 1 % of quality is near the noise of a few thousand prompts: read the intervals, not the last
  digit.
- Mean lengths, and which static arm is best to mix or to route to, are taken from all prompts,
  which flatters the static baselines a little. Settings "held out" are picked on predictions for
  the other folds by models that saw the held-out fold; calibration is nested and saw nothing of it.
- Where a file has one answer per LLM and prompt, chance in sampling is in its figures.
- The majority selector counts votes among all answers sampled, also where fewer are drawn. This
  flatters it for n = 2.
- Reward models are trained on pairs of the train split, cross-fitted by prompt, each on part of
  them; the weight of agreement is set on all of these prompts. In "by task" they have seen other
  prompts of the tasks that the router has not. Gates have not.
"""


def page(every: Sequence[Results], losses: Sequence[LossResults] = ()) -> str:
    """The whole page, Markdown."""
    first = (every or losses)[0].experiment
    parts = [INTRODUCTION.format(folds=first.folds, resamples=f"{first.resamples:,}")]
    if every:
        parts += _overview(every)
        parts += [
            f"Fine-tuned encoders: [{of.experiment.title}](#{anchor(of.experiment.title)}).\n"
            for of in losses
        ]
    for results in every:
        parts += _section(results)
    for of_losses in losses:
        parts += section(of_losses)
    return "\n".join([*parts, LIMITS])


def _overview(every: Sequence[Results]) -> Iterator[str]:
    yield f"## Cost saved at a quality drop of at most {percent(every[0].drop)}\n"
    yield from table(
        (
            "experiment",
            "mixing with the best arm",
            "TF-IDF, threshold",
            "**bestroute**, by mean lengths",
            "TF-IDF, threshold, real lengths",
            "**bestroute**, by predicted lengths, real lengths",
            "held out (drop)",
            "gated without a router, real lengths",
        ),
        (
            (
                f"[{each.experiment.title}](#{anchor(each.experiment.title)})",
                percent(_of(each, MIXED).mean_lengths.saving.value),
                interval(_of(each, BASELINE).mean_lengths.saving),
                f"**{interval(_of(each, AT_MEAN_LENGTHS).mean_lengths.saving)}**",
                interval(_of(each, BASELINE).real_lengths.saving),
                f"**{interval(_of(each, SERVED).real_lengths.saving)}**",
                _held_out(_of(each, SERVED).real_lengths),
                _gated(each),
            )
            for each in every
        ),
    )
    yield (
        "\nThe first three figures count costs at mean lengths, the others at real lengths. The "
        "one held out has its setting picked on the other folds, the others are picked here. Gated "
        "are two answers of one LLM, always the same.\n"
    )


def _section(results: Results) -> Iterator[str]:
    of = results.experiment
    name = results.name
    yield f"## {of.title}\n"
    yield (
        f"`experiments/{name}.toml`: {results.prompts:,} prompts of `{of.prompts}`, "
        f"{of.folds} folds by {of.fold_by}, n up to {of.max_samples}"
        + (f", {of.selector} selector" if of.max_samples > 1 else "")
        + f". Reference: {of.reference}; LLMs to choose from: {', '.join(results.models)}.\n"
    )
    yield f"![Quality drop by cost saved](results/{name}-curve.svg)\n"
    yield "Settings picked here; bands are 95 % intervals of bestroute and of TF-IDF.\n"
    yield f"Cost saved at a drop of at most {percent(results.drop)}:\n"
    yield from table(
        (
            "policy",
            "mean lengths, picked here",
            "held out (drop)",
            "real lengths, picked here",
            "held out (drop)",
            "AIQ",
        ),
        (
            (
                policy.name,
                interval(policy.mean_lengths.saving),
                _held_out(policy.mean_lengths),
                interval(policy.real_lengths.saving),
                _held_out(policy.real_lengths),
                percent(policy.real_lengths.improvement.value),
            )
            for policy in results.policies
        ),
    )
    yield (
        "\nAIQ (RouterBench): mean quality over all budgets between the cheapest arm's and the "
        "reference's cost, relative to the reference's, at real lengths.\n"
    )
    yield "Smallest quality drop (%) of any setting that saves so much; below 0 is better:\n"
    yield from table(
        (
            "policy",
            *(f"{saved} % saved, mean lengths" for saved in LISTED),
            *(f"{saved} %, real lengths" for saved in LISTED),
        ),
        (
            (
                policy.name,
                *(_drop(policy.mean_lengths, saved) for saved in LISTED),
                *(_drop(policy.real_lengths, saved) for saved in LISTED),
            )
            for policy in results.policies
            if any(policy.real_lengths.drops[saved] for saved in LISTED)
        ),
    )
    yield from _single(results)
    yield from _selectors(results)
    yield from _arms(results)
    yield from _calibration(results)
    yield from _promises(results)
    yield from _rewordings(results)


def _single(results: Results) -> Iterator[str]:
    single = results.policy(SINGLE)
    if single is None:
        return
    several = _of(results, SERVED).real_lengths.saving
    yield (
        f"\n**Worth of n > 1**, at real lengths, picked here: with single answers only, the same "
        f"predictions save {interval(single.real_lengths.saving)}; with up to "
        f"{results.experiment.max_samples} answers {interval(several)}."
    )


def _selectors(results: Results) -> Iterator[str]:
    if not results.selectors:
        return
    models = list(results.selectors[0].recovered)
    n = results.experiment.max_samples
    yield (
        "\n**Which answer is kept.** How much of the gap between a random and a perfect selector "
        f"of {n} answers is closed, by LLM and on average over LLMs; and what is saved, trained "
        "and measured with that selector (bestroute by trade-off, TF-IDF by threshold), picked "
        "here:\n"
    )
    yield from table(
        (
            "selector",
            *models,
            "bestroute, mean lengths",
            "real lengths",
            "TF-IDF, mean lengths",
        ),
        (
            (
                each.name,
                *(
                    interval(each.recovered[m]) if m == "mean" else percent(each.recovered[m].value)
                    for m in models
                ),
                interval(each.saving),
                interval(each.real_saving),
                interval(each.baseline_saving),
            )
            for each in results.selectors
        ),
    )


def _arms(results: Results) -> Iterator[str]:
    yield (
        "\n**Who answers** under the served policy, at the setting that saves most within "
        f"{percent(results.drop)} at real lengths:\n"
    )
    yield f"![Share of prompts by arm](results/{results.name}-shares.svg)\n"
    yield "Policies without a setting, and every prompt given to one arm:\n"
    yield from table(
        ("policy", "saved, mean lengths", "real lengths", "quality drop"),
        (
            (arm.name, percent(arm.mean_saving), percent(arm.saving), percent(arm.drop))
            for arm in (*results.fixed, *results.static)
        ),
    )


def _calibration(results: Results) -> Iterator[str]:
    lengths = ", ".join(f"{name} {share:.2f}" for name, share in results.lengths.items())
    yield (
        f"\n**Calibration**, out of fold: expected error {results.match.error:.3f} of match "
        f"probabilities, {results.gains.error:.3f} of gains. Explained variance of log lengths: "
        f"{lengths}.\n"
    )
    yield f"![Reliability of match probabilities and gains](results/{results.name}-reliability.svg)"


def _promises(results: Results) -> Iterator[str]:
    yield (
        "\n**Promises.** The largest rate whose upper bound of the drop (95 %, no assumption on "
        "the distribution) stays within a target, at real lengths. And how often the drop stays "
        "within the target when the rate is chosen on a resample and run on all prompts, or chosen "
        "on a random half and run on the other, which is harder than what is promised:\n"
    )
    yield from table(
        (
            "target",
            "saved",
            "drop",
            "held, resamples",
            "saved there",
            "held, halves",
            "saved there",
        ),
        (
            (
                percent(each.target),
                percent(each.saving),
                percent(each.drop),
                percent(each.resampled.held),
                percent(each.resampled.saving),
                percent(each.halved.held),
                percent(each.halved.saving),
            )
            for each in results.promised
        ),
    )
    if results.least_promise is None:
        yield "\nNo drop can be promised while anything is saved."
    else:
        yield (
            "\nThe smallest drop that can be promised while anything is saved is "
            f"{percent(results.least_promise.drop)}; "
            f"it saves {percent(results.least_promise.saving)}."
        )


def _rewordings(results: Results) -> Iterator[str]:
    yield (
        "\n**Rewordings.** Decisions that stay the same, on the prompts of one fold, by a router "
        "fitted to the others:\n"
    )
    yield from table(
        ("rewording", "same arm"),
        ((name, percent(share)) for name, share in results.stable.items()),
    )
    yield ""


def _of(results: Results, name: str) -> PolicyFigures:
    policy = results.policy(name)
    assert policy is not None
    return policy


def _gated(results: Results) -> str:
    policy = results.policy(gated(results.experiment.agreement, 2))
    return f"**{interval(policy.real_lengths.saving)}**" if policy else ""


def _held_out(account: Account) -> str:
    return f"{percent(account.held_out_saving.value)} ({points(account.held_out_drop.value)})"


def _drop(account: Account, saved: int) -> str:
    figure = account.drops[saved]
    return "" if figure is None else points(figure.value)
