"""The requests and responses of `POST /classify`: those of Hugging Face's text-classification inference API."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .requests import EngineAnswer

FUNCTIONS = ("softmax", "sigmoid", "none")
_SHAPE = (
    'The body is {"inputs": "a text", "parameters": {"top_k": 3}}; inputs may be a text, {"text": ..., "text_pair": '
    "...}, or a list of these."
)


class BadRequestError(ValueError):
    """The caller's fault.

    Args:
        message (`str`): What is wrong, what is allowed, and the fix.
        status (`int`): Of HTTP.
        kind (`str`): The same for programs.
    """

    def __init__(self, message: str, status: int = 422, kind: str = "validation"):
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """What one request may ask.

    Args:
        max_texts (`int`): Texts of one request.
        max_characters (`int`): Of one text, a pair counted together.
        max_body_bytes (`int`): Of the body.
        timeout_ms (`float`): For which an answer is waited for.
        read_timeout_s (`float`): In which the body has to arrive.
    """

    max_texts: int = 128
    max_characters: int = 100_000
    max_body_bytes: int = 8_000_000
    timeout_ms: float = 30_000.0
    read_timeout_s: float = 20.0


@dataclass(frozen=True)
class Question:
    """A request that can be answered.

    Args:
        examples (`list`): Texts and pairs.
        top_k (`int`): Labels to name, the best first.
        function (`str`, *optional*): What makes scores of logits; None: what the problem asks for.
    """

    examples: list[str | tuple[str, str]]
    top_k: int
    function: str | None


def read_question(body: bytes, limits: Limits) -> Question:
    """Checks a body.

    Raises:
        BadRequestError: Anything else than a request.
    """
    content = _parsed(body)
    if not isinstance(content, dict) or "inputs" not in content:
        raise BadRequestError(f"there is no field 'inputs'. {_SHAPE}")
    unknown = sorted(set(content) - {"inputs", "parameters", "options"})
    if unknown:
        raise BadRequestError(f"unknown fields {', '.join(map(repr, unknown))}. {_SHAPE}")
    top_k, function = _parameters(content.get("parameters"))
    inputs = content["inputs"]
    inputs = inputs if isinstance(inputs, list) else [inputs]
    if not 1 <= len(inputs) <= limits.max_texts:
        status = 422 if not inputs else 413
        raise BadRequestError(f"inputs must hold 1 to {limits.max_texts} texts, got {len(inputs)}.", status)
    return Question([_example(item, number, limits) for number, item in enumerate(inputs)], top_k, function)


def response(
    answers: Sequence[EngineAnswer], question: Question, config: Any, default: str
) -> list[list[dict[str, Any]]]:
    """One list of labels for each text, the best first, with their scores and where the text left the model."""
    function = question.function or default
    return [_labels(answer, question.top_k, function, config) for answer in answers]


def default_function(problem_type: str) -> str:
    """As `TextClassificationPipeline` chooses it."""
    return {"multi_label_classification": "sigmoid", "regression": "none"}.get(problem_type, "softmax")


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"the body is not UTF-8: {error.reason} at byte {error.start}.", 400, "encoding"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is no JSON: {error}. {_SHAPE}", 400, "json") from None


def _parameters(parameters: Any) -> tuple[int, str | None]:
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise BadRequestError(f"parameters must be an object, got {_short(parameters)}. {_SHAPE}")
    unknown = sorted(set(parameters) - {"top_k", "function_to_apply"})
    if unknown:
        raise BadRequestError(
            f"unknown parameters {', '.join(map(repr, unknown))}; there are top_k and function_to_apply."
        )
    top_k, function = parameters.get("top_k"), parameters.get("function_to_apply")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise BadRequestError(f"top_k must be a whole number from 1 on, got {_short(top_k)}.")
    if function is not None and function not in FUNCTIONS:
        raise BadRequestError(f"function_to_apply must be one of {', '.join(FUNCTIONS)}, got {_short(function)}.")
    return top_k or 1, function


def _example(item: Any, number: int, limits: Limits) -> str | tuple[str, str]:
    if isinstance(item, dict) and set(item) == {"text", "text_pair"}:
        texts = [item["text"], item["text_pair"]]
    elif isinstance(item, dict) and set(item) == {"text"}:
        texts = [item["text"]]
    else:
        texts = [item]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequestError(f"inputs[{number}] must be a text or a pair of texts, got {_short(item)}. {_SHAPE}")
    if not texts[0].strip():
        raise BadRequestError(f"inputs[{number}] is empty: give a text.")
    if sum(map(len, texts)) > limits.max_characters:
        raise BadRequestError(
            f"inputs[{number}] has {sum(map(len, texts))} characters, at most {limits.max_characters} are allowed.",
            413,
            "too_long",
        )
    for text in texts:
        _check_encodable(text, number)
    return (texts[0], texts[1]) if len(texts) == 2 else texts[0]


def _check_encodable(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequestError(
            f"inputs[{number}] holds half of a surrogate pair: it is no text.", 422, "encoding"
        ) from None


def _labels(answer: EngineAnswer, top_k: int, function: str, config: Any) -> list[dict[str, Any]]:
    scores = _scores(answer.logits.astype(np.float64), function)
    best = np.argsort(-scores, kind="stable")[:top_k].tolist()
    place = {"exit": answer.exit_index, "layers_run": answer.exit_layer}
    return [{"label": config.id2label[index], "score": _plain(scores[index]), **place} for index in best]


def _scores(logits: np.ndarray, function: str) -> np.ndarray:
    if function == "none":
        return logits
    if function == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _plain(score: float) -> float | None:
    # JSON knows no infinity.
    return float(score) if math.isfinite(score) else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
