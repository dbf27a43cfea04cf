"""Promotion requires a valid bundle, a complete lineage and a better result, or a reason; comparison; lineage page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.lineage import record_deployment, trace_lineage
from engine.bundles.model_card import original_card
from engine.bundles.registry import Registry
from engine.config import Config, with_values
from engine.errors import UserError
from engine.evaluate.bootstrap import Comparison
from engine.evaluate.job import run_evaluation
from engine.evaluate.lineage_page import lineage_tree, write_lineage_page
from engine.evaluate.promote import decide_promotion, promote, roll_back
from engine.serve.deploy import deploy
from jobs.compare import compare
from tests.lives import Lives

BETTER = Comparison("accuracy", 0.2, 0.1, 0.3, "better")


@pytest.mark.parametrize(
    ("comparison", "reason", "promoted", "message"),
    [
        (None, None, True, "the first champion of this name"),
        (None, "a trial", True, "a trial"),
        (BETTER, None, True, r"a is better than b: accuracy differs by \+0.2000"),
        (Comparison("accuracy", 0.01, -0.1, 0.1, "not told apart"), None, False, "no significant difference between a and b.*promote.reason="),
        (Comparison("accuracy", -0.2, -0.3, -0.1, "worse"), None, False, "a is worse than b"),
        (Comparison("accuracy", -0.2, -0.3, -0.1, "worse"), "it is smaller", True, "it is smaller .a is worse than b"),
    ],
)  # fmt: skip
def test_promotion_decision(comparison: Comparison | None, reason: str | None, promoted: bool, message: str) -> None:
    decision = decide_promotion(comparison, ("a", "b"), reason)
    assert decision.promote is promoted
    with pytest.raises(UserError, match=message):
        raise UserError(decision.reason)


@pytest.fixture(scope="module")
def home(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A copy of the trained runs with a registry of its own; the data stay where they are."""
    runs = Path(shutil.copytree(lives.runs_dir, tmp_path_factory.mktemp("home") / "runs"))
    return with_values(lives.labelled, {"runs_dir": str(runs)})


def asking(home: Config, name: str, **values: str) -> Config:
    return with_values(home, {"bundle": name, "name": "asking", **{k.replace("__", "."): v for k, v in values.items()}})


def test_promotion_and_rollback(home: Config, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Path(home.runs_dir)
    first = promote(asking(home, "poor", promote__model="demo"), False)
    assert (first.number, str(first)) == (1, "demo/1")
    second = promote(asking(home, "good", promote__model="demo"), False)
    assert "good is better than demo/1: accuracy differs by" in capsys.readouterr().out.replace("\n", " ")
    assert find_bundle("demo@champion", runs, home.tracking_uri) == second.folder
    assert promote(asking(home, "demo/2"), False) == second or "already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"demo/1 is worse than demo/2: .*promote\.reason="):
        promote(asking(home, "demo/1"), False)
    assert find_bundle("demo@champion", runs, home.tracking_uri) == second.folder
    promote(asking(home, "demo/1", promote__reason="a drill"), False)
    assert find_bundle("demo@champion", runs, home.tracking_uri) == first.folder
    roll_back(asking(home, "demo", promote__reason="the drill is over"))
    assert find_bundle("demo@champion", runs, home.tracking_uri) == second.folder
    with pytest.raises(UserError, match="nobody is not a registered name"):
        roll_back(asking(home, "nobody"))


def test_comparison_exit_codes(home: Config) -> None:
    pair = {"evaluate__against": "poor"}
    assert compare(asking(home, "good", **pair), False) == 0
    assert compare(asking(home, "poor", evaluate__against="good"), False) == 3
    assert compare(asking(home, "good", evaluate__against="good"), False) == 4
    with pytest.raises(UserError, match=r"is for classification and .* for causal_lm"):
        compare(asking(home, "good", evaluate__against="base"), False)
    with pytest.raises(UserError, match="manta compare A B"):
        compare(asking(home, "good"), False)


def change_manifest(folder: Path, **changes: object) -> None:
    """Alter a manifest, and its own hash with it."""
    import dataclasses

    manifest = Bundle.open(folder).manifest
    assert manifest is not None
    altered = dataclasses.replace(manifest, **changes)  # type: ignore[arg-type]
    altered = dataclasses.replace(altered, hash=altered.content_hash())
    (folder / "manta.json").write_text(json.dumps(dataclasses.asdict(altered)))
    (folder / "README.md").write_bytes(
        original_card(folder / "README.md")
    )  # the evaluations on the card no longer match


def test_bundles_of_different_data_need_named_data(home: Config, tmp_path: Path) -> None:
    from engine.data.prepare import prepare

    rows = "\n".join(json.dumps({"text": f"words {i} {'bright' if i % 2 else 'dull'}", "label": "good" if i % 2 else "bad"}) for i in range(200))  # fmt: skip
    (tmp_path / "other.jsonl").write_text(rows)
    other = with_values(home, {"data.path": str(tmp_path / "other.jsonl"), "data.name": "other"})
    data = prepare(other)
    from engine.data.manifest import Manifest

    folder = Path(shutil.copytree(Path(home.runs_dir) / "poor" / "bundle", tmp_path / "elsewhere" / "bundle"))
    change_manifest(folder, data={"folder": str(data), "hash": Manifest.load(data).hash})
    asked = asking(home, "good", evaluate__against=str(folder))
    with pytest.raises(UserError, match=r"good was trained on labelled .* on other .*say which data"):
        compare(asked, False)
    assert compare(asked, True) == 0


def tamper_tensor(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 255
    (folder / "model.safetensors").write_bytes(content)


def tamper_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab":  {', 1))


def tamper_manifest(folder: Path) -> None:
    text = (folder / "manta.json").read_text()
    (folder / "manta.json").write_text(text.replace('"license": "not stated"', '"license": "MIT"'))


def tamper_answers(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert manifest is not None
    golden = [{**one, "output": {**one["output"], "scores": {"bad": 0.5, "good": 0.5}}} for one in manifest.golden]
    change_manifest(folder, golden=golden)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (tamper_tensor, r"model\.safetensors was changed"),
        (tamper_tokenizer, r"tokenizer\.json was changed"),
        (tamper_manifest, r"manta\.json was changed"),
        (tamper_answers, "does not reproduce its golden outputs"),
    ],
)
def test_tampered_bundle_is_refused(home: Config, tmp_path: Path, tamper: Callable[[Path], None], named: str) -> None:
    folder = Path(shutil.copytree(Path(home.runs_dir) / "good" / "bundle", tmp_path / "t" / "bundle"))
    tamper(folder)
    with pytest.raises(UserError, match=named):
        promote(asking(home, str(folder)), False)
    assert not Registry(home.tracking_uri, home.registry_dir).versions("t")


@pytest.mark.parametrize(("tamper", "named"), [(tamper_tensor, r"model\.safetensors"), (tamper_tokenizer, r"tokenizer\.json"), (tamper_manifest, r"manta\.json")])  # fmt: skip
def test_tampered_bundle_is_not_served(
    ray: None, home: Config, tmp_path: Path, tamper: Callable[[Path], None], named: str
) -> None:
    folder = Path(shutil.copytree(Path(home.runs_dir) / "good" / "bundle", tmp_path / "t" / "bundle"))
    tamper(folder)
    with pytest.raises(UserError, match=named):
        deploy(with_values(home, {"serve.port": 18997}), {"t": folder})


def test_incomplete_lineage_is_refused(home: Config, tmp_path: Path) -> None:
    registry = Registry(home.tracking_uri, home.registry_dir)
    runs = Path(shutil.copytree(home.runs_dir, tmp_path / "runs"))

    def problems() -> str:
        bundle = Bundle.open(runs / "good" / "bundle")
        return "; ".join(trace_lineage(bundle, "good", runs, registry).all_problems())

    assert problems() == ""
    (runs / "base" / "bundle").rename(tmp_path / "aside")
    assert "the bundle that good was trained from" in problems()
    assert "was not found" in problems()
    (tmp_path / "aside").rename(runs / "base" / "bundle")
    lines = (runs / "good" / "metrics.jsonl").read_text()
    (runs / "good" / "metrics.jsonl").write_text(lines.replace('"samples_hash": "', '"samples_hash": "0'))
    assert "no run 'good' in" in problems()
    with pytest.raises(UserError, match="the lineage of good is incomplete: no run 'good'"):
        promote(with_values(asking(home, "good"), {"runs_dir": str(runs), "tracking.uri": home.tracking_uri}), False)
    (runs / "good" / "metrics.jsonl").write_text(lines)
    change_manifest(runs / "good" / "bundle", config_hash="0")
    assert "does not match its recorded hash" in problems()
    change_manifest(runs / "good" / "bundle", training=None, data=None, run=None)
    assert "does not say what data" in problems()
    assert "does not say which run trained it" in problems()


def test_changed_data_are_a_lineage_problem(lives: Lives, home: Config, tmp_path: Path) -> None:
    manifest = lives.bundle("good").manifest
    assert manifest is not None
    assert manifest.data is not None
    data = Path(shutil.copytree(manifest.data["folder"], tmp_path / "data"))
    folder = Path(shutil.copytree(lives.bundle("good").folder, tmp_path / "b" / "bundle"))
    change_manifest(folder, data={**manifest.data, "folder": str(data)})
    shard = next(data.glob("train-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    registry = Registry(home.tracking_uri, home.registry_dir)
    (problem,) = trace_lineage(Bundle.open(folder), "b", Path(home.runs_dir), registry).all_problems()
    assert f"{shard} was changed" in problem


def test_lineage_page_shows_data_to_deployment(home: Config, tmp_path: Path) -> None:
    runs = Path(home.runs_dir)
    sweep = runs / "search" / "trials"
    sweep.mkdir(parents=True)
    shutil.copytree(runs / "good", sweep / "trial-7")  # as a sweep leaves it
    shutil.copytree(runs / "good" / "bundle", runs / "search" / "bundle")
    shutil.rmtree(sweep / "trial-7" / "bundle")
    run = Bundle.open(runs / "search" / "bundle").manifest
    assert run is not None
    assert run.run is not None
    change_manifest(runs / "search" / "bundle", run={**run.run, "name": "trial-7"}, name="trial-7")
    run_evaluation(asking(home, "search"))
    promote(asking(home, "search"), False)
    record_deployment(runs / "live", "http://127.0.0.1:9", {"search": runs / "search" / "bundle"})
    registry = Registry(home.tracking_uri, home.registry_dir)
    lineage = trace_lineage(Bundle.open(find_bundle("search", runs, home.tracking_uri)), "search", runs, registry)
    assert lineage.all_problems() == []
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(lineage_tree(lineage))
    shown = console.export_text()
    order = ["data rows-", "pretrain base", "bundle base", "sweep search", "trial trial-7", "bundle search", "evaluation test of",
             "version search/1", "champion", "deployment search at http://127.0.0.1:9", "down"]  # fmt: skip
    places = [shown.index(word) for word in order]
    assert places == sorted(places)
    page = write_lineage_page(tmp_path / "lineage.html", lineage).read_text()
    for word in ("trial-7", "search/1", "rows-", lineage.bundle.hash[:12], "Complete: every step was found"):
        assert word in page
    assert page.count("<svg") == 1
    assert page.count("<rect") == page.count("<tr>") - 1
    assert "src=" not in page
    assert "<script" not in page
