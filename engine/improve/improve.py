"""One round of learning from what clients sent: measure drift; where it is real, train, test, and offer a canary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.registry import Registry
from engine.config import Config, with_values
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.bootstrap import Comparison
from engine.evaluate.comparison import describe_comparison
from engine.evaluate.promote import compare_with_champion, decide_promotion, registered_name
from engine.improve.drift import Drift, RequestStats, measure_drift
from engine.improve.examples import (
    Example,
    examples_from_feedback,
    measure_examples,
    measure_requests,
    read_requests_and_feedback,
    training_examples,
    write_examples,
)
from engine.progress import console
from engine.train.launch import train

MEASURE_LABELS = {"lengths": "tokens of an input", "tokens": "words (share of the one that changed most)", "confidence": "confidence",
         "labels": "answers (share of the label that changed most)", "bad": "bad ratings"}  # fmt: skip
REFERENCE = 500  # held-out examples of the training data that stand for what was learnt, at most

Session = Callable[[Config], AbstractContextManager[None]]


@dataclass(frozen=True)
class DriftReport:
    """What was found before anything is done."""

    bundle: Bundle
    measured: list[Drift]
    examples: list[Example]
    unknown: int  # corrections with labels that the model doesn't know
    requests: int
    feedback: int

    @property
    def has_drifted(self) -> bool:
        """Whether something has drifted."""
        return any(it.is_drift for it in self.measured)


def improve(config: Config, session: Session) -> int:
    """Look, and with improve.apply act; with improve.every_s again and again, each time as a run of its own.

    Return the exit code: 3 where the new version did not pass the gate, else 0. `session` connects to the Ray that trains.
    """
    used: dict[str, int] = {}
    if config.improve.every_s is None:
        return improve_once(config, session, used)
    while True:
        moment = time.strftime("%Y%m%d-%H%M%S")
        try:
            improve_once(with_values(config, {"name": f"{config.name}-{moment}"}), session, used)
        except UserError as error:  # too little is recorded yet, perhaps
            console.print(str(error), markup=False)
        time.sleep(config.improve.every_s)


def improve_once(config: Config, session: Session, used: dict[str, int]) -> int:
    """Look and act once. `used`: examples, by bundle, that were there when it was last learnt from; kept up to date."""
    assert config.bundle
    folder = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri)
    found = measure(config, Bundle.open(folder))
    show(found)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    facts = {"bundle": found.bundle.hash, "requests": found.requests, "feedback": found.feedback, "examples": len(found.examples), "drift": [asdict(it) for it in found.measured]}  # fmt: skip
    (config.run_dir / "drift.json").write_text(json.dumps(facts, indent=1) + "\n")
    options = config.improve
    if not found.has_drifted:
        console.print("nothing has drifted: nothing to do")
        return 0
    new = len(found.examples) - used.get(found.bundle.hash, 0)
    if new < options.min_examples:
        console.print(
            f"drifted, and {new} examples to learn from are less than improve.min_examples {options.min_examples}: "
            "more corrections are needed (POST /v1/feedback, of requests sent with store=true)"
        )
        return 0
    if not options.apply:
        console.print(f"drifted, and {len(found.examples)} examples to learn from: improve.apply=true trains, tests and registers")  # fmt: skip
        return 0
    used[found.bundle.hash] = len(found.examples)
    return train_and_register(config, found, folder, session)


def measure(config: Config, bundle: Bundle) -> DriftReport:
    """Measure what was recorded of a bundle against what it was trained on. Raises UserError where too little was."""
    options = config.improve
    folders = [Path(options.records)] if options.records else sorted(Path(config.runs_dir).glob("*/feedback"))
    asked, told = read_requests_and_feedback(folders, bundle.hash)
    if len(asked) < options.min_requests:
        where = ", ".join(map(str, folders)) or f"{config.runs_dir}/*/feedback"
        raise UserError(
            f"{len(asked)} requests of {config.bundle} ({bundle.hash[:12]}) are recorded in {where}, and improve.min_requests "
            f"is {options.min_requests}: clients let a request be kept with store=true"
        )
    objective, model = bundle.objective(), bundle.model()
    recent, ratings = asked[-options.recent :], [it.is_bad for it in told if it.is_bad is not None]
    half = len(ratings) // 2
    now = measure_requests(bundle, model, recent, ratings[half:])
    if objective.labels:
        reference = measure_examples(bundle, model, training_examples(_split(bundle, "validation"), objective, REFERENCE))
        reference = RequestStats(reference.lengths, reference.tokens, reference.confidence, reference.labels, ratings[:half])
    else:  # prompts are no documents: the earlier ones are what the later ones are compared with
        middle = len(asked) // 2
        reference = measure_requests(bundle, model, asked[:middle], ratings[:half])
        now = measure_requests(bundle, model, asked[middle:][-options.recent :], ratings[half:])
    measured = measure_drift(reference, now, options.least_psi, options.least_bad, options.significance)
    examples, unknown = examples_from_feedback(asked, told, objective.labels)
    return DriftReport(bundle, measured, examples, unknown, len(asked), len(told))


def show(found: DriftReport) -> None:
    """Print what was found."""
    console.print(f"{found.requests:,} requests and feedback on {found.feedback:,} of {found.bundle.folder}")
    table = Table("measure", "then", "now", "PSI or difference", "p", "samples", "drifted")
    for it in found.measured:
        table.add_row(
            MEASURE_LABELS[it.measure], f"{it.before:.3g}", f"{it.after:.3g}", f"{it.effect_size:.3f}", f"{it.p_value:.2g}",
            f"{it.num_samples[0]:,} / {it.num_samples[1]:,}", "yes" if it.is_drift else "no",
        )  # fmt: skip
    console.print(table)
    if found.unknown:
        console.print(f"{found.unknown} corrections name labels that the model doesn't know: left out")


def train_and_register(config: Config, found: DriftReport, folder: Path, session: Session) -> int:
    """Train from the bundle on what was learnt before and what is new, compare the two on examples held back, register."""
    assert config.bundle
    training = training_config(config, found, folder)
    with session(training):
        outcome = train(training)
    candidate = Bundle.open(outcome.run.bundle)
    names = (training.name, config.bundle)
    compared: Comparison = compare_with_champion(candidate, found.bundle, names, training, data_given=True)
    decision = decide_promotion(compared, names, None)
    if not decision.promote:
        console.print(f"not good enough: {describe_comparison(compared, names)}")
        return 3
    registry = Registry(config.tracking_uri, config.registry_dir)
    name = config.promote.model or registered_name(config.bundle, folder, registry)
    version = registry.register(candidate, name)
    console.print(f"registered {version}: {decision.reason}")
    console.print(f"try it:    manta deploy bundle={version} serve.names={name} serve.strategy=canary cluster=auto")
    console.print(f"then:      manta promote {version} promote.reason='its canary went well'")
    return 0


def training_config(config: Config, found: DriftReport, folder: Path) -> Config:
    """Write the examples to learn and those to test with, and return the config of the training."""
    options, home = config.improve, config.run_dir / "examples"
    objective = found.bundle.objective()
    new = {tests: [it for it in found.examples if it.is_held_out == tests] for tests in (True, False)}
    old = training_examples(_split(found.bundle, "train"), objective, round(options.replay * len(new[False])))
    held = training_examples(_split(found.bundle, "test"), objective, max(len(new[True]), 1))
    write_examples(home / "train.jsonl", new[False] + old)
    write_examples(home / "test.jsonl", new[True] + held)
    values = {
        "job": "finetune", "bundle": str(folder), "objective.name": objective.options.name, "data.name": f"{config.name}-examples",
        "data.source": "files", "data.path": str(home / "train.jsonl"), "data.test_path": str(home / "test.jsonl"),
        "data.sequence_length": objective.sequence_length, "data.format": "jsonl", "data.text_column": "text",
        "data.label_column": "label" if objective.labels else None, "evaluate.split": "test",
    }  # fmt: skip
    return with_values(config, values)


def _split(bundle: Bundle, name: str) -> Split:
    place = bundle.manifest and bundle.manifest.data
    if not place:
        raise UserError(f"{bundle.folder} does not say what data it was trained on: train it with manta finetune first")
    return Split.open(Path(place["folder"]), name)
