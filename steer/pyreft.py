"""Interventions of pyreft as artifacts, without pyreft: a folder with its `config.json` and safetensors.

pyreft saves one state dictionary for each intervention as a pickle, `intkey_layer_15_comp_block_output_unit_pos_nunit_
1#0.bin`, which nothing here opens. The same tensors under the same names in `intkey_....safetensors` are read. Kinds,
by `intervention_types` of the configuration, with the rank r rows of U `[r, D]`:

    LoreftIntervention     U = R   A = W - R   b      Wu et al. 2024, equation 3
    ConsreftIntervention   U = R   A = -R      b
    LobireftIntervention   U = R   A = 0       b
    DireftIntervention     U = R   A = W       b      without the orthogonality of equation 4, as pyreft has it
    NoreftIntervention     U = P   A = W - P   b - p  p the bias of the projection P
    NodireftIntervention   U = P   A = W       b

What no file says is taken as pyreft's default: the activation on `W h + b` is none. Nor do they say the positions, but
for a `"position"` that somebody wrote into the configuration.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from steer.artifacts import Card
from steer.core import InputError, check
from steer.core.errors import first_line
from steer.core.names import check_known
from steer.files import check_finite
from steer.headers import check_safetensors

__all__ = ["is_pyreft", "read_pyreft"]

_CONFIG = "config.json"
_ALLOWED = "a folder of pyreft: config.json and intkey_....safetensors"
_CONVERT = (
    "safetensors of the same names; read it by torch.load with weights_only=True, which runs no code, and write it by "
    "safetensors.torch.save_file with .safetensors in place of .bin"
)
_KEY = re.compile(r"intkey_(?:layer_(\d+)_)?comp_(.+)_unit_(.+)_nunit_(\d+)#(\d+)")
_COMPONENT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\[(\d+)\]\.output")
_FIELDS = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
_TENSORS: dict[str, set[str]] = {
    "Loreft": {"weight", "bias", "rotate_layer"},
    "Consreft": {"learned_source", "rotate"},
    "Lobireft": {"learned_source", "rotate"},
    "Direft": {"learned_source.weight", "learned_source.bias", "rotate"},
    "Noreft": {"learned_source.weight", "learned_source.bias", "proj_layer.weight"},
    "Nodireft": {"learned_source.weight", "learned_source.bias", "proj_layer.weight"},
}
_OPTIONAL = {"proj_layer.bias", "embed_dim", "interchange_dim"}
_ORIGINAL, _BASE = "rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base"


def is_pyreft(path: Path | str) -> bool:
    """Whether a path looks like pyreft's: a folder with interventions, or the file of one."""
    path = Path(path)
    return any(path.glob("intkey_*")) if path.is_dir() else path.name.startswith("intkey_")


def read_pyreft(path: Path | str) -> tuple[dict[str, Tensor], Card]:
    """The interventions in a folder, or the one in a file beside its `config.json`, as an artifact of kind "reft":
    tensors `reads.G.L` `[r, D]`, `bias.G.L` `[r]` and `writes.G.L` `[r, D]` of layer L. G is 1 for the second of two
    interventions on one layer, which acts at the end of the prompt, and 0 for all others. Raises `InputError`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = sorted(path.glob("intkey_*")) if path.is_dir() else [path]
    pickles = [file.name for file in files if file.suffix != ".safetensors"]
    check(not pickles, "edit", f"{folder / pickles[0]} (a pickle, which can run code)" if pickles else "", _CONVERT)
    found = {_where(file.name.removesuffix(".safetensors")): file for file in files}
    config = _config(folder / _CONFIG)
    wanted = _configured(config)
    if not path.is_dir():
        check(set(found) <= set(wanted), "edit", path.name, f"an intervention of its {_CONFIG}: {_names(wanted)}")
        wanted = {key: wanted[key] for key in found}
    check(set(found) == set(wanted), "edit", f"interventions {_names(found)}", f"those of {_CONFIG}: {_names(wanted)}")
    tensors: dict[str, Tensor] = {}
    for (layer, group), kind in wanted.items():
        parts = _operator(kind, _tensors(found[layer, group], kind), found[layer, group].name)
        tensors |= {f"{name}.{group}.{layer}": part for name, part in parts.items()}
    widths = {t.shape[-1] for name, t in tensors.items() if not name.startswith("bias")}
    check(len(widths) == 1, "edit", f"{path} (widths {sorted(widths)})", "interventions of one width")
    kinds, layers = sorted(set(wanted.values())), sorted({layer for layer, _ in wanted})
    settings = {} if config.get("position") is None else {"position": str(config["position"])}
    return tensors, Card("reft", {"width": widths.pop()}, layers, settings, {"method": "pyreft", "kinds": kinds})


def _names(keys: Any) -> str:
    return ", ".join(f"layer {layer}" + (f" #{group}" if group else "") for layer, group in sorted(keys))


def _where(name: str) -> tuple[int, int]:
    """Layer and number of an intervention, from its file's name."""
    found = _KEY.fullmatch(name)
    check(found is not None, "edit", name, "intkey_layer_L_comp_block_output_unit_pos_nunit_1#N.safetensors")
    assert found is not None
    layer = found[1] or (re.findall(r"(?:^|_)(?:layers|h|blocks)\[(\d+)\]", found[2]) or [None])[0]
    check(layer is not None, "edit", name, "an intervention after a block")
    return int(str(layer)), int(found[5])


# ------------------------------------------------------------------------------------------------------------ config


def _config(path: Path) -> dict[str, Any]:
    check(path.is_file(), "edit", f"{path.parent} (no {_CONFIG} in it)", _ALLOWED)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        right = isinstance(config["representations"], list) and isinstance(config["intervention_types"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("edit", f"{path} (cannot be read: {first_line(error)})", _ALLOWED) from error
    check(right, "edit", f"{path} (no lists of representations and intervention_types)", _ALLOWED)
    return dict(config)


def _configured(config: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Kinds of the interventions by layer and number. Raises `InputError` for those that cannot be expressed."""
    places, types = config["representations"], config["intervention_types"]
    check(0 < len(places) == len(types), "representations", len(places), f"one for each of {len(types)} types")
    seen: Counter[int] = Counter()
    found: dict[tuple[int, int], str] = {}
    for i, (place, kind) in enumerate(zip(places, types, strict=True)):
        layer = _layer(place, f"representations[{i}]")
        name = str(kind).removesuffix("'>").rpartition(".")[2].removesuffix("Intervention")
        check_known(f"intervention_types[{i}]", name, _TENSORS)
        found[layer, seen[layer]] = name
        seen[layer] += 1
    check(
        max(seen.values()) <= 2, "representations", f"{max(seen.values())} on one layer", "at most 2, one for each end"
    )
    return found


def _layer(place: Any, where: str) -> int:
    """The block after which an intervention acts."""
    shaped = isinstance(place, list | dict) and len(place) >= len(_FIELDS)
    check(shaped, where, place, f"a list or entries: {', '.join(_FIELDS)}")
    given: dict[str, Any] = place if isinstance(place, dict) else dict(zip(_FIELDS, place, strict=False))
    rest = place[len(_FIELDS) :] if isinstance(place, list) else [v for k, v in place.items() if k not in _FIELDS]
    more = [x for x in rest if x is not None and not isinstance(x, bool)]
    check(not more, where, more, "no subspaces, links or groups: they have no counterpart here")
    check(given.get("unit") == "pos", f"{where}.unit", given.get("unit"), "pos")
    component, layer = str(given.get("component")), given.get("layer")
    named = _COMPONENT.fullmatch(component)
    allowed = "block_output, or model.layers[L].output: the residual stream after a block"
    check(component == "block_output" or named is not None, f"{where}.component", component, allowed)
    layer = int(named[1]) if named is not None else layer
    check(type(layer) is int and 0 <= layer < 100_000, f"{where}.layer", layer, "a layer, 0 the first block")
    assert isinstance(layer, int)
    return layer


# ----------------------------------------------------------------------------------------------------------- tensors


def _tensors(file: Path, kind: str) -> dict[str, Tensor]:
    """What a file holds, with the rotation `[D, r]` as `rotate`, in float32."""
    try:
        check_safetensors(file)
        with safe_open(file, framework="pt") as opened:
            given = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("edit", f"{file} (truncated or not safetensors: {first_line(error)})", _ALLOWED) from error
    for name, tensor in given.items():
        check_finite(f"{file.name}: {name}", tensor)
    tolerance = 4 * max(torch.finfo(t.dtype).eps for t in given.values() if t.is_floating_point()) + 1e-4
    if _ORIGINAL in given:
        original, base = given.pop(_ORIGINAL).float(), given.pop(_BASE, None)
        check(original.dim() == 2, file.name, f"{_ORIGINAL} of shape {tuple(original.shape)}", "shape (width, rank)")
        given["rotate"] = _rotation(original, base, file.name)
    expected = _TENSORS[kind]
    named = set(given) - _OPTIONAL
    check(named == expected, file.name, f"tensors {sorted(named)}", f"those of {kind}Intervention: {sorted(expected)}")
    rotation = given.get("rotate_layer", given.get("rotate"))
    if rotation is not None:
        check(rotation.dim() == 2, file.name, f"a rotation of shape {tuple(rotation.shape)}", "shape (width, rank)")
        off = float((rotation.double().T @ rotation.double() - torch.eye(rotation.shape[1])).abs().max())
        allowed = f"orthonormal columns, R^T R within {tolerance:.1g} of the identity"
        check(off <= tolerance, f"{file.name}: rotate_layer", f"R^T R that is off by {off:.2g}", allowed)
    return {name: tensor.float() for name, tensor in given.items()}


def _rotation(original: Tensor, base: Tensor | None, file: str) -> Tensor:
    """The orthonormal matrix `[D, r]` that torch's parametrization makes of what it saves."""
    layer = nn.Linear(original.shape[1], original.shape[0], bias=False)
    nn.utils.parametrizations.orthogonal(layer, use_trivialization=base is not None)
    state = {"parametrizations.weight.original": original}
    if base is not None:
        state["parametrizations.weight.0.base"] = base.float()
    try:
        layer.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(file, f"a rotation that torch does not take ({first_line(error)})", _ALLOWED) from error
    return layer.weight.detach()


def _operator(kind: str, given: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """A `[r, D]`, b `[r]` and U `[r, D]`. Raises `InputError` where shapes do not go together."""
    rotation = given.get("rotate_layer", given.get("rotate"))
    writes = given["proj_layer.weight"] if rotation is None else rotation.T.contiguous()
    shape = tuple(writes.shape)
    source = given.get("learned_source")
    weight = given.get("weight", given.get("learned_source.weight", torch.zeros(shape)))
    bias = source if source is not None else given.get("bias", given.get("learned_source.bias"))
    assert bias is not None
    for name, tensor, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
        check(tuple(tensor.shape) == wanted, f"{file}: {name}", f"shape {tuple(tensor.shape)}", f"shape {wanted}")
    reads = weight - writes if kind in ("Loreft", "Consreft", "Noreft") else weight
    if kind == "Noreft" and "proj_layer.bias" in given:
        bias = bias - given["proj_layer.bias"]
    return {"reads": reads.contiguous(), "bias": bias, "writes": writes}
