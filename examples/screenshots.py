"""Takes the pictures of the web page in docs/images, of real decisions and real answers.

    python examples/screenshots.py --minutes 10

Serves the embedded bundle with a stand-in LLM (see standin.py) in place of the pool's models, at
their prices; answers prompts of reasoning-gym for so many minutes, so that there are savings to
show; and drives the page in a headless Chromium. Needs the extra demo, playwright and a chromium.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from playwright.async_api import Page, async_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `examples` is, if run as a file

from bestroute.app import serving
from bestroute.bundle import DEFAULT_BUNDLE, read_manifest
from bestroute.config import Settings
from examples.demonstration.processes import standin
from examples.demonstration.questions import questions

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PROMPT = (
    "A bakery sells muffins in boxes of 6 and boxes of 9. A customer buys 7 boxes and gets "
    "51 muffins in all. How many boxes of 9 did the customer buy?"
)
ARM = '["gemma-3-27b",3]'
SECONDS_BETWEEN = 2.0


def settings(llm: str) -> Settings:
    """The embedded bundle, every model of which the stand-in answers for."""
    models = {
        model.name: {"provider": "stand-in"} for model in read_manifest(DEFAULT_BUNDLE).models
    }
    return Settings.model_validate(
        {
            "server": {"listen": "127.0.0.1:0"},
            "gateway": {"listen": "127.0.0.1:0"},
            "providers": {"stand-in": {"base_url": llm, "samples": "one_call"}},
            "models": models,
        }
    )


async def ask(url: str, minutes: float) -> None:
    """Have prompts answered through the API for so long."""
    end = time.monotonic() + 60 * minutes
    async with aiohttp.ClientSession() as session:
        for index, question in enumerate(questions(400)):
            if time.monotonic() > end:
                return
            body = {
                "model": ("bestroute/auto", "bestroute/save-60%")[index % 2],
                "messages": [{"role": "user", "content": question.text}],
                "max_tokens": 24 + 40 * (index % 4),
            }
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                await response.read()
            await asyncio.sleep(SECONDS_BETWEEN)


async def take(page: Page, name: str) -> None:
    """One picture, of what is to be seen without scrolling."""
    path = IMAGES / f"page-{name}.png"
    await page.screenshot(path=path)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


async def decide(page: Page, url: str) -> None:
    """The decision on a prompt."""
    await page.goto(url)
    await page.fill("#prompt", PROMPT)
    await page.wait_for_selector("#chart .dot.chosen")
    await page.hover("#arms-title")
    await take(page, "decide")


async def answer(page: Page) -> None:
    """Three answers, of which the reward has picked one."""
    await page.select_option("#arm", ARM)
    await page.click("#generate")
    await page.wait_for_selector("#money:not([hidden])", timeout=300_000)
    await page.locator("#money").scroll_into_view_if_needed()
    await page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    await take(page, "candidates")


async def savings(page: Page, url: str) -> None:
    """What was saved meanwhile."""
    await page.goto(f"{url}/#savings")
    await page.wait_for_selector("#series .column")
    await take(page, "savings")


async def main(minutes: float) -> None:
    """Take all of them."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as directory:
        async with (
            standin(Path(directory)) as llm,
            serving(settings(llm)) as running,
            async_playwright() as playwright,
        ):
            url = f"http://{running.gateway}"
            browser = await playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
            )
            page = await browser.new_page(viewport={"width": 1200, "height": 800})
            await decide(page, url)
            await answer(page)
            await ask(url, minutes)
            await savings(page, url)
            await browser.close()


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    flags.add_argument("--minutes", type=float, default=1.0, help="of answering, for the savings")
    asyncio.run(main(flags.parse_args().minutes))
