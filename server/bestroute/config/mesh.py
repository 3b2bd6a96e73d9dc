"""Settings for service meshes."""

from bestroute.config.base import Seconds, Section


class Mesh(Section):
    """What proxies are told and asked.

    Attributes:
        load_reports: send a load report (ORCA) with the end of every call, and on a stream to those
            who ask for one, for balancers that weigh by it.
        external_processing: serve Envoy's ext_proc as well, on the same port: plain OpenAI requests
            that pass through an Envoy are then routed by our decision.
        fail_open: where such a request can't be decided, send it to the reference; otherwise it is
            answered 503.
        decision_timeout: seconds until a decision has failed, counted from the end of the request's
            body. Below the `message_timeout` of Envoy's filter, which has its own way to fail.
    """

    load_reports: bool = False
    external_processing: bool = False
    fail_open: bool = True
    decision_timeout: Seconds = 0.15
