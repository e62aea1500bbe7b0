"""Tuned diffusion policies: Diffusion-DPO, SePPO and policy gradients on networks of diffusers, whole or as LoRA
(PEFT).

A policy is a folder with a card, `steer.json`, that says which model it was tuned from and how. A whole network lies in
`unet/` (or `transformer/`), with scheduler and classifier beside it, so that `steer.load` takes the folder for a model;
a LoRA lies there in PEFT's layout. `DiffusionModel.tuned` takes either. The losses are in
`steer.train.diffusion_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.adapters.diffusers.loading import load
from steer.adapters.diffusers.model import DiffusionModel
from steer.adapters.diffusers.policy.data import read_data
from steer.adapters.diffusers.policy.folder import save_network, write_cards
from steer.adapters.diffusers.policy.lora import Lora
from steer.adapters.diffusers.policy.network import copied, fingerprint, network_of, tunable
from steer.adapters.diffusers.policy.own_samples import measure, own_pairs
from steer.artifacts import Card
from steer.core import Ability, Prompt, Reward, check
from steer.embedded import resolve
from steer.files import replacing_folder
from steer.ranks import ranks
from steer.rewards import as_reward
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings, Pair, Tunable
from steer.train.diffusion_policy.tuning import tune
from steer.train.policy_folder import check_target, claim, read_policy_card, thinned
from steer.train.settings import settle

__all__ = ["DiffusionPolicySettings", "load_diffusion_policy", "train_diffusion_policy"]


def train_diffusion_policy(
    model: DiffusionModel,
    data: Sequence[Any] | Path | str,
    settings: DiffusionPolicySettings | None = None,
    *,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    work: Path | str | None = None,
    progress: bool = False,
    **given: Any,
) -> Path:
    """Tune a diffusion model and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a network with its scheduler, from `steer.load`; a pipeline is refused.
        data: prompts for a reward; without one, rows `{"prompt", "chosen", "rejected"}` (dpo) or `{"prompt", "chosen"}`
            (seppo) whose images are tensors `[C, H, W]` in [0, 1] or paths of image files, or a folder with such rows
            in `pairs.jsonl`. With a reward, dpo and seppo make them of the base's own samples: for each prompt the best
            and the worst of `group_size`; a prompt that is there several times gives as many.
        settings: how, its `method` first of all; fields of `DiffusionPolicySettings` may also be `given` by name.
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what is raised; pg needs one. One that looks at a model looks at `model`.
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same weights.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        RewardError: scores that are not finite numbers, one for each sample.
        UnsupportedError: pg on a chain without noise; a pipeline.
        SteerError: PEFT is missing, or the loss is no longer finite.
    """
    shared = ranks()
    chosen = shared.whole(settle(DiffusionPolicySettings, settings, given, "train_diffusion_policy"))
    lora = Lora.of(chosen)
    final, state = Path(out), None if work is None else Path(work)
    check_target(final)
    scored = as_reward(reward)
    check(scored is not None or chosen.method != "pg", "reward", None, "one, for pg")
    base = tunable(model, chosen.chain)
    if chosen.method == "pg":
        base.chain.require(Ability.BRANCH, "train policy by pg")
    prompts, pairs, hashed, rows = read_data(base, data, chosen.method, scored is not None)
    if lora is not None:
        lora.names(network_of(model))
    mark = fingerprint(network_of(model))
    recipe = {**chosen.recipe(), **({} if scored is None else {"reward": str(scored)})}
    run = {**recipe, "data": hashed, "model": mark, "max_batch": chosen.max_batch}
    if shared.first:
        claim(state, run)
    shared.wait()
    measured = {} if scored is None or not chosen.measured else {"measured_on": _MEASURED_ON}
    job = _Job(model, base, chosen, lora, None if scored is None else scored.bind(model), state, run, progress)
    with replacing_folder(final) if shared.first else nullcontext(Path()) as own:
        temporary = Path(shared.told(str(own)))
        card = Card(
            kind="policy",
            model={"name": model.name, "fingerprint": mark, "model_type": type(network_of(model)).__name__},
            settings={"form": "lora" if lora else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": rows, **measured},
            metrics=job.tune(prompts, pairs, temporary),
        )
        if shared.first:
            write_cards(card, model, temporary, final.name)
    shared.wait()
    return final


_MEASURED_ON = "fresh samples of the same prompts"
"""What the reward before and after is that of: other noise than the policy learnt from."""


@dataclass(frozen=True)
class _Job:
    """A run that was checked."""

    model: DiffusionModel
    base: Tunable
    settings: DiffusionPolicySettings
    lora: Lora | None
    reward: Reward | None
    work: Path | None
    run: dict[str, Any]
    progress: bool

    def tune(self, prompts: list[Prompt], pairs: list[Pair], folder: Path) -> dict[str, Any]:
        """Write the tuned network to `folder`, and say what was seen."""
        settings, online = self.settings, self.settings.method == "pg"
        metrics = self._measured("before", self.base, prompts)
        if self.reward is not None and not online:
            pairs = own_pairs(self.base.chain, prompts, settings, self.reward, self.work, self.progress)
        policy = self._copy()
        history = tune(
            policy,
            self.base,
            settings,
            prompts=prompts,
            pairs=pairs,
            reward=self.reward if online else None,
            earlier=self._copy() if settings.method == "seppo" else None,
            work=self.work,
            run=self.run,
            progress=self.progress,
        )
        if ranks().first:
            save_network(policy.module, self.model, folder)
        ranks().wait()
        if self.reward is not None and settings.measured:
            metrics |= self._measured("after", tunable(self.model.tuned(folder), settings.chain), prompts)
        return {**metrics, **{name: thinned(values) for name, values in history.items()}}

    def _copy(self) -> Tunable:
        return tunable(copied(self.model, self.lora, self.settings.seed), self.settings.chain)

    def _measured(self, when: str, policy: Tunable, prompts: list[Prompt]) -> dict[str, Any]:
        if self.reward is None or not self.settings.measured:
            return {}
        return measure(when, policy.chain, prompts, self.reward, self.settings, self.progress)


def load_diffusion_policy(base: DiffusionModel | None, folder: Path | str) -> DiffusionModel:
    """The tuned policy as a model of its own, named `base+folder`; `base` is not changed.

    Args:
        base: the model that it was tuned from; None loads it by the name on the card.
        folder: what `train_diffusion_policy` wrote.

    Raises:
        InputError: not a policy, or one tuned from another model.
    """
    path = Path(folder)
    card = read_policy_card(path)
    if base is None:
        base = load(resolve(card.model["name"]), name=card.model["name"])
    check(isinstance(base, DiffusionModel), "policy", str(path), "a policy of a diffusion model")
    ours, theirs = fingerprint(network_of(base)), card.model["fingerprint"]
    given = f"{path} (tuned from {card.model.get('name')}, fingerprint {theirs})"
    check(ours == theirs, "policy", given, f"a policy tuned from {base.name} (fingerprint {ours})")
    return base.tuned(path, name=f"{base.name}+{path.name}")
