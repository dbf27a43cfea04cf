"""A bundle loads with plain transformers, verifies its files and outputs, and is found by its names."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.bundles.bundle import Bundle, BundleInfo, write_bundle
from engine.bundles.find import find_bundle
from engine.bundles.registry import Registry
from engine.config import Config
from engine.data.prepare import prepare
from engine.errors import UserError
from tests.engine.bundles.small_bundles import fresh_bundle


@pytest.fixture(scope="module")
def written(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(tiny, tmp_path_factory.mktemp("bundles") / "mine" / "bundle")


@pytest.fixture
def copy(written: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.folder, tmp_path / "copy"))


def test_plain_transformers_gives_equal_outputs(written: Bundle) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(written.folder)
    model = AutoModelForCausalLM.from_pretrained(written.folder)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, written.model()(ids).logits)
    again = Bundle.open(written.folder)
    again.verify()
    again.replay(again.model())
    assert again.hash == written.hash


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_verify_names_a_changed_file(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was changed"):
        Bundle.open(copy).verify()


def test_verify_names_a_changed_manifest_and_a_missing_or_added_file(copy: Path) -> None:
    (copy / "extra.bin").write_text("x")
    with pytest.raises(UserError, match=r"extra\.bin was added"):
        Bundle.open(copy).verify()
    (copy / "extra.bin").unlink()
    (copy / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json is missing"):
        Bundle.open(copy).verify()
    tree = json.loads((copy / "manta.json").read_text())
    (copy / "manta.json").write_text(json.dumps(tree | {"name": "other"}))
    with pytest.raises(UserError, match=r"manta\.json was changed"):
        Bundle.open(copy).verify()


def test_golden_replay_rejects_other_weights(written: Bundle) -> None:
    model = written.model()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(UserError, match="does not reproduce its golden outputs"):
        written.replay(model)


def test_unknown_objective_option_is_dropped_if_unset_and_refused_if_set(written: Bundle) -> None:
    assert written.manifest
    recorded = written.manifest.objective
    older = replace(written, manifest=replace(written.manifest, objective=recorded | {"gone": None}))
    assert older.objective().options == written.objective().options
    newer = replace(written, manifest=replace(written.manifest, objective=recorded | {"to_come": 3}))
    with pytest.raises(UserError, match=r"written by another version of Manta: objective\.to_come"):
        newer.objective()


def test_bf16_bundle_replays_in_bf16_and_fp32(tiny: Config, tmp_path: Path) -> None:
    whole = fresh_bundle(tiny, tmp_path / "whole")
    objective = whole.objective()
    ids = objective.tokenizer("import os\nimport sys\n")["input_ids"]
    requests = [{"prompt": ids[:4], "continuation": ids[4:]}]
    half = write_bundle(tmp_path / "half", whole.model(), objective, BundleInfo("half", requests), torch.bfloat16)
    assert next(half.model().parameters()).dtype == torch.bfloat16
    half.replay(half.model())
    half.replay(half.model(torch.float32))


def test_golden_replay_accepts_another_token_of_equal_probability(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "bundle")
    model = bundle.model()
    with torch.no_grad():  # two rows of the output embedding that are equal but for the last bit
        model.lm_head.weight[7] = model.lm_head.weight[6] * (1 + 2**-23)
    golden = [{"prompt": [6, 7, 6, 7], "continuation": [7, 6, 7, 6]}]
    recorded = write_bundle(tmp_path / "tie", model, bundle.objective(), BundleInfo("tie", golden))
    other = recorded.model()
    with torch.no_grad():
        other.lm_head.weight[7] *= 1 - 2**-22
    recorded.replay(other)


def test_format_1_manifest_spells_license_with_c(copy: Path) -> None:
    tree = json.loads((copy / "manta.json").read_text())
    old = {"licence" if key == "license" else key: value for key, value in tree.items()}
    old |= {"format": 1, "licence": "Apache-2.0", "hash": ""}
    hashed = {key: value for key, value in old.items() if key != "training" or value is not None}
    old["hash"] = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()  # as it was computed then
    (copy / "manta.json").write_text(json.dumps(old))
    bundle = Bundle.open(copy)
    bundle.verify()
    assert bundle.manifest
    assert bundle.manifest.license == "Apache-2.0"
    assert bundle.manifest.to_dict() == old
    assert "licence" not in tree
    assert tree["format"] == 2


def test_registry_versions_and_names(tiny: Config, tmp_path: Path) -> None:
    uri, runs = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "runs"
    first = fresh_bundle(tiny, runs / "one" / "bundle", seed=1)
    second = fresh_bundle(tiny, runs / "two" / "bundle", seed=2)
    registry = Registry(uri, runs / "registry")
    one, two = registry.register(first, "demo"), registry.register(second, "demo")
    assert (one.number, two.number) == (1, 2)
    moved = Bundle.open(shutil.copytree(first.folder, tmp_path / "moved"))
    assert registry.register(moved, "demo") == registry.register(first, "demo") == one
    for number, alias in ((2, "challenger"), (1, "champion")):
        registry.client.set_registered_model_alias("demo", alias, str(number))
    kept = find_bundle("champion", runs, uri)
    assert kept != first.folder
    assert contents(kept) == contents(first.folder)
    registry.client.set_registered_model_alias("demo", "champion", "2")
    assert find_bundle("demo@champion", runs, uri) == find_bundle("demo", runs, uri) == two.folder
    assert find_bundle("demo/1", runs, uri) == kept
    assert find_bundle("one", runs, uri) == runs / "one" / "bundle"
    assert find_bundle(str(first.folder), runs, uri) == first.folder
    assert [v.number for v in registry.versions("demo") if v.aliases == ("challenger", "champion")] == [2]
    assert registry.lookup("nothing") is None
    with pytest.raises(
        UserError, match=r"bundle=on is neither .* there are one, two, demo/2 \(challenger\) \(champion\), demo/1"
    ):
        find_bundle("on", runs, uri)
    registry.register(second, "other")
    registry.client.set_registered_model_alias("other", "champion", "1")
    with pytest.raises(UserError, match="demo@champion or other@champion"):
        find_bundle("champion", runs, uri)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_plain_hugging_face_folder_opens_as_a_bundle(written: Bundle, copy: Path) -> None:
    (copy / "manta.json").unlink()
    plain = Bundle.open(copy)
    plain.verify()
    assert not plain.has_manifest
    request = [{"prompt": "def f", "max_tokens": 4}]
    assert plain.objective().predict(plain.model(), request) == written.objective().predict(written.model(), request)
    with pytest.raises(UserError, match="holds no model"):
        Bundle.open(copy.parent)


def test_write_replaces_an_existing_bundle(tiny: Config, tmp_path: Path) -> None:
    old = fresh_bundle(tiny, tmp_path / "bundle", seed=1)
    model = fresh_bundle(tiny, tmp_path / "other", seed=2).model()
    info = BundleInfo("new", [], parent=old.hash, data={"folder": str(prepare(tiny)), "hash": "x"})
    new = write_bundle(tmp_path / "bundle", model, old.objective(), info)
    assert Bundle.open(tmp_path / "bundle").hash == new.hash != old.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "other"]
