"""Envoy's external processing (ext_proc): plain OpenAI requests routed by our decision."""
