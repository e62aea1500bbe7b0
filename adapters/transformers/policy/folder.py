"""Folders of tuned language models: saved, and opened as a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.model import load as load_network
from steer.adapters.transformers.policy.trl import quiet, require_libraries, shared_copy
from steer.core import SteerError, check
from steer.embedded import resolve
from steer.train.policy_folder import POLICY, read_policy_card

_ADAPTER = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def load_policy(base: LanguageModel | None, folder: Path | str, *, merge: bool = True) -> LanguageModel:
    """The tuned policy as a model of its own, named `base+folder`; `base` is not changed.

    Args:
        base: the model that the policy was tuned from; None loads it by the name on the card.
        folder: what `train_policy` wrote.
        merge: merge a LoRA adapter into a copy of the base's weights, which is as fast as the base. Without, the
            policy runs the adapter beside the base's very weights and takes hardly more memory.

    Raises:
        InputError: not a policy, or one tuned from another model.
    """
    path = Path(folder)
    card = read_policy_card(path)
    whole = not (path / _ADAPTER).is_file()
    if base is not None:
        ours, theirs = base.info.fingerprint, card.model["fingerprint"]
        given = f"{path} (tuned from {card.model.get('name')}, fingerprint {theirs})"
        check(ours == theirs, "policy", given, f"a policy tuned from {base.name} (fingerprint {ours})")
    elif not whole:
        named = card.model["name"]
        return load_policy(load_network(resolve(named), name=named), path, merge=merge)
    name = f"{card.model.get('name') if base is None else base.name}+{path.name}"
    if whole:
        return load_network(path, name=name, device=None if base is None else base.device)
    check((path / _WEIGHTS).is_file(), "policy", f"{path} (without {_WEIGHTS})", POLICY)
    assert base is not None
    require_libraries()
    return open_network(base, path, merge=merge, name=name)


# ---------------------------------------------------------------------------------------------------------- folders


def open_network(base: LanguageModel, folder: Path, *, merge: bool = True, name: str = "policy") -> LanguageModel:
    """The weights in `folder` as a model, whether adapter or whole network."""
    if not (folder / _ADAPTER).is_file():
        network = type(base.network).from_pretrained(folder, dtype=base.network.dtype, use_safetensors=True)
        return LanguageModel(network.to(base.device), base.tokenizer, name)
    from peft import PeftModel

    network = copy.deepcopy(base.network) if merge else shared_copy(base.network)
    with quiet():
        tuned = PeftModel.from_pretrained(network, str(folder), torch_device="cpu")
        return LanguageModel(tuned.merge_and_unload() if merge else tuned.get_base_model(), base.tokenizer, name)


def averaged_network(base: LanguageModel, folder: Path, share: float) -> LanguageModel:
    """A model of its own whose weights are `share` of the base's and the rest a policy's, a soup of the two."""
    other = load_policy(base, folder)
    with torch.no_grad():
        for (name, mine), theirs in zip(base.network.named_parameters(), other.network.parameters(), strict=True):
            fits = mine.shape == theirs.shape
            check(fits, "soup", f"{folder} ({name}: {tuple(theirs.shape)})", f"weights of shape {tuple(mine.shape)}")
            theirs.lerp_(mine, share)
    return other


def save_network(network: Any, model: LanguageModel, folder: Path) -> None:
    """Write an adapter in PEFT's layout, or the whole network with its tokenizer."""
    for name, tensor in network.named_parameters():
        if tensor.requires_grad and not bool(tensor.isfinite().all()):
            raise SteerError(f"train policy: {name} is no longer finite; lower learning_rate")
    if hasattr(network, "peft_config"):
        network.peft_config["default"].base_model_name_or_path = model.name
        network.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        network.to(model.network.dtype).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
