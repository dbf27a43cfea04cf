"""LoRA adapters by name on one base model (Hu et al. 2021): each row of a forward may have another one, or none.

An adapter is a folder in peft's format. It is loaded when a sequence first needs it; the least recently used one is
evicted for it. The matrices of a forward's adapters are concatenated, so that a layer computes two more products however
many adapters there are, and each row keeps what its own adapter gave (as Chen et al. 2023, Punica, do with a kernel).
Shapes: T tokens of the step, I and O inputs and outputs of a layer, R ranks of all adapters in the step.
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
from engine.models.int8 import Int8Linear, input_dtype

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
USED_KEYS = {"r", "lora_alpha", "use_rslora"}
# Keys of an adapter's config that don't change what its two matrices do. Any other must be off.
IGNORED_KEYS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type",
    "lora_dropout", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Initializations that leave the base model's weights as they were.
SAFE_INITS = (True, False, "gaussian", "eva", "orthogonal")


class LoraWeights(NamedTuple):
    """One layer's matrices of an adapter."""

    down_RI: Tensor
    up_OR: Tensor  # times the adapter's scale


class StackedWeights(NamedTuple):
    """One layer's matrices of all adapters in a step, concatenated."""

    down_RI: Tensor
    up_OR: Tensor
    owners: tuple[int, ...]  # of each rank: an adapter's index among those in the step


def pin_adapters(adapters: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return {"folder", "hash"} of each adapter's folder, by name. Raises UserError for one that is missing."""
    pins = {}
    for name, path in adapters.items():
        folder = Path(path).absolute()
        pins[name] = {"folder": str(folder), "hash": _hash(*_read_files(name, folder))}
    return pins


def check_adapters(bundle: Bundle, adapters: Mapping[str, Any]) -> None:
    """Raise UserError for an adapter that cannot be loaded, or is not for this bundle. The model is built without weights."""
    if not adapters:
        return
    objective = bundle.objective()
    if not objective.is_causal:
        raise UserError(
            f"serve.adapters are for causal language models, and {bundle.folder} is for {objective.options.name}"
        )
    for name, folder in adapters.items():
        config, _ = _read_files(name, Path(folder))
        base = str(_parse_config(name, config).get("base_model_name_or_path") or "")
        if (Path(base) / "config.json").is_file() and Bundle.open(base).hash != bundle.hash:
            raise UserError(f"adapter '{name}' was trained on {base}, not on {bundle.folder}: deploy that one with it")
    model_config = transformers.AutoConfig.from_pretrained(bundle.folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config)
    for name, pin in pin_adapters(adapters).items():
        load_adapter(name, pin, model)


def read_pinned(name: str, pin: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return an adapter's config and weights. Raises UserError if they were changed since the adapter was pinned."""
    config, weights = _read_files(name, Path(pin["folder"]))
    if _hash(config, weights) != pin["hash"]:
        raise UserError(f"adapter '{name}' in {pin['folder']} was changed since it was deployed: deploy it again")
    return config, weights


def rank_and_modules(name: str, pin: Mapping[str, str]) -> tuple[int, set[str]]:
    """Return an adapter's largest rank, and the last parts of its layers' paths. Raises UserError as `read_pinned` does."""
    tensors = safetensors.torch.load(read_pinned(name, pin)[1])
    downs = {key: match for key in tensors if (match := TENSOR.fullmatch(key)) and match["side"] == "A"}
    return max(len(tensors[key]) for key in downs), {match["path"].rpartition(".")[2] for match in downs.values()}


def load_adapter(name: str, pin: Mapping[str, str], model: nn.Module) -> dict[str, LoraWeights]:
    """Load an adapter for a model: its matrices by the path of their layer, in its precision and on its device.

    Raises UserError for one that was changed since it was pinned, does more than add the product of two matrices, or
    has other layers or shapes than the model.
    """
    config_bytes, weights = read_pinned(name, pin)
    config = _parse_config(name, config_bytes)
    _check_plain_lora(name, config)
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise UserError(f"adapter '{name}': its {WEIGHTS} is damaged ({error}): save it again with peft") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        if not match:
            raise UserError(
                f"adapter '{name}' has {key}, which is no LoRA matrix of a linear layer: merge it into a bundle"
            )
        if not tensor.isfinite().all():
            raise UserError(f"adapter '{name}': {key} is not all finite numbers: train it again")
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    if not sides:
        raise UserError(f"adapter '{name}': its {WEIGHTS} holds nothing: save it again with peft")
    layers = dict(model.named_modules())
    return {path: _make_weights(name, path, pair, config, layers, model) for path, pair in sides.items()}


class LoraAdapters:
    """The adapters of one model: which ones there are, which are in memory, and what they add to a forward."""

    def __init__(
        self, model: nn.Module, pins: Mapping[str, Mapping[str, str]] | None = None, max_loaded: int = 1
    ) -> None:
        """Check every adapter, and keep none in memory; `pins` as `pin_adapters` returns them, `max_loaded` at once.

        Raises UserError for the first that was changed or doesn't fit.
        """
        self.model, self.pins, self.max_loaded = model, dict(pins or {}), max_loaded
        self.loaded: OrderedDict[str, dict[str, LoraWeights]] = OrderedDict()  # the least recently used first
        self.num_loads = 0
        self._forward = _ForwardState()
        self._stacked_names: tuple[str, ...] = ()
        self._stacked: dict[str, StackedWeights] = {}
        paths = {path for name, pin in self.pins.items() for path in load_adapter(name, pin, model)}
        layers = dict(model.named_modules())
        for path in sorted(paths):
            layers[path].register_forward_hook(self._make_hook(path))

    def has_room(self, in_use: Collection[str]) -> bool:
        """Return whether one more can be loaded while those of `in_use` have to stay."""
        return len(self.loaded) < self.max_loaded or any(name not in in_use for name in self.loaded)

    def load(self, name: str, in_use: Collection[str]) -> None:
        """Load an adapter; if there is no room, evict the least recently used one that is not in use. Raises UserError."""
        while len(self.loaded) >= self.max_loaded:
            del self.loaded[next(other for other in self.loaded if other not in in_use)]
            self._stacked_names, self._stacked = (), {}
        self.loaded[name] = load_adapter(name, self.pins[name], self.model)
        self.num_loads += 1

    @contextlib.contextmanager
    def active(self, names: Sequence[str]) -> Iterator[None]:
        """Have this thread's forwards apply to each of T tokens the adapter of that name; "": none."""
        in_step = tuple(sorted({name for name in names if name}))
        if not in_step:
            yield
            return
        for name in in_step:
            self.loaded.move_to_end(name)
        if in_step != self._stacked_names:
            self._stacked_names, self._stacked = in_step, self._stack(in_step)
        index = {name: i for i, name in enumerate(in_step)}
        device = next(self.model.parameters()).device
        self._forward.owner_T = torch.tensor([index.get(name, -1) for name in names], device=device)
        self._forward.masks.clear()
        try:
            yield
        finally:
            self._forward.owner_T = None

    def _stack(self, names: Sequence[str]) -> dict[str, StackedWeights]:
        stacked = {}
        for path in {path for name in names for path in self.loaded[name]}:
            weights = [(i, self.loaded[name][path]) for i, name in enumerate(names) if path in self.loaded[name]]
            owners = tuple(i for i, layer in weights for _ in range(len(layer.down_RI)))
            downs, ups = [layer.down_RI for _, layer in weights], [layer.up_OR for _, layer in weights]
            if len(weights) == 1:  # no copy
                stacked[path] = StackedWeights(downs[0], ups[0], owners)
            else:
                stacked[path] = StackedWeights(torch.cat(downs), torch.cat(ups, 1), owners)
        return stacked

    def _make_hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_adapters(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            owner_T = self._forward.owner_T
            if owner_T is None or path not in self._stacked:
                return None
            weights, given = self._stacked[path], inputs[0]
            if given.shape[:-1].numel() != len(owner_T):
                raise RuntimeError(
                    f"{path} sees {given.shape[:-1].numel()} of {len(owner_T)} tokens: no adapter can be there"
                )
            # Other adapters' values are set to zero, not multiplied by it: an infinite one must not reach this row.
            own_R = F.linear(given, weights.down_RI).masked_fill(self._forward.not_own_mask(weights.owners), 0)
            return output + F.linear(own_R, weights.up_OR)

        return add_adapters


class _ForwardState(threading.local):
    """The adapters of the tokens in this thread's forward; other threads may run the model without any."""

    owner_T: Tensor | None = None  # index of each token's adapter among those in the step; -1: none

    def __init__(self) -> None:
        self.masks: dict[tuple[int, ...], Tensor] = {}  # the same for all layers with the same adapters

    def not_own_mask(self, owners: tuple[int, ...]) -> Tensor:
        """Return [T, R]: true where a rank belongs to another adapter than the token's."""
        if owners not in self.masks:
            assert self.owner_T is not None
            owner_R = torch.tensor(owners, device=self.owner_T.device)
            self.masks[owners] = self.owner_T[:, None] != owner_R
        return self.masks[owners]


def _read_files(name: str, folder: Path) -> tuple[bytes, bytes]:
    """Return the bytes of an adapter's config and weights. Raises UserError where one is missing."""
    try:
        return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise UserError(
            f"adapter '{name}': {error.filename} can't be read: give the folder of peft's `save_pretrained`, as safetensors"
        ) from error


def _hash(config: bytes, weights: bytes) -> str:
    """Return the SHA-256 (hex) of both files."""
    return hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()


def _parse_config(name: str, config: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        parsed = json.loads(config)
        if isinstance(parsed, dict):
            return parsed
    raise UserError(f"adapter '{name}': its {CONFIG} is no JSON object: save it again with peft")


def _check_plain_lora(name: str, config: dict[str, Any]) -> None:
    """Raise UserError for an adapter that does more than add B A to frozen linear layers."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter '{name}' is of peft's kind {config.get('peft_type')}: LORA ones are served")
    init = config.get("init_lora_weights", True)
    if init not in SAFE_INITS:
        raise UserError(
            f"adapter '{name}' began with init_lora_weights={init}, which changes the base: convert it to plain LoRA"
        )
    for key, value in config.items():
        if key not in USED_KEYS | IGNORED_KEYS | {"init_lora_weights"} and value and value != "none":
            raise UserError(
                f"adapter '{name}' has {key}={value}, which is not served beside others: merge it into a bundle"
            )


def _make_weights(
    name: str,
    path: str,
    sides: dict[str, Tensor],
    config: dict[str, Any],
    layers: dict[str, nn.Module],
    model: nn.Module,
) -> LoraWeights:
    """Return one layer's matrices in the layer's precision, scaled. Raises UserError where the model has no such layer."""
    layer = layers.get(path)
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(layer, (nn.Linear, Conv1D, Int8Linear)) or layer is output or "experts" in path.split("."):
        found = "no such layer" if layer is None else f"a {type(layer).__name__} there, which no adapter is served on"
        raise UserError(
            f"adapter '{name}' is for {path}, and the model has {found}: it is for another base, or merge it into a bundle"
        )
    sizes = tuple(layer.weight.shape) if isinstance(layer, Conv1D) else tuple(layer.weight.shape)[::-1]
    down, up = sides.get("A"), sides.get("B")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or not len(down) or len(down) != up.shape[1]:
        raise UserError(f"adapter '{name}': its matrices for {path} don't belong together: save it again with peft")
    if (down.shape[1], up.shape[0]) != sizes:
        raise UserError(
            f"adapter '{name}' is for another base: {path} has {sizes[0]} inputs and {sizes[1]} outputs, "
            f"the adapter {down.shape[1]} and {up.shape[0]}"
        )
    rank, alpha = len(down), config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"adapter '{name}' has lora_alpha={alpha}, which is no number: save it again with peft")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    target: dict[str, Any] = {"dtype": input_dtype(layer), "device": next(model.parameters()).device}
    return LoraWeights(down.to(**target), (scale * up.float()).to(**target))
