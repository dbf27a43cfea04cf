"""Options under the names of the previous version: understood everywhere, with a warning, and the same hashes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from engine.config import (
    Config,
    ServeConfig,
    current_keys,
    current_override,
    current_tree,
    fingerprint,
    former_names,
    from_dict,
    group,
    read_tree,
    to_dict,
    with_values,
)
from jobs.entry import compose

RENAMED = {
    "data.licence": "data.license",
    "card.licence": "card.license",
    "serve.max_batch": "serve.max_num_seqs",
    "serve.step_tokens": "serve.max_batched_tokens",
    "serve.cache_tokens": "serve.kv_cache_tokens",
    "serve.speculate": "serve.num_speculative_tokens",
    "serve.draft": "serve.draft_model",
    "improve.go": "improve.apply",
    "serve.scale_look_s": "serve.metrics_interval_s",
    "serve.scale_up_s": "serve.upscale_delay_s",
    "serve.scale_down_s": "serve.downscale_delay_s",
    "serve.scale_to_zero_s": "serve.downscale_to_zero_delay_s",
    "sweep.concurrent": "sweep.max_concurrent_trials",
    "sweep.reduction": "sweep.reduction_factor",
    "sweep.interval": "sweep.perturbation_interval",
    "sweep.quantile": "sweep.quantile_fraction",
}


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(former_names, "_warned", set())


def test_the_renamed_options() -> None:
    assert current_keys() == RENAMED


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("deploy", ["serve.max_batch=4", "++improve.go=true", "data.licence=MIT"])
    assert (config.serve.max_num_seqs, config.improve.apply, config.data.license) == (4, True, "MIT")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert warnings[0].startswith("warning: serve.max_batch is now called serve.max_num_seqs")
    assert current_override("serve.max_num_seqs=4") == "serve.max_num_seqs=4"
    assert current_override("~serve.draft") == "~serve.draft_model"
    assert capsys.readouterr().err.count("warning") == 1


def test_in_the_options_of_a_source() -> None:
    config = compose("pretrain", ["data=files", "data.sources={a:{path:x,licence:MIT}}"])
    assert config.data.sources == {"a": {"path": "x", "license": "MIT"}}
    config = compose("pretrain", ["data=files", "+data.sources.a.path=x", "+data.sources.a.licence=MIT"])
    assert config.data.sources == {"a": {"path": "x", "license": "MIT"}}


def test_in_a_search_space() -> None:
    space = "{data.licence:{choice:[a,b],when:{data.licence:a}},data:{licence:{choice:[c]}}}"
    config = compose("sweep", [f"sweep.space={space}"])
    assert config.sweep.space == {
        "data.license": {"choice": ["a", "b"], "when": {"data.license": "a"}},
        "data": {"license": {"choice": ["c"]}},
    }


def test_in_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_values(Config(), {"serve.max_num_seqs": 4, "data.license": "MIT"})
    tree = to_dict(config)
    for former, current in RENAMED.items():
        name, last = current.split(".")
        tree[name][former.split(".")[1]] = tree[name].pop(last)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert from_dict(read_tree(file)) == config
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1
    assert "config.yaml has options by their former names" in warning
    assert "serve.max_batch is now serve.max_num_seqs" in warning
    assert "serve.draft" not in warning  # it has its default
    assert from_dict(read_tree(file)) == config
    assert capsys.readouterr().err == ""  # once for each file


def test_in_an_exported_endpoint() -> None:
    assert group(ServeConfig, {"max_batch": 4, "port": 80}, "serve.").max_num_seqs == 4
    assert current_tree({"max_batch": 4, "max_num_seqs": 8}, prefix="serve.") == {"max_num_seqs": 8}


def test_the_fingerprint_is_that_of_the_previous_version() -> None:
    """The numbers are of commit 228feef."""
    assert fingerprint(Config()) == "428d4a1e72b4592b8557ead8759232914ce31eadce231bc35d52c98acef13bb3"
    sources = {"a": {"path": "x", "license": "MIT"}}
    config = with_values(Config(), {"data.license": "CC0-1.0", "data.sources": sources})
    assert fingerprint(config) == "c620c489da8ceaab631cbc4b81cd18095e125aa8b5f9babdb344ef8044cb078a"
