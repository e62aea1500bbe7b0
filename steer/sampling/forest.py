"""A forest of search trees: what its rollouts have found, and the file that it is kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.core import Cost, InputError, Samples, check
from steer.files import replacing
from steer.sampling.forest_growth import Growth
from steer.sampling.tree import Floats, Ints, Tree
from steer.sampling.weights import resample

__all__ = ["Forest"]


@dataclass
class Forest(Growth):
    """One tree for each prompt, growing together: rollouts of all trees share the network's batches."""

    def weights(self, t: int) -> tuple[Ints, Floats]:
        """Leaves of tree `t` and their log-weights: of their rollouts together, over the number of rollouts, times
        `exp(r / beta)`; their log-sum is log Z.
        """
        tree = self.trees[t]
        leaf, inverse = np.unique(np.asarray(self.leaf[t], dtype=np.int64), return_inverse=True)
        paths = np.asarray(self.log_path[t])
        mass = np.full(len(leaf), -np.inf)
        np.logaddexp.at(mass, inverse, paths)
        return leaf, mass - np.log(max(1, len(paths))) + tree.value[leaf] / self.beta

    def samples(self, n: int | None = None) -> Samples:
        """`n` outputs for each prompt, or all leaves with their weights. DTS* gives the best leaves first, and from the
        best again where it found fewer than n.
        """
        check(self.rollouts > 0, "rollouts", 0, "a forest that has been grown")
        chosen: list[tuple[Tree, int]] = []
        log_weights: list[float] = []
        log_z: list[float] = []
        for t, tree in enumerate(self.trees):
            leaf, weight = self.weights(t)
            picked, own = self._picked(tree, n, leaf, weight)
            chosen += [(tree, int(node)) for node in picked]
            log_weights += own.tolist()
            weighted = self.sampler.estimator == "weighted"
            log_z.append(float(np.logaddexp.reduce(weight)) if weighted else tree.value[0] / self.beta)
        found = self.process.decode(self._store.leaves([tree.place(node) for tree, node in chosen]))
        return replace(
            found,
            reward=torch.tensor([float(tree.value[node]) for tree, node in chosen], dtype=torch.float64),
            log_weight=torch.tensor(log_weights, dtype=torch.float64),
            log_z=None if self.sampler.searching else torch.tensor(log_z, dtype=torch.float64),
            lineage=torch.tensor([node for _, node in chosen]),
            kl_estimate=None,
            cost=self.cost,
            trace=[self],
        )

    def _picked(self, tree: Tree, n: int | None, leaf: Ints, weight: Floats) -> tuple[Ints, Floats]:
        """The leaves to return and their log-weights, of all with their weights."""
        if self.sampler.searching:
            order = leaf[np.argsort(-tree.value[leaf], kind="stable")]
            order = np.resize(order, n or len(order))  # from the best again where there are fewer than n
            return order, np.zeros(len(order))
        if self.sampler.estimator == "published":
            return self._published(tree, n, leaf)
        if n is None:
            return leaf, weight
        index = resample(torch.from_numpy(weight), self.generator, "ssp", n).numpy()
        return leaf[index], np.zeros(n)

    def _published(self, tree: Tree, n: int | None, leaf: Ints) -> tuple[Ints, Floats]:
        """Algorithm 2: Boltzmann descents; without n every leaf with the log-probability of being reached."""
        if n is None:
            with np.errstate(divide="ignore"):
                return leaf, np.log(tree.reach()[leaf])
        return np.asarray([tree.descend(self._uniform) for _ in range(n)], dtype=np.int64), np.zeros(n)

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.generator, device=self.generator.device))

    def save(self, path: Path | str) -> None:
        """Write the forest to one safetensors file, in one step; `load` grows it on as if it had never stopped."""
        from safetensors.torch import save as to_bytes

        tensors = self._store.packed()
        for t, tree in enumerate(self.trees):
            tensors |= {f"tree.{t}.{k}": torch.from_numpy(np.asarray(v)) for k, v in tree.arrays().items()}
            tensors[f"tree.{t}.log_path"] = torch.tensor(self.log_path[t], dtype=torch.float64)
            tensors[f"tree.{t}.leaf"] = torch.tensor(self.leaf[t], dtype=torch.int64)
        tensors["generator"] = self.generator.get_state()
        facts = {
            "forest": repr(self._facts()),
            "rollouts": str(self.rollouts),
            "cost": json.dumps(asdict(self.cost)),
        }
        with replacing(path) as temporary:
            temporary.write_bytes(to_bytes({k: v.clone().contiguous() for k, v in tensors.items()}, facts))

    def _facts(self) -> tuple[Any, ...]:
        s = self.sampler
        return (
            type(s).__name__, s.batch, s.widening, s.exponent, s.exploration, s.lookahead, s.trust, self.steps,
            self.beta, len(self.prompts),
        )  # fmt: skip

    def load(self, path: Path | str) -> Forest:
        """Take up the forest that was saved to `path` by a sampler with the same settings. Returns itself.

        Raises `InputError` where the file is no forest, or one with other settings.
        """
        facts, tensors = _read(path)
        same = facts.get("forest") == repr(self._facts())
        check(same, "forest", facts.get("forest", "no forest"), repr(self._facts()))
        names = [name.removeprefix("tree.0.") for name in tensors if name.startswith("tree.0.")]
        for t in range(len(self.prompts)):
            mine = {name: tensors[f"tree.{t}.{name}"].numpy() for name in names}
            self.log_path[t], self.leaf[t] = mine.pop("log_path").tolist(), mine.pop("leaf").tolist()
            self.trees[t] = Tree.restore(self.beta, self.trees[t].hard, mine, self.trees[t].trust)
        self._store.unpacked(tensors)
        self._relearn()
        self.generator.set_state(tensors["generator"])
        self.rollouts = int(facts["rollouts"])
        self.cost = Cost(**json.loads(facts["cost"]))
        return self

    def _relearn(self) -> None:
        """Names of equal children, from the states."""
        if not self.sampler.merge:
            return
        for t, tree in enumerate(self.trees):
            for node in range(1, len(tree)):
                chunk, row = tree.place(node)
                names = self._store.names(chunk, bool(tree.terminal[node]))
                if names is not None:
                    self._known[t][int(tree.parent[node]), names[row]] = node


def _read(path: Path | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The facts and the tensors of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError("forest", str(path), f"a forest that was saved ({error})") from error
