import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import Config, DataConfig, replace
from engine.data.filters import gopher_quality, make_filter, user_filter
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.errors import UserError
from tests.engine.data.conftest import documents

PROSE = (
    "The ship had left the harbour that morning with a cargo of salt, and nobody on the quay could have said when it "
    "would be back. Some of the older men watched it go. They knew the captain, and they knew the sea in autumn; "
    "it was not to be trusted.\n\nIn the town the market went on as it always did, with its fish, its bread and its noise."
)


def test_good_prose_is_kept() -> None:
    assert gopher_quality(PROSE) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to be of any use to the reader.", "not 50 to 100,000 words"),
        ("a b c d e " * 20, "mean word length"),
        (PROSE + " #" * 12, "symbols"),
        (PROSE + " 1234 5678 90123" * 12, "words without a letter"),
        ("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 6, "few stop words"),
        ("\n".join(f"- {line}" for line in PROSE.replace("\n\n", " ").split(". ")), "bullets"),
        ("\n".join(f"{line} ..." for line in PROSE.split(", ")[:4]) + " " + "and then it went to the end of that long day " * 5, "ellipsis"),
        (PROSE.split("\n\n")[0].replace(". ", ".\n") + "\nHome.\nHome.\nHome.\nHome.", "repeated lines"),
        ("the red fox and the dog " * 20, "repeated words"),
        (PROSE + " " + PROSE.replace("\n", " "), "repeated words"),
    ],
)  # fmt: skip
def test_each_rule(text: str, reason: str) -> None:
    found = gopher_quality(text)
    assert found
    assert reason in found


def test_length_and_user_filters() -> None:
    rule = make_filter(DataConfig(min_characters=5, max_characters=10))
    assert rule is not None
    assert [rule("x" * n) for n in (4, 5, 10, 11)] == [
        "shorter than data.min_characters", None, None, "longer than data.max_characters",
    ]  # fmt: skip
    assert make_filter(DataConfig()) is None
    with pytest.raises(UserError, match="cannot be imported"):
        user_filter("json:nothing")
    with pytest.raises(UserError, match="must return True, False or a reason"):
        user_filter("json:loads")("[1]")


def test_language() -> None:
    pytest.importorskip("py3langid")
    rule = make_filter(DataConfig(languages=["en", "fr"]))
    assert rule is not None
    assert rule(PROSE) is None
    assert rule("Le navire avait quitté le port ce matin-là avec une cargaison de sel pour la ville.") is None
    assert rule("Das Schiff hatte den Hafen an diesem Morgen mit einer Ladung Salz verlassen.") == "language: de"
    with pytest.raises(UserError, match=r"data\.languages=xx is not one of"):
        make_filter(DataConfig(languages=["xx"]))


def test_manifest_counts_skipped_documents_and_masked_spans(
    configured: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{PROSE} Number {i} was written to captain{i}@sea.org that day." for i in range(30)]
    rows += [
        "short",
        rows[0],
        *[f"Forbidden word in number {i}. {PROSE}" for i in range(3)],
        "key " + "AKIA" + "QYLPMN5HFIQR7XYA " + PROSE,
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "keeps_out.py").write_text(
        "def forbidden(text):\n    return 'a forbidden word' if 'Forbidden' in text else '29' not in text\n"
    )
    monkeypatch.chdir(tmp_path)
    config = configured(
        path=str(tmp_path / "a.jsonl"), vocab_size=300, min_characters=20, mask=["emails", "secrets"],
        filter="keeps_out:forbidden", license="CC0-1.0",
    )  # fmt: skip
    folder = prepare(config)
    manifest = Manifest.load(folder)
    assert manifest.skipped == {
        "duplicate": 1, "shorter than data.min_characters": 1, "a forbidden word": 3, "data.filter": 1,
    }  # fmt: skip
    assert manifest.masked == {"emails": 31, "secrets": 1}
    assert manifest.license == "CC0-1.0"
    assert sum(split["documents"] for split in manifest.splits.values()) == 30
    kept = documents(config.data, 0, Counter())
    assert all("<email>" in text or "<secret>" in text for text in (document.text for document in kept))
    assert not any("@sea.org" in document.text or "AKIA" in document.text for document in kept)
    (tmp_path / "keeps_out.py").write_text("def forbidden(text):\n    return True\n")
    import importlib
    import sys

    importlib.reload(sys.modules["keeps_out"])
    assert prepare(config) != folder  # another filter under the same name


def test_invalid_filters_raise_before_anything_is_read(configured: Callable[..., Config]) -> None:
    for options, message in (
        ({"mask": ["email"]}, r"data\.mask=email is not one of emails, secrets; did you mean 'emails'"),
        ({"filter": "nothing"}, "write 'module:function'"),
        ({"min_characters": 5, "max_characters": 4}, r"min_characters 5 is more than data\.max_characters 4"),
    ):
        with pytest.raises(UserError, match=message):
            configured(**options)
    with pytest.raises(UserError, match=r"data\.filter=nothing:x cannot be imported"):
        prepare(replace(configured(source="python_stdlib"), data__filter="nothing:x"))
