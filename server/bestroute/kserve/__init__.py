"""The networks on a KServe-v2 server, such as Triton, in place of ONNX Runtime in this process.

`engine` runs batches there and finds the server lost and back, `model` is one model of it: what it
takes and gives, and the calls. Their messages are in `v2`. Needs no ONNX Runtime.
"""
