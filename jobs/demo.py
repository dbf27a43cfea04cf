"""The whole pipeline: prepare, pretrain, sweep, evaluate, deploy, and a report."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import Config, replace, with_values
from jobs.entry import compose, ray_session, run_job, training_session


def demo(config: Config) -> None:
    """Run every stage, each as the command of its name would, and write a report."""
    from rich.table import Table

    from engine.bundles.alias import Alias
    from engine.bundles.bundle import Bundle
    from engine.bundles.registry import Registry
    from engine.evaluate.bootstrap import INCONCLUSIVE, compare_paired
    from engine.evaluate.environment import machine_info, package_versions
    from engine.evaluate.evaluate import evaluate_bundle
    from engine.evaluate.metrics import classification_details
    from engine.evaluate.report import write_report
    from engine.progress import console
    from engine.sweep.launch import sweep, trial_folder
    from engine.train.launch import make_job, train
    from engine.train.run_folder import RunFolder

    stages = Stages(console)
    shared = [f"runs_dir={Path(config.runs_dir).absolute()}", f"seed={config.seed}"]
    pretraining = compose("pretrain", [*config.demo.pretrain, *shared, f"name={config.name}-pretrain"])
    with stages("prepare"):
        make_job(pretraining)
    with stages("pretrain"), training_session(pretraining):
        pretrained = train(pretraining)

    sweeping = compose("sweep", [*config.demo.sweep, *shared, f"name={config.name}", f"bundle={pretrained.run.bundle}"])
    # The best trial's training again, from random weights; no layer is frozen, since random weights must be trained.
    with ray_session(sweeping):
        with stages("sweep"):
            swept = sweep(sweeping)
        from_scratch = with_values(
            sweeping,
            {**swept.best.params, "job": "finetune", "name": f"{config.name}-scratch", "bundle": None,
             "objective.frozen_layers": 0, "data.tokenizer": str(pretrained.run.bundle), "train.workers": 1,
             "train.checkpoint_every": sweeping.train.max_steps},
        )  # fmt: skip
        with stages("scratch"):
            scratch = train(from_scratch)

    finetuned_bundle = RunFolder(sweeping.run_dir).bundle
    with stages("evaluate"):
        evaluation = compose("evaluate", [*config.demo.evaluate, *shared])
        on_functions = with_values(
            sweeping, {f"evaluate.{k}": v for k, v in vars(evaluation.evaluate).items() if k[0] != "_"}
        )
        finetuned_result = evaluate_bundle(finetuned_bundle, on_functions)
        scratch_result = evaluate_bundle(scratch.run.bundle, on_functions)
        pretrained_result = evaluate_bundle(
            pretrained.run.bundle, replace(pretraining, evaluate__resamples=evaluation.evaluate.resamples)
        )
        gain = compare_paired(
            Bundle.open(finetuned_bundle).objective(), finetuned_result.scores, scratch_result.scores,
            confidence=evaluation.evaluate.confidence, resamples=evaluation.evaluate.resamples, seed=config.seed,
        )  # fmt: skip

    from engine.serve.deploy import deploy

    bundles = {config.name: finetuned_bundle, f"{config.name}-pretrain": pretrained.run.bundle}
    registry = Registry(config.tracking_uri, config.registry_dir)
    champion = Alias(registry, config.name, config.tracking.alias)
    with ray_session(config):
        with stages("deploy"):
            for name, folder in bundles.items():
                version = registry.register(Bundle.open(folder), name)
                if name == config.name and (current := champion.current()) != version.number:
                    champion.move("promote", current, version.number, "the best trial of the demo")
            endpoint = deploy(config, bundles)
            requests = send_requests(endpoint.url, config.name)
        summary: dict[str, Any] = {
            "name": config.name,
            "seconds": stages.seconds | {"total": sum(stages.seconds.values())},
            "accuracy": {
                "finetuned": finetuned_result.metrics["accuracy"].to_dict(),
                "scratch": scratch_result.metrics["accuracy"].to_dict(),
                "majority": finetuned_result.majority.to_dict() if finetuned_result.majority else None,
            },
            "details": classification_details(finetuned_result.objective, finetuned_result.scores),
            "perplexity": pretrained_result.metrics["perplexity"].to_dict(),
            "pretraining_paid": {
                "verdict": gain.verdict, "difference": gain.difference, "low": gain.low, "high": gain.high,
            },
            "trials": [
                {"name": t.name, "config": t.params, "steps": t.steps, "accuracy": t.value,
                 "stopped_early": t.state == "stopped early", "state": t.state, "curve": t.curve,
                 "folder": str(trial_folder(RunFolder(sweeping.run_dir), t))}
                for t in swept.trials
            ],
            "endpoint": {"url": endpoint.url, "requests": requests},
            "hashes": {
                "data (text)": data_hash(pretrained.run.bundle), "data (functions)": data_hash(finetuned_bundle),
                **{f"bundle {name}": Bundle.open(folder).hash for name, folder in bundles.items()},
            },
            "versions": package_versions(),
            "machine": machine_info(),
        }  # fmt: skip
        home = sweeping.run_dir
        (home / "summary.json").write_text(json.dumps(summary, indent=1))
        page = write_report(home, summary | {"curves": {"pretrain": list(pretrained.run.metrics())}})

        table = Table("stage", "seconds", title=f"{config.name}: from raw text to an endpoint", title_justify="left")
        for stage, seconds in summary["seconds"].items():
            table.add_row(stage, f"{seconds:.1f}")
        console.print(table)
        for name, value in summary["accuracy"].items():
            console.print(
                f"accuracy {name:<10} {value['value']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]", markup=False
            )
        result = "no significant difference from" if gain.verdict == INCONCLUSIVE else f"{gain.verdict} than"
        console.print(f"pre-training: {result} training from scratch")
        console.print(f"report   {page}\nsummary  {home / 'summary.json'}\n")
        for request in requests:
            console.print(request["curl"])
        if config.demo.keep:
            console.print(f"\nthe endpoint runs at {endpoint.url} until Ctrl-C")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        else:
            console.print("\nthe endpoint was stopped: `make demo KEEP=1` keeps it running")
        endpoint.stop()


class Stages:
    """Prints the name of each stage and records its time."""

    def __init__(self, console: Any) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Print the stage's name, and record its seconds."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {stage}", align="left")
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def data_hash(bundle: Path) -> str:
    """Return the hash of the data that a bundle was trained on."""
    from engine.bundles.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    assert manifest is not None
    assert manifest.data is not None
    return manifest.data["hash"]


def send_requests(url: str, name: str) -> list[dict[str, Any]]:
    """Send three requests to the endpoint: a classification, a completion, a streamed completion."""
    import httpx

    code = "def get(self, url, timeout=None):\n    request = self.open(url)\n    return request.read()\n"
    prompt = {"model": f"{name}-pretrain", "prompt": "import os\n\ndef ", "max_tokens": 24}
    answers = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for what, path, body in (
            ("classification", "/v1/classify", {"model": name, "input": code}),
            ("completion", "/v1/completions", prompt),
            ("streamed completion", "/v1/completions", prompt | {"stream": True}),
        ):
            started = time.perf_counter()
            response = client.post(path, json=body)
            response.raise_for_status()
            seconds = time.perf_counter() - started
            if body.get("stream"):
                events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
                answer = "".join(
                    json.loads(event)["choices"][0]["text"] for event in events if '"choices": []' not in event
                )
            elif what == "classification":
                answer = response.json()["data"][0]["label"]
            else:
                answer = response.json()["choices"][0]["text"]
            quoted = json.dumps(body).replace("'", "'\\''")
            answers.append({
                "what": what, "request": body, "answer": answer, "milliseconds": 1000 * seconds,
                "curl": f"curl {url}{path} -H 'Content-Type: application/json' -d '{quoted}'",
            })  # fmt: skip
    return answers


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job."""
    return run_job("demo", demo, argv)


if __name__ == "__main__":
    sys.exit(main())
