"""The config of a job: Hydra composes it from conf/ (which states only what differs from the defaults here), and `resolve`
turns it into frozen, typed, checked dataclasses. Past `resolve` there is no DictConfig and no string key.

    option.py        how an option is declared: default, help, bounds, flags (identity, per_source, ...)
    data.py model.py optim.py train.py sweep.py evaluate.py serve.py jobs.py
                     the options by group, each with the checks of its own group
    config.py        Config: all groups, and the values that follow from them
    checks.py        the checks across groups
    former_names.py  options by the names of the previous version
    values.py        configs from a command line, from other configs and from files; their hash

Nothing here imports torch or Ray, so that a mistake is reported within a second.
"""

from engine.config.checks import check
from engine.config.config import Config, declared, keys_with
from engine.config.data import (
    DataConfig,
    content_options,
    per_source_options,
    source_configs,
    source_options,
)
from engine.config.evaluate import CardConfig, EvaluateConfig, PromoteConfig
from engine.config.former_names import current_keys, current_override, current_tree
from engine.config.jobs import ClusterConfig, ConvertConfig, DemoConfig, PlanConfig, TrackingConfig
from engine.config.model import LoraConfig, ModelConfig, ObjectiveConfig
from engine.config.optim import OptimConfig, ScheduleConfig
from engine.config.option import DEPLOYMENT, INGRESS, REPLICA, Frozen, declared_in, get, is_of, option, type_name
from engine.config.serve import ImproveConfig, KeyConfig, ServeConfig, options_affecting
from engine.config.sweep import SEARCHERS, SweepConfig
from engine.config.train import TrainConfig, ZeroConfig
from engine.config.values import (
    close,
    config_groups,
    fingerprint,
    flatten,
    from_dict,
    group,
    identity,
    identity_hash,
    read_tree,
    replace,
    resolve,
    select,
    to_dict,
    with_values,
)

__all__ = [
    "DEPLOYMENT",
    "INGRESS",
    "REPLICA",
    "SEARCHERS",
    "CardConfig",
    "ClusterConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "Frozen",
    "ImproveConfig",
    "KeyConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PlanConfig",
    "PromoteConfig",
    "ScheduleConfig",
    "ServeConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "ZeroConfig",
    "check",
    "close",
    "config_groups",
    "content_options",
    "current_keys",
    "current_override",
    "current_tree",
    "declared",
    "declared_in",
    "fingerprint",
    "flatten",
    "from_dict",
    "get",
    "group",
    "identity",
    "identity_hash",
    "is_of",
    "keys_with",
    "option",
    "options_affecting",
    "per_source_options",
    "read_tree",
    "replace",
    "resolve",
    "select",
    "source_configs",
    "source_options",
    "to_dict",
    "type_name",
    "with_values",
]
