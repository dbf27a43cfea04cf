"""What each objective declares about itself, which other modules read instead of lists of names."""

from __future__ import annotations

import pytest
import torch

from engine.evaluate.metrics import METRICS
from engine.objectives import contract
from engine.objectives.contract import objective_class, objective_names
from engine.train.process_group import ProcessGroup

ENDPOINT_TASKS = {
    "causal_lm": "completion",
    "classification": "classification",
    "diffusion": "images",
    "speech_recognition": "transcription",
}
PEFT_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}


@pytest.mark.parametrize("name", objective_names())
def test_declarations_are_complete(name: str) -> None:
    task = objective_class(name)
    assert task.metric
    assert task.mode in ("min", "max")
    assert task.architectures
    assert set(task.evaluation_metrics) <= set(METRICS)
    assert task.endpoint_task == ENDPOINT_TASKS.get(name)
    assert task.peft_task_type == PEFT_TASK_TYPES.get(name)
    assert task.is_causal == (name == "causal_lm")
    assert task.can_embed == (name in ("causal_lm", "masked_lm", "classification"))
    assert task.supports_packing == task.supports_sequence_parallel == (name in ("causal_lm", "masked_lm"))


def test_classifiers_declare_classification_metrics() -> None:
    classifiers = [name for name in objective_names() if objective_class(name).is_classifier]
    assert classifiers == ["classification", "image_classification"]
    for name in classifiers:
        metrics = objective_class(name).evaluation_metrics
        assert {"macro_f1", "weighted_f1", "matthews", "calibration_error"} <= set(metrics)


def test_process_group_of_training_has_what_objectives_use() -> None:
    group: contract.ProcessGroup = ProcessGroup(0, 1, torch.device("cpu"))  # mypy compares the signatures
    rows = torch.ones(2, 3)
    assert group.rank == 0
    assert group.all_gather_rows(rows) == [rows]
