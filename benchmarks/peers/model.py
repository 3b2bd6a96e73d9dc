"""What every peer serves: prompts in, rows out, as one would write it around ONNX Runtime.

Needs only onnxruntime, tokenizers and numpy, since it is imported in the peers' environments. From
the environment:

- PEER_MODEL: the ONNX file.
- PEER_TOKENIZER: the `tokenizer.json`.
- PEER_MAX_TOKENS: longest input, special tokens included; longer ones are cut.
- PEER_THREADS: threads of a run.
- PEER_MAX_BATCH: most prompts of a run; read by the servers.
- PEER_TUNED: 1 opens the session with the options that bestroute uses, so that servers differ in
  nothing but serving; 0 with ONNX Runtime's defaults, as with a stock export.
- BESTROUTE_SYNTHETIC: "a,b"; see `Cost`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from tokenizers import Tokenizer

Rows = npt.NDArray[np.float32]

SYNTHETIC = "BESTROUTE_SYNTHETIC"
TYPICAL = "What is the sum of these numbers?"
"""The prompt whose row every prompt gets where the network isn't run."""


@dataclass(frozen=True)
class Cost:
    """Time of a run on an engine that isn't there: a + b * padded tokens.

    NVIDIA's figures of an A100 give about "0.4,2.3": a DeBERTa of 12 layers, 384 wide, in FP16 by
    TensorRT 8.4.3 takes 1.6 ms for 512 tokens and 2.8 ms for 1024 (batch 1, the faster of two
    ways; github.com/NVIDIA/TensorRT, demo/DeBERTa/README.md).

    Attributes:
        a_ms: milliseconds of any run.
        b_us: microseconds that each padded token adds.
    """

    a_ms: float
    b_us: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "a,b"."""
        a, b = map(float, text.split(","))
        return cls(a, b)

    def wait(self, items: int, tokens: int) -> None:
        """Take as long as a run of B items, T tokens each, would; a GPU leaves the CPU idle."""
        time.sleep(1e-3 * self.a_ms + 1e-6 * self.b_us * items * tokens)


class Model:
    """Tokenizer and network.

    With BESTROUTE_SYNTHETIC the network runs only once; every later run takes the time that says,
    and gives the row of that one.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._tokenizer = Tokenizer.from_file(environment["PEER_TOKENIZER"])
        self._tokenizer.enable_truncation(int(environment["PEER_MAX_TOKENS"]))
        self._tokenizer.enable_padding()  # to the longest of the batch
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a prompt is text
        self._session = _session(
            environment["PEER_MODEL"],
            int(environment["PEER_THREADS"]),
            tuned=environment["PEER_TUNED"] == "1",
        )
        self._cost: Cost | None = None
        self._row = self([TYPICAL])[0]
        if SYNTHETIC in environment:
            self._cost = Cost.parse(environment[SYNTHETIC])

    def __call__(self, prompts: Sequence[str]) -> Rows:
        """Rows float32 [B, K] of B prompts, as one batch."""
        encodings = self._tokenizer.encode_batch(list(prompts))
        ids = np.array([each.ids for each in encodings], dtype=np.int64)  # [B, T]
        if self._cost:
            self._cost.wait(*ids.shape)
            return np.tile(self._row, (len(ids), 1))
        mask = np.array([each.attention_mask for each in encodings], dtype=np.int64)
        rows: Rows = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return rows


def _session(path: str, threads: int, *, tuned: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if tuned:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False
    return ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion", "BiasGeluFusion"] if tuned else [],
    )
