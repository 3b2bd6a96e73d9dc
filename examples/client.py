"""Asks a running service (`bestroute serve`) which LLM should answer a few prompts.

    python examples/client.py [HOST:PORT]

Without a service it prints the fallback, as a program in production would use it.
"""

import asyncio
import sys

from bestroute.client import Client

PROMPTS = ("What is 2 + 2?", "Prove that there are infinitely many primes.")


async def main(address: str = "127.0.0.1:50051") -> None:
    """Decide about all prompts at once, on one stream."""
    async with Client(address, fallback_model="gpt-4o") as client, client.stream() as stream:
        decisions = await asyncio.gather(*(stream.route(prompt) for prompt in PROMPTS))
    for prompt, decision in zip(PROMPTS, decisions, strict=True):
        print(f"{decision.arm.model} x {decision.arm.samples}: {prompt}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
