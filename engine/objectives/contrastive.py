"""Contrastive pre-training of an image and a text encoder (Radford et al. 2021, CLIP).

The loss of a pair depends on all pairs of the global batch, on all ranks. So once per step every rank embeds its micro-batches
without gradients, the embeddings are gathered, and the gradient of the loss with respect to each embedding is computed; the
passes over the micro-batches then propagate that gradient to the weights (Gao et al. 2021, GradCache,
https://arxiv.org/abs/2101.06983). Loss and gradient are those of the whole batch, however it is split.

Shapes: B micro-batch, N global batch, K different captions, D width, S side, C channels or captions of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.images import encode_png, from_base64, normalize, to_pixels
from engine.data.kinds.images import ImageSamples
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.size import TransformerStack, flops_per_token
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, ProcessGroup, Scores, pad_rows
from engine.objectives.image_classification import num_patches

CHUNK_ROWS = 1024  # captions whose similarities to all images exist at a time


@dataclass(frozen=True)
class BatchWithGradients(Batch):
    """A micro-batch with the gradients of the global batch's loss with respect to its embeddings."""

    value: float  # its pairs' share of the summed loss
    image_gradient_BD: Tensor  # of the summed loss with respect to each embedding
    text_gradient_BD: Tensor
    scale_gradient: float  # this micro-batch's share of the gradient with respect to the logit scale


class Contrastive(contract.Objective):
    """Images with captions: cross-entropy of each image over all captions of the global batch, and of each caption over all images."""

    data_kind = "captioned"
    auto_class = "AutoModelForZeroShotImageClassification"
    architectures = ("CLIPModel",)
    metric = "accuracy"
    mode = "max"
    pipeline_tag = "zero-shot-image-classification"
    intended_use = "choosing the caption that fits an image best"
    servable = False
    tokens_per_image = 1  # set by bind_model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what every task takes, but ignore the class names: captions are the classes."""
        super().__init__(*args, **kwargs)
        self.labels = []

    def bind_model(self, config: Any) -> None:
        """Set the tokens of an image. Raises UserError for a model without two encoders, or with too few text positions."""
        vision_config, text_config = (getattr(config, name, None) for name in ("vision_config", "text_config"))
        if vision_config is None or text_config is None:
            raise UserError(
                f"model.type={config.model_type} has no separate image and text encoders: use model=clip_5m"
            )
        if self.sequence_length > text_config.max_position_embeddings:
            raise UserError(
                f"captions of up to data.sequence_length {self.sequence_length:,} tokens are over the model's "
                f"{text_config.max_position_embeddings:,} positions: use data.sequence_length={text_config.max_position_embeddings}"
            )
        self.tokens_per_image = num_patches(vision_config) + 1

    def transformer_stacks(self, config: Any) -> list[TransformerStack]:
        """Return the image encoder and the text encoder, with a caption of full length."""
        return [
            TransformerStack(config.vision_config, num_patches(config.vision_config) + 1),
            TransformerStack(config.text_config, self.sequence_length),
        ]

    def flops(self, model: nn.Module) -> float:
        """Sum the two encoders; like recomputed activations, the pass without gradients is not counted."""
        clip: Any = model
        images, texts = self.transformer_stacks(model.config)
        return images.tokens * flops_per_token(clip.vision_model, images.config, images.tokens) + (
            texts.tokens * flops_per_token(clip.text_model, texts.config, texts.tokens)
        )

    def samples(self, split: Split) -> ImageSamples:
        """Return the captioned images."""
        return ImageSamples(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Crop and resize {"image": a file in base64, "text"}, and tokenize the caption."""
        return {
            "pixels": to_pixels(from_base64(example["image"]), self.image_processor),
            "tokens": self._tokenize(example["text"]),
        }

    def _tokenize(self, text: str) -> np.ndarray:
        ids = self.tokenizer(text, truncation=True, max_length=self.sequence_length)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Normalize the pixels as the image processor does, pad the captions; the targets are hashes of the captions."""
        pixels_BSSC = np.stack([sample["pixels"] for sample in samples])
        ids_BL, mask_BL = pad_rows([sample["tokens"] for sample in samples], self.tokenizer.pad_token_id)
        inputs = {
            "pixel_values": torch.from_numpy(normalize(pixels_BSSC, self.image_processor)),
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
        }
        # The hash of a tuple of integers is the same in every process.
        caption_hash_B = torch.tensor([hash(tuple(sample["tokens"].tolist())) for sample in samples])
        num_tokens = int(mask_BL.sum()) + len(samples) * self.tokens_per_image
        return Batch(inputs, caption_hash_B, len(samples), tokens=num_tokens)

    def before_step(
        self, model: nn.Module, batches: list[tuple[Batch, float]], group: ProcessGroup
    ) -> list[tuple[Batch, float]]:
        """Compute the loss of the global batch, and give each micro-batch the gradients of its embeddings."""
        device = batches[0][0].targets.device
        # The random state is restored, so that dropout is the same in the pass with gradients.
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            embeddings = [embed(model, batch) for batch, _ in batches]
        keys = [torch.tensor([[weight, k]], device=device) for k, (_, weight) in enumerate(batches)]
        rows = torch.cat(
            [
                torch.cat([image_BD, text_BD, key.expand(len(image_BD), 2)], dim=1)
                for (image_BD, text_BD, _), key in zip(embeddings, keys, strict=True)
            ]
        )
        gathered = group.all_gather_rows(rows)
        all_rows = torch.cat(gathered)
        first = sum(len(rank_rows) for rank_rows in gathered[: group.rank])
        # The order of the global batch: by micro-batch, and by rank within it; micro-batches of weight 0 are no part of it.
        order_N = all_rows[:, -1].argsort(stable=True)
        order_N = order_N[all_rows[order_N, -2] > 0]
        width = embeddings[0][0].shape[1]
        image_ND, text_ND = all_rows[order_N, :width], all_rows[order_N, width : 2 * width]
        gradients = contrastive_loss_and_gradients(image_ND, text_ND, embeddings[0][2])

        position = torch.full((len(all_rows),), -1, device=device)
        position[order_N] = torch.arange(len(order_N), device=device)
        own_positions = position[first : first + len(rows)].split([len(image_BD) for image_BD, _, _ in embeddings])
        return [
            (gradients.for_batch(batch, position_B), weight)
            for (batch, weight), position_B in zip(batches, own_positions)
        ]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the share of the global batch's loss, with its gradient; without `before_step`, the loss within the batch."""
        image_BD, text_BD, scale = embed(model, batch)
        if not isinstance(batch, BatchWithGradients):
            logits_BB = text_BD @ image_BD.T * scale
            targets_B = torch.arange(len(logits_BB), device=logits_BB.device)
            losses = [F.cross_entropy(logits, targets_B, reduction="sum") for logits in (logits_BB, logits_BB.T)]
            return Loss((losses[0] + losses[1]) / 2, batch.count)
        surrogate = (
            (image_BD * batch.image_gradient_BD).sum()
            + (text_BD * batch.text_gradient_BD).sum()
            + scale * batch.scale_gradient
        )
        return Loss(surrogate - surrogate.detach() + batch.value, batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return the two embeddings of each pair, the logit scale, and the hash of its caption."""
        image_BD, text_BD, scale = embed(model, batch)
        return {
            "image": image_BD.cpu().numpy(),
            "text": text_BD.cpu().numpy(),
            "scale": np.full(len(image_BD), float(scale)),
            "caption": batch.targets.cpu().numpy(),
        }

    def finalize_scores(self, scores: Scores) -> Scores:
        """Return each pair's loss among all pairs, and whether its image retrieves its caption and its caption its image."""
        image_ND, text_ND = torch.as_tensor(scores["image"]), torch.as_tensor(scores["text"])
        scale = torch.tensor(scores["scale"][0], dtype=torch.float32)
        gradients = contrastive_loss_and_gradients(image_ND, text_ND, scale)
        _, first_K, caption_N = np.unique(scores["caption"], return_index=True, return_inverse=True)
        text_KD = text_ND[torch.as_tensor(first_K)]
        nearest_caption_N, nearest_image_K = most_similar(image_ND, text_KD), most_similar(text_KD, image_ND)
        return {
            "nll": gradients.loss_N.double().numpy(),
            "correct": nearest_caption_N == caption_N,
            "image_correct": caption_N[nearest_image_K][caption_N] == caption_N,
        }

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return the recalls at 1 among all scored pairs, and the mean loss.

        `accuracy` is the share of images whose most similar caption, of all different captions, is their own: the zero-shot
        accuracy if captions name classes. `image_recall` is the share of captions whose most similar image has that caption.
        """
        return {
            "accuracy": float(scores["correct"].mean()),
            "image_recall": float(scores["image_correct"].mean()),
            "loss": float(scores["nll"].mean()),
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return for each {"image", "captions"} the likeliest caption and the probability of each; requests are not batched."""
        return [self._rank_captions(model, request) for request in requests]

    def _rank_captions(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        captions, image = request["captions"], to_pixels(from_base64(request["image"]), self.image_processor)
        batch = self.collate([{"pixels": image, "tokens": self._tokenize(caption)} for caption in captions])
        batch = batch.to(next(model.parameters()).device)
        batch.inputs["pixel_values"] = batch.inputs["pixel_values"][:1]
        image_1D, text_BD, scale = (tensor.cpu() for tensor in embed(model, batch))
        probability_B = (text_BD @ image_1D[0] * scale).softmax(0)
        return {
            "label": captions[int(probability_B.argmax())],
            "scores": dict(zip(captions, probability_B.tolist(), strict=True)),
        }

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take three images, each with the captions of all three."""
        rows = range(min(3, split.num_rows))
        captions = [self.tokenizer.decode(split.document(i).tolist(), skip_special_tokens=True) for i in rows]
        return [{"image": encode_png(split.image(i)), "captions": sorted(set(captions))} for i in rows]


def embed(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized embeddings of a batch's images and captions, [B, D] each, and the logit scale; in fp32."""
    module = getattr(model, "module", model)
    if add_logit_scale not in module._forward_hooks.values():
        module.register_forward_hook(add_logit_scale, prepend=True)
    outputs = model(**batch.inputs)
    return outputs.image_embeds.float(), outputs.text_embeds.float(), outputs["scale"].view(()).float()


def add_logit_scale(module: Any, inputs: Any, outputs: Any) -> Any:
    """Add the logit scale to a model's outputs: under ZeRO-3 a weight is only gathered during the forward pass."""
    outputs["scale"] = module.logit_scale.exp()
    return outputs


def most_similar(rows: Tensor, others: Tensor) -> np.ndarray:
    """Return for each row, [n, D], the index of the most similar row of `others`: int64 [n]."""
    return torch.cat([(chunk @ others.T).argmax(1) for chunk in rows.split(CHUNK_ROWS)]).numpy()


@dataclass(frozen=True)
class ContrastiveGradients:
    """The loss of N pairs and its gradients with respect to their embeddings; the summed loss is N times CLIP's."""

    loss_N: Tensor  # each pair's share of the summed loss
    image_gradient_ND: Tensor
    text_gradient_ND: Tensor
    scale_gradient: float

    def for_batch(self, batch: Batch, position_B: Tensor) -> BatchWithGradients:
        """Add the gradients of its pairs to a micro-batch; position -1 is of a micro-batch of weight 0, where any will do."""
        index_B = position_B.clamp(min=0)
        return BatchWithGradients(
            **{f.name: getattr(batch, f.name) for f in fields(Batch)},
            value=float(self.loss_N[index_B].sum()),
            image_gradient_BD=self.image_gradient_ND[index_B],
            text_gradient_BD=self.text_gradient_ND[index_B],
            scale_gradient=self.scale_gradient * len(index_B) / len(self.loss_N),
        )


@torch.no_grad()
def contrastive_loss_and_gradients(image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> ContrastiveGradients:
    """Compute the cross-entropy of each caption over all images and of each image over all captions, and its gradients.

    With P the softmax of the logits over images, Q that over captions, and I the matching pairs, the gradient with respect to
    the logits is (P + Q - 2 I) / 2. CHUNK_ROWS x N logits exist at a time.
    """
    count, starts = len(image_ND), range(0, len(image_ND), CHUNK_ROWS)
    over_images_N, over_texts_N = image_ND.new_empty(count), image_ND.new_full((count,), -torch.inf)
    for start in starts:
        logits_CN = text_ND[start : start + CHUNK_ROWS] @ image_ND.T * scale
        over_images_N[start : start + CHUNK_ROWS] = logits_CN.logsumexp(1)
        over_texts_N = torch.logaddexp(over_texts_N, logits_CN.logsumexp(0))
    image_gradient_ND, text_gradient_ND = torch.zeros_like(image_ND), torch.empty_like(text_ND)
    scale_gradient = torch.zeros((), device=image_ND.device)
    for start in starts:
        similarity_CN = text_ND[start : start + CHUNK_ROWS] @ image_ND.T
        logits_CN = similarity_CN * scale
        p_CN = (logits_CN - over_images_N[start : start + CHUNK_ROWS, None]).exp()
        gradient_CN = p_CN + (logits_CN - over_texts_N).exp()
        gradient_CN[torch.arange(len(gradient_CN)), torch.arange(start, start + len(gradient_CN))] -= 2
        gradient_CN /= 2
        text_gradient_ND[start : start + CHUNK_ROWS] = gradient_CN @ image_ND * scale
        image_gradient_ND += gradient_CN.T @ text_ND[start : start + CHUNK_ROWS] * scale
        scale_gradient += (gradient_CN * similarity_CN).sum()
    loss_N = (over_images_N + over_texts_N) / 2 - (image_ND * text_ND).sum(1) * scale
    return ContrastiveGradients(loss_N, image_gradient_ND, text_gradient_ND, float(scale_gradient))
