"""Generated protocol buffer code for `bestroute.mesh.v1`; made by proto/generate.py."""
