"""A bundle's model card: README.md with Hugging Face's metadata, to which evaluations are appended later.

The manifest holds the hash of the card as it was first written. Each later evaluation is a section behind a marker (an
HTML comment), which holds the evaluation's record, the hash of the section and the hash of the previous marker; the first
marker holds the manifest's hash. So the card grows while the manifest stays, and a changed or removed section is detected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.atomic_write import write_atomically
from engine.data.manifest import Manifest as DataManifest
from engine.errors import UserError
from engine.objectives.contract import Objective

CARD = "README.md"
MARKER = re.compile(rb"^<!-- manta:evaluation (\{.*\}) -->\n", re.MULTILINE)


@dataclass(frozen=True)
class CardContent:
    """What the card is written from."""

    manifest: Mapping[str, Any]  # the manifest's fields, but for the hashes of the files
    num_parameters: int
    objective: type[Objective]
    intended_use: str = ""  # the author's own words; empty: a default sentence
    limits: str = ""


def write_card(folder: Path, card: CardContent) -> None:
    """Write README.md."""
    from huggingface_hub import EvalResult, ModelCardData

    manifest = card.manifest
    task = card.objective.pipeline_tag
    purpose = card.objective.intended_use or f"its task, {manifest['objective']['name']}"
    data = _load_data_manifest(manifest["data"])
    dataset = data.name if data else "not known"
    library = "diffusers" if card.objective.auto_class.startswith("diffusers.") else "transformers"
    is_stated = manifest["license"] != "not stated"
    is_identifier = is_stated and re.fullmatch(r"[A-Za-z0-9.-]+", manifest["license"]) is not None
    metrics = {name.removeprefix("validation_"): value for name, value in manifest["evaluation"].items()}
    results = [
        EvalResult(
            task_type=task or manifest["objective"]["name"], dataset_type=dataset, dataset_name=dataset,
            dataset_split="validation", metric_type=name, metric_value=value,
        )
        for name, value in metrics.items() if isinstance(value, (int, float))
    ]  # fmt: skip
    header = ModelCardData(
        license=manifest["license"].lower() if is_identifier else "other",
        license_name=None if is_identifier else manifest["license"],
        library_name=library,
        pipeline_tag=task,
        tags=["manta"],
        model_name=manifest["name"],
        eval_results=results or None,
    )
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in metrics.items()]
    sections = {
        "": f"{card.num_parameters:,} parameters, written {manifest['created']}. It loads with plain `{library}`; "
        "`manta.json` beside this file holds the hashes of all files and the golden outputs.",
        "Intended use": card.intended_use or f"For {purpose}. Any other use was not evaluated.",
        "Data": _data_section(manifest["data"], data),
        "License": manifest["license"]
        if is_stated
        else "Not stated. The license of the data may apply to the model too.",
        "Training": _training_section(manifest),
        "Energy": _energy_section((manifest["training"] or {}).get("energy")),
        "Evaluation": _table(("metric, on validation", "value"), rows)
        if rows
        else "None when the bundle was written; later evaluations follow at the end.",
        "Slices": "None when the bundle was written. `manta evaluate evaluate.slice_column=COLUMN` adds metrics by group.",
        "Limits": card.limits or _limits_section(manifest, data),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" if title else f"{text}\n" for title, text in sections.items())
    (folder / CARD).write_text(
        f"---\n{header.to_yaml()}\n---\n\n# {manifest['name']}\n\n{body}".replace("<!--", "<! --"), "utf-8"
    )


def add_evaluation(folder: Path, manifest_hash: str, record: dict[str, Any], text: str) -> None:
    """Append an evaluation to the card: its record, for machines, and a section of Markdown. The file is replaced atomically."""
    content = (folder / CARD).read_bytes()
    hashes = [marker["hash"] for marker, _ in _sections(content)]
    section = f"## Evaluation of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n\n{text.strip()}\n".replace("<!--", "<! --")
    marker = {"previous": hashes[-1] if hashes else manifest_hash, "text": _sha256(section.encode()), "facts": record}
    line = json.dumps(marker | {"hash": _marker_hash(marker)}, sort_keys=True).replace("--", "-\\u002d")
    added = f"\n<!-- manta:evaluation {line} -->\n{section}".encode()
    # Not in the bundle's folder: a concurrent `Bundle.verify` would refuse an additional file.
    beside = folder.with_name(f".{folder.name}.{CARD}.part")
    write_atomically(folder / CARD, content + added, temporary=beside)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the evaluations that were appended to a bundle's card, in order."""
    if not (folder / CARD).is_file():
        return []
    return [marker["facts"] for marker, _ in _sections((folder / CARD).read_bytes())]


def original_card(file: Path) -> bytes:
    """Return the card as it was when the bundle was written."""
    content = file.read_bytes()
    first = MARKER.search(content)
    return content[: first.start() - 1] if first else content  # the line feed before a marker belongs to its section


def verify_card(folder: Path, manifest_hash: str) -> None:
    """Check the appended evaluations. Raises UserError if one was changed, or one before another was removed."""
    file, previous = folder / CARD, manifest_hash
    if not file.is_file():
        return
    for number, (marker, section) in enumerate(_sections(file.read_bytes()), start=1):
        content = {key: marker.get(key) for key in ("previous", "text", "facts")}
        expected = {"previous": previous, "text": _sha256(section), "hash": _marker_hash(content)}
        if any(marker.get(key) != value for key, value in expected.items()):
            raise UserError(f"{file} was changed since the bundle was written (its evaluation {number}): refused")
        previous = marker["hash"]


def _sections(content: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (marker, text) of each evaluation; a marker that is not JSON has an empty hash."""
    matches = list(MARKER.finditer(content))
    for match, following in zip(matches, [*matches[1:], None]):
        try:
            marker = json.loads(match[1])
        except ValueError:
            marker = {"hash": ""}
        yield marker, content[match.end() : following.start() - 1 if following else len(content)]


def _marker_hash(marker: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(marker, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _load_data_manifest(recorded: Mapping[str, str] | None) -> DataManifest | None:
    if not recorded:
        return None
    try:
        return DataManifest.load(recorded["folder"])
    except UserError:
        return None


def _data_section(recorded: Mapping[str, str] | None, data: DataManifest | None) -> str:
    if not recorded:
        return "Not known."
    if data is None:
        return f"Prepared data with the hash `{recorded['hash']}`; its folder was not available when this card was written."
    splits = [(name, f"{s['documents']:,}", f"{s['tokens']:,}") for name, s in data.splits.items()]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in data.skipped.items())
    return (
        f"`{data.name}`, {data.kind}, from {data.sources.get('files', 0):,} files of {data.sources.get('bytes', 0):,} bytes; "
        f"license: {data.license}; hash `{data.hash}`.\n\n{_table(('split', 'documents', 'tokens'), splits)}"
        + (f"\n\nSkipped: {skipped}." if skipped else "")
        + (f"\n\nLabels: {', '.join(data.labels[:50])}." if data.labels else "")
    )


def _training_section(manifest: Mapping[str, Any]) -> str:
    training = manifest["training"] or {}
    run, config = manifest["run"] or {}, training.get("config", {})
    rows = [("job", training.get("job")), ("run", run.get("name")), ("step", run.get("step"))]
    rows += [
        ("started from", manifest["parent"] and f"bundle `{manifest['parent']}`"),
        ("tokens", training.get("tokens")),
    ]
    rows += [(f"`{key}`", config.get(key)) for key in ("seed", "data.sequence_length", "train.global_batch")]
    rows += [(f"`{key}`", value) for key, value in config.items() if key.startswith(("optim.", "schedule."))]
    rows += [(f"`{key}`", config.get(key)) for key in ("train.precision",)]
    known = [(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value) for name, value in rows
             if value is not None and value != {}]  # fmt: skip
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    return (_table(("", ""), known) + "\n\n" if known else "") + f"Versions: {versions}."


def _energy_section(energy: Mapping[str, Any] | None) -> str:
    """State the energy of the training, measured by a counter or estimated, and which of the two it is."""
    if not energy or not (energy.get("measured_j") or energy.get("estimated_j")):
        return "Not known: there was no energy counter, and no basis for an estimate."
    amounts = [
        f"{word}: {joules / 3600:,.3g} Wh ({energy['how'][kind]})"
        for kind, word in (("measured_j", "Measured"), ("estimated_j", "**Estimated, not measured**"))
        if (joules := energy.get(kind))
    ]
    return "; ".join(amounts) + ". Of this training only, without that of the bundle it started from."


def _limits_section(manifest: Mapping[str, Any], data: DataManifest | None) -> str:
    limits = [
        f"The input is at most {manifest['sequence_length']:,} tokens.",
        "It inherits the gaps and errors of its training data, which were not checked for bias"
        + (f" ({data.name})." if data else "."),
        "A metric on held-out data of the same source says little about data from other sources.",
    ]
    if manifest["labels"]:
        limits.insert(1, f"It knows only its {len(manifest['labels'])} labels, and assigns one of them to any input.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)
