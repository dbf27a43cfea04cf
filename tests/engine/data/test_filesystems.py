"""Data in object stores: a real S3 server (moto) and a real GCS server (gcp-storage-emulator) on loopback."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import Config, with_values
from engine.data.corpus import check_input
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.data.shards import Split
from engine.data.tokenizer import load_tokenizer
from engine.errors import TransientError, UserError
from tests.stores import SECRET, Bucket, forget

ROWS = [f"row {i} of the corpus says {i * i}" for i in range(300)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each format, in two levels."""
    folder = tmp_path_factory.mktemp("corpus") / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(ROWS[:200]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[150:250])))
    (folder / "deep" / "c.jsonl.zst").write_bytes(pa.compress(lines(ROWS[240:260]), "zstd", asbytes=True))
    table = pa.table({"text": ROWS[260:280]})
    pq.write_table(table, folder / "deep" / "d.parquet", row_group_size=7)
    with pa.OSFile(str(folder / "e.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(pa.table({"text": ROWS[280:]}), 5)
    (folder / "f.txt").write_text("Some prose.\r\n\r\nAnd more of it.\n")
    return folder


@pytest.mark.parametrize("store", ["s3", "gs"])
def test_bucket_and_folder_give_the_same_bytes(
    store: str, request: pytest.FixtureRequest, configured: Callable[..., Config], corpus: Path
) -> None:
    bucket: Bucket = request.getfixturevalue(store)
    bucket.put(corpus)
    here = verify(prepare(configured(path=str(corpus), vocab_size=300)))
    folder = prepare(configured(path=f"{bucket.address}/in", vocab_size=300, name="far"))
    there = verify(folder)
    assert there.hash == here.hash
    assert there.skipped == here.skipped == {"duplicate": 60}
    message = {file["path"]: (file["sha256"], file["bytes"]) for file in there.read_sources(folder)}
    [origin] = here.origins.values()
    assert origin["files"] == 6
    near = {
        file["path"].replace(str(corpus), f"{bucket.address}/in"): (file["sha256"], file["bytes"])
        for file in here.read_sources(prepare(configured(path=str(corpus), vocab_size=300)))
    }
    assert message == near
    assert SECRET not in "".join(file.read_text() for file in folder.glob("*.json*"))


@pytest.mark.parametrize("store", ["s3", "gs"])
def test_globs_single_files_and_lists(
    store: str, request: pytest.FixtureRequest, configured: Callable[..., Config], corpus: Path
) -> None:
    bucket: Bucket = request.getfixturevalue(store)
    bucket.put(corpus)
    for number, (path, documents) in enumerate(
        {
            f"{bucket.address}/in/*.jsonl*": 250,
            f"{bucket.address}/in/**/*.zst": 20,
            f"{bucket.address}/in/a.jsonl,{bucket.address}/in/deep/d.parquet": 220,
        }.items()
    ):
        options = {"vocab_size": 300, "validation_path": f"{bucket.address}/in/e.arrow", "name": f"n{number}"}
        manifest = Manifest.load(prepare(configured(path=path, **options)))
        assert manifest.splits["validation"]["documents"] == 20
        assert sum(split["documents"] for split in manifest.splits.values()) == documents + 20


def test_a_changed_object_changes_the_folder(s3: Bucket, configured: Callable[..., Config]) -> None:
    config = configured(path=f"{s3.address}/in/a.jsonl", vocab_size=300)
    s3.filesystem.pipe(f"{s3.address}/in/a.jsonl", lines(ROWS))
    first = prepare(config)
    assert prepare(config) == first
    s3.filesystem.pipe(f"{s3.address}/in/a.jsonl", lines(["R" + row[1:] for row in ROWS]))  # of the same size
    assert prepare(config) != first


def test_large_objects_are_fetched_in_ranges(
    s3: Bucket, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    texts = [f"text {i} " + "word " * 2000 for i in range(2400)]
    s3.filesystem.pipe(f"{s3.address}/large.jsonl", lines(texts))
    monkeypatch.setattr("engine.data.filesystems.READ_AHEAD_BYTES", 2**20)
    fetched: list[int] = []
    fetch = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        fetched.append(end - start)
        found: bytes = fetch(self, start, end)
        return found

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    config = configured(path=f"{s3.address}/large.jsonl", vocab_size=300, shard_tokens=2**20)
    check_input(config.data)
    assert sum(fetched) < 3 * 2**20  # its head
    fetched.clear()
    manifest = Manifest.load(prepare(config))
    assert sum(split["documents"] for split in manifest.splits.values()) == 2400
    size = len(lines(texts))
    assert size > 20e6
    assert len(fetched) > 20
    assert max(fetched) < 3 * 2**20
    assert sum(fetched) < 2.5 * size  # for its hash and for its texts; the end of a piece is fetched for nothing


def test_store_errors_are_one_line(
    s3: Bucket, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.filesystem.pipe(f"{s3.address}/in/a.jsonl", lines(ROWS))

    def message(path: str) -> str:
        with pytest.raises(UserError) as error:
            check_input(configured(path=path).data)
        assert "\n" not in str(error.value)
        assert SECRET not in str(error.value)
        return str(error.value)

    assert message("s3://corpora/in/b.jsonl") == (
        "data.path=s3://corpora/in/b.jsonl does not exist; did you mean 'a.jsonl'?"
    )
    assert "data.path=s3://elsewhere/in does not exist" in message("s3://elsewhere/in")
    assert "matches no file" in message("s3://corpora/in/*.txt")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget()
    gone = message("s3://corpora/in/a.jsonl")
    assert gone.startswith("data.path=s3://corpora/in/a.jsonl cannot be read (Could not connect")
    assert "check the address, and your credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID" in gone
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    forget()
    assert "cannot be read (Unable to locate credentials)" in message("s3://corpora/in/a.jsonl")


@pytest.mark.parametrize(("address", "module", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gs")])
def test_a_missing_package_is_named(
    address: str, module: str, extra: str, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    for scheme in ("s3", "s3a", "gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(
        UserError, match=rf"needs a package that is not installed: pip install 'manta-train\[{extra}\]'"
    ):
        check_input(configured(path=address).data)


def test_a_password_in_an_address_is_refused_and_not_printed(configured: Callable[..., Config]) -> None:
    for options in (
        {"data.path": f"s3://someone:{SECRET}@bucket/in"},
        {"data.test_path": f"https://someone:{SECRET}@host/in"},
        {"data.store": f"gs://someone:{SECRET}@bucket"},
        {"train.mirror": f"s3://someone:{SECRET}@bucket"},
        {"data.sources": {"one": {"path": f"s3://someone:{SECRET}@bucket/in"}}},
    ):
        with pytest.raises(UserError, match="has a password in it: leave it out") as error:
            with_values(configured(), options)
        assert SECRET not in str(error.value)


def test_progress_is_kept_when_a_store_fails(
    s3: Bucket, configured: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        s3.filesystem.pipe(f"{s3.address}/in/{i}.jsonl", lines([f"{text} in {i}" for text in ROWS]))
    config = configured(path=f"{s3.address}/in", vocab_size=300, shard_tokens=1024)
    monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", 0)  # so that all is read twice
    whole = verify(prepare(with_values(config, {"runs_dir": str(tmp_path / "elsewhere")})))
    _, port = s3.server.get_host_and_port()
    stopped = []

    def say(stage: str, done: int, total: int) -> None:
        if stage == "tokenize" and done > 600 and not stopped:
            stopped.append(s3.server.stop())

    with pytest.raises(TransientError, match=r"s3://corpora/in/\d\.jsonl cannot be read \(Could not connect"):
        prepare(config, progress=say)
    [partial] = (tmp_path / "runs" / "data").glob(".*.partial")
    s3.server._port = port
    s3.server.start()
    assert len(list(partial.glob("survey-*"))) == 12
    assert 2 <= len(list(partial.glob("part-*"))) < 12
    assert verify(prepare(config)).hash == whole.hash


def test_images_in_files_beside_their_table(
    s3: Bucket, configured: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 5, 255 - 20 * i)).save(folder / f"{i}.png")
    names = [*(f"{i}.png" for i in range(12)), "lost.png"]
    pq.write_table(pa.table({"image": names, "label": ["even", "odd"] * 6 + ["odd"]}), folder / "table.parquet")
    s3.put(folder)
    options = {"image_column": "image", "label_column": "label", "image_size": 8}
    vit = {"model.type": "vit"}
    here = verify(prepare(with_values(configured(path=str(folder / "table.parquet"), **options), vit)))
    config = with_values(configured(path=f"{s3.address}/in/table.parquet", **options), vit)
    there = verify(prepare(config))
    assert there.hash == here.hash
    assert there.skipped == here.skipped == {"without an image": 1}

    def refused(path: str) -> bytes:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3.filesystem, "cat_file", refused)
    with pytest.raises(TransientError, match=r"corpora/in/0\.png cannot be read \(Access Denied\)"):
        prepare(with_values(config, {"runs_dir": str(tmp_path / "elsewhere")}))


@pytest.mark.parametrize("store", ["s3", "gs", "folder"])
def test_prepared_data_are_uploaded_once_and_downloaded_by_shard(
    store: str, request: pytest.FixtureRequest, configured: Callable[..., Config], corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    address = str(tmp_path / "store") if store == "folder" else f"{request.getfixturevalue(store).address}/prepared"
    config = configured(path=str(corpus), vocab_size=300, shard_tokens=1024, store=address)
    made = prepare(config)
    monkeypatch.setattr("engine.data.prepare.list_parts", None)  # nothing is prepared again
    assert prepare(config) == made
    elsewhere = with_values(config, {"runs_dir": str(tmp_path / "elsewhere"), "data.store": f"{address}/"})
    fetched = prepare(elsewhere)
    assert fetched.name == made.name
    assert not list(fetched.glob("*.arrow"))
    here, there = Split.open(made, "train"), Split.open(fetched, "train")
    assert len(list(made.glob("train-*.arrow"))) > 2
    assert there.document(0).tolist() == here.document(0).tolist()
    assert [shard.name for shard in fetched.glob("*.arrow")] == [next(iter(here.manifest.shards()))["file"]]
    assert there.token_range(0, there.num_tokens).tolist() == here.token_range(0, here.num_tokens).tolist()
    assert len(list(fetched.glob("train-*.arrow"))) == len(list(made.glob("train-*.arrow")))
    assert prepare(elsewhere) == fetched
    assert verify(fetched).hash == verify(made).hash
    assert load_tokenizer(fetched / "tokenizer").get_vocab() == load_tokenizer(made / "tokenizer").get_vocab()


def test_a_changed_shard_in_a_store_is_refused(
    s3: Bucket, configured: Callable[..., Config], corpus: Path, tmp_path: Path
) -> None:
    config = configured(path=str(corpus), vocab_size=300, store="s3://corpora/prepared")
    made = prepare(config)
    shard = Manifest.load(made).splits["train"]["shards"][0]["file"]
    content = bytearray((made / shard).read_bytes())
    content[len(content) // 2] ^= 1
    s3.filesystem.pipe(f"corpora/prepared/{made.name}/{shard}", bytes(content))
    fetched = prepare(with_values(config, {"runs_dir": str(tmp_path / "elsewhere")}))
    with pytest.raises(UserError, match=rf"s3://corpora/prepared/.*{shard} was changed since it was prepared"):
        Split.open(fetched, "train").document(0)
    s3.filesystem.rm(f"corpora/prepared/{made.name}/{shard}")
    with pytest.raises(UserError, match=rf"s3://corpora/prepared/.*{shard} cannot be read"):
        Split.open(fetched, "train").document(0)


def test_a_mistyped_bucket_is_not_created(s3: Bucket, configured: Callable[..., Config], corpus: Path) -> None:
    config = configured(path=str(corpus), vocab_size=300, store="s3://elsewhere/prepared")
    with pytest.raises(
        TransientError,
        match=r"data\.store=s3://elsewhere/prepared cannot be written \(The specified bucket does not exist",
    ):
        prepare(config)
    assert s3.filesystem.ls("") == ["corpora"]
    assert verify(prepare(with_values(config, {"data.store": None})))  # what was made is there


def test_an_interrupted_upload_continues(
    s3: Bucket, configured: Callable[..., Config], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(path=str(corpus), vocab_size=300, store="s3://corpora/prepared")
    put, sent = s3.filesystem.put_file, []

    def fails(source: str, target: str) -> None:
        if len(sent) == 2:
            raise OSError("the connection was closed")
        sent.append(put(source, target))

    monkeypatch.setattr(s3.filesystem, "put_file", fails)
    with pytest.raises(
        TransientError, match=r"data\.store=s3://corpora/prepared cannot be written \(the connection was closed\)"
    ):
        prepare(config)
    assert not prepare(with_values(config, {"data.store": None})).joinpath("store.json").exists()
    monkeypatch.setattr(s3.filesystem, "put_file", put)
    elsewhere = with_values(config, {"runs_dir": str(tmp_path / "elsewhere")})
    made = prepare(config)
    fetched = prepare(elsewhere)
    assert (fetched / "store.json").exists()
    assert verify(fetched).hash == verify(made).hash


def test_the_command_reads_a_bucket(s3: Bucket, corpus: Path, tmp_path: Path) -> None:
    s3.put(corpus)
    words = [f"data.path={s3.address}/in/**", "data=files", "data.vocab_size=300", f"runs_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.manta", "prepare", *words],
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "duplicate" in done.stdout
    assert SECRET not in done.stdout + done.stderr
