"""A running batch of rows that belong to different requests: every row has its own settings, edits, seed and end.

`Batch.step` draws one token for every row, lets those that are done go, and reads the rest. Letters: `N` rows, `V`
vocabulary, `D` width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steer.adapters.language.texts import GrowingText, token_text
from steer.adapters.transformers.process import TokenModel
from steer.adapters.transformers.serving import rowwise
from steer.adapters.transformers.serving.slots import SlotRows, TrackRows
from steer.adapters.transformers.state import TextContext
from steer.adapters.transformers.tracking import AnyTrack, Track
from steer.core import Context, InputError, Process, Samples, SteerError, TransitionEdit, UnsupportedError
from steer.core.readings import Readings
from steer.sampling.laws import divergence
from steer.serving.engine import Ended, Sampling, TokenLogprob

__all__ = ["Batch", "BatchRow", "Trace"]


Taken = Callable[["BatchRow", str, tuple[TokenLogprob, ...]], None]


@dataclass(frozen=True)
class Trace:
    """One step of a row beside what the unsteered model would have done there."""

    token: int
    log_prob: float
    """Of the token, under the law that it was drawn from."""
    base_log_prob: float
    """Of the token, under the unsteered model's law after the same tokens."""
    kl: float
    """Exact KL in nats of the one law to the other."""
    after: tuple[tuple[int, str, float], ...]
    """Likeliest tokens of the law that was drawn from: id, text, log-probability."""
    before: tuple[tuple[int, str, float], ...]
    """Likeliest tokens of the unsteered model."""


class BatchRow:
    """One text in the making. `taken(row, text, logprobs)` is called with what can be shown, and once `ended`.

    A row with a `leader` takes whatever tokens its leader draws, and ends with it. The tokens of a `script` are taken
    before any is drawn. A `traced` row, at each step, compares its law with that of the row that follows it.
    """

    def __init__(
        self,
        model: TokenModel,
        sampling: Sampling,
        choice: int,
        seed: int,
        *,
        edits: tuple[TransitionEdit, ...] = (),
        measured: bool = False,
        leader: BatchRow | None = None,
        script: tuple[int, ...] = (),
        traced: int = 0,
        taken: Taken,
    ) -> None:
        self.sampling, self.choice, self.edits, self.measured = sampling, choice, edits, measured
        self.leader, self.script, self.traced = leader, script, traced
        self.trace: Trace | None = None
        """The last step's, where it is `traced`, with so many of the likeliest tokens."""
        self.generator = rowwise.generator(seed, choice)
        self.tokens: list[int] = []
        self.counts: Counter[int] = Counter()
        self.log_prob = self.kl = 0.0
        """Under the law that was drawn from, and that law's exact KL to the one before transition edits and truncation,
        where they are `measured`.
        """
        self.readings: Readings | None = None
        self.read: list[list[float]] = []
        """What was read where each token was chosen."""
        self.stopped = False
        """Whether a reading ended it."""
        self.reason: Literal["stop", "length"] | None = None
        """Why it ended."""
        self.error: SteerError | None = None
        self._model, self._taken = model, taken
        self._text = GrowingText(lambda ids: model.decode(ids), sampling.stop)
        self._eos = frozenset(model.eos_token_ids)

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def left(self) -> int:
        """Tokens that may follow the one that is drawn next."""
        return (self.sampling.max_tokens or 0) - 1 - len(self.tokens)

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None

    def take(self, token: int, logprob: TokenLogprob | None, read: list[float] | None = None) -> None:
        """Add a drawn token with what was read where it was chosen, and end where either ends the text."""
        self.tokens.append(token)
        self.counts[token] += 1
        if self.leader is not None:
            self.reason, self.error = self.leader.reason, self.leader.error
            self._taken(self, "", ())
            return
        over = token in self._eos
        text = "" if over else self._text.feed(token)
        if self.readings is not None and read is not None:
            self.read.append(read)
            self.stopped = bool(self.readings.met(read))
        if over or self._text.stopped or self.stopped:
            self.reason = "stop"
        elif len(self.tokens) >= (self.sampling.max_tokens or 0):
            self.reason = "length"
        if self.ended:
            text += self._text.finish()
            if self._text.stopped:
                self.reason = "stop"
        self._taken(self, text, () if over or logprob is None else (logprob,))

    def ending(self, reward: float | None, kl: float | None) -> Ended:
        """What is said of it once it has ended."""
        read = None
        if self.readings is not None:
            columns = zip(*self.read, strict=True)
            read = {name: list(values) for name, values in zip(self.readings.names, columns, strict=True)}
        return Ended(self.choice, self.reason or "stop", len(self.tokens), reward, kl, read, self.stopped)

    def fail(self, error: SteerError) -> None:
        """End without a text."""
        self.error = error
        self._taken(self, "", ())


@dataclass(frozen=True)
class _RowsContext:
    """What a transition edit sees of rows in a shared batch: the law and the hidden states, not each other."""

    step: int
    prefix: Tensor
    hidden: Tensor
    base: Tensor
    left: Tensor

    def lookahead(self, candidates: Tensor) -> Tensor:
        raise UnsupportedError("rows of a shared batch cannot look ahead")

    def companion(self, process: Process) -> Context:
        raise UnsupportedError("rows of a shared batch have no companions")

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        raise UnsupportedError("tokens have no gradient")


class Batch:
    """Rows that decode together. Of a `shared` batch rows join and leave between steps; others are read once."""

    def __init__(self, model: TokenModel, track: AnyTrack | None = None) -> None:
        self.model = model
        self.rows: list[BatchRow] = []
        self.shared = track is None
        self._view: SlotRows | TrackRows = SlotRows(model.body) if track is None else TrackRows(track)

    @property
    def nbytes(self) -> int:
        """Memory of the cache."""
        return self._view.nbytes

    @torch.inference_mode()
    def join(self, rows: Sequence[BatchRow], track: Track, owners: Sequence[int]) -> None:
        """Rows join; row i goes on from row `owners[i]` of the prompt pass in `track`."""
        assert isinstance(self._view, SlotRows)
        self._view.join(track, owners)
        self.rows += rows

    @torch.inference_mode()
    def drop(self, leaving: Callable[[BatchRow], bool]) -> None:
        """Let rows go that nobody waits for."""
        staying = [i for i, row in enumerate(self.rows) if not leaving(row)]
        if len(staying) < len(self.rows):
            self._keep(staying)

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row."""
        assert self._view.logits is not None
        settings = [row.sampling for row in self.rows]
        logits = self._view.logits
        raw = logits if logits.dtype == torch.float64 else logits.float()
        base = rowwise.tempered(rowwise.penalised(raw, settings, [row.counts for row in self.rows]), settings)
        law = rowwise.truncated(self._guided(base), settings)
        token = self._settled(rowwise.draw(law, settings, [row.generator for row in self.rows]))
        self._measure(base, law, token)
        self._trace(base, law, token)
        broken = law.amax(-1).isnan().tolist()
        shown = self._logprobs(raw, token)
        drawn, read = token.tolist(), self._view.readings
        for i in sorted(range(len(drawn)), key=lambda i: self.rows[i].leader is not None):  # leaders first
            if broken[i]:
                self.rows[i].fail(_overflow())
            else:
                self.rows[i].take(drawn[i], shown.get(i), read[i])
        order = self._keep([i for i, row in enumerate(self.rows) if not row.ended])
        if order:
            self._view.advance(token[torch.tensor(order, device=token.device)])

    def _keep(self, staying: Sequence[int]) -> list[int]:
        order = self._view.keep(staying)
        self.rows = [self.rows[i] for i in order]
        return order

    def _guided(self, base: Tensor) -> Tensor:
        """The law `[N, V]` after transition edits; rows without keep their bits, rows under the same go together."""
        together: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.edits:
                together.setdefault(tuple(map(id, row.edits)), []).append(i)
        law = base
        for rows in together.values():
            at = torch.tensor(rows, device=base.device)
            context = self._context(rows, base[at])
            changed = base[at]
            for edit in self.rows[rows[0]].edits:
                changed = edit.shift(changed, context)
            law = law.index_copy(0, at, torch.log_softmax(changed, -1))
        return law

    def _context(self, rows: Sequence[int], base: Tensor) -> Context:
        written = [self.rows[i].tokens for i in rows]
        width = max(len(tokens) for tokens in written)
        pad = self.model.body.pad_token_id
        prefix = torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens in written], dtype=torch.long)
        prefix = prefix.to(base.device)
        left = torch.tensor([self.rows[i].left for i in rows]).to(base.device)
        if isinstance(self._view, TrackRows):
            return TextContext(width, prefix, base, left, self._view.track, {}, torch.nn.LogSoftmax(-1))
        assert self._view.hidden is not None
        return _RowsContext(width, prefix, self._view.hidden[torch.tensor(list(rows), device=base.device)], base, left)

    def _settled(self, token: Tensor) -> Tensor:
        """The tokens `[N]`, with those of scripts and of leaders in place of what was drawn."""
        at = {id(row): i for i, row in enumerate(self.rows)}
        told = {i: row.script[len(row.tokens)] for i, row in enumerate(self.rows) if len(row.tokens) < len(row.script)}
        if told:
            token = token.clone()
            token[torch.tensor(list(told), device=token.device)] = torch.tensor(list(told.values())).to(token)
        order = [i if row.leader is None else at[id(row.leader)] for i, row in enumerate(self.rows)]
        return token[torch.tensor(order, device=token.device)]

    def _trace(self, base: Tensor, law: Tensor, token: Tensor) -> None:
        """Compare traced rows with those that follow them; a row without a follower, with its own unedited law."""
        rows = [i for i, row in enumerate(self.rows) if row.traced]
        if not rows:
            return
        follower = {id(row.leader): i for i, row in enumerate(self.rows) if row.leader is not None}
        beside = [follower.get(id(self.rows[i]), i) for i in rows]
        after = law[torch.tensor(rows, device=law.device)]
        before = base[torch.tensor(beside, device=base.device)]
        at = token[torch.tensor(rows, device=token.device)].unsqueeze(1)
        taken, usual = after.gather(1, at).squeeze(1).tolist(), before.gather(1, at).squeeze(1).tolist()
        gaps, count = divergence(after, before).tolist(), max(self.rows[i].traced for i in rows)
        now, then = rowwise.likeliest(after, count), rowwise.likeliest(before, count)
        for j, i in enumerate(rows):
            self.rows[i].trace = Trace(
                int(token[i]), taken[j], usual[j], gaps[j], self._named_all(now, j), self._named_all(then, j)
            )

    def _named_all(
        self, found: tuple[list[list[float]], list[list[int]]], row: int
    ) -> tuple[tuple[int, str, float], ...]:
        values, ids = found[0][row], found[1][row]
        pairs = [(t, v) for t, v in zip(ids, values, strict=True) if v > -torch.inf]
        return tuple((t, token_text(self.model.tokenizer, t)[0], v) for t, v in pairs)

    def _measure(self, base: Tensor, law: Tensor, token: Tensor) -> None:
        rows = [i for i, row in enumerate(self.rows) if row.measured]
        if not rows:
            return
        at = torch.tensor(rows, device=law.device)
        mine, before = law[at], base[at]
        taken = mine.gather(1, token[at].unsqueeze(1)).squeeze(1).tolist()
        gaps = divergence(mine, before).tolist()
        for i, log_prob, gap in zip(rows, taken, gaps, strict=True):
            self.rows[i].log_prob += log_prob
            self.rows[i].kl += gap

    def _logprobs(self, raw: Tensor, token: Tensor) -> dict[int, TokenLogprob]:
        """For rows that want them, the drawn token and its likeliest rivals."""
        rows = [i for i, row in enumerate(self.rows) if row.sampling.logprobs is not None]
        if not rows:
            return {}
        at = torch.tensor(rows, device=raw.device)
        law = torch.log_softmax(raw[at], -1)
        chosen = law.gather(1, token[at].unsqueeze(1)).squeeze(1).tolist()
        values, ids = rowwise.likeliest(law, max(self.rows[i].sampling.logprobs or 0 for i in rows))
        shown = {}
        for j, i in enumerate(rows):
            count = self.rows[i].sampling.logprobs or 0
            top = tuple(self._named(t, v) for v, t in zip(values[j][:count], ids[j][:count], strict=True))
            shown[i] = self._named(int(token[i]), chosen[j], top)
        return shown

    def _named(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text, raw = token_text(self.model.tokenizer, token)
        # JSON has no -infinity; OpenAI's answers have this number in its place.
        return TokenLogprob(text, max(logprob, -9999.0), raw, top)


def _overflow() -> InputError:
    return InputError("steer.edits", "edits under which the model's numbers overflow", "smaller strengths")
