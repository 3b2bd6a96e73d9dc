"""Generated protocol buffer and gRPC code for `bestroute.v1`; made by proto/generate.py."""
