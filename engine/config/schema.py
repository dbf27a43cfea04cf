"""Every option of Manta, declared once: its type, its default, its unit and where the default comes from.

Options that don't decide what is computed are named in LAYOUT, below the dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """Declare one option: its default, what it means (with its unit), and the values that it may take."""
    metadata = {"help": help, "choices": choices, "least": least, "above": above, "most": most}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Frozen:
    """A dataclass base whose instances `resolve` closes against change (OmegaConf cannot merge into frozen ones)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_closed"):
            raise dataclasses.FrozenInstanceError(f"cannot change {name}: derive a new config with `replace`")
        object.__setattr__(self, name, value)


@dataclass
class DataConfig(Frozen):
    """Where examples come from, which are kept, how they become shards on disk, and how these are packed into samples."""

    name: str = option("files", "short name of the prepared data; part of its folder's name")

    # Where from
    source: str = option(
        "files",
        "reader: files (your own), huggingface (a dataset, through `datasets`), python_stdlib (the running Python's "
        "standard library), python_functions (its function bodies, labelled with their package)",
        choices=("files", "huggingface", "python_stdlib", "python_functions"),
    )
    sources: dict[str, Any] = option(
        {},
        "several at once, NAME: {path: ..., weight: 2.0, ...}: each has its own reader, path, columns, split, limits, filter, "
        "mask and license, else those of this group; weight: times that an epoch shows each of its samples (0.5: every other)",
    )
    path: Optional[str] = option(
        None, "file, folder or glob ('dir/*.jsonl.zst') of the training examples, here or in a store (s3://, gs://: pip install "
        "'manta-train[s3]' or [gs]); huggingface: the dataset's name or folder",
    )  # fmt: skip
    validation_path: Optional[str] = option(
        None, "source=files: the same for validation; else data.validation_fraction"
    )
    test_path: Optional[str] = option(None, "source=files: the same for the held-out test; else data.test_fraction")
    format: str = option(
        "auto", "source=files: auto goes by the file's ending", choices=("auto", "text", "jsonl", "parquet", "arrow")
    )
    text_column: str = option("text", "column with the text")
    label_column: Optional[str] = option(None, "column with the label; needed by the classifications")
    subset: Optional[str] = option(
        None, "source=huggingface: the dataset's configuration; None: its only or default one"
    )
    split: str = option("train", "source=huggingface: its split to train on")
    validation_split: Optional[str] = option(
        None, "source=huggingface: its split for validation; else data.validation_fraction"
    )
    test_split: Optional[str] = option(
        None, "source=huggingface: its split for the held-out test; else data.test_fraction"
    )
    revision: Optional[str] = option(None, "source=huggingface: branch, tag or commit of the dataset")
    stream: Optional[bool] = option(
        None, "source=huggingface: read it as it comes, without a copy; None: where it is over 4 GB or of unknown size"
    )
    packages: Optional[int] = option(16, "source=python_functions: how many packages to tell apart", least=2)
    store: Optional[str] = option(
        None, "address (s3://, gs://) or folder where prepared data are kept too: made once, by whoever is first; another machine "
        "fetches them into its runs_dir, each shard when it is first read",
    )  # fmt: skip
    license: str = option("not stated", "license of the examples (SPDX), kept in the manifest")

    # Images
    image_column: Optional[str] = option(
        None, "column with the image: its file's bytes, as `datasets` keeps them, or its path; None: the data are text"
    )
    image_size: int = option(32, "side of an image as the model sees it, in pixels", least=4)
    image_processor: Optional[str] = option(
        None,
        "folder of a Hugging Face image processor; None: the start bundle's, else the architecture's own for image_size",
    )
    caption: Optional[str] = option(
        None,
        "caption of an image, for objective=contrastive: a text with {label} for the label and {COLUMN} for a column, "
        "'a photo of a {label}'",
    )

    # Speech
    audio_column: Optional[str] = option(
        None, "column with the sound, of which data.text_column has the words: its file's bytes (WAV, FLAC, OGG, MP3), as "
        "`datasets` keeps them, or its path; needs pip install 'manta-train[audio]'; None: the data are no speech",
    )  # fmt: skip
    audio_seconds: int = option(
        30, "seconds that a model hears at once: shorter sounds are filled up with silence, longer ones are left out "
        "(Radford et al. 2022, Whisper: 30)", least=1,
    )  # fmt: skip
    feature_extractor: Optional[str] = option(
        None,
        "folder of a Hugging Face feature extractor; None: the start bundle's, else the architecture's own for audio_seconds",
    )

    # Which are kept
    validation_fraction: float = option(0.05, "share of the files (or rows) held out for validation", least=0, most=0.5)
    test_fraction: float = option(0.05, "share of the files (or rows) held out for the final test", least=0, most=0.5)
    max_documents: Optional[int] = option(None, "read at most so many documents (None: all), of each source", least=1)
    mask: list[str] = option(
        [],
        "replaced by a placeholder before anything else sees the text: emails, secrets",
        choices=("emails", "secrets"),
    )
    min_characters: Optional[int] = option(None, "leave out shorter documents", least=1)
    max_characters: Optional[int] = option(None, "leave out longer documents", least=1)
    quality: bool = option(
        False, "leave out what the rules of Rae et al. 2021 (Gopher, table A1) call no English prose"
    )
    languages: list[str] = option(
        [],
        "leave out what is in none of these languages (ISO 639-1): [en] or [en,de]; needs pip install 'manta-train[language]'",
    )
    filter: Optional[str] = option(
        None, "your own, 'module:function': text -> True to keep it, or False or a reason to leave it out"
    )

    # How they become shards
    tokenizer: Optional[str] = option(None, "folder of a Hugging Face tokenizer; None trains a byte-level BPE")
    vocab_size: int = option(4096, "tokens in the vocabulary of the BPE that is trained", least=300, most=65536)
    sentinel_tokens: int = option(
        0, "<extra_id_N> tokens in the BPE that is trained; objective=span_corruption needs one a span", least=0
    )
    shard_tokens: int = option(
        2**22, "tokens in one Arrow shard, about; also the piece of work of one process", least=1024
    )

    # How shards become samples
    sequence_length: int = option(256, "tokens in one training sample", least=2)
    packing: str = option(
        "end_to_end",
        "end_to_end: documents laid end to end and cut, no padding; best_fit: whole documents put together, cut only where "
        "longer than a sample (Ding et al. 2024)",
        choices=("end_to_end", "best_fit"),
    )
    within_documents: bool = option(False, "keep attention within a document: positions restart at each")


# Options of DataConfig that one of data.sources may set for itself.
PER_SOURCE = (
    "source", "path", "validation_path", "test_path", "format", "text_column", "subset", "split", "validation_split",
    "test_split", "revision", "stream", "license", "validation_fraction", "test_fraction", "max_documents", "mask",
    "min_characters", "max_characters", "quality", "languages", "filter",
)  # fmt: skip


def data_kind(data: DataConfig) -> str:
    """Name what these options prepare.

    text: documents, to be packed; labelled: texts with a label; images: with a label where data.label_column is set;
    captioned: images with a text each; speech: sounds with their words.
    """
    if data.audio_column:
        return "speech"
    if data.image_column:
        return "captioned" if data.caption else "images"
    return "labelled" if data.label_column or data.source == "python_functions" else "text"


def source_options(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Return the options of each source by its name; where there is but one, none, by the name of its reader."""
    return {name: dict(options) for name, options in data.sources.items()} or {data.source: {}}


def source_configs(data: DataConfig) -> dict[str, DataConfig]:
    """Return the options that hold for each source by its name."""
    return {
        name: dataclasses.replace(data, **{key: value for key, value in options.items() if key != "weight"}, sources={})
        for name, options in source_options(data).items()
    }


@dataclass
class ModelConfig(Frozen):
    """An architecture of transformers, or dit of diffusers, in transformers' own names. None leaves the architecture's default."""

    type: str = option(
        "llama", "transformers model type: llama, gpt2, bert, t5, vit, clip, whisper, ...; of diffusers: dit"
    )
    hidden_size: Optional[int] = option(None, "width of the residual stream", least=1)
    num_hidden_layers: Optional[int] = option(None, "transformer blocks", least=1)
    num_attention_heads: Optional[int] = option(None, "attention heads; divides hidden_size", least=1)
    num_key_value_heads: Optional[int] = option(None, "key/value heads (grouped-query attention)", least=1)
    intermediate_size: Optional[int] = option(None, "width of the MLP", least=1)
    max_position_embeddings: Optional[int] = option(None, "longest sequence, in tokens", least=1)
    tie_word_embeddings: Optional[bool] = option(None, "share input and output embeddings")
    vocab_size: Optional[int] = option(None, "None: the tokenizer's", least=2)
    dropout: float = option(
        0.0,
        "dropout probability, everywhere in the model; only at 0 is the loss the same for every layout",
        least=0,
        most=0.9,
    )
    options: dict[str, Any] = option({}, "any other field of the architecture's config, by its own name")
    attention: str = option(
        "sdpa",
        "attention implementation, of torch but for flash_attention_2, which needs the package flash-attn",
        choices=("sdpa", "eager", "flex_attention", "flash_attention_2"),
    )


@dataclass
class LoraConfig(Frozen):
    """Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685): `pip install 'manta-train[lora]'`."""

    rank: int = option(
        0, "finetune: width of the matrices that are trained beside each weight of the blocks, which stay (0: no LoRA)", least=0
    )  # fmt: skip
    alpha: Optional[float] = option(None, "what they add is scaled by alpha / rank; None: twice the rank", above=0)
    dropout: float = option(0.0, "share of a layer's inputs that they don't see in a step", least=0, most=0.9)
    targets: list[str] = option(
        [], "which linear layers of the blocks, by the ends of their names: [q_proj,v_proj]; []: all "
        "(Dettmers et al. 2023, QLoRA: all are needed to match full fine-tuning)",
    )  # fmt: skip


@dataclass
class ObjectiveConfig(Frozen):
    """What is learnt. One file in engine/objectives/ each."""

    name: str = option(
        "causal_lm",
        "file in engine/objectives/: causal_lm, masked_lm, span_corruption, classification, image_classification, contrastive, "
        "diffusion, speech_recognition",
    )
    frozen_layers: int = option(
        0, "embeddings and so many first blocks keep their start weights (0: all are trained)", least=0
    )
    lora: LoraConfig = field(default_factory=LoraConfig)
    mask_rate: float = option(
        0.15, "masked_lm: share of the tokens to be predicted (Devlin et al. 2019)", above=0, most=0.9
    )
    noise_density: float = option(
        0.15, "span_corruption: share of the tokens to be predicted (Raffel et al. 2020)", above=0, most=0.9
    )
    mean_span: float = option(
        3.0, "span_corruption: tokens of a corrupted span, on average (Raffel et al. 2020)", least=1
    )
    noise_steps: int = option(1000, "diffusion: steps from an image to pure noise (Ho et al. 2020)", least=2)
    noise_schedule: str = option(
        "linear", "diffusion: how noise grows over the steps: linear (Ho et al. 2020), or by a squared cosine (Nichol & Dhariwal 2021)",
        choices=("linear", "squaredcos_cap_v2"),
    )  # fmt: skip
    label_dropout: float = option(
        0.1, "diffusion: share of the samples that are shown without their label, for guidance (Ho & Salimans 2022)", least=0, most=0.9
    )  # fmt: skip
    sampling_steps: int = option(
        25, "diffusion: forwards for an image (Song et al. 2020, DDIM); at most noise_steps", least=1
    )
    guidance: float = option(
        1.5, "diffusion: how far an image is led towards its label: 1 not beyond what was learnt, and half the work "
        "(Peebles & Xie 2023: 1.5 for the best FID, 4 for single images)", least=1, most=20,
    )  # fmt: skip
    images_together: int = option(
        4, "diffusion: images in one forward, always as many, made up with copies: so an image is the same whatever is beside it", least=1
    )  # fmt: skip
    z_loss: float = option(
        0.0, "over a vocabulary: weight of the squared log-normalizer (Chowdhery et al. 2022, PaLM: 1e-4)", least=0
    )
    logits_chunk: Optional[int] = option(
        None,
        "over a vocabulary: tokens whose logits are held at a time; None: 1,024, or what 128 MiB hold; 0: all",
        least=0,
    )
    language: Optional[str] = option(
        None,
        "speech_recognition: language that is spoken (ISO 639: en), for a tokenizer that knows several, as Whisper's",
    )


@dataclass
class OptimConfig(Frozen):
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), or Muon beside it."""

    name: str = option(
        "adamw",
        "adamw for all, or muon for the matrices of the blocks and adamw for the rest "
        "(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)",
        choices=("adamw", "muon"),
    )
    lr: float = option(1e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only (Brown et al. 2020)", least=0)
    beta1: float = option(0.9, "decay of the first moment", least=0, most=0.9999)
    beta2: float = option(0.95, "decay of the second moment (Brown et al. 2020)", least=0, most=0.99999)
    eps: float = option(1e-8, "term added to the denominator", above=0)
    momentum: float = option(0.95, "muon: decay of the momentum (Jordan et al. 2024)", least=0, most=0.9999)
    clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off", least=0)
    groups: dict[str, Any] = option(
        {},
        "pattern: {lr: FACTOR of optim.lr, weight_decay: VALUE}, for parameters in whose name the pattern (a regular expression) is found; the first holds",
    )


@dataclass
class ScheduleConfig(Frozen):
    """Learning rate over steps: linear warm-up to optim.lr, then `kind` down to min_ratio of it."""

    kind: str = option("cosine", "shape after warm-up", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: Optional[int] = option(None, "steps; None: warmup_fraction of total_steps", least=0)
    warmup_fraction: float = option(0.1, "share of total_steps", least=0, most=1)
    total_steps: Optional[int] = option(None, "steps over which the rate falls; None: train.max_steps", least=1)
    decay_fraction: float = option(
        0.2, "wsd: share of the steps after warm-up in which the rate falls", above=0, most=1
    )
    min_ratio: float = option(0.1, "final rate / peak rate", least=0, most=1)


@dataclass
class ZeroConfig(Frozen):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054)."""

    stage: int = option(
        2, "0 nothing, 1 optimizer, 2 + gradients, 3 + weights are sharded over the workers", least=0, most=3
    )
    offload_optimizer: str = option("none", "where the optimizer's state is kept", choices=("none", "cpu"))
    offload_param: str = option("none", "stage 3: where the weights are kept", choices=("none", "cpu"))
    options: dict[str, Any] = option(
        {},
        "any other option of DeepSpeed's zero_optimization, by its own name: of ZeRO++ zero_hpz_partition_size, say, and on GPUs "
        "zero_quantized_weights and zero_quantized_gradients, which round what is sent, so that curves differ by layout",
    )


@dataclass
class TrainConfig(Frozen):
    """The step loop."""

    workers: int = option(1, "Ray Train workers: processes, one for each GPU (or share of the CPU cores)", least=1)
    gpus_per_worker: Optional[float] = option(
        None, "GPUs a worker; None: 1 where the cluster has GPUs, else 0", least=0
    )
    cpus_per_worker: Optional[float] = option(
        None, "cores a worker; None: the cluster's cores / workers, at least 0.5", above=0
    )
    max_steps: int = option(100, "optimizer steps in all", least=1)
    global_batch: Optional[int] = option(
        None, "samples in one step, over all workers; None: those of global_batch_tokens, else 32", least=1
    )
    global_batch_tokens: Optional[int] = option(
        None, "tokens in one step, over all workers: a multiple of data.sequence_length", least=2
    )
    micro_batch: Optional[int] = option(
        None,
        "samples in one forward of a worker; None: the most that fit its memory, tried once and remembered (on a processor 16 at most)",
        least=1,
    )
    precision: str = option(
        "auto",
        "auto: bf16 where the processor has it in hardware, else fp32; fp16 (GPU) scales the loss as it goes",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(False, "torch.compile the model (the first step takes a minute longer)")
    sequence_parallel: int = option(
        1, "workers that share each sequence, for long ones (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): "
        "causal_lm and masked_lm; a divisor of the workers and of the model's heads", least=1,
    )  # fmt: skip
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass")
    ema: float = option(
        0.0,
        "decay of a moving average of the weights, kept beside them; 0: none (less in the first steps)",
        least=0,
        most=0.99999,
    )
    use_ema: bool = option(False, "validate with that average, and make the bundle of it")
    checkpoint_every: int = option(100, "steps between checkpoints; the last step always has one", least=1)
    keep_checkpoints: int = option(2, "so many of the latest are kept", least=1)
    on_failed_save: str = option(
        "go_on",
        "a checkpoint that cannot be written (a full disk, say): go_on to the next one, or stop; the one before is whole",
        choices=("go_on", "stop"),
    )
    mirror: Optional[str] = option(
        None, "address (s3://, gs://) or folder that gets a copy of the run as it goes on: its checkpoints, metrics and bundle, under "
        "its name; a run whose folder has no checkpoint goes on from there",
    )  # fmt: skip
    keep_best: bool = option(
        False, "keep the checkpoint with the best validation too, and make the bundle of it instead of the last"
    )
    patience: Optional[int] = option(
        None, "end after so many validations in a row that were not the best; None: at max_steps", least=1
    )
    evaluate_every: Optional[int] = option(None, "steps between validations; None: at the end only", least=1)
    evaluate_samples: Optional[int] = option(256, "samples in a validation; None: the whole split", least=1)
    max_skipped: int = option(
        3, "steps in a row, with a spike or without a finite gradient, that all workers skip before they roll back", least=0
    )  # fmt: skip
    max_rollbacks: int = option(
        2, "returns to the last good checkpoint, passing over the data since then, before the run ends", least=0
    )
    spike_sigma: Optional[float] = option(
        None, "a loss so many standard deviations above the mean of spike_window steps is skipped (6, say); None: none",
        above=0,
    )  # fmt: skip
    spike_window: int = option(128, "good steps that a loss is judged by; before there are so many, none is", least=2)
    max_failures: int = option(
        3, "restarts of the worker group after a lost or hung worker; of a sweep's trial, after a lost one; -1: no end", least=-1
    )  # fmt: skip
    hang_timeout_s: float = option(
        120.0, "seconds without any progress after which a worker is hung and the group restarts; ten times that for "
        "starting up, the first step and the last files", above=0,
    )  # fmt: skip
    spares: bool = option(
        True, "half a minute into a run, start a process for each worker that does all imports and waits for a restart, "
        "which then takes seconds less (about 0.3 GB each)",
    )  # fmt: skip
    min_workers: Optional[int] = option(
        None, "elastic: go on with so many workers, or more, where train.workers have no room; None: wait for all of them",
        least=1,
    )  # fmt: skip
    resize_every_s: float = option(60.0, "elastic: seconds between looks for room for more workers", above=0)


@dataclass
class SweepConfig(Frozen):
    """Ray Tune over any declared key."""

    space: dict[str, Any] = option(
        {},
        "key: {loguniform: [a, b]} | {uniform: [a, b]} | {choice: [...]} | {randint: [a, b]} (b left out) | {grid: [...]}, "
        "each with when: {OTHER_KEY: VALUE} where it only applies then",
    )
    trials: int = option(
        8, "samples drawn from the space (times the grid's size); pbt and pb2: models trained side by side", least=1
    )
    concurrent: Optional[int] = option(None, "trials at a time; None: as the cluster has room for", least=1)
    searcher: str = option(
        "random",
        "random; grid: every combination of choices, once; tpe: Optuna's (Watanabe 2023, https://arxiv.org/abs/2304.11127); "
        "bohb: TPE by the results at the largest budget that has enough, with scheduler=hyperband (Falkner et al. 2018)",
        choices=("random", "grid", "tpe", "bohb"),
    )
    scheduler: str = option(
        "asha",
        "asha (Li et al. 2020, https://arxiv.org/abs/1810.05934): a trial waits at each rung until it is among the best there, "
        "hyperband: asha with a bracket for each number of rungs; median (Golovin et al. 2017) stops trials early; pbt (Jaderberg et al. 2017), pb2 (Parker-Holder et al. 2020) "
        "change values while models train; none",
        choices=("asha", "hyperband", "median", "pbt", "pb2", "none"),
    )
    grace_steps: Optional[int] = option(
        None, "steps that every trial takes, the first rung; None: max_steps / reduction squared", least=1
    )
    reduction: int = option(3, "asha, hyperband, bohb: one in so many goes on at each rung", least=2)
    interval: Optional[int] = option(
        None, "pbt, pb2: steps between looks at who copies whom; None: max_steps / 5", least=1
    )
    quantile: float = option(
        0.25,
        "pbt, pb2: share of the models that copy one of the best as many (Jaderberg et al. 2017)",
        above=0,
        most=0.5,
    )
    metric: Optional[str] = option(
        None, "validation metric; None: the objective's own; with searcher=tpe several: accuracy+ece (the first stops trials and chooses the bundle)",
    )  # fmt: skip
    mode: Optional[str] = option(None, "min or max, of several max+min; None: the objective's own")
    retrain_steps: Optional[int] = option(
        None, "train the best trial's values once more, for so many steps, and make the bundle of that", least=1
    )
    soup: Optional[int] = option(
        None, "average the weights of the best so many trials, greedily, if that is better on the validation split "
        "(Wortsman et al. 2022, https://arxiv.org/abs/2203.05482)", least=2,
    )  # fmt: skip


@dataclass
class EvaluateConfig(Frozen):
    """Metrics on held-out data."""

    split: str = option("test", "split to measure on", choices=("train", "validation", "test"))
    batch: int = option(32, "samples in one forward", least=1)
    confidence: float = option(0.95, "of the bootstrap intervals", above=0, most=0.999)
    resamples: int = option(2000, "bootstrap resamples (Efron & Tibshirani 1993)", least=100)
    against: Optional[str] = option(None, "a second bundle: paired comparison on the same examples")
    slice_column: Optional[str] = option(
        None, "column of the data's files that names a row's group: metrics by group, and the gaps between them"
    )
    pairs: Optional[str] = option(
        None, "bias check: JSON lines with two texts, a and b, that differ only in whom they are about"
    )
    generation: Optional[str] = option(
        None, "JSON lines with a text to start from and its reference: BLEU, chrF and ROUGE-L of what the model writes"
    )
    source_column: str = option("source", "generation: column with the text to start from")
    target_column: str = option("target", "generation: column with the reference")
    max_new_tokens: int = option(64, "generation: most tokens written for an example", least=1)
    max_examples: Optional[int] = option(None, "generation: take the first so many examples (None: all)", least=1)
    images: int = option(
        500, "a model that makes images: so many are made, one to each held-out image at most, and compared with those by the "
        "Fréchet distance (Heusel et al. 2017); 0: none", least=0,
    )  # fmt: skip
    features: Optional[str] = option(
        None, "bundle of objective=image_classification by whose last hidden states images are compared; None: by a convolution "
        "with random weights. Neither is Inception's: don't compare the distance with a published FID",
    )  # fmt: skip
    suite: str = option(
        "own", "own: the metrics here; lm_eval: EleutherAI's harness (pip install 'manta-train[lm-eval]')",
        choices=("own", "lm_eval"),
    )  # fmt: skip
    tasks: list[str] = option([], "suite=lm_eval: names of its tasks, or YAML files of tasks")
    endpoint: Optional[str] = option(
        None, "suite=lm_eval: ask the endpoint at this address (http://127.0.0.1:8000), which serves the bundle, instead of "
        "loading it; a key is taken from the variable OPENAI_API_KEY",
    )  # fmt: skip


@dataclass
class CardConfig(Frozen):
    """What the model card, README.md in a bundle, says in its author's words."""

    license: Optional[str] = option(None, "license of the model (SPDX); None: that of the data")
    intended_use: Optional[str] = option(None, "what the model is for; None: its task")
    limits: Optional[str] = option(
        None, "what it is not for, and where it fails; None: what follows from data and task"
    )


@dataclass
class PromoteConfig(Frozen):
    """How a registered version becomes the champion, and goes back."""

    model: Optional[str] = option(
        None, "registered name to promote under; None: the one that it has, else the bundle's own"
    )
    reason: Optional[str] = option(
        None, "promote although it isn't shown to be better than the champion: why (kept with the promotion)"
    )


@dataclass
class PlanConfig(Frozen):
    """What `manta plan` assumes; nothing of a run depends on it."""

    device: str = option(
        "here", "device of a worker: here (its matmul rate is measured), or one by its datasheet (engine/train/devices.py)",
        choices=("here", "v100_32gb", "a100_40gb", "a100_80gb", "h100_80gb", "h200_141gb"),
    )  # fmt: skip
    mfu: float = option(0.4, "share of the device's matrix-product rate that a step reaches", above=0, most=1)
    tokens: Optional[float] = option(
        None, "tokens to train on in all, for days and cost; None: those of max_steps", above=0
    )
    price: Optional[float] = option(None, "of a device for an hour, for the cost", least=0)
    write_rate: Optional[float] = option(
        None,
        "bytes a second that a worker writes of a checkpoint; None: measured in runs_dir (device=here), else 1e9",
        above=0,
    )
    json: Optional[str] = option(None, "file that gets all figures too, in bytes, seconds and FLOP/s")


@dataclass
class ConvertConfig(Frozen):
    """From a run's checkpoint to other formats, and back."""

    to: str = option(
        "bundle",
        "bundle: a Hugging Face folder; universal: DeepSpeed's universal checkpoint; "
        "checkpoint: a universal checkpoint becomes that of the run `name`, which then goes on from it",
        choices=("bundle", "universal", "checkpoint"),
    )
    step: Optional[int] = option(None, "the run's checkpoint after so many steps; None: the latest", least=1)
    folder: Optional[str] = option(
        None, "folder to write, or of to=checkpoint to read; None: <run>/bundle-STEP or <run>/universal"
    )


@dataclass
class ServeConfig(Frozen):
    """The endpoint."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network, for which keys are needed")
    port: int = option(8000, "TCP port", least=1, most=65535)
    names: Optional[str] = option(
        None, "names that clients ask for, one for each of `bundle`: a+b; None: the bundles' own. A name that is served already gets a new version"
    )  # fmt: skip

    haproxy: bool = option(
        False, "HAProxy listens, and gives each request to the ingress with the least to do: one that is lost before it has "
        "answered is replaced by another; needs pip install 'manta-train[haproxy]', or haproxy on the PATH",
    )  # fmt: skip
    ingresses: int = option(
        1, "processes that take requests, all on the head's node; several need serve.haproxy. Keys' limits hold over all of "
        "them; serve.max_queue is each one's", least=1, most=64,
    )  # fmt: skip

    # Replicas: how many, and where
    min_replicas: int = option(1, "replicas a bundle, at least; 0: none while nobody asks (the first to ask waits for one)", least=0)  # fmt: skip
    max_replicas: int = option(2, "replicas a bundle, at most", least=1)
    target_ongoing_requests: int = option(8, "requests in flight a replica that the autoscaler aims at", least=1)
    target_tokens: int = option(
        2048, "tokens queued and running a replica that it aims at; the larger of the two numbers of replicas holds", least=1
    )  # fmt: skip
    scale_look_s: float = option(1.0, "seconds between two counts of the work in flight; three are averaged", above=0)
    scale_up_s: float = option(5.0, "seconds that more work must last before replicas are added", least=0)
    scale_down_s: float = option(60.0, "seconds that less work must last before one is taken off", least=0)
    scale_to_zero_s: float = option(300.0, "min_replicas=0: seconds without work before the last one goes", least=0)
    max_replicas_per_node: Optional[int] = option(
        None, "replicas of a bundle on one node, at most: 1 spreads them (Ray Serve's bound: 100)", least=1, most=100
    )
    health_check_s: float = option(2.0, "seconds between two looks at a replica's health", above=0)
    drain_s: float = option(60.0, "seconds that a replica which is taken off may use for what it has begun", least=0)
    tries: int = option(3, "replicas that a request is given to, where one after the other is lost before its answer has begun", least=1)  # fmt: skip
    cpus_per_replica: float = option(0.5, "cores a replica", least=0)
    gpus_per_replica: float = option(0.0, "GPUs a replica", least=0)
    precision: str = option(
        "auto", "of the served weights; auto: as the bundle was written, fp32 where a processor has no bf16 in hardware",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    quantize: str = option(
        "none", "int8: linear layers' weights and the table of tokens as 8-bit integers with a scale for each output, half of "
        "bf16's memory; serve.precision is then that of the activations, and auto bf16 where the processor has it. Golden "
        "log-probabilities may be off by 0.5 nats",
        choices=("none", "int8"),
    )  # fmt: skip
    generator: str = option(
        "transformers", "what writes completions; vllm: vLLM, which has an environment of its own and embeds no texts",
        choices=("transformers", "vllm"),
    )  # fmt: skip
    vllm_python: Optional[str] = option(
        None, "generator=vllm: path, on the replicas' machines, of the Python of an environment with vLLM; None: the one that runs Manta"
    )  # fmt: skip
    vllm_options: dict[str, Any] = option(
        {}, "generator=vllm: engine arguments of vLLM (https://docs.vllm.ai/en/stable/configuration/engine_args), NAME: VALUE, that "
        "no option here stands for: {gpu_memory_utilization: 0.5}",
    )  # fmt: skip
    compile: bool = option(
        False,
        "torch.compile what a generator runs below its logits: a minute or two more until a replica is ready, and less time a token; "
        "a model of Llama's kind in fp32 or bf16 on a processor runs as one operation, and goes without it",
    )
    max_num_seqs: int = option(16, "sequences, or inputs of other tasks, in one forward", least=1)
    max_batched_tokens: Optional[int] = option(
        None, "tokens in one forward of a generator, about: long prompts are read in parts, so that others go on; None: 256, or "
        "what vLLM takes", least=1,
    )  # fmt: skip
    kv_cache_tokens: Optional[int] = option(
        None, "tokens in a replica's key/value cache; None: max_num_seqs whole sequences, or a quarter of the free memory (of a GPU, vLLM takes most)", least=16
    )  # fmt: skip
    num_speculative_tokens: int = option(
        0, "tokens guessed ahead of each text, from where its last ones stood in it before, and checked in one forward: the "
        "texts stay what they are, and come sooner where they repeat or quote", least=0, most=64,
    )  # fmt: skip
    draft_model: Optional[str] = option(
        None, "smaller bundle with the same tokens that guesses these tokens instead, of any text: a run's or registered name, or a "
        "folder. Its cache has as many tokens as the bundle's",
    )  # fmt: skip
    adapters: dict[str, Any] = option(
        {}, "LoRA adapters on the bundle, NAME: FOLDER in peft's format; a client asks for the model BUNDLE:NAME, and different "
        "ones share a forward",
    )  # fmt: skip
    max_adapters: int = option(16, "adapters in a replica's memory: each is loaded when it is asked for, in the place of the one longest out of use", least=1)  # fmt: skip
    queue_timeout_s: float = option(60.0, "seconds that a completion may wait for a place before it is refused (503)", above=0)  # fmt: skip
    batch_wait_s: float = option(
        0.0, "seconds that an input of the other tasks waits for others to share its forward, where none runs: those that "
        "come while one runs share the next in any case", least=0,
    )  # fmt: skip
    max_queue: int = option(256, "requests waiting before one is told to come again (429)", least=1)
    max_new_tokens: int = option(256, "most tokens that one completion may ask for", least=1)
    max_body_bytes: int = option(2**20, "largest request, in bytes", least=1024)
    max_audio_bytes: int = option(25 * 2**20, "largest request with an audio file, in bytes (OpenAI's: 25 MB)", least=1024)  # fmt: skip
    body_timeout_s: float = option(30.0, "seconds that a request's body may take to come (408)", above=0)
    keys_file: Optional[str] = option(
        None, "file of hashed keys; None: <runs_dir>/keys.json, where `manta key` keeps them. With keys there, or in the "
        "variable MANTA_KEYS, whoever asks needs one",
    )  # fmt: skip
    open: bool = option(False, "listen beyond loopback without keys: whoever reaches the address may ask")
    origins: list[str] = option(
        [], "web pages that may ask from a browser (CORS): [https://example.org], or ['*'] for all"
    )
    log_prompts: bool = option(
        False, "prompts in <runs_dir>/<name>/logs/access.jsonl too, with e-mail addresses and secrets masked"
    )
    tracing: Optional[str] = option(
        None, "OpenTelemetry collector that gets a trace of each request, by OTLP over HTTP: http://localhost:4318; headers, "
        "sampling and the like by the variables OTEL_*; needs pip install 'manta-train[tracing]'",
    )  # fmt: skip
    records_dir: Optional[str] = option(
        None, "folder for feedback, and for requests sent with store=true; None: <runs_dir>/<name>/feedback"
    )
    ready_timeout_s: float = option(600.0, "seconds that the replicas may take to load and verify", least=1)

    # A new version of what is served already
    strategy: str = option(
        "replace", "replace: it answers all once it is ready; canary: a growing share, or none if a test finds it worse; "
        "shadow: it gets copies, and is compared",
        choices=("replace", "canary", "shadow"),
    )  # fmt: skip
    canary_stages: list[float] = option([0.05, 0.25, 0.5, 1.0], "shares of the traffic, one after the other; the last is 1")  # fmt: skip
    canary_requests: int = option(200, "requests that the new version answers at each stage, at least", least=1)
    canary_stage_s: float = option(60.0, "seconds of each stage, at least", least=0)
    canary_false_alarm: float = option(
        0.01, "chance, at most, that a version as good as the old one is withdrawn (engine/serve/routing/sequential_test.py)", above=0, most=0.5
    )  # fmt: skip
    canary_error_margin: float = option(0.01, "error rate that the new version may have beyond the old one's", least=0, most=0.5)  # fmt: skip
    canary_latency_margin: float = option(0.2, "share by which its answers may take longer", least=0)
    shadow_share: float = option(1.0, "strategy=shadow: share of the requests that are copied", above=0, most=1)
    shadow_requests: int = option(200, "strategy=shadow: copies after which it is told how the two compare", least=1)
    keep_warm_s: float = option(
        600.0, "seconds that the replicas of the version before are kept, for a way back that takes no time", least=5
    )

    export: Optional[str] = option(
        None, "folder that gets the endpoint as a Serve config and as a KubeRay RayService; nothing is started"
    )
    image: str = option("ghcr.io/your-organisation/manta:0.1.0", "export: the container image (cluster/launcher/Containerfile)")  # fmt: skip
    detach: bool = option(
        False, "leave the endpoint up and return (a cluster started with `manta cluster up` is needed)"
    )


@dataclass
class ImproveConfig(Frozen):
    """`manta improve`: from what clients sent and said to a better version."""

    records: Optional[str] = option(None, "folder with the endpoint's records; None: <runs_dir>/*/feedback")
    every_s: Optional[float] = option(None, "seconds from one look to the next, until Ctrl-C; None: look once", above=0)
    apply: bool = option(
        False, "act where something has drifted: train, test and register; else only say what is found"
    )
    recent: int = option(1000, "requests, the latest so many, that are compared with what the bundle was trained on", least=20)  # fmt: skip
    min_requests: int = option(100, "recorded requests to judge by, at least", least=20)
    min_examples: int = option(50, "corrected or well rated examples to learn from, at least", least=1)
    significance: float = option(0.01, "chance, over all measures, to call drift what is none", above=0, most=0.5)
    least_psi: float = option(0.1, "population stability index from which on a shift matters (Siddiqi 2006: 0.1 moderate, 0.25 large)", above=0)  # fmt: skip
    least_bad: float = option(0.05, "growth of the share of bad ratings that matters", above=0, most=1)
    replay: float = option(2.0, "examples of the old training data for each new one, so that what was learnt stays", least=0)  # fmt: skip


@dataclass
class KeyConfig(Frozen):
    """`manta key`: who may ask an endpoint, and how much."""

    action: str = option("list", "new, list or revoke", choices=("new", "list", "revoke"))
    requests_per_minute: Optional[int] = option(None, "new: requests a minute; None: without limit", least=1)
    tokens_per_minute: Optional[int] = option(
        None, "new: tokens a minute, read and written; None: without limit", least=1
    )
    days: Optional[float] = option(None, "new: days until it ends; None: it doesn't", above=0)


@dataclass
class ClusterConfig(Frozen):
    """Where a job runs."""

    address: str = option(
        "local",
        "local: a Ray of this job's own; auto: the cluster of `manta cluster up`; or ray://host:port, host:port",
    )
    cpus: Optional[int] = option(None, "address=local: cores to use; None: all", least=1)
    dashboard: bool = option(False, "address=local: start Ray's dashboard (loopback only)")


@dataclass
class TrackingConfig(Frozen):
    """MLflow."""

    uri: Optional[str] = option(None, "MLflow server; None: an SQLite file, <runs_dir>/mlflow.db")
    experiment: str = option("manta", "MLflow experiment")
    enabled: bool = option(True, "log runs to MLflow (metrics.jsonl is written in any case)")
    alias: str = option("champion", "registry alias that `deploy` looks up, and `promote` and `rollback` move")


@dataclass
class DemoConfig(Frozen):
    """The whole life of a model in one job."""

    keep: bool = option(False, "leave the endpoint up at the end, until Ctrl-C")
    pretrain: list[str] = option([], "overrides of the demo's `manta pretrain`")
    sweep: list[str] = option([], "overrides of the demo's `manta sweep`")
    evaluate: list[str] = option([], "overrides of the demo's `manta evaluate`")


@dataclass
class Config(Frozen):
    """One job, whole."""

    job: str = option("pretrain", "the job that this config is for")
    name: str = option("run", "the run's name: its folder is <runs_dir>/<name>")
    runs_dir: str = option("runs", "where runs are kept")
    seed: int = option(0, "seeds initialization, order and sampling", least=0)
    resume: bool = option(False, "go on with the run of that name although the config has changed")
    profile: bool = option(
        False, "training: record three steps after a warm-up; <runs_dir>/<name>/profile gets a trace and a summary"
    )
    bundle: Optional[str] = option(
        None,
        "the start state, or what is evaluated or deployed: a run's name, a registered name or alias, or a bundle's or Hugging Face folder; deploy takes several: a+b",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    card: CardConfig = field(default_factory=CardConfig)
    promote: PromoteConfig = field(default_factory=PromoteConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    improve: ImproveConfig = field(default_factory=ImproveConfig)
    key: KeyConfig = field(default_factory=KeyConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.runs_dir) / self.name

    @property
    def total_steps(self) -> int:
        """Steps of the learning-rate schedule."""
        return self.schedule.total_steps or self.train.max_steps

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        return round(self.schedule.warmup_fraction * self.total_steps)

    @property
    def global_batch(self) -> int:
        """Samples in one step, over all workers."""
        if self.train.global_batch_tokens is not None:
            return self.train.global_batch_tokens // self.data.sequence_length
        return self.train.global_batch or 32

    @property
    def share(self) -> int:
        """Samples of a step that one worker has to work on, at most, alone or with those that share its sequences."""
        return math.ceil(self.global_batch * self.train.sequence_parallel / self.train.workers)

    @property
    def micro_batch(self) -> int:
        """Samples in one forward of one worker: what was asked for or found to fit, else up to 16, of a worker's share."""
        return min(self.train.micro_batch or 16, self.share)

    @property
    def tracking_uri(self) -> str:
        """MLflow's store."""
        return self.tracking.uri or f"sqlite:///{Path(self.runs_dir).absolute()}/mlflow.db"

    @property
    def keys_file(self) -> Path:
        """The hashed keys of endpoints."""
        return Path(self.serve.keys_file or Path(self.runs_dir) / "keys.json").absolute()

    @property
    def registry_dir(self) -> Path:
        """Where registered bundles are kept: MLflow's artifacts where it has no server, else copies of the server's."""
        return Path(self.runs_dir).absolute() / "registry"


# Keys that say where, how long or under which name a job runs, and not what it computes: they are no part of the
# config's identity, so changing one never makes another run of it.
LAYOUT = (
    "job", "name", "runs_dir", "resume", "profile", "cluster", "tracking", "serve", "demo", "zero", "evaluate", "card",
    "promote", "plan", "convert", "improve", "key",
    "train.workers", "train.gpus_per_worker", "train.cpus_per_worker", "train.micro_batch", "train.max_steps",
    "train.compile", "train.sequence_parallel", "train.activation_checkpointing", "train.checkpoint_every", "train.keep_checkpoints",
    "train.evaluate_every", "train.evaluate_samples", "train.max_failures", "train.max_skipped",
    "train.max_rollbacks", "train.on_failed_save", "train.hang_timeout_s", "train.min_workers", "train.resize_every_s",
    "train.spares",
    "data.store", "train.mirror", "train.keep_best", "train.patience", "objective.logits_chunk",
    "sweep.concurrent",
)  # fmt: skip


def declared(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted key, field, type) of every option, groups unfolded."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from declared(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + f.name, f, hints[f.name]


def type_name(hint: Any) -> str:
    """Name a declared type in plain words: 'integer', 'number', 'text', 'true or false', 'mapping'."""
    if get_origin(hint) in (Union, types.UnionType):
        return type_name(next(a for a in get_args(hint) if a is not type(None)))
    words = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        dict: "a mapping",
        list: "a list",
    }
    return words.get(get_origin(hint) or hint, str(hint))


def get(config: Any, key: str) -> Any:
    """Return the value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config
