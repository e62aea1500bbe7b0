"""Edits from artifacts: a card says what an artifact is, so one loader takes vectors, controllers and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.artifacts import MAX_STRENGTH, Card, load, read_folder_card, save
from steer.core import Edit, InputError, check
from steer.core.edit import ranges
from steer.core.names import check_known
from steer.core.notebook import text_html
from steer.core.scope import Scope
from steer.gguf import load_gguf
from steer.hub import PREFIX, address_of, download, model_page, upload
from steer.methods.controller import Controller, ControllerNetwork
from steer.methods.extract import Extractor
from steer.methods.operators import LowRank, Probe
from steer.methods.prompt import DirectionalStimulus, FolderPolicy, Template
from steer.methods.reft import POSITIONS, Ends, Reft, position
from steer.methods.value import HeadValue, QHead, ValueGuidance, ValueHead
from steer.methods.vector import Gate, SteeringVector, check_model
from steer.progress import note
from steer.pyreft import is_pyreft, read_pyreft

__all__ = ["KINDS", "OPTIONS", "PROMPTS", "as_edit", "as_edits", "edit_of", "load_artifact", "load_edit", "parse_edit"]


class Artifact(NamedTuple):
    """What training returns, and what a file holds: tensors and a card.

    It is used wherever an edit is: `edits=calm` takes the card's settings, `calm(0.15, layers=range(10, 15))` others;
    `calm * 0.5` and `calm + other` are edits too. `save` writes it; `tensors, card = artifact` takes it apart.
    """

    tensors: dict[str, Tensor]
    card: Card

    def __call__(self, strength: float | None = None, *, model: Any = None, **options: Any) -> Any:
        """The edit at `strength`, with the options of `steer.load_edit`. Raises `InputError`."""
        return edit_of(self.tensors, self.card, strength, model=model, **options)

    def save(self, path: Path | str) -> None:
        """Write it to one file; see `steer.artifacts.save`."""
        save(path, self.tensors, self.card)

    def push(self, repository: str, name: str | None = None, *, private: bool = False, figures: str = "") -> str:
        """Share it on the Hugging Face hub; returns the address that `edits=` and `steer.load_artifact` take.

        Args:
            repository: `ORG/NAME`, a repository of models; it is made where it is not there.
            name: of the file; default: the kind with ".safetensors".
            private: of a repository that is made.
            figures: what a sweep found, such as `steer.evaluate(...).table()`, for the page of a new repository.

        Raises `InputError` for a bad name, and `SteerError` where the hub refuses or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            file = Path(folder) / "artifact.safetensors"
            self.save(file)
            name = name or f"{self.card.kind}.safetensors"
            base = str(self.card.model.get("name", "MODEL"))
            page = model_page(address_of(repository, name), self.card.describe(), self.card.kind, base, figures)
            return upload(repository, name, file.read_bytes(), page, private)

    def __mul__(self, factor: Any) -> Any:
        return self() * factor

    def __rmul__(self, factor: Any) -> Any:
        return self() * factor

    def __truediv__(self, divisor: Any) -> Any:
        return self() / divisor

    def __neg__(self) -> Any:
        return self() * -1.0

    def __add__(self, other: Any) -> Any:
        return self() + (other() if isinstance(other, Artifact) else other)

    def __radd__(self, other: Any) -> Any:
        return other + self()

    def __sub__(self, other: Any) -> Any:
        return self() + (other() if isinstance(other, Artifact) else other) * -1.0

    def _repr_html_(self) -> str:
        return text_html(self.card.describe())

    def __repr__(self) -> str:
        name, depth = Path(str(self.card.model.get("name", "?"))).name, self.card.model.get("num_layers", "?")
        layers = f", layers {ranges(self.card.layers)} of {depth}" if self.card.layers else ""
        return f"Artifact({self.card.kind} for {name}{layers})"


def as_edit(given: Any, model: Any = None, field: str = "edits") -> Edit:
    """An edit from itself, an artifact, or a text such as "calm.safetensors:0.15". Raises `InputError`."""
    if isinstance(given, Artifact):
        return edit_of(*given, model=model)
    if isinstance(given, str | Path):
        return parse_edit(str(given), model)
    check(isinstance(given, Edit), field, given, 'an edit, an artifact, or "FILE[:strength][:key=value]..."')
    edit: Edit = given
    return edit


def as_edits(given: Any, count: int, model: Any = None) -> list[tuple[Edit, frozenset[int] | None]]:
    """Edits in order, each with the prompts out of `count` that it is for (None: all), from an edit or a list of edits
    for all prompts, or one list (or None) for each. Raises `InputError`.
    """
    if given is None:
        return []
    if not isinstance(given, list | tuple) or isinstance(given, Artifact):
        return [(as_edit(given, model), None)]
    lists = [entry is None or (isinstance(entry, list | tuple) and not isinstance(entry, Artifact)) for entry in given]
    if not any(lists):
        allowed = "for one edit each [[a], [b]], for both on both [[a, b], [a, b]]: one list for each prompt"
        check(count == 1 or len(given) != count, "edits", f"{count} edits for {count} prompts", allowed)
        return [(as_edit(entry, model), None) for entry in given]
    allowed = "one list of edits (or None) for each prompt, as in [[a], [a, b], None]"
    check(all(lists), "edits", given, allowed)
    check(len(given) == count, "edits", f"{len(given)} entries", f"one for each of {count} prompts")
    # One edit on many prompts is one mounted edit.
    made: dict[Any, Edit] = {}
    wanted: dict[Any, set[int]] = {}
    for b, mine in enumerate(given):
        for entry in mine or ():
            key = entry if isinstance(entry, str) else id(entry)
            if key not in made:
                made[key] = as_edit(entry, model, f"edits[{b}]")
            wanted.setdefault(key, set()).add(b)
    return [(edit, None if len(wanted[key]) == count else frozenset(wanted[key])) for key, edit in made.items()]


def parse_edit(text: str, model: Any = None) -> Edit:
    """`FILE[:strength][:key=value]...`, for example `calm.safetensors:-0.2:layers=10-19:scope=generated`."""
    path, strength, options = split_spec(text)
    if "model" in options:
        options["model_check"] = options.pop("model")
    return load_edit(path, strength, model=model, **options)


_HOLD_A_COLON = ("=from", "=first", "=inside", "=outside")
"""Beginnings of scopes: `scope=from:K`."""


def split_spec(text: str) -> tuple[str, float | None, dict[str, str]]:
    """The parts of an edit's specification; raises `InputError`."""
    parts = text.split(":")
    strength: float | None = None
    options: dict[str, str] = {}
    while len(parts) > 1:
        last = parts[-1]
        if len(parts) > 2 and parts[-2].endswith(_HOLD_A_COLON):
            last = f"{parts.pop(-2)}:{last}"
        key, equals, value = last.partition("=")
        if equals and key.isidentifier():
            options[key] = value
        elif strength is None:
            try:
                strength = float(last)
            except ValueError:
                break
        else:
            break
        parts.pop()
    path = ":".join(parts)
    check(bool(path), "edit", text, "FILE[:strength][:key=value]...")
    on_hub = path.startswith(PREFIX) and ":" not in path.removeprefix(PREFIX)
    if not on_hub and not Path(path).is_file() and ":" in path:
        raise InputError("edit", text, f"FILE[:strength][:key=value]...; {path.rpartition(':')[2]!r} is not a number")
    return path, strength, options


def load_artifact(path: str | Path) -> Artifact:
    """What a file holds, to be used as an edit: `load_artifact("calm.safetensors")(0.15)`; also one on the Hugging Face
    hub, `hf://ORG/NAME/calm.safetensors`. Raises `InputError`, and `SteerError` where the hub gives no file.
    """
    return Artifact(*_read(path))


def _read(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    if isinstance(path, str) and path.startswith(PREFIX):
        path = download(path)
    if is_pyreft(path):
        return read_pyreft(path)
    if not str(path).endswith(".gguf"):
        return load(path)
    directions, hint = load_gguf(path)
    card = Card(
        "vector",
        {"width": len(next(iter(directions.values())))},
        sorted(directions),
        {"unit": "raw"},
        {"method": "gguf", "hint": hint},
    )
    return {f"direction.{layer}": v for layer, v in directions.items()}, card


def load_edit(path: str | Path, strength: float | None = None, *, model: Any = None, **options: Any) -> Edit:
    """The edit in an artifact, with settings in place of its card's.

    `model` (a loaded model) is needed by value heads, which use its output embedding. Options of vectors: `layers`,
    `scope`, `operator`, `unit`, `keep_norm`, `low` and `high` (the interval of `operator="clamp"`), `gate` (a probe's
    file), `gate_layer`, `tokens` (a probe's file); of controllers: `threshold`, `scope`; of value heads: `beta`,
    `top_k`, `tail`. `model_check="any"` (`model=any` on the command line) takes an artifact of a model with another
    fingerprint. A stimulus, also one in a folder, has no options and fits every model. Interventions of pyreft, a
    folder or one of its files (see `steer.pyreft`), need `position` or `scope`.
    """
    if not str(path).startswith(PREFIX) and Path(path).is_dir() and not is_pyreft(path):
        card = read_folder_card(path)
        check(
            card.kind == "stimulus", "edit", f"{path} (the folder of a {card.kind})", "a file, or a stimulus's folder"
        )
        return _stimulus_of(FolderPolicy(str(path)), card, strength, options, model)
    return edit_of(*_read(path), strength, model=model, **options)


def edit_of(
    tensors: dict[str, Tensor], card: Card, strength: float | None = None, *, model: Any = None, **options: Any
) -> Edit:
    """The edit in an artifact that is in memory; see `load_edit`."""
    check(card.kind in KINDS, "artifact", f"one of kind {card.kind!r}", ", ".join(KINDS))
    compared = options.pop("model_check", "same")
    check(compared in ("same", "any"), "model", compared, "same, any")
    if compared == "any":
        card = replace(card, model={k: v for k, v in card.model.items() if k != "fingerprint"})
    if strength is not None:
        check(isinstance(strength, int | float), "strength", strength, "a number")
        check(abs(strength) <= MAX_STRENGTH, "strength", strength, f"a number of at most {MAX_STRENGTH:g} either way")
    return KINDS[card.kind](tensors, card, strength, options, model)


def _settings(card: Card, options: dict[str, Any], allowed: tuple[str, ...], kind: str) -> dict[str, Any]:
    for key in options:
        check_known(f"option of a {kind}", key, allowed)
    return {**{k: v for k, v in card.settings.items() if k in allowed}, **options}


def parse_layers(text: Any, available: list[int]) -> list[int]:
    """Layers from `10-19`, `3,5,8` or `all`; every one must be among `available`."""
    if isinstance(text, int):
        text = str(text)
    if isinstance(text, list | tuple | range):
        chosen = [parse_number("layers", layer, int) for layer in text]
    elif text == "all":
        chosen = list(available)
    else:
        chosen = []
        for part in str(text).split(","):
            low, dash, high = part.strip().partition("-")
            ends = (low, high) if dash else (low, low)
            short = all(end.isdecimal() and len(end) <= 5 for end in ends)
            check(short, "layers", text, "10-19, or 3,5,8, or all")
            chosen += range(int(ends[0]), min(int(ends[1]), max(available) + 1) + 1)
    missing = [layer for layer in chosen if layer not in available]
    check(bool(chosen) and not missing, "layers", text, f"layers between {min(available)} and {max(available)}")
    return chosen


def parse_flag(name: str, value: Any) -> bool:
    """A boolean setting, also as text."""
    if isinstance(value, bool):
        return value
    check(str(value).lower() in ("true", "false", "1", "0", "yes", "no"), name, value, "true, false")
    return str(value).lower() in ("true", "1", "yes")


def parse_number(name: str, value: Any, kind: type = float) -> Any:
    """A number, also as text."""
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InputError(name, value, "a number") from None


def _probe(path: str | Path, layer: Any = None) -> tuple[dict[int, Probe], int]:
    """Probes by layer of a vector fitted with `method=probe`, and the layer that separated best (or `layer`)."""
    probes, best = probes_of(*load(path))
    check(bool(probes), "gate", str(path), "a vector fitted with --method probe")
    best = best if layer is None else int(layer)
    check(best in probes, "gate_layer", best, f"layers of the probe: {sorted(probes)}")
    return probes, best


def probes_of(tensors: Mapping[str, Tensor], card: Card) -> tuple[dict[int, Probe], int]:
    """Probes by layer of a vector fitted with `method=probe`, and the layer that separated best; none of others."""
    found = by_layer(tensors, "probe")
    for layer in found:
        check(f"bias.{layer}" in tensors, "artifact", f"tensor probe.{layer} alone", f"bias.{layer} beside it")
    probes = {layer: Probe(w, float(tensors[f"bias.{layer}"])) for layer, w in found.items()}
    return probes, parse_number("best_layer", card.metrics.get("best_layer", max(probes, default=0)), int)


def by_layer(tensors: Mapping[str, Tensor], kind: str) -> dict[int, Tensor]:
    """Tensors named `kind.N` by their layer N."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{kind}."):
            layer = name.partition(".")[2]
            check(layer.isascii() and layer.isdecimal() and len(layer) <= 5, "artifact", f"tensor {name}", f"{kind}.N")
            found[int(layer)] = tensor
    return found


OPTIONS: dict[str, dict[str, str]] = {
    "vector": {
        "layers": "10-19, or 3,5,8, or all; default: as it was trained",
        "scope": f"positions: {Scope.NAMES}; default all",
        "operator": "add; ablate (the strength is the share removed); clamp (the projection); rotate (degrees)",
        "unit": "norm: the strength is in median residual norms of each layer, shared by the layers; raw: as it is",
        "keep_norm": "true scales each state back to its norm",
        "low": "with operator=clamp: the least component along the direction, in place of a strength",
        "high": "with operator=clamp: the most",
        "gate": "FILE of a vector fitted with --method probe: steer only prompts on which it fires",
        "gate_layer": "of the gate; default: the layer that separated best",
        "tokens": "FILE of a probe: steer only positions on which it fires",
    },
    "controller": {
        "threshold": "from 0 to 1, default 0.5: a weaker prompt is not steered at all",
        "scope": f"positions: {Scope.NAMES}; default reply",
        "unit": "norm (of the residual stream) or raw (of the direction)",
    },
    "value": {
        "beta": "KL coefficient of this head alone; default: --beta",
        "top_k": "tokens whose value is asked for, default 20; 0 is all",
        "tail": "of the other tokens: mean (their base law, the default) or mask (none)",
    },
    "stimulus": {},
    "reft": {
        "position": f"{POSITIONS}, as pyreft has it; its files do not say",
        "scope": f"in place of position: {Scope.NAMES}",
        "layers": "10-19, or 3,5,8, or all, the default",
    },
}
"""What `FILE[:strength][:key=value]` takes for an artifact of each kind, and what it means."""


def _vector(
    tensors: dict[str, Tensor], card: Card, strength: float | None, options: dict[str, Any], model: Any
) -> Edit:
    settings = _settings(card, options, tuple(OPTIONS["vector"]), "vector")
    directions, references = by_layer(tensors, "direction"), by_layer(tensors, "reference")
    check(bool(directions), "artifact", f"tensors {list(tensors)[:5]}", "a vector with tensors direction.N")
    depth = card.model.get("num_layers")
    layers = parse_layers(settings.get("layers", sorted(directions)), sorted(directions))
    if depth is not None:
        check(max(layers) < depth, "layers", max(layers), f"0 to {depth - 1}")
    gate = None
    if settings.get("gate"):
        probes, best = _probe(settings["gate"], settings.get("gate_layer"))
        gate = Gate(probes[best], best)
    bounds = {k: None if settings.get(k) is None else parse_number(k, settings[k]) for k in ("low", "high")}
    own = float(card.settings.get("strength", 1.0)) if bounds["low"] is bounds["high"] is None else 1.0
    vector = SteeringVector(
        directions={layer: directions[layer] for layer in layers},
        strength=own if strength is None else strength,
        **bounds,
        unit=str(settings.get("unit", "norm")),
        operator=str(settings.get("operator", "add")),
        keep_norm=parse_flag("keep_norm", settings.get("keep_norm", False)),
        scope=settings.get("scope", "all"),
        gate=gate,
        token_probes=_probe(settings["tokens"])[0] if settings.get("tokens") else {},
        references=references,
        model=card.model,
    )
    return vector.normalised() if vector.unit == "norm" else vector


def _controller(
    tensors: dict[str, Tensor], card: Card, strength: float | None, options: dict[str, Any], model: Any
) -> Edit:
    settings = _settings(card, options, tuple(OPTIONS["controller"]), "controller")
    weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    inputs, layers, hidden = len(weights["mean"]), *weights["weight_outer.weight"].shape
    network = _filled(lambda: ControllerNetwork(inputs, layers, hidden), weights)
    return Controller(
        network=network,
        inputs=tuple(card.recipe["inputs"]),
        directions=tensors["directions"],
        strength=float(card.settings.get("strength", 1.0)) * (1.0 if strength is None else strength),
        unit=str(settings.get("unit", "norm")),
        threshold=parse_number("threshold", settings.get("threshold", 0.5)),
        scope=settings.get("scope", "reply"),
        model=card.model,
    )


def _value(tensors: dict[str, Tensor], card: Card, strength: float | None, options: dict[str, Any], model: Any) -> Edit:
    settings = _settings(card, options, tuple(OPTIONS["value"]), "value head")
    check(model is not None, "model", None, "the loaded model: a value head uses its output embedding")
    info = model.info
    check_model(card.model, info, "value head")
    hidden = tensors["inner.weight"].shape[0]
    kind = str(card.recipe.get("head", "q"))
    horizon = len(tensors.get("gain.weight", ()))
    made = QHead if kind == "q" else ValueHead
    head = _filled(lambda: made(info.width, hidden, horizon), tensors).to(model.device)
    return ValueGuidance(
        HeadValue(head, info.unembedding() if kind == "q" else None),
        beta=None if settings.get("beta") is None else parse_number("beta", settings["beta"]),
        strength=1.0 if strength is None else strength,
        top_k=parse_number("top_k", settings.get("top_k", 20), int),
        tail=str(settings.get("tail", "mean")),
        suggested_beta=_suggested(card),
    )


def _suggested(card: Card) -> float | None:
    found = card.metrics.get("suggested_beta")
    return float(found) if isinstance(found, int | float) and 0 < found < float("inf") else None


def _stimulus(
    tensors: dict[str, Tensor], card: Card, strength: float | None, options: dict[str, Any], model: Any
) -> Edit:
    fits = {"weights", "mean", "std", "idf"} <= tensors.keys()
    check(fits, "artifact", f"tensors {list(tensors)[:5]}", "a stimulus with weights, mean, std and idf")
    policy = Extractor(
        tensors["weights"],
        tensors["mean"],
        tensors["std"],
        tensors["idf"],
        most=parse_number("most", card.settings.get("most", 8), int),
        words=_count(card, "words"),
    )
    return _stimulus_of(policy, card, strength, options, model)


def _count(card: Card, name: str) -> int | None:
    found = card.settings.get(name)
    return None if found is None else int(parse_number(name, found, int))


def _stimulus_of(policy: Any, card: Card, strength: float | None, options: dict[str, Any], model: Any) -> Edit:
    check(strength in (None, 1, 1.0), "strength", strength, "1, or none: a hint is given or not")
    for key in options:
        check(key == "model_check", "option of a stimulus", key, "none")
    tuned, name = card.model.get("name"), getattr(model, "name", None)
    if tuned and name and tuned != name:
        _mention(str(tuned), str(name))
    raw = parse_flag("raw", card.settings.get("raw", False))
    return DirectionalStimulus(policy, Template(str(card.settings.get("template")), _count(card, "shown"), raw))


@cache
def _mention(tuned: str, name: str) -> None:
    note(True, f"warning: the stimulus was tuned through {tuned}, not {name}: measure whether {name} heeds its hints")


def _filled(made: Callable[[], torch.nn.Module], weights: dict[str, Tensor]) -> Any:
    """A network with these weights, in float32. Nothing of its size is made before the weights are seen to fit it."""
    with torch.device("meta"):
        network = made()
    network.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _reft(tensors: dict[str, Tensor], card: Card, strength: float | None, options: dict[str, Any], model: Any) -> Edit:
    settings = _settings(card, options, tuple(OPTIONS["reft"]), "reft")
    given = {name: settings.get(name) for name in ("position", "scope")}
    one = (given["position"] is None) is not (given["scope"] is None)
    check(one, "position", given["position"], f"{POSITIONS}; or a scope in its place")
    where = Scope.parse(settings["scope"]) if given["position"] is None else position(given["position"])
    group = _groups(tensors)
    two = len(group) > 1
    check(not two or isinstance(where, Ends), "scope", given["scope"], "position: each end has its own weights")
    made = group[max(group) if two and isinstance(where, Ends) and where.last else min(group)]
    layers = parse_layers(settings.get("layers", sorted(made)), sorted(made))
    operators = {layer: made[layer] for layer in layers}
    edit = Reft(operators, 1.0 if strength is None else strength, where, card.model)
    if model is not None:
        edit.terms(model.info)
    return edit


def _groups(tensors: dict[str, Tensor]) -> dict[int, dict[int, LowRank]]:
    """Operators by end of the prompt and layer."""
    found: dict[int, dict[int, LowRank]] = {}
    for name in tensors:
        kind, _, place = name.partition(".")
        group, _, layer = place.partition(".")
        right = kind in ("reads", "bias", "writes") and group in ("0", "1") and layer.isascii() and layer.isdecimal()
        check(right and len(layer) <= 5, "artifact", f"tensor {name}", "reads.G.L, bias.G.L and writes.G.L")
        parts = [tensors.get(f"{part}.{group}.{layer}") for part in ("reads", "bias", "writes")]
        check(
            all(p is not None for p in parts), "artifact", f"tensor {name} alone", "reads, bias and writes of a layer"
        )
        reads, bias, writes = (p for p in parts if p is not None)
        dims = (reads.dim(), bias.dim(), writes.dim())
        check(dims == (2, 1, 2), "artifact", f"tensors of {dims} dimensions", "reads [r, D], bias [r], writes [r, D]")
        found.setdefault(int(group), {})[int(layer)] = LowRank(reads, bias, writes)
    check(bool(found), "artifact", "no tensors", "reads.G.L, bias.G.L and writes.G.L")
    return found


KINDS = {"vector": _vector, "controller": _controller, "value": _value, "stimulus": _stimulus, "reft": _reft}
"""How an artifact of each kind becomes an edit."""
PROMPTS = ("stimulus",)
"""Kinds that edit the prompt: they act before any engine."""
