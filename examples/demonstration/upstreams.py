"""Who answers for the models of a pool: real providers where there is a key, else a stand-in."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

STANDIN = "stand-in"
STANDIN_LLM = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Api:
    """A real provider: where it is, the variable with its key, and its names for pool models."""

    base_url: str
    key: str
    models: Mapping[str, str]


# The first one that has a key and knows the model serves it.
APIS = {
    "anthropic": Api(
        "https://api.anthropic.com/v1",
        "ANTHROPIC_API_KEY",
        {
            "claude-sonnet-4": "claude-sonnet-4-0",
            "claude-3.5-sonnet": "claude-3-5-sonnet-latest",
        },
    ),
    "openrouter": Api(
        "https://openrouter.ai/api/v1",
        "OPENROUTER_API_KEY",
        {
            "claude-sonnet-4": "anthropic/claude-sonnet-4",
            "claude-3.5-sonnet": "anthropic/claude-3.5-sonnet",
            "gemma-3-27b": "google/gemma-3-27b-it",
            "llama-3.3-70b": "meta-llama/llama-3.3-70b-instruct",
            "llama-4-maverick": "meta-llama/llama-4-maverick",
            "llama-4-scout": "meta-llama/llama-4-scout",
            "mistral-small-3.1-24b": "mistralai/mistral-small-3.1-24b-instruct",
        },
    ),
}


def answering(models: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Who answers for each model: the name of a real API whose key is set, else the stand-in."""
    return {
        model: next(
            (
                name
                for name, api in APIS.items()
                if environment.get(api.key) and model in api.models
            ),
            STANDIN,
        )
        for model in models
    }


def configuration(who: Mapping[str, str], standin_url: str) -> str:
    """The server's configuration, as TOML.

    Args:
        who: what `answering` gave.
        standin_url: base URL of the stand-in. It costs what the model costs that it stands in for,
            because no price list knows it, and then the bundle's prices hold.
    """
    lines = []
    for name in dict.fromkeys(who.values()):
        lines.append(f"[providers.{name}]")
        if name == STANDIN:
            lines.append(f"base_url = {json.dumps(standin_url)}")
        else:
            lines.append(f"base_url = {json.dumps(APIS[name].base_url)}")
            lines.append(f"api_key_env = {json.dumps(APIS[name].key)}")
    for model, name in who.items():
        lines.append(f"[models.{json.dumps(model)}]")
        lines.append(f"provider = {json.dumps(name)}")
        if name != STANDIN:
            lines.append(f"upstream = {json.dumps(APIS[name].models[model])}")
    return "\n".join(lines) + "\n"
