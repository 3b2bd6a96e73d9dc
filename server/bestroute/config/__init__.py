"""Everything that can be set, as one frozen `Settings`; the only reader of the environment.

Flags win over the environment, the environment over the file, the file over the defaults.
In the environment `BESTROUTE_SERVER__LISTEN` is the file's `[server] listen`.
examples/bestroute.toml shows every key with its meaning.

    settings        Settings, and how it is read
    server          [server]
    gateway         [gateway]
    mesh            [mesh]
    security        [security] and [callers]
    inference       [engine], [batching], [routing]
    sessions        [sessions]
    operations      [operations] and [canary]
    upstream        [providers] and [models]
    observability   [metrics] and [tracing]
    traffic         [decision_log]
    base            what all of them share
"""

from bestroute.config.base import ConfigInvalid, Count, Delay, Seconds, Section, Usd, instead
from bestroute.config.gateway import Gateway
from bestroute.config.inference import Batching, Engine, Routing
from bestroute.config.mesh import Mesh
from bestroute.config.observability import Metrics, Tracing
from bestroute.config.operations import Canary, Operations
from bestroute.config.security import CallerLimits, Security
from bestroute.config.server import Server
from bestroute.config.sessions import Sessions
from bestroute.config.settings import Settings, strays
from bestroute.config.traffic import DecisionLog
from bestroute.config.upstream import Price, Provider, ServedModel

__all__ = [
    "Batching",
    "CallerLimits",
    "Canary",
    "ConfigInvalid",
    "Count",
    "DecisionLog",
    "Delay",
    "Engine",
    "Gateway",
    "Mesh",
    "Metrics",
    "Operations",
    "Price",
    "Provider",
    "Routing",
    "Seconds",
    "Section",
    "Security",
    "ServedModel",
    "Server",
    "Sessions",
    "Settings",
    "Tracing",
    "Usd",
    "instead",
    "strays",
]
