"""Files of trained rewards, read with the options that an expression gives them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steer import artifacts
from steer.core import check
from steer.rewards.heads import HeadReward

__all__ = ["trained"]


def trained(source: str, values: list[str], options: dict[str, str], given: str) -> HeadReward:
    """A file of `steer train reward` as a reward.

    `options` are attribute=NAME, weights by name (helpful=0.9), angle=DEGREES (cos of the first attribute and sin of
    the second), how=mean, worst or uncertainty, coefficient= and as=probability. Raises `InputError`, which shows
    `given`.
    """
    tensors, card = artifacts.load(source)
    check(card.kind == "reward", "reward", f"{given} (a {card.kind})", "a file of steer train reward")
    names = [str(name) for name in card.settings.get("names", [])]
    fits = {"heads", "bias", "mean", "std"} <= tensors.keys() and tensors["heads"].shape[1:2] == (len(names),)
    check(bool(fits) and len(card.layers) == 1, "reward", f"{given} (its tensors do not fit)", "as steer writes it")
    known = ("attribute", "angle", "how", "coefficient", "as", *names)
    unknown = [*values, *(key for key in options if key not in known)]
    check(not unknown, "reward", f"{given} ({', '.join(unknown)})", f"{source}:KEY=VALUE with {', '.join(known)}")
    return HeadReward(
        tensors["heads"],
        tensors["bias"],
        tensors["mean"],
        tensors["std"],
        card.layers[0],
        tuple(names),
        _weights(names, options, given),
        how=options.get("how", "mean"),
        coefficient=_float(options.get("coefficient", "0.5"), given),
        transform=tensors.get("transform"),
        gate=_gate(tensors, options, names, given),
        probability=_as_probability(options.get("as", "log-odds"), given),
        trained_on=card.model,
        text=given,
    )


def _weights(names: list[str], options: dict[str, str], given: str) -> Tensor:
    """Of the attributes: all alike, unless some are named."""
    weighted = {name: _float(options[name], given) for name in names if name in options}
    ways = [way for way in ("attribute", "angle") if way in options] + (["weights"] if weighted else [])
    check(len(ways) <= 1, "reward", given, "one of attribute, angle and weights by name")
    if "attribute" in options:
        check(options["attribute"] in names, "reward", given, f"attribute: {', '.join(names)}")
        weighted = {options["attribute"]: 1.0}
    if "angle" in options:
        check(len(names) >= 2, "reward", given, "an angle: two attributes, of which it has one")
        angle = math.radians(_float(options["angle"], given))
        weighted = {names[0]: math.cos(angle), names[1]: math.sin(angle)}
    return torch.tensor([weighted.get(name, 0.0 if weighted else 1.0) for name in names], dtype=torch.float64)


def _gate(
    tensors: dict[str, Tensor], options: dict[str, str], names: list[str], given: str
) -> dict[str, Tensor] | None:
    """The gate of the file, unless weights are named in its place."""
    found = {name.removeprefix("gate."): x for name, x in tensors.items() if name.startswith("gate.")}
    if not found or {"attribute", "angle", *names} & options.keys():
        return None
    wanted = {"inner.weight", "inner.bias", "outer.weight", "outer.bias", "mean", "std"}
    fits = set(found) == wanted and found["outer.weight"].shape[0] == len(names)
    check(bool(fits), "reward", f"{given} (the tensors of its gate do not fit)", "as steer writes it")
    return found


def _as_probability(how: str, given: str) -> bool:
    check(how in ("log-odds", "probability"), "reward", given, "as=log-odds or as=probability")
    return how == "probability"


def _float(text: str, given: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    check(math.isfinite(value), "reward", given, f"a number in place of {text}")
    return value
