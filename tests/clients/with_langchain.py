"""Calls by LangChain; only base_url and the models' names are ours."""

# As manuals write it, without types.
# mypy: ignore-errors

import asyncio
import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

found = {}


@tool
def get_weather(city: str) -> str:
    """Say what the weather is like."""
    return "sunny"


class Weather(BaseModel):
    """What the weather is like."""

    city: str
    sunny: bool


llm = ChatOpenAI(base_url=sys.argv[1], api_key="any", model="bestroute/auto", max_retries=0)

answer = llm.invoke("easy")
found["whole"] = answer.content
found["block"] = answer.response_metadata["token_usage"]["bestroute"]
found["tokens"] = answer.usage_metadata["total_tokens"]
found["streamed"] = "".join(chunk.content for chunk in llm.stream("easy"))
found["best of three"] = "".join(chunk.content for chunk in llm.stream("word1"))

with_tools = llm.bind_tools([get_weather])
messages = [HumanMessage("easy weather?")]
called = with_tools.invoke(messages)
[call] = called.tool_calls
found["tool"] = [call["name"], call["args"]]
messages += [called, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
found["after the tool"] = with_tools.invoke(messages).content
streamed = None
for chunk in with_tools.stream("easy weather?"):
    streamed = chunk if streamed is None else streamed + chunk
found["tool streamed"] = streamed.tool_calls[0]["args"]

found["structured"] = llm.with_structured_output(Weather).invoke("easy weather?").model_dump()


async def main() -> None:
    """The same, asynchronously."""
    found["async"] = "".join([chunk.content async for chunk in llm.astream("easy")])


asyncio.run(main())
print(json.dumps(found))
