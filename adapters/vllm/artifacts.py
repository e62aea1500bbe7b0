"""Artifacts as bytes, as they go from the front end to the workers: safetensors with a card, never a pickle."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer import artifacts
from steer.artifacts import Card
from steer.core import Edit, InputError, ModelInfo, Scope, check
from steer.edits import KINDS, PROMPTS, Artifact, load_edit
from steer.hub import PREFIX, download
from steer.methods.controller import Controller
from steer.methods.operators import Probe
from steer.methods.value import HeadValue, QHead, ValueGuidance
from steer.methods.vector import Gate, SteeringVector

__all__ = ["INNER", "PackedArtifact", "Source", "pack", "read_artifact"]


@dataclass(frozen=True, eq=False)
class _Host:
    """What a value head asks of the model that it is mounted on."""

    info: ModelInfo
    device: torch.device


@dataclass(frozen=True, eq=False)
class PackedArtifact:
    """Tensors with their card, and the digest of the bytes that they came in."""

    digest: str
    size: int
    tensors: Mapping[str, Tensor]
    card: Card

    @classmethod
    def parse(cls, data: bytes) -> PackedArtifact:
        """From the bytes of a file saved by steer. Raises `InputError`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "artifact.safetensors"
            file.write_bytes(data)
            try:
                tensors, card = artifacts.load(file)
            except InputError as error:
                allowed = "an artifact saved by steer (safetensors with a card)"
                raise InputError("artifact", str(error.given).removeprefix(str(file)).strip(" ()"), allowed) from None
        others = "on transformers alone" if card.kind == "reft" else "before the engine, as edits="
        allowed = f"{', '.join(INNER)}: others act {others}"
        check(card.kind in INNER, "artifact", f"kind {card.kind!r}", allowed)
        inside = any(card.settings.get(name) for name in ("gate", "tokens"))
        check(not inside, "artifact", "a card that names a probe's file", "a vector that was loaded with its gate")
        return cls(digest_of(data), len(data), tensors, card)

    def edit(self, info: ModelInfo, options: Mapping[str, Any], device: torch.device | None = None) -> Edit:
        """The edit with `options` of a request (see `steer.wire.EditRequest`) in place of its card's settings."""
        rest = dict(options)
        strength = rest.pop("strength", self.card.recipe.get("strength"))
        host = _Host(info, device or torch.device("cpu"))
        made = KINDS[self.card.kind](dict(self.tensors), self.card, strength, rest, host)
        if isinstance(made, SteeringVector):
            if self.card.recipe.get("packed"):  # an edit's own directions, of whatever norm
                made = replace(made, directions={k: self.tensors[f"direction.{k}"] for k in made.directions})
            gates = _probes(self.tensors, "gate")
            probes = {k: v for k, v in _probes(self.tensors, "token").items() if k in made.directions}
            gate = next((Gate(probe, layer) for layer, probe in gates.items()), None)
            made = replace(made, gate=gate, token_probes=probes)
        if isinstance(made, ValueGuidance):
            check(
                self.card.recipe.get("head", "q") == "q",
                "value head",
                self.card.recipe.get("head"),
                "a Q-head: a scalar head looks ahead, which vLLM cannot",
            )
        return made

    def for_any_model(self) -> PackedArtifact:
        """The same without the model's fingerprint."""
        model = {k: v for k, v in self.card.model.items() if k != "fingerprint"}
        return replace(self, card=replace(self.card, model=model))


INNER = tuple(kind for kind in KINDS if kind not in (*PROMPTS, "reft"))
"""Kinds of artifacts that the engine's workers apply."""

Source = str | Path | Edit | Artifact
"""What an artifact comes from: a file (also a GGUF control vector), an edit, or tensors with their card."""


def read_artifact(source: Source) -> bytes:
    """The bytes of an artifact. Raises `InputError`."""
    if isinstance(source, Edit):
        return pack(source)
    if isinstance(source, Artifact):
        return artifacts.encode(*source)
    if isinstance(source, str) and source.startswith(PREFIX):
        source = download(source)
    if str(source).endswith(".gguf"):
        return pack(load_edit(source))
    artifacts.read_card(source)
    return Path(source).read_bytes()


def pack(edit: Edit) -> bytes:
    """A vector, a controller or a guidance by a Q-head as an artifact. Raises `InputError` for other edits."""
    if isinstance(edit, SteeringVector):
        tensors, card = _vector(edit)
    elif isinstance(edit, Controller):
        tensors, card = _controller(edit)
    elif isinstance(edit, ValueGuidance):
        tensors, card = _guidance(edit)
    else:
        raise InputError("edit", type(edit).__name__, "a steering vector, a controller, or guidance by a Q-head")
    return artifacts.encode(tensors, replace(card, version="packed"))


def _vector(edit: SteeringVector) -> tuple[dict[str, Tensor], Card]:
    tensors = {f"direction.{layer}": v for layer, v in edit.directions.items()}
    tensors |= {f"reference.{layer}": v for layer, v in edit.references.items()}
    probes = {f"token.{layer}": p for layer, p in edit.token_probes.items()}
    if edit.gate is not None:
        probes[f"gate.{edit.gate.layer}"] = edit.gate.probe
    for name, probe in probes.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = probe.weight, torch.tensor([float(probe.bias)])
    settings = {
        "strength": float(edit.strength),
        "unit": edit.unit,
        "operator": edit.operator,
        "keep_norm": edit.keep_norm,
        "scope": scope_name(edit.scope),
        **{name: float(x) for name, x in (("low", edit.low), ("high", edit.high)) if x is not None},
    }
    return tensors, Card("vector", dict(edit.model), sorted(edit.directions), settings, {"packed": True})


def _controller(edit: Controller) -> tuple[dict[str, Tensor], Card]:
    tensors = {f"network.{name}": v for name, v in edit.network.state_dict().items()}
    tensors["directions"] = edit.directions
    settings = {
        "strength": float(edit.strength),
        "unit": edit.unit,
        "threshold": edit.threshold,
        "scope": scope_name(edit.scope),
    }
    layers = list(range(len(edit.directions)))
    return tensors, Card("controller", dict(edit.model), layers, settings, {"inputs": list(edit.inputs)})


def _guidance(edit: ValueGuidance) -> tuple[dict[str, Tensor], Card]:
    head = getattr(edit.value, "head", None)
    ours = isinstance(edit.value, HeadValue) and isinstance(head, QHead) and edit.value.source is None
    check(ours, "value", type(head or edit.value).__name__, "a Q-head on the model itself")
    assert isinstance(head, QHead)
    settings = {"beta": edit.beta, "top_k": edit.top_k, "tail": edit.tail}
    model = {"width": head.norm.normalized_shape[0]}
    return dict(head.state_dict()), Card("value", model, [], settings, {"head": "q", "strength": edit.strength})


def scope_name(scope: Scope) -> str:
    """The text that parses to `scope`. Raises `InputError` for bounds that have no name."""
    check(scope.name is not None, "scope", scope, Scope.NAMES)
    return str(scope.name)


def _probes(tensors: Mapping[str, Tensor], kind: str) -> dict[int, Probe]:
    found = {}
    for name, weight in tensors.items():
        parts = name.split(".")
        if parts[0] == kind and parts[-1] == "weight":
            found[int(parts[1])] = Probe(weight, float(tensors[f"{kind}.{parts[1]}.bias"]))
    return found


def digest_of(data: bytes) -> str:
    """Digest of an artifact's content."""
    return hashlib.sha256(data).hexdigest()[:32]
