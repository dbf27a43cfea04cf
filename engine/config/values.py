"""Configs made from a command line, from other configs and from files; and the hash that tells two of them apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from engine.config.checks import check
from engine.config.config import Config, declared, keys_with
from engine.config.former_names import by_former_names, current_keys, current_tree, current_value, warn_of
from engine.config.option import Frozen, get
from engine.errors import UserError, did_you_mean

T = TypeVar("T")


def close(config: T) -> T:
    """Close a config and its groups against change."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if isinstance(value, Frozen):
            close(value)
    object.__setattr__(config, "_closed", True)
    return config


def replace(config: Config, **changes: Any) -> Config:
    """Return a copy with some dotted keys changed, written with `__` for the dot: `replace(c, train__workers=2)`."""
    return with_values(config, {key.replace("__", "."): value for key, value in changes.items()})


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return a checked, closed copy with the values at these dotted keys."""
    tree = to_dict(config)
    known = [key for key, _, _ in declared()]
    for key, value in values.items():
        if key in current_keys():
            warn_of(key, current_keys()[key])
            key = current_keys()[key]
        if key not in known:
            raise UserError(f"{key} is not an option{did_you_mean(key, known)}")
        node = tree
        *groups, last = key.split(".")
        for group in groups:
            node = node[group]
        node[last] = value
    return from_dict(tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain nested dicts."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any], file: str | None = None) -> Config:
    """Build, check and close a config from nested dicts (missing keys take their defaults), which may be of a file."""
    config = close(group(Config, current_tree(tree, file)))
    check(config)
    return config


def read_tree(file: Path) -> dict[str, Any]:
    """Read a config.yaml as nested dicts, with all options by their current names."""
    import yaml

    return current_tree(yaml.safe_load(file.read_text()), str(file))


def group(kind: type[T], tree: dict[str, Any], prefix: str = "") -> T:
    """Build a group of options, and those within it, from nested dicts.

    With the prefix of its keys ("serve."), options by their former names are understood too.
    """
    tree = current_tree(tree, prefix=prefix) if prefix else tree
    hints = get_type_hints(kind)
    return kind(
        **{
            key: group(hints[key], value) if dataclasses.is_dataclass(hints[key]) else value  # type: ignore[arg-type]
            for key, value in tree.items()
        }
    )


def resolve(raw: Any) -> Config:
    """Turn a composed DictConfig into a checked, frozen Config. Raises UserError with the key and the fix."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(raw)
    assert isinstance(config, Config)
    config.data.sources = current_value("data.sources", config.data.sources)
    config.sweep.space = current_value("sweep.space", config.sweep.space)
    check(config)
    return close(config)


def flatten(config: Config) -> dict[str, Any]:
    """Return {dotted key: value} of every option."""
    return {key: get(config, key) for key, _, _ in declared()}


def select(config: Config, flag: str) -> dict[str, Any]:
    """Return {dotted key: value} of the options with a flag (identity, micro_batch, ...; see option.py)."""
    return {key: get(config, key) for key in keys_with(flag)}


def identity(config: Config) -> dict[str, Any]:
    """Return {dotted key: value} of all that decides what is computed."""
    return select(config, "identity")


def fingerprint(config: Config) -> str:
    """Return the SHA-256 (hex) of a run's identity."""
    return identity_hash(identity(config))


def identity_hash(identity: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of {dotted key: value}, with today's or former names: a renamed option changes no hash."""
    return hashlib.sha256(json.dumps(by_former_names(identity), sort_keys=True).encode()).hexdigest()


def config_groups() -> list[tuple[str, list[str]]]:
    """Return (group, names of its YAML files) of conf/."""
    from importlib.resources import files

    folders = sorted((f for f in files("conf").iterdir() if f.is_dir() and f.name[0] not in "_."), key=lambda f: f.name)
    return [(f.name, sorted(y.name[:-5] for y in f.iterdir() if y.name.endswith(".yaml"))) for f in folders]
