"""Generated protocol buffer code for `bestroute.kserve.v2`; made by proto/generate.py."""
