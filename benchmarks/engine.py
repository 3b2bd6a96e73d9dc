"""Throughput of one engine by padded tokens per batch: what the default budget rests on.

    python -m benchmarks.engine [--bundle DIR]

Mixed prompts, sorted by length, in batches up to each budget; budgets take turns, medians are
quoted. On a CPU batching gains little and padding costs much; on a GPU the budget is far larger.
"""

import argparse
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import record
from benchmarks.route import bare_rate
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Engine as EngineSettings
from bestroute.engine import Engine, preferred_precisions
from bestroute.tokenizer import Tokenizer

BUDGETS = (0, 128, 256, 512, 1024, 2048, 4096)
"""Padded tokens per batch; 0 runs every prompt alone."""


def main() -> int:
    """Run the sweep, print its table, keep its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle to run")
    parser.add_argument("--prompts", type=int, default=256, help="how many (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="of each budget (default: 5)")
    options = parser.parse_args()

    bundle, settings = Bundle.load(options.bundle), EngineSettings()
    network = bundle.manifest.router
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
    ids = [tokenizer.prompt(p).ids for p in record.mixed_prompts(tokenizer, options.prompts)]
    path = bundle.network_path(network, preferred_precisions(settings))
    engine = Engine(path, settings, max_items=options.prompts, max_tokens=network.max_tokens)

    rates: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
    for _ in track(range(options.repeats), "measuring", transient=True):
        for budget in BUDGETS:
            rates[budget].append(bare_rate(engine, budget, ids))

    medians = {budget: statistics.median(each) for budget, each in rates.items()}
    table = Table("padded tokens", "prompts per second", "over one by one", title="One engine")
    for budget, rate in medians.items():
        table.add_row(str(budget or "one by one"), f"{rate:.1f}", f"{rate / medians[0]:.2f}")
    Console().print(table)
    kept = record.write(
        "engine",
        {"bundle": bundle.manifest.version, "prompts": len(ids), "repeats": options.repeats},
        {"per_second_by_padded_tokens": rates, "medians": medians},
    )
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
