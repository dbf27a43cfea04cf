"""What a config is refused for: values out of their range, and pairs that contradict each other, each with its fix."""

from __future__ import annotations

import dataclasses
import math
import re
import string
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from engine.config.schema import PER_SOURCE, Config, DataConfig, declared, get, source_configs, type_name
from engine.errors import UserError, nearest


def check(config: Config) -> None:
    """Raise UserError for a value out of its range or a contradiction between two."""
    for key, f, _ in declared():
        value = get(config, key)
        if value is None:
            continue
        _check_range(key, f, value)
    _check_sources(config.data)
    _check_images(config.data)
    _check_speech(config.data)
    _check_contradictions(config)


def _check_range(key: str, f: dataclasses.Field[Any], value: Any) -> None:
    choices, least, above, most = (f.metadata.get(k) for k in ("choices", "least", "above", "most"))
    for word in value if isinstance(value, list) else [value]:
        if choices and word not in choices:
            raise UserError(f"{key}={word} is not one of {', '.join(choices)}{nearest(str(word), choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is not a finite number")
    if least is not None and value < least:
        raise UserError(f"{key}={value} is too small: use {least} or more")
    if above is not None and value <= above:
        raise UserError(f"{key}={value} is too small: use more than {above}")
    if most is not None and value > most:
        raise UserError(f"{key}={value} is too large: use {most} or less")


def _check_sources(data: DataConfig) -> None:
    """Check data.sources, whose options are those of DataConfig."""
    fields, hints = {f.name: f for f in dataclasses.fields(DataConfig)}, get_type_hints(DataConfig)
    for name, options in data.sources.items():
        if not isinstance(options, dict) or not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise UserError(f"data.sources.{name} is no source: write NAME: {{path: ..., weight: 1.0}}")
        for key, value in options.items():
            where = f"data.sources.{name}.{key}"
            if key == "weight":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise UserError(f"{where}={value} is no weight: use a number above 0, or leave the source out")
                continue
            if key not in PER_SOURCE:
                raise UserError(f"{where} is not an option of a source{nearest(key, [*PER_SOURCE, 'weight'])}")
            if value is None:
                continue
            if not is_of(value, hints[key]):
                raise UserError(f"{where}={value} is not {type_name(hints[key])}")
            _check_range(where, fields[key], value)
    for name, source in source_configs(data).items():
        where = f"data.sources.{name}." if data.sources else "data."
        if data.sources and (data.label_column or source.source == "python_functions"):
            raise UserError(
                "data.sources are for text without labels: leave out data.label_column, or use data.path alone"
            )
        for key in ("path", "validation_path", "test_path", "store"):
            _check_address(where + key, getattr(source, key))
        if source.validation_fraction + source.test_fraction >= 0.9:
            raise UserError(
                f"{where}validation_fraction and {where}test_fraction leave nothing to train on: use less than 0.9 in all"
            )
        if source.min_characters and source.max_characters and source.min_characters > source.max_characters:
            raise UserError(
                f"{where}min_characters {source.min_characters} is more than {where}max_characters {source.max_characters}"
            )
        if source.filter and not re.fullmatch(r"[\w.]+:\w+", source.filter):
            raise UserError(f"{where}filter={source.filter} names no function: write 'module:function'")
        if data.sources and source.source == "huggingface" and not source.path:
            raise UserError(
                f"{where}source=huggingface needs the dataset's name or folder: say which with {where}path=..."
            )


def is_of(value: Any, hint: Any) -> bool:
    """Say whether a value is of a declared type."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(is_of(value, one) for one in get_args(hint) if one is not type(None))
    kind = get_origin(hint) or hint
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_address(key: str, address: str | None) -> None:
    if re.search(r"[a-z0-9]://[^/@]*:[^/]*@", address or "", re.IGNORECASE):
        raise UserError(
            f"{key} has a password in it: leave it out (a store's client finds credentials in the environment)"
        )


def _check_images(data: DataConfig) -> None:
    """Check the options of images, and that a caption's parts are there."""
    if data.image_column and (data.source != "files" or data.sources):
        raise UserError("data.image_column is for images in files of your own: use data.source=files and data.path=...")
    if data.image_column and (data.mask or data.filter or data.quality or data.languages):
        raise UserError(
            "data.mask, data.filter, data.quality and data.languages are for text: leave them out with data.image_column"
        )
    if data.image_column and data.caption:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(data.caption) if name is not None}
        except ValueError as error:
            raise UserError(
                f"data.caption='{data.caption}' cannot be read ({error}): write {{label}} or {{COLUMN}}, and a brace itself twice"
            ) from error
        if not names or "" in names:
            raise UserError(
                f"data.caption='{data.caption}' is the same for every image: write {{label}} or {{COLUMN}} into it"
            )
        if "label" in names and not data.label_column:
            raise UserError(
                "data.caption names {label}: say which column has it with data.label_column=..., or name a {COLUMN}"
            )
    if data.sentinel_tokens and data.sentinel_tokens + 300 > data.vocab_size:
        raise UserError(
            f"data.sentinel_tokens {data.sentinel_tokens} leave too few of data.vocab_size {data.vocab_size} for text: "
            f"use data.vocab_size={data.sentinel_tokens + 300} or more"
        )


def _check_speech(data: DataConfig) -> None:
    """Check the options of speech."""
    if not data.audio_column:
        return
    if data.image_column:
        raise UserError("data.audio_column and data.image_column say two kinds of data: use one of them")
    if data.source != "files" or data.sources:
        raise UserError("data.audio_column is for sounds in files of your own: use data.source=files and data.path=...")
    if data.label_column:
        raise UserError(
            f"data.label_column={data.label_column} names classes, and speech is learnt from its words: leave it out, and say "
            "which column has these with data.text_column=..."
        )
    if data.mask or data.filter or data.quality or data.languages:
        raise UserError(
            "data.mask, data.filter, data.quality and data.languages change or choose texts, not what is said: leave them out "
            "with data.audio_column"
        )


def _check_parameter_group(pattern: str, changes: Any) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"optim.groups: '{pattern}' is no regular expression ({error})") from error
    known = ("lr", "weight_decay")
    for key, value in changes.items() if isinstance(changes, dict) else [(str(changes), None)]:
        if key not in known:
            raise UserError(f"optim.groups: {pattern}: {key} is not one of {', '.join(known)}{nearest(key, known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(f"optim.groups: {pattern}: {key}={value} is not a number of 0 or more")


def _check_sweep(c: Config) -> None:
    """Check that the parts of a sweep go together."""
    sweep = c.sweep
    metrics, modes = (sweep.metric or "").split("+"), (sweep.mode or "").split("+")
    for mode in modes if sweep.mode else ():
        if mode not in ("min", "max"):
            raise UserError(f"sweep.mode={sweep.mode}: '{mode}' is not one of min, max")
    if len(metrics) != len(modes) and (len(metrics) > 1 or len(modes) > 1):
        raise UserError(
            f"sweep.metric has {len(metrics)} and sweep.mode {len(modes)} parts: say min or max for each, as in "
            "sweep.metric=accuracy+loss sweep.mode=max+min"
        )
    if len(metrics) > 1 and sweep.searcher not in ("tpe", "random", "grid"):
        raise UserError(f"sweep.searcher={sweep.searcher} looks at one metric: use sweep.searcher=tpe for several")
    if sweep.searcher == "bohb" and sweep.scheduler != "hyperband":
        raise UserError(
            f"sweep.searcher=bohb is TPE with HyperBand, and sweep.scheduler is {sweep.scheduler}: use sweep.scheduler=hyperband"
        )
    if sweep.scheduler in ("pbt", "pb2"):
        if sweep.searcher != "random":
            raise UserError(
                f"sweep.scheduler={sweep.scheduler} draws its first values at random and then changes them: leave out sweep.searcher"
            )
        if sweep.trials < 2 and c.job == "sweep":
            raise UserError(f"sweep.scheduler={sweep.scheduler} needs models to copy: use sweep.trials=4 or more")
    if sweep.soup and sweep.retrain_steps:
        raise UserError("sweep.soup and sweep.retrain_steps each make the bundle: use one of them")


# Engine arguments of vLLM for which there is another option.
OF_VLLM = {
    "model": "bundle", "tokenizer": "bundle", "dtype": "serve.precision", "max_num_seqs": "serve.max_num_seqs",
    "max_num_batched_tokens": "serve.max_batched_tokens", "max_model_len": "serve.kv_cache_tokens",
    "num_gpu_blocks_override": "serve.kv_cache_tokens", "tensor_parallel_size": "serve.gpus_per_replica",
    "enable_lora": "serve.adapters", "max_loras": "serve.max_adapters", "max_cpu_loras": "serve.max_adapters",
    "lora_target_modules": "serve.adapters", "max_lora_rank": "serve.adapters",
}  # fmt: skip


def _check_generator(c: Config) -> None:
    """Check that the options of whatever writes completions go together."""
    serve = c.serve
    if serve.generator != "vllm":
        for key in ("vllm_python", "vllm_options"):
            if getattr(serve, key):
                raise UserError(f"serve.{key} is for serve.generator=vllm: add that, or leave it out")
        return
    for key, neutral in (("num_speculative_tokens", 0), ("quantize", "none"), ("compile", False)):
        if (value := getattr(serve, key)) != neutral:
            raise UserError(
                f"serve.{key}={value} is for serve.generator=transformers: leave it out, or say it vLLM's way in serve.vllm_options"
            )
    for name in serve.vllm_options:
        if name in OF_VLLM:
            raise UserError(f"serve.vllm_options.{name} has an option of its own: use {OF_VLLM[name]}=...")
    if serve.gpus_per_replica % 1 and serve.gpus_per_replica > 1:
        raise UserError(
            f"serve.gpus_per_replica {serve.gpus_per_replica:g} can't be divided among vLLM's processes: use a whole number, or less "
            "than 1"
        )


def _check_contradictions(c: Config) -> None:
    train, model = c.train, c.model
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", c.name):
        raise UserError(f"name='{c.name}' cannot name a folder: use letters, digits, '.', '_' and '-' only")
    if train.global_batch_tokens is not None:
        length = c.data.sequence_length
        if train.global_batch is not None:
            raise UserError(
                f"train.global_batch {train.global_batch} and train.global_batch_tokens {train.global_batch_tokens:,} "
                "both say how large a step is: use one of them"
            )
        if train.global_batch_tokens % length:
            near = max(1, round(train.global_batch_tokens / length)) * length
            raise UserError(
                f"train.global_batch_tokens {train.global_batch_tokens:,} is no multiple of data.sequence_length {length:,}: "
                f"use train.global_batch_tokens={near}"
            )
    if train.micro_batch and train.micro_batch > c.global_batch:
        raise UserError(
            f"train.micro_batch {train.micro_batch} is more than train.global_batch {c.global_batch}: "
            f"use train.micro_batch={c.global_batch} or less"
        )
    if train.workers > 1 and 0 < (train.gpus_per_worker or 0) < 1:
        raise UserError(
            f"train.gpus_per_worker {train.gpus_per_worker:g} would put several of train.workers {train.workers} on one GPU, "
            "which NCCL refuses: use train.workers=1, or whole GPUs"
        )
    if train.min_workers and train.min_workers > train.workers:
        raise UserError(
            f"train.min_workers {train.min_workers} is more than train.workers {train.workers}: "
            f"use train.min_workers={train.workers} or less"
        )
    if train.workers % train.sequence_parallel:
        raise UserError(
            f"train.workers {train.workers} cannot be divided into groups of train.sequence_parallel {train.sequence_parallel}: "
            f"use train.workers={-(-train.workers // train.sequence_parallel) * train.sequence_parallel}"
        )
    if train.sequence_parallel > 1 and model.attention != "sdpa":
        raise UserError(
            f"train.sequence_parallel has an attention of its own on sdpa: leave out model.attention={model.attention}"
        )
    _check_address("train.mirror", train.mirror)
    if train.mirror and c.job == "sweep":
        raise UserError("train.mirror copies one run, and a sweep has many: leave it out, and use it to train the best")
    if train.use_ema and not train.ema:
        raise UserError("train.use_ema needs an average: say its decay with train.ema=0.999, or the like")
    for pattern, changes in c.optim.groups.items():
        _check_parameter_group(pattern, changes)
    if train.patience and not train.evaluate_every:
        raise UserError("train.patience counts validations and there are none: say how often with train.evaluate_every")
    if c.objective.lora.rank and c.objective.frozen_layers:
        raise UserError("objective.lora keeps all layers as they are: leave out objective.frozen_layers")
    if c.objective.lora.rank and c.bundle is None and c.job in ("pretrain", "sweep"):
        raise UserError("objective.lora adapts a trained model: say which with bundle=..., or leave it out")
    if model.max_position_embeddings and c.data.sequence_length > model.max_position_embeddings:
        raise UserError(
            f"sequence length {c.data.sequence_length:,} is over the model's {model.max_position_embeddings:,} positions: "
            f"use data.sequence_length={model.max_position_embeddings}"
        )
    if model.hidden_size and model.num_attention_heads and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size {model.hidden_size} cannot be divided among model.num_attention_heads "
            f"{model.num_attention_heads}: use a multiple of {model.num_attention_heads}"
        )
    if (
        model.num_key_value_heads
        and model.num_attention_heads
        and model.num_attention_heads % model.num_key_value_heads
    ):
        raise UserError(
            f"model.num_attention_heads {model.num_attention_heads} is no multiple of model.num_key_value_heads "
            f"{model.num_key_value_heads}: use a divisor of {model.num_attention_heads}"
        )
    if c.convert.to == "checkpoint" and not c.convert.folder and c.job == "convert":
        raise UserError("convert.to=checkpoint reads a universal checkpoint: say which with convert.folder=...")
    if c.convert.to == "checkpoint" and c.convert.step:
        raise UserError(
            "convert.step chooses among a run's checkpoints, and convert.to=checkpoint makes one: leave it out"
        )
    for name in ("stage", "offload_optimizer", "offload_param"):
        if name in c.zero.options:
            raise UserError(f"zero.options.{name} has an option of its own: use zero.{name}=...")
    if c.zero.offload_param != "none" and c.zero.stage != 3:
        raise UserError(f"zero.offload_param needs zero.stage=3, not {c.zero.stage}")
    if c.zero.offload_optimizer != "none" and c.zero.stage == 0:
        raise UserError("zero.offload_optimizer needs zero.stage=1 or more, not 0")
    if c.warmup_steps > c.total_steps:
        raise UserError(
            f"schedule.warmup_steps {c.warmup_steps} is more than the schedule's {c.total_steps} steps: "
            f"use schedule.warmup_steps={c.total_steps} or less"
        )
    if c.schedule.total_steps and train.max_steps > c.schedule.total_steps:
        raise UserError(
            f"train.max_steps {train.max_steps} is more than schedule.total_steps {c.schedule.total_steps}: "
            f"use schedule.total_steps={train.max_steps} or more"
        )
    if (c.evaluate.suite == "lm_eval") != bool(c.evaluate.tasks):
        raise UserError(
            "evaluate.suite=lm_eval and evaluate.tasks=[NAME_OR_FILE,...] go together: give both or neither"
        )
    _check_address("evaluate.endpoint", c.evaluate.endpoint)
    if c.evaluate.endpoint and c.evaluate.suite != "lm_eval":
        raise UserError("evaluate.endpoint is for evaluate.suite=lm_eval: leave it out, or name tasks")
    if c.evaluate.endpoint and not re.match(r"https?://[^/]", c.evaluate.endpoint):
        raise UserError(
            f"evaluate.endpoint={c.evaluate.endpoint} is no address: use http://127.0.0.1:8000, or the like"
        )
    packs = c.data.packing != "end_to_end" or c.data.within_documents
    if packs and c.objective.name not in ("causal_lm", "masked_lm"):
        raise UserError(
            f"data.packing and data.within_documents are for objective=causal_lm and masked_lm: leave them out for {c.objective.name}"
        )
    if c.data.within_documents and model.attention == "flash_attention_2":
        raise UserError(
            "data.within_documents needs an attention with a mask, and flash_attention_2 takes none: use model.attention=sdpa"
        )
    if c.data.within_documents and c.objective.name == "masked_lm" and model.attention != "sdpa":
        raise UserError(
            f"data.within_documents and objective=masked_lm need model.attention=sdpa, not {model.attention}"
        )
    if c.objective.sampling_steps > c.objective.noise_steps:
        raise UserError(
            f"objective.sampling_steps {c.objective.sampling_steps} is more than objective.noise_steps {c.objective.noise_steps}: "
            f"use objective.sampling_steps={c.objective.noise_steps} or less"
        )
    if c.objective.name == "diffusion" and c.objective.guidance != 1 and not c.objective.label_dropout:
        raise UserError(
            f"objective.guidance {c.objective.guidance:g} leads away from images without a label, and objective.label_dropout=0 "
            "shows none: use objective.guidance=1, or label_dropout=0.1"
        )
    _check_sweep(c)
    _check_generator(c)
    if c.serve.max_replicas < c.serve.min_replicas:
        raise UserError(
            f"serve.max_replicas {c.serve.max_replicas} is less than serve.min_replicas {c.serve.min_replicas}: "
            f"use serve.max_replicas={c.serve.min_replicas} or more"
        )
    if c.serve.ingresses > 1 and not c.serve.haproxy:
        raise UserError(f"serve.ingresses {c.serve.ingresses} need HAProxy before them: add serve.haproxy=true")
    if c.serve.haproxy and c.serve.export:
        raise UserError(
            "serve.haproxy is for an endpoint that `manta deploy` starts; an exported one has Serve's proxy on each node, or "
            "what you put before them: leave out serve.haproxy and serve.ingresses"
        )
    _check_address("serve.tracing", c.serve.tracing)
    if c.serve.tracing and not re.match(r"https?://[^/]", c.serve.tracing):
        raise UserError(
            f"serve.tracing={c.serve.tracing} is no collector's address: use http://localhost:4318, or the like"
        )
    stages = c.serve.canary_stages
    if not stages or stages != sorted(set(stages)) or stages[0] <= 0 or stages[-1] != 1:
        raise UserError(
            f"serve.canary_stages {stages} must be growing shares of the traffic that end with all of it: "
            "use serve.canary_stages=[0.05,0.25,0.5,1.0], or the like"
        )
    if c.serve.names and len(c.serve.names.split("+")) != len((c.bundle or c.tracking.alias).split("+")):
        raise UserError(
            f"serve.names={c.serve.names} is not one name for each of bundle={c.bundle or c.tracking.alias}"
        )
    if c.serve.adapters and "+" in (c.bundle or ""):
        raise UserError(
            f"serve.adapters are of one bundle, and bundle={c.bundle} are several: deploy them one after the other, each with its own"
        )
    if c.serve.draft_model and not c.serve.num_speculative_tokens:
        raise UserError(
            "serve.draft_model guesses serve.num_speculative_tokens tokens ahead, and that is 0: use serve.num_speculative_tokens=4, or the like"
        )
    if c.serve.draft_model and "+" in (c.bundle or ""):
        raise UserError(
            f"serve.draft_model is for one bundle, and bundle={c.bundle} are several: deploy them one after the other, each with its own"
        )
    if c.serve.compile and c.serve.adapters:
        raise UserError(
            "serve.compile and serve.adapters can't go together, for adapters change from step to step: use one of them"
        )
    for name, folder in c.serve.adapters.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", str(name)) or not isinstance(folder, str):
            raise UserError(f"serve.adapters.{name}={folder} is no adapter: write NAME: FOLDER, the name of letters, digits, '.', '_', '-'")  # fmt: skip
    learns = c.job in ("pretrain", "finetune", "sweep")  # in the others a bundle says what the objective is
    unlabelled = c.data.source == "files" and c.data.path and not c.data.label_column
    if learns and c.objective.name == "classification" and unlabelled:
        raise UserError("objective=classification needs labels: say which column has them with data.label_column=...")
