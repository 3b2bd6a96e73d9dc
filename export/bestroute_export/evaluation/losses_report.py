"""The section of the page on fine-tuned encoders, one per loss."""

from collections.abc import Iterator

from bestroute_export.evaluation.figures import LossAccount, LossResults
from bestroute_export.evaluation.markdown import interval, percent, table

LOSSES = """\
Elsewhere on this page BEST-Route's loss and those it is compared with have linear stand-ins. Here
each fine-tunes an encoder: the same backbone, the same {trained:,} prompts and the same settings
(`bestroute_export.recipe.ENCODER_ROUTER`, no early stopping), so that only the losses differ. All
is measured on the other {prompts:,} prompts, fold {of.fold} of {of.folds} by {of.fold_by}. It is
one fold because each encoder takes minutes to train. Brackets are over its prompts: they hold
nothing of what another fold or another seed of the training would give.

- `prob_nlabels`, BEST-Route's: per arm the probability that it matches the reference; threshold.
- `det_nlabels`, N-label: per arm whether its expected score matches; threshold.
- `det_ncls`, N-class: which arm is the cheapest that matches, or none. It has no setting.
- `prob_2cls` and `det_2cls`, Hybrid LLM's: the first two for one arm only, by threshold. It is the
  static arm that saves most when mixed with the reference on the training folds, {arm}.

"TF-IDF" is logistic regression on TF-IDF for the same targets, decided on in the same way; for
`prob_nlabels` it is the baseline of the other sections. Rows of bestroute are the value router that
is served, fitted on the other folds like all else. Probabilities of encoders are not calibrated.
Fine-tuning is wall time on the machine that made this page.
"""


def section(results: LossResults) -> Iterator[str]:
    """The lines of its section, Markdown."""
    of = results.experiment
    yield f"## {of.title}\n"
    yield (
        f"`experiments/{results.name}.toml`: `{of.prompts}`, n up to {of.max_samples}. "
        f"Reference: {of.reference}; LLMs to choose from: {', '.join(results.models)}.\n"
    )
    yield LOSSES.format(trained=results.trained, prompts=results.prompts, of=of, arm=results.arm)
    yield f"Cost saved at a drop of at most {percent(results.drop)}, picked here:\n"
    yield from table(
        ("policy", "mean lengths", "real lengths", "AIQ", "fine-tuning, s"),
        (
            (
                policy.name,
                interval(policy.mean_lengths.saving),
                interval(policy.real_lengths.saving),
                interval(policy.real_lengths.improvement),
                "" if policy.seconds is None else f"{policy.seconds:.0f}",
            )
            for policy in results.policies
        ),
    )
    yield "\nSmallest quality drop of any setting that saves so much; below 0 is better:\n"
    listed = list(results.policies[0].real_lengths.drops)
    yield from table(
        (
            "policy",
            *(f"{saved} % saved, mean lengths" for saved in listed),
            *(f"{saved} %, real lengths" for saved in listed),
        ),
        (
            (
                policy.name,
                *(_loss_drop(policy.mean_lengths, saved) for saved in listed),
                *(_loss_drop(policy.real_lengths, saved) for saved in listed),
            )
            for policy in results.policies
        ),
    )
    for policy in results.fixed:
        yield (
            f"\n{policy.name}, has one setting: it saves {percent(policy.mean_saving)} at mean "
            f"lengths and {percent(policy.saving)} at real lengths, and drops "
            f"{percent(policy.drop)}."
        )
    yield ""


def _loss_drop(account: LossAccount, saved: int) -> str:
    figure = account.drops[saved]
    return "" if figure is None else interval(figure)
