"""The model card states what is known, is covered by the manifest, and takes further evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from engine.bundles.bundle import Bundle, Manifest
from engine.bundles.model_card import CardContent, add_evaluation, read_evaluations, write_card
from engine.errors import UserError
from engine.objectives.contract import objective_class
from tests.lives import Lives


@pytest.fixture
def folder(lives: Lives, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lives.bundle("good").folder, tmp_path / "copy"))


def test_card_of_a_trained_bundle_states_its_origin(lives: Lives) -> None:
    bundle = lives.bundle("good")
    manifest = bundle.manifest
    assert manifest is not None
    assert manifest.training is not None
    card = ModelCard.load(bundle.folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert (card.data.license, card.data.license_name) == ("other", "not stated")
    assert card.data.eval_results is not None
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["accuracy"] == manifest.evaluation["validation_accuracy"]
    assert manifest.data is not None
    energy = manifest.training["energy"]
    kind = "Measured" if energy["measured_j"] else "**Estimated, not measured**"
    for expected in (
        manifest.parent,
        manifest.data["hash"],
        "Labels: bad, good",
        kind,
        "| `optim.lr` | 0.01 |",
        "## Limits",
    ):
        assert expected
        assert expected in card.text, expected
    assert energy["measured_j"] + energy["estimated_j"] > 0


def test_bundle_verifies_after_evaluations_are_added(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for number in range(2):
        add_evaluation(folder, bundle.hash, {"id": number, "note": "a --> b"}, f"accuracy of round {number} <!-- x")
        Bundle.open(folder).verify()
    assert Bundle.open(folder).hash == bundle.hash
    assert [evaluation["id"] for evaluation in read_evaluations(folder)] == [0, 1]
    assert read_evaluations(folder)[0]["note"] == "a --> b"
    assert (folder / "README.md").read_text().index("round 0") < (folder / "README.md").read_text().index("round 1")
    ModelCard.load(folder / "README.md")
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("round 0", "round 9", r"README\.md was changed .*evaluation 1"),
        ('"id": 1', '"id": 7', r"README\.md was changed .*evaluation 2"),
        ("## Limits", "## No limits", r"README\.md was changed"),
    ],
)
def test_verify_names_a_changed_card(folder: Path, old: str, new: str, message: str) -> None:
    for number in range(2):
        add_evaluation(folder, Bundle.open(folder).hash, {"id": number}, f"round {number}")
    card = folder / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        Bundle.open(folder).verify()


def test_verify_detects_a_removed_evaluation(folder: Path) -> None:
    for number in range(3):
        add_evaluation(folder, Bundle.open(folder).hash, {"id": number}, f"round {number}")
    card = folder / "README.md"
    parts = card.read_text().split("\n<!-- manta:evaluation ")
    card.write_text("\n<!-- manta:evaluation ".join([parts[0], parts[1], parts[3]]))
    with pytest.raises(UserError, match="evaluation 2"):
        Bundle.open(folder).verify()


def test_verify_rejects_an_evaluation_of_another_bundle(lives: Lives, folder: Path) -> None:
    add_evaluation(folder, lives.bundle("poor").hash, {"id": 0}, "of another")
    with pytest.raises(UserError, match="evaluation 1"):
        Bundle.open(folder).verify()


def test_bundle_without_a_card_verifies(folder: Path) -> None:
    tree: dict[str, Any] = json.loads((folder / "manta.json").read_text())
    (folder / "README.md").unlink()
    del tree["training"], tree["files"]["README.md"]
    tree["hash"] = ""
    content = {**tree}
    import hashlib

    tree["hash"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()  # as it was computed then
    (folder / "manta.json").write_text(json.dumps(tree))
    old = Bundle.open(folder)
    old.verify()
    assert read_evaluations(folder) == []
    assert Manifest(**tree).content_hash() == tree["hash"]


def test_author_texts_and_license_replace_the_defaults(lives: Lives, tmp_path: Path) -> None:
    manifest = lives.bundle("base").manifest
    assert manifest is not None
    fields = vars(manifest) | {"license": "Apache-2.0", "training": None}
    write_card(
        tmp_path, CardContent(fields, 5, objective_class("causal_lm"), "Writing <!-- odd -->.", "Do not trust it.")
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.license_name) == ("apache-2.0", None)
    assert "Do not trust it." in card.text
    assert "<!-- odd" not in card.text
    assert "Not known: there was no energy counter" in card.text
