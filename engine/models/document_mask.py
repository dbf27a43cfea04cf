"""Packed documents in one row of a batch: positions restart at each, and attention stays within it. B batch, L length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError


def document_mask(starts: Sequence[np.ndarray], lengths: Sequence[int], width: int, causal: bool) -> dict[str, Tensor]:
    """Return the model inputs that keep attention within each document of a row; padding counts as one more document.

    `starts` holds the first positions of each row's documents, `lengths` the rows' lengths, `width` the padded length.
    Positions restart at each document; transformers derives a causal mask from them if it is given no other
    (`masking_utils.find_packed_sequence_indices`). Bidirectional attention gets a mask as well: bool [B, 1, L, L].
    """
    position_BL = torch.empty((len(starts), width), dtype=torch.int64)
    document_BL = torch.empty((len(starts), width), dtype=torch.int64)
    for i, (row_starts, length) in enumerate(zip(starts, lengths, strict=True)):
        is_start_L = np.zeros(width, np.int64)
        is_start_L[row_starts[row_starts < length]] = 1
        is_start_L[length : length + 1] = 1
        document_L = np.cumsum(is_start_L) - 1
        position_BL[i] = torch.as_tensor(np.arange(width) - np.flatnonzero(is_start_L)[document_L])
        document_BL[i] = torch.as_tensor(document_L)
    if causal:
        return {"position_ids": position_BL}
    return {
        "position_ids": position_BL,
        "attention_mask": document_BL[:, None, :, None] == document_BL[:, None, None, :],
    }


@torch.no_grad()
def check_document_mask(config: Any, auto_class: str, attention: str, causal: bool) -> None:
    """Raise UserError for an architecture whose attention ignores the document mask.

    Tested on a model with one block and a vocabulary of 16: a document must get the same logits alone and after another one.
    """
    import transformers

    tiny = copy.deepcopy(config)
    tiny.vocab_size, tiny.num_hidden_layers = 16, 1
    tiny.pad_token_id = tiny.bos_token_id = tiny.eos_token_id = None
    model = (
        getattr(transformers, auto_class).from_config(tiny, dtype=torch.float32, attn_implementation=attention).eval()
    )
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    options = {"use_cache": False} if causal else {}

    def second_document_logits(first: int) -> Tensor:
        starts = np.array([0, 3]) if not first else np.array([0])
        inputs = document_mask([starts], [7 - first], 7 - first, causal)
        logits: Tensor = model(input_ids=ids[:, first:], **inputs, **options).logits[:, 3 - first :]
        return logits

    try:
        same = torch.allclose(second_document_logits(0), second_document_logits(3), atol=1e-4)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"data.within_documents is not for model.type={config.model_type}, whose attention in transformers ignores the document "
            "mask: leave it out, or use another model.type (llama, gpt2, bert)"
        )
