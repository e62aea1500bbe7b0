"""Folders of tuned diffusion policies: an adapter or a whole network, what lies beside it, and its cards."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer.adapters.diffusers.model import DiffusionModel
from steer.adapters.diffusers.network import NetworkSource
from steer.artifacts import Card
from steer.core import SteerError
from steer.embedded import CARD_NAME, resolve
from steer.train.fashion.nets import load_net, read_facts, save_net
from steer.train.policy_folder import CARD

_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_network(network: Any, model: DiffusionModel, folder: Path) -> None:
    """Write an adapter in PEFT's layout, or a folder that `steer.load` takes, in the precision of the base."""
    for name, tensor in network.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise SteerError(f"train policy: {name} is no longer finite; lower learning_rate")
    adapter = getattr(network, "steer_adapter", None)
    if adapter is not None:
        _save_adapter(adapter, model, folder)
    else:
        _save_whole(network, model, folder)


def write_cards(card: Card, model: DiffusionModel, folder: Path, name: str) -> None:
    """The policy's card, and with a whole network also the one that `steer.load` reads."""
    _write_json(folder / CARD, asdict(card))
    if card.settings["form"] == "full":
        _write_json(folder / CARD_NAME, _model_card(model, card, name))


def _save_adapter(adapter: Any, model: DiffusionModel, folder: Path) -> None:
    adapter.peft_config["default"].base_model_name_or_path = model.name
    adapter.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    # Safetensors leaves its files to their owner alone.
    shutil.copymode(folder / _ADAPTER, folder / _WEIGHTS)


def _save_whole(network: Any, model: DiffusionModel, folder: Path) -> None:
    source = model.source
    assert isinstance(source, NetworkSource)
    inner = "transformer" if "Transformer" in type(network).__name__ else "unet"
    if network.dtype != source.dtype:
        network = network.to(source.dtype)
    network.save_pretrained(folder / inner, safe_serialization=True)
    for path in (folder / inner).glob("*.safetensors"):
        shutil.copymode(folder / inner / "config.json", path)
    source.scheduler.save_pretrained(folder / "scheduler")
    _copy_nets(model, folder)


def _copy_nets(model: DiffusionModel, folder: Path) -> None:
    """Classifier and judge of the base, if it has them."""
    origin = _origin(model)
    for name in ("classifier", "judge"):
        if origin is not None and (origin / name / "config.json").is_file():
            save_net(folder / name, load_net(origin / name), read_facts(origin / name))
        elif name == "classifier" and model.classifier is not None:
            save_net(folder / name, model.classifier.net, {"class_names": model.classifier.classes})


def _origin(model: DiffusionModel) -> Path | None:
    """The folder that the model was loaded from, where its name still says."""
    try:
        found = resolve(model.name)
    except SteerError:
        return None
    return found if isinstance(found, Path) and (found / CARD_NAME).is_file() else None


def _model_card(model: DiffusionModel, policy: Card, name: str) -> dict[str, Any]:
    """The base's card with a "policy" entry; what it says of the base's training and quality goes under "base"."""
    source, origin = model.source, _origin(model)
    assert isinstance(source, NetworkSource)
    if origin is not None:
        card = json.loads((origin / CARD_NAME).read_text(encoding="utf-8"))
    else:
        config: Any = source.network.config
        card = {
            "kind": "diffusion",
            "classes": model.classes or [],
            "null_class": source.null,
            "pixel_unshuffle": source.unshuffle,
            "image_channels": config.in_channels // source.unshuffle**2,
        }
    old = {key: card.pop(key) for key in ("training", "metrics", "made_with", "base", "policy") if key in card}
    return {**card, "name": name, "policy": asdict(policy), "base": {"name": model.name, **old}}


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n", encoding="utf-8")
