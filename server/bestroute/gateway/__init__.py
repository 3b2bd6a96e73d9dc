"""OpenAI-compatible HTTP API over the same router: chat completions, models, the web page."""
