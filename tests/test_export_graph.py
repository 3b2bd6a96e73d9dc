"""Files in each precision against the network they were made from."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from bestroute.manifest import Arm, Precision
from bestroute.policy import choose
from bestroute_export.batches import Function, pad, predict
from bestroute_export.encoders import Encoder, store_in_eight_bits
from bestroute_export.encoders.deberta import Deberta, DebertaConfig
from bestroute_export.encoders.modernbert import ModernBert, ModernBertConfig
from bestroute_export.files import write_files
from bestroute_export.graph import OPERATORS, GraphUnsupported, export, fold
from bestroute_export.labels import Floats
from bestroute_export.networks import RewardNetwork, RouterNetwork
from bestroute_export.session import session
from bestroute_export.verify import (
    LIMITS,
    Disagreement,
    admission,
    agreement,
    by_length,
    company,
    require,
)

LONGEST = 512
ARMS = [Arm(model="a", samples=1), Arm(model="a", samples=2), Arm(model="b", samples=1)]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
}


def deberta() -> Encoder:
    return Deberta(DebertaConfig(**SIZES, position_buckets=256))


def modernbert() -> Encoder:
    config = ModernBertConfig(**SIZES, local_attention=16, is_global=(True, False))
    return ModernBert(config)


def rows(count: int, longest: int = 40) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(1, 60, n).tolist() for n in generator.integers(2, longest + 1, count)
    ]


def routes(probabilities: Floats) -> npt.NDArray[np.int64]:
    costs = [1.0, 2.0, 3.0]
    return np.stack([choose(probabilities, costs, t) for t in np.linspace(0.1, 0.9, 9)])


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A router on DeBERTa whose probabilities spread, stored in 8 bits."""
    torch.manual_seed(0)
    network = RouterNetwork(deberta(), ARMS).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "words" not in name:
                parameter.mul_(2)
    store_in_eight_bits(network)
    return network


@pytest.fixture(scope="module")
def files(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    directory = tmp_path_factory.mktemp("files")
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    files = write_files(
        network, "router", "probabilities", directory, precisions, rows(200), routes, LONGEST
    )
    return {precision: directory / file.name for precision, file in files.items()}


def in_torch(network: nn.Module) -> Function:
    @torch.no_grad()
    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = network(input_ids, attention_mask)
        return output

    return run


def test_every_precision_agrees_with_the_network_at_every_length(
    network: nn.Module, files: dict[Precision, Path]
) -> None:
    checks = agreement("router", in_torch(network), files, rows(3), LONGEST)
    require(checks)
    assert {check.name.split(" on ")[0] for check in checks} == {
        "router, fp32",
        "router, fp16",
        "router, int8",
    }


def test_half_precision_is_as_exact_at_the_longest_input_as_at_short_ones(
    network: nn.Module, files: dict[Precision, Path]
) -> None:
    """Buckets of distances computed in FP16 would be wrong from a distance of 198 on."""
    errors = by_length(in_torch(network), session(files["fp16"]), rows(3), LONGEST)
    assert max(errors) == LONGEST
    short = max(error for length, error in errors.items() if length <= 128)
    assert 0 < errors[LONGEST] < 2 * short < LIMITS["fp16"]


def test_positions_change_what_a_file_gives(files: dict[Precision, Path]) -> None:
    row = rows(1, longest=400)[0]
    for path in files.values():
        run = session(path)
        assert (run(*pad([row])) - run(*pad([[row[0], *row[:0:-1]]]))).abs().max() > 1e-3


def test_files_hold_only_operators_that_every_engine_has(files: dict[Precision, Path]) -> None:
    for precision in ("fp32", "fp16"):
        graph = onnx.load(files[precision]).graph
        assert {node.op_type for node in graph.node} <= OPERATORS
        types = {value.type.tensor_type.elem_type for value in graph.input}
        assert types == {onnx.TensorProto.INT64}
        assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_nothing_is_left_to_fold_in_half_precision(files: dict[Precision, Path]) -> None:
    model = onnx.load(files["fp16"])
    assert len(fold(model).graph.node) == len(model.graph.node)
    names = {tensor.name for tensor in model.graph.initializer}
    assert not any(names.issuperset(node.input) for node in model.graph.node)


def test_an_operator_that_not_every_engine_has_is_refused(tmp_path: Path) -> None:
    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = deberta(), nn.Identity()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (input_ids * attention_mask).cumsum(1).float()

    with pytest.raises(GraphUnsupported, match="CumSum"):
        export(Cumulative(), "sums", tmp_path / "sums.onnx")


def test_int8_gives_each_row_the_same_in_any_company(files: dict[Precision, Path]) -> None:
    run = session(files["int8"])
    assert company(run, rows(8), LONGEST) < 1e-6
    reversed_order = predict(run, rows(8)[::-1])[::-1]
    assert np.abs(predict(run, rows(8)) - reversed_order).max() < 1e-6


def test_int8_is_computed_in_int8(files: dict[Precision, Path]) -> None:
    nodes = onnx.load(files["int8"]).graph.node
    products = [node for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 6 * SIZES["num_hidden_layers"]


def test_the_librarys_own_int8_fails_the_same_check(
    files: dict[Precision, Path], tmp_path: Path
) -> None:
    """It takes one scale from the whole batch, so the check would see it."""
    from onnxruntime.quantization import quantize_dynamic

    optimized = tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    onnxruntime.InferenceSession(files["fp32"], options, providers=["CPUExecutionProvider"])
    quantize_dynamic(optimized, tmp_path / "int8.onnx")
    assert company(session(tmp_path / "int8.onnx"), rows(8), LONGEST) > 1e-5


def test_a_fast_engine_is_admitted_by_its_decisions(
    network: nn.Module, files: dict[Precision, Path]
) -> None:
    reference, fast = in_torch(network), session(files["int8"])
    require(admission("int8", reference, fast, rows(200), routes, LONGEST))

    def shifted(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return fast(input_ids, attention_mask) + 0.05

    def sociable(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return fast(input_ids, attention_mask) + 1e-4 * len(input_ids)

    for spoiled, failed in ((shifted, "decisions changed"), (sociable, "in company")):
        checks = admission("int8", reference, spoiled, rows(200), routes, LONGEST)
        with pytest.raises(Disagreement, match=failed):
            require(checks)


def test_windows_and_rotations_survive_the_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = RewardNetwork(modernbert()).eval()
    store_in_eight_bits(network)
    export(network, "rewards", tmp_path / "reward.onnx")
    require(
        agreement("reward", in_torch(network), {"fp32": tmp_path / "reward.onnx"}, rows(3), LONGEST)
    )
