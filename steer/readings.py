"""Readings from artifacts: what a vector or a probe reads of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.artifacts import Card
from steer.core import InputError, ModelInfo, check
from steer.core.names import NAME, check_known
from steer.core.readings import Reading, Readings, StopIf
from steer.edits import Artifact, by_layer, load_artifact, parse_layers, probes_of, split_spec
from steer.methods.vector import Gate, SteeringVector, check_model

__all__ = ["as_readings", "reading_of"]


_ALLOWED = "a vector, a probe (a vector fitted with method=probe), a gate, or their file"


def as_readings(given: Any, stop_if: Any, info: ModelInfo) -> Readings | None:
    """Readings by name, from a dictionary, or a list or a single one of artifacts or files, which are called by the
    file's stem or the artifact's kind, or made before; None where none are asked for. Raises `InputError`.
    """
    if isinstance(given, Readings):
        return given
    named = _named(given)
    if not named:
        check(stop_if is None, "stop_if", stop_if, "unset without readings")
        return None
    items = tuple(reading_of(name, one, info) for name, one in named.items())
    return Readings(items, None if stop_if is None else StopIf.parse(stop_if, list(named)))


def _named(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        several = list(given) if type(given) in (list, tuple) else [given]
        names = [_name_of(one) for one in several]
        twice = next((name for name in names if names.count(name) > 1), None)
        check(twice is None, "readings", f"two that are called {twice!r}", 'names for them, as in {"calm": ...}')
        named = dict(zip(names, several, strict=True))
    for name in named:
        fits = isinstance(name, str) and NAME.fullmatch(name) is not None
        check(fits, "readings", name, "names of letters, digits, dot, dash and underscore, at most 128 of them")
    return named


def _name_of(given: Any) -> str:
    if isinstance(given, str | Path):
        return Path(split_spec(str(given))[0]).stem
    return given.card.kind if isinstance(given, Artifact) else "probe" if isinstance(given, Gate) else "vector"


def reading_of(name: str, given: Any, info: ModelInfo, layers: Any = None) -> Reading:
    """What an artifact, an edit made of one, or a file (`FILE[:layers=10-19]`) reads; `layers` go before its own.

    A probe reads its log-odds `h . w + b` after the block that separated best. A vector reads the component of the
    residual stream along its direction, in units of the layer's median residual norm, as strengths are; the mean over
    its layers. Strength, scope and operator of an edit play no part. Raises `InputError`.
    """
    where = f"readings.{name}"
    if isinstance(given, str | Path):
        path, strength, options = split_spec(str(given))
        check(strength is None, where, str(given), "FILE[:layers=10-19]: a reading has no strength")
        for key in options:
            check_known(f"{where}: option", key, ("layers", "model"))
        artifact = load_artifact(path)
        card = artifact.card if options.get("model") != "any" else _of_any_model(artifact.card)
        return _of_artifact(name, artifact.tensors, card, info, options.get("layers") if layers is None else layers)
    if isinstance(given, Artifact):
        return _of_artifact(name, given.tensors, given.card, info, layers)
    if isinstance(given, Gate):
        return _mean(name, {given.layer: (given.probe.weight, given.probe.bias)}, info)
    check(isinstance(given, SteeringVector), where, given, _ALLOWED)
    check_model(given.model, info, where)
    return _along(name, given.directions, info)


def _of_any_model(card: Card) -> Card:
    return Card(card.kind, {k: v for k, v in card.model.items() if k != "fingerprint"}, card.layers, card.settings)


def _of_artifact(name: str, tensors: Mapping[str, Tensor], card: Card, info: ModelInfo, layers: Any) -> Reading:
    where = f"readings.{name}"
    check(card.kind == "vector", where, f"a {card.kind}", _ALLOWED)
    check_model(card.model, info, where)
    probes, best = probes_of(tensors, card)
    if probes:
        chosen = parse_layers([best] if layers is None else layers, sorted(probes))
        return _mean(name, {layer: (probes[layer].weight, probes[layer].bias) for layer in chosen}, info)
    directions = by_layer(dict(tensors), "direction")
    check(bool(directions), where, f"tensors {list(tensors)[:5]}", "a vector with tensors direction.N")
    own = card.settings.get("layers", sorted(directions))
    chosen = parse_layers(own if layers is None else layers, sorted(directions))
    return _along(name, {layer: directions[layer] for layer in chosen}, info)


def _along(name: str, directions: Mapping[int, Tensor], info: ModelInfo) -> Reading:
    _check_layers(name, directions, info)
    norms = info.residual_norms()
    units = {layer: v.float() / v.float().norm().clamp_min(1e-12) for layer, v in directions.items()}
    return _mean(name, {layer: (unit / float(norms[layer]), 0.0) for layer, unit in units.items()}, info)


def _mean(name: str, parts: Mapping[int, tuple[Tensor, float]], info: ModelInfo) -> Reading:
    _check_layers(name, {layer: weight for layer, (weight, _) in parts.items()}, info)
    count = len(parts)
    weights = {layer: weight.float() / count for layer, (weight, _) in parts.items()}
    return Reading(name, weights, sum(bias for _, bias in parts.values()) / count)


def _check_layers(name: str, vectors: Mapping[int, Tensor], info: ModelInfo) -> None:
    for layer, vector in vectors.items():
        if not 0 <= layer < info.num_layers:
            allowed = f"0 to {info.num_layers - 1}, the blocks of {info.name}"
            raise InputError(f"readings.{name}: layer", layer, allowed)
        allowed = f"width {info.width}, that of {info.name}"
        check(tuple(vector.shape) == (info.width,), f"readings.{name}", f"shape {tuple(vector.shape)}", allowed)
