"""Files of routed models: YAML that names the models, their prices and a trained router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from steer.core import InputError, check
from steer.core.names import check_known
from steer.routing.cascade import Cascade
from steer.routing.model import Pool, RoutedModel
from steer.routing.router import Router

__all__ = ["read_pool"]

_KEYS = ("models", "price", "per", "router", "cost_weight", "critic")


def read_pool(path: Path | str, load: Callable[[str], Any]) -> Pool:
    """The model that a file describes, with each of `models` loaded by `load`; paths are relative to the file.

        models: {small: smollm2-135m, large: org/name}
        price: {small: 1, large: 10}
        router: router.safetensors      # of steer train router; or critic: REWARD>=NUMBER, which makes a cascade
        cost_weight: 0.01

    Raises `InputError`.
    """
    file = Path(path)
    check(file.is_file(), "model", str(path), "a file that is there")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError("model", str(path), "YAML") from error
    check(isinstance(given, dict) and isinstance(given.get("models"), dict), "model", str(path), "YAML with models")
    for key in given:
        check_known(f"{file.name}", str(key), _KEYS)
    price, per = given.get("price"), given.get("per", "answer")
    models = {str(name): load(_near(file, str(where))) for name, where in given["models"].items()}
    critic = given.get("critic")
    if critic is None:
        router = given.get("router")
        made = None if router is None else Router.load(_near(file, str(router)))
        return RoutedModel(models, price, made, given.get("cost_weight", 0.0), per)
    for key in ("router", "cost_weight"):
        check(key not in given, f"{file.name}.{key}", given.get(key), "unset: a critic makes a cascade")
    check(list(models) == ["small", "large"], f"{file.name}.models", list(models), "small and large, in this order")
    return Cascade(models["small"], models["large"], critic, price, per)


def _near(file: Path, where: str) -> str:
    """A path beside the file, where there is one; any other name as it is."""
    beside = file.parent / where
    return str(beside) if beside.exists() else where
