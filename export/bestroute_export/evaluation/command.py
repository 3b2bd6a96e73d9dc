"""The command `evaluate`: experiments to figures, plots and the page of results."""

import argparse
from pathlib import Path
from time import perf_counter

from joblib import parallel_config
from rich.console import Console
from rich.progress import Progress

from bestroute_export.evaluation.experiment import LossExperiment, read_experiment
from bestroute_export.evaluation.figures import LossResults, Results, read_folder, write_results
from bestroute_export.evaluation.losses import compare_losses
from bestroute_export.evaluation.plots import draw
from bestroute_export.evaluation.report import page
from bestroute_export.evaluation.study import Study
from bestroute_export.evaluation.summary import summarize
from bestroute_export.recipe import Recipe, installed_backbone


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; `alone` of its options runs it."""
    command = commands.add_parser(
        "evaluate",
        help="compare policies on real answers",
        description="Runs experiments and writes OUT/results.md, from these and from what earlier "
        "runs left in OUT/results. Finished steps are kept in the work directory.",
    )
    command.set_defaults(alone=evaluate)
    command.add_argument("experiments", type=Path, nargs="+", help="TOML files")
    command.add_argument("--data", type=Path, required=True, help="folder with the data")
    command.add_argument(
        "--work", type=Path, default=Path("work"), help="results of finished steps (%(default)s)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("docs"), help="where the page is written (%(default)s)"
    )
    command.add_argument(
        "--backbone", type=Path, help="local BERT directory (the installed MiniLM-L6)"
    )


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Run experiments one after the other; write the page anew after each."""
    recipe = Recipe(backbone=options.backbone or installed_backbone())
    experiments = {path.stem: read_experiment(path) for path in options.experiments}
    folder = options.out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    begun = perf_counter()

    def say(step: str) -> None:
        console.print(f"{perf_counter() - begun:6.0f} s  {step}", highlight=False, soft_wrap=True)

    for name, experiment in experiments.items():
        say(f"{name}: {experiment.title}")
        with Progress(console=console) as progress, parallel_config(n_jobs=-1):
            study = Study(name, experiment, options.data, options.work, recipe, progress, say)
            results: Results | LossResults
            if isinstance(experiment, LossExperiment):
                results = compare_losses(study, experiment, progress)
            else:
                results = summarize(study)
            write_results(results, folder / f"{name}.json")
        every, losses = read_folder(folder)
        for drawn in every:
            draw(drawn, folder)
        (options.out / "results.md").write_text(page(every, losses), encoding="utf-8")
    say(f"{options.out / 'results.md'} is written")
