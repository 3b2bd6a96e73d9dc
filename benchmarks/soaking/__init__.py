"""What `benchmarks.soak` puts around a server: networks, LLMs and callers that misbehave."""
