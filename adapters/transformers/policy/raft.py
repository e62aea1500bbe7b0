"""Own samples for policy training: RAFT, and pairs ranked by a reward."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.policy.data import PolicySettings
from steer.adapters.transformers.policy.folder import open_network, save_network
from steer.adapters.transformers.policy.trl import Online, fit, scores
from steer.core import check
from steer.files import replacing_folder
from steer.progress import ticking
from steer.train.policy_folder import thinned

# ------------------------------------------------------------------------------------------------------------- RAFT


def run_raft(
    model: LanguageModel,
    rows: list[dict[str, Any]],
    online: Online,
    tuning: PolicySettings,
    out: Path,
    work: Path,
    progress: bool,
) -> dict[str, Any]:
    """Rounds of samples and SFT on the best; each round's are kept in `work`, and the last round's weights in `out`."""
    start: Path | None = None
    history: dict[str, Any] = {"loss": [], "reward": [], "reward_best": []}
    for number in range(tuning.rounds):
        folder = work / f"round-{number:03d}"
        done = folder / "policy"
        drawn = _draws(model, start, online, tuning, number, folder, progress)
        best = _best(drawn, rows, tuning, online)
        history["reward"].append(round(sum(drawn["reward"]) / len(drawn["reward"]), 5))
        history["reward_best"].append(round(sum(row["reward"] for row in best) / len(best), 5))
        if not done.is_dir():
            with ticking(progress, f"tuning, round {number + 1}", tuning.total_steps(len(best))) as tick:
                fitted = fit(model, best, tuning, start=start, work=folder / "checkpoints", tick=tick)
            with replacing_folder(done) as temporary:
                save_network(fitted.network, model, temporary)
                (temporary / "history.json").write_text(json.dumps(fitted.loss), encoding="utf-8")
        history["loss"] += json.loads((done / "history.json").read_text(encoding="utf-8"))
        start = done
    assert start is not None
    shutil.copytree(start, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("history.json"))
    return {**history, "loss": thinned(history["loss"])}


def _draws(
    model: LanguageModel,
    start: Path | None,
    online: Online,
    tuning: PolicySettings,
    number: int,
    folder: Path,
    progress: bool,
) -> dict[str, list[Any]]:
    """A round's samples, `group_size` for each prompt: their `group` (number of the prompt), `tokens`, `reward`."""
    path = folder / "samples.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    policy = model if start is None else open_network(model, start)
    samples = policy.generate(
        list(online.prompts),
        n=tuning.group_size,
        temperature=tuning.temperature,
        max_new_tokens=tuning.max_new_tokens,
        seed=tuning.seed * 100_003 + number,
        progress=progress,
    )
    group, tokens = samples.group.tolist(), samples.tokens or []
    reward = scores(model, online, range(len(online.prompts)), group, tokens).tolist()
    drawn = {"group": group, "tokens": tokens, "reward": reward}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(drawn), encoding="utf-8")
    os.replace(temporary, path)
    return drawn


def own_pairs(
    model: LanguageModel, online: Online, tuning: PolicySettings, work: Path | None, progress: bool
) -> list[dict[str, Any]]:
    """The best and the worst of the model's own samples for each prompt, where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        drawn = _draws(model, None, online, tuning, 0, (work or Path(scratch)) / "pairs", progress)
    pairs = []
    for b, prompt in enumerate(online.prompts):
        mine = [i for i, owner in enumerate(drawn["group"]) if owner == b]
        high, low = (pick(mine, key=lambda i: drawn["reward"][i]) for pick in (max, min))
        texts = [model.decode(drawn["tokens"][i]) for i in (high, low)]
        if drawn["reward"][high] > drawn["reward"][low] and all(text.strip() for text in texts):
            pairs.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    check(bool(pairs), "reward", str(online.reward), "a reward that is not the same on all samples of a prompt")
    return pairs


def _best(
    drawn: dict[str, list[Any]], rows: list[dict[str, Any]], tuning: PolicySettings, online: Online
) -> list[dict[str, Any]]:
    """Each prompt's best sample as a row to imitate. Prompts all of whose samples score the same teach nothing."""
    found = []
    for b, row in enumerate(rows):
        mine = [i for i, owner in enumerate(drawn["group"]) if owner == b]
        high = max(mine, key=lambda i: drawn["reward"][i])
        if drawn["reward"][high] > min(drawn["reward"][i] for i in mine):
            found.append({**row, "completion_ids": drawn["tokens"][high], "reward": drawn["reward"][high]})
    check(bool(found), "reward", str(online.reward), "a reward that is not the same on all samples of a prompt")
    return found


def mean_reward(
    policy: LanguageModel, base: LanguageModel, online: Online, tuning: PolicySettings, progress: bool = False
) -> float:
    """Mean reward of samples for the first 64 prompts, with one seed for all policies."""
    prompts = list(online.prompts[:64])
    drawn = policy.generate(
        prompts,
        n=max(1, min(tuning.group_size, 64 // len(prompts))),
        temperature=tuning.temperature,
        max_new_tokens=tuning.max_new_tokens,
        seed=tuning.seed * 100_003 + 99_991,
        progress=progress,
    )
    return round(float(scores(base, online, range(len(prompts)), drawn.group.tolist(), drawn.tokens or []).mean()), 5)
