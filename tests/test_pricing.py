"""Where a price comes from, and what used tokens cost."""

from typing import Any

import pytest

from bestroute.config import ConfigInvalid, Settings
from bestroute.manifest import Model
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice, cost, prices
from bestroute.upstream.usage import Usage

POOL = [
    Model(name="gpt-4o-mini", input_usd_per_mtok=1, output_usd_per_mtok=2, mean_output_tokens=9)
]
ONCE, PER_SAMPLE = InputBilling.ONCE, InputBilling.PER_SAMPLE
OVERRIDE = {"input_usd_per_mtok": 3, "output_usd_per_mtok": 4}


def settings(
    provider: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> Settings:
    return Settings.model_validate(
        {
            "providers": {"acme": {"base_url": "http://127.0.0.1/v1", **(provider or {})}},
            "models": {"gpt-4o-mini": {"provider": "acme", **(model or {})}},
        }
    )


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        pytest.param(Settings(), ModelPrice(1, 2, PER_SAMPLE), id="served-nowhere"),
        pytest.param(settings(), ModelPrice(1, 2, PER_SAMPLE), id="the-bundle's"),
        pytest.param(
            settings({"samples": "one_call"}), ModelPrice(1, 2, ONCE), id="billed-once-for-n"
        ),
        pytest.param(
            settings({"price_id": "openai"}), ModelPrice(0.15, 0.6, PER_SAMPLE), id="listed"
        ),
        pytest.param(
            settings({"base_url": "https://api.openai.com/v1"}),
            ModelPrice(0.15, 0.6, PER_SAMPLE),
            id="listed-by-the-provider's-url",
        ),
        pytest.param(
            settings({"base_url": "https://api.openai.com/v1"}, {"upstream": "no-such-model"}),
            ModelPrice(1, 2, PER_SAMPLE),
            id="the-bundle's-where-the-list-knows-no-such-model",
        ),
        pytest.param(
            settings({"price_id": "openai"}, {"upstream": "gpt-4o"}),
            ModelPrice(2.5, 10, PER_SAMPLE),
            id="listed-by-the-provider's-name",
        ),
        pytest.param(
            settings({"price_id": "openai"}, {"price": OVERRIDE}),
            ModelPrice(3, 4, PER_SAMPLE),
            id="configured",
        ),
    ],
)
def test_the_nearest_price_wins(configured: Settings, expected: ModelPrice) -> None:
    price = prices(POOL, configured)["gpt-4o-mini"]

    assert expected.billing == price.billing
    assert pytest.approx(expected.input_usd_per_mtok) == price.input_usd_per_mtok
    assert pytest.approx(expected.output_usd_per_mtok) == price.output_usd_per_mtok


@pytest.mark.parametrize(
    ("provider", "model"),
    [({"price_id": "openai"}, {"upstream": "no-such-model"}), ({"price_id": "nobody"}, {})],
)
def test_a_price_that_is_not_listed_has_to_be_set(
    provider: dict[str, Any], model: dict[str, Any]
) -> None:
    with pytest.raises(ConfigInvalid, match=r'set \[models."gpt-4o-mini".price\]'):
        prices(POOL, settings(provider, model))


def test_a_model_that_the_bundle_lacks_is_pointed_out() -> None:
    other = [model.model_copy(update={"name": "gpt-4o-maxi"}) for model in POOL]
    with pytest.raises(ConfigInvalid, match=r'"gpt-4o-mini".*did you mean "gpt-4o-maxi"\?'):
        prices(other, settings())


def test_used_tokens_cost_their_price() -> None:
    price = ModelPrice(input_usd_per_mtok=2, output_usd_per_mtok=10, billing=ONCE)

    assert pytest.approx(0.0012) == cost(Usage(100, 100), price)
    assert cost(Usage(), price) == 0
