"""A bundle small enough to be made in each test run: a bag of words and two linear maps.

It is a real bundle with real ONNX networks. Words steer it, so that a test can ask for any
behaviour: see `WORDS`. `write_trading` makes one whose router predicts gains and lengths as well.
Either takes gates; `GATE` is one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bestroute import manifest as manifests

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = {
    # word: logit it adds to every arm's probability, and to the reward
    "easy": 4.0,
    "hard": -4.0,
    "good": 1.0,
    "bad": -1.0,
    "broken": float("nan"),
    **dict.fromkeys(["better", "worse", "long"], 0.0),
    **{f"word{i}": 0.0 for i in range(100)},
    **{letter: 0.0 for letter in "[]clsepadunkmi:!.,?"},
}
MODELS = [
    manifests.Model(
        name=name, input_usd_per_mtok=price, output_usd_per_mtok=5 * price, mean_output_tokens=100
    )
    for name, price in [("small", 0.1), ("medium", 0.5), ("large", 3.0)]
]
ARMS = [
    manifests.Arm(model="small", samples=1),
    manifests.Arm(model="small", samples=3),
    manifests.Arm(model="medium", samples=1),
    manifests.Arm(model="medium", samples=2),
]
BIAS = [-1.0, 0.0, 1.0, 2.0]
GAINS = [-0.06, -0.02, 0.0, 0.01]
"""Of each arm, where nothing steers."""
OUTPUT_TOKENS = [80.0, 120.0, 200.0]
"""Of each model, where nothing steers; their means are all 100."""
GAIN_WORDS = {"better": 0.1, "worse": -0.1}
"""What a word adds to every arm's gain."""
TOKEN_WORDS = {"long": 100.0}
"""What a word adds to the tokens of every model's answer."""

GATE = manifests.Gate(
    arm=ARMS[1],
    gain=manifests.Estimate(intercept=-0.1, agreement=0.1, length=0.0, agreement_length=0.0),
    reference_log_tokens=manifests.Estimate(
        intercept=float(np.log(100)), agreement=0.0, length=0.0, agreement_length=0.0
    ),
    trade_offs=manifests.TradeOffs(
        curve=[
            manifests.TradePoint(
                quality_per_usd=rate, cost_saving=s, quality_drop=q, quality_drop_upper=q + 0.01
            )
            for rate, s, q in [(-20.0, 0.0, 0.0), (20.0, 0.4, 0.01), (100.0, 0.6, 0.05)]
        ],
        default_quality_per_usd=20.0,
    ),
)
"""Of small x 3. The reference costs 0.0015 USD, so that all three answers have to agree at the
default rate; at 100 none has to, and at -20 no agreement is enough."""


class Head(NamedTuple):
    """Outputs of a network: what each word adds to all of them, a bias for each, and a function."""

    words: dict[str, float]
    bias: list[float]
    last: str


def write(
    directory: Path,
    *,
    version: str = "tiny-1",
    max_tokens: int = 32,
    gates: Sequence[manifests.Gate] = (),
    shift: float = 0.0,
) -> Path:
    """Write the bundle to a directory that exists, and return it.

    The shift is added to every logit and to every reward, so that bundles can be told apart by
    their numbers.
    """
    golden = manifests.GoldenRoute(prompt="easy", probabilities=probabilities(4.0 + shift))
    heads = [Head(WORDS, [bias + shift for bias in BIAS], "Sigmoid")]
    return _write(directory, heads, golden, None, version, max_tokens, gates, shift)


def write_trading(directory: Path, *, gates: Sequence[manifests.Gate] = ()) -> Path:
    """Write the bundle with trade-offs to a directory that exists, and return it.

    For a prompt of one word that doesn't steer, medium x 2 is worth most at rate 0, medium x 1 at
    50, small x 3 at 200, small x 1 at 1000; at -20 the reference.
    """
    golden = manifests.GoldenRoute(
        prompt="easy", probabilities=probabilities(4.0), gains=GAINS, output_tokens=OUTPUT_TOKENS
    )
    heads = [
        Head(WORDS, BIAS, "Sigmoid"),
        Head(GAIN_WORDS, GAINS, "Identity"),
        Head(TOKEN_WORDS, OUTPUT_TOKENS, "Identity"),
    ]
    points = [
        manifests.TradePoint(
            quality_per_usd=rate, cost_saving=s, quality_drop=q, quality_drop_upper=q + 0.01
        )
        for rate, s, q in [
            (-20.0, 0.0, -0.01),
            (0.0, 0.3, -0.005),
            (50.0, 0.6, 0.0),
            (200.0, 0.8, 0.03),
            (1000.0, 0.9, 0.1),
        ]
    ]
    trade_offs = manifests.TradeOffs(curve=points, default_quality_per_usd=50.0)
    return _write(directory, heads, golden, trade_offs, "trading-1", 32, gates)


def _write(
    directory: Path,
    heads: list[Head],
    golden: manifests.GoldenRoute,
    trade_offs: manifests.TradeOffs | None,
    version: str,
    max_tokens: int,
    gates: Sequence[manifests.Gate],
    shift: float = 0.0,
) -> Path:
    tokenizer = _tokenizer(directory / "tokenizer.json")
    _network(directory / "router.onnx", tokenizer, heads)
    _network(directory / "reward.onnx", tokenizer, [Head(WORDS, [shift], "Identity")])

    def network(name: str) -> dict[manifests.Precision, manifests.File]:
        return {"fp32": manifests.File.of(directory / name)}

    curve = [
        manifests.CurvePoint(
            match_threshold=t, cost_saving=s, quality_drop=q, quality_drop_upper=q + 0.01
        )
        for t, s, q in [(0.2, 0.9, 0.1), (0.5, 0.5, 0.01), (0.8, 0.1, -0.02)]
    ]
    manifests.Manifest(
        format_version=1,
        name="tiny",
        version=version,
        reference_model="large",
        models=MODELS,
        arms=ARMS,
        router=manifests.Network(files=network("router.onnx"), max_tokens=max_tokens),
        reward=manifests.RewardNetwork(
            files=network("reward.onnx"),
            max_tokens=max_tokens,
            accept_reward=1.5,
            escalate_reward=-0.5,
        ),
        tokenizer=manifests.File.of(directory / "tokenizer.json"),
        default_match_threshold=0.5,
        curve=curve,
        trade_offs=trade_offs,
        gates=[*gates],
        metrics={"cost_saving": 0.5},
        provenance={"data": "none"},
        golden=manifests.Golden(
            tolerance=1e-4,
            router=[golden],
            reward=[
                manifests.GoldenReward(prompt="word1", response="good good", reward=2.0 + shift)
            ],
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


def _network(path: Path, tokenizer: Tokenizer, heads: list[Head]) -> None:
    """Per head: sum what the unmasked words add, add a bias per output, apply `last`."""
    initializers = [
        numpy_helper.from_array(np.array([1], dtype=np.int64), "axis"),
        numpy_helper.from_array(np.array(0, dtype=np.float32), "zero"),
    ]
    nodes = [helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL)]
    for i, head in enumerate(heads):
        added = np.zeros(tokenizer.get_vocab_size(), dtype=np.float32)
        for word, value in head.words.items():
            added[tokenizer.token_to_id(word)] = value
        initializers += [
            numpy_helper.from_array(added, f"added{i}"),
            numpy_helper.from_array(np.array(head.bias, dtype=np.float32), f"bias{i}"),
        ]
        nodes += [
            helper.make_node("Gather", [f"added{i}", "input_ids"], [f"words{i}"]),
            helper.make_node("Where", ["kept", f"words{i}", "zero"], [f"present{i}"]),
            helper.make_node("ReduceSum", [f"present{i}", "axis"], [f"sum{i}"], keepdims=1),
            helper.make_node("Add", [f"sum{i}", f"bias{i}"], [f"biased{i}"]),
            helper.make_node(head.last, [f"biased{i}"], [f"output{i}"]),
        ]
    outputs = [f"output{i}" for i in range(len(heads))]
    nodes.append(helper.make_node("Concat", outputs, ["output"], axis=1))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"])
        for name in ("input_ids", "attention_mask")
    ]
    columns = sum(len(head.bias) for head in heads)
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", columns])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
