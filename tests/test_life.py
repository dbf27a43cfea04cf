"""The whole life of a model at a small size: what `make demo` does, in about a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.bundles.bundle import Bundle
from engine.evaluate.sweep_page import write_sweep_page
from tests.browser import screenshot
from tests.ports import free_port


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which the demo has run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.manta", "demo", "experiment=demo_small", f"serve.port={free_port()}"],
        cwd=folder, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done


def test_the_whole_life(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = demo
    runs = folder / "runs"
    facts = json.loads((runs / "demo" / "summary.json").read_text())
    assert list(facts["seconds"]) == ["prepare", "pretrain", "sweep", "scratch", "evaluate", "deploy", "total"]
    assert facts["seconds"]["total"] == sum(seconds for stage, seconds in facts["seconds"].items() if stage != "total")
    for name in ("finetuned", "scratch", "majority"):
        accuracy = facts["accuracy"][name]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert len(facts["trials"]) == 3
    assert [request["what"] for request in facts["endpoint"]["requests"]] == [
        "classification",
        "completion",
        "streamed completion",
    ]
    assert {"hashes", "versions", "machine", "perplexity", "pretraining_paid"} <= set(facts)
    for name in ("demo", "demo-pretrain"):
        bundle = Bundle.open(runs / name / "bundle")
        bundle.verify()
        assert facts["hashes"][f"bundle {name}"] == bundle.hash
    winner = Bundle.open(runs / "demo" / "bundle").manifest
    assert winner is not None
    assert winner.parent == Bundle.open(runs / "demo-pretrain" / "bundle").hash
    page = (runs / "demo" / "report.html").read_text()
    assert facts["hashes"]["bundle demo"] in page
    assert "<script" not in page
    assert "report.html" in done.stdout
    assert "curl http://127.0.0.1" in done.stdout
    assert "deepspeed" not in (done.stdout + done.stderr).lower()

    from engine.bundles.find import find_bundle

    champion = find_bundle("champion", runs, f"sqlite:///{runs}/mlflow.db")  # the registry keeps bytes of its own
    assert Bundle.open(champion).hash == Bundle.open(runs / "demo" / "bundle").hash


@pytest.mark.parametrize(("page", "heading"), [("report", "h1"), ("sweep", "h1")])
def test_a_screenshot_shows_the_page(
    demo: tuple[Path, subprocess.CompletedProcess[str]], page: str, heading: str, browser_page: Any, tmp_path: Path
) -> None:
    run = demo[0] / "runs" / "demo"
    write_sweep_page(run, "demo", json.loads((run / "sweep.json").read_text()))
    browser_page.goto((run / f"{page}.html").as_uri())
    assert browser_page.locator(heading).first.is_visible()
    assert browser_page.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
    assert screenshot(browser_page, page, tmp_path).stat().st_size > 10_000
