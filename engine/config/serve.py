"""The options of an endpoint, of its API keys, and of learning from its records."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Optional

from engine.config.address import check_http_address
from engine.config.option import DEPLOYMENT, INGRESS, REPLICA, Frozen, flag_values, option
from engine.errors import UserError

# Engine arguments of vLLM for which Manta has an option.
VLLM_ARGUMENTS = {
    "model": "bundle", "tokenizer": "bundle", "dtype": "serve.precision", "max_num_seqs": "serve.max_num_seqs",
    "max_num_batched_tokens": "serve.max_batched_tokens", "max_model_len": "serve.kv_cache_tokens",
    "num_gpu_blocks_override": "serve.kv_cache_tokens", "tensor_parallel_size": "serve.gpus_per_replica",
    "enable_lora": "serve.adapters", "max_loras": "serve.max_adapters", "max_cpu_loras": "serve.max_adapters",
    "lora_target_modules": "serve.adapters", "max_lora_rank": "serve.adapters",
}  # fmt: skip


@dataclass
class ServeConfig(Frozen):
    """The endpoint. Each option states what a change of it replaces: replicas, ingresses or neither."""

    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 opens the endpoint to the network, which needs API keys", affects=INGRESS
    )  # fmt: skip
    port: int = option(8000, "TCP port", least=1, most=65535, affects=INGRESS)
    names: Optional[str] = option(
        None, "model names that clients request, one for each of `bundle`: a+b; None: the bundles' own. A name that is served already gets a new version",
        affects=DEPLOYMENT,
    )  # fmt: skip

    haproxy: bool = option(
        False, "HAProxy listens and passes each request to the ingress with the fewest in flight; if that is lost before it "
        "answers, another one answers; needs pip install 'manta-train[haproxy]', or haproxy on the PATH", affects=INGRESS,
    )  # fmt: skip
    ingresses: int = option(
        1, "number of ingress processes, all on the head node; several need serve.haproxy. Rate limits of keys hold over all of "
        "them; serve.max_queue is for each one", least=1, most=64, affects=INGRESS,
    )  # fmt: skip

    # Replicas: how many, and where
    min_replicas: int = option(
        1, "minimum number of replicas of a bundle; 0: none while there are no requests (the first request waits for one)", least=0, affects=REPLICA
    )  # fmt: skip
    max_replicas: int = option(2, "maximum number of replicas of a bundle", least=1, affects=REPLICA)
    target_ongoing_requests: int = option(
        8, "requests in flight per replica that the autoscaler aims at", least=1, affects=REPLICA
    )
    target_tokens: int = option(
        2048, "queued and running tokens per replica that the autoscaler aims at; the larger of the two numbers of replicas applies",
        least=1, affects=REPLICA,
    )  # fmt: skip
    metrics_interval_s: float = option(
        1.0,
        "seconds between two measurements of the load; the autoscaler averages three",
        above=0,
        formerly="scale_look_s",
        affects=REPLICA,
    )
    upscale_delay_s: float = option(
        5.0,
        "seconds that a higher load must last before replicas are added",
        least=0,
        formerly="scale_up_s",
        affects=REPLICA,
    )
    downscale_delay_s: float = option(
        60.0,
        "seconds that a lower load must last before a replica is removed",
        least=0,
        formerly="scale_down_s",
        affects=REPLICA,
    )
    downscale_to_zero_delay_s: float = option(
        300.0,
        "min_replicas=0: seconds without requests before the last replica is removed",
        least=0,
        formerly="scale_to_zero_s",
        affects=REPLICA,
    )
    max_replicas_per_node: Optional[int] = option(
        None, "maximum number of replicas of a bundle on one node: 1 spreads them (Ray Serve's limit: 100)", least=1, most=100, affects=REPLICA
    )  # fmt: skip
    health_check_s: float = option(2.0, "seconds between two health checks of a replica", above=0, affects=REPLICA)
    drain_s: float = option(
        60.0, "seconds that a replica being removed may take to finish its requests", least=0, affects=REPLICA
    )
    tries: int = option(
        3, "replicas that a request is sent to, one after the other, if each is lost before its response has begun", least=1, affects=INGRESS
    )  # fmt: skip
    cpus_per_replica: float = option(0.5, "CPU cores of a replica", least=0, affects=REPLICA)
    gpus_per_replica: float = option(0.0, "GPUs of a replica", least=0, affects=REPLICA)
    precision: str = option(
        "auto", "precision of the served weights; auto: as in the bundle, but fp32 on a CPU without bf16 in hardware",
        choices=("auto", "fp32", "bf16"), affects=REPLICA,
    )  # fmt: skip
    quantize: str = option(
        "none", "int8: weights of the linear layers and of the token embedding as 8-bit integers with a scale for each output, half of "
        "bf16's memory; serve.precision is then the precision of the activations, and auto is bf16 where the hardware supports it. Golden "
        "log-probabilities may differ by 0.5 nats",
        choices=("none", "int8"), affects=REPLICA,
    )  # fmt: skip
    generator: str = option(
        "transformers", "engine for text generation; vllm: vLLM, in a Python environment of its own; it computes no embeddings",
        choices=("transformers", "vllm"), affects=REPLICA,
    )  # fmt: skip
    vllm_python: Optional[str] = option(
        None, "generator=vllm: path, on the replicas' machines, of the Python of an environment with vLLM; None: the Python that runs Manta",
        affects=REPLICA,
    )  # fmt: skip
    vllm_options: dict[str, Any] = option(
        {}, "generator=vllm: engine arguments of vLLM (https://docs.vllm.ai/en/stable/configuration/engine_args), NAME: VALUE, that "
        "have no option here: {gpu_memory_utilization: 0.5}", affects=REPLICA,
    )  # fmt: skip
    compile: bool = option(
        False,
        "torch.compile the model below its logits: a replica is ready a minute or two later, and generates faster; "
        "Llama-like models in fp32 or bf16 on a CPU have a compiled decoder of their own and ignore this", affects=REPLICA,
    )  # fmt: skip
    max_num_seqs: int = option(
        16, "maximum number of sequences, or of inputs of other tasks, in a forward pass", least=1, formerly="max_batch", affects=REPLICA
    )  # fmt: skip
    max_batched_tokens: Optional[int] = option(
        None, "approximate maximum of tokens in a forward pass of text generation: long prompts are prefilled in chunks, between which other sequences "
        "decode; None: 256, or vLLM's default", least=1, formerly="step_tokens", affects=REPLICA,
    )  # fmt: skip
    kv_cache_tokens: Optional[int] = option(
        None, "capacity of a replica's KV cache, in tokens; None: max_num_seqs sequences of full length, or a quarter of the free memory "
        "(vLLM: most of a GPU's)", least=16, formerly="cache_tokens", affects=REPLICA,
    )  # fmt: skip
    num_speculative_tokens: int = option(
        0, "speculative decoding: draft tokens per step, proposed by n-gram lookup in the sequence itself and verified in one forward pass; "
        "the output stays the same", least=0, most=64, formerly="speculate", affects=REPLICA,
    )  # fmt: skip
    draft_model: Optional[str] = option(
        None, "speculative decoding: smaller bundle with the same tokenizer that proposes the draft tokens: a run's or registered name, or a "
        "folder. Its KV cache has the same capacity as the bundle's", formerly="draft", affects=REPLICA,
    )  # fmt: skip
    adapters: dict[str, Any] = option(
        {}, "LoRA adapters of the bundle, NAME: FOLDER in peft's format; clients request the model BUNDLE:NAME, and requests for different "
        "adapters share a batch", affects=REPLICA,
    )  # fmt: skip
    max_adapters: int = option(
        16, "maximum number of adapters in a replica's memory: an adapter is loaded when it is requested, and the least recently used one is evicted",
        least=1, affects=REPLICA,
    )  # fmt: skip
    queue_timeout_s: float = option(
        60.0, "seconds that a completion may wait for a slot before it is refused (503)", above=0, affects=REPLICA
    )
    batch_wait_s: float = option(
        0.0, "seconds that an input of the other tasks waits for more to join its batch, if no batch is running; inputs that "
        "arrive during a batch form the next one in any case", least=0, affects=REPLICA,
    )  # fmt: skip
    max_queue: int = option(
        256, "maximum number of waiting requests; further ones are refused (429)", least=1, affects=REPLICA
    )
    max_new_tokens: int = option(
        256, "maximum number of tokens that a completion may ask for", least=1, affects=REPLICA
    )
    max_body_bytes: int = option(2**20, "maximum size of a request, in bytes", least=1024, affects=INGRESS)
    max_audio_bytes: int = option(
        25 * 2**20, "maximum size of a request with an audio file, in bytes (OpenAI's: 25 MB)", least=1024, affects=INGRESS
    )  # fmt: skip
    body_timeout_s: float = option(
        30.0, "seconds in which a request's body must arrive (408)", above=0, affects=INGRESS
    )
    keys_file: Optional[str] = option(
        None, "file of hashed API keys; None: <runs_dir>/keys.json, which `manta key` writes. If it holds keys, or the "
        "environment variable MANTA_KEYS does, every request needs one", affects=INGRESS,
    )  # fmt: skip
    open: bool = option(
        False, "listen beyond the loopback interface without API keys: anyone who reaches the address may send requests", affects=INGRESS
    )  # fmt: skip
    origins: list[str] = option(
        [], "origins whose pages may send requests from a browser (CORS): [https://example.org], or ['*'] for all", affects=INGRESS
    )  # fmt: skip
    log_prompts: bool = option(
        False, "log prompts, with e-mail addresses and secrets masked, in <runs_dir>/<name>/logs/access.jsonl", affects=INGRESS
    )  # fmt: skip
    tracing: Optional[str] = option(
        None, "OpenTelemetry collector that receives a trace of each request, by OTLP over HTTP: http://localhost:4318; headers, "
        "sampling etc. by the environment variables OTEL_*; needs pip install 'manta-train[tracing]'", affects=REPLICA,
    )  # fmt: skip
    records_dir: Optional[str] = option(
        None, "folder for feedback, and for requests sent with store=true; None: <runs_dir>/<name>/feedback", affects=INGRESS
    )  # fmt: skip
    ready_timeout_s: float = option(
        600.0, "seconds in which the replicas must load and verify the bundle", least=1, affects=DEPLOYMENT
    )

    # A new version of a name that is served already
    strategy: str = option(
        "replace", "how a new version takes over: replace: all requests, once it is ready; canary: a growing share, or none if a test finds it worse; "
        "shadow: copies of requests, to compare it",
        choices=("replace", "canary", "shadow"), affects=DEPLOYMENT,
    )  # fmt: skip
    canary_stages: list[float] = option(
        [0.05, 0.25, 0.5, 1.0], "strategy=canary: share of the traffic at each stage; the last is 1", affects=DEPLOYMENT
    )  # fmt: skip
    canary_requests: int = option(
        200, "strategy=canary: minimum number of requests to the new version at each stage", least=1, affects=DEPLOYMENT
    )
    canary_stage_s: float = option(
        60.0, "strategy=canary: minimum length of each stage, in seconds", least=0, affects=DEPLOYMENT
    )
    canary_false_alarm: float = option(
        0.01, "strategy=canary: maximum probability of withdrawing a version as good as the old one (engine/serve/routing/sequential_test.py)",
        above=0, most=0.5, affects=DEPLOYMENT,
    )  # fmt: skip
    canary_error_margin: float = option(
        0.01, "strategy=canary: tolerated increase of the error rate over the old version's", least=0, most=0.5, affects=DEPLOYMENT
    )  # fmt: skip
    canary_latency_margin: float = option(
        0.2, "strategy=canary: tolerated relative increase of the latency", least=0, affects=DEPLOYMENT
    )
    shadow_share: float = option(
        1.0, "strategy=shadow: share of the requests that are copied", above=0, most=1, affects=DEPLOYMENT
    )
    shadow_requests: int = option(
        200, "strategy=shadow: number of copies after which the comparison is reported", least=1, affects=DEPLOYMENT
    )
    keep_warm_s: float = option(
        600.0, "seconds that the replicas of the previous version are kept, for an instant rollback", least=5, affects=DEPLOYMENT
    )  # fmt: skip

    export: Optional[str] = option(
        None, "folder to write the endpoint to, as a Serve config and as a KubeRay RayService; nothing is started", affects=DEPLOYMENT
    )  # fmt: skip
    image: str = option(
        "ghcr.io/your-organisation/manta:0.1.0", "export: the container image (cluster/launcher/Containerfile)", affects=DEPLOYMENT
    )  # fmt: skip
    detach: bool = option(
        False, "leave the endpoint running and return (needs a cluster started with `manta cluster up`)", affects=DEPLOYMENT
    )  # fmt: skip

    def check(self) -> None:
        """Check the replicas, the engine, the adapters and the stages of a canary."""
        self._check_engine()
        if self.max_replicas < self.min_replicas:
            raise UserError(
                f"serve.max_replicas {self.max_replicas} is less than serve.min_replicas {self.min_replicas}: "
                f"use serve.max_replicas={self.min_replicas} or more"
            )
        if self.ingresses > 1 and not self.haproxy:
            raise UserError(f"serve.ingresses {self.ingresses} need HAProxy in front of them: add serve.haproxy=true")
        if self.haproxy and self.export:
            raise UserError(
                "serve.haproxy is for an endpoint that `manta deploy` starts; an exported one has Serve's proxy on each node, or "
                "your own load balancer: leave out serve.haproxy and serve.ingresses"
            )
        check_http_address("serve.tracing", self.tracing, "http://localhost:4318")
        stages = self.canary_stages
        if not stages or stages != sorted(set(stages)) or stages[0] <= 0 or stages[-1] != 1:
            raise UserError(
                f"serve.canary_stages {stages} must be growing shares of the traffic that end with all of it: "
                "use serve.canary_stages=[0.05,0.25,0.5,1.0], for example"
            )
        if self.draft_model and not self.num_speculative_tokens:
            raise UserError(
                "serve.draft_model proposes serve.num_speculative_tokens tokens, and that is 0: use serve.num_speculative_tokens=4, for example"
            )
        if self.compile and self.adapters:
            raise UserError(
                "serve.compile and serve.adapters cannot be combined, for the adapters of a batch change from step to step: use one of them"
            )
        for name, folder in self.adapters.items():
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", str(name)) or not isinstance(folder, str):
                raise UserError(
                    f"serve.adapters.{name}={folder} is not an adapter: write NAME: FOLDER, with a name of letters, digits, '.', '_', '-'"
                )

    def _check_engine(self) -> None:
        """Check that no option of one engine is set for the other."""
        if self.generator != "vllm":
            for key in ("vllm_python", "vllm_options"):
                if getattr(self, key):
                    raise UserError(f"serve.{key} is for serve.generator=vllm: add that, or leave it out")
            return
        for key, neutral in (("num_speculative_tokens", 0), ("quantize", "none"), ("compile", False)):
            if (value := getattr(self, key)) != neutral:
                raise UserError(
                    f"serve.{key}={value} is for serve.generator=transformers: leave it out, or use serve.vllm_options"
                )
        for name in self.vllm_options:
            if name in VLLM_ARGUMENTS:
                raise UserError(f"serve.vllm_options.{name} has an option of its own: use {VLLM_ARGUMENTS[name]}=...")
        if self.gpus_per_replica % 1 and self.gpus_per_replica > 1:
            raise UserError(
                f"serve.gpus_per_replica {self.gpus_per_replica:g} cannot be divided among vLLM's processes: use a whole number, or less "
                "than 1"
            )


def options_affecting(options: ServeConfig, parts: Collection[str]) -> dict[str, Any]:
    """Return the options, by name, whose change replaces one of `parts` (REPLICA, INGRESS, DEPLOYMENT)."""
    affects = flag_values(ServeConfig, "affects")
    return {name: value for name, value in asdict(options).items() if affects[name] in parts}


@dataclass
class ImproveConfig(Frozen):
    """`manta improve`: train a better version on the requests and feedback that an endpoint recorded."""

    records: Optional[str] = option(None, "folder with the endpoint's records; None: <runs_dir>/*/feedback")
    every_s: Optional[float] = option(None, "seconds between checks, until Ctrl-C; None: check once", above=0)
    apply: bool = option(
        False, "if there is drift, train, evaluate and register a new version; otherwise only report it", formerly="go"
    )
    recent: int = option(1000, "number of latest requests that are compared with the bundle's training data", least=20)
    min_requests: int = option(100, "minimum number of recorded requests to measure drift", least=20)
    min_examples: int = option(50, "minimum number of corrected or well-rated examples to train on", least=1)
    significance: float = option(0.01, "significance level over all drift measures together", above=0, most=0.5)
    least_psi: float = option(
        0.1, "minimum population stability index that counts as drift (Siddiqi 2006: 0.1 moderate, 0.25 large)", above=0
    )
    least_bad: float = option(
        0.05, "minimum increase of the fraction of bad ratings that counts as drift", above=0, most=1
    )
    replay: float = option(2.0, "examples of the old training data for each new one, against forgetting", least=0)


@dataclass
class KeyConfig(Frozen):
    """`manta key`: the API keys of an endpoint and their rate limits."""

    action: str = option("list", "new, list or revoke", choices=("new", "list", "revoke"))
    requests_per_minute: Optional[int] = option(None, "new: rate limit in requests per minute; None: no limit", least=1)
    tokens_per_minute: Optional[int] = option(
        None, "new: rate limit in tokens per minute, of prompts and completions; None: no limit", least=1
    )
    days: Optional[float] = option(None, "new: days until the key expires; None: never", above=0)
