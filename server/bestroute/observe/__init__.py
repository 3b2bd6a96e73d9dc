"""What the service tells about itself.

telemetry     the one place that handlers report to
"""
