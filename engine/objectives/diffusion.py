"""Make images of a class by taking noise away (Ho et al. 2020, DDPM; Peebles & Xie 2023, DiT). Shapes: B batch, S side, C channels.

A sample's noise, how much of it there is, and whether its label is shown depend on its draw alone. An image that is asked
for begins as the noise of its seed and then nothing is left to chance (Song et al. 2020, DDIM): it depends on its label and
seed, and on nothing that is made beside it.
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

from engine.data.images import Pictures, from_base64, normalized, pixels, png
from engine.data.order import splitmix64
from engine.data.shards import Split
from engine.errors import UserError, nearest
from engine.models.denoisers import LABELS, diffusers
from engine.models.size import Stack, attention_flops, elements, matmul_flops, matmul_parameter_count
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Samples, Scores

SCHEDULER = "scheduler"  # folder of a bundle, as diffusers' pipelines call it
SHOWN = 20  # labels that a refusal names
GRID = 4  # parts of a side whose means a golden answer records


class Diffusion(contract.Objective):
    """Images with a label each: the squared error of the noise that the model finds in them. A prompt is a label's name."""

    data_kind = "images"
    auto_class = "diffusers.DiTTransformer2DModel"
    architectures = ("DiTTransformer2DModel",)
    metric = "loss"
    mode = "min"
    needs = ("diffusers",)
    image_tokens = 1  # until the model is met

    def model_options(self) -> dict[str, Any]:
        """Size the model after the images and the labels. Raises UserError where there are none, or pixels not from -1 to 1."""
        if not self.labels:
            raise UserError("diffusion needs labels: say which column has them with data.label_column=...")
        ends = normalized(np.array([0, 255], np.uint8)[:, None, None, None].repeat(3, 3), self.image_processor)
        if not np.allclose(ends[:, :, 0, 0], [[-1] * 3, [1] * 3], atol=0.01):
            raise UserError(
                "diffusion needs pixels from -1 to 1, and the image processor makes others: leave out data.image_processor, or "
                "give it image_mean and image_std 0.5"
            )
        return {"in_channels": 3, "out_channels": 3, LABELS: len(self.labels)}

    def bind_model(self, config: Any) -> None:
        """Count the tokens of an image. Raises UserError where it cannot be cut into the model's patches."""
        side, patch = config["sample_size"], config["patch_size"]
        if side % patch:
            raise UserError(
                f"images of {side} pixels cannot be cut into patches of {patch}: use data.image_size={side // patch * patch}"
            )
        self.image_tokens = patches(config)

    def stacks(self, config: Any) -> list[Stack]:
        """Return the one stack, through which all patches of an image go."""
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        shape = SimpleNamespace(
            num_hidden_layers=config["num_layers"], num_attention_heads=heads, hidden_size=heads * width,
            intermediate_size=4 * heads * width,
        )  # fmt: skip
        return [Stack(shape, patches(config))]

    def flops(self, model: nn.Module) -> float:
        """Count those of a weight once a token, but of those that read timestep and label once an image."""
        (stack,) = self.stacks(model.config)
        once = sum(elements(p) for n, p in model.named_parameters() if ".norm1." in n or n.startswith("proj_out_1"))
        once -= sum(elements(p) for n, p in model.named_parameters() if "embedding_table" in n)
        share = once / matmul_parameter_count(model)
        products = matmul_flops(model) * (share + stack.tokens * (1 - share))
        return products + stack.tokens * attention_flops(
            stack.config.num_hidden_layers, stack.config.hidden_size, stack.tokens
        )

    @cached_property
    def scheduler(self) -> Any:
        """Diffusers' scheduler: it adds noise as DDPM does, and takes it away by DDIM."""
        options = self.options
        return diffusers().DDIMScheduler(
            num_train_timesteps=options.noise_steps, beta_schedule=options.noise_schedule, timestep_spacing="trailing"
        )

    def save(self, folder: Path) -> None:
        """Write the image processor and the scheduler."""
        super().save(folder)
        self.scheduler.save_pretrained(folder / SCHEDULER)

    def samples(self, split: Split) -> Samples:
        """Take the labelled images."""
        return Pictures(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Cut and scale {"image": a file in base64, "label"}."""
        return {
            "pixels": pixels(from_base64(example["image"]), self.image_processor),
            "label": self.label_of(example["label"]),
        }

    def label_of(self, prompt: str) -> int:
        """Return the label that a prompt names, in whatever case. Raises UserError, which tells the labels, for any other text."""
        wanted = prompt.strip().casefold()
        found = [i for i, label in enumerate(self.labels) if label.casefold() == wanted]
        exact = [i for i in found if self.labels[i] == prompt]
        if not found:
            known, more = ", ".join(self.labels[:SHOWN]), len(self.labels) - SHOWN
            told = prompt if len(prompt) < 80 else prompt[:77] + "..."
            raise UserError(
                f"'{told}' is none of this model's labels: it makes images of {known}"
                + (f" and {more:,} more" if more > 0 else "")
                + nearest(told, self.labels)
            )
        return (exact or found)[0]

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Add to each image the noise of its draw, as of a step of its draw; leave out some labels, by their draws."""
        draws_B = np.array([int(sample.get("draw", 0)) % 2**64 for sample in samples], np.uint64)
        first_B = splitmix64(draws_B)
        hidden_B = (splitmix64(first_B) >> np.uint64(11)) * 2.0**-53 < self.options.label_dropout
        labels_B = np.where(hidden_B, len(self.labels), [int(sample["label"]) for sample in samples])
        steps_B = torch.from_numpy((first_B % np.uint64(self.options.noise_steps)).astype(np.int64))
        images_BCSS = torch.from_numpy(
            normalized(np.stack([sample["pixels"] for sample in samples]), self.image_processor)
        )
        noise_BCSS = torch.stack([noise(int(draw), images_BCSS.shape[-1]) for draw in draws_B])
        inputs = {
            "hidden_states": self.scheduler.add_noise(images_BCSS, noise_BCSS, steps_B),
            "timestep": steps_B,
            "class_labels": torch.from_numpy(labels_B.astype(np.int64)),
        }
        return Batch(inputs, noise_BCSS, count=noise_BCSS.numel(), tokens=len(samples) * self.image_tokens)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the squared error of the noise over all pixels and channels."""
        return Loss(F.mse_loss(found_noise(model, **batch.inputs), batch.targets, reduction="sum"), batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Give each image's mean squared error."""
        error_BCSS = F.mse_loss(found_noise(model, **batch.inputs), batch.targets, reduction="none")
        return {"error": error_BCSS.flatten(1).double().mean(1).cpu().numpy()}

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Give the mean squared error of the noise."""
        return {"loss": float(scores["error"].mean())}

    def check_request(self, request: dict[str, Any]) -> None:
        """Raise UserError for a prompt that is no label."""
        self.label_of(request["prompt"])

    def image_facts(self, config: Any) -> dict[str, int]:
        """Return the side in pixels and the patches of an image."""
        return {"side": config["sample_size"], "tokens": patches(config)}

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Make the image of each {"prompt", "seed"}; with "means", tell its parts' means from 0 to 1 in its place."""
        labels, seeds = [self.label_of(it["prompt"]) for it in requests], [int(it["seed"]) for it in requests]
        made = self.make(model, labels, seeds)
        return [
            {"means": means(image_SSC)} if request.get("means") else {"image": png(image_SSC)}
            for image_SSC, request in zip(made, requests, strict=True)
        ]

    @torch.no_grad()
    def make(self, model: Any, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Make an image of each label from each seed: uint8 [B, S, S, 3].

        The model sees objective.images_together at a time, always as many: the products of matrices of another size would
        round otherwise.
        """
        together, found = self.options.images_together, []
        side = model.config["sample_size"]
        for first in range(0, len(labels), together):
            chosen = [min(i, len(labels) - 1) for i in range(first, first + together)]
            noise_BCSS = torch.stack([noise(seeds[i], side) for i in chosen])
            images_BCSS = self._denoised(model, torch.tensor([labels[i] for i in chosen]), noise_BCSS)
            levels_BCSS = ((images_BCSS.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            found.append(levels_BCSS.permute(0, 2, 3, 1).cpu().numpy()[: len(labels) - first])
        return np.concatenate(found) if found else np.empty((0, side, side, 3), np.uint8)

    def _denoised(self, model: nn.Module, labels_B: Tensor, images_BCSS: Tensor) -> Tensor:
        """Take the noise out of images, step by step, led towards their labels (Ho & Salimans 2022, equation 6)."""
        device, guidance = next(model.parameters()).device, self.options.guidance
        guided = guidance != 1
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # its steps are a state of its own
        scheduler.set_timesteps(self.options.sampling_steps)
        images_BCSS, labels_B = images_BCSS.to(device), labels_B.to(device)
        shown = torch.cat([labels_B, torch.full_like(labels_B, len(self.labels))]) if guided else labels_B
        for step in scheduler.timesteps:
            seen = torch.cat([images_BCSS, images_BCSS]) if guided else images_BCSS
            noise_BCSS = found_noise(model, seen, step.to(device).expand(len(seen)), shown)
            if guided:
                own, without = noise_BCSS.chunk(2)
                noise_BCSS = without + guidance * (own - without)
            images_BCSS = scheduler.step(noise_BCSS, step, images_BCSS).prev_sample
        return images_BCSS

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Ask for an image of each of the first three labels."""
        return [{"prompt": label, "seed": seed, "means": True} for seed, label in enumerate(self.labels[:3])]


def patches(config: Any) -> int:
    """Return the patches of an image."""
    return int(config["sample_size"] // config["patch_size"]) ** 2


def found_noise(model: nn.Module, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
    """Return the noise that a model finds in images, in fp32: [B, 3, S, S]."""
    module: Any = getattr(model, "module", model)
    seen = hidden_states.to(next(module.parameters()).dtype)
    found: Tensor = model(hidden_states=seen, timestep=timestep, class_labels=class_labels).sample
    return found.float()


def noise(seed: int, side: int) -> Tensor:
    """Return the noise of a seed: float32 [3, S, S], normally distributed (Salmon et al. 2011, Philox)."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64))
    return torch.from_numpy(generator.standard_normal((3, side, side), dtype=np.float32))


def means(image_SSC: np.ndarray) -> list[float]:
    """Return the mean of each of GRID x GRID parts of an image in each channel, from 0 to 1."""
    side = len(image_SSC) // GRID
    parts = image_SSC[: side * GRID, : side * GRID].reshape(GRID, side, GRID, side, 3).mean((1, 3)) / 255
    found: list[float] = parts.flatten().tolist()
    return found
