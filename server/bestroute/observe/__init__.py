"""What the service tells about itself.

telemetry       the one place that handlers report to
metrics         what is counted request by request
histogram       in plain lists
history         what was decided, spent and saved in the last day
snapshots       what the router, providers and traffic count themselves
families        both as Prometheus's metric families
exposition      served over HTTP
tracing         which requests are traced
spans           their spans, by OpenTelemetry
trace_context   what a request says of its caller's trace
logs            lines on stderr, for people or machines
"""
