"""What a model's tokens cost: expected, for decisions, and after the fact, for accounting."""

from collections.abc import Sequence
from dataclasses import dataclass

from bestroute.config import ConfigInvalid, Provider, Settings, instead
from bestroute.manifest import Model
from bestroute.policy import InputBilling
from bestroute.upstream.usage import Usage

_SAMPLE_TOKENS = 1000
"""Priced to read a list price off genai-prices; few enough for the lowest tier of tiered prices."""


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """USD per million tokens of a model, and how often drawing n samples bills the prompt.

    Attributes:
        cached_input_usd_per_mtok: of prompt tokens that the provider had in its prompt cache; None:
            like all others.
    """

    input_usd_per_mtok: float
    output_usd_per_mtok: float
    billing: InputBilling
    cached_input_usd_per_mtok: float | None = None

    @property
    def cache_saves_usd_per_mtok(self) -> float:
        """What a prompt token costs less where the provider had it in its cache; at least 0."""
        cached, full = self.cached_input_usd_per_mtok, self.input_usd_per_mtok
        return 0.0 if cached is None else max(0.0, full - cached)


def prices(models: Sequence[Model], settings: Settings) -> dict[str, ModelPrice]:
    """Price the pool's models, by name.

    A price in the settings wins over genai-prices (asked by the provider's `price_id`, or by its
    `base_url`), which wins over the bundle's; what a cached prompt costs comes from the same place,
    and is what any other costs where that doesn't tell. A model that no provider serves keeps the
    bundle's price and is taken to bill every sample's prompt.

    Args:
        models: the bundle's pool.
        settings: its `models` and `providers` are read.

    Raises:
        ConfigInvalid: the settings name a model that the pool lacks, or one whose provider's
            price list doesn't know it.
    """
    pool = {model.name: model for model in models}
    for name in settings.models:
        if name not in pool:
            raise ConfigInvalid(f'[models."{name}"]: not in the bundle' + instead(name, [*pool]))
    return {name: _price(model, settings) for name, model in pool.items()}


def cost(usage: Usage, price: ModelPrice) -> float:
    """What tokens that were really used cost, in USD."""
    return (
        usage.input_tokens * price.input_usd_per_mtok
        - usage.cached_tokens * price.cache_saves_usd_per_mtok
        + usage.output_tokens * price.output_usd_per_mtok
    ) / 1e6


def _price(model: Model, settings: Settings) -> ModelPrice:
    served = settings.models.get(model.name)
    if served is None:
        return ModelPrice(
            model.input_usd_per_mtok, model.output_usd_per_mtok, InputBilling.PER_SAMPLE
        )
    provider = settings.providers[served.provider]
    if (own := served.price) is not None:
        per_mtok = own.input_usd_per_mtok, own.output_usd_per_mtok
        cached = own.cached_input_usd_per_mtok
    else:
        upstream = served.upstream or model.name
        listed, cached = _listed(upstream, provider) or (None, None)
        if listed is None and provider.price_id is not None:
            raise ConfigInvalid(
                f'[models."{model.name}"]: genai-prices has no price for "{upstream}" at '
                f'"{provider.price_id}"; set [models."{model.name}".price]'
            )
        per_mtok = listed or (model.input_usd_per_mtok, model.output_usd_per_mtok)
    return ModelPrice(*per_mtok, provider.billing, cached)


def _listed(upstream: str, provider: Provider) -> tuple[tuple[float, float], float] | None:
    """USD per million tokens, from the list inside genai-prices: input and output; cached input."""
    # Imported here: it takes 0.2 s, and only a server that serves models needs it.
    import genai_prices

    def price(cached: int) -> genai_prices.types.PriceCalculation:
        usage = genai_prices.Usage(
            input_tokens=_SAMPLE_TOKENS, cache_read_tokens=cached, output_tokens=_SAMPLE_TOKENS
        )
        if provider.price_id is not None:
            return genai_prices.calc_price(usage, upstream, provider_id=provider.price_id)
        url = str(provider.base_url)
        return genai_prices.calc_price(usage, upstream, provider_api_url=url)

    try:
        full, cached = price(0), price(_SAMPLE_TOKENS)
    except LookupError:
        return None
    per_mtok = 1_000_000 / _SAMPLE_TOKENS
    return (
        (float(full.input_price) * per_mtok, float(full.output_price) * per_mtok),
        float(cached.input_price) * per_mtok,
    )


def is_listed(upstream: str, provider: Provider) -> bool:
    """Whether genai-prices knows what a model costs at a provider, by its name there."""
    return _listed(upstream, provider) is not None
