import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import Config
from engine.data.corpus import check_input, list_parts
from engine.data.document import Document
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.errors import UserError
from tests.engine.data.conftest import documents

ROWS = [{"text": f"sentence number {i}", "label": i % 3} for i in range(200)]


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(config: Config) -> tuple[list[Document], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(documents(config.data, 0, counts)), counts


def test_every_format_gives_the_same_rows(configured: Callable[..., Config], tmp_path: Path) -> None:
    table = pa.table({"text": [r["text"] for r in ROWS], "other": [0] * 200, "label": [r["label"] for r in ROWS]})
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(table, tmp_path / "c.parquet")
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, 64)
    with pa.OSFile(str(tmp_path / "e.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, 64)
    for name in ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.arrow", "e.arrow"]:
        found, counts = read(configured(path=str(tmp_path / name), label_column="label"))
        assert [(d.text, d.label) for d in found] == [(r["text"], str(r["label"])) for r in ROWS]
        assert not +counts
        assert {d.split for d in found} == {"train", "validation", "test"}


def test_splits_do_not_depend_on_the_folder(configured: Callable[..., Config], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "a.jsonl", ROWS)
    one, two, glob = (
        [d.split for d in read(configured(path=str(tmp_path / p)))[0]] for p in ("one", "two/a.jsonl", "one/*.jsonl")
    )
    assert one == two == glob


def test_explicit_validation_and_test_files_are_complete_and_first(
    configured: Callable[..., Config], tmp_path: Path
) -> None:
    train, validation, test = (
        jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in zip("abc", [ROWS, ROWS[:20], ROWS[190:]])
    )
    found, counts = read(configured(path=str(train), validation_path=str(validation), test_path=str(test)))
    assert Counter(d.split for d in found) == {"train": 170, "validation": 20, "test": 10}
    assert counts == {"duplicate": 30}  # the copies in the training file go, not the held-out ones
    found, _ = read(configured(path=str(train), test_path=str(test), validation_fraction=0.25))
    assert Counter(d.split for d in found)["test"] == 10
    assert 30 <= Counter(d.split for d in found)["validation"] <= 65


def test_lists_globs_and_folders(configured: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, name in enumerate(["x.py", "deep/y.md", "deep/z.rs", ".hidden"]):
        (tmp_path / "in" / name).write_text(f"text {i}")
    folder = tmp_path / "in"
    texts = lambda path: {d.text for d in read(configured(path=path))[0]}  # noqa: E731
    assert texts(str(folder)) == {"text 0", "text 1", "text 2"}
    assert texts(f"{folder}/**/*.md") == {"text 1"}
    assert texts(f"{folder}/x.py, {folder}/deep/*.rs") == {"text 0", "text 2"}


def test_object_storage_gives_the_same_documents(configured: Callable[..., Config]) -> None:
    import fsspec

    storage = fsspec.filesystem("memory")
    storage.pipe("/bucket/in/a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    storage.pipe("/bucket/in/b.txt", b"Some prose.")
    try:
        found, _ = read(configured(path="memory://bucket/in"))
        assert {d.text for d in found} == {"Some prose.", *(str(r["text"]) for r in ROWS)}
        folder = prepare(configured(path="memory://bucket/in/*.jsonl", vocab_size=300))
        assert sum(split["documents"] for split in Manifest.load(folder).splits.values()) == 200
        with pytest.raises(UserError, match=r"memory://bucket/in/c\.txt does not exist; did you mean 'b\.txt'"):
            read(configured(path="memory://bucket/in/c.txt"))
    finally:
        storage.rm("/bucket", recursive=True)


@pytest.mark.parametrize("where", ["memory://packed", "file://{tmp_path}", "{tmp_path}"])
def test_compressed_files_are_read_from_any_filesystem(
    configured: Callable[..., Config], tmp_path: Path, where: str
) -> None:
    from fsspec.core import url_to_fs

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table, whole = pa.table({"text": [f"row {i}" for i in range(30)]}), pa.BufferOutputStream()
    pq.write_table(table, whole)
    contents = {
        "a.jsonl.zst": pa.compress(lines[:3000], "zstd", asbytes=True)
        + pa.compress(lines[3000:], "zstd", asbytes=True),
        "b.txt.zst": pa.compress(b"Some prose.\r\n", "zstd", asbytes=True),
        "c.txt.gz": gzip.compress(b"Other prose."),
        "d.parquet.zst": pa.compress(whole.getvalue(), "zstd", asbytes=True),
    }
    filesystem, place = url_to_fs(where.format(tmp_path=tmp_path) + "/in")
    filesystem.makedirs(place, exist_ok=True)
    try:
        for name, content in contents.items():
            filesystem.pipe(f"{place}/{name}", content)
        found, counts = read(configured(path=filesystem.unstrip_protocol(place)))
        rows = [str(r["text"]) for r in ROWS]
        assert [d.text for d in found] == [*rows, "Some prose.\n", "Other prose.", *table["text"].to_pylist()]
        assert not +counts
    finally:
        filesystem.rm(place, recursive=True)


def test_truncated_compressed_file_raises(configured: Callable[..., Config], tmp_path: Path) -> None:
    content = pa.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode(), "zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(content[: len(content) // 2])
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstd at all")
    for name in "ab":
        with pytest.raises(UserError, match=rf"cannot read .*{name}\.jsonl\.zst .*repair it or leave it out"):
            read(configured(path=str(tmp_path / f"{name}.jsonl.zst")))


def test_large_files_are_split_into_pieces(configured: Callable[..., Config], tmp_path: Path) -> None:
    rows = [{"text": f"row {i} é " + "x" * (i % 97)} for i in range(2000)]
    jsonl(tmp_path / "a.jsonl", rows)
    table = pa.table({"text": [r["text"] for r in rows]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=50)
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, 50)
    for name in ("a.jsonl", "c.parquet", "d.arrow"):
        config = configured(path=str(tmp_path / name), shard_tokens=4096)
        cut = list_parts(config.data)
        assert len(cut) >= 2
        assert [d.text for d in read(config)[0]] == [r["text"] for r in rows]
        spread = Counter(d.split for d in read(config)[0])
        assert 50 < spread["validation"] < 150
    text = "".join(f"Paragraph {i}. " + "word " * 100 + "\n\n" for i in range(400))
    (tmp_path / "book.txt").write_text(text)
    config = configured(path=str(tmp_path / "book.txt"), shard_tokens=4096)
    assert len(list_parts(config.data)) >= 5
    assert "".join(d.text for d in read(config)[0]) == text
    for start in range(16384 - 3, 16384 + 3):  # a line that begins at, before and after the cut
        lines = [{"text": "y" * (start - 13)}, {"text": "second"}, *rows]
        config = configured(path=str(jsonl(tmp_path / "e.jsonl", lines)), shard_tokens=4096)
        assert [d.text for d in read(config)[0]] == [r["text"] for r in lines]


def test_check_input_raises_before_anything_is_prepared(configured: Callable[..., Config], tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS)
    for options, message in (
        ({"path": str(tmp_path / "b.jsonl")}, r"b\.jsonl does not exist; did you mean 'a\.jsonl'"),
        (
            {"path": str(tmp_path / "a.jsonl"), "text_column": "txt"},
            r"no column 'txt' \(data\.text_column\).*did you mean 'text'",
        ),
        ({"path": str(tmp_path / "a.jsonl"), "label_column": "lab"}, r"no column 'lab' \(data\.label_column\)"),
    ):
        with pytest.raises(UserError, match=message):
            check_input(configured(**options).data)
    check_input(configured(path=str(tmp_path / "a.jsonl"), label_column="label").data)


def test_skipped_documents_are_counted(configured: Callable[..., Config], tmp_path: Path) -> None:
    contents = {
        "latin.txt": "café".encode("latin-1"),
        "image.png": b"\x89PNG\0\1",
        "empty.txt": b" \n",
        "bom.txt": b"\xef\xbb\xbfgood",
    }
    contents |= {"copy1.txt": b"the same", "copy2.txt": b"the same"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found, counts = read(configured(path=str(tmp_path)))
    assert sorted(d.text for d in found) == ["good", "the same"]
    assert counts == {"not UTF-8": 1, "binary": 1, "empty": 1, "duplicate": 1}


def test_malformed_rows_are_counted(configured: Callable[..., Config], tmp_path: Path) -> None:
    lines = ['{"text": "a", "label": "x"}', "not json", '{"text": "b"}', "[1]", '{"text": 5, "label": "x"}']
    lines += ['{"text": "\\ud83d", "label": "x"}', '{"text": "c", "label": null}', "", '{"text": "d", "label": 2.0}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    found, counts = read(configured(path=str(tmp_path / "a.jsonl"), label_column="label"))
    assert [(d.text, d.label) for d in found] == [("a", "x"), ("d", "2")]
    assert counts == {"malformed line": 3, "without text": 2, "without a label": 2}


def test_column_types(configured: Callable[..., Config], tmp_path: Path) -> None:
    texts = [str(row["text"]) for row in ROWS]
    for name, column in {
        "large": pa.array(texts, pa.large_string()),
        "dictionary": pa.array(texts).dictionary_encode(),
        "view": pa.array(texts, pa.string_view()),
    }.items():
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as out:
            table = pa.table({"text": column})
            with pa.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
        assert [d.text for d in read(configured(path=str(tmp_path / f"{name}.arrow")))[0]] == texts
    for name, labels, names in (
        ("floats", [1.0, 2.5, float("nan"), None], ["1", "2.5"]),
        ("bytes", [b"a", b"", b"\xff", None], ["a", "\\xff"]),
        ("bools", [True, False, None, True], ["True", "False", "True"]),
    ):
        pq.write_table(pa.table({"text": texts[:4], "label": labels}), tmp_path / f"{name}.parquet")
        found, counts = read(configured(path=str(tmp_path / f"{name}.parquet"), label_column="label"))
        assert [d.label for d in found] == names
        assert counts == {"without a label": 4 - len(names)}


def test_unusual_file_names_and_line_endings(configured: Callable[..., Config], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate([b"caf\xe9.txt", b"new\nline.txt", b"[x]*?.txt", b"A.TXT.GZ"]):
        text = f"Text {i}.\r\nSecond line.\r".encode()
        with open(bytes(folder) + b"/" + name, "wb") as out:
            out.write(gzip.compress(text) if i == 3 else text)
    config = configured(path=str(folder), vocab_size=300)
    assert sorted(d.text for d in read(config)[0]) == [f"Text {i}.\nSecond line.\n" for i in range(4)]
    made = prepare(config)
    paths = {file["path"] for file in Manifest.load(made).read_sources(made)}
    assert paths == {str(path) for path in folder.iterdir()}


def test_a_line_across_pieces_is_one_document(configured: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 20_000 + "\nlast")
    config = configured(path=str(tmp_path / "a.txt"), shard_tokens=4096)
    found, counts = read(config)
    assert sum(len(part.pieces) for part in list_parts(config.data)) >= 5
    assert "".join(d.text for d in found) == "word " * 20_000 + "\nlast"
    assert not +counts


def test_a_long_text_is_split_at_paragraphs(configured: Callable[..., Config], tmp_path: Path) -> None:
    text = "".join(f"Paragraph {i}. " + "word " * 100 + "\n\n" for i in range(400))
    (tmp_path / "book.txt").write_text(text)
    found, _ = read(configured(path=str(tmp_path / "book.txt")))
    assert "".join(d.text for d in found) == text
    assert 30 < len(found) < 60
    assert {d.split for d in found} == {"train", "validation", "test"}
    assert all(d.text.startswith("Paragraph") for d in found)


def test_three_files_fill_each_split(configured: Callable[..., Config], tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n")
    found, _ = read(configured(path=str(tmp_path)))
    assert sorted(d.split for d in found) == ["test", "train", "validation"]


def test_tinyshakespeare(shared: Callable[[str], Path], configured: Callable[..., Config]) -> None:
    path = shared("text/tinyshakespeare.txt")
    folder = prepare(configured(name="shakespeare", path=str(path), vocab_size=1024))
    manifest = Manifest.load(folder)
    assert manifest.kind == "text"
    assert manifest.read_sources(folder)[0]["bytes"] == path.stat().st_size == 1_115_394
    assert 400_000 < sum(split["tokens"] for split in manifest.splits.values()) < 480_000
    assert min(split["documents"] for split in manifest.splits.values()) >= 5


def test_sentiment(shared: Callable[[str], Path], configured: Callable[..., Config]) -> None:
    folder = shared("sentiment/train.jsonl").parent
    paths = {
        key: str(folder / f"{name}.jsonl")
        for key, name in [("path", "train"), ("validation_path", "validation"), ("test_path", "test")]
    }
    manifest = Manifest.load(prepare(configured(name="sst2", label_column="label", **paths)))
    assert manifest.labels == ["0", "1"]
    assert manifest.kind == "labelled"
    counts = {name: split["documents"] for name, split in manifest.splits.items()}
    assert sum(counts.values()) + manifest.skipped.get("duplicate", 0) == 6920 + 872 + 1821
    assert counts["test"] >= 1815
    assert counts["validation"] >= 865


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data\.path is not set"),
        ({"path": "{d}/trian.jsonl"}, r"data\.path=.*trian\.jsonl does not exist; did you mean 'train\.jsonl'\?"),
        ({"path": "{d}/*.csv"}, r"data\.path='.*\*\.csv' matches no file"),
        ({"path": "{d}/train.jsonl", "test_path": "{d}/x/y"}, r"data\.test_path=.*y does not exist"),
        ({"path": "{d}/train.jsonl", "text_column": "txt"}, r"no column 'txt' \(data\.text_column\), only text, label; did you mean 'text'"),
        ({"path": "{d}/train.jsonl", "label_column": "topic"}, r"no column 'topic' \(data\.label_column\), only text, label: set"),
        ({"path": "{d}/train.parquet", "text_column": "body"}, r"no column 'body' \(data\.text_column\), only text, label"),
        ({"path": "{d}/bad.jsonl"}, r"no line of .*bad\.jsonl is a JSON object \(the first malformed one is line 1\)"),
        ({"path": "{d}/bad.parquet"}, r"bad\.parquet is no parquet file"),
        ({"path": "{d}/array.jsonl"}, r"no line of .*array\.jsonl is a JSON object .*jq -c '\.\[\]' does it to an array"),
        ({"path": "{d}/rows.json"}, r"rows\.json may hold rows or be a text itself: say which with data\.format=jsonl"),
        ({"path": "{d}/other.parquet", "text_column": "number"}, r"column 'number' of .* holds int64, not text: name another with data\.text_column \(twice, twice\)"),
        ({"path": "{d}/other.parquet", "text_column": "twice"}, r"has 2 columns 'twice' \(data\.text_column\): rename all but one"),
        ({"path": "{d}/utf16.txt"}, r"1 not UTF-8\): give other files with data\.path=\.\.\. or make it UTF-8"),
        ({"path": "{d}/packed.jsonl.bz2"}, r"left out: 1 packed, but not as \.gz or \.zst"),
        ({"path": "{d}/bad.jsonl.gz"}, r"cannot read .*bad\.jsonl\.gz"),
        ({"path": "{d}/hollow"}, r"is a folder with no files in it"),
        ({"path": "{d}/empty.txt"}, r"empty\.txt holds no text to train on \(left out: 1 empty\): give other files"),
        ({"path": "{d}/latin.txt"}, r"latin\.txt holds no text to train on \(left out: 1 not UTF-8\)"),
        ({"path": "{d}/unlabelled.jsonl", "label_column": "label"}, r"column 'label' of .*unlabelled\.jsonl is empty in all 20 rows: check data\.label_column"),
        ({"path": "{d}/one.jsonl", "label_column": "label"}, r"has 1 label in column 'label', and two or more are needed"),
        ({"path": "{d}/prose.txt", "label_column": "label"}, r"prose\.txt is plain text and has no column 'label'"),
        ({"path": "{d}/prose.txt"}, r"none of the 1 documents is for validation: raise data\.validation_fraction"),
        ({"path": "{d}/train.jsonl", "test_path": "{d}/empty.txt"}, r"none of the 200 documents is for test \(left out: 1 empty\)"),
        ({"path": "{d}/train.jsonl", "validation_path": "{d}/train.jsonl", "test_fraction": 0.0}, r"no document is left for training \(left out: 200 dup"),
        ({"path": "{d}/train.jsonl", "tokenizer": "{d}/none"}, r"data\.tokenizer=.*none is not a folder"),
        ({"path": "{d}/train.jsonl", "tokenizer": "{d}/hollow"}, r"has no tokenizer that transformers can load"),
        ({"path": "nowhere://bucket/x"}, r"data\.path=nowhere://bucket/x cannot be opened"),
        ({"path": "{d}/train.jsonl", "name": "a/b"}, r"data\.name='a/b' cannot name a folder"),
    ],
)  # fmt: skip
def test_bad_input_raises_a_one_line_error(
    options: dict[str, object], message: str, configured: Callable[..., Config], tmp_path: Path
) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "one.jsonl", [{"text": f"text {i}", "label": "same"} for i in range(20)])
    jsonl(tmp_path / "unlabelled.jsonl", [{"text": f"text {i}", "label": None} for i in range(20)])
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
    (tmp_path / "bad.jsonl").write_text("no\nnever\n")
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.jsonl.gz").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "prose.txt").write_text("Some prose.")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "array.jsonl").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "utf16.txt").write_bytes("prose".encode("utf-16"))
    (tmp_path / "packed.jsonl.bz2").write_bytes(b"BZh9\0")
    twice = pa.Table.from_arrays([pa.array([1]), *[pa.array(["a"])] * 2], names=["number", "twice", "twice"])
    pq.write_table(twice, tmp_path / "other.parquet")
    filled = {k: v.replace("{d}", str(tmp_path)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        prepare(configured(**filled))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("data/[!.]*"))
    assert not list((tmp_path / "runs").glob("data/.*partial"))
