"""EleutherAI's lm-eval on a bundle, here or through the endpoint that serves it: its own tasks by name, or YAML files."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.bundles.bundle import Bundle
from engine.config import EvaluateConfig
from engine.errors import UserError, did_you_mean
from engine.progress import console

CONCURRENT = 8  # requests under way at an endpoint, which puts them into one batch itself


def run_harness(bundle: Bundle, options: EvaluateConfig, seed: int) -> dict[str, dict[str, float]]:
    """Return {"task metric": {"value", "low", "high"}}; the interval is 1.96 of the harness's own standard errors.

    A metric without a standard error has no interval: low and high are its value. Raises UserError where the package is
    not installed, a task isn't there, or the model writes no text.
    """
    if not is_installed():
        raise UserError("evaluate.suite=lm_eval needs a package that isn't here: pip install 'manta-train[lm-eval]'")
    objective = bundle.objective()
    if not objective.is_causal:
        raise UserError(f"lm_eval asks language models, and {bundle.folder} is for {objective.options.name}")
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in options.tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"evaluate.tasks: {file} is not there")
    folders = sorted({str(file.parent.absolute()) for file in files})
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(options.tasks))
    names = [task_name(Path(task)) if Path(task) in files else task for task in options.tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"evaluate.tasks: lm_eval has no task {name}{did_you_mean(name, manager.all_tasks)}")
    with quiet_harness():
        found = lm_eval.simple_evaluate(
            model=endpoint_model(bundle, options) if options.endpoint else local_model(bundle, options), tasks=names,
            task_manager=manager, limit=options.max_examples, bootstrap_iters=options.resamples, log_samples=False,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    assert found is not None
    return parse_results(found["results"], names)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness from asking git and pip about this place, which takes seconds, and its progress bars from a log."""
    from lm_eval import evaluator

    unasked: dict[str, Any] = {"get_git_commit_hash": lambda: None, "add_env_info": lambda results: None}
    elsewhere = contextlib.nullcontext() if console.is_terminal else contextlib.redirect_stderr(io.StringIO())
    with mock.patch.multiple(evaluator, create=True, **unasked), elsewhere:
        yield


def local_model(bundle: Bundle, options: EvaluateConfig) -> Any:
    """Return the bundle's model in this process, as the harness asks it."""
    from lm_eval.models.huggingface import HFLM

    objective, device = bundle.objective(), "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(
        pretrained=bundle.model().to(device), tokenizer=objective.tokenizer, batch_size=options.batch, device=device,
        max_length=objective.sequence_length,
    )  # fmt: skip


def endpoint_model(bundle: Bundle, options: EvaluateConfig) -> Any:
    """Return the endpoint that serves the bundle, as the harness asks it. Raises UserError where it does not serve it."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    assert options.endpoint
    url = options.endpoint.rstrip("/")
    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=served_name(url, bundle), tokenizer=str(bundle.folder),
        tokenizer_backend="huggingface", num_concurrent=CONCURRENT, max_length=bundle.objective().sequence_length,
    )  # fmt: skip


def served_name(url: str, bundle: Bundle) -> str:
    """Return the name under which an endpoint serves a bundle: that which has its hash. Raises UserError where none has."""
    import httpx

    key = os.environ.get("OPENAI_API_KEY")  # where the harness looks for it too
    try:
        answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30)
        answer.raise_for_status()
        models = answer.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        needs = ", which needs a key in OPENAI_API_KEY" if "401" in str(error) else ""
        raise UserError(f"evaluate.endpoint={url} cannot be asked{needs} ({str(error).splitlines()[0]})") from error
    for model in models:
        if model.get("hash") == bundle.hash:
            return str(model["id"])
    known = ", ".join(f"{model['id']} {str(model.get('hash'))[:12]}" for model in models)
    raise UserError(f"evaluate.endpoint={url} does not serve {bundle.folder} ({bundle.hash[:12]}); it serves {known}")


def is_installed() -> bool:
    """Tell whether lm-eval is here, with what it needs for transformers' models."""
    return all(find_spec(package) for package in ("lm_eval", "accelerate"))


def task_name(file: Path) -> str:
    """Return the name in a task's YAML. Raises UserError where it has none."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Passes over the harness's own tags, such as !function."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    tree = yaml.load(file.read_text("utf-8"), Loader)
    name = tree.get("task") if isinstance(tree, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{file} names no task: it needs a line task: NAME")
    return name


def parse_results(results: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Turn the harness's results into values with intervals."""
    found = {}
    for name in names:
        for key, value in results[name].items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or not filtered or metric.endswith("_stderr"):
                continue
            error = results[name].get(f"{metric}_stderr,{filtered}")
            half = 1.96 * error if isinstance(error, (int, float)) else 0.0
            label = f"{name} {metric}" if filtered == "none" else f"{name} {metric} ({filtered})"
            found[label] = {"value": float(value), "low": float(value - half), "high": float(value + half)}
    return found
