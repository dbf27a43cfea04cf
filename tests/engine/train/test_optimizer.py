"""Parameter groups, Muon and the EMA: the same curve in every layout, bit for bit on resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config import Config, OptimConfig, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.models.build import build_model
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.optimizer import Muon, make_optimizer, orthogonalize, parameter_groups
from tests.engine.train.ranks import losses, run_here, run_ranks


class Vocabulary:
    pad_token_id = eos_token_id = bos_token_id = 0

    def __len__(self) -> int:
        return 64


def model(tiny: Config) -> Any:
    return build_model(tiny.model, Vocabulary(), "AutoModelForCausalLM", {}, 0)


def names_of(built: Any, groups: list[dict[str, Any]]) -> list[set[str]]:
    names = {id(p): name for name, p in built.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


def test_patterns_select_learning_rate_and_weight_decay(tiny: Config) -> None:
    built = model(tiny)
    optim = OptimConfig(groups={"embed": {"lr": 0.5, "weight_decay": 0}, r"layers\.1\.mlp": {"lr": 2}})
    groups = parameter_groups(built, optim)
    assert sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    for names, group in zip(names_of(built, groups), groups, strict=True):
        for name in names:
            expected = (0.5, 0.0) if "embed" in name else (2.0, 0.1) if "layers.1.mlp" in name else (1.0, None)
            assert group["lr_factor"] == expected[0], name
            assert group["weight_decay"] == (expected[1] if expected[1] is not None else 0.0 if "norm" in name else 0.1)
    with pytest.raises(UserError, match="'emb_' matches no trained parameter; names are like model"):
        parameter_groups(built, OptimConfig(groups={"emb_": {"lr": 0.5}}))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": {"lrr": 1}}, "lrr is not one of lr, weight_decay; did you mean 'lr'?"),
        ({"a": {"lr": -1}}, "lr=-1 is not a number of 0 or more"),
        ({"(": {"lr": 1}}, "is not a regular expression"),
        ({"a": 3}, "3 is not one of lr, weight_decay"),
    ],
)
def test_an_invalid_group_is_refused_with_a_reason(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        with_values(Config(), {"optim.groups": groups})


def test_orthogonalize_brings_singular_values_close_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32))
        assert 0.6 < values[:-1].min() <= values.max() < 1.3


def test_muon_equals_the_formula(tiny: Config) -> None:
    built = model(tiny)
    optimizer = make_optimizer(built, OptimConfig(name="muon", lr=0.1, momentum=0.9, weight_decay=0.2), torch.float32)
    assert isinstance(optimizer, Muon)
    (muon,) = (
        names
        for names, group in zip(names_of(built, optimizer.param_groups), optimizer.param_groups, strict=True)
        if group["muon"]
    )
    assert all("layers" in name and "norm" not in name for name in muon)
    assert len(muon) == 2 * 7
    name = "model.layers.0.mlp.up_proj.weight"
    p = dict(built.named_parameters())[name]
    start, momentum = p.detach().clone(), torch.zeros_like(p)
    torch.manual_seed(0)
    for _ in range(2):
        gradient = torch.randn_like(p)
        p.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        update = orthogonalize(gradient + 0.9 * momentum, torch.float32)
        start = start * (1 - 0.1 * 0.2) - 0.1 * 0.2 * math.sqrt(max(p.shape)) * update
    torch.testing.assert_close(p.detach(), start, rtol=1e-5, atol=1e-6)


EVERYTHING = {
    "optim.name": "muon", "optim.groups": {"norm": {"lr": 0.5}, "q_proj": {"weight_decay": 0.0}}, "train.ema": 0.9,
    "optim.lr": 3e-3, "schedule.total_steps": 6, "train.evaluate_every": 3, "train.use_ema": True,
}  # fmt: skip


def test_muon_groups_and_ema_are_the_same_in_every_layout(tiny: Config) -> None:
    data = prepare(tiny)
    alone = [("m0", {"zero.stage": 0}), ("m3", {"zero.stage": 3})]
    two = [(f"n{stage}", {"zero.stage": stage, "train.workers": 2}) for stage in range(4)]
    runs = []
    for world_size, layouts in ((1, alone), (2, two)):
        jobs = [TrainJob(with_values(tiny, {**EVERYTHING, **change, "name": name}), data) for name, change in layouts]
        runs += list(zip([job.config for job in jobs], run_ranks(jobs, world_size), strict=True))
    first, lines = runs[0]
    averages = Checkpoint(step_folders(first.run_dir / "checkpoints")[0]).weights("ema")
    for config, others in runs[1:]:
        assert losses(others) == pytest.approx(losses(lines), abs=1e-5), config.name
        for step in (2, 5):
            assert others[step]["validation_loss"] == pytest.approx(lines[step]["validation_loss"], abs=1e-5)
        for name, average in Checkpoint(step_folders(config.run_dir / "checkpoints")[0]).weights("ema").items():
            torch.testing.assert_close(average, averages[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_resume_is_bit_for_bit(tiny: Config, precision: str) -> None:
    data = prepare(tiny)
    trios = []
    for stage in (0, 3) if precision == "fp32" else range(4):
        base = with_values(tiny, EVERYTHING | {"zero.stage": stage, "train.precision": precision, "train.workers": 2})
        name = f"{precision}-{stage}"
        halves = [with_values(base, {"name": f"halves-{name}", "train.max_steps": until}) for until in (3, 6)]
        trios.append([with_values(base, {"name": f"straight-{name}"}), *halves])
    results = iter(run_ranks([TrainJob(config, data) for trio in trios for config in trio], 2))
    for straight, _, resumed in trios:
        lines, _, others = next(results), next(results), next(results)
        assert losses(others) == losses(lines)
        assert others[-1]["validation_loss"] == lines[-1]["validation_loss"]
        ours, theirs = (Checkpoint(step_folders(config.run_dir / "checkpoints")[0]) for config in (straight, resumed))
        for kind in ("weight", "ema"):
            for key, tensor in ours.weights(kind).items():
                assert torch.equal(tensor, theirs.weights(kind)[key]), (straight.name, kind, key)
        average = ours.weights("ema")
        for key, tensor in load_file(straight.run_dir / "bundle" / "model.safetensors").items():
            assert torch.equal(tensor, average[key].to(tensor.dtype)), key
            assert not torch.equal(average[key], ours.weights()[key])


def test_the_ema_equals_the_formula(tiny: Config) -> None:
    data = prepare(tiny)
    config = with_values(
        tiny, {"name": "average", "train.ema": 0.5, "train.checkpoint_every": 1, "train.keep_checkpoints": 9}
    )
    run_here([TrainJob(config, data)])
    folders = step_folders(config.run_dir / "checkpoints")[::-1]
    from engine.train.init_model import make_model

    name = "model.layers.0.mlp.up_proj.weight"
    average = dict(make_model(TrainJob(config, data), TrainJob(config, data).objective()).named_parameters())[
        name
    ].detach()
    for update, folder in enumerate(folders, start=1):
        decay = min(0.5, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * Checkpoint(folder).weights()[name]
        torch.testing.assert_close(Checkpoint(folder).weights("ema")[name], average, rtol=1e-5, atol=1e-7)


def test_an_ema_turned_on_later_starts_at_the_weights(tiny: Config) -> None:
    data = prepare(tiny)
    halves = [
        with_values(tiny, {"name": "later", "train.max_steps": until, "schedule.total_steps": 6, "train.ema": ema})
        for until, ema in ((3, 0.0), (4, 0.9))
    ]
    run_here([TrainJob(config, data) for config in halves])
    after, before = step_folders(halves[0].run_dir / "checkpoints")[:2]
    for name, average in Checkpoint(after).weights("ema").items():
        decay = 5 / 14  # of the fourth update
        expected = decay * Checkpoint(before).weights()[name] + (1 - decay) * Checkpoint(after).weights()[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_of_another_optimizer_is_refused(tiny: Config) -> None:
    data = prepare(tiny)
    configs = [
        with_values(tiny, {"name": "changed", "train.max_steps": until, "schedule.total_steps": 6, "optim.name": name})
        for until, name in ((3, "adamw"), (6, "muon"))
    ]
    with pytest.raises(UserError, match=r"was written by another optimizer .* or the former optim\.name"):
        run_here([TrainJob(config, data) for config in configs])


def test_using_the_ema_requires_keeping_it() -> None:
    with pytest.raises(UserError, match=r"set its decay with train\.ema=0\.999"):
        with_values(Config(), {"train.use_ema": True})
