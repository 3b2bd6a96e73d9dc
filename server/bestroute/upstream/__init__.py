"""LLMs behind OpenAI-compatible HTTP APIs: what is asked of them, what comes back, what goes wrong.

providers     draws samples: connections, keys, places, cancellation
completion    what the stream of one chat completion says
"""
