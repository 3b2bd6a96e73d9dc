"""Calls by the `openai` package; only base_url and the models' names are ours."""

# As manuals write it, without types.
# mypy: ignore-errors

import asyncio
import json
import sys

from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

BASE_URL = sys.argv[1]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
found = {}

client = OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)

completion = client.chat.completions.create(
    model="bestroute/auto", messages=[{"role": "user", "content": "easy"}]
)
found["whole"] = completion.choices[0].message.content
found["block"] = completion.usage.bestroute

stream = client.chat.completions.create(
    model="bestroute/auto", messages=[{"role": "user", "content": "easy"}], stream=True
)
found["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

stream = client.chat.completions.create(
    model="bestroute/match-0.5",
    messages=[{"role": "user", "content": "word1"}],
    stream=True,
    stream_options={"include_usage": True},
)
chunks = list(stream)
found["best of three"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
found["samples"] = chunks[-1].usage.bestroute["samples"]

messages = [{"role": "user", "content": "easy weather?"}]
with client.chat.completions.stream(
    model="bestroute/auto", messages=messages, tools=TOOLS
) as streaming:
    called = streaming.get_final_completion().choices[0].message
[tool_call] = called.tool_calls
found["tool"] = [tool_call.function.name, json.loads(tool_call.function.arguments)]
messages += [called, {"role": "tool", "tool_call_id": tool_call.id, "content": "sunny"}]
answer = client.chat.completions.create(model="bestroute/auto", messages=messages, tools=TOOLS)
found["after the tool"] = answer.choices[0].message.content

picture = client.chat.completions.create(
    model="bestroute/auto",
    messages=[{"role": "user", "content": [{"type": "text", "text": "easy"}, IMAGE]}],
)
found["picture"] = picture.choices[0].message.content

raw = client.chat.completions.with_raw_response.create(
    model="small", messages=[{"role": "user", "content": "easy"}]
)
found["model"] = raw.headers["x-bestroute-model"]
found["models"] = [model.id for model in client.models.list()]
found["one"] = client.models.retrieve("bestroute/auto").id
try:
    client.chat.completions.create(model="smal", messages=[{"role": "user", "content": "easy"}])
except NotFoundError as error:
    found["no such model"] = [error.code, error.param]
try:
    client.chat.completions.create(model="small", messages=[])
except BadRequestError as error:
    found["no messages"] = error.type


async def main() -> None:
    """The same, asynchronously."""
    async with AsyncOpenAI(base_url=BASE_URL, api_key="any") as client:
        stream = await client.chat.completions.create(
            model="bestroute/auto", messages=[{"role": "user", "content": "easy"}], stream=True
        )
        found["async"] = "".join([c.choices[0].delta.content or "" async for c in stream])


asyncio.run(main())
print(json.dumps(found))
