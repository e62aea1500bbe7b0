"""`Samples`, what a person gets; `Cost`, what it took; `Reward`, what scores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steer.core.errors import RewardError, SteerError

__all__ = ["Cost", "Reward", "Samples"]


@dataclass(frozen=True)
class Cost:
    """What was spent. Sums with `+`."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    model_calls: int = 0
    """Batched calls of the network."""
    nfe: int = 0
    """Network evaluations, one for each row: a particle at one noise level, a token that was read."""
    reward_calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Samples:
    """A weighted population of finished (or previewed) rows, grouped by prompt.

    `log_weight` are the population's log-weights, not normalised; equal weights are zeros. `log_z` estimates
    log E[exp(r / beta)] for each prompt where the sampler can tell.
    """

    prompts: list[Any]
    outputs: Any
    """`N` texts, or a tensor `[N, ...]`."""
    group: Tensor
    log_weight: Tensor
    reward: Tensor | None = None
    log_prob: Tensor | None = None
    base_log_prob: Tensor | None = None
    tilt: Tensor | None = None
    """Log of the law that weights aim at over the base law, before any reward: 0 but under edits with a power."""
    kl_estimate: Callable[[], Tensor] | Tensor | None = field(default=None, repr=False)
    log_z: Tensor | None = None
    lineage: Tensor | None = None
    """Which row of the pool each sample is, or its ancestors, by sampler."""
    tokens: list[list[int]] | None = field(default=None, repr=False)
    """Generated token ids (language models), end-of-sequence included where it was drawn."""
    cost: Cost = field(default_factory=Cost)
    pool: Samples | None = field(default=None, repr=False)
    """Every candidate that was scored, where the sampler returns only some."""
    trace: list[Any] | None = field(default=None, repr=False)
    """What a sampler noted on its way, for pictures: one entry for each weighted step (FK), the trees (DTS)."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def texts(self) -> list[str]:
        """The outputs of a language model."""
        return list(self.outputs)

    @property
    def kl(self) -> Tensor | None:
        """KL of each row's law to the base process `[N]`, in nats, on the distribution really sampled from.

        Edits of the hidden site need a second pass over the finished text, which runs when this is first read.
        """
        if callable(self.kl_estimate):
            object.__setattr__(self, "kl_estimate", self.kl_estimate())
        return self.kl_estimate  # type: ignore[return-value]

    @property
    def weights(self) -> Tensor:
        """Weights `[N]` that sum to 1 for each prompt; a prompt whose weights are all 0 has equal ones."""
        logs, prompts = self.log_weight.double(), len(self.prompts)
        top = torch.full((prompts,), -torch.inf, dtype=torch.float64).scatter_reduce(0, self.group, logs, "amax")
        mass = torch.where(top.isneginf()[self.group], 1.0, (logs - top[self.group]).exp())
        return mass / self._sum(mass)[self.group]

    def _sum(self, x: Tensor) -> Tensor:
        return torch.zeros(len(self.prompts), dtype=torch.float64).index_add(0, self.group, x)

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each prompt's population `[B]`: `1 / sum w^2` of the normalised weights."""
        return 1 / self._sum(self.weights.square())

    def mean_reward(self) -> Tensor:
        """Weighted mean reward of each prompt `[B]`."""
        if self.reward is None:
            raise SteerError("these samples carry no reward: pass reward= to generate()")
        w = self.weights
        return self._sum(torch.where(w > 0, w * self.reward.double(), 0.0))

    def select(self, index: Tensor) -> Samples:
        """The rows in `index` `[M]`, with everything that belongs to them."""
        at = index.tolist()

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        def later() -> Tensor:
            kl = self.kl
            assert kl is not None
            return kl[index.to(kl.device)]

        return replace(
            self,
            outputs=self.outputs[index] if isinstance(self.outputs, Tensor) else [self.outputs[i] for i in at],
            tokens=None if self.tokens is None else [self.tokens[i] for i in at],
            group=self.group[index],
            log_weight=self.log_weight[index],
            reward=pick(self.reward),
            log_prob=pick(self.log_prob),
            base_log_prob=pick(self.base_log_prob),
            tilt=pick(self.tilt),
            lineage=pick(self.lineage),
            kl_estimate=later if callable(self.kl_estimate) else pick(self.kl_estimate),
        )

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """The samples of several batches of prompts as one."""
        if len(parts) == 1:
            return parts[0]
        offsets = [sum(len(p.prompts) for p in parts[:i]) for i in range(len(parts))]

        def joined(name: str) -> Tensor | None:
            columns = [getattr(p, name) for p in parts]
            return None if any(c is None for c in columns) else torch.cat(columns)

        # A lineage counts rows of the pool; those of later batches come after.
        before = [sum(len(p.pool or p) for p in parts[:i]) for i in range(len(parts))]
        numbered = [p.lineage + o for p, o in zip(parts, before, strict=True) if p.lineage is not None]
        lineage = torch.cat(numbered) if len(numbered) == len(parts) else None
        lazy = all(p.kl_estimate is not None for p in parts)
        tensors = isinstance(parts[0].outputs, Tensor)
        pools = [p.pool for p in parts]
        return Samples(
            prompts=[prompt for p in parts for prompt in p.prompts],
            outputs=torch.cat([p.outputs for p in parts]) if tensors else [o for p in parts for o in p.outputs],
            tokens=None if any(p.tokens is None for p in parts) else [t for p in parts for t in (p.tokens or [])],
            group=torch.cat([p.group + o for p, o in zip(parts, offsets, strict=True)]),
            log_weight=torch.cat([p.log_weight for p in parts]),
            reward=joined("reward"),
            log_prob=joined("log_prob"),
            base_log_prob=joined("base_log_prob"),
            tilt=joined("tilt"),
            log_z=joined("log_z"),
            lineage=lineage,
            kl_estimate=(lambda: torch.cat([p.kl for p in parts if p.kl is not None])) if lazy else None,
            cost=sum((p.cost for p in parts), Cost()),
            pool=None if any(p is None for p in pools) else Samples.join([p for p in pools if p is not None]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"prompts": [{"prompt", "samples": [{"text", "reward", "log_weight", "kl"}], ...}], "cost"}`.

        `text` is None for images. A prompt also has `log_z` and, for a population with weights, its `ess`, where the
        sampler has them.
        """
        kl = self.kl

        def number(x: Tensor | None, i: int) -> float | None:
            return None if x is None else float(x[i])

        rows: list[list[dict[str, Any]]] = [[] for _ in self.prompts]
        for i, b in enumerate(self.group.tolist()):
            rows[b].append(
                {
                    "text": self.outputs[i] if isinstance(self.outputs[i], str) else None,
                    "reward": number(self.reward, i),
                    "log_weight": number(self.log_weight, i),
                    "kl": number(kl, i),
                }
            )
        prompts: list[dict[str, Any]] = [{"prompt": p, "samples": r} for p, r in zip(self.prompts, rows, strict=True)]
        population = self.pool or self
        weighted = bool((population.log_weight != 0).any())
        for name, values in (("log_z", self.log_z), ("ess", population.ess if weighted else None)):
            for b, entry in enumerate(prompts if values is not None else []):
                entry[name] = number(values, b)
        return {"prompts": prompts, "cost": {k: getattr(self.cost, k) for k in Cost.__dataclass_fields__}}


class Reward(ABC):
    """Scores samples, higher is better. Rewards close under `+ - *`; see `steer.rewards`."""

    modality: ClassVar[Literal["text", "image"] | None] = None
    """What it can score alone; None where it takes both, or where nobody said."""

    @property
    def alone(self) -> bool:
        """Whether a score depends on its own prompt and output and nothing else, and takes no model that also
        generates: such scores may be computed at any time, in any company, in another thread.
        """
        return False

    @abstractmethod
    def score(self, samples: Samples) -> Tensor:
        """Scores `[N]`."""

    def bind(self, model: Any) -> Reward:
        """The reward for use with `model`; rewards that score under the base model take hold of it here."""
        return self

    def __call__(self, samples: Samples) -> Tensor:
        """Checked scores `[N]` in float64; raises `RewardError` for NaN, +infinity (`exp(r / beta)` has no
        law then; half precision gets there at 65520), a wrong length, or a reward that raised.
        """
        try:
            scores = torch.as_tensor(self.score(samples)).detach().cpu().double()
        except SteerError:
            raise
        except Exception as error:
            raise RewardError(f"reward {self}: raised {type(error).__name__}: {error}") from error
        if scores.shape != (len(samples),):
            raise RewardError(f"reward {self}: returned shape {tuple(scores.shape)}; allowed: ({len(samples)},)")
        if (wrong := scores.isnan() | scores.isposinf()).any():
            bad = int(wrong.nonzero()[0])
            given = "NaN" if scores[bad].isnan() else "inf"
            raise RewardError(f"reward {self}: returned {given} for sample {bad}; allowed: numbers")
        return scores
