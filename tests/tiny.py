"""A bundle small enough to be made in each test run: a bag of words and two linear maps.

It is a real bundle with real ONNX networks. Words steer it, so that a test can ask for any
behaviour: see `WORDS`.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bestroute import bundle

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = {
    # word: logit it adds to every arm's probability, and to the reward
    "easy": 4.0,
    "hard": -4.0,
    "good": 1.0,
    "bad": -1.0,
    "broken": float("nan"),
    **{f"word{i}": 0.0 for i in range(100)},
    **{letter: 0.0 for letter in "[]clsepadunkmi:!.,?"},
}
MODELS = [
    bundle.Model(
        name=name, input_usd_per_mtok=price, output_usd_per_mtok=5 * price, mean_output_tokens=100
    )
    for name, price in [("small", 0.1), ("medium", 0.5), ("large", 3.0)]
]
ARMS = [
    bundle.Arm(model="small", samples=1),
    bundle.Arm(model="small", samples=3),
    bundle.Arm(model="medium", samples=1),
    bundle.Arm(model="medium", samples=2),
]
BIAS = [-1.0, 0.0, 1.0, 2.0]


def write(directory: Path, *, version: str = "tiny-1", max_tokens: int = 32) -> Path:
    """Write the bundle to a directory that exists, and return it."""
    tokenizer = _tokenizer(directory / "tokenizer.json")
    logits = np.zeros(tokenizer.get_vocab_size(), dtype=np.float32)
    for word, value in WORDS.items():
        logits[tokenizer.token_to_id(word)] = value
    _network(directory / "router.onnx", logits, BIAS, "Sigmoid")
    _network(directory / "reward.onnx", logits, [0.0], "Identity")

    def network(name: str) -> dict[bundle.Precision, bundle.File]:
        return {"fp32": bundle.File.of(directory / name)}

    curve = [
        bundle.CurvePoint(
            match_threshold=t, cost_saving=s, quality_drop=q, quality_drop_upper=q + 0.01
        )
        for t, s, q in [(0.2, 0.9, 0.1), (0.5, 0.5, 0.01), (0.8, 0.1, -0.02)]
    ]
    bundle.Manifest(
        format_version=1,
        name="tiny",
        version=version,
        reference_model="large",
        models=MODELS,
        arms=ARMS,
        router=bundle.Network(files=network("router.onnx"), max_tokens=max_tokens),
        reward=bundle.RewardNetwork(
            files=network("reward.onnx"),
            max_tokens=max_tokens,
            accept_reward=1.5,
            escalate_reward=-0.5,
        ),
        tokenizer=bundle.File.of(directory / "tokenizer.json"),
        default_match_threshold=0.5,
        curve=curve,
        metrics={"cost_saving": 0.5},
        provenance={"data": "none"},
        golden=bundle.Golden(
            tolerance=1e-4,
            router=[bundle.GoldenRoute(prompt="easy", probabilities=probabilities(4.0))],
            reward=[bundle.GoldenReward(prompt="word1", response="good good", reward=2.0)],
        ),
    ).write(directory)
    return directory


def probabilities(logit: float) -> list[float]:
    """What the router gives where the words of the prompt sum to `logit`."""
    return [float(1 / (1 + np.exp(-(logit + bias)))) for bias in BIAS]


def _tokenizer(path: Path) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path))
    return tokenizer


def _network(path: Path, logits: np.ndarray, bias: list[float], last: str) -> None:
    """Sum the logits of the unmasked words, add a bias per output, apply `last`."""
    initializers = [
        numpy_helper.from_array(logits, "logits"),
        numpy_helper.from_array(np.array(bias, dtype=np.float32), "bias"),
        numpy_helper.from_array(np.array([1], dtype=np.int64), "axis"),
        numpy_helper.from_array(np.array(0, dtype=np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("Gather", ["logits", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL),
        helper.make_node("Where", ["kept", "words", "zero"], ["present"]),
        helper.make_node("ReduceSum", ["present", "axis"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "bias"], ["biased"]),
        helper.make_node(last, ["biased"], ["output"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", len(bias)])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
