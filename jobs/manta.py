"""The console script: `manta JOB ...` starts a job, the rest looks after runs and clusters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cluster.environment import quiet_environment
from cluster.errors import ClusterError
from engine.errors import UserError, nearest

# word -> (module with main(argv) -> exit code, what it does)
COMMANDS = {
    "prepare": ("jobs.prepare", "raw text -> token shards, tokenizer, manifest"),
    "pretrain": ("jobs.pretrain", "train a model from fresh weights"),
    "finetune": ("jobs.finetune", "go on from a bundle with another objective or data"),
    "sweep": ("jobs.sweep", "search hyperparameters; the best trial becomes a bundle"),
    "evaluate": ("jobs.evaluate", "measure a bundle on held-out data, or compare two"),
    "compare": ("jobs.compare", "A B: is A better than B on the same examples? the exit code says"),
    "promote": ("jobs.promote", "make a bundle the champion, if it is whole and better"),
    "rollback": ("jobs.rollback", "make the champion before the present one the champion again"),
    "lineage": ("jobs.lineage", "where a bundle came from and where it went"),
    "improve": ("jobs.improve", "measure drift in what an endpoint recorded, and learn from it"),
    "deploy": ("jobs.deploy", "put a bundle behind an HTTP endpoint, or change what it serves"),
    "key": ("jobs.key", "new, list, revoke: who may ask an endpoint, and how much"),
    "convert": ("jobs.convert", "a checkpoint to Hugging Face or to DeepSpeed's universal format, and back"),
    "plan": ("jobs.plan", "memory, step time and size of a job before it takes anything"),
    "demo": ("jobs.demo", "the whole life of a model, with a report"),
    "runs": ("jobs.runs", "list runs: state, loss, age, lineage"),
    "cluster": ("cluster.local", "up | down | status of a cluster on this machine"),
    "submit": ("cluster.submit", "send a job to a cluster and follow it"),
    "jobs": ("cluster.jobs", "list, follow and stop submitted jobs"),
    "doctor": ("cluster.doctor", "check this machine, and say what to do"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("manta COMMAND ...\n")
        for name, (_, about) in COMMANDS.items():
            print(f"  {name:<9} {about}")
        print("\nmanta COMMAND --help says more. Options are key=value: manta pretrain train.max_steps=200 name=mine")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {words[0]} is no command of manta{nearest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    quiet_environment()
    try:
        code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    except (UserError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
