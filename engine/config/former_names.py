"""Options under the names of the previous version, which are still understood, with a warning.

`option(..., formerly=NAME)` is the one place that states a former name. It is understood on the command line, in config
files of runs, in sweep.space, in entries of data.sources and in an exported endpoint. Hashes are computed with former
names, so that runs and prepared data of the previous version stay the same ones.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

from engine.config.config import declared
from engine.config.data import per_source_options

_warned: set[str] = set()


@cache
def current_keys() -> dict[str, str]:
    """Return {former dotted key: current dotted key} of the options that were renamed."""
    former = {}
    for key, f, _ in declared():
        if f.metadata["formerly"]:
            former[".".join([*key.split(".")[:-1], f.metadata["formerly"]])] = key
    return former


@cache
def former_keys() -> dict[str, str]:
    """Return {current dotted key: former dotted key} of the options that were renamed."""
    return {current: former for former, current in current_keys().items()}


def warn_once(message: str) -> None:
    """Print a warning to stderr, once in a process."""
    if message not in _warned:
        _warned.add(message)
        print(f"warning: {message}", file=sys.stderr)


def warn_of(former: str, current: str) -> None:
    """Warn that an option was given by its former name."""
    warn_once(f"{former} is now called {current}: the former name is understood in this version only")


def current_override(override: str) -> str:
    """Return a command-line override (KEY=VALUE, with Hydra's prefixes) by the option's current name, with a warning if it was renamed."""
    match = re.fullmatch(r"(\+{0,2}|~)([A-Za-z0-9_.-]+)(.*)", override, re.DOTALL)
    if match and match[2] in current_keys():
        warn_of(match[2], current_keys()[match[2]])
        return match[1] + current_keys()[match[2]] + match[3]
    return override


def current_tree(tree: dict[str, Any], file: str | None = None, prefix: str = "") -> dict[str, Any]:
    """Return the nested dicts of a config, or of its group at `prefix` ("serve."), by current names.

    Warns of each former name; of those in a file, whose name is given, with one warning of the options that were set.
    """
    renamed: dict[str, str] = {}
    result = _current_tree(tree, prefix, renamed)
    if file:  # a run's config.yaml has every option: warn only of those that were set
        defaults = _defaults()
        renamed = {
            former: current for former, current in renamed.items()
            if current not in defaults or _value_at(result, current.removeprefix(prefix)) != defaults[current]
        }  # fmt: skip
    if renamed and file:
        names = ", ".join(f"{former} is now {current}" for former, current in renamed.items())
        warn_once(f"{file} has options by their former names, which are understood in this version only: {names}")
    elif renamed:
        for former, current in renamed.items():
            warn_of(former, current)
    return result


def current_value(key: str, value: Any) -> Any:
    """Return the value of the option at a dotted key, with the options within it (data.sources, sweep.space) by current names."""
    *groups, last = key.split(".")
    return current_tree({last: value}, prefix=".".join([*groups, ""]) if groups else "")[last]


def _current_tree(tree: dict[str, Any], prefix: str, renamed: dict[str, str]) -> dict[str, Any]:
    result = {}
    for name, value in tree.items():
        key = prefix + name
        if key in current_keys():
            current = current_keys()[key]
            renamed[key] = current
            if current.split(".")[-1] in tree:  # given by both names: the current one holds
                continue
            key = current
        if isinstance(value, dict):
            if key == "data.sources":
                value = {source: _current_source(own, f"{key}.{source}", renamed) for source, own in value.items()}
            elif key == "sweep.space":
                value = _current_space(value, "", renamed)
            elif not _is_option(key):
                value = _current_tree(value, f"{key}.", renamed)
        result[key.removeprefix(prefix)] = value
    return result


def _current_source(options: Any, where: str, renamed: dict[str, str]) -> Any:
    """Rename the options of one entry of data.sources."""
    if not isinstance(options, dict):
        return options
    current = {former_keys().get(f"data.{name}", "").removeprefix("data."): name for name in per_source_options()}
    for name in options:
        if name in current:
            renamed[f"{where}.{name}"] = f"{where}.{current[name]}"
    return {current.get(name, name): value for name, value in options.items()}


def _current_space(space: dict[str, Any], prefix: str, renamed: dict[str, str]) -> dict[str, Any]:
    """Rename the keys of a search space, written with dots or as nested groups, and those of its conditions."""
    result = {}
    for name, value in space.items():
        key = str(prefix) + str(name)
        if key in current_keys():
            renamed[f"sweep.space.{key}"] = f"sweep.space.{current_keys()[key]}"
            name = current_keys()[key].removeprefix(prefix)
            key = current_keys()[key]
        if isinstance(value, dict):
            if _is_option(key):
                value = value | ({"when": _current_space(value["when"], "", renamed)} if isinstance(value.get("when"), dict) else {})  # fmt: skip
            else:
                value = _current_space(value, f"{key}.", renamed)
        result[name] = value
    return result


@cache
def _options() -> frozenset[str]:
    return frozenset(key for key, _, _ in declared())


@cache
def _defaults() -> dict[str, Any]:
    return {key: f.default for key, f, _ in declared()}


def _value_at(tree: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _is_option(key: str) -> bool:
    return key in _options()


def by_former_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} with the keys, and those within data.sources and sweep.space, by former names: what is hashed."""
    former, result = former_keys(), {}
    for key, value in values.items():
        if key == "data.sources":
            value = {
                source: {former.get(f"data.{name}", f"data.{name}").removeprefix("data."): v for name, v in own.items()}
                for source, own in value.items()
            }
        elif key == "sweep.space":
            value = {former.get(name, name): domain for name, domain in value.items()}
        result[former.get(key, key)] = value
    return result
