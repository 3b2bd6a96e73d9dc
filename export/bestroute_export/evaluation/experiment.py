"""What an experiment is: a file that says which answers, which LLMs and which folds."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

Selector = Literal["random", "majority", "trained", "perfect"]
SELECTORS: tuple[Selector, ...] = get_args(Selector)
LossName = Literal["prob_nlabels", "det_nlabels", "det_ncls", "prob_2cls", "det_2cls"]
"""Names in `bestroute_export.losses.LOSSES`."""


class ExperimentInvalid(ValueError):
    """An experiment's file can't be read; says what is wrong in it."""


class Experiment(BaseModel):
    """The settings of one experiment.

    Attributes:
        title: heading of its results.
        prompts: name of the file of prompts in the data folder.
        prices: name of the file of prices there.
        reference: the LLM to match.
        models: LLMs to choose from; None takes all that answered.
        max_samples: largest n of an arm.
        folds: parts of the prompts; what is said of one is learned from the others.
        fold_by: whether a part holds single prompts or whole tasks.
        selector: which answer best-of-n keeps: any, the one that most others agree with, the one
            of highest reward, the one of highest score.
        agreement: the LLM whose answers are taken without asking the reference where a gate is
            convinced; and where all are equal, as a baseline that learns nothing. None leaves both
            out.
        resamples: of the bootstrap, over prompts.
        seed: of everything random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    prompts: str
    prices: str = "prices.json"
    reference: str
    models: tuple[str, ...] | None = None
    max_samples: Annotated[int, Field(ge=1)] = 1
    folds: Annotated[int, Field(ge=2)] = 5
    fold_by: Literal["prompt", "task"] = "prompt"
    selector: Selector = "random"
    agreement: str | None = None
    resamples: Annotated[int, Field(ge=1)] = 1000
    seed: int = 0


class LossExperiment(Experiment):
    """The settings of an experiment that fine-tunes one encoder per loss.

    Attributes:
        losses: those to compare.
        fold: the one fold that is predicted; encoders are fine-tuned on the others.
    """

    losses: Annotated[tuple[LossName, ...], Field(min_length=1)]
    fold: Annotated[int, Field(ge=0)] = 0

    @field_validator("fold")
    @classmethod
    def _one_of_the_folds(cls, fold: int, info: ValidationInfo) -> int:
        if fold >= info.data.get("folds", fold + 1):
            raise ValueError(f"there are {info.data['folds']} folds, counted from 0")
        return fold


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from TOML; one that names losses is a `LossExperiment`.

    Raises:
        ExperimentInvalid: the file can't be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
        kind = LossExperiment if "losses" in settings else Experiment
        return kind.model_validate(settings)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ExperimentInvalid(f"{path} can't be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ExperimentInvalid(f"{path}: {where}: {first['msg']}") from error
