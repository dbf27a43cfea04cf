"""DeepSpeed's universal checkpoints, written and read, with DeepSpeed's own code on the other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from engine.config import Config, to_dict, with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, step_folder
from engine.train.convert import convert_and_show
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder, RunStatus, now
from tests.engine.train.ranks import losses, on_ranks, run_ranks

FIRST, ALL = 3, 6  # steps before the conversion, and in total


def of_run(tiny: Config, name: str, steps: int, **changes: object) -> Config:
    """Configure a run with a constant learning rate and no weight decay, which DeepSpeed needs no schedule or groups for."""
    fixed = {
        "name": name, "train.max_steps": steps, "schedule.kind": "constant", "schedule.warmup_steps": 0,
        "schedule.total_steps": ALL, "optim.weight_decay": 0.0,
    }  # fmt: skip
    return with_values(tiny, fixed | {key.replace("__", "."): value for key, value in changes.items()})


def train_with_deepspeed(
    rank: int, world_size: int, spec: str, first: int, last: int, load: str, save: str, out: str
) -> None:
    """Train steps `first` to `last` on the run's samples with plain DeepSpeed."""
    import deepspeed

    from engine.data.order import DataOrder
    from engine.train.init_model import make_model

    job = TrainJob.from_dict(json.loads(spec))
    config, objective = job.config, job.objective()
    samples = objective.samples(Split.open(job.data_folder, "train"))
    order = DataOrder(len(samples), config.train.global_batch, config.seed)
    model = make_model(job, objective)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2), weight_decay=0.0
    )
    options = {
        "train_micro_batch_size_per_gpu": config.train.global_batch // world_size, "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip, "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "checkpoint": {"load_universal": bool(load)},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
    if load:
        path, _ = engine.load_checkpoint(load)
        assert path is not None
        assert engine.global_steps == first
    step_losses = []
    for step in range(first, last):
        ids = order.sample_ids(step)[rank::world_size]
        rows = torch.stack([torch.as_tensor(samples[i]["tokens"]) for i in ids])
        logits = engine(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        step_losses.append(float(total) / world_size)
    if save:
        engine.save_checkpoint(save, tag="last")
    if rank == 0:
        Path(out).write_text(json.dumps(step_losses))


def run_deepspeed(
    config: Config, first: int, last: int, out: Path, load: Path | None = None, save: Path | None = None
) -> list[float]:
    spec = json.dumps(TrainJob(config, prepare(config)).to_dict())
    on_ranks(train_with_deepspeed, config.train.workers, spec, first, last, str(load or ""), str(save or ""), str(out))
    step_losses: list[float] = json.loads(out.read_text())
    return step_losses


def to_universal(saved: Path, target: Path) -> None:
    """Run DeepSpeed's converter."""
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--num_extract_workers=1",
             "--num_merge_workers=1", f"--input_folder={saved}", f"--output_folder={target}"]  # fmt: skip
    subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )


@pytest.fixture(scope="module")
def straight(tiny: Config) -> list[float]:
    config = of_run(tiny, "universal-straight", ALL, train__workers=2, zero__stage=2)
    (lines,) = run_ranks([TrainJob(config, prepare(config))], 2)
    return losses(lines)


@pytest.fixture(scope="module")
def half(tiny: Config, straight: list[float]) -> Config:
    """Return the config of a run of ours that stopped half-way."""
    config = of_run(tiny, "universal-half", FIRST, train__workers=2, zero__stage=2)
    (lines,) = run_ranks([TrainJob(config, prepare(config))], 2)
    assert losses(lines) == straight[:FIRST]
    return config


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
def test_deepspeed_continues_from_our_checkpoint(
    tmp_path: Path, half: Config, straight: list[float], stage: int, world_size: int
) -> None:
    convert_config = with_values(
        half, {"job": "convert", "convert.to": "universal", "convert.folder": str(tmp_path / "exported")}
    )
    written = convert_and_show(convert_config)
    assert written == tmp_path / "exported" / f"global_step{FIRST}"
    layout = with_values(half, {"zero.stage": stage, "train.workers": world_size})
    step_losses = run_deepspeed(layout, FIRST, ALL, tmp_path / "losses", load=tmp_path / "exported")
    assert step_losses == pytest.approx(straight[FIRST:], abs=1e-5)
    with pytest.raises(UserError, match="exists already"):
        convert_and_show(convert_config)


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
def test_a_run_continues_from_deepspeeds_checkpoint(
    tmp_path: Path, tiny: Config, straight: list[float], stage: int, world_size: int
) -> None:
    theirs = of_run(tiny, "theirs", FIRST, train__workers=world_size, zero__stage=stage)
    first_losses = run_deepspeed(theirs, 0, FIRST, tmp_path / "losses", save=tmp_path / "saved")
    assert first_losses == pytest.approx(straight[:FIRST], abs=1e-5)
    to_universal(tmp_path / "saved" / "last", tmp_path / "universal" / "last")
    ours = of_run(tiny, f"from-deepspeed-{stage}", ALL, zero__stage=1)
    convert_config = with_values(
        ours, {"job": "convert", "convert.to": "checkpoint", "convert.folder": str(tmp_path / "universal")}
    )
    written = convert_and_show(convert_config)
    assert written == step_folder(ours.run_dir / "checkpoints", FIRST)
    state = Checkpoint(written).state
    assert (state.step, state.skipped, state.updates) == (FIRST, 0, FIRST)
    (lines,) = run_ranks([TrainJob(ours, prepare(ours))], 1)
    assert [line["step"] for line in lines] == list(range(FIRST + 1, ALL + 1))
    assert losses(lines) == pytest.approx(straight[FIRST:], abs=1e-5)
    with pytest.raises(UserError, match=r"exists already: use another name=[.]+ for the run that continues"):
        convert_and_show(convert_config)


def test_converting_both_ways_is_bit_for_bit(tmp_path: Path, half: Config) -> None:
    to_universal_config = with_values(
        half, {"job": "convert", "convert.to": "universal", "convert.folder": str(tmp_path / "exported")}
    )
    convert_and_show(to_universal_config)
    back = with_values(to_universal_config, {"name": "back", "runs_dir": str(tmp_path), "convert.to": "checkpoint"})
    written, original = Checkpoint(convert_and_show(back)), Checkpoint(step_folder(half.run_dir / "checkpoints", FIRST))
    assert (written.state.step, written.state.samples) == (original.state.step, original.state.samples)
    assert written.shapes == original.shapes
    for name in original.shapes:
        ours, theirs = original.tensors(name), written.tensors(name)
        assert ours.keys() == theirs.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[kind], theirs[kind]) for kind in ours), name


class Trap:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, half: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    to_universal_config = with_values(
        half, {"job": "convert", "convert.to": "universal", "convert.folder": str(tmp_path / "exported")}
    )
    written = convert_and_show(to_universal_config)
    file = sorted(written.glob("zero/*/exp_avg.pt"))[1]
    torch.save({"param": Trap()}, file)
    back = with_values(to_universal_config, {"name": "trap", "runs_dir": str(tmp_path), "convert.to": "checkpoint"})
    with pytest.raises(UserError, match=f"{file} cannot be read: it is damaged, or contains more than tensors"):
        convert_and_show(back)
    assert not (tmp_path / "trapped").exists()
    file.unlink()
    with pytest.raises(UserError, match="convert it again"):
        convert_and_show(back)
    with pytest.raises(UserError, match="is no universal checkpoint"):
        convert_and_show(with_values(back, {"convert.folder": str(tmp_path)}))


def test_any_checkpoint_converts_to_a_bundle(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = with_values(of_run(tiny, "bundles", 4), {"train.checkpoint_every": 2})
    data = prepare(config)
    run_ranks([TrainJob(config, data)], 1)
    run = RunFolder(config.run_dir)
    convert_config = with_values(config, {"job": "convert", "convert.step": 2})
    with pytest.raises(UserError, match="has never trained"):
        convert_and_show(convert_config)
    run.config_file.write_text(yaml.safe_dump(to_dict(config)))
    run.write_status(RunStatus("pretrain", "finished", 4, 4, updated=now(), data=str(data)))
    folder = convert_and_show(convert_config)
    assert folder == run.path / "bundle-00000002"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = Checkpoint(step_folder(run.checkpoints, 2)).weights()
    last = Checkpoint(step_folder(run.checkpoints, 4)).weights()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert not torch.equal(weight, last[name])
    manifest = json.loads((folder / "manta.json").read_text())
    assert manifest["run"]["step"] == 2
    assert manifest["run"]["samples_hash"] == list(run.metrics())[1]["samples_hash"]
    with pytest.raises(UserError, match=r"no checkpoint after 3 steps in .*: it has those after 2, 4"):
        convert_and_show(with_values(convert_config, {"convert.step": 3}))
