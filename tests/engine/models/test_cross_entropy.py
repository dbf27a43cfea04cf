"""The chunked cross-entropy equals torch's in loss and gradients, for any chunk, and never holds all logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.models.cross_entropy import IGNORE_INDEX, summed_cross_entropy, token_scores
from engine.train.job import TrainJob
from tests.engine.objectives.conftest import gradients
from tests.engine.train.ranks import losses, run_ranks

V, B, L = 97, 3, 16


def language_model(tied: bool, kind: str = "llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        tie_word_embeddings=tied, pad_token_id=0, **options,
    )  # fmt: skip
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


def batch(ignored: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    torch.manual_seed(1)
    ids, targets = torch.randint(0, V, (2, B, L))
    if ignored:
        targets[torch.rand(B, L) < 0.8] = IGNORE_INDEX
    return {"input_ids": ids}, targets, int((targets != IGNORE_INDEX).sum())


def full_logits_loss(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = model(**inputs).logits.flatten(0, 1).float()
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss + z_loss * (logits.logsumexp(1) ** 2)[targets.flatten() != IGNORE_INDEX].sum()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [5, None])
def test_loss_and_gradients_equal_torchs(tied: bool, ignored: bool, z_loss: float, chunk: int | None) -> None:
    model = language_model(tied)
    inputs, targets, count = batch(ignored)
    ours = summed_cross_entropy(model, inputs, targets, count, z_loss, chunk)
    actual = gradients(model, ours / 7)
    theirs = full_logits_loss(model, inputs, targets, z_loss)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for name, gradient in gradients(model, theirs / 7).items():
        assert (actual[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_head_with_bias() -> None:
    model = language_model(False, "bert")
    nn.init.normal_(model.get_output_embeddings().bias)  # type: ignore[operator]
    inputs, targets, count = batch(ignored=True)
    ours = summed_cross_entropy(model, inputs, targets, count, chunk_tokens=4)
    actual = gradients(model, ours / 7)
    theirs = full_logits_loss(model, inputs, targets)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for name, gradient in gradients(model, theirs / 7).items():
        assert (actual[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name


def test_token_scores_equal_those_from_full_logits() -> None:
    model = language_model(True)
    inputs, targets, _ = batch(ignored=True)
    nll, correct = token_scores(model, inputs, targets, chunk_tokens=5)
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(correct, (logits.argmax(2) == targets))
    assert torch.equal(model(**inputs).logits, logits)  # the head returns logits again


def test_model_that_transforms_its_logits_uses_full_logits() -> None:
    model = language_model(True, "gemma2", final_logit_softcapping=2.0, num_key_value_heads=2, head_dim=8)
    inputs, targets, count = batch(ignored=False)
    for _ in range(2):
        ours = summed_cross_entropy(model, inputs, targets, count)
        assert float(ours) == pytest.approx(float(full_logits_loss(model, inputs, targets)), rel=1e-6)
    nll, _ = token_scores(model, inputs, targets)
    assert float(nll.sum()) == pytest.approx(float(ours), rel=1e-5)


def test_only_one_chunk_of_logits_exists_at_a_time() -> None:
    largest = 0

    class LogitsWatcher(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,) and tensor.shape != (16, V):  # a weight
                    largest = max(largest, tensor.numel())
            return out

    model = language_model(False)
    inputs, targets, count = batch(ignored=False)
    with LogitsWatcher():
        summed_cross_entropy(model, inputs, targets, count, chunk_tokens=8).backward()
    assert largest == 8 * V
    with LogitsWatcher():
        summed_cross_entropy(model, inputs, targets, count, chunk_tokens=0).backward()
    assert largest == B * L * V


def test_deepcopy_after_a_loss_has_its_own_head_override() -> None:
    model = language_model(True)
    inputs, targets, count = batch(ignored=False)
    before = summed_cross_entropy(model, inputs, targets, count)
    model_copy = copy.deepcopy(model)
    assert float(summed_cross_entropy(model_copy, inputs, targets, count)) == float(before)
    assert model_copy.get_output_embeddings().override.head is model_copy.get_output_embeddings()  # type: ignore[operator]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_loss_curve_equals_that_of_full_logits_at_every_zero_stage(tiny: Config, tied: bool) -> None:
    data = prepare(tiny)
    base = {"model.tie_word_embeddings": tied, "objective.z_loss": 1e-3, "train.max_steps": 4}
    values = [("full", {"zero.stage": 0, "objective.logits_chunk": 0})]
    values += [(f"chunked-{stage}", {"zero.stage": stage, "objective.logits_chunk": 24}) for stage in range(4)]
    jobs = [
        TrainJob(with_values(tiny, {**base, **change, "name": f"{name}-{tied}", "train.workers": 2}), data)
        for name, change in values
    ]
    first, *others = run_ranks(jobs, 2)
    for lines in others:
        assert losses(lines) == pytest.approx(losses(first), abs=1e-5)
        assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in first], rel=1e-4)
    assert Path(jobs[0].config.run_dir).exists()
