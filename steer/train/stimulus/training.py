"""Training of a stimulus from end to end: rows, hints out of references, the probe, the rounds and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from steer.artifacts import Card, data_hash
from steer.core import Reward, SteerError, check
from steer.edits import Artifact
from steer.files import replacing_folder
from steer.methods.extract import FEATURES, stop_list_hash
from steer.progress import note, ticking
from steer.rewards import as_reward
from steer.rewards.algebra import check_reward
from steer.rewards.verifiable import with_rows
from steer.train.policy_folder import claim
from steer.train.settings import settle
from steer.train.stimulus.box import Bench, BlackBox
from steer.train.stimulus.extracting import ExtractPolicy, Policy, overlap
from steer.train.stimulus.learning import Rounds
from steer.train.stimulus.measuring import Heeded, compared, heeded, random_hints
from steer.train.stimulus.rows import Row, Split, read_rows, split
from steer.train.stimulus.settings import StimulusSettings

__all__ = ["Job", "check_stimulus", "train_stimulus"]


@dataclass(frozen=True)
class Job:
    """A checked request: nothing has been loaded yet."""

    settings: StimulusSettings
    parts: Split
    reward: Reward | None
    sha: str

    @property
    def learns(self) -> bool:
        """Whether there are rounds."""
        return self.settings.stage != "sft"

    @property
    def judged(self) -> list[Row]:
        """The held-out rows of the table at the end."""
        return self.parts.held[: self.settings.evaluate]

    @property
    def probed(self) -> list[Row]:
        """Rows on which it is measured whether the black box heeds a hint."""
        return sorted(self.parts.learnt, key=lambda row: not row.hint)[: self.settings.probe]

    @property
    def kinds(self) -> int:
        """Texts that each judged input costs: without a hint, random, before the rounds, after them, the reference's,
        and the best of several.
        """
        known = any(row.hint for row in self.judged)
        return (3 + known + (1 if self.learns else 0) + self.settings.best) * self.settings.drawn

    @property
    def reserved(self) -> int:
        """Texts of the table at the end."""
        return len(self.judged) * self.kinds


def check_stimulus(
    data: Sequence[Any],
    reward: Reward | str | Callable[..., Any] | None,
    settings: StimulusSettings,
    test: Sequence[Any] | None = None,
) -> Job:
    """Everything that can be checked without a model. Raises `InputError`."""
    rows = read_rows(data, settings)
    others = None if test is None else read_rows(test, settings, "test")
    scored = as_reward(reward)
    check(scored is not None or settings.stage == "sft", "reward", None, "one, or stage sft, which needs none")
    if settings.stage != "rl":
        known = any(row.hint for row in rows)
        columns = f"rows with {settings.reference} or {settings.hint}, or stage rl"
        check(known, "stage", settings.stage, columns)
    if scored is not None:
        check_reward(scored, images=False)
        scored = _knowing(scored, [*rows, *(others or [])])
    job = Job(
        settings, split(rows, others, settings), scored, data_hash([row.columns for row in [*rows, *(others or [])]])
    )
    least = 3 * len(job.probed) * settings.drawn + job.reserved
    least += settings.inputs * settings.hints * settings.drawn if job.learns else 0
    allowed = f"{least} or more: the probe, {'a round ' if job.learns else ''}and the table at the end take as many"
    check(settings.calls >= least, "calls", settings.calls, f"{allowed} (evaluate=, probe= make them shorter)")
    return job


def _knowing(reward: Reward, rows: list[Row]) -> Reward:
    """The reward with what the rows say; of doubles the first says it."""
    first: dict[str, Any] = {}
    for row in rows:
        first.setdefault(row.input, row.columns)
    return with_rows(reward, [row.input for row in rows], [first[row.input] for row in rows])


def train_stimulus(
    model: Any,
    data: Sequence[Any],
    reward: Reward | str | Callable[..., Any] | None = None,
    settings: StimulusSettings | None = None,
    *,
    test: Sequence[Any] | None = None,
    network: Policy | None = None,
    out: Path | str | None = None,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Artifact | Path:
    """A policy of hints for a black box; as an edit it puts a hint into every prompt, on every engine.

    Args:
        model: the black box: anything that `steer.load` returns and that writes text, an endpoint too; never changed.
        data: rows `{"input", "reference"?, "hint"?, "id"?}`; hints are phrases with "; " between them. Rows with the id
            or the input of an earlier one are left out.
        reward: of the black box's texts; `rouge` compares them with each row's reference. Its prompt is the input.
        settings: how; fields of `StimulusSettings` may also be `given` by name.
        test: further rows, on which the table is made; default: a share of `data`, by id.
        network: of `policy="lm"` and `"seq2seq"`, as `steer.adapters.transformers.policy.hints.open_policy` makes it.
        out: folder for a policy that is a network.
        work: folder for texts and checkpoints; a run that stopped goes on from there to the same result.

    Returns the artifact, or for a network the folder.

    Raises:
        InputError: a bad setting or row; nothing has been asked of the black box.
        SteerError: the black box does not heed the hint (unless `force`), fails too often, or has the same reward
            whatever the hint.
    """
    chosen = settle(StimulusSettings, settings, given, "train_stimulus")
    job = check_stimulus(data, reward, chosen, test)
    extracts = chosen.policy == "extract"
    check(extracts == (network is None), "policy", chosen.policy, "extract, or lm and seq2seq with a network")
    check(extracts == (out is None), "out", None if out is None else str(out), "a folder for a network, else unset")
    scored = None if job.reward is None else job.reward.bind(model)
    run = {**chosen.recipe(), "reward": None if scored is None else str(scored), "data": job.sha, "model": model.name}
    claim(work, run)
    bench = _bench(model, scored, chosen, work)
    control = ExtractPolicy.of([row.input for row in job.parts.learnt], chosen)
    trained: Any = control if extracts else network
    teacher = _Trained(job, bench, control, trained, work, run, progress)
    metrics = teacher()
    tensors, settings_ = teacher.result()
    card = Card(
        kind="stimulus",
        model={"name": model.name},
        settings=settings_,
        recipe={**run, "stop_list": stop_list_hash(), "features": list(FEATURES)} if extracts else run,
        data={
            "sha256": job.sha,
            "rows": len(job.parts.learnt),
            "held_out": len(job.parts.held),
            "doubles": job.parts.doubles,
        },
        metrics=metrics,
    )
    if extracts:
        return Artifact(tensors, card)
    with replacing_folder(Path(str(out))) as temporary:
        trained.save(temporary)
        text = json.dumps(asdict(card), indent=1, allow_nan=False)
        (temporary / "steer.json").write_text(f"{text}\n", encoding="utf-8")
    return Path(str(out))


def _bench(model: Any, reward: Reward | None, settings: StimulusSettings, work: Path | None) -> Bench:
    decoding = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    path = None if work is None else work / "texts.jsonl"
    box = BlackBox(model, decoding, settings.seed, settings.calls, path)
    return Bench(box, settings.slots, reward, settings.drawn, settings.whole_sentences)


@dataclass
class _Trained:
    """One training."""

    job: Job
    bench: Bench
    control: ExtractPolicy
    policy: Any
    work: Path | None
    run: dict[str, Any]
    progress: bool

    def __call__(self) -> dict[str, Any]:
        """Train; figures for the card."""
        job, settings = self.job, self.job.settings
        metrics: dict[str, Any] = {}
        if self.policy is not self.control:
            self.policy.prepare(settings)
        if settings.stage != "rl":
            metrics["sft"] = self._fitted()
        self.policy.begin()
        found = self._probed()
        if found is not None:
            metrics["heeded"] = found.rounded()
        kinds = self._before()
        if job.learns:
            metrics |= self._rounds()
            kinds["after the rounds"] = [[hint] for hint in self.policy([row.input for row in job.judged])]
        if job.judged:
            note(self.progress, "the table: asking the black box")
            metrics["table"] = [line.rounded() for line in compared(self.bench, job.judged, kinds)]
            metrics["judged"] = len(job.judged)
        box = self.bench.box
        without = sum(not hint for hint in self.policy([row.input for row in job.parts.learnt]))
        return {**metrics, "calls": len(box.asked), "tokens": box.tokens, "inputs_without_hint": without}

    def _fitted(self) -> dict[str, Any]:
        job = self.job
        work = None if self.work is None else self.work / "sft"
        more = {} if self.policy is self.control else {"work": work, "run": self.run, "progress": self.progress}
        figures: dict[str, Any] = self.policy.fit(job.parts.learnt, job.settings, **more)
        held = [row for row in job.parts.held if row.hint]
        if held:
            figures["word_f1"] = round(overlap(self.policy([row.input for row in held]), held), 4)
            if self.policy is self.control:
                figures |= self.policy.judged(held)
        return figures

    def _probed(self) -> Heeded | None:
        """Raises `SteerError` where the black box does not heed hints and that is not wanted nevertheless."""
        job, rows = self.job, self.job.probed
        if not rows:
            return None
        written = self.policy([row.input for row in rows])
        hints = ["; ".join(row.hint) or own for row, own in zip(rows, written, strict=True)]
        kept = [(row, hint) for row, hint in zip(rows, hints, strict=True) if hint]
        if not kept:
            raise SteerError("the policy has no hint for any input: they hold no word but stop words")
        note(self.progress, "measuring whether the black box heeds a hint")
        some, used = [row for row, _ in kept], [hint for _, hint in kept]
        found = heeded(self.bench, some, used, self.control, job.settings.seed)
        note(self.progress, found.text)
        if not found.known and not job.settings.force:
            raise SteerError(f"{found.text}; another template may help, and force (--force) trains nevertheless")
        return found

    def _before(self) -> dict[str, list[list[str | None]]]:
        """Hints of the table that do not depend on the rounds."""
        job, rows = self.job, self.job.judged
        inputs, seed = [row.input for row in rows], self.job.settings.seed
        name = "equal scores" if job.settings.stage == "rl" else "SFT"
        name = "untrained" if name != "SFT" and self.policy is not self.control else name
        kinds: dict[str, list[list[str | None]]] = {
            "none": [[None] for _ in rows],
            "random": [[hint] for hint in random_hints(self.control, rows, seed + 1)],
            name: [[hint] for hint in self.policy(inputs)],
        }
        if any(row.hint for row in rows):
            kinds["the reference's"] = [["; ".join(row.hint)] for row in rows]
        if self.bench.reward is not None and job.settings.best > 0:
            drawn = self.policy.draw(inputs, job.settings.best, torch.Generator().manual_seed(seed + 2))
            kinds[f"best of {job.settings.best}"] = [[one.hint for one in mine] for mine in drawn]
        return kinds

    def _rounds(self) -> dict[str, Any]:
        job = self.job
        rounds = Rounds(self.policy, job.parts.learnt, self.bench, job.settings, self.job.reserved, self.work, self.run)
        with ticking(self.progress, "rounds", job.settings.rounds) as tick:
            history = rounds(tick)
        note(bool(rounds.stopped) and self.progress, f"the rounds ended {rounds.stopped}")
        made = {"rounds": [{k: round(v, 6) for k, v in one.items()} for one in history]}
        return {**made, "stopped": rounds.stopped} if rounds.stopped else made

    def result(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors of the artifact, and the settings of its card."""
        settings, slots = self.job.settings, self.job.settings.slots
        made = {
            "policy": settings.policy,
            "template": slots.text,
            "shown": slots.words,
            "raw": slots.raw,
            "most": settings.most,
            "words": settings.words,
        }
        if self.policy is self.control:
            frozen = self.control.frozen
            tensors = {name: getattr(frozen, name).float() for name in ("weights", "mean", "std", "idf")}
            return tensors, made
        return {}, {**made, **self.policy.facts()}
