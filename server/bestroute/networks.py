"""A bundle's two networks: loaded side by side, and compared with its golden outputs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from bestroute.bundle import Bundle
from bestroute.config import Engine, Settings
from bestroute.engine import return_freed_memory
from bestroute.errors import BundleInvalid
from bestroute.manifest import Manifest
from bestroute.text_model import TextModel, load_text_model


@asynccontextmanager
async def text_models(
    bundle: Bundle, settings: Settings
) -> AsyncIterator[tuple[TextModel, TextModel]]:
    """The bundle's router and reward model, loaded side by side, serving while the block lasts."""
    manifest = bundle.manifest
    router_model, reward_model = await asyncio.gather(
        load_text_model(bundle, manifest.router, settings, wide=True),
        # Beside the seconds that an LLM takes to answer, a few milliseconds more are no loss.
        load_text_model(bundle, manifest.reward, settings, wide=False),
    )
    return_freed_memory()
    async with router_model.running(), reward_model.running():
        yield router_model, reward_model


def check_golden(manifest: Manifest, router_model: TextModel, reward_model: TextModel) -> float:
    """Compare the networks with the manifest's golden outputs.

    Returns:
        The largest deviation; of expected tokens relative to them, else absolute.

    Raises:
        BundleInvalid: it is over the manifest's tolerance, or the router has other columns than the
            manifest.
    """
    golden = manifest.golden
    deviations = [0.0]
    for route in golden.router:
        row = router_model.read_now(router_model.tokenizer.prompt(route.prompt))
        if row.shape != (manifest.router_outputs,):
            raise BundleInvalid(
                f"bundle {manifest.name} {manifest.version}: the router gives {row.size} columns, "
                f"but the manifest's arms, models and trade_offs call for "
                f"{manifest.router_outputs}; export the bundle again"
            )
        expected = np.array(route.row)
        # Probabilities and gains are at most 1, so that only tokens are compared relatively.
        deviations.append(float((np.abs(row - expected) / np.maximum(1, np.abs(expected))).max()))
    for each in golden.reward:
        encoded = reward_model.tokenizer.pair(each.prompt, each.response)
        (reward,) = reward_model.read_now(encoded)
        deviations.append(abs(float(reward) - each.reward))
    worst = max(deviations)
    if not worst <= golden.tolerance:  # NaN fails this too
        raise BundleInvalid(
            f"bundle {manifest.name} {manifest.version}: outputs differ from the golden ones by "
            f"{worst:.2g}, more than {golden.tolerance:.2g}; this engine computes something else "
            "than what was calibrated. Try another engine.precision, or export the bundle again"
        )
    return worst


async def verify(bundle: Bundle, engine: Engine) -> float:
    """Load a bundle's networks on an engine and compare them with the golden outputs.

    Returns:
        The largest deviation; see `check_golden`.

    Raises:
        BundleInvalid: they can't be loaded, or disagree.
        ConfigInvalid: the engine can't be used here.
    """
    async with text_models(bundle, Settings(engine=engine)) as models:
        return await asyncio.to_thread(check_golden, bundle.manifest, *models)
