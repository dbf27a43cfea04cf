import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engine.config import Config, replace
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.data.shards import ShardWriter, Split
from engine.data.tokenizer import load_tokenizer
from engine.errors import TransientError, UserError

SCRIPT = """
import os, signal, sys
from engine.config import Config, replace
from engine.data.prepare import prepare
def on_progress(stage, done, total):
    if stage == sys.argv[3]: os.kill(os.getpid(), signal.SIGKILL)
config = replace(Config(), runs_dir=sys.argv[1], data__path=sys.argv[2], data__vocab_size=300)
print(prepare(config, progress=on_progress))
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.txt").write_text(f"Text number {i}: " + f"what it says is {i * i}. " * 20)
    return tmp_path / "in"


def start(tmp_path: Path, corpus: Path, die_at: str = "never") -> "subprocess.Popen[str]":
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs"), str(corpus), die_at]
    return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE)


def test_shards_hold_the_documents(configured: Callable[..., Config], corpus: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = prepare(
        configured(path=str(corpus), vocab_size=300, shard_tokens=2048), progress=lambda *s: stages.append(s)
    )
    manifest, tokenizer = verify(folder), load_tokenizer(folder / "tokenizer")
    texts = {path.read_text() for path in corpus.iterdir()}
    found = []
    for name in manifest.splits:
        split = Split.open(folder, name)
        for i in range(split.num_rows):
            ids = split.document(i)
            assert ids[-1] == manifest.eos_id == 0
            found.append(tokenizer.decode(ids[:-1]))
        assert np.array_equal(
            split.token_range(0, split.num_tokens), np.concatenate([split.document(i) for i in range(split.num_rows)])
        )
    assert len(found) == 40
    assert set(found) == texts
    assert len(manifest.splits["train"]["shards"]) > 1
    assert manifest.vocab_size == 300
    sources = manifest.read_sources(folder)
    assert len(sources) == manifest.sources["files"] == 40
    assert sum(source["bytes"] for source in sources) == sum(len(text.encode()) for text in texts)
    assert stages[-1] == ("tokenize", 40, 40)
    assert not [path for path in folder.iterdir() if path.name.startswith(("survey", "part", "."))]
    assert {stage for stage, _, _ in stages} == {"read", "tokenizer", "tokenize"}


def test_folder_name_depends_on_content(configured: Callable[..., Config], corpus: Path) -> None:
    config = configured(path=str(corpus), vocab_size=300)
    folder = prepare(config)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(replace(config, data__sequence_length=32)) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    others = {prepare(replace(config, seed=1)), prepare(replace(config, data__vocab_size=310))}
    assert len({folder, *others}) == 3
    (corpus / "0.txt").write_text("It says something else now.")
    changed = prepare(config)
    assert changed != folder
    assert Manifest.load(changed).hash != Manifest.load(folder).hash


def test_the_same_input_gives_the_same_bytes(configured: Callable[..., Config], corpus: Path, tmp_path: Path) -> None:
    config = configured(path=str(corpus), vocab_size=300)
    first, second = prepare(config), prepare(replace(config, runs_dir=str(tmp_path / "elsewhere")))
    assert Manifest.load(first).hash == Manifest.load(second).hash
    assert first.name == second.name


def test_a_corpus_too_large_for_memory_gives_the_same_bytes(
    configured: Callable[..., Config], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "copy.txt").write_text((corpus / "3.txt").read_text())
    config = configured(path=str(corpus), vocab_size=300)
    held = Manifest.load(prepare(config))
    monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", 0)
    streamed = Manifest.load(prepare(replace(config, runs_dir=str(tmp_path / "elsewhere"))))
    assert streamed.hash == held.hash
    assert streamed.skipped == held.skipped == {"duplicate": 1}


def test_an_incomplete_folder_is_rebuilt(configured: Callable[..., Config], corpus: Path) -> None:
    config = configured(path=str(corpus), vocab_size=300)
    folder = prepare(config)
    digest = Manifest.load(folder).hash
    (folder / Manifest.load(folder).splits["train"]["shards"][0]["file"]).unlink()
    assert prepare(config) == folder
    assert verify(folder).hash == digest


def test_a_given_tokenizer_is_copied(configured: Callable[..., Config], corpus: Path) -> None:
    first = prepare(configured(path=str(corpus), vocab_size=300))
    config = configured(path=str(corpus), vocab_size=4096)
    by_argument, by_option = (
        prepare(config, first / "tokenizer"),
        prepare(replace(config, data__tokenizer=str(first / "tokenizer"))),
    )
    assert by_argument == by_option != first
    assert Manifest.load(by_argument).vocab_size == 300
    assert Manifest.load(by_argument).hash == Manifest.load(first).hash


def test_bpe_is_trained_on_training_documents_only(configured: Callable[..., Config], tmp_path: Path) -> None:
    for name, word in [("train", "seen"), ("test", "heldout")]:
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{word * 5} {i}"}}\n' for i in range(50)))
    config = configured(path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"), vocab_size=300)
    vocabulary = load_tokenizer(prepare(config) / "tokenizer").get_vocab()
    assert "seen" in vocabulary
    assert not {"he", "ld", "out", "held"} & set(vocabulary)


def test_labels_missing_from_training_are_skipped(configured: Callable[..., Config], tmp_path: Path) -> None:
    rows = [f'{{"text": "t{i}", "label": "{label}"}}\n' for i, label in enumerate(["10", "9"] * 20)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "test.jsonl").write_text('{"text": "x", "label": "9"}\n{"text": "y", "label": "11"}\n')
    config = configured(
        path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"), label_column="label", vocab_size=300
    )
    folder = prepare(config)
    manifest = Manifest.load(folder)
    assert manifest.labels == ["9", "10"]  # numbers by value
    assert manifest.skipped == {"label that is not in the training data": 1}
    test = Split.open(folder, "test")
    assert (test.num_rows, test.label(0)) == (1, 0)
    assert load_tokenizer(folder / "tokenizer").decode(test.document(0)) == "x"


def test_python_functions_have_labels(configured: Callable[..., Config]) -> None:
    folder = prepare(configured(source="python_functions", max_documents=400, vocab_size=512))
    manifest, split = Manifest.load(folder), Split.open(folder, "train")
    assert len(manifest.labels) >= 12
    assert manifest.labels == sorted(manifest.labels)
    assert manifest.license == "PSF-2.0"
    assert set(split.labels.tolist()) == set(range(len(manifest.labels)))
    assert sum(s["documents"] for s in manifest.splits.values()) == 400
    assert load_tokenizer(folder / "tokenizer").decode(split.document(0)).startswith(("def _(", "async def _("))


@pytest.mark.parametrize("stage", ["read", "tokenizer", "tokenize"])
def test_a_kill_leaves_no_incomplete_folder(
    stage: str, tmp_path: Path, corpus: Path, configured: Callable[..., Config]
) -> None:
    process = start(tmp_path, corpus, die_at=stage)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "runs" / "data").glob("files-*"))
    folder = prepare(configured(path=str(corpus), vocab_size=300))
    verify(folder)
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == [folder.name]


def test_ctrl_c_leaves_no_folder(tmp_path: Path, corpus: Path, configured: Callable[..., Config]) -> None:
    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "tokenize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(configured(path=str(corpus), vocab_size=300), progress=on_progress)
    assert sorted(p.suffix for p in (tmp_path / "runs" / "data").iterdir()) == [".lock", ".partial"]


def test_concurrent_calls_make_one_folder(tmp_path: Path, corpus: Path) -> None:
    processes = [start(tmp_path, corpus) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    verify(outputs[0])


KILLED = """
import os, signal, sys
from engine.config import Config, replace
from engine.data import parallel_map, prepare as prepare_module
from engine.data.prepare import prepare
calls, last = 0, int(sys.argv[3])
if sys.argv[4] == "processes": parallel_map.PROCESS_START_S, prepare_module.MAX_CACHED_BYTES = 0, 0
else: parallel_map.PROCESS_START_S = float("inf")
def on_progress(stage, done, total):
    global calls
    calls += 1
    if calls == last: os.kill(os.getpid(), signal.SIGKILL)
config = replace(
    Config(), runs_dir=sys.argv[1], data__path=sys.argv[2], data__vocab_size=300, data__shard_tokens=1024, data__mask=["emails"]
)
print(prepare(config, progress=on_progress), calls)
"""


def _is_ours(process: psutil.Process) -> bool:
    try:
        return "engine.data.parallel_map" in process.cmdline() and Path(process.cwd()) == Path(__file__).parents[3]
    except psutil.Error:
        return False


def killed_after(calls: int, runs: Path, corpus: Path, processes: bool = False) -> str | None:
    """Prepare in a process that is killed at the given call of `progress`; return what it printed, if it survived."""
    command = [sys.executable, "-c", KILLED, str(runs), str(corpus), str(calls), "processes" if processes else "alone"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], text=True, capture_output=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.stdout if done.returncode == 0 else None


def test_repeated_kills_lose_and_duplicate_no_token(
    tmp_path: Path, corpus: Path, configured: Callable[..., Config]
) -> None:
    for i in range(40, 120):
        (corpus / f"{i}.txt").write_text(f"Text number {i}: " + f"what it says is {i * i} by a@b.org. " * 20)
    (corpus / "zz.txt").write_text((corpus / "50.txt").read_text())  # a copy, in another part than the first
    words = killed_after(10**9, tmp_path / "whole", corpus)
    assert words
    whole, calls = Path(words.split()[0]), int(words.split()[1])
    assert calls > 40
    runs, rng, kills, kept = tmp_path / "runs", random.Random(0), 0, 0
    while (words := killed_after(rng.randint(calls // 10, calls // 3), runs, corpus, kills % 4 == 1)) is None:
        kills += 1
        assert not list((runs / "data").glob("files-*"))
        finished = len([*(runs / "data").glob(".files-*.partial/part-*")])
        assert finished >= kept
        kept = finished
        assert kills < 60
    assert kills >= 3
    deadline = time.monotonic() + 120
    while any(_is_ours(process) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "a process outlived the one that it worked for"
        time.sleep(0.1)
    folder = Path(words.split()[0])
    assert verify(folder).hash == verify(whole).hash
    assert Manifest.load(folder).origins == Manifest.load(whole).origins
    assert Manifest.load(folder).skipped == {"duplicate": 1}
    assert [p.name for p in sorted(folder.iterdir())] == [p.name for p in sorted(whole.iterdir())]
    assert all((whole / p.name).read_bytes() == p.read_bytes() for p in folder.glob("*.arrow"))


def worker_processes() -> list[psutil.Process]:
    """Return the processes that now prepare parts."""
    return [child for child in psutil.Process().children() if "engine.data.parallel_map" in child.cmdline()]


def test_processes_give_the_same_bytes(
    tmp_path: Path, corpus: Path, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "zz.txt").write_text((corpus / "20.txt").read_text())
    (tmp_path / "own.py").write_text("import os\nKEEPER = os.getpid()\ndef keep(text):\n    return len(text) > 3\n")
    monkeypatch.chdir(tmp_path)
    config = configured(path=str(corpus), vocab_size=300, shard_tokens=1024, filter="own:keep", mask=["emails"])
    monkeypatch.setattr("engine.data.prepare.is_connected_to_ray", lambda: False)  # whatever Ray the session has
    monkeypatch.setattr("engine.data.parallel_map.PROCESS_START_S", math.inf)
    here = verify(prepare(config))
    monkeypatch.setattr("engine.data.parallel_map.PROCESS_START_S", 0)
    for held in (2**28, 0):  # with the documents of the first pass, and read again
        monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", held)
        there = verify(prepare(replace(config, runs_dir=str(tmp_path / f"held{held}"))))
        assert there.hash == here.hash
        assert there.skipped == here.skipped
        assert there.skipped["duplicate"] == 1
    assert not worker_processes()
    (corpus / "bad.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(UserError, match="has no column 'text'"):
        prepare(config)
    assert not worker_processes()


def test_a_killed_worker_process_raises_one_line_and_keeps_progress(
    tmp_path: Path, corpus: Path, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.prepare.is_connected_to_ray", lambda: False)
    monkeypatch.setattr("engine.data.parallel_map.PROCESS_START_S", 0)
    monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", 0)
    config = configured(path=str(corpus), vocab_size=300, shard_tokens=1024)

    begin = subprocess.Popen

    def killed(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = begin(*args, **options)
        process.kill()
        return process

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "tokenize":
            monkeypatch.setattr("engine.data.parallel_map.subprocess.Popen", killed)

    with pytest.raises(TransientError, match=r"was killed .* give the same command again"):
        prepare(config, progress=on_progress)
    [partial] = (tmp_path / "runs" / "data").glob(".*.partial")
    assert list(partial.glob("part-*"))
    monkeypatch.setattr("engine.data.parallel_map.PROCESS_START_S", math.inf)
    assert verify(prepare(config)).hash == verify(prepare(replace(config, runs_dir=str(tmp_path / "elsewhere")))).hash


def test_damaged_cache_files_are_recomputed(tmp_path: Path, corpus: Path, configured: Callable[..., Config]) -> None:
    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "tokenize" and done >= 30:
            raise KeyboardInterrupt

    config = configured(path=str(corpus), vocab_size=300, shard_tokens=1024)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=on_progress)
    [partial] = (tmp_path / "runs" / "data").glob(".*.partial")
    shards, surveys = sorted(partial.glob("train-*")), sorted(partial.glob("survey-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-9])
    shards[1].unlink()
    surveys[0].write_bytes(b"")
    surveys[1].write_bytes(surveys[1].read_bytes()[:100])
    folder = prepare(config)
    assert verify(folder).hash == verify(prepare(replace(config, runs_dir=str(tmp_path / "elsewhere")))).hash


def test_ray_gives_the_same_bytes(ray: None, tmp_path: Path, corpus: Path, configured: Callable[..., Config]) -> None:
    (corpus / "zz.txt").write_text((corpus / "20.txt").read_text())
    config = configured(path=str(corpus), vocab_size=300, shard_tokens=1024)
    here = verify(prepare(config))
    there = verify(prepare(replace(config, runs_dir=str(tmp_path / "elsewhere"), cluster__address="auto")))
    assert there.hash == here.hash
    assert there.skipped == {"duplicate": 1}
    (corpus / "bad.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(UserError, match="has no column 'text'"):
        prepare(replace(config, runs_dir=str(tmp_path / "elsewhere"), cluster__address="auto"))


def test_an_inconsistent_filter_raises(
    tmp_path: Path, corpus: Path, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fickle.py").write_text(
        "calls = []\ndef keep(text):\n    calls.append(1)\n    return len(calls) != 50\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", 0)
    with pytest.raises(UserError, match=r"gave other documents the second time .*data\.filter"):
        prepare(configured(path=str(corpus), vocab_size=300, filter="fickle:keep"))


def test_a_full_disk_raises_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path, configured: Callable[..., Config]
) -> None:
    def full(self: ShardWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "_write", full)
    with pytest.raises(UserError, match=r"the disk of .* is full .*set runs_dir to another disk"):
        prepare(configured(path=str(corpus), vocab_size=300))
    assert [p.suffix for p in (tmp_path / "runs" / "data").iterdir()] == [".lock"]


def test_runs_dir_that_is_a_file(tmp_path: Path, corpus: Path, configured: Callable[..., Config]) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="set runs_dir to a folder of yours"):
        prepare(configured(path=str(corpus), vocab_size=300))
