"""Everything that can be set, as one frozen `Settings`; the only reader of the environment.

Flags win over the environment, the environment over the file, the file over the defaults.
In the environment `BESTROUTE_SERVER__LISTEN` is the file's `[server] listen`.
examples/bestroute.toml shows every key with its meaning.

    settings        Settings, and how it is read
    server          [server]
    security        [security] and [callers]
    inference       [engine], [batching], [routing]
    upstream        [providers] and [models]
    observability   [metrics] and [tracing]
    traffic         [decision_log]
    base            what all of them share
"""

from bestroute.config.base import ConfigInvalid, Count, Delay, Seconds, Section, Usd, instead
from bestroute.config.inference import Batching, Engine, Routing
from bestroute.config.observability import Metrics, Tracing
from bestroute.config.security import CallerLimits, Security
from bestroute.config.server import Server
from bestroute.config.settings import Settings
from bestroute.config.traffic import DecisionLog
from bestroute.config.upstream import Price, Provider, ServedModel

__all__ = [
    "Batching",
    "CallerLimits",
    "ConfigInvalid",
    "Count",
    "DecisionLog",
    "Delay",
    "Engine",
    "Metrics",
    "Price",
    "Provider",
    "Routing",
    "Seconds",
    "Section",
    "Security",
    "ServedModel",
    "Server",
    "Settings",
    "Tracing",
    "Usd",
    "instead",
]
