import ast
import statistics
from collections import Counter

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data.document import SPLITS, Document
from engine.data.python_stdlib import _function_texts, leaks_label
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


def test_held_out_files_are_the_same_for_modules_and_functions(
    functions: tuple[list[Document], Counter[str]], modules: list[Document]
) -> None:
    split_in_modules = {document.source: document.split for document in modules}
    assert len(split_in_modules) == len(modules) > 400
    assert all(split_in_modules.get(f.source, f.split) == f.split for f in functions[0])
    trained = {document.source for document in modules if document.split == "train"}
    assert not trained & {f.source for f in functions[0] if f.split != "train"}
    assert {f.split for f in functions[0]} == {"train", "validation", "test"}


def test_tests_and_third_party_files_are_excluded(modules: list[Document]) -> None:
    parts = {part for document in modules for part in document.source.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert "json/decoder.py" in {document.source for document in modules}


def test_functions_have_at_least_twelve_balanced_labels(functions: tuple[list[Document], Counter[str]]) -> None:
    found, counts = functions
    sizes = Counter(f.label for f in found)
    assert len(sizes) >= 12
    assert max(sizes.values()) <= 1.5 * statistics.median(sizes.values()) + 1
    assert max(sizes.values()) / len(found) < 0.2
    assert {f.label for f in found if f.split == "train"} == set(sizes)
    assert len({f.text for f in found}) == len(found)
    assert counts["duplicate"] > 0
    assert min(f.text.count("\n") for f in found) >= 3


def test_texts_do_not_leak_their_labels(functions: tuple[list[Document], Counter[str]]) -> None:
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


def test_docstrings_imports_and_decorators_are_removed() -> None:
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


def test_words_that_leak_a_label() -> None:
    test = leaks_label(["asyncio", "event_loop", "re", "error", "__init__"])
    assert [
        w
        for w in ["asyncio", "AsyncIO2", "EventLoop", "my_event_loops", "re", "re_flags", "reFlags", "SomeError"]
        if not test(w)
    ] == []
    assert [w for w in ["event", "return", "result", "ValueError", "loop", "__init__", "init"] if test(w)] == []


def test_max_documents_samples_evenly(functions: tuple[list[Document], Counter[str]]) -> None:
    config = DataConfig(source="python_functions", max_documents=320, **HELD_OUT)
    there = functions[0]
    found = [there[i] for i in subsample(np.array([SPLITS.index(f.split) for f in there]), config)]
    assert len(found) == 320
    assert Counter(f.split for f in found) == {"train": 256, "validation": 16, "test": 48}
    assert {f.label for f in found if f.split == "train"} == {f.label for f in functions[0]}
    position = {f.text: i for i, f in enumerate(functions[0])}
    places = [position[f.text] for f in found]
    assert places == sorted(places)
