"""Recorded requests and feedback become a better version if there is drift."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.bundles.bundle import Bundle
from engine.bundles.registry import Registry
from engine.config import Config, with_values
from engine.errors import UserError
from engine.improve import improve as improving
from engine.improve.examples import (
    Example,
    Feedback,
    RecordedRequest,
    examples_from_feedback,
    read_requests_and_feedback,
)
from engine.serve.http.feedback_store import RecordWriter
from engine.train.launch import TrainResult
from engine.train.run_folder import RunFolder
from tests.lives import Lives, run

GOOD, BAD = ["splendid", "sunny", "tender"], ["bleak", "rotten", "vile"]  # words that are not in the training data


def record(
    folder: Path, bundle: Bundle, asked: list[tuple[str, str]], right: Callable[[str], str], told: bool = True
) -> None:
    """Record what the bundle answers, and of each answer whether it is right and what would be."""
    answers = bundle.objective().predict(bundle.model(), [{"text": text} for text, _ in asked])

    async def write() -> None:
        requests, feedback = RecordWriter(folder, "requests"), RecordWriter(folder, "feedback")
        for i, ((text, _), answer) in enumerate(zip(asked, answers, strict=True)):
            who = {"request": str(i), "time": datetime.now(UTC), "model": "m", "version": bundle.hash[:12], "key": ""}
            body = {"model": "m", "input": text}
            kept = [{"label": answer["label"], "scores": answer["scores"]}]
            await requests.write(who | {"path": "/v1/classify", "input": json.dumps(body), "output": json.dumps(kept), "seconds": 0.01})  # fmt: skip
            if told:
                good = answer["label"] == right(text)
                said: dict[str, Any] = {"rating": 1 if good else -1, "label": None if good else right(text), "text": None, "comment": None}  # fmt: skip
                await feedback.write(who | said)

    asyncio.run(write())


def sentences(count: int, good: list[str], bad: list[str]) -> list[tuple[str, str]]:
    draw = random.Random(5)
    made = []
    for i in range(count):
        label = "good" if draw.random() < 0.5 else "bad"
        words = [
            *draw.choices(["the", "film", "a", "plot", "with"], k=5),
            *draw.choices(good if label == "good" else bad, k=4),
        ]
        draw.shuffle(words)
        made.append((f"{' '.join(words)} {i}", label))
    return made


@pytest.fixture
def config(lives: Lives, tmp_path: Path) -> Config:
    values = {
        "job": "improve", "name": "improve", "bundle": str(lives.bundle("good").folder), "runs_dir": str(tmp_path),
        "train.max_steps": 60, "improve.records": str(tmp_path / "feedback"), "data.validation_path": None,
    }  # fmt: skip
    return with_values(lives.labelled, values)


def trained_here(config: Config) -> TrainResult:
    """Train in this process, without Ray."""
    assert config.bundle
    run(config, Path(config.bundle))
    folder = RunFolder(config.run_dir)
    return TrainResult(folder, list(folder.metrics())[-1])


@pytest.mark.slow
def test_drift_leads_to_a_better_version(
    lives: Lives, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = lives.bundle("good")
    asked = sentences(300, GOOD, BAD)
    right = dict(asked)
    record(tmp_path / "feedback", bundle, asked, right.__getitem__)
    assert improving.improve(config, lambda _: nullcontext()) == 0
    said = capsys.readouterr().out
    assert "300 requests and feedback on 300" in said
    assert "drift, and 300 examples to train on: improve.apply=true trains, tests and registers" in said
    assert not (tmp_path / "improve" / "examples").exists()
    found = json.loads((tmp_path / "improve" / "drift.json").read_text())
    assert {drift["measure"]: drift["real"] for drift in found["drift"]}["tokens"] is True

    monkeypatch.setattr(improving, "train", trained_here)
    assert improving.improve(with_values(config, {"improve.apply": True}), lambda _: nullcontext()) == 0
    said = capsys.readouterr().out
    assert "registered" in said
    assert "serve.strategy=canary cluster=auto" in said
    (version,) = Registry(config.tracking_uri, config.registry_dir).versions()
    better = Bundle.open(version.folder)
    assert better.manifest
    assert better.manifest.parent == bundle.hash
    learnt, held = ([json.loads(line)["text"] for line in (tmp_path / "improve" / "examples" / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test"))  # fmt: skip
    assert not set(learnt) & set(held)
    assert len(set(held) & set(right)) > 50
    assert len(set(learnt) - set(right)) > 300  # of what was learnt before, all that there is


def test_training_vocabulary_is_no_drift(
    lives: Lives, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(1)
    rows = [(row["text"], row["label"]) for row in draw.sample(lives.rows, 150)]
    record(tmp_path / "feedback", lives.bundle("good"), rows, lambda text: "good", told=False)
    assert improving.improve(with_values(config, {"improve.apply": True}), lambda _: nullcontext()) == 0
    assert "no drift: nothing to do" in capsys.readouterr().out


def test_repeated_rounds_train_once_on_new_examples(
    lives: Lives, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = sentences(300, GOOD, BAD)
    right = dict(asked)
    trained, rounds = [], []

    def train(config: Config) -> TrainResult:
        trained.append(config.name)
        raise UserError("no room")

    def sleep(seconds: float) -> None:  # nothing is recorded in the first round, and nothing more after the second
        rounds.append(seconds)
        if len(rounds) == 1:
            record(tmp_path / "feedback", lives.bundle("good"), asked, right.__getitem__)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(improving, "train", train)
    monkeypatch.setattr("engine.improve.improve.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        improving.improve(
            with_values(config, {"improve.apply": True, "improve.every_s": 3600.0}), lambda _: nullcontext()
        )
    said = " ".join(capsys.readouterr().out.split())
    assert rounds == [3600.0] * 3
    assert "0 requests of" in said
    assert [name[:10] for name in trained] == ["improve-20"]
    assert "no room" in said
    assert said.endswith("drift, and 0 new examples to train on, fewer than improve.min_examples 50: more corrections are needed (POST /v1/feedback, for requests sent with store=true)")  # fmt: skip


def test_too_few_requests_are_refused(config: Config) -> None:
    with pytest.raises(
        UserError, match=r"0 requests of .* are recorded in .*feedback, and improve.min_requests is 100"
    ):
        improving.improve(config, lambda _: nullcontext())


def test_feedback_becomes_examples() -> None:
    asked = [
        RecordedRequest("1", "one", "a", 0.9),
        RecordedRequest("2", "two", "a", 0.9),
        RecordedRequest("3", "three", "b", 0.9),
        RecordedRequest("4", "four", "b", 0.9),
    ]
    told = [Feedback("1", False, None, None), Feedback("2", True, "b", None), Feedback("3", True, None, None), Feedback("4", None, "z", None),
            Feedback("9", False, "a", None)]  # fmt: skip
    assert examples_from_feedback(asked, told, ["a", "b"]) == ([Example("one", "a"), Example("two", "b")], 1)
    texts = [Feedback("1", True, None, " better"), Feedback("2", False, None, None)]
    assert examples_from_feedback(asked, texts, []) == ([Example("one better"), Example("twoa")], 0)


def test_last_feedback_on_a_request_counts(tmp_path: Path) -> None:
    async def write() -> None:
        recorder = RecordWriter(tmp_path, "feedback")
        who = {"time": datetime.now(UTC), "model": "m", "key": "", "comment": None, "text": None}
        for request, version, rating in (
            ("1", "abc", 1),
            ("2", "abc", 1),
            ("1", "abc", -1),
            ("3", "other", 1),
            ("4", "", 1),
        ):
            await recorder.write(who | {"request": request, "version": version, "rating": rating, "label": None})

    asyncio.run(write())
    assert read_requests_and_feedback([tmp_path], "abcdef") == (
        [],
        [Feedback("2", False, None, None), Feedback("1", True, None, None)],
    )
