"""What a bundle says of itself: `manifest.json` as values, checked against each other.

Files are named with their digests; see `bestroute.bundle` for the directory that holds them.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MANIFEST = "manifest.json"

Probability = Annotated[float, Field(ge=0, le=1)]
Usd = Annotated[float, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Gain = Annotated[float, Field(ge=-1, le=1)]
Tokens = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Precision = Literal["fp32", "fp16", "int8"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class File(_Frozen):
    """A file of the bundle: its name inside the directory and its SHA-256 in hex."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Describe an existing file."""
        return cls(name=path.name, sha256=sha256(path))


class Model(_Frozen):
    """An LLM of the pool: list prices in USD per million tokens, and how long its answers are."""

    name: Name
    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    mean_output_tokens: Tokens


class Arm(_Frozen):
    """One choice of the router: draw `samples` answers from `model` and keep the best."""

    model: Name
    samples: Annotated[int, Field(ge=1, le=1024)]


class Network(_Frozen):
    """A compiled model: its file in each precision it was exported in, and its input limit.

    Precision names what the engine computes in. Weights may be stored smaller and widened at load.
    """

    files: Annotated[dict[Precision, File], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=8, le=2**20)]


class RewardNetwork(Network):
    """The reward model, with two rewards calibrated on validation data.

    Both are null where the data decided nothing.

    Attributes:
        agreement_bonus: added to an answer's reward, times the share of the other drawn answers
            that come to the same final answer, when the best of several is kept.
        accept_reward: answers scoring at least this are on average as good as the reference's,
            so drawing more can't pay.
        escalate_reward: answers scoring below this are on average at most half as good as the
            reference's, so asking the reference pays.
    """

    agreement_bonus: Annotated[float, Field(ge=0)] = 0.0
    accept_reward: Finite | None = None
    escalate_reward: Finite | None = None


class Measured(_Frozen):
    """What one setting of a decision rule was measured to give; fractions (0.01 is one per cent).

    Attributes:
        cost_saving: 1 - cost of the routed answers / cost of the reference's.
        quality_drop: 1 - quality of the routed answers / quality of the reference's.
        quality_drop_upper: upper bound of the drop, one-sided, 95 % confidence, for this setting
            by itself; `bestroute.promise` says what may be promised of one chosen from a curve.
    """

    cost_saving: Finite
    quality_drop: Finite
    quality_drop_upper: Finite


class CurvePoint(Measured):
    """What a threshold was measured to give.

    Attributes:
        match_threshold: t of the decision rule.
    """

    match_threshold: Probability

    @property
    def strictness(self) -> float:
        """Orders the points of a curve: the stricter, the more goes to the reference."""
        return self.match_threshold


class TradePoint(Measured):
    """What an exchange rate between quality and money was measured to give.

    Attributes:
        quality_per_usd: the expected quality that one dollar is worth; see `policy.trade_off`.
    """

    quality_per_usd: Finite

    @property
    def strictness(self) -> float:
        """Orders the points of a curve: the stricter, the more goes to the reference."""
        return -self.quality_per_usd


class TradeOffs(_Frozen):
    """How a bundle trades quality against money.

    Attributes:
        curve: calibration table by rising rate. The first leaves (next to) all to the reference; it
            is run where no other keeps what is asked.
        default_quality_per_usd: used where a request sets no target; calibrated for a quality drop
            of at most 1 %.
    """

    curve: Annotated[list[TradePoint], Field(min_length=1)]
    default_quality_per_usd: Finite

    @model_validator(mode="after")
    def _rises(self) -> Self:
        rates = [point.quality_per_usd for point in self.curve]
        if rates != sorted(set(rates)):
            raise ValueError("the curve's rates must rise")
        return self


class Estimate(_Frozen):
    """A linear model of what drawn answers show; see `bestroute.gate`.

    Attributes:
        intercept: the constant.
        agreement: weight of the share of pairs that agree.
        length: weight of the mean log length.
        agreement_length: weight of their product.
    """

    intercept: Finite
    agreement: Finite
    length: Finite
    agreement_length: Finite


class Gate(_Frozen):
    """When the answers of an arm are taken without asking the reference.

    Attributes:
        arm: whose answers.
        gain: their expected quality less that of the reference's answer.
        reference_log_tokens: log of the tokens that the reference's answer is expected to have.
        trade_offs: what each rate was measured to give where every prompt goes to this arm first,
            on prompts of tasks that the estimates had not seen, if the data names tasks. Its
            default promises a drop of at most 1 %, or the smallest where that saves nothing.
    """

    arm: Arm
    gain: Estimate
    reference_log_tokens: Estimate
    trade_offs: TradeOffs


class Histogram(_Frozen):
    """How a number was distributed.

    Attributes:
        edges: K - 1 rising values between bins; a value on one is in the bin above.
        shares: of the K bins, with sum 1.
    """

    edges: list[Finite]
    shares: Annotated[list[Probability], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_bins(self.edges, self.shares)
        if abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError("the shares of the bins must sum to 1")
        return self


class MeanByBin(_Frozen):
    """What a prediction was worth: the mean of something in each bin of the prediction.

    Attributes:
        edges: K - 1 rising values between bins; a value on one is in the bin above.
        means: of the K bins.
    """

    edges: list[Finite]
    means: Annotated[list[Gain], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_bins(self.edges, self.means)
        return self


def _check_bins(edges: list[float], values: list[float]) -> None:
    if edges != sorted(set(edges)) or len(values) != len(edges) + 1:
        raise ValueError("edges must rise, and there must be one bin more than edges")


class Training(_Frozen):
    """What the training data were like, for traffic to be compared with.

    Predictions are those of routers that were not fitted to the prompt. The quality to expect of an
    arm's answer is that of the reference's plus the arm's gain.

    Attributes:
        prompts: how many there were.
        prompt_tokens: of their lengths by the router's tokenizer.
        match_probability: of a prompt's mean over all arms.
        reference_quality: of the reference's answers, by that same mean.
        arm_gain: of all arms by their match probabilities; for routers that predict no gains.
    """

    prompts: Annotated[int, Field(ge=1)]
    prompt_tokens: Histogram
    match_probability: Histogram
    reference_quality: MeanByBin
    arm_gain: MeanByBin


class GoldenRoute(_Frozen):
    """A prompt and what the router must give for it.

    Attributes:
        probabilities: of the A arms.
        gains: of the A arms; set if and only if the bundle has trade-offs, like the next.
        output_tokens: of the M models.
    """

    prompt: Name
    probabilities: list[Probability]
    gains: list[Gain] | None = None
    output_tokens: list[Tokens] | None = None

    @property
    def row(self) -> list[float]:
        """The router's output, column by column."""
        return [*self.probabilities, *(self.gains or ()), *(self.output_tokens or ())]


class GoldenReward(_Frozen):
    """A prompt with an answer, and the reward that the reward model must give."""

    prompt: Name
    response: str
    reward: Finite


class Golden(_Frozen):
    """Inputs with their expected outputs; a bundle that disagrees on this machine isn't served.

    Attributes:
        tolerance: largest difference that still counts as agreement; relative to the expected
            value where that is over 1 in tokens, absolute elsewhere.
    """

    tolerance: Annotated[float, Field(gt=0)]
    router: Annotated[list[GoldenRoute], Field(min_length=1)]
    reward: Annotated[list[GoldenReward], Field(min_length=1)]


class Manifest(_Frozen):
    """Everything in a bundle but the weights.

    Attributes:
        version: what responses name as `bundle_version`.
        reference_model: the LLM whose quality the arms have to match; answers where none does.
        models: the pool, the reference included.
        arms: the router's outputs, column by column; the reference is not among them.
        default_match_threshold: used where a request sets no target and there are no trade-offs;
            calibrated for a quality drop of at most 1 %.
        curve: calibration table by rising threshold.
        trade_offs: set where the router predicts gains and lengths too. Targets then stand for
            exchange rates; only a threshold that a request sets itself is still one.
        gates: at most one per arm.
        training: None in a bundle of an exporter that didn't tell.
        metrics: figures measured when the bundle was made, by name.
        provenance: where it came from, by topic.
    """

    format_version: Literal[1]
    name: Name
    version: Name
    reference_model: Name
    models: Annotated[list[Model], Field(min_length=1)]
    arms: Annotated[list[Arm], Field(min_length=1)]
    router: Network
    reward: RewardNetwork
    tokenizer: File
    default_match_threshold: Probability
    curve: Annotated[list[CurvePoint], Field(min_length=1)]
    trade_offs: TradeOffs | None = None
    gates: list[Gate] = []
    training: Training | None = None
    metrics: dict[str, Finite]
    provenance: dict[str, str]
    golden: Golden

    @model_validator(mode="after")
    def _refers_to_itself(self) -> Self:
        names = Counter(model.name for model in self.models)
        if double := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"models named twice: {double}")
        known = {*names}
        if missing := {self.reference_model, *(arm.model for arm in self.arms)} - known:
            raise ValueError(f"not among the models: {sorted(missing)}")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError("an arm is listed twice")
        if any(arm.model == self.reference_model for arm in self.arms):
            raise ValueError("the reference model can't be an arm")
        gated = [gate.arm for gate in self.gates]
        if {*gated} - {*self.arms} or len({*gated}) < len(gated):
            raise ValueError("each gate must be of another of the arms")
        for golden in self.golden.router:
            self._check_lengths(golden)
        thresholds = [point.match_threshold for point in self.curve]
        if thresholds != sorted(set(thresholds)):
            raise ValueError("the curve's thresholds must rise")
        return self

    def _check_lengths(self, golden: GoldenRoute) -> None:
        trading = self.trade_offs is not None
        expected = {
            "probabilities": len(self.arms),
            "gains": len(self.arms) if trading else None,
            "output_tokens": len(self.models) if trading else None,
        }
        for field, length in expected.items():
            values = getattr(golden, field)
            if length is None and values is not None:
                raise ValueError(f"golden {field} need trade_offs")
            if length is not None and (values is None or len(values) != length):
                raise ValueError(f"golden {field} must have {length} values each")

    @property
    def router_outputs(self) -> int:
        """How many columns the router gives."""
        return len(self.arms) if self.trade_offs is None else 2 * len(self.arms) + len(self.models)

    def gate(self, arm: Arm) -> Gate | None:
        """The arm's gate, if it has one."""
        return next((gate for gate in self.gates if gate.arm == arm), None)

    def model(self, name: str) -> Model:
        """The pool's model of that name; KeyError if there is none."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into the directory."""
        (directory / MANIFEST).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
