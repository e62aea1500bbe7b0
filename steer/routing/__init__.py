"""Routers: several models behind one, by price and by what each is expected to do well."""

from __future__ import annotations

from steer.routing.cascade import Cascade
from steer.routing.environment import RouterEnvironment, route_reward
from steer.routing.model import RoutedModel
from steer.routing.router import Router, RouteTable, train_router

__all__ = ["Cascade", "RouteTable", "RoutedModel", "Router", "RouterEnvironment", "route_reward", "train_router"]
