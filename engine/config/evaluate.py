"""The options of evaluation, of the model card and of promotion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from engine.config.address import check_http_address
from engine.config.option import Frozen, option
from engine.errors import UserError


@dataclass
class EvaluateConfig(Frozen):
    """Metrics on held-out data."""

    split: str = option("test", "split to evaluate on", choices=("train", "validation", "test"))
    batch: int = option(32, "samples in a forward pass", least=1)
    confidence: float = option(0.95, "confidence level of the bootstrap intervals", above=0, most=0.999)
    resamples: int = option(2000, "bootstrap resamples (Efron & Tibshirani 1993)", least=100)
    against: Optional[str] = option(None, "a second bundle: paired comparison on the same examples")
    slice_column: Optional[str] = option(
        None, "column of the data's files with each row's group: metrics by group, and the gaps between groups"
    )
    pairs: Optional[str] = option(
        None, "bias check: JSON lines file with two texts in each row, a and b, that differ only in the group they mention"
    )  # fmt: skip
    generation: Optional[str] = option(
        None, "JSON lines file with a prompt and its reference in each row: BLEU, chrF and ROUGE-L of the generated texts"
    )  # fmt: skip
    source_column: str = option("source", "generation: column with the prompt")
    target_column: str = option("target", "generation: column with the reference")
    max_new_tokens: int = option(64, "generation: maximum number of tokens generated for an example", least=1)
    max_examples: Optional[int] = option(
        None, "generation: maximum number of examples, the first ones; None: all", least=1
    )
    images: int = option(
        500, "image generation: number of generated images, at most one for each held-out image, that are compared with those by the "
        "Fréchet distance (Heusel et al. 2017); 0: none", least=0,
    )  # fmt: skip
    features: Optional[str] = option(
        None, "bundle of objective=image_classification whose last hidden states are the images' features; None: a convolution "
        "with random weights. Neither is Inception: don't compare the distance with a published FID",
    )  # fmt: skip
    suite: str = option(
        "own", "own: Manta's metrics; lm_eval: EleutherAI's harness (pip install 'manta-train[lm-eval]')",
        choices=("own", "lm_eval"),
    )  # fmt: skip
    tasks: list[str] = option([], "suite=lm_eval: names of its tasks, or YAML files of tasks")
    endpoint: Optional[str] = option(
        None, "suite=lm_eval: address of an endpoint that serves the bundle (http://127.0.0.1:8000), to query instead of "
        "loading it; an API key is taken from the environment variable OPENAI_API_KEY",
    )  # fmt: skip

    def check(self) -> None:
        """Check the options of the evaluation harness."""
        if (self.suite == "lm_eval") != bool(self.tasks):
            raise UserError(
                "evaluate.suite=lm_eval and evaluate.tasks=[NAME_OR_FILE,...] go together: give both or neither"
            )
        if self.endpoint and self.suite != "lm_eval":
            raise UserError("evaluate.endpoint is for evaluate.suite=lm_eval: leave it out, or name tasks")
        check_http_address("evaluate.endpoint", self.endpoint, "http://127.0.0.1:8000")


@dataclass
class CardConfig(Frozen):
    """What the author states in the model card, README.md in a bundle."""

    license: Optional[str] = option(
        None, "license of the model (SPDX); None: the license of the data", formerly="licence"
    )
    intended_use: Optional[str] = option(None, "what the model is for; None: its task")
    limits: Optional[str] = option(
        None, "what the model is not for, and where it fails; None: what follows from its data and task"
    )


@dataclass
class PromoteConfig(Frozen):
    """How a registered version becomes the champion, and how that is undone."""

    model: Optional[str] = option(
        None, "registered name to promote under; None: the bundle's registered name, else its own name"
    )
    reason: Optional[str] = option(
        None, "promote a bundle that is not shown to be better than the champion, for this reason (recorded with the promotion)"
    )  # fmt: skip
