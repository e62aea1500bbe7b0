"""Critique: drafts are judged by a critic, and those that it rejects are revised or drawn again.

One loop stands behind a family of papers, which differ in its settings (`Critique.presets`): critique and refine
(Critique-RL, RefCritic, DeepCritic), generate and select (RefCritic's filtered vote, LLaVA-Critic-R1), a gate before an
action (GUI-Critic-R1), advantage feedback (ReAd), and the measurement of what feedback does not change (Feedback
Friction). What it does exactly, where rates or an enumeration are known, is in `steer.critique.laws`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steer.core import (
    Ability,
    InputError,
    Mounted,
    Process,
    Prompt,
    PromptEdit,
    RawText,
    Run,
    Sampler,
    Samples,
    Site,
    UnsupportedError,
    check,
    check_whole,
)
from steer.critique.conversation import Conversation
from steer.critique.critics import Critic, Verdicts, united
from steer.critique.drafts import Draft, Drafts
from steer.critique.reading import as_critic
from steer.critique.rounds import Round
from steer.sampling.rollouts import rollouts

__all__ = ["Critique"]

_CHOICES = {
    "ends": ("accept", "never"),
    "keep": ("last", "accepted", "best", "vote", "tournament"),
    "history": ("last", "all"),
    "feedback": ("text", "binary", "tried", "none"),
    "repeats": ("allow", "reject"),
}
_OTHERWISE = ("last", "best", "random", "abstain")
_AGAIN = 3
"""Times that a draft which repeats an earlier one is drawn again."""


@dataclass(frozen=True)
class Critique(Sampler):
    """Draw drafts, have a critic judge them, and revise or redraw what it rejects.

        round 0: `drafts` texts for each output
        rounds 1 to `rounds`: every draft that is not accepted is replaced by a new one, at temperature
        T + heat * round, at most 1.5: from the conversation with the draft and the critique (`revise`), or from the
        prompt itself (redraw)

    Redraws are the law of `steer.critique.redraw_law`: given acceptance, the tilt of the base by `log P(accept)`.
    Revisions answer another prompt, so they are no tilt of one law. `samples.pool` has every draft, with its
    predecessor in `lineage` (-1: none); `samples.trace` a `Round` each. More rounds with a critic that accepts wrong
    drafts do more harm (`steer.critique.gate_law`): bound them.

    Attributes:
        critic: a critic, or what makes one: "REWARD>=NUMBER", "module:function", "model:ID", a function of (prompt,
            output), or a list of several.
        n: outputs for each prompt.
        drafts: for each output.
        rounds: after the first drafts, at most.
        revise: the new draft sees the old one and its critique; otherwise it is drawn from the prompt.
        ends: "accept": an output is done with its first accepted draft, or for keep=best and keep=vote each draft for
            itself; "never": all rounds are run.
        keep: "last"; "accepted", the first accepted; "best", by the critic's score; "vote", the commonest `answer`
            among accepted drafts, among all if none is; "tournament", by a critic that compares two.
        history: "last" or "all" earlier attempts in a revision.
        feedback: "text"; "binary", not accepted; "tried", the text and earlier answers; "none", no reason.
        heat: added to the temperature in every round.
        repeats: "reject" draws a draft that repeats an earlier one of its output again, at most 3 times.
        votes: judgments of every draft, of which the majority decides.
        inner: a sampler of one output for each prompt, which draws the drafts; None draws plainly.
        template: the message that asks for a revision; {critique} is the feedback.
        otherwise: where nothing was accepted: "last", "best", "random", "abstain" (the empty text), or "text:..." for
            a text of its own; None is what `keep` gives among all drafts.
        answer: what `keep="vote"` counts, a function of the text; None is the text itself.
        right: with a reward, from which score on a draft counts as right in the trace.
    """

    critic: Any = None
    n: int = 1
    drafts: int = 1
    rounds: int = 2
    revise: bool = True
    ends: str = "accept"
    keep: str = "last"
    history: str = "last"
    feedback: str = "text"
    heat: float = 0.0
    repeats: str = "allow"
    votes: int = 1
    inner: Sampler | None = None
    template: str = "This answer was not accepted. {critique} Answer the request again, better."
    otherwise: str | None = None
    answer: Callable[[str], Any] | None = None
    right: float = 0.5

    title = "critique"
    population = "drafts"
    own_settings = frozenset({"critic", "inner", "answer", "votes"})
    presets = MappingProxyType(
        {
            "critique-rl": {"rounds": 1, "keep": "last"},
            "deepcritic": {"rounds": 1, "keep": "last"},
            "refcritic": {"drafts": 8, "rounds": 0, "keep": "vote"},
            "multicritique": {"rounds": 1, "keep": "best"},
            "llava-critic-r1": {"drafts": 8, "rounds": 0, "keep": "tournament"},
            "gui-critic-r1": {"rounds": 1, "revise": False, "repeats": "reject", "otherwise": "abstain"},
            "feedback-friction": {"rounds": 10, "history": "all"},
            "read": {"rounds": 3, "feedback": "tried", "repeats": "reject"},
        }
    )

    def __post_init__(self) -> None:
        check(
            self.critic is not None, "critic", None, "a critic: REWARD>=NUMBER, module:function, model:ID, a function"
        )
        object.__setattr__(self, "critic", as_critic(self.critic))
        for name, least in (("n", 1), ("drafts", 1), ("rounds", 0), ("votes", 1)):
            check_whole(name, getattr(self, name), least)
        for name, allowed in _CHOICES.items():
            check(getattr(self, name) in allowed, name, getattr(self, name), ", ".join(allowed))
        idle = self.rounds == 0 and self.drafts == 1 and self.otherwise in (None, "last", "best", "random")
        check(not idle, "rounds", 0, "1 or more, or drafts of 2 or more: one draft and no round changes nothing")
        check("{critique}" in self.template, "template", self.template, "a text with {critique}")
        heat = isinstance(self.heat, int | float) and 0 <= self.heat < math.inf
        check(heat, "heat", self.heat, "a number of 0 or more, added to the temperature in every round")
        says = self.otherwise
        known = says is None or says in _OTHERWISE or (isinstance(says, str) and says.startswith("text:"))
        check(known, "otherwise", says, f"{', '.join(_OTHERWISE)}, text:WORDS, or None")
        compares, tournament = self.critic.compares, self.keep == "tournament"
        check(not compares or tournament, "critic", self.critic.name, "with keep=tournament: it compares two drafts")
        check(
            compares or not tournament, "keep", self.keep, "with a critic that compares two (steer.critique.Pairwise)"
        )
        alone = self.rounds == 0 and self.drafts > 1
        check(not tournament or alone, "keep", self.keep, "rounds=0 and several drafts: nothing is accepted before")
        several = self.inner is not None and self.inner.rows > 1 and self.inner.population == "n"
        several = several and getattr(self.inner, "keeps_all", False)
        check(not several, "inner", self.inner, "a sampler of one output for each prompt")

    @property
    def rows(self) -> int:
        return self.n * self.drafts * (1 if self.inner is None else self.inner.rows)

    @property
    def passes(self) -> int:
        return 1 + self.rounds * (1 + _AGAIN if self.repeats == "reject" else 1)

    @property
    def kl_kind(self) -> str | None:  # type: ignore[override]
        revised = self.revise and self.rounds > 0
        return "none: revisions answer other prompts than the base" if revised else "bound"

    def bind(self, model: Any) -> Critique:
        bound = self.critic.bind(model)
        return self if bound is self.critic else replace(self, critic=bound)

    def updates(self, process: Process) -> int:
        return process.num_steps * (self.rounds + 1)

    @property
    def revises(self) -> bool:
        """Whether any draft answers a critique."""
        return self.revise and self.rounds > 0

    def check_process(self, process: Process) -> None:
        if self.inner is not None:
            self.inner.check_process(process)
        if self.revises and Site.PROMPT not in process.sites:
            raise UnsupportedError(
                f"critique revises by messages, which {type(process).__name__} does not read: use revise=False"
            )
        if self.drafts > 1 or (self.rounds and not self.revise and not self.heat):
            process.require(Ability.BRANCH, "drawing drafts again")
        if self.heat:
            process.heated(0.0)

    def draw(self, run: Run) -> Samples:
        if self.revises:
            for b, prompt in enumerate(run.prompts):
                raw = isinstance(prompt, RawText) or not isinstance(prompt, str | list | tuple)
                check(not raw, f"prompts[{b}]", prompt, "a chat or a text that becomes one: raw text has no turns")
        loop = _Loop(self, run)
        loop.first()
        for number in range(1, self.rounds + 1):
            left = loop.unfinished()
            if not left:
                break
            loop.again(left, number)
        return loop.chosen()


@dataclass
class _Loop:
    """One run."""

    how: Critique
    run: Run
    parts: list[Samples] = field(default_factory=list)
    trace: list[Round] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    process: Process = None  # type: ignore[assignment]
    drafts: Drafts = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        run, how = self.run, self.how
        self.process, self.prompts = run.process, list(run.prompts)
        self.drafts = Drafts(len(self.prompts), how.n * how.drafts, how.drafts)
        self.talk = Conversation(how.template, how.history, how.feedback)
        if self.how.revises:
            # A hint is written into the request once; a critique gets none, and revisions keep that of the request.
            self.prompts = run.process.rewritten(run.prompts)
            kept: Mounted = tuple((e, wanted) for e, wanted in run.process.edits if not isinstance(e, PromptEdit))
            self.process = run.process.copy(kept)
            self._try_revision()

    def _try_revision(self) -> None:
        """Refuse what cannot be revised before anything is drawn: models without a chat template."""
        encode = getattr(self.process, "encode", None)
        if encode is not None:
            encode([self.talk.messages(prompt, [(".", ".")]) for prompt in self.prompts])

    # ---- drawing

    def first(self) -> None:
        """The first drafts."""
        chains = list(self.drafts.chains)
        if self.how.inner is None:
            drawn = rollouts(self._run(self.process, self.prompts), self.drafts.per_prompt)
        else:
            drawn = self._drawn(chains, [self.prompts[self.drafts.prompt(c)] for c in chains], 0)
        self._enter(chains, drawn, 0, 0, 0)

    def again(self, chains: list[int], number: int) -> None:
        """New drafts for these chains."""
        asked: list[Prompt] = []
        fitting: list[int] = []
        for chain in chains:
            prompt = self._asked(chain)
            if self._fits(chain, prompt):
                fitting.append(chain)
                asked.append(prompt)
        if not fitting:
            self._note(self.drafts.counted(number, 0, {}, unparsed=0, repeated=0, skipped=len(chains)))
            return
        drawn = self._drawn(fitting, asked, number)
        repeated = self.drafts.repeats(fitting, drawn.outputs)
        for _ in range(_AGAIN if self.how.repeats == "reject" else 0):
            if not repeated:
                break
            new = self._drawn([fitting[i] for i in repeated], [asked[i] for i in repeated], number)
            drawn = _replaced(drawn, repeated, new)
            repeated = self.drafts.repeats(fitting, drawn.outputs)
        self._enter(fitting, drawn, number, len(repeated), len(chains) - len(fitting))

    def _run(self, process: Process, prompts: list[Prompt]) -> Run:
        return Run(process, prompts, self.run.generator, None, self.run.beta, self.run.on_step)

    def _drawn(self, chains: list[int], asked: list[Prompt], number: int) -> Samples:
        """A draft for each chain from its own prompt, in order."""
        process = self.process.renumbered([self.drafts.prompt(c) for c in chains])
        if self.how.heat and number:
            process = process.heated(self.how.heat * number)
        inner = self.how.inner
        if inner is None:
            return rollouts(self._run(process, asked), 1)
        given, beta = self.run.given, self.run.beta
        drawn = inner.run(process, asked, generator=self.run.generator, reward=given, beta=beta)
        one = sorted(drawn.group.tolist()) == list(range(len(asked)))
        check(one, "inner", inner, "a sampler of one output for each prompt")
        return replace(drawn.select(drawn.group.argsort()), pool=None)

    def _fits(self, chain: int, prompt: Prompt) -> bool:
        encode = getattr(self.process, "encode", None)
        if not self.how.revise or encode is None:
            return True
        try:
            encode([prompt])
        except InputError:  # the conversation has outgrown the model's context
            return False
        return True

    def _asked(self, chain: int) -> Prompt:
        """What the next draft of a chain answers."""
        prompt = self.prompts[self.drafts.prompt(chain)]
        return self.talk.asked(prompt, self.drafts.line(chain)) if self.how.revise else prompt

    # ---- judging

    def _enter(self, chains: list[int], drawn: Samples, number: int, repeated: int, skipped: int) -> None:
        """Judge drafts, and enter them."""
        group = torch.tensor([self.drafts.prompt(c) for c in chains])
        seen = replace(drawn, prompts=self.run.prompts, group=group, reward=None)
        gold = None if self.run.given is None else self.run.score(seen)
        verdicts = self._judged(seen)
        self.parts.append(replace(seen, reward=gold))
        before = {c: self.drafts.drawn[at].right for c, at in self.drafts.latest.items()}
        for i, chain in enumerate(chains):
            draft = Draft(
                chain,
                self.drafts.latest.get(chain, -1),
                number,
                drawn.outputs[i],
                bool(verdicts.accept[i]),
                float(verdicts.score[i]),
                verdicts.text[i],
                None if gold is None else bool(gold[i] >= self.how.right),
            )
            self.drafts.enter(draft)
        unparsed = 0 if verdicts.unparsed is None else int(verdicts.unparsed.sum())
        counts = {"unparsed": unparsed, "repeated": repeated, "skipped": skipped}
        self._note(self.drafts.counted(number, len(chains), before, **counts))

    def _judged(self, seen: Samples) -> Verdicts:
        critic: Critic = self.how.critic
        found = united([critic(seen) for _ in range(self.how.votes)])
        self.run.pay(replace(found.cost, seconds=0.0))
        return found

    def _note(self, found: Round) -> None:
        self.trace.append(found)
        self.run.note(found)

    def unfinished(self) -> list[int]:
        """Chains that get another draft."""
        return self.drafts.unfinished(self.how.ends, self.how.keep)

    # ---- choosing

    def chosen(self) -> Samples:
        """One draft for each output, with the pool of all."""
        pool = Samples.stack(self.parts)
        pool = replace(pool, lineage=torch.tensor([d.parent for d in self.drafts.drawn]))
        mine = self.drafts.by_output()
        finals = self._finals(mine) if self.how.keep == "tournament" else {}
        picked = [finals.get(o) if finals else self._pick(mine[o]) for o in sorted(mine)]
        index = torch.tensor([mine[o][-1] if at is None else at for o, at in zip(sorted(mine), picked, strict=True)])
        samples = replace(pool.select(index), pool=pool, lineage=index, trace=list(self.trace))
        samples = self._with_law(samples)
        empty = [i for i, at in enumerate(picked) if at is None]
        return self._said_otherwise(samples, empty) if empty else samples

    def _with_law(self, samples: Samples) -> Samples:
        """The samples with what is known of their law, beside which they lose what is known of the drafts'."""
        how, q, p = self.how, samples.log_prob, samples.base_log_prob
        known = q is not None and p is not None and not how.heat and how.inner is None and how.repeats == "allow"
        if how.revises or not known:
            return replace(samples, log_prob=None, base_log_prob=None, tilt=None, kl_estimate=None, token_drift=None)
        assert q is not None and p is not None
        most = how.drafts * (how.rounds + 1)
        # Ended by the first acceptance it is best-of-K with the verdict as reward; whatever else chooses among K
        # drafts multiplies no density by more than K.
        as_best = how.rounds == 0 and how.keep == "best"
        ended = how.ends == "accept" and how.keep in ("last", "accepted") and how.drafts == 1
        bound = math.log(most) - ((most - 1) / most if as_best or ended else 0.0)
        return replace(samples, kl_estimate=q - p + bound)

    def _pick(self, mine: list[int]) -> int | None:
        """The draft that an output becomes; None for what stands in its place."""
        accepted = [i for i in mine if self.drafts.drawn[i].accept]
        how, says = self.how.keep, self.how.otherwise
        if not accepted and says is not None:
            if says == "random":
                return mine[int(torch.randint(len(mine), (1,), generator=self.run.generator))]
            if says not in ("last", "best"):
                return None
            how = says
        if how == "accepted" and accepted:
            return accepted[0]
        if how == "best":
            return max(mine, key=lambda i: self.drafts.drawn[i].score)
        if how == "vote":
            answer = self.how.answer or (lambda text: text.strip())
            among = accepted or mine
            counts = Counter(answer(self.drafts.drawn[i].output) for i in among)
            most = max(counts.values())
            return next(i for i in among if counts[answer(self.drafts.drawn[i].output)] == most)
        last = max(self.drafts.drawn[i].round for i in mine)
        latest = [i for i in mine if self.drafts.drawn[i].round == last]
        return max(latest, key=lambda i: (self.drafts.drawn[i].accept, self.drafts.drawn[i].score))

    def _finals(self, mine: dict[int, list[int]]) -> dict[int, int]:
        """By output the winner of a knock-out among its drafts, all outputs at once."""
        left, critic = {o: list(drafts) for o, drafts in mine.items()}, self.how.critic
        while any(len(drafts) > 1 for drafts in left.values()):
            games = [(o, d[i], d[i + 1]) for o, d in left.items() for i in range(0, len(d) - 1, 2)]
            prompts = {o: self.run.prompts[self.drafts.prompt(o * self.how.drafts)] for o in left}
            firsts, cost = critic.better(
                [(prompts[o], self.drafts.drawn[a].output, self.drafts.drawn[b].output) for o, a, b in games]
            )
            self.run.pay(replace(cost, seconds=0.0))
            out = {b if first else a for (_, a, b), first in zip(games, firsts, strict=True)}
            left = {o: [i for i in d if i not in out] for o, d in left.items()}
        return {o: drafts[0] for o, drafts in left.items()}

    def _said_otherwise(self, samples: Samples, rows: list[int]) -> Samples:
        """The samples with what stands in the place of outputs of which no draft was accepted."""
        if isinstance(samples.outputs, Tensor):
            raise UnsupportedError("otherwise: abstaining is for texts; the process gives tensors")
        says = (self.how.otherwise or "").removeprefix("text:") if self.how.otherwise != "abstain" else ""
        outputs, lineage = list(samples.outputs), samples.lineage
        assert lineage is not None
        tokens = None if samples.tokens is None else list(samples.tokens)
        for i in rows:
            outputs[i] = says
            if tokens is not None:
                tokens[i] = []
        lineage = lineage.clone()
        lineage[rows] = -1
        shown = replace(samples, outputs=outputs, tokens=tokens, lineage=lineage, token_drift=None)
        shown = replace(shown, log_prob=None, base_log_prob=None, tilt=None, kl_estimate=None)
        if self.run.given is None:
            return shown
        scored = self.run.score(replace(shown, reward=None).select(torch.tensor(rows)))
        reward = samples.reward
        assert reward is not None
        reward = reward.clone()
        reward[rows] = scored
        return replace(shown, reward=reward)


def _replaced(samples: Samples, rows: list[int], new: Samples) -> Samples:
    """The samples with `new` in the place of some rows, and the costs of both."""
    both = Samples.stack([samples, replace(new, prompts=samples.prompts, group=samples.group[rows])])
    at = torch.arange(len(samples))
    at[rows] = len(samples) + torch.arange(len(rows))
    return both.select(at)
