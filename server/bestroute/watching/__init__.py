"""`bestroute.v1.OperationsService`: what the server is doing now, for `bestroute top`.

service    the RPCs
status     how things stand, as a message
"""
