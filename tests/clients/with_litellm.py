"""Calls by LiteLLM; only api_base and the models' names are ours."""

# As manuals write it, without types.
# mypy: ignore-errors

import asyncio
import json
import sys

import litellm
from litellm import acompletion, completion

HOW = {"model": "openai/bestroute/auto", "api_base": sys.argv[1], "api_key": "any"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
EASY = [{"role": "user", "content": "easy"}]
found = {}

answer = completion(messages=EASY, **HOW)
found["whole"] = answer.choices[0].message.content
found["block"] = answer.usage.bestroute

response = completion(messages=EASY, stream=True, **HOW)
found["streamed"] = "".join(part.choices[0].delta.content or "" for part in response)

word = [{"role": "user", "content": "word1"}]
chunks = list(completion(messages=word, stream=True, **HOW))
found["best of three"] = litellm.stream_chunk_builder(chunks).choices[0].message.content

asks = [{"role": "user", "content": "easy weather?"}]
# Else LiteLLM looks for tools of MCP servers first, for which it needs one more package, mcp.
called = completion(messages=asks, tools=TOOLS, _skip_mcp_handler=True, **HOW).choices[0].message
[tool_call] = called.tool_calls
found["tool"] = [tool_call.function.name, json.loads(tool_call.function.arguments)]


async def main() -> None:
    """The same, asynchronously."""
    response = await acompletion(messages=EASY, stream=True, **HOW)
    found["async"] = "".join([part.choices[0].delta.content or "" async for part in response])


asyncio.run(main())
print(json.dumps(found))
