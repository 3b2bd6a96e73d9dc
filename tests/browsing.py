"""The web page in a real browser: a headless Chromium, watched for what must never happen."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Request, async_playwright, expect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium; there is one by: apt-get install chromium"
)
REFUSED = "Failed to load resource"
"""What a browser writes to its console of any response of 400 and above."""

expect.set_options(timeout=30_000)


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """A browser that lasts as long as the block."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def looking(
    browser: Browser, url: str, *, refusals: bool = False, **options: Any
) -> AsyncIterator[Page]:
    """The page at a URL; in the end nothing may have gone wrong in it, nor anything elsewhere.

    Args:
        browser: that shows it.
        url: of the server, which is all that it may ask.
        refusals: whether the server is to refuse anything.
        options: of the browser's context.
    """
    wrong: list[str] = []
    context = await browser.new_context(**options)
    page = await context.new_page()

    def asked(request: Request) -> None:
        if not request.url.startswith(f"{url}/"):
            wrong.append(f"asks {request.url}")

    page.on("request", asked)
    page.on("pageerror", lambda error: wrong.append(f"throws {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"shows {dialog.message}"))
    page.on(
        "console",
        lambda said: (
            wrong.append(f"says {said.text}")
            if said.type in ("error", "warning")
            and not (refusals and said.text.startswith(REFUSED))
            else None
        ),
    )
    await page.goto(f"{url}/")
    yield page
    await context.close()
    assert wrong == []
