"""Execution providers of ONNX Runtime: their options, sessions on them, and whether they work here.

ONNX Runtime goes on without a word on the CPU where a provider doesn't load, and once more where
one fails in a run. Here both are errors: a GPU server on its CPU is a hundred times too slow.
"""

import ctypes
import hashlib
import os
import textwrap
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from bestroute.config import ConfigInvalid
from bestroute.config import Engine as EngineSettings
from bestroute.errors import BundleInvalid

# From 1.29 on, ONNX Runtime reports its use to its maker unless this is set before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 - written, not read

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise ConfigInvalid(
        "ONNX Runtime is not installed; install exactly one of: "
        "pip install 'bestroute[cpu]'  or  pip install 'bestroute[gpu]'"
    ) from error

# Of a provider that doesn't load it would log half a page; `fault` says in one line what is wrong.
ort.set_default_logger_severity(4)

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's names of what `engine.provider` may be."""

Options = list[tuple[str, dict[str, str]]]
"""Providers by falling precedence, each with its options."""

_NEEDS = {
    "cpu": "'bestroute[cpu]', installed anew",
    "cuda": "an NVIDIA driver and 'bestroute[gpu]'",
    "tensorrt": "an NVIDIA driver and 'bestroute[gpu,tensorrt]', the directory tensorrt_libs on "
    "LD_LIBRARY_PATH",
}

# The ONNX model y = MatMul(x, x), float32 [2, 2]: enough for a provider to need all its libraries.
_PROBE = (
    b'\x08\x08:D\n\x11\n\x01x\n\x01x\x12\x01y"\x06MatMul\x12\x05probe'
    b"Z\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x02\n\x02\x08\x02"
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x02\n\x02\x08\x02B\x04\n\x00\x10\x11"
)
_loading = Lock()


def fault(provider: str) -> str | None:
    """Why a provider doesn't work on this machine, proven by running a small network on it.

    Args:
        provider: a key of `PROVIDERS`.

    Returns:
        One line that says what to install; None if it works.
    """
    name = PROVIDERS[provider]
    if name not in ort.get_available_providers():
        return (
            "this ONNX Runtime is built without it; "
            "install 'bestroute[gpu]' without onnxruntime beside it"
        )
    reason = None
    try:
        session = _session(_PROBE, provider, provider_options(provider, {}), 1)
        if session.get_providers()[0] == name:
            values = np.array([[1, 2], [3, 4]], dtype=np.float32)
            (product,) = session.run(None, {"x": values})
            return None if np.array_equal(product, values @ values) else "it multiplies wrongly"
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        reason = textwrap.shorten(str(error), 300)
    reason = _unloadable(provider) or reason or "it did not load"
    return f"{reason}; it needs {_NEEDS[provider]}"


def open_session(
    path: Path, settings: EngineSettings, *, max_items: int, max_tokens: int, threads: int
) -> Any:
    """A session of ONNX Runtime that runs a network on the configured provider, and on no other.

    Args:
        path: the ONNX file; inputs as in `bestroute.engine.Engine`.
        settings: provider and cache.
        max_items: largest B.
        max_tokens: longest T.
        threads: of one run, as far as it is computed on the CPU.

    Raises:
        BundleInvalid: the file is no network that the provider can run.
        ConfigInvalid: the provider doesn't work here, or the cache can't be written.
    """
    provider = settings.provider
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise _unusable(provider, fault(provider))
    extra = {}
    if provider == "tensorrt":
        cache = settings.cache and engine_cache(settings.cache, path, max_items, max_tokens)
        extra = tensorrt_options(max_items, max_tokens, cache)
    try:
        # As bytes: with a path, weights in further files would be read, which have no digests.
        network = path.read_bytes()
        session = _session(network, provider, provider_options(provider, extra), threads)
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        if reason := fault(provider):
            raise _unusable(provider, reason) from error
        raise BundleInvalid(f"{path} can't be loaded: {error}") from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise _unusable(provider, fault(provider))
    return session


def placement(session: Any) -> Counter[str]:
    """How many of a network's nodes run on which provider; ONNX Runtime 1.24 or newer.

    A provider leaves what it has no kernel for to the next, CUDA the arithmetic on shapes to the
    CPU, say. Only sessions on a GPU keep count.
    """
    counted: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counted[part.ep_name] += len(part.get_nodes())
    return counted


def provider_options(provider: str, extra: Mapping[str, str]) -> Options:
    """What ONNX Runtime is given to run on a provider, with `extra` options for it.

    All else stays at ONNX Runtime's defaults. CUDA graphs are off: they repeat one shape. FP16 is
    off for TensorRT: where it is, TensorRT keeps to the types that are in the file.
    """
    options: Options = [(PROVIDERS[provider], dict(extra))]
    if provider == "tensorrt":  # CUDA runs the nodes that TensorRT has no kernel for.
        options.append((PROVIDERS["cuda"], {}))
    return options


def tensorrt_options(max_items: int, max_tokens: int, cache: Path | None) -> dict[str, str]:
    """The shapes that TensorRT builds its engine for, at start, and where it keeps the engine.

    Without these shapes it would build another engine in the request path whenever a new shape
    comes.
    """
    shapes = {
        "min": (1, 1),
        "opt": (max(1, max_items // 4), max(1, max_tokens // 2)),
        "max": (max_items, max_tokens),
    }
    options = {
        f"trt_profile_{which}_shapes": f"input_ids:{b}x{t},attention_mask:{b}x{t}"
        for which, (b, t) in shapes.items()
    }
    if cache is not None:
        for kind in ("engine", "timing"):
            options[f"trt_{kind}_cache_enable"] = "1"
            options[f"trt_{kind}_cache_path"] = str(cache)
    return options


def engine_cache(root: Path, path: Path, max_items: int, max_tokens: int) -> Path:
    """The directory, made if missing, for what TensorRT builds from one file and one set of shapes.

    ONNX Runtime recognizes a kept engine by the names in its graph, so that in a shared directory
    a network trained again would run with the weights of the one before.

    Raises:
        ConfigInvalid: it can't be made or written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    directory = root / f"{digest[:16]}-{max_items}x{max_tokens}"
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise ConfigInvalid(
            f"engine.cache = {str(root)!r} can't be written; "
            "name a directory that this user may write to, or leave it unset"
        )
    return directory


def _session(model: str | bytes, provider: str, options: Options, threads: int) -> Any:
    """A session, maybe on the CPU for want of the provider."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Spinning threads steal the cores that tokenizing and gRPC need.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Where bytes refer to further files, these are looked for: below what is no directory.
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    # Shapes vary per batch: patterns of past shapes would only hold memory.
    settings.enable_mem_pattern = False
    if provider == "cpu":
        # The fused SkipLayerNormalization is slower on a CPU than the parts it replaces.
        disabled = ["SkipLayerNormFusion", "BiasGeluFusion"]
    else:
        disabled = []
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        _load_cuda()
    return ort.InferenceSession(
        model, settings, providers=options, disabled_optimizers=disabled, enable_fallback=False
    )


def _load_cuda() -> None:
    """Load the CUDA libraries that came as Python packages, which no loader finds by itself.

    ONNX Runtime prints what it misses; libraries of the system may serve instead, and `fault` says
    so where none do.
    """
    with _loading, redirect_stdout(StringIO()):
        ort.preload_dlls()


def _unloadable(provider: str) -> str | None:
    """What the loader says of a provider's library, as "libcudart.so.13: cannot open ..."."""
    directory = Path(ort.__file__).parent / "capi"
    try:
        # It brings what the provider's library is linked to, for the whole process.
        ctypes.CDLL(str(directory / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(directory / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        return str(error)
    return None


def _unusable(provider: str, reason: str | None) -> ConfigInvalid:
    return ConfigInvalid(
        f"engine.provider = {provider!r} can't be used here: {reason or 'it did not load'}. "
        "Set engine.provider = 'cpu' to run without a GPU; `bestroute doctor` says what works"
    )
