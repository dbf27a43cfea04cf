"""Concurrent moves of an alias: one succeeds, the others fail; a rollback restores the previous files byte for byte."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.bundles.alias import Alias, Move, effective_moves
from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.registry import Registry
from engine.config import Config, with_values
from engine.errors import UserError
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.bundles.test_bundle import contents
from tests.ports import free_port

P, R = "promote", "rollback"


@pytest.mark.parametrize(
    ("moves", "champions"),
    [
        ([], []),
        ([(P, None, 1), (P, 1, 2)], [1, 2]),
        ([(P, None, 1), (P, None, 2)], [1]),  # both from none: the first one wins
        ([(P, None, 1), (P, 1, 2), (P, 1, 3), (P, 2, 4)], [1, 2, 4]),
        ([(P, None, 1), (P, 1, 2), (P, 2, 3), (R, 3, 2), (R, 2, 1)], [1]),
        ([(P, None, 1), (P, 1, 2), (R, 2, 1), (R, 2, 1)], [1]),  # two concurrent rollbacks go back once
        ([(P, None, 1), (R, 1, 1)], [1]),  # nothing before it
        ([(P, None, 1), (P, 1, 2), (R, 2, 9)], [1, 2]),
        ([(P, None, 1), ("found", 1, 5), (P, 5, 6), (R, 6, 5)], [1, 5]),
    ],
)
def test_effective_moves(moves: list[tuple[str, int | None, int]], champions: list[int]) -> None:
    written = [Move(n, kind, start, to) for n, (kind, start, to) in enumerate(moves, start=1)]
    assert [move.to_version for move in effective_moves(written)] == champions
    assert effective_moves(list(reversed(written))) == effective_moves(written)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server with a database and artifacts of its own."""
    home = tmp_path_factory.mktemp("server")
    port = free_port()
    words = ["server", "--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "kept"),
             "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
    with (home / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", *words], cwd=home, stdout=log, stderr=log, start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # on SIGTERM it waits long for its connections to end
        process.wait(20)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    uri: str = request.getfixturevalue(request.param)
    return uri


@pytest.fixture(scope="module")
def three(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    home = tmp_path_factory.mktemp("three")
    small = with_values(tiny, {"runs_dir": str(home)})
    return [fresh_bundle(small, home / f"run{seed}" / "bundle", seed) for seed in range(3)]


def promote_concurrently(uri: str, folder: str, name: str, to: int, barrier: Any, results: Any) -> None:
    """Move from version 1 at the same time as the other processes."""
    alias = Alias(Registry(uri, Path(folder)), name, "champion")
    start = alias.current()
    barrier.wait(240)
    try:
        alias.move("promote", start, to, f"because of {to}")
        results.put((to, "won"))
    except UserError as error:
        results.put((to, str(error)))


@pytest.mark.parametrize("uri", ["database", pytest.param("server", marks=pytest.mark.slow)], indirect=True)
def test_one_of_two_concurrent_moves_succeeds(uri: str, three: list[Bundle], tmp_path: Path) -> None:
    registry = Registry(uri, tmp_path / "registry")
    for bundle in three:
        registry.register(bundle, "race")
    alias = Alias(registry, "race", "champion")
    alias.move("promote", None, 1, "the first")
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=promote_concurrently, args=(uri, str(tmp_path / "registry"), "race", to, barrier, queue))
        for to in (2, 3)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    winner = next(to for to, result in results.items() if result == "won")
    loser = results[5 - winner]
    assert f"another promotion came first: champion of race is race/{winner} now" in loser
    assert f"because of {winner}" in loser
    assert alias.current() == winner
    assert [v.number for v in registry.versions("race") if "champion" in v.aliases] == [winner]
    assert [move.to_version for move in effective_moves(alias.moves())] == [1, winner]


@pytest.mark.parametrize("uri", ["database", "server"], indirect=True)
def test_rollback_restores_the_files_after_the_run_was_overwritten(
    uri: str, three: list[Bundle], tiny: Config, tmp_path: Path
) -> None:
    registry = Registry(uri, tmp_path / "registry")
    run = tmp_path / "run" / "bundle"
    before = contents(Path(shutil.copytree(three[0].folder, run)))
    first = registry.register(Bundle.open(run), "kept")
    shutil.rmtree(run)
    shutil.copytree(three[1].folder, run)  # a later training of the same name
    second = registry.register(Bundle.open(run), "kept")
    alias = Alias(registry, "kept", "champion")
    with pytest.raises(UserError, match="nothing before"):
        alias.roll_back("too early")
    alias.move("promote", None, first.number, "the first")
    alias.move("promote", first.number, second.number, "better")
    shutil.rmtree(run)
    if uri.startswith("http"):
        shutil.rmtree(registry.folder, ignore_errors=True)  # as on another machine: only the server has them
    assert contents(find_bundle("kept@champion", tmp_path, uri)) == contents(three[1].folder)
    assert alias.roll_back("it was slow") == (2, 1)
    restored = find_bundle("kept@champion", tmp_path, uri)
    assert contents(restored) == before
    Bundle.open(restored).verify()
    with pytest.raises(UserError, match="nothing before"):
        alias.roll_back("once more")
    alias.move("promote", 1, 2, "again")
    assert (alias.current(), [move.to_version for move in effective_moves(alias.moves())]) == (2, [1, 2])


def test_move_outside_of_manta_is_recorded_and_an_unapplied_move_is_applied(
    database: str, three: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.bundles.alias.APPLY_TIMEOUT_S", 0.2)
    registry = Registry(database, tmp_path / "registry")
    for bundle in three:
        registry.register(bundle, "hand")
    alias = Alias(registry, "hand", "champion")
    alias.move("promote", None, 1, "the first")
    registry.client.set_registered_model_alias("hand", "champion", "3")
    assert alias.current() == 3
    assert alias.roll_back("back to what it was") == (3, 1)
    alias._record_move("promote", 1, 2, "recorded, then its process died")
    assert alias.current() == 2
    registry.client.set_registered_model_alias(
        "hand", "champion", "1"
    )  # outside of Manta, to the previous version: not an unapplied move
    assert alias.current() == 1
    registry.client.delete_registered_model_alias("hand", "champion")
    assert alias.current() is None
    alias.move("promote", None, 3, "anew")
    assert alias.current() == 3


def test_altered_files_of_a_version_are_refused(database: str, three: list[Bundle], tmp_path: Path) -> None:
    registry = Registry(database, tmp_path / "registry")
    first, second = (registry.register(bundle, "altered") for bundle in three[:2])
    alias = Alias(registry, "altered", "champion")
    alias.move("promote", None, 1, "the first")
    alias.move("promote", 1, 2, "the second")
    weights = first.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors was changed"):
        alias.roll_back("to a broken one")
    assert alias.current() == 2
    shutil.rmtree(second.folder)
    shutil.copytree(three[2].folder, second.folder)  # a valid bundle, but another one
    with pytest.raises(UserError, match=r"manta\.json is not the one that was registered as altered/2"):
        find_bundle("altered/2", tmp_path, database)
    shutil.rmtree(second.folder)
    with pytest.raises(UserError, match="which is gone"):
        find_bundle("altered/2", tmp_path, database)
    (three[2].folder / "manta.json").rename(tmp_path / "aside")
    try:
        with pytest.raises(UserError, match=r"not a bundle of Manta's"):
            registry.register(Bundle.open(three[2].folder), "altered")
    finally:
        (tmp_path / "aside").rename(three[2].folder / "manta.json")
