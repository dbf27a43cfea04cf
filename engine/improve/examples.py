"""What was recorded of one model: its requests as measures, and what clients said of the answers as examples to learn from."""

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

MAX_SCORED_TEXTS = 500  # texts whose confidence is measured anew, at most
TEST_FRACTION = 0.3  # of what clients said: kept for the gate


@dataclass(frozen=True)
class RecordedRequest:
    """One recorded request with one input."""

    request_id: str
    text: str
    answer: str  # label, or text
    confidence: float | None  # of a classification


@dataclass(frozen=True)
class Feedback:
    """The last thing that was said of one request."""

    request_id: str
    is_bad: bool | None  # None: no rating
    label: str | None
    text: str | None


@dataclass(frozen=True)
class Example:
    """A text to learn, with its label where the task has some."""

    text: str
    label: str | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept for the gate: a pure function of the text, so that nothing is learnt that tests later."""
        return hashlib.sha256(self.text.encode()).digest()[0] < 256 * TEST_FRACTION


def read_requests_and_feedback(folders: Sequence[Path], version: str) -> tuple[list[RecordedRequest], list[Feedback]]:
    """Read what was asked of the bundle whose hash begins with `version`, and what was said of it, the eldest first."""
    asked, told = [], dict[str, Feedback]()
    for folder in folders:
        for row in read_records(folder, "requests").to_pylist():
            if row["version"] and version.startswith(row["version"]):
                asked += _inputs(row)
        for row in read_records(folder, "feedback").to_pylist():
            if row["version"] and version.startswith(row["version"]):
                rated = None if row["rating"] is None else row["rating"] < 0
                told.pop(row["request"], None)
                told[row["request"]] = Feedback(row["request"], rated, row["label"], row["text"])
    return asked, list(told.values())


def _inputs(row: dict[str, Any]) -> list[RecordedRequest]:
    """Return the inputs of a recorded request, each with its answer; none where they aren't texts."""
    body, answers = json.loads(row["input"]), json.loads(row["output"])
    given = body["messages"][-1]["content"] if "messages" in body else body.get("input", body.get("prompt"))
    texts = [given] if isinstance(given, str) else given
    if not texts or not all(isinstance(text, str) for text in texts) or len(texts) != len(answers):
        return []
    found = []
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        scores = answer.get("scores")
        confidence = max(scores.values()) if scores else None
        one = row["request"] if len(texts) == 1 else f"{row['request']}/{i}"  # what is said of several is said of none
        found.append(RecordedRequest(one, text, answer.get("label") or answer.get("text", ""), confidence))
    return found


def examples_from_feedback(asked: Sequence[RecordedRequest], told: Sequence[Feedback], labels: Sequence[str]) -> tuple[list[Example], int]:
    """Return what can be learnt of what was said, and how many corrections name labels that the model doesn't know.

    A correction is taken as it is; an answer that was rated good is taken as right. Of a request that wasn't kept nothing is.
    """
    by_id = {it.request_id: it for it in asked}
    found: dict[str, Example] = {}
    unknown = 0
    for it in told:
        of = by_id.get(it.request_id)
        if of is None:
            continue
        if labels:
            label = it.label or (of.answer if it.is_bad is False else None)
            if label is not None and label not in labels:
                unknown += 1
            elif label is not None:
                found[of.text] = Example(of.text, label)
        elif text := it.text or (of.answer if it.is_bad is False else None):
            found[of.text] = Example(of.text + text)
    return list(found.values()), unknown


def training_examples(split: Split, objective: Objective, wanted: int) -> list[Example]:
    """Return up to `wanted` examples of a prepared split, evenly spaced, and one at least of each label."""
    places = {i * split.num_rows // wanted for i in range(wanted)} if split.num_rows > wanted else set(range(split.num_rows))
    if objective.labels:
        firsts: dict[int, int] = {}
        for i in range(split.num_rows):
            firsts.setdefault(split.label(i), i)
        places |= set(firsts.values())
    labels = split.manifest.labels
    return [
        Example(objective.tokenizer.decode(split.document(i), skip_special_tokens=True), labels[split.label(i)] if labels else None)
        for i in sorted(places)
    ]  # fmt: skip


def write_examples(file: Path, examples: Sequence[Example]) -> None:
    """Write them as JSON lines {"text", "label"}."""
    rows = [{"text": it.text} | ({"label": it.label} if it.label is not None else {}) for it in examples]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def measure_requests(bundle: Bundle, model: nn.Module, asked: Sequence[RecordedRequest], bad: Sequence[bool]) -> RequestStats:
    """Measure some requests."""
    objective = bundle.objective()
    rows = objective.tokenizer([it.text for it in asked])["input_ids"] if asked else []
    if objective.labels:
        confidence = [it.confidence for it in asked if it.confidence is not None]
        labels = [it.answer for it in asked]
    else:
        chosen = asked[:: max(len(asked) // MAX_SCORED_TEXTS, 1)]
        confidence, labels = text_confidence(objective, model, chosen), []
    return RequestStats([len(row) for row in rows], [token for row in rows for token in row], confidence, labels, bad)


def measure_examples(bundle: Bundle, model: nn.Module, examples: Sequence[Example]) -> RequestStats:
    """Measure examples that the model was trained with, as if they were asked now. For classifications."""
    texts = [it.text for it in examples]
    answers = bundle.objective().predict(model, [{"text": text} for text in texts])
    asked = [RecordedRequest("", text, it["label"], max(it["scores"].values())) for text, it in zip(texts, answers, strict=True)]
    return measure_requests(bundle, model, asked, [])


@torch.inference_mode()
def text_confidence(objective: Objective, model: nn.Module, asked: Sequence[RecordedRequest]) -> list[float]:
    """Return the geometric mean of the probabilities that a model gives to the tokens of each answer to a text."""
    limit = objective.sequence_length
    requests = []
    for it in asked:
        prompt, answer = (objective.tokenizer(text)["input_ids"] for text in (it.text, it.answer))
        if prompt and answer and len(prompt) + len(answer) <= limit:
            requests.append({"prompt": prompt, "continuation": answer})
    found = objective.predict(model, requests)
    return [float(torch.tensor(it["logprobs"]).mean().exp()) for it in found]
