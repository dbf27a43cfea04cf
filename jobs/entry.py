"""Run a job: compose and check its config from a command line, and call its function; a mistake ends in one sentence and exit code 2."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cluster.environment import set_default_environment
from cluster.errors import ClusterError
from engine.config import (
    Config,
    config_groups,
    current_keys,
    current_override,
    declared,
    get,
    replace,
    resolve,
    to_dict,
    type_name,
    with_values,
)
from engine.errors import UserError, did_you_mean
from engine.train.requirements import check_machine

Function = Callable[[Config], object]

# Manta keeps a run's files in runs/<name> itself, so Hydra makes no folder and no log of its own.
HYDRA = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=.",
         "hydra.sweep.dir=.", "hydra.sweep.subdir=.")  # fmt: skip
CONTROLLER_PROCESSES = 3  # Ray Train's controller and what it starts beside the ranks


def run_job(
    job: str, function: Function, argv: Sequence[str] | None = None, positional_keys: Sequence[str] = ()
) -> int:
    """Run `function` on the config of job `job` that `argv` describes; return the exit code, which the function may choose.

    Words that aren't KEY=VALUE are the values of `positional_keys`, in their order.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [
        current_override(word) for word in add_keys([word for word in words if word != "--debug"], positional_keys)
    ]
    set_default_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends a job as Ctrl-C does
    try:
        if {"-h", "--help"} & set(words):
            print_help(job)
            return 0
        overrides = [word for word in words if not word.startswith("-")]
        if {"-c", "--cfg"} & set(words) and "job" in words:
            words = [word for word in words if word not in ("-c", "--cfg", "job")]
            print(yaml.safe_dump(to_dict(compose(job, words)), sort_keys=False), end="")
            return 0
        if any(word in words for word in ("-c", "--cfg", "--info", "-p", "--package", "--resolve", "--hydra-help")):
            _run_hydra(job, lambda config: None, words)
            return 0
        if "-m" in words or "--multirun" in words:
            compose(job, [_first_choice(override) for override in overrides])
            _run_hydra(job, function, words)
            return 0
        unknown = [word for word in words if word.startswith("-")]
        if unknown:
            raise UserError(f"{unknown[0]} is not a flag of manta {job}: see manta {job} --help")
        code = function(compose(job, overrides))
        return code if isinstance(code, int) else 0
    except (UserError, ClusterError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        log = Path("manta-error.log")
        log.write_text(traceback.format_exc())
        print(
            f"error: {type(error).__name__}: {str(error)[:300]} (traceback in {log}; --debug shows it here)",
            file=sys.stderr,
        )
        return 1


def add_keys(words: Sequence[str], positional_keys: Sequence[str]) -> list[str]:
    """Turn the first words that aren't KEY=VALUE or a flag into values of `positional_keys`."""
    keys, overrides = iter(positional_keys), []
    for word in words:
        is_positional = "=" not in word and not word.startswith("-")
        key = next(keys, None) if is_positional else None
        overrides.append(f"{key}={word}" if key else word)
    return overrides


def sets_data(words: Sequence[str]) -> bool:
    """Return whether a command sets options of the data."""
    return any(word.lstrip("+").startswith(("data=", "data.", "experiment=")) for word in words)


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to the config's Ray cluster; its logs go to the run's folder."""
    from cluster.session import connect

    where = config.cluster
    with connect(where.address, where.cpus, where.dashboard, config.run_dir / "logs"):
        yield


@contextmanager
def training_session(config: Config) -> Iterator[None]:
    """Connect to the config's Ray cluster for a run; a Ray instance of the job's own starts the run's processes at once.

    Raises UserError for missing input data, before Ray starts.
    """
    from engine.data.corpus import check_input

    check_input(config.data)
    own = config.cluster.address == "local"
    if own:
        check_machine(config)
        os.environ.setdefault(
            "RAY_prestart_worker_first_driver", "0"
        )  # Ray's own choice of processes fits none of ours
    with imports_without_gc() as imports_done, ray_session(config):
        from cluster.prestart import prestart_workers
        from engine.train.launch import worker_environments

        if own:
            controller, rank = worker_environments(config)
            prestart_workers(CONTROLLER_PROCESSES, controller)
            prestart_workers(min(config.train.workers, os.cpu_count() or 1), rank, nested=True)
        imports_done()
        yield


@contextmanager
def imports_without_gc() -> Iterator[Callable[[], None]]:
    """Disable the garbage collector, which takes a quarter of the time of all imports, until the yielded function is called."""
    gc.disable()
    try:
        yield gc.enable
    finally:
        gc.enable()


def compose(job: str, overrides: Sequence[str]) -> Config:
    """Compose and check the config of a job. Raises UserError with the key and the nearest existing one."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    _store_schema()
    try:
        plain, mappings = split_mappings([current_override(override) for override in overrides])
        with initialize_config_module("conf", version_base="1.3"):
            config = resolve(hydra_compose(job, plain))
            return with_values(config, mappings) if mappings else config
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides)) from error


def split_mappings(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate the overrides of whole mappings, such as sweep.space={...}: they replace the mapping, where Hydra would merge.

    A text with braces, such as data.caption='a {label}', is quoted, since Hydra would parse it as a mapping.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    known = {key for key, _, hint in declared() if type_name(hint) == "a mapping"}
    texts = {key for key, _, hint in declared() if type_name(hint) == "a text"}
    plain, mappings = [], {}
    for override in overrides:
        if override.split("=")[0] in known:
            parsed = OverridesParser.create().parse_override(override)
            mappings[parsed.key_or_group] = parsed.value()
            if not isinstance(parsed.value(), dict):
                raise UserError(
                    f"{override}: {parsed.key_or_group} takes a mapping: {parsed.key_or_group}={{KEY:VALUE}}"
                )
        else:
            key, _, value = override.partition("=")
            braces = key in texts and "{" in value and "${" not in value and value[0] not in "'\""
            plain.append(f"{key}={json.dumps(value, ensure_ascii=False)}" if braces else override)
    return plain, mappings


def _store_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def _run_hydra(job: str, function: Function, words: Sequence[str]) -> None:
    """Let Hydra handle --cfg, --multirun and the like; each run of a multirun is named <name>-<number>."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    _store_schema()
    plain, mappings = split_mappings(words)

    def task(raw: Any) -> None:
        config = with_values(resolve(raw), mappings)
        if HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN:
            config = replace(config, name=f"{config.name}-{HydraConfig.get().job.num}")
        function(config)

    sys.argv = [f"manta {job}", *plain, *HYDRA]
    hydra.main(version_base="1.3", config_path="pkg://conf", config_name=job)(task)()


def _first_choice(override: str) -> str:
    """Return a multirun override such as `optim.lr=1,2` with its first value only, to check it before any run starts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override() or parsed.is_hydra_override():
        return override
    return f"{parsed.key_or_group}={next(iter(parsed.sweep_string_iterator()))}"


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Return one sentence about an error of Hydra or OmegaConf."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{error}\n{cause}"
    known = {key: hint for key, _, hint in declared()}
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct|Key '([^']+)' not in", text):
        full = re.search(r"full_key: (\S+)", text)
        key = match.group(1) or (full.group(1) if full else match.group(2) or match.group(3))
        if key in current_keys():  # in a YAML file of conf/
            return f"{key} is now called {current_keys()[key]}: use that name"
        return f"{key} is not an option{did_you_mean(key, known)}"
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        return f"{match.group(1)}={match.group(2)} is not one of {', '.join(options)}{did_you_mean(match.group(2), options)}"
    if match := re.search(r"In '[^']+': Could not find '([^']+)'", text):
        return f"conf/{match.group(1)}.yaml does not exist"
    key = next(iter(re.findall(r"full_key: (\S+)", text)), "")
    if key in known and (match := re.search(r"[Vv]alue '(.*?)'", text)):
        return f"{key}={match.group(1)} is not {type_name(known[key])}"
    if not key:
        for override in overrides:
            if override.split("=")[0] in text and "=" in override:
                return f"{override} cannot be parsed: {text.strip().splitlines()[0]}"
    return f"{key + ': ' if key else ''}{text.strip().splitlines()[0]}"


def print_help(job: str) -> None:
    """Print what a job does, its config groups and every option with its default."""
    import importlib

    from rich.console import Console
    from rich.table import Table

    console = Console()
    module = importlib.import_module(f"jobs.{job}")
    console.print(f"[bold]manta {job}[/] [group=NAME] [key=value] [--cfg job] [-m] [--debug]\n\n{module.__doc__}")
    console.print("Groups (group=NAME selects a file of conf/):")
    for group, names in config_groups():
        console.print(f"  {group}: {', '.join(names)}", highlight=False)
    defaults = compose(job, [])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", show_header=False)
    for key, f, _hint in declared():
        table.add_row(f"{key}={'' if get(defaults, key) is None else get(defaults, key)}", f.metadata["help"])
    console.print("\nOptions, with this job's defaults:")
    console.print(table)
    console.print(f"\n-m runs every combination of comma-separated values: manta {job} -m optim.lr=1e-3,1e-4")
