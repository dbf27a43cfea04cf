"""The commands of the README and its kin run, in their order, as a newcomer would type them; small, so that they end soon."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port

pytestmark = pytest.mark.usefixtures("only_local_cluster")

ROOT = Path(__file__).parents[1]
SMALL = ["train.global_batch=8", "train.precision=fp32", "data.sequence_length=64", "optim.lr=2e-3"]
SMALLER = {  # what is added to a command so that it ends in seconds
    "pretrain": [*SMALL, "model=llama_tiny", "data.max_documents=60", "data.vocab_size=512", "train.max_steps=4"],
    "finetune": [*SMALL, "train.max_steps=4"],
    "sweep": [
        *SMALL,
        "data.max_documents=400",
        "train.max_steps=4",
        "sweep.trials=2",
        "sweep.space={optim.lr:{uniform:[1e-3,2e-3]}}",
    ],
    "evaluate": ["data.max_documents=400", "data.sequence_length=64", "evaluate.resamples=100"],
    "prepare": ["data.vocab_size=400"],
}


PAPERS = ("README.md", "jobs/README.md", "conf/README.md", "cluster/README.md")


def commands() -> list[list[str]]:
    text = "\n".join((ROOT / paper).read_text() for paper in PAPERS)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("manta ")]
    return [shlex.split(line, comments=True)[1:] for line in dict.fromkeys(lines)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "texts").mkdir()
    rows = [
        {
            "text": f"{'good and kind' if i % 2 else 'bad and cold'} words of number {i}",
            "label": ("good" if i % 2 else "bad"),
        }
        for i in range(300)
    ]
    (folder / "texts" / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")
    }  # of this session's own Ray
    return {**kept, "MANTA_HOME": str(folder / "home"), "COLUMNS": "120"}


def run(folder: Path, words: list[str]) -> str:
    job = words[1] if words[0] == "submit" else words[0]
    added = SMALLER.get(job, []) if not {"--help", "--cfg"} & set(words) else []
    done = subprocess.run(
        [sys.executable, "-m", "jobs.manta", *words, *added],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"manta {shlex.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_jobs_run_in_the_readmes_order(folder: Path) -> None:
    served = []
    for words in commands():
        if words[0] in ("cluster", "submit", "jobs"):
            continue
        if words[0] == "deploy":
            served.append(words)
            continue
        run(folder, words)
    runs = folder / "runs"
    for name in ("mine", "tuned", "search"):
        assert (runs / name / "bundle" / "manta.json").exists()
    lines = [json.loads(line) for line in (runs / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"step", "loss", "tokens", "lr", "grad_norm", "tokens_per_s", "mfu", "samples_hash"} <= set(lines[0])
    assert all(word in run(folder, ["runs"]) for word in ("mine", "tuned", "search", "finished"))
    assert len(served) == 1
    deploy_and_ask(folder, served[0])


def deploy_and_ask(folder: Path, words: list[str]) -> None:
    port = free_port()
    words = [word if not word.startswith("serve.port=") else f"serve.port={port}" for word in words]
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.manta", *words],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 240
            while True:
                assert process.poll() is None, process.stdout and process.stdout.read()
                assert time.monotonic() < deadline
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/classify", json={"model": "tuned", "input": "good words"}, timeout=30
            )
            assert set(answer.json()["data"][0]["scores"]) == {"good", "bad"}
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/completions",
                json={"model": "mine", "prompt": "def ", "max_tokens": 3},
                timeout=30,
            )
            assert answer.json()["usage"]["completion_tokens"] <= 3
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_a_cluster_comes_up_runs_a_submitted_job_and_goes_down(folder: Path) -> None:
    words = [command for command in commands() if command[0] in ("cluster", "submit", "jobs")]
    assert words[0][:2] == ["cluster", "up"]
    assert words[-1] == ["cluster", "down"]
    try:
        for command in words[:-1]:
            said = run(folder, command)
            if command[0] == "submit":
                assert "4/4" in said
        assert (folder / "runs" / "submitted" / "bundle" / "manta.json").exists()
    finally:
        run(folder, words[-1])
