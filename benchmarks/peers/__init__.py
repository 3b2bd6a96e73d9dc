"""Servers that one would use instead of bestroute, all with the same network.

One module per server, each a program: `python -m benchmarks.peers.NAME` serves until it is stopped.
It says at its top what it is, what it needs installed, and how it is set up and why. What to serve
comes as environment variables, see `benchmarks.peers.model` and `benchmarks.peers.running`.
"""
