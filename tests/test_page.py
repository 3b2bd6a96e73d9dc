"""The web page, in a real browser before a real server and real upstreams."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from bestroute.config import Settings
from bestroute.gateway.page_files import SECURITY
from bestroute.guard.keys import new_key
from tests.browsing import browsing, looking, needs_chromium
from tests.gateways import Asking, asking, pool
from tests.generating import DOWN, answers, by_model
from tests.upstreams import Call, Chunk, Upstream, Wire, finish, hangs, refused, text, usage

TIMES = "\N{MULTIPLICATION SIGN}"
MARKUP = "<img src=x onerror=alert(1)><script>document.title = 'taken'</script> good"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with browsing() as browser:
        yield browser


async def typed(page: Page, prompt: str) -> None:
    """A prompt, decided on."""
    await page.fill("#prompt", prompt)
    await expect(page.locator("#chart .dot.chosen")).to_have_count(1)


async def slide(page: Page, value: float) -> None:
    """As dragging does: the value changes, and the page is told."""
    await page.locator("#slider").fill(str(value))


def chosen(page: Page) -> Any:
    return expect(page.locator("#chart .dot.chosen"))


async def amounts(page: Page, figures: str) -> list[float]:
    """The exact amounts in a list of figures."""
    found = page.locator(f"{figures} data")
    values = [await found.nth(i).get_attribute("value") for i in range(await found.count())]
    return [float(value or "nan") for value in values]


async def decided(gateway: Asking, **question: Any) -> str:
    """What the API decides, as the chart names arms."""
    told = await gateway.post(question, "/bestroute/route", content_type="application/json")
    assert told.status == 200, told.body
    return f"{told.json['arm']['model']}:{told.json['arm']['samples']}"


@needs_chromium
async def test_the_arms_are_drawn_as_one_types_and_the_choice_follows_the_slider(
    trading_bundle: Path, browser: Browser
) -> None:
    settings = Settings.model_validate(
        {"bundle": trading_bundle, "server": {"listen": "127.0.0.1:0"}}
    )
    async with (
        asking(settings) as gateway,
        looking(browser, gateway.url, refusals=True) as page,
    ):
        await expect(page.locator("#bundle")).to_contain_text("tiny trading-1 · 3 models")
        await typed(page, "word1")
        await expect(page.locator("#chart .dot")).to_have_count(5)
        seen, lines = dict[str, str | None](), list[str | None]()
        for target, value in (
            ("max_quality_drop", 1),
            ("max_quality_drop", 0),
            ("max_quality_drop", 10),
            ("min_cost_saving", 30),
            ("match_threshold", 80),
        ):
            await page.check(f"input[value={target}]", force=True)
            await slide(page, value)
            wanted = await decided(gateway, prompt="word1", **{target: value / 100})
            await chosen(page).to_have_attribute("data-arm", wanted)
            model, _, samples = wanted.partition(":")
            await expect(page.locator("#decision strong")).to_have_text(
                f"{model} {TIMES} {samples}"
            )
            row = page.locator("#arms tr.chosen th")
            await expect(row).to_have_text(f"{model} {TIMES} {samples}")
            seen[f"{target} {value}"] = wanted
            lines.append(await page.locator("#chart .rule").get_attribute("points"))
        assert set(seen.values()) == {"medium:1", "large:1", "small:3", "medium:2"}
        assert len(set(lines)) > 2
        await expect(page.locator("#measured")).not_to_be_empty()

        await typed(page, "word1 better better")
        await page.hover("#chart .dot[data-arm='small:3']")
        told = (
            await gateway.post(
                {"prompt": "word1 better better"},
                "/bestroute/route",
                content_type="application/json",
            )
        ).json
        small = told["arms"][1]
        detail = page.locator("#detail")
        await expect(detail).to_contain_text(f"gain +{small['expected_gain']:.3f}")
        await expect(detail).to_contain_text("not served here")
        await page.fill("#prompt", " ")
        await expect(page.locator("#chart svg")).to_have_count(0)
        history = (await gateway.get("/bestroute/history")).json
        assert history["total"]["decisions"] == 0, "looking is no traffic"

        await page.fill("#prompt", "word1")
        await page.click("#generate")
        words = page.locator("#generate-error")
        await expect(words).to_contain_text('Add [models."large"] to the server')


def gated(*pieces: str, gate: asyncio.Event, tokens: int) -> Any:
    """An answer of which the first piece comes at once, and the others when the gate opens."""

    async def script(call: Call) -> AsyncIterator[Chunk]:
        yield text(pieces[0])
        await gate.wait()
        for piece in pieces[1:]:
            yield text(piece)
        yield finish()
        yield usage(10, tokens)

    return script


@needs_chromium
async def test_candidates_stream_side_by_side_and_the_reward_picks_one(
    trading_bundle: Path, upstream: Upstream, browser: Browser
) -> None:
    gate = asyncio.Event()
    upstream.scripts = [
        gated("bad", " bad", gate=gate, tokens=3),
        gated(MARKUP[:20], MARKUP[20:], " good", gate=gate, tokens=5),
    ]
    async with (
        asking(pool(trading_bundle, upstream.url)) as gateway,
        looking(browser, gateway.url) as page,
    ):
        await typed(page, "word1")
        await page.select_option("#arm", label=f"medium {TIMES} 2")
        await page.focus("#prompt")
        await page.keyboard.press("Control+Enter")
        columns = page.locator("#candidates .candidate")
        await expect(columns).to_have_count(2)
        await expect(columns.filter(has_text="bad")).to_have_count(1)
        await expect(columns.filter(has_text=MARKUP[:20])).to_have_count(1)
        await expect(columns.first).to_contain_text("writing")
        await expect(page.locator("#money")).to_be_hidden()
        gate.set()

        best = page.locator("#candidates .candidate.best")
        await expect(best).to_have_count(1)
        await expect(best.locator("pre")).to_have_text(MARKUP + " good")
        await expect(page.locator("#result")).to_contain_text("the highest reward")
        rewards = await amounts(page, ".reward")
        assert sorted(rewards)[0] == pytest.approx(-2)
        assert max(rewards) == pytest.approx((await amounts(page, ".best .reward"))[0])
        assert await page.locator("#candidates img, #candidates script").count() == 0
        assert await page.title() == "bestroute"

        cost, reference, saved = await amounts(page, "#money")
        assert cost == pytest.approx((20 * 0.5 + 8 * 2.5) / 1e6)
        assert saved == pytest.approx(reference - cost)
        assert sum(await amounts(page, "#candidates footer > span:last-child")) == (
            pytest.approx(cost)
        )

        await page.click("#to-savings")
        await expect(page.locator("#series .column")).to_have_count(1)
        spent, by_reference, difference, number = await amounts(page, "#totals")
        assert [spent, by_reference, difference] == pytest.approx([cost, reference, saved])
        assert number == 1
        upstream.scripts = [gated("good", gate=gate, tokens=2)]
        body = {"model": "bestroute/auto", "messages": [{"role": "user", "content": "word2"}]}
        assert (await gateway.post(body)).status == 200
        answered = page.locator("#totals dd.value data").last
        await expect(answered).to_have_attribute("value", "2")  # by itself
        await expect(page.locator("#shares .share")).to_have_count(1)
        await page.check("input[name=basis][value=decisions]", force=True)
        await expect(answered).to_have_attribute("value", "1")
        await page.check("input[name=hours][value='24']", force=True)
        await expect(page.locator("#series svg")).to_have_attribute(
            "aria-label", re.compile("20 min")
        )


@needs_chromium
async def test_failures_are_told_in_words_and_never_as_markup(
    trading_bundle: Path, wire: Wire, browser: Browser
) -> None:
    page_of_error = json.dumps({"error": {"message": f"no room {MARKUP}"}}).encode()
    tries = iter([refused(429, b"busy", Retry_After="0"), DOWN, DOWN, DOWN])
    wire.reply = lambda request: (
        answers("good") if request["model"] == "large" else next(tries, DOWN)
    )
    async with (
        asking(pool(trading_bundle, wire.url, max_retries=1)) as gateway,
        looking(browser, gateway.url, refusals=True) as page,
    ):
        await expect(page.locator("#arm option")).to_have_count(6)
        await page.fill("#prompt", "word1")
        await page.select_option("#arm", label=f"medium {TIMES} 1")
        await page.click("#generate")
        await expect(page.locator("#result")).to_contain_text("Answer 2 is given, by large")
        events = page.locator("#events")
        await expect(events).to_contain_text("medium: attempt 1 failed")
        await expect(events).to_contain_text("medium gave no answer")
        await expect(events).to_contain_text("large is asked instead")
        await expect(page.locator(".candidate.failed .mark")).to_have_text("failed")

        by_model(wire, small=DOWN, medium=DOWN, large=refused(400, page_of_error))
        await page.click("#generate")
        error = page.locator("#generate-error")
        await expect(error).to_contain_text(f"no room {MARKUP}")
        assert await page.locator("img[src=x], main script").count() == 0

        by_model(wire, small=answers("bad bad"), large=answers("good"))
        await page.select_option("#arm", label=f"small {TIMES} 1")
        await page.check("#escalate")
        await page.click("#generate")
        result = page.locator("#result")
        await expect(result).to_contain_text("did not convince, so the reference was asked too")
        await expect(page.locator(".candidate.best header")).to_contain_text("large")
        await expect(error).to_be_empty()

        await page.select_option("#arm", "")
        await page.evaluate("document.getElementById('slider').max = 1000")
        await slide(page, 200)
        decide = page.locator("#decide-error")
        await expect(decide).to_have_text("max_quality_drop: must be in [0, 1], got 2")
        await slide(page, 5)
        await expect(decide).to_be_empty()


@needs_chromium
async def test_it_says_why_a_decision_is_not_the_best_arm(
    trading_bundle: Path, wire: Wire, browser: Browser
) -> None:
    settings = pool(trading_bundle, wire.url)
    async with (
        asking(settings, operations={"shadow": True}) as gateway,
        looking(browser, gateway.url) as page,
    ):
        await typed(page, "word1")
        told = page.locator("#decision")
        await expect(told).to_contain_text("shadow mode")
        await expect(told).to_contain_text(f"it would ask medium {TIMES} 1. Ask large")
        await chosen(page).to_have_attribute("data-arm", "large:1")
        await page.fill("#prompt", "broken")
        await expect(told).to_contain_text("The router has failed")
        await expect(page.locator("#chart svg")).to_have_count(0)
    assert wire.bodies == []


@needs_chromium
async def test_whoever_stops_or_leaves_is_not_answered_any_more(
    trading_bundle: Path, upstream: Upstream, browser: Browser
) -> None:
    upstream.scripts = [hangs("good"), hangs("good")]
    async with asking(pool(trading_bundle, upstream.url)) as gateway:
        async with looking(browser, gateway.url) as page:
            await typed(page, "word1")
            await page.click("#generate")
            await expect(page.locator(".candidate pre")).to_have_text("good")
            await page.click("#stop")
            await expect(page.locator("#generate-error")).to_contain_text("Stopped")
            await upstream.calls[0].left.wait()
            await page.click("#generate")
            await expect(page.locator(".candidate pre")).to_have_text("good")
        await upstream.calls[1].left.wait()
        assert upstream.under_way == 0


@needs_chromium
async def test_with_keys_the_page_asks_for_one_and_keeps_it_in_its_tab(
    trading_bundle: Path, wire: Wire, tmp_path: Path, browser: Browser
) -> None:
    wire.replies = [answers("good")]
    key, line = new_key("alice")
    (tmp_path / "keys.toml").write_text(line)
    async with asking(
        pool(trading_bundle, wire.url), security={"api_keys_file": tmp_path / "keys.toml"}
    ) as gateway:
        for refused_path in ("/bestroute/pool", "/bestroute/history"):
            assert (await gateway.get(refused_path)).status == 401
        for refused_path in ("/bestroute/route", "/bestroute/generate"):
            told = await gateway.post({"prompt": "word1"}, refused_path)
            assert told.status == 401
        async with looking(browser, gateway.url, refusals=True) as page:
            field = page.get_by_label("API key")
            await expect(field).to_be_focused()
            await field.fill("br-wrong")
            await field.press("Enter")
            await expect(page.locator("#key-error")).not_to_be_empty()
            await field.fill(key)
            await field.press("Enter")
            await expect(page.locator("#key-form")).to_be_hidden()
            await typed(page, "word1")
            await page.click("#generate")
            await expect(page.locator(".candidate.best")).to_have_count(1)
            await page.reload()
            await typed(page, "word1")
            await expect(page.locator("#key-form")).to_be_hidden()
            assert await page.context.cookies() == []
            assert await page.evaluate("localStorage.length") == 0
            assert key not in page.url
            assert key not in await page.content()
        async with looking(browser, gateway.url, refusals=True) as page:
            await expect(page.locator("#key-form")).to_be_visible()


@needs_chromium
async def test_it_fits_a_phone_follows_the_scheme_and_takes_a_keyboard(
    trading_bundle: Path, wire: Wire, browser: Browser
) -> None:
    wire.replies = [answers("word1" * 200)]
    backgrounds = []
    async with asking(pool(trading_bundle, wire.url)) as gateway:
        for scheme in ("light", "dark"):
            async with looking(
                browser,
                gateway.url,
                viewport={"width": 360, "height": 740},
                color_scheme=scheme,
                reduced_motion="reduce",
            ) as page:
                await page.focus("#prompt")
                await page.keyboard.type("word1 " * 20)
                await chosen(page).to_have_count(1)
                await page.keyboard.press("Tab")
                await page.keyboard.press("Tab")
                await expect(page.locator("#slider")).to_be_focused()
                before = await page.locator("#chart .rule").get_attribute("points")
                await page.keyboard.press("End")
                rule = page.locator("#chart .rule")
                await expect(rule).not_to_have_attribute("points", before or "")
                await page.focus("#chart .dot.chosen")
                await page.keyboard.press("ArrowRight")
                focused = page.locator("#chart .dot:focus")
                label = await focused.get_attribute("aria-label") or ""
                assert label.startswith((await focused.get_attribute("data-arm") or "")[:5])
                await expect(page.locator("#detail")).to_have_text(label)
                await page.keyboard.press("Enter")
                assert json.loads(await page.input_value("#arm"))
                await page.focus("#prompt")
                await page.keyboard.press("Control+Enter")
                await expect(page.locator("#money")).to_be_visible()
                await page.click("summary >> nth=0")
                widths = [await _overflow(page)]
                await page.click("#to-savings")
                await expect(page.locator("#series .column")).to_have_count(1)
                widths.append(await _overflow(page))
                assert widths == [[], []]
                backgrounds.append(
                    await page.evaluate("getComputedStyle(document.body).backgroundColor")
                )
    light, dark = (sum(map(int, each[4:-1].split(","))) for each in backgrounds)
    assert light > 600
    assert dark < 150


async def _overflow(page: Page) -> list[str]:
    """What is wider than the window, or than the card that it is on."""
    found: list[str] = await page.evaluate(
        """() => {
            const root = document.documentElement;
            const wide = root.scrollWidth > root.clientWidth ? ["the page"] : [];
            for (const card of document.querySelectorAll(".card, .notice, .candidate")) {
                const { right } = card.getBoundingClientRect();
                for (const node of card.querySelectorAll("*")) {
                    if (node.closest(".wide, .unseen")) continue;
                    if (node.getBoundingClientRect().right > right) {
                        wide.push(node.outerHTML.slice(0, 80));
                    }
                }
            }
            return wide;
        }"""
    )
    return found


async def test_only_its_own_page_may_ask(trading_bundle: Path, wire: Wire) -> None:
    wire.replies = [answers("good")]
    question = {"prompt": "word1"}
    json_type = {"content_type": "application/json"}
    async with asking(pool(trading_bundle, wire.url)) as gateway:
        host = gateway.url.removeprefix("http://")
        for path in ("/bestroute/route", "/bestroute/generate"):

            async def status(path: str = path, **headers: str) -> int:
                return (await gateway.post(question, path, **headers)).status

            assert await status(content_type="text/plain") == 400
            assert await status(content_type="application/x-www-form-urlencoded") == 400
            assert await status(**json_type, origin="https://evil.example") == 403
            assert await status(**json_type, origin="null") == 403
            assert await status(**json_type, sec_fetch_site="cross-site") == 403
            assert await status(**json_type, sec_fetch_site="same-site") == 403
            assert await status(**json_type, origin=f"http://{host}") == 200
            assert await status(**json_type, sec_fetch_site="same-origin") == 200
            assert await status(**json_type) == 200
        preflight = await gateway.session.options(f"{gateway.url}/bestroute/route")
        async with preflight:
            assert preflight.status == 404
            assert not any("access-control" in name.lower() for name in preflight.headers)


async def test_files_and_answers_say_how_browsers_are_to_take_them(
    trading_bundle: Path, wire: Wire
) -> None:
    wire.replies = [answers("good")]
    async with asking(pool(trading_bundle, wire.url)) as gateway:
        index = await gateway.get("/")
        names = [
            part.partition('"')[0].removeprefix("static/")
            for part in index.body.decode().split('="')
            if part.startswith("static/")
        ]
        assert {"app.js", "style.css", "icon.svg"} <= {*names}
        for path in ("/", *(f"/static/{name}" for name in names)):
            found = await gateway.get(path)
            assert found.status == 200
            assert found.headers.items() >= {k.lower(): v for k, v in SECURITY.items()}.items()
            assert found.headers["cache-control"] == "no-cache"
            tagged = {"If-None-Match": found.headers["etag"]}
            async with gateway.session.get(gateway.url + path, headers=tagged) as again:
                assert (again.status, await again.read()) == (304, b"")
        for text_of_it in ("<script>", "style=", "http://", "https://", "onclick="):
            assert text_of_it not in index.body.decode()
        answered = [
            await gateway.get("/bestroute/pool"),
            await gateway.get("/bestroute/history?hours=99"),
            await gateway.post({"prompt": "word1"}, "/bestroute/generate", content_type="text/x"),
            await gateway.post(
                {"prompt": "word1"}, "/bestroute/generate", content_type="application/json"
            ),
        ]
        assert [each.status for each in answered] == [200, 400, 400, 200]
        assert all(each.headers["x-content-type-options"] == "nosniff" for each in answered)
        for nowhere in ("/static/nothing.js", "/static/../page.py", "/static/%2e%2e%2fpage.py"):
            assert (await gateway.get(nowhere)).status == 404


@pytest.mark.parametrize(
    ("question", "field"),
    [
        (b"not JSON", "body"),
        (b"[" * 100_000, "body"),
        ({}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x" * 200_000}, "prompt"),
        ({"prompt": "x", "promt": 1}, "promt"),
        ({"prompt": "x", "max_quality_drop": "1"}, "max_quality_drop"),
        ({"prompt": "x", "max_quality_drop": True}, "max_quality_drop"),
        ({"prompt": "x", "max_quality_drop": 2}, "max_quality_drop"),
        (b'{"prompt": "x", "max_quality_drop": NaN}', "max_quality_drop"),
        ({"prompt": "x", "min_cost_saving": 0.99}, "min_cost_saving"),
        ({"prompt": "x", "min_cost_saving": 0.1, "match_threshold": 0.5}, "match_threshold"),
        ({"prompt": "x", "escalate": 1}, "escalate"),
        ({"prompt": "x", "arm": "medium"}, "arm"),
        ({"prompt": "x", "arm": {"model": "medium", "samples": 0}}, "arm.samples"),
        ({"prompt": "x", "arm": {"model": "none", "samples": 1}}, "model"),
    ],
)
async def test_what_is_wrong_is_named(
    trading_bundle: Path, wire: Wire, question: Any, field: str
) -> None:
    async with asking(pool(trading_bundle, wire.url)) as gateway:
        told = await gateway.post(question, "/bestroute/generate", content_type="application/json")
        assert told.status == 400
        assert told.error["message"].startswith(f"{field}: ")
    assert wire.bodies == []


async def test_networks_that_fail_and_halves_of_characters_do_no_harm(
    trading_bundle: Path, wire: Wire
) -> None:
    wire.replies = [answers("broken")]
    async with asking(pool(trading_bundle, wire.url)) as gateway:
        headers = {"content_type": "application/json"}
        route = await gateway.post({"prompt": "broken"}, "/bestroute/route", **headers)
        assert route.json["fallback"] is not None
        assert "NaN" not in route.body.decode()
        arm = {"model": "small", "samples": 2}
        drawn = await gateway.post(
            {"prompt": "word1", "arm": arm}, "/bestroute/generate", **headers
        )
        events = [json.loads(e[6:]) for e in drawn.body.decode().split("\n\n") if e]
        assert [*events[0]] == ["decision"]
        rewards = [e["candidate"]["reward"] for e in events if "candidate" in e]
        assert rewards == [None, None]
        half = await gateway.post(b'{"prompt": "word1 \\ud800"}', "/bestroute/route", **headers)
        assert half.status == 200


async def test_it_can_be_turned_off(trading_bundle: Path, wire: Wire) -> None:
    wire.replies = [answers("good")]
    async with asking(pool(trading_bundle, wire.url), gateway={"page": False}) as gateway:
        for path in ("/", "/static/app.js", "/bestroute/pool", "/bestroute/history"):
            assert (await gateway.get(path)).status == 404
        for path in ("/bestroute/route", "/bestroute/generate"):
            told = await gateway.post({"prompt": "x"}, path, content_type="application/json")
            assert told.status == 404
        assert (await gateway.get("/v1/models")).status == 200


async def test_callers_limits_hold_for_the_page(trading_bundle: Path, wire: Wire) -> None:
    limits = {"default": {"requests_per_second": 1, "burst": 1}}
    async with asking(pool(trading_bundle, wire.url), callers=limits) as gateway:
        asked = [
            await gateway.post(
                {"prompt": "word1"}, "/bestroute/route", content_type="application/json"
            )
            for _ in range(3)
        ]
        assert asked[0].status == 200
        assert asked[-1].status == 429
        assert asked[-1].error["code"] == "rate_limit_exceeded"
