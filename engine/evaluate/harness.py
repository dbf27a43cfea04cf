"""Run EleutherAI's lm-evaluation-harness on a bundle, in this process or through the endpoint that serves it."""

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

CONCURRENT_REQUESTS = 8  # to an endpoint, which batches them


def run_harness(bundle: Bundle, options: EvaluateConfig, seed: int) -> dict[str, dict[str, float]]:
    """Run the tasks of options.tasks, names or YAML files; return {"task metric": {"value", "low", "high"}}.

    The interval is 1.96 of the harness's standard errors; for a metric without one, low and high are its value. Raises
    UserError if the package is not installed, a task is unknown, or the model is not a causal language model.
    """
    if not is_installed():
        raise UserError(
            "evaluate.suite=lm_eval needs a package that is not installed: pip install 'manta-train[lm-eval]'"
        )
    objective = bundle.objective()
    if not objective.is_causal:
        raise UserError(f"lm_eval needs a causal language model, and {bundle.folder} is for {objective.options.name}")
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in options.tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"evaluate.tasks: {file} does not exist")
    folders = sorted({str(file.parent.absolute()) for file in files})
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(options.tasks))
    names = [task_name(Path(task)) if Path(task) in files else task for task in options.tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"evaluate.tasks: lm_eval has no task {name}{did_you_mean(name, manager.all_tasks)}")
    with quiet_harness():
        results = lm_eval.simple_evaluate(
            model=endpoint_model(bundle, options) if options.endpoint else local_model(bundle, options), tasks=names,
            task_manager=manager, limit=options.max_examples, bootstrap_iters=options.resamples, log_samples=False,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    assert results is not None
    return parse_results(results["results"], names)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness from querying git and pip, which takes seconds, and its progress bars out of logs."""
    from lm_eval import evaluator

    no_queries: dict[str, Any] = {"get_git_commit_hash": lambda: None, "add_env_info": lambda results: None}
    no_bars = contextlib.nullcontext() if console.is_terminal else contextlib.redirect_stderr(io.StringIO())
    with mock.patch.multiple(evaluator, create=True, **no_queries), no_bars:
        yield


def local_model(bundle: Bundle, options: EvaluateConfig) -> Any:
    """Return the harness's adapter for the bundle's model, loaded in this process."""
    from lm_eval.models.huggingface import HFLM

    objective, device = bundle.objective(), "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(
        pretrained=bundle.model().to(device), tokenizer=objective.tokenizer, batch_size=options.batch, device=device,
        max_length=objective.sequence_length,
    )  # fmt: skip


def endpoint_model(bundle: Bundle, options: EvaluateConfig) -> Any:
    """Return the harness's adapter for the endpoint. Raises UserError if it does not serve the bundle."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    assert options.endpoint
    url = options.endpoint.rstrip("/")
    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=served_name(url, bundle), tokenizer=str(bundle.folder),
        tokenizer_backend="huggingface", num_concurrent=CONCURRENT_REQUESTS, max_length=bundle.objective().sequence_length,
    )  # fmt: skip


def served_name(url: str, bundle: Bundle) -> str:
    """Return the name under which an endpoint serves the bundle of this hash. Raises UserError if it does not."""
    import httpx

    key = os.environ.get("OPENAI_API_KEY")  # the variable that the harness reads
    try:
        response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30)
        response.raise_for_status()
        models = response.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        hint = " (set its API key in OPENAI_API_KEY)" if "401" in str(error) else ""
        raise UserError(
            f"the request to evaluate.endpoint={url} failed{hint} ({str(error).splitlines()[0]})"
        ) from error
    for model in models:
        if model.get("hash") == bundle.hash:
            return str(model["id"])
    served = ", ".join(f"{model['id']} {str(model.get('hash'))[:12]}" for model in models)
    raise UserError(f"evaluate.endpoint={url} does not serve {bundle.folder} ({bundle.hash[:12]}); it serves {served}")


def is_installed() -> bool:
    """Tell whether lm-eval is installed, with what it needs for transformers models."""
    return all(find_spec(package) for package in ("lm_eval", "accelerate"))


def task_name(file: Path) -> str:
    """Return the task name in a YAML file. Raises UserError if there is none."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Ignores the harness's own tags, such as !function."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    tree = yaml.load(file.read_text("utf-8"), Loader)
    name = tree.get("task") if isinstance(tree, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{file} does not name its task: it needs a line task: NAME")
    return name


def parse_results(results: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Convert the harness's results to values with intervals."""
    metrics = {}
    for name in names:
        for key, value in results[name].items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, (int, float)) or not filter_name or metric.endswith("_stderr"):
                continue
            error = results[name].get(f"{metric}_stderr,{filter_name}")
            half = 1.96 * error if isinstance(error, (int, float)) else 0.0
            label = f"{name} {metric}" if filter_name == "none" else f"{name} {metric} ({filter_name})"
            metrics[label] = {"value": float(value), "low": float(value - half), "high": float(value + half)}
    return metrics
