"""The console script: `manta COMMAND ...` runs a job, or manages runs and clusters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cluster.environment import set_default_environment
from cluster.errors import ClusterError
from engine.errors import UserError, did_you_mean

# command -> (module with main(argv) -> exit code, description)
COMMANDS = {
    "prepare": ("jobs.prepare", "turn raw data into token shards, a tokenizer and a manifest"),
    "pretrain": ("jobs.pretrain", "train a model from fresh weights"),
    "finetune": ("jobs.finetune", "train a bundle further, with another objective or other data"),
    "sweep": ("jobs.sweep", "search hyperparameters; the best trial becomes a bundle"),
    "evaluate": ("jobs.evaluate", "evaluate a bundle on held-out data, or compare two"),
    "compare": ("jobs.compare", "compare bundles A and B on the same examples; the exit code is the verdict"),
    "promote": ("jobs.promote", "make a bundle the champion, if it is intact and better"),
    "rollback": ("jobs.rollback", "make the previous champion the champion again"),
    "lineage": ("jobs.lineage", "show the data, runs, evaluations and deployments of a bundle"),
    "improve": ("jobs.improve", "measure drift in an endpoint's recorded requests, and train on their feedback"),
    "deploy": ("jobs.deploy", "serve a bundle over HTTP, or update a running endpoint"),
    "key": ("jobs.key", "new, list, revoke: API keys of an endpoint and their rate limits"),
    "convert": ("jobs.convert", "convert a checkpoint to Hugging Face or to DeepSpeed's universal format, and back"),
    "plan": ("jobs.plan", "estimate memory, step time and checkpoint size of a training job"),
    "demo": ("jobs.demo", "run the whole life of a model, with a report"),
    "runs": ("jobs.runs", "list runs: state, loss, age, lineage"),
    "cluster": ("cluster.local", "up | down | status of a cluster on this machine"),
    "submit": ("cluster.submit", "submit a job to a cluster and follow its log"),
    "jobs": ("cluster.jobs", "list, follow and stop submitted jobs"),
    "doctor": ("cluster.doctor", "check this machine, and suggest fixes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("manta COMMAND ...\n")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:<9} {description}")
        print(
            "\nmanta COMMAND --help lists its options, which are key=value: manta pretrain train.max_steps=200 name=mine"
        )
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {words[0]} is not a command of manta{did_you_mean(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    set_default_environment()
    try:
        code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    except (UserError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
