"""Envoy's external processing (ext_proc): plain OpenAI requests routed by our decision.

processor   the stream that Envoy opens for each HTTP request, and what is decided on it
body        a request's JSON with another model's name in it; pure
answers     the messages that Envoy is answered with; pure
"""
