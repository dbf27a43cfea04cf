"""How an option is declared: its default, its help, the values it may take, and flags that say what it decides.

The flags replace lists of option names. An option states a flag itself or takes it from its group (`option_group`):

    identity         part of a run's identity: a run of the same name with another value is another run
    micro_batch      decides how many samples fit on a device (the key of runs_dir/micro_batches.json)
    parameter_count  decides how many parameters and which shapes a model has
    start_weights    decides the weights that a training job starts from

and of the options of one group:

    content_key      (data) decides the content of the prepared shards
    per_source       (data) an entry of data.sources may set it
    affects          (serve) what a change of the option replaces: REPLICA, INGRESS or nothing (DEPLOYMENT)
"""

from __future__ import annotations

import ast
import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from engine.errors import UserError, did_you_mean

REPLICA, INGRESS, DEPLOYMENT = "replica", "ingress", "deployment"  # values of `affects`
DEFAULTS = {"micro_batch": False, "parameter_count": False, "start_weights": False, "content_key": True, "per_source": False}  # fmt: skip


def names_in(folder: str) -> tuple[str, ...]:
    """Return the names of the modules of a folder of the project, without importing them: the choices of an option."""
    files = (Path(__file__).parents[2] / folder).glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem != "__init__"))


def declared_in(folder: str, name: str, constant: str, default: Any = None) -> Any:
    """Return what the module folder/name.py assigns to a constant, without importing it; else the default."""
    path = Path(__file__).parents[2] / folder / f"{name}.py"
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == constant for t in node.targets):
            return ast.literal_eval(node.value)
    return default


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    formerly: str | None = None,
    identity: bool | None = None,
    micro_batch: bool | None = None,
    parameter_count: bool | None = None,
    start_weights: bool | None = None,
    content_key: bool | None = None,
    per_source: bool | None = None,
    affects: str | None = None,
) -> Any:
    """Declare one option.

    `help` gives its meaning and unit; `least`, `above` and `most` bound its value; `formerly` is its name in the previous
    version, which is still understood, with a warning. A flag of None is the group's.
    """
    metadata = {
        "help": help, "choices": choices, "least": least, "above": above, "most": most, "formerly": formerly,
        "identity": identity, "micro_batch": micro_batch, "parameter_count": parameter_count,
        "start_weights": start_weights, "content_key": content_key, "per_source": per_source, "affects": affects,
    }  # fmt: skip
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_group(
    kind: type,
    *,
    identity: bool | None = None,
    micro_batch: bool | None = None,
    parameter_count: bool | None = None,
    start_weights: bool | None = None,
) -> Any:
    """Declare a group of options, with the flags of those that don't state their own. identity=None: each option states it."""
    metadata = {"identity": identity, "micro_batch": micro_batch, "parameter_count": parameter_count, "start_weights": start_weights}  # fmt: skip
    return field(default_factory=kind, metadata=metadata)


class Frozen:
    """A dataclass base whose instances `resolve` closes against change (OmegaConf cannot merge into frozen ones)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_closed"):
            raise dataclasses.FrozenInstanceError(f"cannot change {name}: derive a new config with `replace`")
        object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise UserError where the options of this group contradict each other."""


def declared(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted key, field, type) of every option of a dataclass and of its groups."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from declared(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + f.name, f, hints[f.name]


def flag_values(kind: type, flag: str, prefix: str = "", inherited: Any = None) -> dict[str, Any]:
    """Return {dotted key: value of the flag} of every option of a dataclass and of its groups.

    Raises TypeError for an option that doesn't state the flag, where neither its group nor DEFAULTS does.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        key = prefix + f.name
        own = f.metadata.get(flag)
        value = inherited if own is None else own
        if dataclasses.is_dataclass(hints[f.name]):
            values |= flag_values(hints[f.name], flag, f"{key}.", value)  # type: ignore[arg-type]
            continue
        if value is None and flag not in DEFAULTS:
            raise TypeError(f"option {key} must state {flag}=..., for its group doesn't (see engine/config/option.py)")
        values[key] = DEFAULTS[flag] if value is None else value
    return values


def get(config: Any, key: str) -> Any:
    """Return the value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def type_name(hint: Any) -> str:
    """Name a declared type in plain words: 'an integer', 'a number', 'a text', 'true or false', 'a mapping', 'a list'."""
    if get_origin(hint) in (Union, types.UnionType):
        return type_name(next(a for a in get_args(hint) if a is not type(None)))
    names = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        dict: "a mapping",
        list: "a list",
    }
    return names.get(get_origin(hint) or hint, str(hint))


def is_of(value: Any, hint: Any) -> bool:
    """Return whether a value is of a declared type."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(is_of(value, member) for member in get_args(hint) if member is not type(None))
    kind = get_origin(hint) or hint
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_range(key: str, f: dataclasses.Field[Any], value: Any) -> None:
    """Raise UserError for a value that is not among an option's choices or is out of its range."""
    choices, least, above, most = (f.metadata.get(k) for k in ("choices", "least", "above", "most"))
    for choice in value if isinstance(value, list) else [value]:
        if choices and choice not in choices:
            raise UserError(f"{key}={choice} is not one of {', '.join(choices)}{did_you_mean(str(choice), choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is not a finite number")
    if least is not None and value < least:
        raise UserError(f"{key}={value} is too small: use {least} or more")
    if above is not None and value <= above:
        raise UserError(f"{key}={value} is too small: use more than {above}")
    if most is not None and value > most:
        raise UserError(f"{key}={value} is too large: use {most} or less")
