"""Policies of masked diffusion language models, tuned by rounds: the actor, and the run.

A completion is a canvas of `max_new_tokens` positions, revealed in any order. Its log-probabilities are those of the
mean field in one step: each token's marginal where every position is masked. That is an approximation: the law of the
chain has no such product, and a ratio of two of them is no ratio of chains (Zhao et al. 2025, diffu-GRPO); the samples
are those of the chain itself. Letters: `N` rows, `L` positions.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.transformers.masked import MaskedLanguageModel
from steer.adapters.transformers.policy.rows import Scores, drive
from steer.adapters.transformers.policy.trl import Online
from steer.artifacts import Card, data_hash
from steer.core import Reward, UnsupportedError, check
from steer.data import plain_row, prompt_of
from steer.files import replacing_folder
from steer.masked import MaskedProcess
from steer.rewards import as_reward
from steer.rewards.verifiable import with_rows
from steer.train.objectives.collecting import Ask, Row
from steer.train.objectives.settings import PolicySettings, policy_settings
from steer.train.policy_folder import CARD, check_target, claim

__all__ = ["MaskedActor", "train_masked_policy"]

SCHEDULES = ("uniform", "dynamic", "knapsack", "inpaint")
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class _Speaking:
    """Prompts and texts of a masked model, as scoring asks for them."""

    model: MaskedLanguageModel

    def show(self, prompt: Any) -> Any:
        return self.model.show(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.model.decode_text([t for t in tokens if t != self.model.mask_id])


class MaskedActor:
    """A copy of a masked model's network as the policy, and the model itself as the base.

    Args:
        steps: of the chain that samples are drawn by.
    """

    def __init__(self, model: MaskedLanguageModel, settings: PolicySettings, steps: int) -> None:
        self.base, self.settings, self.steps = model, settings, steps
        network = copy.deepcopy(model.network).float()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.policy = MaskedLanguageModel(network, model.tokenizer, model.name, model.mask_id)
        network.requires_grad_(True)

    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.policy.network.named_parameters())

    # ---- samples

    @torch.no_grad()
    def draw(self, asks: Sequence[Ask], seed: int) -> list[list[list[int]]]:
        """Canvases of each ask; those of the policy and those of the base in one batch each."""
        found: list[list[list[int]]] = [[] for _ in asks]
        for part, who in enumerate(("policy", "base", "greedy")):
            members = [i for i, ask in enumerate(asks) if ask.who == who]
            if members:
                greedy = who == "greedy"
                model = self.base if who == "base" else self.policy
                process = model.process(
                    length=self.settings.max_new_tokens,
                    steps=self.steps,
                    temperature=0.0 if greedy else self.settings.temperature,
                )
                for i, tokens in self._drawn(process, [asks[i] for i in members], (seed * 8 + part) % 2**63):
                    found[members[i]].append(tokens)
        if any(ask.who == "mixture" for ask in asks):
            raise UnsupportedError("a masked model has no mixture of next-token laws: opponent=0")
        return found

    def _drawn(self, process: MaskedProcess, asks: Sequence[Ask], seed: int) -> list[tuple[int, list[int]]]:
        owners = [i for i, ask in enumerate(asks) for _ in range(ask.count)]
        generator = torch.Generator().manual_seed(seed)
        state = process.init([""], len(owners), generator)
        tokens = state.tokens.clone()
        for row, i in enumerate(owners):
            for position, token in asks[i].canvas:
                tokens[row, position] = token
        encoded = [list(ask.prompt_ids) for ask in asks]
        state = replace(state, tokens=tokens, encoded=encoded, group=torch.tensor(owners))
        state = replace(state, prompts=[""] * len(asks))
        while not process.done(state):
            state = process.propose(state, generator)
        return list(zip(owners, state.tokens.tolist(), strict=True))

    # ---- reading

    @torch.no_grad()
    def read(self, rows: Sequence[Pair], who: str) -> list[list[float]]:
        logp, _ = self._forward(self.policy if who == "policy" else self.base, rows, False)
        return [row[: len(tokens)] for row, (_, tokens) in zip(logp.tolist(), rows, strict=True)]

    @torch.no_grad()
    def entropies(self, rows: Sequence[Pair]) -> list[list[float]]:
        _, h = self._forward(self.policy, rows, True)
        assert h is not None
        return [row[: len(tokens)] for row, (_, tokens) in zip(h.tolist(), rows, strict=True)]

    def _forward(self, model: MaskedLanguageModel, rows: Sequence[Pair], entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probability `[N, L]` of each token where all are masked; prompts that occur twice are read once."""
        if not rows:
            return torch.zeros(0, 0), torch.zeros(0, 0) if entropy else None
        length, mask = self.settings.max_new_tokens, model.mask_id
        prompts = list(dict.fromkeys(tuple(p) for p, _ in rows))
        laws: dict[tuple[int, ...], Tensor] = {}
        for size in sorted({len(p) for p in prompts}):
            same = [p for p in prompts if len(p) == size]
            ids = [[*p, *[mask] * length, *model.frame[1]] for p in same]
            logits = model.logits(torch.tensor(ids, device=model.device))[:, size : size + length].float()
            barred = torch.zeros_like(logits[0, 0])
            barred[mask] = -torch.inf
            laws |= dict(zip(same, ((logits + barred) / self.settings.temperature).log_softmax(-1), strict=True))
        law = torch.stack([laws[tuple(p)] for p, _ in rows])
        target = torch.tensor([[*t, *[0] * (length - len(t))] for _, t in rows], device=law.device)
        logp = law.gather(2, target.unsqueeze(2)).squeeze(2)
        h = -(law.exp() * law.clamp_min(-1e30)).sum(-1) if entropy else None
        return logp, h

    def learn(self, rows: Sequence[Pair], loss: Callable[[Tensor, Tensor | None], Tensor], entropy: bool) -> float:
        """Gradients of a loss of all rows together."""
        value = loss(*self._forward(self.policy, rows, entropy))
        value.backward()
        return float(value.detach())

    # ---- what the text says

    def solved(self, number: int, text: str) -> list[int]:
        ids = self.base.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)[: self.settings.max_new_tokens]

    def lines(self, tokens: Sequence[int]) -> list[int]:
        return [len(tokens)]

    def hinted(self, number: int, text: str) -> list[int]:
        raise UnsupportedError("hints continue a text from left to right; a masked model has schedule=inpaint")

    def criticised(self, number: int, tokens: Sequence[int]) -> list[int]:
        raise UnsupportedError("critiques continue a conversation from left to right")

    def signal(self, number: int) -> float:
        raise UnsupportedError("the curriculum gain reads a causal language model")


def train_masked_policy(
    model: MaskedLanguageModel,
    data: Sequence[Any],
    settings: PolicySettings | None = None,
    *,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    steps_of_chain: int = 32,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Path:
    """Tune a masked diffusion language model by a method that samples, and write it to `out`, a folder that
    `steer.load` opens; `model` is not changed. All weights are tuned.

    Args:
        data: prompts, or rows with `prompt`; with `solution`, a right text, for the method "inpaint".
        settings: as for `train_policy`; `max_new_tokens` is the length of the canvas.
        reward: what is raised; a completion is right where it is above 0.
        steps_of_chain: steps that a sample is revealed in.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
    """
    tuning = policy_settings(settings, **{"lora_rank": 0, **given})
    final = Path(out)
    check_target(final)
    check(
        tuning.driver == "rows" and tuning.fresh, "method", tuning.method, "a policy gradient by rows, such as inpaint"
    )
    check(tuning.lora_rank == 0, "lora_rank", tuning.lora_rank, "0 for a masked language model")
    fits = tuning.schedule in SCHEDULES and tuning.with_ in ("none", "opponents") and tuning.credit == "tokens"
    check(
        fits, "schedule", tuning.schedule, f"one of {', '.join(SCHEDULES)}, without guides or turns, for a masked model"
    )
    scored = as_reward(reward)
    check(scored is not None, "reward", reward, f"one for {tuning.method}")
    assert scored is not None
    rows = _rows(model, data, tuning)
    recipe = {**tuning.recipe(), "reward": str(scored), "steps_of_chain": steps_of_chain}
    hashed = data_hash(list(data))
    run = {**recipe, "data": hashed, "model": model.name}
    claim(work, run)
    prompts, speaking = [prompt_of(row) for row in data], _Speaking(model)
    online = Online(prompts, with_rows(scored.bind(model), [model.show(p) for p in prompts], data))
    actor = MaskedActor(model, tuning, steps_of_chain)
    with replacing_folder(final) as folder:
        score = Scores(speaking, online)
        metrics = drive(actor, rows, tuning, score, folder, work, run, progress=progress)
        actor.policy.network.to(next(model.network.parameters()).dtype).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        card = Card(
            kind="policy",
            model={"name": model.name, "fingerprint": "masked"},
            settings={"form": "masked"},
            recipe=recipe,
            data={"sha256": hashed, "rows": len(data)},
            metrics=metrics,
        )
        (folder / CARD).write_text(json.dumps(asdict(card), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return final


def _rows(model: MaskedLanguageModel, data: Sequence[Any], tuning: PolicySettings) -> list[Row]:
    check(isinstance(data, Sequence) and not isinstance(data, str) and len(data) > 0, "data", data, "a list of rows")
    encoded = model.encode([prompt_of(row) for row in data], tuning.max_new_tokens)
    rows = []
    for i, (row, ids) in enumerate(zip(data, encoded, strict=True)):
        solution = None
        if "solution" in tuning.preset.beside:
            found = plain_row(row, f"data[{i}]")
            solution = found.get("solution") if isinstance(found, dict) else None
            there = isinstance(solution, str) and bool(solution.strip())
            check(there, f"data[{i}].solution", solution, "a right text, for inpaint")
        rows.append(Row(ids, [], solution))
    return rows
