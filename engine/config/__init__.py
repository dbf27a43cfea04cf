"""The config of a job: Hydra composes a raw one against the dataclasses of `schema.py` (`conf/` states only what
differs from them), `resolve` turns it into frozen, typed, checked objects. Past `resolve` nobody sees a DictConfig or a
string key.

    schema.py   every option
    checks.py   what is refused, and with which words
    values.py   configs from other configs, and their fingerprints

Nothing here imports torch or Ray, so that a mistake is told within a second.
"""

from engine.config.checks import check, is_of
from engine.config.schema import (
    LAYOUT,
    PER_SOURCE,
    CardConfig,
    ClusterConfig,
    Config,
    ConvertConfig,
    DataConfig,
    DemoConfig,
    EvaluateConfig,
    Frozen,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PlanConfig,
    PromoteConfig,
    ScheduleConfig,
    ServeConfig,
    SweepConfig,
    TrackingConfig,
    TrainConfig,
    ZeroConfig,
    data_kind,
    declared,
    get,
    option,
    source_configs,
    source_options,
    type_name,
)
from engine.config.values import (
    close,
    config_groups,
    fingerprint,
    from_dict,
    group,
    identity,
    replace,
    resolve,
    to_dict,
    with_values,
)

__all__ = [
    "LAYOUT",
    "PER_SOURCE",
    "CardConfig",
    "ClusterConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "Frozen",
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
    "data_kind",
    "declared",
    "fingerprint",
    "from_dict",
    "get",
    "group",
    "identity",
    "is_of",
    "option",
    "replace",
    "resolve",
    "source_configs",
    "source_options",
    "to_dict",
    "type_name",
    "with_values",
]
