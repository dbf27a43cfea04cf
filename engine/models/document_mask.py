"""Several documents in one row of a batch, kept apart: positions restart, attention stays within. B batch, L length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError


def document_mask(starts: Sequence[np.ndarray], lengths: Sequence[int], width: int, causal: bool) -> dict[str, Tensor]:
    """Return the model's inputs that keep the documents of each row apart; padding counts as one more document.

    `starts` holds where the documents of each row begin, `lengths` how long the rows are, `width` how long all are made.
    Positions restart at each document; transformers derives a causal mask from that where it is given no other
    (`masking_utils.find_packed_sequence_indices`). A bidirectional one takes a mask too: bool [B, 1, L, L].
    """
    position_BL = torch.empty((len(starts), width), dtype=torch.int64)
    document_BL = torch.empty((len(starts), width), dtype=torch.int64)
    for i, (begins, length) in enumerate(zip(starts, lengths, strict=True)):
        first = np.zeros(width, np.int64)
        first[begins[begins < length]] = 1
        first[length : length + 1] = 1
        number = np.cumsum(first) - 1
        position_BL[i] = torch.as_tensor(np.arange(width) - np.flatnonzero(first)[number])
        document_BL[i] = torch.as_tensor(number)
    if causal:
        return {"position_ids": position_BL}
    return {
        "position_ids": position_BL,
        "attention_mask": document_BL[:, None, :, None] == document_BL[:, None, None, :],
    }


@torch.no_grad()
def check_document_mask(config: Any, auto_class: str, attention: str) -> None:
    """Raise UserError for an architecture whose attention looks into other documents all the same.

    Tried on one block of it, with a vocabulary of 16: a document must give the same alone and after another one.
    """
    import transformers

    small = copy.deepcopy(config)
    small.vocab_size, small.num_hidden_layers = 16, 1
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    made = (
        getattr(transformers, auto_class).from_config(small, dtype=torch.float32, attn_implementation=attention).eval()
    )
    causal = auto_class == "AutoModelForCausalLM"
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    options = {"use_cache": False} if causal else {}

    def logits(first: int) -> Tensor:
        begins = np.array([0, 3]) if not first else np.array([0])
        inputs = document_mask([begins], [7 - first], 7 - first, causal)
        found: Tensor = made(input_ids=ids[:, first:], **inputs, **options).logits[:, 3 - first :]
        return found

    try:
        same = torch.allclose(logits(0), logits(3), atol=1e-4)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"data.within_documents is not for model.type={config.model_type}, whose attention in transformers takes no notice of "
            "documents: leave it out, or use another model.type (llama, gpt2, bert)"
        )
