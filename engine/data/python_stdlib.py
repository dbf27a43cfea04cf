"""Reader of data.source=python_stdlib and python_functions: the source code of the running Python's standard library.

The two share one split by file: `read_modules` (whole files) and `read_functions` (function bodies, labeled with their
package). A file that is held out in one is held out in the other.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import os
import re
import statistics
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

from engine.config import DataConfig
from engine.data.document import Document, Part, Piece, evenly_spaced, split_of
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, kind_of
from engine.errors import UserError

LICENSE = "PSF-2.0"
MIN_FUNCTION_LINES = 4  # lines, after masking
MASK = "_"
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
WORD = re.compile(r"[^\W\d]\w*")
WORD_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
KEPT_WORDS = frozenset(keyword.kwlist) | frozenset(dir(builtins))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_folder() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_paths() -> list[Path]:
    """Return its source files, sorted, without tests and third-party packages. Raises UserError where there are none."""
    paths = []
    for folder, subfolders, names in os.walk(stdlib_folder()):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(
            f"this Python has no source of its standard library in {stdlib_folder()}: use data=files data.path=..."
        )
    return sorted(paths)


def list_files() -> list[InputFile]:
    """Return the source files as inputs, named by their path below the library."""
    from fsspec.implementations.local import LocalFileSystem

    local, listed = LocalFileSystem(), [(path, path.stat()) for path in source_paths()]
    return [
        InputFile(
            str(path), path.relative_to(stdlib_folder()).as_posix(), None, facts.st_size, str(facts.st_mtime), local
        )
        for path, facts in listed
    ]


def list_pieces(config: DataConfig, size: int) -> list[Piece]:
    """Return the files as pieces; for `python_functions` of size 0, so that one part has them all: the choice depends on all."""
    is_one_part = config.source == "python_functions"
    return [Piece(file, config.source, 0, None, 0 if is_one_part else file.size) for file in list_files()]


def read(part: Part, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part."""
    if part.config.source == "python_functions":
        return read_functions(part.config, seed, counts)
    return read_modules(part.config, seed, counts, {piece.file.name for piece in part.pieces})


def check(config: DataConfig) -> None:
    """Raise UserError where the library has no source."""
    source_paths()


def find_kind(config: DataConfig) -> DataKind:
    """Return the kind of data: text, or labeled text."""
    return kind_of(config, lambda: ())


def read_modules(
    config: DataConfig, seed: int, counts: Counter[str], names: Container[str] | None = None
) -> Iterator[Document]:
    """Yield each source file, or those of these names, as one document."""
    for name, text in _sources(counts, names=names):
        yield Document(text, split_of(f"python:{name}", seed, config), name)


def read_functions(config: DataConfig, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield functions and methods (not those nested in them), labeled with their top-level package.

    The packages are the `data.packages` folders of two or more modules with the most functions of four or more lines.
    Removed from each function, so that its text does not leak its label:

    - docstrings, import statements (replaced by `pass`) and decorators, its own and those of nested functions;
    - its own name, wherever it occurs in it;
    - every word (of code, strings and comments alike) that contains the name of a chosen package or of one of its
      modules, case and underscores ignored; a name of fewer than four letters only where it is a whole part of the
      word (`re_flags`, `reFlags`). Python's keywords and builtins stay.

    Each removed word is replaced by `_`. The same words are removed whatever the function's own package is, so a mask
    leaks nothing either. A function with fewer than four lines left is dropped. Raises UserError for fewer than two packages.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = defaultdict(list)  # package -> (file, function name, text)
    module_names: dict[str, set[str]] = defaultdict(set)
    in_training: set[str] = set()
    for name, text in _sources(counts, packages_only=True):
        package = name.split("/")[0]
        module_names[package].add(Path(name).stem)
        try:
            functions = [(name, own_name, body) for own_name, body in _function_texts(text)]
        except (SyntaxError, ValueError, RecursionError):
            counts["not valid Python"] += 1
            continue
        bodies[package] += functions
        if functions and split_of(f"python:{name}", seed, config) == "train":
            in_training.add(package)

    sizes = {package: len(group) for package, group in bodies.items() if len(module_names[package]) > 1}
    ranked = sorted(in_training.intersection(sizes), key=lambda package: (-sizes[package], package))
    chosen = ranked[: config.packages]
    if len(chosen) < 2:
        raise UserError(
            f"this Python's standard library ({stdlib_folder()}) has functions of {len(chosen)} packages, too few to tell apart: "
            "install its full source or use data=files data.path=..."
        )
    leaks = leaks_label(set(chosen).union(*(module_names[package] for package in chosen)))
    for package in sorted(chosen):
        for name, own_name, body in bodies[package]:
            text = _mask_words(body, own_name, leaks)
            if text.count("\n") + 1 < MIN_FUNCTION_LINES:
                counts[f"function of less than {MIN_FUNCTION_LINES} lines"] += 1
            else:
                yield Document(text, split_of(f"python:{name}", seed, config), name, package)


def balance_labels(labels: Sequence[str | None]) -> list[int]:
    """Return the indices to keep: of each label at most 1.5 times the median count of a label, evenly spaced."""
    by_label: dict[str | None, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        by_label[label].append(i)
    max_count = int(1.5 * statistics.median(len(group) for group in by_label.values())) if by_label else 0
    return sorted(group[i] for group in by_label.values() for i in evenly_spaced(len(group), max_count))


def leaks_label(names: Iterable[str]) -> Callable[[str], bool]:
    """Return a test of a word: does it contain one of these package or module names? (`read_functions` has the rule.)"""
    normalized = {_normalize(name) for name in names if not name.startswith("__")} - {""}
    inside = re.compile("|".join(sorted(map(re.escape, (name for name in normalized if len(name) >= 4)))) or r"(?!)")
    cache: dict[str, bool] = {}

    def test(word: str) -> bool:
        if word not in cache:
            parts = {part.lower() for part in WORD_PART.findall(word)} | {_normalize(word)}
            cache[word] = word not in KEPT_WORDS and bool(parts & normalized or inside.search(_normalize(word)))
        return cache[word]

    return test


def _mask_words(text: str, own_name: str, leaks: Callable[[str], bool]) -> str:
    return WORD.sub(lambda word: MASK if word[0] == own_name or leaks(word[0]) else word[0], text)


def _normalize(word: str) -> str:
    return word.replace("_", "").lower()


def _sources(
    counts: Counter[str], packages_only: bool = False, names: Container[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the library, text) of each file."""
    folder = stdlib_folder()
    for path in source_paths():
        name = path.relative_to(folder).as_posix()
        if (packages_only and "/" not in name) or (names is not None and name not in names):
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            counts["not UTF-8"] += 1


def _function_texts(source: str) -> Iterator[tuple[str, str]]:
    """Yield (own name, text without docstrings, imports and decorators) of each outermost function of a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    content = source.encode()
    starts = [0]
    for line in content.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)

    def byte_range(node: ast.stmt | ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    for function in _outermost(tree):
        if (function.end_lineno or 0) - function.lineno + 1 < MIN_FUNCTION_LINES:
            continue
        start, end = byte_range(function)
        pieces, last = [], start
        for cut_start, cut_end, replacement in sorted(_cuts(function, content, byte_range)):
            pieces += [content[last:cut_start], replacement]
            last = cut_end
        text = b"".join([*pieces, content[last:end]]).decode()
        yield function.name, _dedent(text, function.col_offset)


def _outermost(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _outermost(child)


def _cuts(
    function: Function, content: bytes, byte_range: Callable[[ast.stmt | ast.expr], tuple[int, int]]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (start, end, replacement), in bytes, of every docstring, import and inner decorator."""
    for node in ast.walk(function):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield *byte_range(node), b"pass"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield *byte_range(first), b"" if len(node.body) > 1 else b"pass"
            for decorator in node.decorator_list if node is not function else ():
                start, end = byte_range(decorator)
                yield content.rindex(b"@", 0, start), end, b""


def _dedent(text: str, indent: int) -> str:
    """Remove blank lines and the function's own indentation."""
    first, *rest = (line.rstrip() for line in text.split("\n"))
    return "\n".join([first, *(line if line[:indent].strip() else line[indent:] for line in rest if line)])
