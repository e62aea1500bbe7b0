"""A run of the driver of rows on a language model: data in, weights and a report out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.policy.actor import TextActor, log_probs
from steer.adapters.transformers.policy.data import stored
from steer.adapters.transformers.policy.folder import averaged_network, save_network
from steer.adapters.transformers.policy.trl import Online, Speaking, scores, told_left_out
from steer.core import Reward
from steer.pictures.rounds import draw_rounds
from steer.progress import ticking
from steer.rewards.algebra import Combination
from steer.train.objectives.collecting import Row, Scorer
from steer.train.objectives.driver import Actor, Driver, Fit
from steer.train.objectives.measures import read_ranking
from steer.train.objectives.settings import PolicySettings
from steer.train.policy_folder import thinned

__all__ = ["Scores", "drive", "fit_rows", "rank_pairs"]


@dataclass(frozen=True)
class Scores:
    """Rewards of tokens, as the driver asks for them."""

    model: Speaking
    online: Online

    def __call__(self, prompts: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[float]:
        return self._by(self.online.reward, prompts, tokens)

    def objectives(self, prompts: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return [self._by(term, prompts, tokens) for term in terms_of(self.online.reward)]

    def _by(self, reward: Reward, prompts: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[float]:
        mine = list(dict.fromkeys(prompts))
        place = {b: k for k, b in enumerate(mine)}
        online = Online(self.online.prompts, reward)
        return [float(x) for x in scores(self.model, online, mine, [place[b] for b in prompts], tokens)]


def terms_of(reward: Reward) -> list[Reward]:
    """The terms of a sum of rewards, each with its sign and factor."""
    if isinstance(reward, Combination) and reward.symbol in "+-":
        right = reward.right if reward.symbol == "+" else -reward.right
        return [*terms_of(reward.left), *terms_of(right)]
    return [reward]


def fit_rows(
    model: LanguageModel,
    rows: list[dict[str, Any]],
    tuning: PolicySettings,
    online: Online | None,
    folder: Path,
    work: Path | None,
    run: dict[str, Any],
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the tuned network to `folder`, with `report.json` and `report.png` beside it; returns what was seen."""
    base = None if tuning.soup is None else averaged_network(model, Path(tuning.soup), tuning.soup_share)
    actor = TextActor(model, tuning, [] if online is None else online.prompts, base)
    left_out = told_left_out(actor.network, tuning)
    score = None if online is None else Scores(model, online)
    data = [stored(row) for row in rows]
    seen = drive(actor, data, tuning, score, folder, work, run, progress=progress)
    save_network(actor.network, model, folder)
    return {**seen, **({"left_out": left_out} if left_out else {})}


def drive(
    actor: Actor,
    rows: Sequence[Row],
    tuning: PolicySettings,
    score: Scorer | None,
    folder: Path,
    work: Path | None,
    run: dict[str, Any],
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Train an actor by rounds, with a bar and a report in `folder`; returns what the card says."""
    with ticking(progress, f"tuning by {tuning.method}", _updates(tuning, rows, score is not None)) as tick:
        seen = Driver(actor, rows, tuning, score, work=work, run=run, tell=tick).run()
    write_report(folder, seen.rounds, seen.loss)
    return _metrics(seen)


def rank_pairs(model: LanguageModel, network: Any, rows: Sequence[dict[str, Any]], beta: float) -> dict[str, float]:
    """Ranking accuracy of base and policy, and what a perfect DPO could reach, on the first 64 pairs of the data."""
    pairs = [(row["prompt_ids"], row[name]) for row in rows[:64] for name in ("chosen_ids", "rejected_ids")]
    base, policy = ([sum(x) for x in log_probs(model, n.eval(), pairs)] for n in (model.network, network))
    halves = range(0, len(pairs), 2)
    lengths = [[len(tokens) for _, tokens in pairs[i : i + 2]] for i in halves]
    two = [[x[i : i + 2] for i in halves] for x in (base, policy)]
    found = read_ranking(two[0], two[1], lengths, beta, [1.0] * len(halves))
    return {f"ranking_{name}": round(value, 5) for name, value in asdict(found).items()}


def _updates(tuning: PolicySettings, rows: Sequence[Any], scored: bool) -> int:
    """Updates of the run, about: rounds may leave rows out."""
    steps = tuning.total_steps(len(rows))
    if tuning.fresh and scored:
        return steps * tuning.updates
    return steps * (tuning.rounds if scored or tuning.with_ == "gold" else 1)


def _metrics(seen: Fit) -> dict[str, Any]:
    """What the card says: the loss, and each figure of the rounds."""
    names = list(dict.fromkeys(name for row in seen.rounds for name in row if name != "round"))
    figures = {name: thinned([row[name] for row in seen.rounds if name in row]) for name in names}
    return {"loss": thinned(seen.loss), **figures}


def write_report(folder: Path, rounds: list[dict[str, float]], loss: list[float]) -> None:
    """`report.json` and `report.png`: every figure of every round."""
    text = json.dumps({"rounds": rounds, "loss": loss}, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    draw_rounds(rounds, folder / "report.png")
