"""Read what was recorded of one model: requests, as measures, and feedback, as examples to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.bundles.bundle import Bundle
from engine.data.shards import Split
from engine.improve.drift import RequestStats
from engine.objectives.contract import Objective
from engine.serve.http.feedback_store import read_records

MAX_SCORED_TEXTS = 500  # texts whose confidence is computed by the model
TEST_FRACTION = 0.3  # of the examples from feedback: held out to test the new version


@dataclass(frozen=True)
class RecordedRequest:
    """One input of a recorded request, with the model's output."""

    request_id: str
    text: str
    output: str  # label, or text
    confidence: float | None  # of a classification


@dataclass(frozen=True)
class Feedback:
    """The latest feedback on one request."""

    request_id: str
    is_bad: bool | None  # None: no rating
    label: str | None  # the corrected one
    text: str | None  # the corrected one


@dataclass(frozen=True)
class Example:
    """A text to train on, with its label if the objective has labels."""

    text: str
    label: str | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether it is for testing only: a pure function of the text, so that no text is first trained on and tested later."""
        return hashlib.sha256(self.text.encode()).digest()[0] < 256 * TEST_FRACTION


def read_requests_and_feedback(folders: Sequence[Path], version: str) -> tuple[list[RecordedRequest], list[Feedback]]:
    """Read the recorded requests to the bundle with the hash `version`, and the feedback on them, oldest first.

    Records hold the first characters of the hash.
    """
    requests, feedback = [], dict[str, Feedback]()
    for folder in folders:
        for row in read_records(folder, "requests").to_pylist():
            if row["version"] and version.startswith(row["version"]):
                requests += _text_inputs(row)
        for row in read_records(folder, "feedback").to_pylist():
            if row["version"] and version.startswith(row["version"]):
                is_bad = None if row["rating"] is None else row["rating"] < 0
                feedback.pop(row["request"], None)
                feedback[row["request"]] = Feedback(row["request"], is_bad, row["label"], row["text"])
    return requests, list(feedback.values())


def _text_inputs(row: dict[str, Any]) -> list[RecordedRequest]:
    """Return the inputs of a recorded request with their outputs; none if the inputs are not texts."""
    body, outputs = json.loads(row["input"]), json.loads(row["output"])
    content = body["messages"][-1]["content"] if "messages" in body else body.get("input", body.get("prompt"))
    texts = [content] if isinstance(content, str) else content
    if not texts or not all(isinstance(text, str) for text in texts) or len(texts) != len(outputs):
        return []
    inputs = []
    for i, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        scores = output.get("scores")
        confidence = max(scores.values()) if scores else None
        # Feedback on a request with several inputs applies to none of them, so their ids match no feedback.
        request_id = row["request"] if len(texts) == 1 else f"{row['request']}/{i}"
        inputs.append(RecordedRequest(request_id, text, output.get("label") or output.get("text", ""), confidence))
    return inputs


def examples_from_feedback(
    requests: Sequence[RecordedRequest], feedback: Sequence[Feedback], labels: Sequence[str]
) -> tuple[list[Example], int]:
    """Return the examples that feedback gives, and the number of corrections with labels that the model does not know.

    A correction is used as it is; an output that was rated good is used as correct. Feedback on requests that were not
    recorded is ignored.
    """
    by_id = {request.request_id: request for request in requests}
    examples: dict[str, Example] = {}
    num_unknown = 0
    for response in feedback:
        request = by_id.get(response.request_id)
        if request is None:
            continue
        accepted = request.output if response.is_bad is False else None
        if labels:
            label = response.label or accepted
            if label is not None and label not in labels:
                num_unknown += 1
            elif label is not None:
                examples[request.text] = Example(request.text, label)
        elif text := response.text or accepted:
            examples[request.text] = Example(request.text + text)
    return list(examples.values()), num_unknown


def sample_examples(split: Split, objective: Objective, num_wanted: int) -> list[Example]:
    """Return up to `num_wanted` evenly spaced examples of a prepared split, plus at least one of each label."""
    num_rows = split.num_rows
    rows = {i * num_rows // num_wanted for i in range(num_wanted)} if num_rows > num_wanted else set(range(num_rows))
    if objective.labels:
        first_of_label: dict[int, int] = {}
        for i in range(num_rows):
            first_of_label.setdefault(split.label(i), i)
        rows |= set(first_of_label.values())
    labels = split.manifest.labels
    return [
        Example(
            objective.tokenizer.decode(split.document(i), skip_special_tokens=True),
            labels[split.label(i)] if labels else None,
        )
        for i in sorted(rows)
    ]


def write_examples(file: Path, examples: Sequence[Example]) -> None:
    """Write examples as JSON lines {"text", "label"}."""
    rows = [
        {"text": example.text} | ({"label": example.label} if example.label is not None else {}) for example in examples
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def measure_requests(
    bundle: Bundle, model: nn.Module, requests: Sequence[RecordedRequest], bad: Sequence[bool]
) -> RequestStats:
    """Compute the measures of some requests; `bad` are the ratings."""
    objective = bundle.objective()
    rows = objective.tokenizer([request.text for request in requests])["input_ids"] if requests else []
    if objective.labels:
        confidence = [request.confidence for request in requests if request.confidence is not None]
        labels = [request.output for request in requests]
    else:
        chosen = requests[:: max(len(requests) // MAX_SCORED_TEXTS, 1)]
        confidence, labels = text_confidence(objective, model, chosen), []
    return RequestStats([len(row) for row in rows], [token for row in rows for token in row], confidence, labels, bad)


def measure_examples(bundle: Bundle, model: nn.Module, examples: Sequence[Example]) -> RequestStats:
    """Compute the measures of examples of the training data, as if they were requests. For classifiers."""
    texts = [example.text for example in examples]
    outputs = bundle.objective().predict(model, [{"text": text} for text in texts])
    requests = [
        RecordedRequest("", text, output["label"], max(output["scores"].values()))
        for text, output in zip(texts, outputs, strict=True)
    ]
    return measure_requests(bundle, model, requests, [])


@torch.inference_mode()
def text_confidence(objective: Objective, model: nn.Module, requests: Sequence[RecordedRequest]) -> list[float]:
    """Return, for each generated text, the geometric mean of the probabilities that the model gives to its tokens."""
    continuations = []
    for request in requests:
        prompt, output = (objective.tokenizer(text)["input_ids"] for text in (request.text, request.output))
        if prompt and output and len(prompt) + len(output) <= objective.sequence_length:
            continuations.append({"prompt": prompt, "continuation": output})
    results = objective.predict(model, continuations)
    return [float(torch.tensor(result["logprobs"]).mean().exp()) for result in results]
