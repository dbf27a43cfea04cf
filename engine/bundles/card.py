"""A bundle's model card: README.md with Hugging Face's metadata, to which later evaluations are added.

The manifest holds the hash of the card as it was written (its base). Each evaluation after that is a section behind a
marker, which holds the evaluation's facts, the section's hash and the hash of the marker before it; the first one's is
the manifest's own. So the card grows, the manifest stays, and a changed figure or a section taken from between is found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.atomic_write import write_atomically
from engine.data.manifest import Manifest as DataManifest
from engine.errors import UserError

CARD = "README.md"
MARKER = re.compile(rb"^<!-- manta:evaluation (\{.*\}) -->\n", re.MULTILINE)

TASKS = {  # auto class -> (Hugging Face's name of the task, what such a model is for)
    "AutoModelForCausalLM": ("text-generation", "continuing text of the kind that it was trained on"),
    "AutoModelForMaskedLM": ("fill-mask", "filling masked tokens, and as the start of a fine-tuning"),
    "AutoModelForSequenceClassification": ("text-classification", "naming the class of a text among those below"),
    "AutoModelForSeq2SeqLM": (
        "text2text-generation",
        "filling spans left out of a text, and as the start of a fine-tuning",
    ),
    "AutoModelForSpeechSeq2Seq": (
        "automatic-speech-recognition",
        "writing down speech of the kind that it was trained on",
    ),
    "AutoModelForImageClassification": ("image-classification", "naming the class of an image among those below"),
    "AutoModelForZeroShotImageClassification": (
        "zero-shot-image-classification",
        "telling which of some captions fits an image best",
    ),
    "diffusers.DiTTransformer2DModel": (None, "making small images of the classes whose labels are below"),
}


def write_card(folder: Path, facts: Mapping[str, Any], words: Mapping[str, str]) -> None:
    """Write README.md: the facts are a manifest's fields, `parameters` and `auto`; `words` its author's (intended_use, limits)."""
    from huggingface_hub import EvalResult, ModelCardData

    task, purpose = TASKS.get(facts["auto"], (None, f"its task, {facts['objective']['name']}"))
    data = _data(facts["data"])
    dataset = data.name if data else "not known"
    library = "diffusers" if facts["auto"].startswith("diffusers.") else "transformers"
    stated = facts["license"] != "not stated"
    known = stated and re.fullmatch(r"[A-Za-z0-9.-]+", facts["license"]) is not None
    results = [
        EvalResult(
            task_type=task or facts["objective"]["name"], dataset_type=dataset, dataset_name=dataset,
            dataset_split="validation", metric_type=name.removeprefix("validation_"), metric_value=value,
        )
        for name, value in facts["evaluation"].items() if isinstance(value, (int, float))
    ]  # fmt: skip
    header = ModelCardData(
        license=facts["license"].lower() if known else "other",
        license_name=None if known else facts["license"],
        library_name=library,
        pipeline_tag=task,
        tags=["manta"],
        model_name=facts["name"],
        eval_results=results or None,
    )
    sections = {
        "": f"{facts['parameters']:,} parameters, written {facts['created']}. It loads with plain `{library}`; "
        "`manta.json` beside this file holds the hashes of all files and golden answers.",
        "Intended use": words.get("intended_use") or f"For {purpose}. Any other use was not evaluated.",
        "Data": _about_data(facts["data"], data),
        "License": facts["license"] if stated else "Not stated. The license of the data may bind the model too.",
        "Training": _about_training(facts),
        "Energy": _about_energy((facts["training"] or {}).get("energy")),
        "Evaluation": _table(
            ("metric, on validation", "value"),
            [
                (n.removeprefix("validation_"), f"{v:.4f}" if isinstance(v, float) else v)
                for n, v in facts["evaluation"].items()
            ],
        )
        if facts["evaluation"]
        else "None when the bundle was written; later ones follow at the end.",
        "Slices": "None when the bundle was written. `manta evaluate evaluate.slice_column=COLUMN` adds figures by group.",
        "Limits": words.get("limits") or _limits(facts, data),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" if title else f"{text}\n" for title, text in sections.items())
    (folder / CARD).write_text(
        f"---\n{header.to_yaml()}\n---\n\n# {facts['name']}\n\n{body}".replace("<!--", "<! --"), "utf-8"
    )


def add_evaluation(folder: Path, manifest_hash: str, facts: dict[str, Any], text: str) -> None:
    """Add an evaluation to the card: its facts, for machines, and a section of Markdown. The file is replaced at once."""
    content = (folder / CARD).read_bytes()
    chain = [record["hash"] for record, _ in _sections(content)]
    section = f"## Evaluation of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n\n{text.strip()}\n".replace("<!--", "<! --")
    record = {"previous": chain[-1] if chain else manifest_hash, "text": _sha256(section.encode()), "facts": facts}
    marker = json.dumps(record | {"hash": _record_hash(record)}, sort_keys=True).replace("--", "-\\u002d")
    added = f"\n<!-- manta:evaluation {marker} -->\n{section}".encode()
    beside = folder.with_name(
        f".{folder.name}.{CARD}.part"
    )  # in the folder, a reader's check of the bundle would refuse it
    write_atomically(folder / CARD, content + added, temporary=beside)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the facts of the evaluations that were added to a bundle's card, in their order."""
    if not (folder / CARD).is_file():
        return []
    return [record["facts"] for record, _ in _sections((folder / CARD).read_bytes())]


def original_card(file: Path) -> bytes:
    """Return the card as the bundle was written with it."""
    content = file.read_bytes()
    first = MARKER.search(content)
    return content[: first.start() - 1] if first else content  # the line feed before a marker is the section's


def verify_card(folder: Path, manifest_hash: str) -> None:
    """Check the evaluations that were added. Raises UserError where one was changed, or one between others taken out."""
    file, previous = folder / CARD, manifest_hash
    if not file.is_file():
        return
    for number, (record, section) in enumerate(_sections(file.read_bytes()), start=1):
        link = {key: record.get(key) for key in ("previous", "text", "facts")}
        expected = {"previous": previous, "text": _sha256(section), "hash": _record_hash(link)}
        if any(record.get(key) != value for key, value in expected.items()):
            raise UserError(f"{file} was changed since the bundle was written (its evaluation {number}): refused")
        previous = record["hash"]


def _sections(content: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (record, text) of each evaluation; one that is no JSON has no hash."""
    found = list(MARKER.finditer(content))
    for marker, following in zip(found, [*found[1:], None]):
        try:
            record = json.loads(marker[1])
        except ValueError:
            record = {"hash": ""}
        yield record, content[marker.end() : following.start() - 1 if following else len(content)]


def _record_hash(record: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(record, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _data(place: Mapping[str, str] | None) -> DataManifest | None:
    if not place:
        return None
    try:
        return DataManifest.load(place["folder"])
    except UserError:
        return None


def _about_data(place: Mapping[str, str] | None, data: DataManifest | None) -> str:
    if not place:
        return "Not known."
    if data is None:
        return f"Prepared data with the hash `{place['hash']}`; its folder was not at hand when this card was written."
    splits = [(name, f"{s['documents']:,}", f"{s['tokens']:,}") for name, s in data.splits.items()]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in data.skipped.items())
    return (
        f"`{data.name}`, {data.kind}, from {data.sources.get('files', 0):,} files of {data.sources.get('bytes', 0):,} bytes; "
        f"license: {data.license}; hash `{data.hash}`.\n\n{_table(('split', 'documents', 'tokens'), splits)}"
        + (f"\n\nLeft out: {skipped}." if skipped else "")
        + (f"\n\nLabels: {', '.join(data.labels[:50])}." if data.labels else "")
    )


def _about_training(facts: Mapping[str, Any]) -> str:
    training = facts["training"] or {}
    run, config = facts["run"] or {}, training.get("config", {})
    rows = [("job", training.get("job")), ("run", run.get("name")), ("step", run.get("step"))]
    rows += [("started from", facts["parent"] and f"bundle `{facts['parent']}`"), ("tokens", training.get("tokens"))]
    rows += [(f"`{key}`", config.get(key)) for key in ("seed", "data.sequence_length", "train.global_batch")]
    rows += [(f"`{key}`", value) for key, value in config.items() if key.startswith(("optim.", "schedule."))]
    rows += [(f"`{key}`", config.get(key)) for key in ("train.precision",)]
    told = [(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value) for name, value in rows
            if value is not None and value != {}]  # fmt: skip
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    return (_table(("", ""), told) + "\n\n" if told else "") + f"Versions: {versions}."


def _about_energy(energy: Mapping[str, Any] | None) -> str:
    """Tell the energy of the training: measured where a counter was, else estimated, and which of the two."""
    if not energy or not (energy.get("measured_j") or energy.get("estimated_j")):
        return "Not known: there was no counter to read, and nothing to estimate it by."
    told = [
        f"{word}: {joules / 3600:,.3g} Wh ({energy['how'][kind]})"
        for kind, word in (("measured_j", "Measured"), ("estimated_j", "**Estimated, not measured**"))
        if (joules := energy.get(kind))
    ]
    return "; ".join(told) + ". Training alone, without the start from which it went on."


def _limits(facts: Mapping[str, Any], data: DataManifest | None) -> str:
    limits = [
        f"It reads at most {facts['sequence_length']:,} tokens.",
        "What its training data lack or get wrong, it lacks or gets wrong; nobody has looked for bias in them"
        + (f" ({data.name})." if data else "."),
        "A figure on held-out data of the same source says little of data from elsewhere.",
    ]
    if facts["labels"]:
        limits.insert(1, f"It knows its {len(facts['labels'])} labels only, and nothing of what is none of them.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)
