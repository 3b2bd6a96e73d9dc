"""Gathers what a router is trained on: sampled answers of LLMs, and grades of those answers."""
