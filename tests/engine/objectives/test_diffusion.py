"""DiT: parity with diffusers, noise that depends on a sample's draw alone, images that depend on label and seed alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel

from engine.bundles.bundle import Bundle
from engine.config import Config, ObjectiveConfig, ServeConfig, with_values
from engine.data.images import encode_png, from_base64, normalize
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.evaluate import evaluate_bundle
from engine.models.build import build_model, enable_gradient_checkpointing, load_pretrained
from engine.models.diffusers_model import create_diffusers_model
from engine.models.size import parameter_count
from engine.objectives.diffusion import seed_noise
from engine.serve.preflight import check_servable
from tests.engine.objectives.conftest import Curves, build_task, gradients, relative_error


def with_random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Make every weight affect the output: the blocks of a new model are the identity."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def bundle(curves: Curves, runs_dir: Path) -> Bundle:
    return Bundle.open(runs_dir / "diffusion-two" / "bundle")


def test_loss_and_gradients_equal_diffusers(family: Callable[..., Config], tmp_path: Path) -> None:
    objective, model, data = build_task(family("diffusion"))
    with_random_weights(model).save_pretrained(tmp_path)  # type: ignore[operator]
    samples = objective.samples(Split.open(data, "train"))
    chosen = [samples[i] | {"draw": 1000 + i} for i in range(6)]
    batch = objective.collate(chosen)
    assert (batch.count, batch.tokens) == (6 * 3 * 16 * 16, 6 * 16)

    plain = DiTTransformer2DModel.from_pretrained(tmp_path)
    images = torch.from_numpy(normalize(np.stack([sample["pixels"] for sample in chosen]), objective.image_processor))
    steps, labels = batch.inputs["timestep"], batch.inputs["class_labels"]
    noisy = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").add_noise(images, batch.targets, steps)
    theirs = F.mse_loss(plain(noisy, timestep=steps, class_labels=labels).sample, batch.targets)

    model.train()  # in training mode, where a DiT of diffusers would drop labels itself
    loss = objective.loss(model, batch)
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    ours = gradients(model, loss.sum / loss.count)
    assert relative_error(ours, gradients(plain, theirs)) < 1e-6
    enable_gradient_checkpointing(model)
    again = objective.loss(model, batch)
    assert relative_error(gradients(model, again.sum / again.count), ours) < 1e-6


def test_noise_is_a_function_of_the_draw(family: Callable[..., Config]) -> None:
    objective, _, data = build_task(family("diffusion"))
    samples = objective.samples(Split.open(data, "train"))
    draws = [7, 2**64 - 1, 12345678901234567]
    together = objective.collate([samples[i] | {"draw": draw} for i, draw in enumerate(draws)])
    for i, draw in enumerate(draws):
        alone = objective.collate([samples[i] | {"draw": np.uint64(draw)}])
        assert torch.equal(alone.targets[0], together.targets[i])
        for name, tensor in alone.inputs.items():
            assert torch.equal(tensor[0], together.inputs[name][i]), name
    other = objective.collate([samples[0] | {"draw": 8}])
    assert not torch.equal(other.targets[0], together.targets[0])
    assert float(seed_noise(3, 64).mean()) == pytest.approx(0, abs=0.03)
    assert float(seed_noise(3, 64).std()) == pytest.approx(1, abs=0.03)

    many = objective.collate([samples[0] | {"draw": draw} for draw in range(2000)]).inputs
    assert float((many["class_labels"] == len(objective.labels)).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert set(many["class_labels"].tolist()) == {samples[0]["label"], len(objective.labels)}
    quarters = torch.bincount(many["timestep"] // 250, minlength=4)
    assert len(quarters) == 4
    assert quarters.min() > 440


@torch.no_grad()
def generate_with_diffusers(
    model: Any, scheduler: Any, options: ObjectiveConfig, label: int, null: int, seed: int
) -> np.ndarray:
    """Generate an image with diffusers' classes alone, in a batch of as many copies as ours."""
    batch_size = options.images_together
    images = seed_noise(seed, 16).expand(batch_size, -1, -1, -1)
    labels = torch.tensor([label] * batch_size + [null] * batch_size)
    scheduler.set_timesteps(options.sampling_steps)
    for step in scheduler.timesteps:
        if options.guidance == 1:
            noise = model(images, timestep=step.expand(batch_size), class_labels=labels[:batch_size]).sample
        else:
            both = model(torch.cat([images, images]), timestep=step.expand(2 * batch_size), class_labels=labels).sample
            conditional, unconditional = both.chunk(2)
            noise = unconditional + options.guidance * (conditional - unconditional)
        images = scheduler.step(noise, step, images).prev_sample
    return ((images[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_bundle_loads_with_plain_diffusers(bundle: Bundle) -> None:
    objective = bundle.objective()
    (ours,) = objective.predict(bundle.model(), [{"prompt": "Green ", "seed": 11}])
    model = DiTTransformer2DModel.from_pretrained(bundle.folder)
    scheduler = DDIMScheduler.from_pretrained(bundle.folder, subfolder="scheduler")
    label, null = objective.labels.index("green"), len(objective.labels)
    pixels = generate_with_diffusers(model, scheduler, objective.options, label, null, seed=11)
    assert np.array_equal(np.asarray(from_base64(ours["image"])), pixels)
    assert ours["image"] == encode_png(pixels)
    check_servable(bundle, ServeConfig())  # it can


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.0, "label_dropout": 0.0},
        {"guidance": 4.0, "images_together": 1},
        {"noise_schedule": "squaredcos_cap_v2", "noise_steps": 50, "sampling_steps": 7},
    ],
)
def test_options_match_diffusers(family: Callable[..., Config], options: dict[str, Any]) -> None:
    config = family("diffusion", **{f"objective__{name}": value for name, value in options.items()})
    objective, model, data = build_task(config)
    with_random_weights(model).eval()
    kind = {
        "num_train_timesteps": config.objective.noise_steps,
        "beta_schedule": config.objective.noise_schedule,
    }
    scheduler = DDIMScheduler(**kind, timestep_spacing="trailing")
    (ours,) = objective.predict(model, [{"prompt": "blue", "seed": 3}])
    pixels = generate_with_diffusers(model, scheduler, config.objective, 0, 3, seed=3)
    assert np.array_equal(np.asarray(from_base64(ours["image"])), pixels)

    samples = objective.samples(Split.open(data, "train"))
    chosen = [samples[i % 5] | {"draw": i} for i in range(300)]
    batch = objective.collate(chosen)
    images = torch.from_numpy(normalize(np.stack([sample["pixels"] for sample in chosen]), objective.image_processor))
    noisy = DDPMScheduler(**kind).add_noise(images, batch.targets, batch.inputs["timestep"])
    assert torch.equal(noisy, batch.inputs["hidden_states"])
    assert config.objective.noise_steps * 0.9 < batch.inputs["timestep"].max() < config.objective.noise_steps
    assert (batch.inputs["class_labels"] == 3).any() == (config.objective.label_dropout > 0)


def test_image_does_not_depend_on_the_batch(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family("diffusion"))
    with_random_weights(model).eval()
    alone = objective.predict(model, [{"prompt": "red", "seed": 5}])[0]["image"]
    for num_others in (1, 5):
        others = [{"prompt": ["blue", "green"][i % 2], "seed": 50 + i} for i in range(num_others)]
        for position in {0, 1, num_others}:
            requests = [*others[:position], {"prompt": "red", "seed": 5}, *others[position:]]
            images = [answer["image"] for answer in objective.predict(model, requests)]
            assert images[position] == alone
            assert len(set(images)) == num_others + 1
    assert objective.predict(model, [{"prompt": "blue", "seed": 5}])[0]["image"] != alone
    assert from_base64(alone).size == (16, 16)


def test_golden_outputs_are_checked(bundle: Bundle) -> None:
    model = bundle.model()
    bundle.replay(model)
    assert bundle.manifest
    assert len(bundle.manifest.golden[0]["output"]["means"]) == 4 * 4 * 3
    with torch.no_grad():
        model.proj_out_2.bias.add_(0.05)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="does not reproduce its golden outputs"):
        bundle.replay(model)


def test_bf16_bundle_keeps_its_dtype(family: Callable[..., Config], tmp_path: Path) -> None:
    from engine.bundles.bundle import BundleInfo, write_bundle

    objective, model, data = build_task(family("diffusion"))
    info = BundleInfo("half", objective.golden_requests(Split.open(data, "validation")))
    written = write_bundle(tmp_path / "bundle", with_random_weights(model), objective, info, torch.bfloat16)
    written.verify()
    again = Bundle.open(tmp_path / "bundle")
    assert {p.dtype for p in again.model().parameters()} == {torch.bfloat16}
    again.replay(again.model())
    again.replay(again.model(torch.float32))
    assert {p.dtype for p in again.model(torch.float32).parameters()} == {torch.float32}


def test_start_bundle_provides_all_weights_but_label_embeddings_of_another_size(
    bundle: Bundle, family: Callable[..., Config]
) -> None:
    model = family("diffusion").model
    same = load_pretrained(bundle.folder, "diffusers.DiTTransformer2DModel", {"num_embeds_ada_norm": 3}, model, 4)
    more = load_pretrained(bundle.folder, "diffusers.DiTTransformer2DModel", {"num_embeds_ada_norm": 5}, model, 4)
    for (name, x), y, z in zip(bundle.model().named_parameters(), same.parameters(), more.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert z.shape == ((6, 32) if "embedding_table" in name else x.shape)
        assert "embedding_table" in name or torch.equal(x, z), name


def test_bundle_is_evaluated(bundle: Bundle, family: Callable[..., Config], curves: Curves, runs_dir: Path) -> None:
    config = family("diffusion", evaluate__resamples=100, evaluate__images=12)
    evaluation = evaluate_bundle(bundle.folder, config)
    split = Split.open(evaluation.data, "test")
    assert (evaluation.examples, set(evaluation.metrics)) == (split.num_rows, {"loss"})
    objective, model = bundle.objective(), bundle.model()
    objective.bind_model(model.config)
    batch = objective.collate([objective.samples(split)[i] | {"draw": i} for i in range(split.num_rows)])
    with torch.no_grad():
        loss = objective.loss(model, batch)
    assert evaluation.metrics["loss"].value == pytest.approx(float(loss.sum) / loss.count, rel=1e-5)
    assert evaluation.images
    assert evaluation.images.features == "a random convolution"
    values = {name: interval.value for name, interval in evaluation.images.metrics.items()}
    assert values["frechet_distance_of_real"] < values["frechet_distance_of_noise"]
    for interval in evaluation.images.metrics.values():
        assert interval.low <= interval.value <= interval.high
    by_bundle = str(runs_dir / "image_classification-two" / "bundle")
    other = evaluate_bundle(bundle.folder, with_values(config, {"evaluate.features": by_bundle})).images
    assert other
    assert other.features == by_bundle
    assert other.metrics["frechet_distance"].value != values["frechet_distance"]
    with pytest.raises(UserError, match="is for diffusion: give a bundle of objective=image_classification"):
        evaluate_bundle(bundle.folder, with_values(config, {"evaluate.features": str(bundle.folder)}))
    assert evaluate_bundle(bundle.folder, with_values(config, {"evaluate.images": 0})).images is None


def test_flops_by_hand(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family("diffusion"))
    (stack,) = objective.transformer_stacks(model.config)
    width, tokens, layers = 32, 16, 2
    per_block_conditioning = 256 * width + width + width * width + width + 6 * (width * width + width)
    per_image = layers * per_block_conditioning + 2 * width * (width + 1)
    tables = layers * 4 * width
    matrices = parameter_count(model) - per_image - tables
    assert (stack.tokens, objective.tokens_per_image) == (tokens, tokens)
    by_hand = 6 * per_image + tokens * (6 * matrices + 12 * layers * width * tokens)
    assert objective.flops(model) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": 18}, "images of 18 pixels cannot be split into patches of 4: use data.image_size=16"),
        ({"data.label_column": None}, "diffusion needs labels: say which column has them with data.label_column"),
        ({"model.type": "vit"}, r"model.type=vit is not for this objective \(diffusers has no DiTTransformer2DModel"),
        ({"objective.name": "image_classification"}, "transformers has no AutoModelForImageClassification of it"),
        (
            {"model.options": {"patch_sise": 4}},
            "patch_sise is no option of DiTTransformer2DModel; did you mean 'patch_size'",
        ),
        ({"model.intermediate_size": 64}, "model.intermediate_size is no option of DiTTransformer2DModel"),
        ({"model.num_attention_heads": None}, "set model.num_attention_heads too"),
        ({"model.attention": "eager"}, "model.attention=eager is not for model.type=dit"),
        ({"objective.label_dropout": 0.0}, "use objective.guidance=1, or label_dropout=0.1"),
        ({"objective.sampling_steps": 1001}, "objective.sampling_steps 1001 is more than objective.noise_steps 1000"),
    ],
)
def test_invalid_config_raises_a_one_line_error(
    family: Callable[..., Config], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_task(with_values(family("diffusion"), changes))
    assert "\n" not in str(error.value)


def test_pixels_in_another_range_are_rejected(family: Callable[..., Config], tmp_path: Path) -> None:
    config = family("diffusion")
    folder = tmp_path / "processor"
    folder.mkdir()
    content = (prepare(config) / "processor" / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(content.replace("0.5", "0.25"))
    with pytest.raises(UserError, match="needs pixels from -1 to 1"):
        build_task(with_values(config, {"data.image_processor": str(folder)}))


def test_unknown_prompt_error_lists_the_labels(bundle: Bundle) -> None:
    objective = bundle.objective()
    with pytest.raises(
        UserError, match="'a red cat' is none of this model's labels: it makes images of blue, green, red"
    ):
        objective.predict(bundle.model(), [{"prompt": "a red cat", "seed": 1}])
    with pytest.raises(UserError, match="did you mean 'green'"):
        objective.check_request({"prompt": "greem", "seed": 1})


def test_error_without_diffusers_says_what_to_install(
    family: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs the package diffusers: pip install 'manta-train\[diffusion\]'"):
        build_model(family("diffusion").model, None, "diffusers.DiTTransformer2DModel", {}, 0)


def test_new_model_predicts_zero(family: Callable[..., Config]) -> None:
    _, model, _ = build_task(family("diffusion"))
    predicted = model(
        torch.randn(2, 3, 16, 16), timestep=torch.tensor([1, 9]), class_labels=torch.tensor([0, 3])
    ).sample
    assert float(predicted.detach().abs().max()) == 0.0
    config = {"_class_name": "DiTTransformer2DModel", **model.config}  # type: ignore[dict-item]
    torch.manual_seed(1)
    assert parameter_count(create_diffusers_model(config)) == parameter_count(model)
