"""Settings for service meshes."""

from bestroute.config.base import Section


class Mesh(Section):
    """What proxies are told and asked.

    Attributes:
        load_reports: send a load report (ORCA) with every response, for balancers that weigh by it.
        external_processing: serve Envoy's ext_proc as well, on the same port: plain OpenAI requests
            that pass through an Envoy are then routed by our decision.
    """

    load_reports: bool = False
    external_processing: bool = False
