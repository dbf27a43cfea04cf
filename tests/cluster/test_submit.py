"""What is submitted: the project, the paths, the command line."""

from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.submit import find_source_tree, main, make_absolute, quote


def test_relative_paths_become_absolute(tmp_path):
    (tmp_path / "mine").mkdir()
    given = ["data.path=dir/*.jsonl", "bundle=mine", "+data.test_path=/t", "optim.lr=0.1", "runs_dir=s3://b/r"]
    expected = [f"data.path={tmp_path}/dir/*.jsonl", f"bundle={tmp_path}/mine", "+data.test_path=/t", "optim.lr=0.1"]
    assert make_absolute(given, tmp_path) == [*expected, "runs_dir=s3://b/r"]


def test_a_bundle_by_name_and_a_null_stay(tmp_path):
    assert make_absolute(["bundle=demo", "data.path=null", "runs_dir=/r"], tmp_path) == [
        "bundle=demo",
        "data.path=null",
        "runs_dir=/r",
    ]


def test_values_with_spaces_are_quoted_for_hydra(tmp_path):
    assert make_absolute(["data.path='a b.txt'"], Path("/x"))[0] == "data.path='/x/a b.txt'"
    assert quote("/x/it's") == "'/x/it\\'s'"


def test_checkout_is_found_from_below():
    root = Path(__file__).parents[2]
    assert find_source_tree(Path(__file__).parent) == root
    assert find_source_tree(Path("/")) is None


def test_an_override_without_equals_is_refused():
    with pytest.raises(ClusterError, match="'steps' is not of the form key=value"):
        main(["pretrain", "steps"])


def test_a_dataset_of_the_hub_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for given, expected in (("squad", "squad"), ("me/data", "me/data"), ("mine", f"{tmp_path}/mine")):
        assert make_absolute(["data=huggingface", f"data.path={given}"], tmp_path)[1] == f"data.path={expected}"


def test_paths_of_several_sources_are_made_absolute(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    given = "data.sources={a: {path: texts/*.jsonl, weight: 2}, b: {path: 'texts/b c.txt'}, c: {path: s3://x/y}, d: {path: squad}}"
    here = f"{tmp_path}/texts"
    expected = f"data.sources={{a: {{path: {here}/*.jsonl, weight: 2}}, b: {{path: '{here}/b c.txt'}}, c: {{path: s3://x/y}}, d: {{path: squad}}}}"
    assert make_absolute([given], tmp_path)[0] == expected
