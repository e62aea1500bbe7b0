"""Samples that a run returns, with what they cost, and the rewards that score them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from steer.core.errors import RewardError, SteerError, UnsupportedError

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image

__all__ = ["Cost", "Reward", "Sample", "Samples", "TokenDrift"]


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
    critic_calls: int = 0
    """Drafts that a critic judged."""
    price: float = 0.0
    """What models with a price took, in its unit."""
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Sample:
    """One row of `Samples`."""

    prompt: Any
    output: Any
    """A text, or an image `[C, H, W]`."""
    reward: float | None
    weight: float
    """Its share of its prompt's population; those of one prompt sum to 1."""
    kl: float | None
    tokens: list[int] | None = field(default=None, repr=False)
    readings: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """What was read where each token was chosen, by name `[T]`."""

    @property
    def text(self) -> str:
        """The output of a language model. Raises `SteerError` for an image."""
        if not isinstance(self.output, str):
            raise SteerError("this sample is an image: use .image")
        return self.output

    @property
    def image(self) -> Image:
        """The output of a diffusion model as a Pillow image. Raises `SteerError` for a text."""
        if not isinstance(self.output, Tensor):
            raise SteerError("this sample is a text, no image: use .text")
        return _pictures(self.output.unsqueeze(0))[0]


@dataclass(frozen=True)
class TokenDrift:
    """What every token cost: the KL of its step's law to the base law, a tensor `[T]` for each row, and its text."""

    kl: list[Tensor]
    texts: list[list[str]]

    @staticmethod
    def join(parts: Sequence[TokenDrift]) -> TokenDrift:
        """Those of several batches as one."""
        return TokenDrift([t for p in parts for t in p.kl], [t for p in parts for t in p.texts])


@dataclass(frozen=True, repr=False)
class Samples:
    """A weighted population of finished (or previewed) rows, grouped by prompt.

    Iterating gives a `Sample` for each row, an index one of them, and a slice the rows as `Samples`. `log_weight` are
    the population's log-weights, not normalised; equal weights are zeros. Means are taken with `mean`, which weighs.
    `log_z` estimates log E[exp(r / beta)] for each prompt where the sampler can tell.
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
    kl_kind: str | None = None
    """What `kl` is: "exact", the KL of every step's law, summed; "one-sample", `log q - log p` of the text; "bound", an
    upper bound for what was chosen; "population", one estimate for each prompt; or "none: " and why.
    """
    token_drift: Callable[[], TokenDrift] | TokenDrift | None = field(default=None, repr=False)
    """KL and text of each token, computed when `kl_tokens` is first read."""
    log_z: Tensor | None = None
    lineage: Tensor | None = None
    """Which row of the pool each sample is, or its ancestors, by sampler."""
    tokens: list[list[int]] | None = field(default=None, repr=False)
    """Generated token ids (language models), end-of-sequence included where it was drawn."""
    readings: dict[str, list[Tensor]] | None = field(default=None, repr=False)
    """By name, a tensor `[T]` for each row: what was read where each of its tokens was chosen, which is after the token
    before it (see `generate`'s `readings`).
    """
    cost: Cost = field(default_factory=Cost)
    pool: Samples | None = field(default=None, repr=False)
    """Every candidate that was scored, where the sampler returns only some."""
    trace: list[Any] | None = field(default=None, repr=False)
    """What a sampler noted on its way, for pictures: one entry for each weighted step (FK), the trees (DTS)."""

    def __len__(self) -> int:
        return len(self.group)

    def __iter__(self) -> Iterator[Sample]:
        kl, weights = self.kl, self.weights
        return (self._row(i, kl, weights) for i in range(len(self)))

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Samples: ...
    def __getitem__(self, at: int | slice) -> Sample | Samples:
        if isinstance(at, slice):
            return self.select(torch.arange(len(self))[at])
        rows = range(len(self))
        return self._row(rows[at], self.kl, self.weights)

    def _row(self, i: int, kl: Tensor | None, weights: Tensor) -> Sample:
        return Sample(
            prompt=self.prompts[int(self.group[i])],
            output=self.outputs[i],
            weight=float(weights[i]),
            reward=None if self.reward is None else float(self.reward[i]),
            kl=None if kl is None else float(kl[i]),
            tokens=None if self.tokens is None else self.tokens[i],
            readings=None if self.readings is None else {name: rows[i] for name, rows in self.readings.items()},
        )

    @property
    def texts(self) -> list[str]:
        """The outputs of a language model. Raises `SteerError` for images."""
        if isinstance(self.outputs, Tensor):
            raise SteerError("these samples are images: use .images, or .outputs for tensors")
        return list(self.outputs)

    @property
    def images(self) -> list[Image]:
        """The outputs of a diffusion model as Pillow images. Raises `SteerError` for texts."""
        return _pictures(self.outputs)

    @property
    def best(self) -> Samples:
        """The row with the highest reward of each prompt, the first of equals. Raises `SteerError` without rewards."""
        reward = self._rewards()
        rows = [(self.group == b).nonzero().squeeze(1) for b in range(len(self.prompts))]
        return self.select(torch.stack([mine[reward[mine].argmax()] for mine in rows if len(mine)]))

    @property
    def kl(self) -> Tensor | None:
        """KL of each row's law to the base process `[N]`, in nats, on the distribution really sampled from.

        Edits of the hidden site need a second pass over the finished text, which runs when this is first read.
        """
        if callable(self.kl_estimate):
            object.__setattr__(self, "kl_estimate", self.kl_estimate())
        return self.kl_estimate  # type: ignore[return-value]

    @property
    def kl_tokens(self) -> list[Tensor]:
        """Exact KL in nats of each step's law to the base law, a tensor `[T]` for each row: where a vector drifts. Two
        passes over the finished texts, when this is first read, under the law that proposed the tokens: what a sampler
        chooses among them is not in it. Raises `UnsupportedError` where steps have no exact KL.
        """
        return self.drift.kl

    @property
    def drift(self) -> TokenDrift:
        """`kl_tokens` with the tokens' texts."""
        if callable(self.token_drift):
            object.__setattr__(self, "token_drift", self.token_drift())
        if not isinstance(self.token_drift, TokenDrift):
            raise UnsupportedError(
                "kl_tokens: known of language models through transformers, with edits of hidden states and prompts"
            )
        return self.token_drift

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

    def mean(self, values: Tensor | Sequence[float]) -> Tensor:
        """Weighted mean `[B]` of `values` `[N]` over each prompt's population: of the steered law, where the plain mean
        of a weighted population is the proposal's.
        """
        w, x = self.weights, torch.as_tensor(values).double()
        return self._sum(torch.where(w > 0, w * x, 0.0))

    def mean_reward(self) -> Tensor:
        """Weighted mean reward of each prompt `[B]`."""
        return self.mean(self._rewards())

    def _rewards(self) -> Tensor:
        if self.reward is None:
            raise SteerError("these samples carry no reward: pass reward= to generate()")
        return self.reward

    def select(self, index: Tensor) -> Samples:
        """The rows in `index` `[M]`, with everything that belongs to them."""
        at = index.tolist()

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        def later() -> Tensor:
            kl = self.kl
            assert kl is not None
            return kl[index.to(kl.device)]

        def drift() -> TokenDrift:
            return TokenDrift([self.drift.kl[i] for i in at], [self.drift.texts[i] for i in at])

        return replace(
            self,
            outputs=self.outputs[index] if isinstance(self.outputs, Tensor) else [self.outputs[i] for i in at],
            tokens=None if self.tokens is None else [self.tokens[i] for i in at],
            readings=self.readings and {name: [rows[i] for i in at] for name, rows in self.readings.items()},
            group=self.group[index],
            log_weight=self.log_weight[index],
            reward=pick(self.reward),
            log_prob=pick(self.log_prob),
            base_log_prob=pick(self.base_log_prob),
            tilt=pick(self.tilt),
            lineage=pick(self.lineage),
            kl_estimate=later if callable(self.kl_estimate) else pick(self.kl_estimate),
            token_drift=None if self.token_drift is None else drift,
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
        numbered = [
            torch.where(p.lineage < 0, p.lineage, p.lineage + o)  # -1 is nobody
            for p, o in zip(parts, before, strict=True)
            if p.lineage is not None
        ]
        lineage = torch.cat(numbered) if len(numbered) == len(parts) else None
        lazy = all(p.kl_estimate is not None for p in parts)
        by_token = all(p.token_drift is not None for p in parts)
        kinds = {p.kl_kind for p in parts}
        tensors = isinstance(parts[0].outputs, Tensor)
        pools = [p.pool for p in parts]
        return Samples(
            prompts=[prompt for p in parts for prompt in p.prompts],
            outputs=torch.cat([p.outputs for p in parts]) if tensors else [o for p in parts for o in p.outputs],
            tokens=None if any(p.tokens is None for p in parts) else [t for p in parts for t in (p.tokens or [])],
            readings=_joined_readings([p.readings for p in parts]),
            group=torch.cat([p.group + o for p, o in zip(parts, offsets, strict=True)]),
            log_weight=torch.cat([p.log_weight for p in parts]),
            reward=joined("reward"),
            log_prob=joined("log_prob"),
            base_log_prob=joined("base_log_prob"),
            tilt=joined("tilt"),
            log_z=joined("log_z"),
            lineage=lineage,
            kl_estimate=(lambda: torch.cat([p.kl for p in parts if p.kl is not None])) if lazy else None,
            kl_kind=kinds.pop() if len(kinds) == 1 else None,
            token_drift=(lambda: TokenDrift.join([p.drift for p in parts])) if by_token else None,
            cost=sum((p.cost for p in parts), Cost()),
            pool=None if any(p is None for p in pools) else Samples.join([p for p in pools if p is not None]),
            trace=_joined_trace(parts),
        )

    @staticmethod
    def stack(parts: Sequence[Samples]) -> Samples:
        """Rows of several samples of the same prompts as one, in order, without their pools and lineages."""
        joined = Samples.join([replace(p, pool=None, lineage=None, trace=None) for p in parts])
        return replace(joined, prompts=parts[0].prompts, group=torch.cat([p.group for p in parts]), log_z=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"prompts": [{"prompt", "samples": [{"text", "reward", "log_weight", "kl"}], ...}], "cost"}`.

        A sample also has `readings`, a list for each name, where some were asked for. `text` is None for images;
        `kl_kind` says what `kl` is. A prompt also has `log_z` and, for a population with weights, its `ess`, where the
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
                | ({"readings": {k: v[i].tolist() for k, v in self.readings.items()}} if self.readings else {})
            )
        prompts: list[dict[str, Any]] = [{"prompt": p, "samples": r} for p, r in zip(self.prompts, rows, strict=True)]
        population = self.pool or self
        weighted = bool((population.log_weight != 0).any())
        for name, values in (("log_z", self.log_z), ("ess", population.ess if weighted else None)):
            for b, entry in enumerate(prompts if values is not None else []):
                entry[name] = number(values, b)
        cost = {k: getattr(self.cost, k) for k in Cost.__dataclass_fields__}
        return {"prompts": prompts, "kl_kind": self.kl_kind, "cost": cost}

    def to_pandas(self) -> DataFrame:
        """A table with a row for each sample: `prompt`, `text`, `reward`, `weight`, `kl`, `num_tokens`, as far as they
        are known, and `readings.NAME`, a list with a number for each token. Needs pandas.
        """
        try:
            import pandas
        except ImportError:
            raise SteerError("to_pandas needs pandas: pip install pandas") from None
        images = isinstance(self.outputs, Tensor)
        columns: dict[str, Any] = {
            "prompt": [s.prompt for s in self],
            "text": None if images else self.texts,
            "reward": self.reward,
            "weight": self.weights,
            "kl": self.kl,
            "num_tokens": self.tokens and [len(t) for t in self.tokens],
            **{f"readings.{name}": [row.tolist() for row in rows] for name, rows in (self.readings or {}).items()},
        }
        return pandas.DataFrame(
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in columns.items() if v is not None}
        )

    def save(self, folder: Path | str) -> None:
        """Write `samples.json` (as `to_dict` has it) and, of images, one PNG for each row, `000.png` and on."""
        from steer.files import as_json, write_text

        where = Path(folder)
        write_text(where / "samples.json", as_json(self.to_dict()))
        if isinstance(self.outputs, Tensor):
            for i, image in enumerate(self.images):
                image.save(where / f"{i:03}.png")

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: what is computed when it is first read is computed now."""
        drift = self.drift if callable(self.token_drift) else self.token_drift
        return {**self.__dict__, "kl_estimate": self.kl, "token_drift": drift}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        what = "images" if isinstance(self.outputs, Tensor) else "texts"
        prompts = f"{len(self.prompts)} prompt{'s'[: len(self.prompts) != 1]}"
        facts = [f"{len(self)} {what if len(self) != 1 else what[:-1]}", prompts]
        if self.reward is not None and len(self):
            facts.append(f"mean reward {float(self.mean_reward().mean()):.4g}")
        if bool((self.log_weight != 0).any()):
            facts.append(f"weighted, ESS {float(self.ess.mean()):.3g}")
        if isinstance(self.kl_estimate, Tensor) and len(self):
            kind = f" ({self.kl_kind})" if self.kl_kind else ""
            facts.append(f"mean KL {float(self.mean(self.kl_estimate).mean()):.4g}{kind}")
        return f"Samples({', '.join(facts)})"

    def _repr_html_(self) -> str:
        from steer.core.notebook import samples_html

        return samples_html(self)


def _joined_trace(parts: Sequence[Samples]) -> list[Any] | None:
    """The traces of several batches as one, where every entry says all of itself; entries that number the rows of their
    batch (generations of particles) are of no use beside others.
    """
    entries = [entry for p in parts for entry in p.trace or ()]
    whole = all(p.trace is not None for p in parts) and all(getattr(e, "stands_alone", False) for e in entries)
    return entries if whole else None


def _joined_readings(parts: Sequence[dict[str, list[Tensor]] | None]) -> dict[str, list[Tensor]] | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return {name: [row for part in known for row in part[name]] for name in known[0]}


def _pictures(images: Any) -> list[Image]:
    if not isinstance(images, Tensor):
        raise SteerError("these samples are texts: use .texts")
    from steer.images import to_pil

    return to_pil(images)


class Reward(ABC):
    """Scores samples, higher is better. Rewards close under `+ - *`; see `steer.rewards`."""

    modality: ClassVar[Literal["text", "image"] | None] = None
    """What it can score alone; None where it takes both, or where nobody said."""

    @property
    def alone(self) -> bool:
        """Whether a score depends on its own prompt and output and nothing else, and takes no model that also
        generates: such scores may be computed at any time, with any others, in another thread.
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
