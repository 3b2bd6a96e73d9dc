"""bestroute: routes each prompt to the cheapest LLM and sample count that matches a reference LLM.

Nothing is re-exported here, so that a client (`bestroute.client`) or the exporter
(`bestroute.bundle`) loads neither ONNX Runtime nor the providers' libraries.
Start at `bestroute.router.Router` to embed, `bestroute.client` to call a running service.
"""

__version__ = "0.1.0"
