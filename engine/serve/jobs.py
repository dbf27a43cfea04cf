"""Messages between an ingress and the replicas of a model: the jobs that a replica does, and their results.

They cross processes, pickled by Ray or by `engine.serve.routing.ipc`, and import neither torch nor pydantic. A replica
that cannot do a job returns a `Failure` in place of the result; an exception means that the replica itself is broken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_LOGPROBS = 20  # likeliest tokens returned with each token, at most

Prompt = str | list[int]  # a text, or token ids


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled, in OpenAI's terms."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # probability mass of the nucleus (Holtzman et al. 2020)
    top_k: int = 0  # 0: all tokens
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time that it was generated
    presence_penalty: float = 0.0  # subtracted once
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before sampling."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


class Job(Protocol):
    """What a replica is asked to do."""

    @property
    def is_deterministic(self) -> bool:
        """Whether the same model gives the same result each time."""


class Result(Protocol):
    """What a replica returns for a job."""

    @property
    def num_units(self) -> int:
        """Number of units, at least 1, by which the time of a job is divided: generated tokens, or inputs."""

    @property
    def comparable(self) -> Any:
        """The part that two versions of a model are compared by: nested lists and dicts of texts and numbers."""


@dataclass(frozen=True)
class Failure:
    """A job that a replica refused or could not finish; fields of OpenAI's error body."""

    message: str
    param: str | None = None  # field of the request that is at fault
    status: int = 400  # HTTP's; 500 or more: not the request's fault


@dataclass(frozen=True)
class GenerationJob:
    """Text generation: `n` choices for each prompt, or for one chat. Replica.complete, Replica.stream."""

    prompts: list[Prompt]  # empty for a chat
    messages: list[dict[str, str]] | None  # a chat's, as chat templates take them; None: no chat
    max_tokens: int | None  # of each choice; None: as many as there is room for
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    stop: list[str] = field(default_factory=list)
    seed: int | None = None  # choice i of a prompt is sampled with seed + i
    logprobs: int | None = None  # number of likeliest tokens returned with each token; None: no log-probabilities
    echo: bool = False  # return the prompt before the generated text
    json_schema: str | None = None  # that the text has to follow
    stream: bool = False
    client: str = ""  # clients take turns in a replica's queue
    adapter: str = ""  # name of a LoRA adapter; "": the base model

    @property
    def is_chat(self) -> bool:
        """Whether the job is a chat."""
        return self.messages is not None

    @property
    def is_deterministic(self) -> bool:
        """Whether no token is sampled without a seed."""
        return self.sampling.temperature == 0 or self.seed is not None


@dataclass(frozen=True)
class PromptInfo:
    """What is known of a generation job once its prompts are tokenized; the first message of a stream."""

    prompt_tokens: int
    cached_tokens: int  # of these, found in the prefix cache
    echoed_texts: list[str]  # the prompt of each choice, if it is echoed; else empty


@dataclass(frozen=True)
class Timings:
    """Seconds of one finished sequence."""

    queue_s: float  # until it had a slot
    first_token_s: float | None  # from queue to first token; None: no token came
    inter_token_s: float | None  # between two tokens, its mean; None: fewer than two came


@dataclass(frozen=True)
class Choice:
    """One choice of a generation; in a stream, what is new of it."""

    index: int
    text: str
    num_tokens: int  # generated so far
    finish_reason: str | None = None  # stop, length; None: unfinished
    logprobs: dict[str, Any] | None = None  # in OpenAI's form
    timings: Timings | None = None  # None: unfinished


@dataclass(frozen=True)
class StreamChunk:
    """A message of a stream after the first: what is new of some choices."""

    choices: list[Choice]


@dataclass(frozen=True)
class GenerationResult:
    """All choices of a generation job, by index."""

    prompt: PromptInfo
    choices: list[Choice]

    @property
    def num_units(self) -> int:
        """Number of generated tokens."""
        return max(sum(choice.num_tokens for choice in self.choices), 1)

    @property
    def comparable(self) -> Any:
        """The texts, and why each ended."""
        return [{"text": choice.text, "finish_reason": choice.finish_reason} for choice in self.choices]


StreamMessage = PromptInfo | StreamChunk | Failure


@dataclass(frozen=True)
class ClassificationJob:
    """Classification of texts. Replica.classify."""

    texts: list[str]
    is_deterministic = True


@dataclass(frozen=True)
class Classification:
    """The class of one text."""

    label: str
    scores: dict[str, float]  # probability of each label
    num_tokens: int  # of the text


@dataclass(frozen=True)
class ClassificationResult:
    """The class of each text of a job."""

    items: list[Classification]

    @property
    def num_units(self) -> int:
        """Number of texts."""
        return max(len(self.items), 1)

    @property
    def comparable(self) -> Any:
        """Labels and scores."""
        return [{"label": item.label, "scores": item.scores} for item in self.items]


@dataclass(frozen=True)
class EmbeddingJob:
    """Embedding of texts. Replica.embed."""

    inputs: list[Prompt]
    is_deterministic = True


@dataclass(frozen=True)
class EmbeddingResult:
    """The embedding of each input of a job, of length 1."""

    vectors: list[list[float]]
    prompt_tokens: int  # of all inputs

    @property
    def num_units(self) -> int:
        """Number of inputs."""
        return max(len(self.vectors), 1)

    @property
    def comparable(self) -> Any:
        """The embeddings."""
        return self.vectors


@dataclass(frozen=True)
class ImageJob:
    """An image of a prompt from each seed. Replica.generate_images."""

    prompt: str
    seeds: list[int]
    is_deterministic = True


@dataclass(frozen=True)
class ImageResult:
    """The images of a job."""

    images: list[str]  # PNG files in base64

    @property
    def num_units(self) -> int:
        """Number of images."""
        return max(len(self.images), 1)

    @property
    def comparable(self) -> Any:
        """The files."""
        return self.images


@dataclass(frozen=True)
class TranscriptionJob:
    """Transcription of an audio file. Replica.transcribe."""

    audio: bytes  # the file
    temperature: float = 0.0
    language: str | None = None  # ISO 639
    with_logprob: bool = False  # compute the transcript's mean log-probability

    @property
    def is_deterministic(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0


@dataclass(frozen=True)
class TranscriptionResult:
    """A transcript."""

    text: str
    tokens: list[int]
    duration_s: float  # of the audio
    prompt_tokens: int  # positions of the audio in the encoder
    completion_tokens: int
    avg_logprob: float | None = None  # mean log-probability of the tokens, in nats; None: not asked for

    num_units = 1

    @property
    def comparable(self) -> Any:
        """The transcript, and what was computed of it."""
        return {"text": self.text, "duration_s": self.duration_s, "avg_logprob": self.avg_logprob}


@dataclass(frozen=True)
class ImageSize:
    """Size of the images that a model makes."""

    side: int  # pixels
    num_tokens: int  # patches


@dataclass(frozen=True)
class ModelInfo:
    """What a replica's model is and can do, by which an ingress checks requests. Replica.describe."""

    task: str  # completion, classification, transcription, images, or the objective's name
    hash: str  # of the bundle
    max_positions: int
    vocab_size: int
    can_embed: bool
    audio_positions: int = 0  # of the encoder, for one window of audio
    adapters: dict[str, str] = field(default_factory=dict)  # LoRA adapter -> its hash
    image: ImageSize | None = None


def model_info_from(plain: dict[str, Any]) -> ModelInfo:
    """Return a model's info from what `dataclasses.asdict` and JSON have made of it."""
    return ModelInfo(**plain | {"image": ImageSize(**plain["image"]) if plain["image"] else None})
