import ast
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from engine.config import Config, DataConfig
from engine.data.document import SPLITS, Document, evenly_spaced, hash_fraction, split_of
from engine.data.python_stdlib import _function_texts, leaks_label, stdlib_folder
from engine.data.scan import subsample
from tests.engine.data.conftest import documents

HELD_OUT = {"validation_fraction": 0.05, "test_fraction": 0.15}


@pytest.fixture(scope="module")
def functions() -> tuple[list[Document], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(documents(DataConfig(source="python_functions", **HELD_OUT), 0, counts)), counts


@pytest.fixture(scope="module")
def modules() -> list[Document]:
    return list(documents(DataConfig(source="python_stdlib", **HELD_OUT), 0, Counter()))


def test_hash_fraction_is_uniform_and_pure() -> None:
    values = [hash_fraction("split", 0, i) for i in range(20_000)]
    assert all(0 <= v < 1 for v in values)
    assert abs(statistics.mean(values) - 0.5) < 0.01
    assert abs(sum(v < 0.05 for v in values) / 20_000 - 0.05) < 0.006
    assert hash_fraction("split", 0, 7) == values[7] != hash_fraction("split", 1, 7)


def test_changing_one_fraction_moves_nothing_between_held_out_splits() -> None:
    small, large = (
        DataConfig(validation_fraction=0.1, test_fraction=0.05),
        DataConfig(validation_fraction=0.1, test_fraction=0.2),
    )
    for i in range(2000):
        before, after = split_of(str(i), 0, small), split_of(str(i), 0, large)
        assert before == after or (before, after) == ("train", "test")


def test_held_out_files_are_held_out_in_both(
    functions: tuple[list[Document], Counter[str]], modules: list[Document]
) -> None:
    split_in_modules = {document.source: document.split for document in modules}
    assert len(split_in_modules) == len(modules) > 400
    assert all(split_in_modules.get(f.source, f.split) == f.split for f in functions[0])
    trained = {document.source for document in modules if document.split == "train"}
    assert not trained & {f.source for f in functions[0] if f.split != "train"}
    assert {f.split for f in functions[0]} == {"train", "validation", "test"}


def test_no_test_of_the_library_and_no_third_party_file(modules: list[Document]) -> None:
    parts = {part for document in modules for part in document.source.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert "json/decoder.py" in {document.source for document in modules}


def test_functions_are_of_twelve_packages_or_more_and_balanced(functions: tuple[list[Document], Counter[str]]) -> None:
    found, counts = functions
    sizes = Counter(f.label for f in found)
    assert len(sizes) >= 12
    assert max(sizes.values()) <= 1.5 * statistics.median(sizes.values()) + 1
    assert max(sizes.values()) / len(found) < 0.2
    assert {f.label for f in found if f.split == "train"} == set(sizes)
    assert len({f.text for f in found}) == len(found)
    assert counts["duplicate"] > 0
    assert min(f.text.count("\n") for f in found) >= 3


def test_nothing_gives_the_package_away(functions: tuple[list[Document], Counter[str]]) -> None:
    for function in functions[0]:
        assert function.label is not None
        if len(function.label) >= 4:
            assert function.label not in function.text.lower()
        tree = ast.parse(function.text)
        for node in ast.walk(tree):
            assert not isinstance(node, (ast.Import, ast.ImportFrom))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                assert not node.decorator_list
                assert ast.get_docstring(node) is None
        assert tree.body[0].name == "_"  # type: ignore[attr-defined]


def test_what_is_removed_from_a_function() -> None:
    source = '''
class Queue:
    @property
    async def fetch_one(self, é="é"):
        """The docstring."""
        import asyncio, os; x = 1

        @asyncio.coroutine
        def inner():
            "Another."
        # fetch_one of Asyncio's event_loop
        await self.fetch_one("asyncio.Queue")
        return ValueError(é)
'''
    [(own, text)] = list(_function_texts(source))
    assert own == "fetch_one"
    assert text.split("\n") == [
        'async def fetch_one(self, é="é"):',
        "    pass; x = 1",
        "    def inner():",
        "        pass",
        "    # fetch_one of Asyncio's event_loop",
        '    await self.fetch_one("asyncio.Queue")',
        "    return ValueError(é)",
    ]
    ast.parse(text)


def test_which_words_give_away() -> None:
    test = leaks_label(["asyncio", "event_loop", "re", "error", "__init__"])
    assert [
        w
        for w in ["asyncio", "AsyncIO2", "EventLoop", "my_event_loops", "re", "re_flags", "reFlags", "SomeError"]
        if not test(w)
    ] == []
    assert [w for w in ["event", "return", "result", "ValueError", "loop", "__init__", "init"] if test(w)] == []


def test_max_documents_is_an_even_sample(functions: tuple[list[Document], Counter[str]]) -> None:
    config = DataConfig(source="python_functions", max_documents=320, **HELD_OUT)
    there = functions[0]
    found = [there[i] for i in subsample(np.array([SPLITS.index(f.split) for f in there]), config)]
    assert len(found) == 320
    assert Counter(f.split for f in found) == {"train": 256, "validation": 16, "test": 48}
    assert {f.label for f in found if f.split == "train"} == {f.label for f in functions[0]}
    position = {f.text: i for i, f in enumerate(functions[0])}
    places = [position[f.text] for f in found]
    assert places == sorted(places)


@pytest.mark.parametrize(("size", "wanted"), [(10, 10), (10, 3), (7, 6), (1000, 64), (5, 9)])
def test_evenly(size: int, wanted: int) -> None:
    chosen = evenly_spaced(size, wanted)
    assert len(set(chosen)) == len(chosen) == min(size, wanted)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert max(gaps) - min(gaps) <= 1


def test_the_corpus_is_a_function_of_config_and_seed(configured: Callable[..., Config]) -> None:
    config = configured(source="python_stdlib", max_documents=50).data
    first, again, other = (list(documents(config, seed, Counter())) for seed in (0, 0, 1))
    assert first == again
    assert [d.split for d in first] != [d.split for d in other] or [d.source for d in first] != [
        d.source for d in other
    ]
    assert all((stdlib_folder() / d.source).read_text(encoding="utf-8") == d.text for d in first)
