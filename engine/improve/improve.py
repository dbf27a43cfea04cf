"""One round of learning from recorded requests: measure drift; if there is some, train, test and register a new version."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.registry import Registry
from engine.config import Config, with_values
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.comparison import describe_comparison
from engine.evaluate.promote import compare_with_champion, decide_promotion, registered_name
from engine.improve.drift import Drift, measure_drift
from engine.improve.examples import (
    Example,
    examples_from_feedback,
    measure_examples,
    measure_requests,
    read_requests_and_feedback,
    sample_examples,
    write_examples,
)
from engine.progress import console
from engine.train.launch import train

MEASURE_LABELS = {
    "lengths": "tokens per input",
    "tokens": "tokens (share of the bin that changed most)",
    "confidence": "confidence",
    "labels": "predicted labels (share of the label that changed most)",
    "bad": "bad ratings",
}
REFERENCE_SIZE = 500  # held-out examples of the training data that recent requests are compared with

Session = Callable[[Config], AbstractContextManager[None]]


@dataclass(frozen=True)
class DriftReport:
    """What was measured of a bundle's recorded requests and feedback."""

    bundle: Bundle
    drifts: list[Drift]
    examples: list[Example]
    num_unknown_labels: int  # corrections with labels that the model does not know
    num_requests: int
    num_feedback: int

    @property
    def has_drifted(self) -> bool:
        """Whether any measure has drifted."""
        return any(drift.is_drift for drift in self.drifts)


def improve(config: Config, session: Session) -> int:
    """Measure, and with improve.apply train; with improve.every_s repeatedly, each time as a run of its own.

    Return the exit code: 3 if the new version is not better, else 0. `session` connects to the Ray cluster for training.
    """
    num_used: dict[str, int] = {}
    if config.improve.every_s is None:
        return improve_once(config, session, num_used)
    while True:
        timestamp = time.strftime("%Y%m%d-%H%M%S")
        try:
            improve_once(with_values(config, {"name": f"{config.name}-{timestamp}"}), session, num_used)
        except UserError as error:  # for example too few recorded requests yet
            console.print(str(error), markup=False)
        time.sleep(config.improve.every_s)


def improve_once(config: Config, session: Session, num_used: dict[str, int]) -> int:
    """Measure and train once. `num_used`: examples, by bundle hash, at the last training; it is updated."""
    assert config.bundle
    folder = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri)
    report = measure(config, Bundle.open(folder))
    print_report(report)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "bundle": report.bundle.hash,
        "requests": report.num_requests,
        "feedback": report.num_feedback,
        "examples": len(report.examples),
        "drift": [drift.to_dict() for drift in report.drifts],
    }
    (config.run_dir / "drift.json").write_text(json.dumps(content, indent=1) + "\n")
    options = config.improve
    if not report.has_drifted:
        console.print("no drift: nothing to do")
        return 0
    num_new = len(report.examples) - num_used.get(report.bundle.hash, 0)
    if num_new < options.min_examples:
        console.print(
            f"drift, and {num_new} new examples to train on, fewer than improve.min_examples {options.min_examples}: "
            "more corrections are needed (POST /v1/feedback, for requests sent with store=true)"
        )
        return 0
    if not options.apply:
        console.print(
            f"drift, and {len(report.examples)} examples to train on: improve.apply=true trains, tests and registers"
        )
        return 0
    num_used[report.bundle.hash] = len(report.examples)
    return train_and_register(config, report, folder, session)


def measure(config: Config, bundle: Bundle) -> DriftReport:
    """Compare the recorded requests of a bundle with its training data. Raises UserError if there are too few."""
    options = config.improve
    folders = [Path(options.records)] if options.records else sorted(Path(config.runs_dir).glob("*/feedback"))
    requests, feedback = read_requests_and_feedback(folders, bundle.hash)
    if len(requests) < options.min_requests:
        where = ", ".join(map(str, folders)) or f"{config.runs_dir}/*/feedback"
        raise UserError(
            f"{len(requests)} requests of {config.bundle} ({bundle.hash[:12]}) are recorded in {where}, and "
            f"improve.min_requests is {options.min_requests}: clients allow recording with store=true"
        )
    objective, model = bundle.objective(), bundle.model()
    ratings = [response.is_bad for response in feedback if response.is_bad is not None]
    old_ratings, new_ratings = ratings[: len(ratings) // 2], ratings[len(ratings) // 2 :]
    if objective.labels:
        examples = sample_examples(_open_split(bundle, "validation"), objective, REFERENCE_SIZE)
        reference = replace(measure_examples(bundle, model, examples), bad=old_ratings)
        recent = measure_requests(bundle, model, requests[-options.recent :], new_ratings)
    else:  # prompts differ from training documents: the later requests are compared with the earlier ones
        middle = len(requests) // 2
        reference = measure_requests(bundle, model, requests[:middle], old_ratings)
        recent = measure_requests(bundle, model, requests[middle:][-options.recent :], new_ratings)
    drifts = measure_drift(reference, recent, options.least_psi, options.least_bad, options.significance)
    examples, num_unknown = examples_from_feedback(requests, feedback, objective.labels)
    return DriftReport(bundle, drifts, examples, num_unknown, len(requests), len(feedback))


def print_report(report: DriftReport) -> None:
    """Print the measures."""
    console.print(f"{report.num_requests:,} requests and feedback on {report.num_feedback:,} of {report.bundle.folder}")
    table = Table("measure", "before", "after", "PSI or difference", "p", "samples", "drift")
    for drift in report.drifts:
        table.add_row(
            MEASURE_LABELS[drift.measure], f"{drift.before:.3g}", f"{drift.after:.3g}", f"{drift.effect_size:.3f}",
            f"{drift.p_value:.2g}", f"{drift.num_samples[0]:,} / {drift.num_samples[1]:,}", "yes" if drift.is_drift else "no",
        )  # fmt: skip
    console.print(table)
    if report.num_unknown_labels:
        console.print(f"{report.num_unknown_labels} corrections with labels that the model does not know were skipped")


def train_and_register(config: Config, report: DriftReport, folder: Path, session: Session) -> int:
    """Train from the bundle on old and new examples, compare the two on held-out ones, and register the new if it is better."""
    assert config.bundle
    training = training_config(config, report, folder)
    with session(training):
        outcome = train(training)
    candidate = Bundle.open(outcome.run.bundle)
    names = (training.name, config.bundle)
    comparison = compare_with_champion(candidate, report.bundle, names, training, data_given=True)
    decision = decide_promotion(comparison, names, None)
    if not decision.promote:
        console.print(f"not registered: {describe_comparison(comparison, names)}")
        return 3
    registry = Registry(config.tracking_uri, config.registry_dir)
    name = config.promote.model or registered_name(config.bundle, folder, registry)
    version = registry.register(candidate, name)
    console.print(f"registered {version}: {decision.reason}")
    console.print(f"try it:    manta deploy bundle={version} serve.names={name} serve.strategy=canary cluster=auto")
    console.print(f"then:      manta promote {version} promote.reason='its canary went well'")
    return 0


def training_config(config: Config, report: DriftReport, folder: Path) -> Config:
    """Write the examples to train on and to test with, and return the config of the training.

    Examples of the original data are mixed in: improve.replay for each new one to train on, one for each to test with.
    """
    options, target = config.improve, config.run_dir / "examples"
    objective = report.bundle.objective()
    to_train = [example for example in report.examples if not example.is_held_out]
    to_test = [example for example in report.examples if example.is_held_out]
    replayed = sample_examples(_open_split(report.bundle, "train"), objective, round(options.replay * len(to_train)))
    old_tests = sample_examples(_open_split(report.bundle, "test"), objective, max(len(to_test), 1))
    write_examples(target / "train.jsonl", to_train + replayed)
    write_examples(target / "test.jsonl", to_test + old_tests)
    values = {
        "job": "finetune", "bundle": str(folder), "objective.name": objective.options.name, "data.name": f"{config.name}-examples",
        "data.source": "files", "data.path": str(target / "train.jsonl"), "data.test_path": str(target / "test.jsonl"),
        "data.sequence_length": objective.sequence_length, "data.format": "jsonl", "data.text_column": "text",
        "data.label_column": "label" if objective.labels else None, "evaluate.split": "test",
    }  # fmt: skip
    return with_values(config, values)


def _open_split(bundle: Bundle, name: str) -> Split:
    recorded = bundle.manifest and bundle.manifest.data
    if not recorded:
        raise UserError(f"{bundle.folder} does not say what data it was trained on: train it with manta finetune first")
    return Split.open(Path(recorded["folder"]), name)
