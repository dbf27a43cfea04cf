"""Configs made from what a person wrote, from other configs and from dicts; and what tells two of them apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, TypeVar, get_type_hints

from engine.config.checks import check
from engine.config.schema import LAYOUT, Config, Frozen, declared, get
from engine.errors import UserError, nearest

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
        if key not in known:
            raise UserError(f"{key} is not an option{nearest(key, known)}")
        node = tree
        *groups, last = key.split(".")
        for group in groups:
            node = node[group]
        node[last] = value
    return from_dict(tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain nested dicts."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Config:
    """Build, check and close a config from nested dicts (missing keys take their defaults)."""
    config = close(group(Config, tree))
    check(config)
    return config


def group(kind: type[T], tree: dict[str, Any]) -> T:
    """Build a group of options, and those within it, from nested dicts."""
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
    check(config)
    return close(config)


def identity(config: Config, ignoring: tuple[str, ...] = LAYOUT) -> dict[str, Any]:
    """Return {dotted key: value} of all that decides what is computed."""
    return {
        key: get(config, key)
        for key, _, _ in declared()
        if not any(key == skip or key.startswith(skip + ".") for skip in ignoring)
    }


def fingerprint(config: Config, ignoring: tuple[str, ...] = LAYOUT) -> str:
    """Return the SHA-256 (hex) of all that decides what is computed: the config without the LAYOUT keys."""
    return hashlib.sha256(json.dumps(identity(config, ignoring), sort_keys=True).encode()).hexdigest()


def config_groups() -> list[tuple[str, list[str]]]:
    """Return (group, names of its YAML files) of conf/."""
    from importlib.resources import files

    folders = sorted((f for f in files("conf").iterdir() if f.is_dir() and f.name[0] not in "_."), key=lambda f: f.name)
    return [(f.name, sorted(y.name[:-5] for y in f.iterdir() if y.name.endswith(".yaml"))) for f in folders]
