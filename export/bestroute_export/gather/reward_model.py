"""Grades by a reward model from a local Hugging Face directory, such as ArmoRM."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bestroute_export.gather.graders import Grade, GraderInvalid, Local
from bestroute_export.gather.prompts import Fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PADDED_TOKENS = 8192
"""Tokens per batch, padding included; an 8B model in bf16 takes them on a GPU with 24 GB."""

_NO_LIMIT = 1 << 20
"""Tokenizers that know no length limit state a number beyond this one."""


class RewardModel(Local):
    """A sequence classifier with one output, read as a reward.

    Rewards become scores by a monotone map: the logistic function, which is what a model that was
    trained on preferred pairs means by its reward (Bradley-Terry); or, given a range, linearly
    from it to [0, 1], cut off at both ends. ArmoRM predicts ratings, so give it a range that
    begins at 0: relative quality is then that of its own rewards.

    The prompt and the answer are put together by the tokenizer's chat template, and as a pair of
    texts where it has none. Input over the model's limit loses its end. On a GPU, if there is one,
    in bf16.

    Args:
        directory: weights, configuration and tokenizer; nothing is downloaded.
        bounds: rewards that become 0 and 1; None takes the logistic function.
        trust_code: run Python code that lies in the directory, as ArmoRM's does.

    Raises:
        GraderInvalid: transformers is missing, or the directory holds no such model.
    """

    answers_at_once = 64

    def __init__(
        self, directory: Path, bounds: tuple[float, float] | None, *, trust_code: bool = False
    ) -> None:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise GraderInvalid(
                "a reward model needs transformers: pip install 'bestroute[hf]'"
            ) from error
        _check(directory, trust_code)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_code}
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, **options
            )
            self._model = AutoModelForSequenceClassification.from_pretrained(
                directory,
                dtype=torch.bfloat16 if self._device.type == "cuda" else torch.float32,
                **options,
            ).to(self._device)
        except (OSError, ValueError) as error:
            raise GraderInvalid(
                f"{directory} can't be loaded as a reward model: {error}"
            ) from error
        self._model.eval()
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._max_tokens = min(
            self._tokenizer.model_max_length,
            getattr(self._model.config, "max_position_embeddings", _NO_LIMIT),
        )
        self._bounds = bounds

    async def grade(self, prompt: Fields, answers: Sequence[str]) -> list[Grade]:
        """Run the model, in batches of neighbours in length."""
        inputs = [self._encoded(prompt["prompt"], answer) for answer in answers]
        grades = [Grade(None)] * len(answers)
        for batch in _batches([len(ids["input_ids"]) for ids in inputs]):
            padded = self._tokenizer.pad([inputs[i] for i in batch], return_tensors="pt")
            for i, reward in zip(batch, self._rewards(padded), strict=True):
                grades[i] = (
                    Grade(score_of(reward, self._bounds))
                    if math.isfinite(reward)
                    else Grade(None, f"the reward is {reward}")
                )
        return grades

    def _encoded(self, prompt: str, answer: str) -> dict[str, list[int]]:
        limit: dict[str, Any] = {"truncation": True, "max_length": self._max_tokens}
        if self._tokenizer.chat_template is None:
            return dict(self._tokenizer(prompt, answer, **limit))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        # The template has written the special tokens.
        return dict(self._tokenizer(text, add_special_tokens=False, **limit))

    @torch.inference_mode()
    def _rewards(self, padded: Any) -> list[float]:
        output = self._model(**padded.to(self._device))
        # ArmoRM keeps its one reward under a name of its own.
        rewards = output.logits if getattr(output, "score", None) is None else output.score
        rows = rewards.float().reshape(len(padded["input_ids"]), -1)
        if rows.shape[1] != 1:
            raise GraderInvalid(
                f"the model has {rows.shape[1]} outputs; a reward model has one, so name another"
            )
        values: list[float] = rows[:, 0].tolist()
        return values


def _check(directory: Path, trust_code: bool) -> None:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraderInvalid(f"{directory} is no model directory: {error}") from error
    if "auto_map" in config and not trust_code:
        raise GraderInvalid(
            f"{directory} brings Python code of its own; read it, then pass --trust-model-code"
        )


def score_of(reward: float, bounds: tuple[float, float] | None) -> float:
    """A reward as a score in [0, 1]; see `RewardModel`."""
    if bounds is None:
        # Written with tanh, which doesn't overflow.
        return 0.5 + 0.5 * math.tanh(reward / 2)
    low, high = bounds
    return min(1.0, max(0.0, (reward - low) / (high - low)))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of so many padded tokens; an input may be longer alone."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > _PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
