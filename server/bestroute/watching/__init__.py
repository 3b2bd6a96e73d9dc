"""`bestroute.v1.OperationsService`: what the server is doing now, for `bestroute top`."""
