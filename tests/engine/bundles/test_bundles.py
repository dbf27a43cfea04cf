"""A bundle loads with plain transformers, knows itself again, and is found by its names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.bundles.bundle import Bundle, write_bundle
from engine.bundles.find import find_bundle
from engine.bundles.registry import Registry
from engine.config import Config
from engine.data.prepare import prepare
from engine.errors import UserError
from tests.engine.bundles.making import fresh_bundle


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
def test_a_changed_file_is_named(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was changed"):
        Bundle.open(copy).verify()


def test_a_changed_manifest_a_missing_and_an_added_file_are_named(copy: Path) -> None:
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


def test_other_weights_do_not_pass_the_golden_replay(written: Bundle) -> None:
    model = written.model()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(UserError, match="does not answer as recorded"):
        written.replay(model)


def test_an_option_that_another_version_had_is_dropped_if_unset_and_refused_if_set(written: Bundle) -> None:
    assert written.manifest
    recorded = written.manifest.objective
    older = replace(written, manifest=replace(written.manifest, objective=recorded | {"gone": None}))
    assert older.objective().options == written.objective().options
    newer = replace(written, manifest=replace(written.manifest, objective=recorded | {"to_come": 3}))
    with pytest.raises(UserError, match=r"written by another version: objective\.to_come"):
        newer.objective()


def test_a_bundle_in_bf16_replays_in_its_own_precision_and_in_another(tiny: Config, tmp_path: Path) -> None:
    whole = fresh_bundle(tiny, tmp_path / "whole")
    objective = whole.objective()
    ids = objective.tokenizer("import os\nimport sys\n")["input_ids"]
    requests = [{"prompt": ids[:4], "continuation": ids[4:]}]
    half = write_bundle(
        tmp_path / "half", model=whole.model(), objective=objective, name="half",
        golden_requests=requests, dtype=torch.bfloat16,
    )  # fmt: skip
    assert next(half.model().parameters()).dtype == torch.bfloat16
    half.replay(half.model())
    half.replay(half.model(torch.float32))


def test_a_tie_that_rounding_decides_is_no_other_answer(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "bundle")
    model = bundle.model()
    with torch.no_grad():  # two rows of the output embedding that are equal but for the last bit
        model.lm_head.weight[7] = model.lm_head.weight[6] * (1 + 2**-23)
    recorded = write_bundle(
        tmp_path / "tie", model=model, objective=bundle.objective(), name="tie",
        golden_requests=[{"prompt": [6, 7, 6, 7], "continuation": [7, 6, 7, 6]}],
    )  # fmt: skip
    other = recorded.model()
    with torch.no_grad():
        other.lm_head.weight[7] *= 1 - 2**-22
    recorded.replay(other)


def test_registry_and_names(tiny: Config, tmp_path: Path) -> None:
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


def test_a_plain_hugging_face_folder_is_a_bundle_too(written: Bundle, copy: Path) -> None:
    (copy / "manta.json").unlink()
    plain = Bundle.open(copy)
    plain.verify()
    assert not plain.has_manifest
    request = [{"prompt": "def f", "max_tokens": 4}]
    assert plain.objective().predict(plain.model(), request) == written.objective().predict(written.model(), request)
    with pytest.raises(UserError, match="holds no model"):
        Bundle.open(copy.parent)


def test_writing_again_replaces_the_older_one(tiny: Config, tmp_path: Path) -> None:
    old = fresh_bundle(tiny, tmp_path / "bundle", seed=1)
    objective = old.objective()
    new = write_bundle(
        tmp_path / "bundle", model=fresh_bundle(tiny, tmp_path / "other", seed=2).model(),
        objective=objective, name="new", golden_requests=[], parent=old.hash, data={"folder": str(prepare(tiny)), "hash": "x"},
    )  # fmt: skip
    assert Bundle.open(tmp_path / "bundle").hash == new.hash != old.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "other"]
