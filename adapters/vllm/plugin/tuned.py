"""Tuned models on disk, for RL guidance in vLLM: LoRA adapters in PEFT's layout, and whole networks.

Everything that can be known from configurations and the headers of files is checked before a weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.core import InputError, UnsupportedError, check

__all__ = ["Adapter", "Network", "check_engine", "open_tuned"]


Weights = Iterable[tuple[str, Tensor]]

_CONFIG, _ADAPTER, _DELTAS = "config.json", "adapter_config.json", "adapter_model.safetensors"
_FOLDER = f"a folder with {_ADAPTER} and {_DELTAS}, or with {_CONFIG} and *.safetensors"
_OTHER_LORA = (
    "fan_in_fan_out",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alpha_pattern",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Settings of PEFT under which a layer is more than `W + scale B A`."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""
_NO_MATTER = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Settings of a network in which base and tuned may differ."""


@dataclass(frozen=True)
class _Held:
    """A tensor in a file."""

    file: Path
    key: str
    shape: tuple[int, ...]


def _tensors(files: Iterable[Path], field: str) -> dict[str, _Held]:
    """What safetensors files hold, from their headers. Raises `InputError`."""
    found: dict[str, _Held] = {}
    for file in sorted(files):
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: _Held(file, name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(field, f"{file} ({error})", "a safetensors file") from None
    return found


def _json(file: Path, field: str) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(field, f"{file} ({error})", "a JSON file") from None
    check(isinstance(read, dict), field, str(file), "a JSON object")
    return dict(read)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of linear layers: the base's weights, with `W + scale B A` where it has an `A` and a `B`."""

    field: str
    folder: Path
    pairs: Mapping[str, tuple[_Held, _Held, float]]
    """By the name of the base's weight: `A` `[r, in]`, `B` `[out, r]`, scale."""

    @classmethod
    def open(cls, folder: Path, field: str) -> Adapter:
        """From `adapter_config.json` and the header of `adapter_model.safetensors`. Raises `InputError`."""
        config = _json(folder / _ADAPTER, field)
        check(config.get("peft_type") == "LORA", field, f"peft_type {config.get('peft_type')!r}", "LORA")
        for name in _OTHER_LORA:
            check(
                not config.get(name),
                field,
                f"{name} {config.get(name)!r} in {_ADAPTER}",
                "a plain LoRA of linear layers; merge any other into a whole network first",
            )
        check(config.get("bias", "none") == "none", field, f"bias {config.get('bias')!r} in {_ADAPTER}", "bias none")
        start = config.get("init_lora_weights", True)
        check(start in _STARTS, field, f"init_lora_weights {start!r}", "one that leaves the base's weights as they are")
        alpha: Any = config.get("lora_alpha")
        check(isinstance(alpha, int | float) and math.isfinite(alpha), field, f"lora_alpha {alpha!r}", "a number")
        check((folder / _DELTAS).is_file(), field, str(folder), _FOLDER)
        held = _tensors([folder / _DELTAS], field)
        return cls(field, folder, dict(_paired(held, float(alpha), bool(config.get("use_rslora")), field)))

    def check(self, base: Mapping[str, _Held] | None) -> None:
        """Raise `InputError` unless every pair fits a weight of `base` (None: not known yet)."""
        if base is None:
            return
        for name, (a, b, _) in self.pairs.items():
            self._fits(name, (b.shape[0], a.shape[1]), base[name].shape if name in base else None)

    def _fits(self, name: str, ours: tuple[int, ...], theirs: tuple[int, ...] | None) -> None:
        given = f"{self.folder}: {name} {list(ours)}"
        there = "it has no such weight" if theirs is None else f"there it is {list(theirs)}"
        check(ours == theirs, self.field, given, f"an adapter of the engine's model ({there})")

    def weights(self, base: Weights) -> Iterator[tuple[str, Tensor]]:
        """The weights of the tuned model, from those of the base; merged ones in float32."""
        left = set(self.pairs)
        with safe_open(self.folder / _DELTAS, "pt") as deltas:
            for name, tensor in base:
                if name in self.pairs:
                    left.discard(name)
                    first, second, scale = self.pairs[name]
                    a, b = (deltas.get_tensor(held.key).float() for held in (first, second))
                    self._fits(name, (b.shape[0], a.shape[1]), tuple(tensor.shape))
                    tensor = tensor.float() + scale * (b @ a).to(tensor.device)
                yield name, tensor
        for name in sorted(left)[:1]:
            self._fits(name, (self.pairs[name][1].shape[0], self.pairs[name][0].shape[1]), None)


def _target(key: str) -> str | None:
    """The name of the base's weight that a tensor of an adapter belongs to, or None."""
    for side in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith("base_model.model.") and key.endswith(side):
            return key.removeprefix("base_model.model.").removesuffix(side) + ".weight"
    return None


def _paired(
    held: Mapping[str, _Held], alpha: float, rank_stable: bool, field: str
) -> Iterator[tuple[str, tuple[_Held, _Held, float]]]:
    for key in held:
        check(_target(key) is not None, field, f"{key} in {_DELTAS}", "lora_A and lora_B of linear layers")
    check(bool(held), field, _DELTAS, "at least one lora_A and lora_B")
    for name in sorted({str(_target(key)) for key in held}):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = held.get(f"{stem}.lora_A.weight"), held.get(f"{stem}.lora_B.weight")
        ok = a is not None and b is not None and len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
        check(ok, field, f"{stem} in {_DELTAS}", "lora_A [r, in] and lora_B [out, r]")
        assert a is not None and b is not None
        rank = a.shape[0]
        yield name, (a, b, alpha / (math.sqrt(rank) if rank_stable else rank))


@dataclass(frozen=True)
class Network:
    """A whole network in safetensors, of the base's architecture and shapes."""

    field: str
    folder: Path
    held: Mapping[str, _Held]

    @classmethod
    def open(cls, folder: Path, field: str) -> Network:
        """From `config.json` and the headers of the folder's weights. Raises `InputError`."""
        config = _json(folder / _CONFIG, field)
        check(
            not config.get("quantization_config"), field, f"{folder}, which is quantised", "weights in full precision"
        )
        held = _tensors(folder.glob("*.safetensors"), field)
        check(bool(held), field, str(folder), _FOLDER)
        return cls(field, folder, held)

    def check(self, base: Mapping[str, _Held] | None) -> None:
        """Raise `InputError` unless the weights have the names and shapes of `base` (None: not known yet)."""
        if base is None:
            return
        for name in sorted(set(base) | set(self.held)):
            ours, theirs = (held[name].shape if name in held else None for held in (self.held, base))
            given = f"{self.folder}: {name} {'missing' if ours is None else list(ours)}"
            there = "missing" if theirs is None else list(theirs)
            check(ours == theirs, self.field, given, f"a network of the engine's model's shapes (there it is {there})")

    def weights(self, base: Weights) -> Iterator[tuple[str, Tensor]]:
        """The weights of the tuned model; those of the base are not looked at."""
        for file in sorted({held.file for held in self.held.values()}):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)


def open_tuned(name: str, folder: str) -> Adapter | Network:
    """A tuned model, from what its folder says about itself. Raises `InputError`."""
    path, field = Path(folder).expanduser(), f"additional_config steer.tuned.{name}"
    check(path.is_dir(), field, folder, _FOLDER)
    if (path / _ADAPTER).is_file():
        return Adapter.open(path, field)
    check((path / _CONFIG).is_file(), field, folder, _FOLDER)
    return Network.open(path, field)


def check_engine(config: Any, tuned: Mapping[str, str]) -> None:
    """Check, before anything long, that an engine can run these tuned models (folders by name) beside its own.

    Raises:
        InputError: a folder is missing or wrong, or of another model than the engine's.
        UnsupportedError: the engine does what guidance does not go with.
    """
    for reason, is_so in _obstacles(config).items():
        if is_so:
            raise UnsupportedError(f"additional_config steer.tuned does not go with {reason}")
    folder = Path(str(config.model_config.model))
    base = _tensors(folder.glob("*.safetensors"), "model") if folder.is_dir() else {}
    for name, path in tuned.items():
        opened = open_tuned(name, path)
        if isinstance(opened, Network):
            _check_config(config.model_config, opened)
        opened.check(base or None)


def _obstacles(config: Any) -> dict[str, bool]:
    model, parallel = config.model_config, config.parallel_config
    text_only = model.runner_type == "generate" and not (model.is_multimodal_model or model.is_encoder_decoder)
    return {
        "pipeline_parallel_size above 1": parallel.pipeline_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "quantised models": model.quantization is not None,
        "models that are not text-only decoders": not text_only,
        "models with layers other than attention": model.is_hybrid or model.is_attention_free,
        "enable_lora: name the adapter in steer.tuned": config.lora_config is not None,
        "enable_prompt_embeds": bool(model.enable_prompt_embeds),
        "batch-sharded sampling": bool(getattr(parallel, "enable_batch_sharded_sampling", False)),
        f"load_format {config.load_config.load_format}": config.load_config.load_format
        not in ("auto", "hf", "safetensors"),
    }


def _check_config(model: Any, network: Network) -> None:
    """Raise `InputError` where a network computes with other settings than the engine's model."""
    from vllm.transformers_utils.config import get_config

    ours, theirs = (
        get_config(str(path), trust_remote_code=model.trust_remote_code, revision=revision).to_dict()
        for path, revision in ((network.folder, None), (model.model, model.revision))
    )
    for name in sorted(set(ours) & set(theirs) - _NO_MATTER):
        check(
            ours[name] == theirs[name],
            network.field,
            f"{network.folder}: {name} {ours[name]!r}",
            f"{theirs[name]!r}, as in the engine's model",
        )
