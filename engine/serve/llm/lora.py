"""LoRA adapters by name on one base (Hu et al. 2021): rows of one forward may each have another, or none.

An adapter is a folder in peft's format. It is loaded when a completion first asks for it, and given up for another when it
is the one longest out of use. A forward's adapters are laid side by side, so that a layer does two more products however
many there are, and each row keeps what its own adapter gave (as Chen et al. 2023, Punica, do with a kernel). Shapes:
T tokens of the step, I and O inputs and outputs of a layer, R ranks of the adapters in the step, end to end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.bundles.bundle import Bundle
from engine.errors import UserError
from engine.models.int8 import Int8Linear, precision

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
# What an adapter's config may say without changing what its two matrices do. Anything else must be off.
READ = {"r", "lora_alpha", "use_rslora"}
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type",
    "lora_dropout", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Ways to begin that leave the base's weights as they were.
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


class Pair(NamedTuple):
    """One layer's part of an adapter."""

    down_RI: Tensor
    up_OR: Tensor  # times the adapter's scale


class Side(NamedTuple):
    """One layer's parts of the adapters in a step, end to end."""

    down_RI: Tensor
    up_OR: Tensor
    owners: tuple[int, ...]  # of each rank: an adapter's place among those in the step


def pinned(adapters: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return {"folder", "hash"} of each adapter's folder by its name. Raises UserError for one that isn't there."""
    found = {}
    for name, folder in adapters.items():
        place = Path(folder).absolute()
        found[name] = {"folder": str(place), "hash": _hash(*_files(name, place))}
    return found


def refuse_unfit(bundle: Bundle, adapters: Mapping[str, Any]) -> None:
    """Raise UserError for an adapter that cannot be read, or is not for this bundle. The model is built without weights."""
    if not adapters:
        return
    task = bundle.objective()
    if task.auto_class != "AutoModelForCausalLM":
        raise UserError(f"serve.adapters are for bundles that write, and {bundle.folder} is for {task.options.name}")
    for name, folder in adapters.items():
        config, _ = _files(name, Path(folder))
        told = str(_parsed(name, config).get("base_model_name_or_path") or "")
        if (Path(told) / "config.json").is_file() and Bundle.open(told).hash != bundle.hash:
            raise UserError(f"adapter '{name}' was trained on {told}, not on {bundle.folder}: deploy that one with it")
    shape = transformers.AutoConfig.from_pretrained(bundle.folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    for name, it in pinned(adapters).items():
        read(name, it, model)


def unchanged(name: str, it: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return an adapter's config and weights. Raises UserError for one that was changed since it was pinned."""
    config, weights = _files(name, Path(it["folder"]))
    if _hash(config, weights) != it["hash"]:
        raise UserError(f"adapter '{name}' in {it['folder']} was changed since it was deployed: deploy it again")
    return config, weights


def extent(name: str, it: Mapping[str, str]) -> tuple[int, set[str]]:
    """Return an adapter's largest rank, and the last parts of its layers' paths. Raises UserError as `unchanged` does."""
    tensors = safetensors.torch.load(unchanged(name, it)[1])
    found = {key: match for key in tensors if (match := TENSOR.fullmatch(key)) and match["side"] == "A"}
    return max(len(tensors[key]) for key in found), {match["path"].rpartition(".")[2] for match in found.values()}


def read(name: str, it: Mapping[str, str], model: nn.Module) -> dict[str, Pair]:
    """Load an adapter for a model: its layers by their paths, in their precision and where they are.

    Raises UserError for one that was changed since it was pinned, does more than add two matrices' product, or has other
    layers or shapes than the model.
    """
    told, weights = unchanged(name, it)
    config = _parsed(name, told)
    _refuse_what_is_more(name, config)
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise UserError(f"adapter '{name}': its {WEIGHTS} is damaged ({error}): save it again with peft") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = TENSOR.fullmatch(key)
        if not found:
            raise UserError(
                f"adapter '{name}' has {key}, which is no LoRA matrix of a linear layer: merge it into a bundle"
            )
        if not tensor.isfinite().all():
            raise UserError(f"adapter '{name}': {key} is not all finite numbers: train it again")
        sides.setdefault(found["path"], {})[found["side"]] = tensor
    if not sides:
        raise UserError(f"adapter '{name}': its {WEIGHTS} holds nothing: save it again with peft")
    layers = dict(model.named_modules())
    return {path: _pair(name, path, pair, config, layers, model) for path, pair in sides.items()}


class LoraAdapters:
    """The adapters of one model: which there are, which are in memory, and what they add to a forward."""

    def __init__(self, model: nn.Module, known: Mapping[str, Mapping[str, str]] | None = None, most: int = 1) -> None:
        """Read every adapter once, and keep none; `known` as `pinned` returns them, `most` in memory at once.

        Raises UserError for the first that was changed or doesn't fit.
        """
        self.model, self.known, self.most = model, dict(known or {}), most
        self.loaded: OrderedDict[str, dict[str, Pair]] = OrderedDict()  # the one longest out of use first
        self.loads = 0
        self._step = _Step()
        self._stacked: tuple[str, ...] = ()
        self._sides: dict[str, Side] = {}
        paths = {path for name, it in self.known.items() for path in read(name, it, model)}
        layers = dict(model.named_modules())
        for path in sorted(paths):
            layers[path].register_forward_hook(self._hook(path))

    def has_room(self, running: Collection[str]) -> bool:
        """Tell whether one more can be loaded while those of `running` are in use."""
        return len(self.loaded) < self.most or any(name not in running for name in self.loaded)

    def load(self, name: str, running: Collection[str]) -> None:
        """Load an adapter, in the place of the one longest out of use if there is no other. Raises UserError."""
        while len(self.loaded) >= self.most:
            del self.loaded[next(other for other in self.loaded if other not in running)]
            self._stacked, self._sides = (), {}
        self.loaded[name] = read(name, self.known[name], self.model)
        self.loads += 1

    @contextlib.contextmanager
    def applied(self, names: Sequence[str]) -> Iterator[None]:
        """Have this thread's forwards add to each of T tokens what its adapter does; "": nothing."""
        there = tuple(sorted({name for name in names if name}))
        if not there:
            yield
            return
        for name in there:
            self.loaded.move_to_end(name)
        if there != self._stacked:
            self._stacked, self._sides = there, self._side_by_side(there)
        places = {name: place for place, name in enumerate(there)}
        device = next(self.model.parameters()).device
        self._step.owners_T = torch.tensor([places.get(name, -1) for name in names], device=device)
        self._step.others.clear()
        try:
            yield
        finally:
            self._step.owners_T = None

    def _side_by_side(self, there: Sequence[str]) -> dict[str, Side]:
        sides = {}
        for path in {path for name in there for path in self.loaded[name]}:
            pairs = [(place, self.loaded[name][path]) for place, name in enumerate(there) if path in self.loaded[name]]
            owners = tuple(place for place, pair in pairs for _ in range(len(pair.down_RI)))
            downs, ups = [pair.down_RI for _, pair in pairs], [pair.up_OR for _, pair in pairs]
            alone = len(pairs) == 1  # no copy
            sides[path] = Side(downs[0] if alone else torch.cat(downs), ups[0] if alone else torch.cat(ups, 1), owners)
        return sides

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            owners_T = self._step.owners_T
            if owners_T is None or path not in self._sides:
                return None
            side, given = self._sides[path], inputs[0]
            if given.shape[:-1].numel() != len(owners_T):
                raise RuntimeError(
                    f"{path} sees {given.shape[:-1].numel()} of {len(owners_T)} tokens: no adapter can be there"
                )
            # What is no row's own is set to zero, not multiplied by it: an infinite one is nobody else's affair.
            kept_R = F.linear(given, side.down_RI).masked_fill(self._step.not_theirs(side.owners), 0)
            return output + F.linear(kept_R, side.up_OR)

        return add


class _Step(threading.local):
    """What the forward under way in a thread knows of its tokens; the model may answer for others in other threads."""

    owners_T: Tensor | None = None  # place of each token's adapter among those in the step; -1: none

    def __init__(self) -> None:
        self.others: dict[tuple[int, ...], Tensor] = {}  # the same for all layers with the same adapters

    def not_theirs(self, owners: tuple[int, ...]) -> Tensor:
        """Return [T, R]: true where a rank is of another adapter than the token's."""
        if owners not in self.others:
            assert self.owners_T is not None
            owners_R = torch.tensor(owners, device=self.owners_T.device)
            self.others[owners] = self.owners_T[:, None] != owners_R
        return self.others[owners]


def _files(name: str, folder: Path) -> tuple[bytes, bytes]:
    """Return an adapter's config and weights as they lie there. Raises UserError where one is missing."""
    try:
        return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise UserError(
            f"adapter '{name}': {error.filename} can't be read: give the folder of peft's `save_pretrained`, as safetensors"
        ) from error


def _hash(config: bytes, weights: bytes) -> str:
    """Return the SHA-256 (hex) of both files."""
    return hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()


def _parsed(name: str, config: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(config)
        if isinstance(found, dict):
            return found
    raise UserError(f"adapter '{name}': its {CONFIG} is no JSON object: save it again with peft")


def _refuse_what_is_more(name: str, config: dict[str, Any]) -> None:
    """Raise UserError for an adapter that is more than B A beside frozen linear layers."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter '{name}' is of peft's kind {config.get('peft_type')}: LORA ones are served")
    begun = config.get("init_lora_weights", True)
    if begun not in BEGINNINGS:
        raise UserError(
            f"adapter '{name}' began with init_lora_weights={begun}, which changes the base: convert it to plain LoRA"
        )
    for key, value in config.items():
        if key not in READ | NEUTRAL | {"init_lora_weights"} and value and value != "none":
            raise UserError(
                f"adapter '{name}' has {key}={value}, which is not served beside others: merge it into a bundle"
            )


def _pair(
    name: str,
    path: str,
    sides: dict[str, Tensor],
    config: dict[str, Any],
    layers: dict[str, nn.Module],
    model: nn.Module,
) -> Pair:
    """Return one layer's part in the layer's precision, scaled. Raises UserError where the model has no such layer."""
    layer = layers.get(path)
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(layer, (nn.Linear, Conv1D, Int8Linear)) or layer is output or "experts" in path.split("."):
        what = "no such layer" if layer is None else f"a {type(layer).__name__} there, which no adapter is served on"
        raise UserError(
            f"adapter '{name}' is for {path}, and the model has {what}: it is for another base, or merge it into a bundle"
        )
    wide = tuple(layer.weight.shape) if isinstance(layer, Conv1D) else tuple(layer.weight.shape)[::-1]
    down, up = sides.get("A"), sides.get("B")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or not len(down) or len(down) != up.shape[1]:
        raise UserError(f"adapter '{name}': its matrices for {path} don't belong together: save it again with peft")
    if (down.shape[1], up.shape[0]) != wide:
        raise UserError(
            f"adapter '{name}' is for another base: {path} has {wide[0]} inputs and {wide[1]} outputs, "
            f"the adapter {down.shape[1]} and {up.shape[0]}"
        )
    rank, alpha = len(down), config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"adapter '{name}' has lora_alpha={alpha}, which is no number: save it again with peft")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    like: dict[str, Any] = {"dtype": precision(layer), "device": next(model.parameters()).device}
    return Pair(down.to(**like), (scale * up.float()).to(**like))
