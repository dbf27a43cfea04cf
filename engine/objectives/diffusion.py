"""Class-conditional image diffusion (Ho et al. 2020, DDPM; Peebles & Xie 2023, DiT). Shapes: B batch, S side, C channels.

A sample's noise, its timestep, and whether its label is dropped depend on its draw alone. Generation starts from the noise of
a seed and is deterministic from there (Song et al. 2020, DDIM): an image depends on its label and seed, and not on the other
images of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.images import encode_png, from_base64, normalize, to_pixels
from engine.data.kinds.images import ImageSamples
from engine.data.order import splitmix64
from engine.data.shards import Split
from engine.errors import UserError, did_you_mean
from engine.models.diffusers_model import NUM_LABELS_FIELD, import_diffusers
from engine.models.size import TransformerStack, attention_flops, matmul_flops, matmul_parameter_count, num_elements
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Samples, Scores

SCHEDULER_FOLDER = "scheduler"  # in a bundle, as in diffusers' pipelines
MAX_LISTED_LABELS = 20  # in an error message
MAX_SHOWN_PROMPT = 80  # characters of a prompt in an error message
GRID = 4  # a golden output records the means of GRID x GRID cells of an image


class Diffusion(contract.Objective):
    """Labeled images: the squared error of the noise that the model predicts. A prompt is the name of a label."""

    data_kind = "images"
    auto_class = "diffusers.DiTTransformer2DModel"
    architectures = ("DiTTransformer2DModel",)
    metric = "loss"
    mode = "min"
    intended_use = "generating small images of the classes below"
    endpoint_task = "images"
    required_packages = ("diffusers",)
    tokens_per_image = 1  # set by bind_model

    def model_options(self) -> dict[str, Any]:
        """Size the model for the images and labels. Raises UserError without labels, or if pixels are not from -1 to 1."""
        if not self.labels:
            raise UserError("diffusion needs labels: say which column has them with data.label_column=...")
        extremes = normalize(np.array([0, 255], np.uint8)[:, None, None, None].repeat(3, 3), self.image_processor)
        if not np.allclose(extremes[:, :, 0, 0], [[-1] * 3, [1] * 3], atol=0.01):
            raise UserError(
                "diffusion needs pixels from -1 to 1, and the image processor makes others: leave out data.image_processor, or "
                "give it image_mean and image_std 0.5"
            )
        return {"in_channels": 3, "out_channels": 3, NUM_LABELS_FIELD: len(self.labels)}

    def bind_model(self, config: Any) -> None:
        """Set the tokens of an image. Raises UserError if it cannot be split into the model's patches."""
        side, patch_size = config["sample_size"], config["patch_size"]
        if side % patch_size:
            raise UserError(
                f"images of {side} pixels cannot be split into patches of {patch_size}: "
                f"use data.image_size={side // patch_size * patch_size}"
            )
        self.tokens_per_image = num_patches(config)

    def transformer_stacks(self, config: Any) -> list[TransformerStack]:
        """Return the transformer, which all patches of an image pass through."""
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        shape = SimpleNamespace(
            num_hidden_layers=config["num_layers"], num_attention_heads=heads, hidden_size=heads * head_dim,
            intermediate_size=4 * heads * head_dim,
        )  # fmt: skip
        return [TransformerStack(shape, num_patches(config))]

    def flops(self, model: nn.Module) -> float:
        """Count each weight once per token, but those that read the timestep and the label once per image."""
        (stack,) = self.transformer_stacks(model.config)
        per_image = sum(
            num_elements(p) for n, p in model.named_parameters() if ".norm1." in n or n.startswith("proj_out_1")
        )
        per_image -= sum(num_elements(p) for n, p in model.named_parameters() if "embedding_table" in n)
        share = per_image / matmul_parameter_count(model)
        products = matmul_flops(model) * (share + stack.tokens * (1 - share))
        return products + stack.tokens * attention_flops(
            stack.config.num_hidden_layers, stack.config.hidden_size, stack.tokens
        )

    @cached_property
    def scheduler(self) -> Any:
        """Diffusers' scheduler, which adds noise as DDPM does and removes it by DDIM."""
        options = self.options
        return import_diffusers().DDIMScheduler(
            num_train_timesteps=options.noise_steps, beta_schedule=options.noise_schedule, timestep_spacing="trailing"
        )

    def save(self, folder: Path) -> None:
        """Write the image processor and the scheduler."""
        super().save(folder)
        self.scheduler.save_pretrained(folder / SCHEDULER_FOLDER)

    def samples(self, split: Split) -> Samples:
        """Return the labeled images."""
        return ImageSamples(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Crop and resize {"image": a file in base64, "label"}."""
        return {
            "pixels": to_pixels(from_base64(example["image"]), self.image_processor),
            "label": self.label_index(example["label"]),
        }

    def label_index(self, prompt: str) -> int:
        """Return the label that a prompt names, ignoring case. Raises UserError, which lists the labels, for any other text."""
        name = prompt.strip().casefold()
        matches = [i for i, label in enumerate(self.labels) if label.casefold() == name]
        exact_matches = [i for i in matches if self.labels[i] == prompt]
        if not matches:
            listed, num_others = ", ".join(self.labels[:MAX_LISTED_LABELS]), len(self.labels) - MAX_LISTED_LABELS
            shown = prompt if len(prompt) < MAX_SHOWN_PROMPT else prompt[: MAX_SHOWN_PROMPT - 3] + "..."
            raise UserError(
                f"'{shown}' is none of this model's labels: it makes images of {listed}"
                + (f" and {num_others:,} more" if num_others > 0 else "")
                + did_you_mean(shown, self.labels)
            )
        return (exact_matches or matches)[0]

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Add noise to each image for a random timestep and drop some labels, all by the samples' draws."""
        draws_B = np.array([int(sample.get("draw", 0)) % 2**64 for sample in samples], np.uint64)
        random_B = splitmix64(draws_B)
        is_dropped_B = (splitmix64(random_B) >> np.uint64(11)) * 2.0**-53 < self.options.label_dropout
        labels_B = np.where(is_dropped_B, len(self.labels), [int(sample["label"]) for sample in samples])
        timesteps_B = torch.from_numpy((random_B % np.uint64(self.options.noise_steps)).astype(np.int64))
        images_BCSS = torch.from_numpy(
            normalize(np.stack([sample["pixels"] for sample in samples]), self.image_processor)
        )
        noise_BCSS = torch.stack([seed_noise(int(draw), images_BCSS.shape[-1]) for draw in draws_B])
        inputs = {
            "hidden_states": self.scheduler.add_noise(images_BCSS, noise_BCSS, timesteps_B),
            "timestep": timesteps_B,
            "class_labels": torch.from_numpy(labels_B.astype(np.int64)),
        }
        return Batch(inputs, noise_BCSS, count=noise_BCSS.numel(), tokens=len(samples) * self.tokens_per_image)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the squared error of the noise over all pixels and channels."""
        return Loss(F.mse_loss(predict_noise(model, **batch.inputs), batch.targets, reduction="sum"), batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return each image's mean squared error."""
        error_BCSS = F.mse_loss(predict_noise(model, **batch.inputs), batch.targets, reduction="none")
        return {"error": error_BCSS.flatten(1).double().mean(1).cpu().numpy()}

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return the mean squared error of the noise."""
        return {"loss": float(scores["error"].mean())}

    def check_request(self, request: dict[str, Any]) -> None:
        """Raise UserError for a prompt that names no label."""
        self.label_index(request["prompt"])

    def image_output_size(self, config: Any) -> dict[str, int]:
        """Return the side in pixels and the patches of an image."""
        return {"side": config["sample_size"], "tokens": num_patches(config)}

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Generate the image of each {"prompt", "seed"}; with "means", return the mean values of its cells instead."""
        labels = [self.label_index(request["prompt"]) for request in requests]
        images = self.generate(model, labels, [int(request["seed"]) for request in requests])
        return [
            {"means": grid_means(image_SSC)} if request.get("means") else {"image": encode_png(image_SSC)}
            for image_SSC, request in zip(images, requests, strict=True)
        ]

    @torch.no_grad()
    def generate(self, model: Any, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Generate an image of each label from each seed: uint8 [B, S, S, 3].

        The batch size is always objective.images_together, with copies of the last image in the last batch: matrix products
        of another size would round differently.
        """
        batch_size, batches = self.options.images_together, []
        side = model.config["sample_size"]
        for first in range(0, len(labels), batch_size):
            indices = [min(i, len(labels) - 1) for i in range(first, first + batch_size)]
            noise_BCSS = torch.stack([seed_noise(seeds[i], side) for i in indices])
            images_BCSS = self._denoise(model, torch.tensor([labels[i] for i in indices]), noise_BCSS)
            levels_BCSS = ((images_BCSS.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            batches.append(levels_BCSS.permute(0, 2, 3, 1).cpu().numpy()[: len(labels) - first])
        return np.concatenate(batches) if batches else np.empty((0, side, side, 3), np.uint8)

    def _denoise(self, model: nn.Module, labels_B: Tensor, images_BCSS: Tensor) -> Tensor:
        """Remove the noise from images step by step, with classifier-free guidance (Ho & Salimans 2022, equation 6)."""
        device, guidance = next(model.parameters()).device, self.options.guidance
        is_guided = guidance != 1
        scheduler = type(self.scheduler).from_config(
            self.scheduler.config
        )  # a new one: set_timesteps changes its state
        scheduler.set_timesteps(self.options.sampling_steps)
        images_BCSS, labels_B = images_BCSS.to(device), labels_B.to(device)
        labels = torch.cat([labels_B, torch.full_like(labels_B, len(self.labels))]) if is_guided else labels_B
        for timestep in scheduler.timesteps:
            inputs = torch.cat([images_BCSS, images_BCSS]) if is_guided else images_BCSS
            noise_BCSS = predict_noise(model, inputs, timestep.to(device).expand(len(inputs)), labels)
            if is_guided:
                conditional, unconditional = noise_BCSS.chunk(2)
                noise_BCSS = unconditional + guidance * (conditional - unconditional)
            images_BCSS = scheduler.step(noise_BCSS, timestep, images_BCSS).prev_sample
        return images_BCSS

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Request an image of each of the first three labels."""
        return [{"prompt": label, "seed": seed, "means": True} for seed, label in enumerate(self.labels[:3])]


def num_patches(config: Any) -> int:
    """Return the number of patches of an image."""
    return int(config["sample_size"] // config["patch_size"]) ** 2


def predict_noise(model: nn.Module, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
    """Return the noise that a model predicts in images, in fp32: [B, 3, S, S]."""
    module: Any = getattr(model, "module", model)
    inputs = hidden_states.to(next(module.parameters()).dtype)
    noise: Tensor = model(hidden_states=inputs, timestep=timestep, class_labels=class_labels).sample
    return noise.float()


def seed_noise(seed: int, side: int) -> Tensor:
    """Return the noise of a seed: float32 [3, S, S], normally distributed (Salmon et al. 2011, Philox)."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64))
    return torch.from_numpy(generator.standard_normal((3, side, side), dtype=np.float32))


def grid_means(image_SSC: np.ndarray) -> list[float]:
    """Return the mean of each of GRID x GRID cells of an image in each channel, from 0 to 1."""
    side = len(image_SSC) // GRID
    cells = image_SSC[: side * GRID, : side * GRID].reshape(GRID, side, GRID, side, 3).mean((1, 3)) / 255
    means: list[float] = cells.flatten().tolist()
    return means
