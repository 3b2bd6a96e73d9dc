"""The losses that a router can be trained by, as fine-tuned encoders, on one held-out fold.

Beside each encoder stands a linear model of the same targets, and beside them the value router. All
are learned on the other folds, and differ in nothing else. Shapes: Q prompts, of them H held out; A
arms, of which a loss tells C from the reference.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from bestroute.policy import REFERENCE
from bestroute_export.batches import predict
from bestroute_export.checkpoint import Checkpoint
from bestroute_export.data import digest
from bestroute_export.evaluate import Choice, drops, savings
from bestroute_export.evaluation import baselines
from bestroute_export.evaluation.experiment import LossExperiment, LossName
from bestroute_export.evaluation.figures import (
    Fixed,
    LossAccount,
    LossPolicy,
    LossResults,
    interval,
    interval_or_none,
)
from bestroute_export.evaluation.frontier import (
    Frontier,
    best_mixed,
    drop_at,
    improvement,
    mixtures,
    resampling,
    saving_within,
)
from bestroute_export.evaluation.policies import MIXED, SERVED, THRESHOLD
from bestroute_export.evaluation.study import Study
from bestroute_export.labels import Floats
from bestroute_export.losses import LOSSES, Loss, one_arm, one_of_all
from bestroute_export.outcomes import Outcomes, costs
from bestroute_export.pipeline import QUALITY_DROP
from bestroute_export.recipe import ENCODER_ROUTER
from bestroute_export.router import train_router
from bestroute_export.thresholds import by_threshold
from bestroute_export.trades import by_rate
from bestroute_export.train import Trained
from bestroute_export.work import Arrays, Work

SAVINGS = (20, 40)
"""Per cent at which drops are read off."""
TITLES: dict[LossName, str] = {
    "prob_nlabels": "prob_nlabels (BEST-Route)",
    "det_nlabels": "det_nlabels (N-label)",
    "det_ncls": "det_ncls (N-class)",
    "prob_2cls": "prob_2cls (Hybrid, probabilistic)",
    "det_2cls": "det_2cls (Hybrid, deterministic)",
}
OF_ONE_ARM = ("prob_2cls", "det_2cls")

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """What a loss has to learn.

    Attributes:
        loss: the loss.
        columns: int64 [C], the arms that it tells from the reference.
        targets: float64 [Q, C].
    """

    loss: Loss
    columns: Rows
    targets: Floats

    @classmethod
    def of(cls, name: LossName, measured: Outcomes, best: int) -> "Task":
        """Of a loss by name.

        Args:
            name: of the loss.
            measured: what the arms gave on Q prompts.
            best: the arm for losses that tell one from the reference.
        """
        loss, columns = LOSSES[name], np.arange(measured.quality.shape[1])
        if name in OF_ONE_ARM:
            measured, columns = one_arm(measured, best), columns[[best]]
        return cls(loss, columns, loss.targets(measured, 0.0))


def compare_losses(study: Study, of: LossExperiment, progress: Progress) -> LossResults:
    """Fine-tune what is missing, and measure everything on the held-out fold.

    Args:
        study: of this experiment.
        of: the experiment.
        progress: where bars of trainings are shown.
    """
    pool, measured = study.pool, study.measured(of.selector)
    held, rest = np.flatnonzero(study.folds == of.fold), np.flatnonzero(study.folds != of.fold)
    here = measured.take(held.tolist())
    weights = resampling(len(held), of.resamples, of.seed)
    best = best_mixed(measured.take(rest.tolist()), QUALITY_DROP)  # [1]

    def figures(
        name: str, frontier: Callable[[Outcomes], Frontier], seconds: float | None = None
    ) -> LossPolicy:
        by_mean, by_length = (
            account(frontier(counted), counted, weights)
            for counted in (here.at_estimated_costs(), here)
        )
        return LossPolicy(name=name, mean_lengths=by_mean, real_lengths=by_length, seconds=seconds)

    def chosen(name: str, choices: Choice, seconds: float | None = None) -> LossPolicy:
        return figures(name, lambda counted: Frontier.of(choices, counted), seconds)

    value = study.predictions(of.selector, measured).take(held)
    by_length = costs(pool, here.input_tokens, value.tokens)
    every_arm = np.arange(len(pool.arms))
    policies = [
        chosen(SERVED, by_rate(value.gains, *by_length)),
        chosen(THRESHOLD, decided(value.match, every_arm, here)),
    ]
    fixed = []
    work = _work(study, of)
    for name in of.losses:
        task = Task.of(name, measured, int(best[0]))
        logits, seconds = fine_tuned(study, work, name, task, held, rest, progress)
        for kind, probabilities, took in (
            ("fine-tuned", task.loss.probabilities(logits), seconds),
            ("TF-IDF", _linear(study, name, task, held), None),
        ):
            title = f"{TITLES[name]}, {kind}"
            choices = decided(probabilities, task.columns, here)
            policies.append(chosen(title, choices, took))
            if (choices == choices[0]).all():
                fixed.append(_fixed(title, choices[0], here))
    policies.append(figures(MIXED, lambda counted: mixtures(counted, best)))

    arm = pool.arms[int(best[0])]
    return LossResults(
        name=study.name,
        experiment=of,
        drop=QUALITY_DROP,
        prompts=len(held),
        trained=len(rest),
        models=[model.name for model in pool.models if model.name != of.reference],
        arm=arm.model if of.max_samples == 1 else f"{arm.model} x {arm.samples}",
        policies=policies,
        fixed=fixed,
    )


def decided(probabilities: Floats, columns: Rows, measured: Outcomes) -> Choice:
    """The arm of each prompt at each threshold above 0, int64 [L, H].

    At 0 the cheapest arm is taken whatever a router says. Where probabilities are 0 or 1, as those
    of N-class, all of these settings decide alike.

    Args:
        probabilities: float [H, C].
        columns: int64 [C], the arms that they are of; others are never taken.
        measured: of the same prompts, all arms.
    """
    every = np.full(measured.quality.shape, -1.0)
    every[:, columns] = probabilities
    return by_threshold(every, measured)[:-1]


def account(frontier: Frontier, measured: Outcomes, weights: Floats) -> LossAccount:
    """Figures of a policy at the costs in `measured`, the setting picked on the same prompts.

    Args:
        frontier: on H prompts.
        measured: of the same prompts, all arms.
        weights: of the prompts, see `frontier.resampling`.
    """
    saved, lost = frontier.savings(weights), frontier.drops(weights)
    arm = measured.costs.sum(0).argmin()
    cheapest = Frontier.of(np.full((1, len(measured.quality)), arm), measured)
    ends = cheapest.savings(weights)[:, 1], cheapest.drops(weights)[:, 1]
    return LossAccount(
        saving=interval(saving_within(saved, lost, QUALITY_DROP)),
        drops={s: interval_or_none(drop_at(saved, lost, s / 100)) for s in SAVINGS},
        improvement=interval(improvement(saved, lost, ends)),
    )


def _fixed(name: str, choice: Choice, measured: Outcomes) -> Fixed:
    return Fixed(
        name=name,
        mean_saving=float(savings(choice, measured.at_estimated_costs())[0]),
        saving=float(savings(choice, measured)[0]),
        drop=float(drops(choice, measured)[0]),
    )


def _work(study: Study, of: LossExperiment) -> Work:
    """Where predictions of encoders lie.

    Apart from the study's other results, since an hour of training doesn't depend on all that these
    depend on.
    """
    return Work(
        study.work.directory.with_name(f"{study.name}-encoders"),
        {
            "experiment": of.model_dump(exclude={"title", "losses", "resamples"}),
            "prompts": digest(study.data / of.prompts),
            "prices": digest(study.data / of.prices),
            "backbone": digest(study.recipe.backbone / "model.safetensors"),
            "max_tokens": study.tokenizer.max_tokens,
            "training": asdict(ENCODER_ROUTER),
        },
    )


def fine_tuned(
    study: Study,
    work: Work,
    name: LossName,
    task: Task,
    held: Rows,
    rest: Rows,
    progress: Progress,
) -> tuple[Floats, float]:
    """What an encoder says of the held-out prompts, and the seconds that its training took.

    Args:
        study: with the prompts.
        work: where predictions are kept, and checkpoints while it trains.
        name: of the loss.
        task: what it has to learn.
        held: int64 [H], the prompts to predict.
        rest: int64 [Q - H], the prompts to train on.
        progress: where a bar is shown.

    Returns:
        Logits float64 [H, C], and seconds.
    """
    checkpoint = Checkpoint(work.directory / f"{name}.checkpoint")

    def train() -> Arrays:
        study.say(f"fine-tuning, {name}")
        took: list[Trained] = []
        network = train_router(
            [study.inputs[row].ids for row in rest],
            task.targets[rest],
            [study.pool.arms[column] for column in task.columns],
            study.recipe.backbone,
            ENCODER_ROUTER,
            progress,
            name,
            task.loss,
            checkpoint=checkpoint,
            report=took.append,
        )
        logits = predict(network.logits, [study.inputs[row].ids for row in held])
        return {"logits": logits, "seconds": np.array(took[0].seconds)}

    said = work.arrays(name, train)
    checkpoint.path.unlink(missing_ok=True)
    return said["logits"], float(said["seconds"])


def _linear(study: Study, name: LossName, task: Task, held: Rows) -> Floats:
    """What TF-IDF with logistic regression says of the held-out prompts, float64 [H, C]."""
    # All other folds are one here: nothing is asked of them.
    fold = np.isin(np.arange(len(study.prompts)), held).astype(np.int64)
    texts = [prompt.text for prompt in study.prompts]

    def make() -> Arrays:
        study.say(f"TF-IDF, {name}")
        if task.loss.value is one_of_all:
            classes = np.where(task.targets.any(1), task.targets.argmax(1), REFERENCE)
            likeliest = baselines.likeliest(texts, classes, fold)
            return {"said": (likeliest[:, None] == task.columns).astype(np.float64)}
        return {"said": baselines.logistic(texts, task.targets, fold)}

    return study.work.arrays(f"linear-{name}", make)["said"][held]
