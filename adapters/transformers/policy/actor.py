"""A language model as the actor of the driver of rows: it samples, is read, and takes gradients through an adapter.

Letters: `N` rows, `T` completion positions, `V` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.policy.trl import no_adapter, trainee
from steer.core import UnsupportedError
from steer.methods.rlg import RLGuidance
from steer.train.objectives.collecting import Ask
from steer.train.objectives.settings import PolicySettings

if TYPE_CHECKING:
    from steer.core import Prompt

LOGITS = 48_000_000
"""Numbers in one batch of logits that carry a gradient, about."""
CRITIQUE = (
    "Your answer may be wrong. Find what is wrong with it, then write a better answer to the first question: "
    "the better answer alone."
)

Pair = tuple[Sequence[int], Sequence[int]]


class _Numbered:
    """In place of a reader of prompts: prompts that are numbers stand for token ids."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids = ids

    def encode(self, prompt: Any) -> list[int]:
        return self.ids[int(prompt)]


class TextActor:
    """The policy, a network of its own beside `model`'s very weights, and `model` as the base.

    Args:
        prompts: of the data, for hints, critiques and signals.
        base: what is read as the base; default: `model`.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: PolicySettings,
        prompts: Sequence[Prompt] = (),
        base: LanguageModel | None = None,
    ) -> None:
        self.model, self.settings, self.prompts = model, settings, list(prompts)
        self.base = base or model
        self.network = _trainable(model, settings)
        self._trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.ids: list[list[int]] = []
        self.policy = self._sampling(_plain(self.network))
        self.other = self._sampling(self.base.network)
        # A model that samples freezes its network.
        for p in self._trained.values():
            p.requires_grad_(True)

    def _sampling(self, network: Any) -> LanguageModel:
        made = LanguageModel(network, self.model.tokenizer, self.model.name, check=False)
        made.reader = _Numbered(self.ids)  # type: ignore[assignment]
        return made

    def weights(self) -> dict[str, nn.Parameter]:
        return self._trained

    # ---- samples

    def draw(self, asks: Sequence[Ask], seed: int) -> list[list[list[int]]]:
        """Completions of each ask; all that are drawn alike are drawn in one batch."""
        found: list[list[list[int]]] = [[] for _ in asks]
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, ask in enumerate(asks):
            limit = self.settings.max_new_tokens if ask.limit is None else ask.limit
            kinds.setdefault((ask.who, ask.count, limit, ask.share), []).append(i)
        for part, ((who, count, limit, share), members) in enumerate(sorted(kinds.items(), key=str)):
            self.ids[:] = [list(asks[i].prompt_ids) for i in members]
            greedy = who == "greedy"
            settings: dict[str, Any] = {
                "temperature": 0.0 if greedy else self.settings.temperature,
                "max_new_tokens": limit,
            }
            model = self.other if who in ("base", "mixture") else self.policy
            # `share` of the base and the rest of the policy, in logits.
            edits = [RLGuidance(self.policy.process(**settings), 1.0 - share)] if who == "mixture" else ()
            drawn = model.generate(
                [str(k) for k in range(len(members))],
                n=1 if greedy else count,
                seed=(seed * 8 + part) % 2**32,
                edits=edits,
                **settings,
            )
            for owner, tokens in zip(drawn.group.tolist(), drawn.tokens or [], strict=True):
                found[members[owner]].append(list(tokens))
        return found

    # ---- reading

    @torch.no_grad()
    def read(self, rows: Sequence[Pair], who: str) -> list[list[float]]:
        network = self.network if who == "policy" else self.base.network
        return self._values(network, rows, entropy=False)

    @torch.no_grad()
    def entropies(self, rows: Sequence[Pair]) -> list[list[float]]:
        return self._values(self.network, rows, entropy=True)

    def _values(self, network: Any, rows: Sequence[Pair], entropy: bool) -> list[list[float]]:
        return _read(self.model, network, rows, self._temperature, entropy)

    @property
    def _temperature(self) -> float:
        """Losses of tokens work on the law that samples are drawn from, losses of sequences on the model's own."""
        return 1.0 if self.settings.sequences else self.settings.temperature

    def _forward(self, rows: Sequence[Pair], entropy: bool) -> tuple[Tensor, Tensor | None]:
        return token_laws(self.model, self.network, rows, self._temperature, entropy)

    # ---- learning

    def learn(self, rows: Sequence[Pair], loss: Callable[[Tensor, Tensor | None], Tensor], entropy: bool) -> float:
        """Gradients of a loss of all rows together. Where they do not fit in one pass, log-probabilities are computed
        without a gradient first, the loss gives the gradient that each of them needs, and the parts run again with it:
        the same gradient, for one forward pass more.
        """
        parts = list(_parts(rows, self.model.vocabulary))
        if len(parts) == 1:
            logp, h = self._forward(rows, entropy)
            value = loss(logp, h)
            value.backward()
            return float(value.detach())
        width = max(len(t) for _, t in rows)
        with torch.no_grad():
            found = [self._forward([rows[i] for i in part], entropy) for part in parts]
        whole = self._joined(parts, [x for x, _ in found], len(rows), width).requires_grad_()
        spread = self._joined(parts, [h for _, h in found], len(rows), width).requires_grad_() if entropy else None
        value = loss(whole, spread)
        value.backward()
        for part in parts:
            logp, h = self._forward([rows[i] for i in part], entropy)
            total = (logp * _of(whole.grad, part, logp.shape[1])).sum()
            if h is not None and spread is not None:
                total = total + (h * _of(spread.grad, part, h.shape[1])).sum()
            total.backward()
        return float(value.detach())

    def _joined(self, parts: Sequence[list[int]], values: Sequence[Tensor | None], count: int, width: int) -> Tensor:
        made = torch.zeros(count, width, device=self.model.device)
        for part, x in zip(parts, values, strict=True):
            assert x is not None
            made[part, : x.shape[1]] = x
        return made

    # ---- what the text says

    def lines(self, tokens: Sequence[int]) -> list[int]:
        """How many tokens each line of a completion has, its line break included; the end counts to the last."""
        sizes, count = [], 0
        for token in tokens:
            count += 1
            if "\n" in self.model.tokenizer.decode([token]):
                sizes.append(count)
                count = 0
        return [*sizes, *([count] if count or not sizes else [])]

    def hinted(self, number: int, text: str) -> list[int]:
        more = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*self.model.encode(self.prompts[number]), *more]

    def solved(self, number: int, text: str) -> list[int]:
        raise UnsupportedError("inpainting needs a masked language model, which can fill in what stands between")

    def criticised(self, number: int, tokens: Sequence[int]) -> list[int]:
        prompt, answer = self.prompts[number], self.model.decode(list(tokens)) or "."
        if not self.model.reader.chats:
            return self.model.encode(f"{prompt} {answer} {CRITIQUE}")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        said = [{"role": "assistant", "content": answer}, {"role": "user", "content": CRITIQUE}]
        return self.model.encode([*asked, *said])

    @torch.no_grad()
    def signal(self, number: int) -> float:
        """GAIN-RL's signal, from the residual stream before the last block; the question is what the user wrote, the
        rest is the template's.
        """
        from steer.train.objectives.schedules import angle_signal

        ids = self.model.encode(self.prompts[number])
        out = self.base.network(input_ids=torch.tensor([ids], device=self.model.device), output_hidden_states=True)
        prompt = self.prompts[number]
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        mine = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = [i for i in range(len(ids) - len(mine) + 1) if ids[i : i + len(mine)] == mine]
        inside = range(starts[-1], starts[-1] + len(mine)) if starts else range(1, len(ids))
        question = torch.tensor([i in inside for i in range(len(ids))], device=self.model.device)
        return angle_signal(out.hidden_states[-2][0], question)


@torch.no_grad()
def log_probs(model: LanguageModel, network: Any, rows: Sequence[Pair]) -> list[list[float]]:
    """Log-probability of each token of each row's completion under a network with the tokenizer of `model`."""
    return _read(model, network, rows, 1.0, False)


def _read(
    model: LanguageModel, network: Any, rows: Sequence[Pair], temperature: float, entropy: bool
) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in rows]
    for part in _parts(rows, model.vocabulary):
        logp, h = token_laws(model, network, [rows[i] for i in part], temperature, entropy)
        values = (h if entropy else logp).tolist()  # type: ignore[union-attr]
        for i, row in zip(part, values, strict=True):
            found[i] = row[: len(rows[i][1])]
    return found


def _parts(rows: Sequence[Pair], vocabulary: int) -> Iterator[list[int]]:
    """Numbers of rows in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) + len(rows[i][1]), i))
    part: list[int] = []
    for i in order:
        longest = max(len(rows[k][1]) for k in [*part, i])
        if part and (len(part) + 1) * longest * vocabulary > LOGITS:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def token_laws(
    model: LanguageModel, network: Any, rows: Sequence[Pair], temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability `[N, T]` of each completion token in one pass, 0 beyond the end; entropies where asked for."""
    device, pad = model.device, model.pad_token_id
    widths = [len(p) + len(t) for p, t in rows]
    width, longest = max(widths), max(len(t) for _, t in rows)
    ids = torch.tensor([[*p, *t, *[pad] * (width - n)] for (p, t), n in zip(rows, widths, strict=True)], device=device)
    real = torch.tensor([[k < n for k in range(width)] for n in widths], device=device)
    first = min(len(p) for p, _ in rows) - 1
    kept = torch.arange(first, width - 1, device=device)
    sparing = "logits_to_keep" in inspect.signature(_plain(network).forward).parameters
    more = {"logits_to_keep": kept} if sparing else {}
    out = network(input_ids=ids, attention_mask=real.long(), use_cache=False, **more)
    logits = out.logits if sparing else out.logits[:, kept]
    # Position len(p) - 1 + k predicts token k.
    start = torch.tensor([len(p) - 1 - first for p, _ in rows], device=device).unsqueeze(1)
    place = (start + torch.arange(longest, device=device)).clamp(max=len(kept) - 1)
    mine = torch.tensor([[k < len(t) for k in range(longest)] for _, t in rows], device=device)
    target = ids[:, first + 1 :].gather(1, place)
    if logits.shape[1] != longest or bool((start > 0).any()):
        logits = logits.gather(1, place.unsqueeze(2).expand(-1, -1, logits.shape[2]))
    logits = logits.float() / temperature
    norm = logits.logsumexp(-1)
    zero = logits.new_zeros(())
    logp = torch.where(mine, logits.gather(2, target.unsqueeze(2)).squeeze(2) - norm, zero)
    h = norm - (logits.softmax(-1) * logits).sum(-1) if entropy else None
    return logp, None if h is None else torch.where(mine, h, zero)


def _of(gradient: Tensor | None, part: list[int], width: int) -> Tensor:
    assert gradient is not None
    return gradient[part, :width]


def _trainable(model: LanguageModel, settings: PolicySettings) -> Any:
    network, adapter = trainee(model, settings)
    if adapter is None:
        return network
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            made = get_peft_model(network, adapter).to(model.device)
        except ValueError as error:
            raise no_adapter(model, settings, error) from error
    made.peft_config["default"].base_model_name_or_path = None
    return made


def _plain(network: Any) -> Any:
    return network.get_base_model() if hasattr(network, "get_base_model") else network
