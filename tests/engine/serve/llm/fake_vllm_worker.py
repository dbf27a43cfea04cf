"""A vLLM worker without vLLM: it counts up from the prompt's last token. Run in place of `vllm_worker`, with a socket's number."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

FOLDER = __file__.split("/tests/")[0]
SPEC = importlib.util.spec_from_file_location("vllm_worker", f"{FOLDER}/engine/serve/llm/vllm_worker.py")
assert SPEC
assert SPEC.loader
vllm_worker: Any = importlib.util.module_from_spec(SPEC)
sys.modules["vllm_worker"] = vllm_worker
SPEC.loader.exec_module(vllm_worker)


class CountingWorker:
    """Generates one token a step for each sequence."""

    def __init__(self, setup: Any) -> None:
        assert setup.arguments["max_num_seqs"] == 2
        self.sequences: dict[str, tuple[Any, int]] = {}  # id -> the request, and the tokens generated so far
        self.num_steps = self.num_rows = 0

    def info(self) -> Any:
        return vllm_worker.EngineInfo(cache_tokens=256, max_positions=129, device="cpu", vllm="none")

    def add(self, request: Any) -> list[Any]:
        if request.prompt == [13]:
            return [vllm_worker.SequenceOutput(request.id, [], "error", [], [], 0, "ValueError: 13")]
        self.sequences[request.id] = (request, 0)
        return []

    def abort(self, ids: list[str]) -> None:
        for sequence_id in ids:
            self.sequences.pop(sequence_id, None)

    def step(self) -> list[Any]:
        self.num_steps += 1
        outputs = []
        for sequence_id, (request, count) in list(self.sequences.items()):
            self.num_rows += 1
            token = request.prompt[-1] + count + 1
            reason = "length" if count + 1 == request.max_tokens else None
            logprobs = [[token, -0.5, [[token, -0.5]]]] if request.num_logprobs else []
            outputs.append(vllm_worker.SequenceOutput(sequence_id, [token], reason, logprobs, [], 0))
            self.sequences[sequence_id] = (request, count + 1)
            if reason:
                del self.sequences[sequence_id]
        return outputs


if __name__ == "__main__":
    vllm_worker.Worker = CountingWorker
    vllm_worker.main(int(sys.argv[1]))
