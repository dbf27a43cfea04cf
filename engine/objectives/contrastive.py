"""Tell which caption belongs to which image, two towers (Radford et al. 2021, CLIP). Shapes: B micro-batch, N global batch, D width.

The loss of a pair depends on all pairs of the global batch, wherever they are. So once a step every rank embeds its
micro-batches without gradients, all embeddings are gathered, and the loss's gradient with respect to each of them is
computed; the micro-batches' own passes then carry that gradient on to the weights (Gao et al. 2021, GradCache,
https://arxiv.org/abs/2101.06983). Loss and gradient are those of the whole batch, for any split of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.images import Pictures, from_base64, normalized, pixels, png
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.size import Stack, flops_per_token
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Ranks, Scores, pad_rows
from engine.objectives.image_classification import patches

CHUNK = 1024  # captions whose similarities to all images are held at a time


@dataclass(frozen=True)
class Seen(Batch):
    """A micro-batch whose pairs were compared with those of the whole global batch."""

    value: float  # its pairs' share of the summed loss
    image_gradient_BD: Tensor  # of the summed loss with respect to each embedding
    text_gradient_BD: Tensor
    scale_gradient: float  # this micro-batch's share of that with respect to the logits' scale


class Contrastive(contract.Objective):
    """Images with captions, cross-entropy of each over all of the other in the global batch."""

    data_kind = "captioned"
    auto_class = "AutoModelForZeroShotImageClassification"
    architectures = ("CLIPModel",)
    metric = "accuracy"
    mode = "max"
    servable = False
    image_tokens = 1  # until the model is met

    def __init__(self, *taken: Any, **named: Any) -> None:
        """Take what every task takes; the names of the classes are no part of the model, whose classes are captions."""
        super().__init__(*taken, **named)
        self.labels = []

    def bind_model(self, config: Any) -> None:
        """Count the tokens of an image. Raises UserError for a model that has no two towers, or reads shorter captions."""
        images, texts = (getattr(config, name, None) for name in ("vision_config", "text_config"))
        if images is None or texts is None:
            raise UserError(
                f"model.type={config.model_type} has not a tower each for images and texts: use model=clip_5m"
            )
        if self.sequence_length > texts.max_position_embeddings:
            raise UserError(
                f"captions of up to data.sequence_length {self.sequence_length:,} tokens are over the model's "
                f"{texts.max_position_embeddings:,} positions: use data.sequence_length={texts.max_position_embeddings}"
            )
        self.image_tokens = patches(images) + 1

    def stacks(self, config: Any) -> list[Stack]:
        """Return the tower of images and that of captions, of full length."""
        return [
            Stack(config.vision_config, patches(config.vision_config) + 1),
            Stack(config.text_config, self.sequence_length),
        ]

    def flops(self, model: nn.Module) -> float:
        """Add up the two towers; the pass that only looks is not counted, as activations computed again aren't."""
        towers: Any = model
        images, texts = self.stacks(model.config)
        return images.tokens * flops_per_token(towers.vision_model, images.config, images.tokens) + (
            texts.tokens * flops_per_token(towers.text_model, texts.config, texts.tokens)
        )

    def samples(self, split: Split) -> Pictures:
        """Take the captioned images."""
        return Pictures(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Cut and scale {"image": a file in base64, "text"}, and tokenize the caption."""
        return {
            "pixels": pixels(from_base64(example["image"]), self.image_processor),
            "tokens": self._tokens(example["text"]),
        }

    def _tokens(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, truncation=True, max_length=self.sequence_length)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Normalize the images as the image processor does, pad the captions; a target says which caption it is."""
        pixels_BSSC = np.stack([sample["pixels"] for sample in samples])
        ids_BL, mask_BL = pad_rows([sample["tokens"] for sample in samples], self.tokenizer.pad_token_id)
        inputs = {
            "pixel_values": torch.from_numpy(normalized(pixels_BSSC, self.image_processor)),
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
        }
        which_B = torch.tensor(
            [hash(tuple(sample["tokens"].tolist())) for sample in samples]
        )  # integers hash the same everywhere
        return Batch(inputs, which_B, len(samples), tokens=int(mask_BL.sum()) + len(samples) * self.image_tokens)

    def before_step(
        self, model: nn.Module, batches: list[tuple[Batch, float]], ranks: Ranks
    ) -> list[tuple[Batch, float]]:
        """Compare all pairs of the global batch, and give each micro-batch what concerns its own."""
        device = batches[0][0].targets.device
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):  # dropout drops the same again
            own = [embed(model, batch) for batch, _ in batches]
        marks = [torch.tensor([[weight, k]], device=device) for k, (_, weight) in enumerate(batches)]
        rows = torch.cat(
            [torch.cat([i, t, mark.expand(len(i), 2)], dim=1) for (i, t, _), mark in zip(own, marks, strict=True)]
        )
        gathered = ranks.gather_rows(rows)
        every = torch.cat(gathered)
        first = sum(len(found) for found in gathered[: ranks.rank])
        order = every[:, -1].argsort(
            stable=True
        )  # micro-batch by micro-batch, in each rank by rank: the global batch's
        order = order[every[order, -2] > 0]
        width = own[0][0].shape[1]
        image_ND, text_ND = every[order, :width], every[order, width : 2 * width]
        share = compared(image_ND, text_ND, own[0][2])

        place = torch.full((len(every),), -1, device=device)
        place[order] = torch.arange(len(order), device=device)
        mine = place[first : first + len(rows)].split([len(i) for i, _, _ in own])
        return [(share.of(batch, place_B), weight) for (batch, weight), place_B in zip(batches, mine)]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the share of the global batch's loss, with its gradient; of a batch by itself, the loss within it."""
        image_BD, text_BD, scale = embed(model, batch)
        if not isinstance(batch, Seen):
            logits_BB = text_BD @ image_BD.T * scale
            right_B = torch.arange(len(logits_BB), device=logits_BB.device)
            both = [F.cross_entropy(logits, right_B, reduction="sum") for logits in (logits_BB, logits_BB.T)]
            return Loss((both[0] + both[1]) / 2, batch.count)
        carried = (
            (image_BD * batch.image_gradient_BD).sum()
            + (text_BD * batch.text_gradient_BD).sum()
            + scale * batch.scale_gradient
        )
        return Loss(carried - carried.detach() + batch.value, batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Give the two embeddings of each pair, the scale of their product, and which caption it is."""
        image_BD, text_BD, scale = embed(model, batch)
        return {
            "image": image_BD.cpu().numpy(),
            "text": text_BD.cpu().numpy(),
            "scale": np.full(len(image_BD), float(scale)),
            "caption": batch.targets.cpu().numpy(),
        }

    def complete(self, scores: Scores) -> Scores:
        """Compare all pairs that were scored: the loss of each, and whether it found its caption and was found by it."""
        image_ND, text_ND = torch.as_tensor(scores["image"]), torch.as_tensor(scores["text"])
        share = compared(image_ND, text_ND, torch.tensor(scores["scale"][0], dtype=torch.float32))
        _, first_K, which_N = np.unique(scores["caption"], return_index=True, return_inverse=True)
        text_KD = text_ND[torch.as_tensor(first_K)]
        caption_N, image_K = nearest(image_ND, text_KD), nearest(text_KD, image_ND)
        return {
            "nll": share.loss_N.double().numpy(),
            "found": caption_N == which_N,
            "found_by": which_N[image_K][which_N] == which_N,
        }

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Give the recalls at 1, among all that were scored, and the mean loss.

        `accuracy` is the share of images whose likeliest caption, of all different ones, is theirs: the zero-shot accuracy
        where captions name classes. `image_recall` is the share of captions whose likeliest image has that caption.
        """
        return {
            "accuracy": float(scores["found"].mean()),
            "image_recall": float(scores["found_by"].mean()),
            "loss": float(scores["nll"].mean()),
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Choose for each {"image", "captions"}, alone: the likeliest caption and the probability of each."""
        return [self._choose(model, request) for request in requests]

    def _choose(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        captions, image = request["captions"], pixels(from_base64(request["image"]), self.image_processor)
        batch = self.collate([{"pixels": image, "tokens": self._tokens(caption)} for caption in captions])
        batch = batch.to(next(model.parameters()).device)
        batch.inputs["pixel_values"] = batch.inputs["pixel_values"][:1]
        image_1D, text_BD, scale = (part.cpu() for part in embed(model, batch))
        found_B = (text_BD @ image_1D[0] * scale).softmax(0)
        return {"label": captions[int(found_B.argmax())], "scores": dict(zip(captions, found_B.tolist(), strict=True))}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take three images, each with the captions of the three."""
        few = range(min(3, split.rows))
        captions = [self.tokenizer.decode(split.document(i).tolist(), skip_special_tokens=True) for i in few]
        return [{"image": png(split.image(i)), "captions": sorted(set(captions))} for i in few]


def embed(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings of a batch's images and captions, each of length 1, [B, D], and the learnt scale of their product; in fp32."""
    module = getattr(model, "module", model)
    if add_scale not in module._forward_hooks.values():
        module.register_forward_hook(add_scale, prepend=True)
    outputs = model(**batch.inputs)
    return outputs.image_embeds.float(), outputs.text_embeds.float(), outputs["scale"].view(()).float()


def add_scale(module: Any, inputs: Any, outputs: Any) -> Any:
    """Add the scale to a model's outputs, while it is at hand: under ZeRO-3 a weight is whole during the forward pass only."""
    outputs["scale"] = module.logit_scale.exp()
    return outputs


def nearest(rows: Tensor, others: Tensor) -> np.ndarray:
    """Return for each row, [n, D], the number of the most similar of the others: int64 [n]."""
    return torch.cat([(chunk @ others.T).argmax(1) for chunk in rows.split(CHUNK)]).numpy()


@dataclass(frozen=True)
class Compared:
    """What comparing N images with N captions gives, the summed loss being that of CLIP times N."""

    loss_N: Tensor  # each pair's share of it
    image_gradient_ND: Tensor
    text_gradient_ND: Tensor
    scale_gradient: float

    def of(self, batch: Batch, place_B: Tensor) -> Seen:
        """Add to a micro-batch what concerns its pairs; places of -1 are in one of weight 0, where it doesn't matter."""
        at_B = place_B.clamp(min=0)
        return Seen(
            **{f.name: getattr(batch, f.name) for f in fields(Batch)},
            value=float(self.loss_N[at_B].sum()),
            image_gradient_BD=self.image_gradient_ND[at_B],
            text_gradient_BD=self.text_gradient_ND[at_B],
            scale_gradient=self.scale_gradient * len(at_B) / len(self.loss_N),
        )


@torch.no_grad()
def compared(image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Compared:
    """Compute the cross-entropy of each caption over all images and of each image over all captions, and its gradient.

    With P the softmax of the logits over images, Q that over captions, and I the right pairs, the gradient with respect to
    the logits is (P + Q - 2 I) / 2. CHUNK x N logits are held at a time.
    """
    count, chunks = len(image_ND), range(0, len(image_ND), CHUNK)
    over_images_N, over_texts_N = image_ND.new_empty(count), image_ND.new_full((count,), -torch.inf)
    for at in chunks:
        logits_CN = text_ND[at : at + CHUNK] @ image_ND.T * scale
        over_images_N[at : at + CHUNK] = logits_CN.logsumexp(1)
        over_texts_N = torch.logaddexp(over_texts_N, logits_CN.logsumexp(0))
    image_gradient_ND, text_gradient_ND = torch.zeros_like(image_ND), torch.empty_like(text_ND)
    scale_gradient = torch.zeros((), device=image_ND.device)
    for at in chunks:
        similar_CN = text_ND[at : at + CHUNK] @ image_ND.T
        logits_CN = similar_CN * scale
        gradient_CN = (logits_CN - over_images_N[at : at + CHUNK, None]).exp() + (logits_CN - over_texts_N).exp()
        gradient_CN[torch.arange(len(gradient_CN)), torch.arange(at, at + len(gradient_CN))] -= 2
        gradient_CN /= 2
        text_gradient_ND[at : at + CHUNK] = gradient_CN @ image_ND * scale
        image_gradient_ND += gradient_CN.T @ text_ND[at : at + CHUNK] * scale
        scale_gradient += (gradient_CN * similar_CN).sum()
    loss_N = (over_images_N + over_texts_N) / 2 - (image_ND * text_ND).sum(1) * scale
    return Compared(loss_N, image_gradient_ND, text_gradient_ND, float(scale_gradient))
