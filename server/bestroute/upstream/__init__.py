"""LLMs behind OpenAI-compatible HTTP APIs: what is asked of them, what comes back, what goes wrong.

providers     draws samples from them
api           one of them: keys, places, retries
telemetry     what is told of each call: counts, traces
chat          one chat completion over HTTP: what is sent, how long is waited
sse           server-sent events out of bytes
relay         a caller's own request passed on, and the answer as it comes
heard         what such an answer says of itself
whole_events  server-sent events with all their bytes
whole_answers an answer in one piece as the chunk of a stream
completion    what the stream of one chat completion says
usage         what it used, as far as that can be believed
failures      what goes wrong, and what follows from it
retries       when a call is made again, and how often at most
breaker       when a model is left alone for a while
counts        what has happened at a provider
"""
