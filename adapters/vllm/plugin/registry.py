"""The front end's side: names of registered artifacts, and what the engine is told about a request.

A client names artifacts; the engine is given digests, settings and absolute positions. So bad input is refused before
anything is queued, the scheduler can tell steered blocks of the cache apart, and a name that is registered again with
other content changes nothing for requests on their way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

from steer.adapters.vllm.artifacts import PackedArtifact
from steer.adapters.vllm.plugin.compiled import Compiled, stages_of
from steer.adapters.vllm.plugin.requests import Inside, Resolved, ResolvedEdit, turns_of
from steer.adapters.vllm.settings import Settings, need
from steer.core import Edit, HiddenEdit, InputError, ModelInfo, Site, TransitionEdit, UnsupportedError, check
from steer.methods.value import ValueGuidance
from steer.serving.wire import NAME, EditRequest, SteerRequest

__all__ = ["Registry"]


_LARGEST = 1e6
"""Weight of a tuned model, either way; beyond it sums of logits could overflow."""
_SEARCH = ("sampler", "candidates", "reward", "budget")


@dataclass(frozen=True, eq=False)
class ReadyEdit:
    """A registered artifact under settings, checked."""

    key: str
    digest: str
    options: dict[str, Any]
    edit: Edit
    compiled: Compiled | None


@dataclass(frozen=True)
class _Towards(Edit):
    """Guidance towards a tuned model that the engine runs beside its own, by its number there."""

    site = Site.TRANSITION
    number: int
    weight: float


@dataclass(eq=False)
class Registry:
    """Artifacts by name and by digest, in order of last use."""

    settings: Settings
    info: ModelInfo
    names: dict[str, str] = field(default_factory=dict)
    artifacts: OrderedDict[str, PackedArtifact] = field(default_factory=OrderedDict)
    taught: dict[str, None] = field(default_factory=dict)
    """Digests of readings that the workers were sent."""
    measured: bool = False
    """Whether the residual stream's norms are known."""
    mark: str = field(default_factory=lambda: uuid4().hex)
    """Whose artifacts these are, where several processes serve the same engines."""

    def __post_init__(self) -> None:
        self._mounted = lru_cache(4096)(self._mount)
        self._tuned = {name: number for number, (name, _) in enumerate(self.settings.tuned)}

    # ---- artifacts

    def admit(self, name: str, data: bytes, any_model: bool, used: Iterable[str]) -> tuple[PackedArtifact, list[str]]:
        """The artifact, checked, and the digests that must go to make room. `used` are those that requests need.

        Raises `InputError`: a bad name or artifact, one of another model, or no room.
        """
        check(
            isinstance(name, str) and NAME.fullmatch(name) is not None,
            "name",
            name,
            "letters, digits, dot, dash and underscore, at most 128 of them",
        )
        check(name not in self._tuned, "name", name, "a name that additional_config steer.tuned does not have")
        artifact = PackedArtifact.parse(data)
        artifact = artifact.for_any_model() if any_model else artifact
        made = artifact.edit(self.info, {})
        if isinstance(made, HiddenEdit):
            made.terms(self.info)
            need(self.settings, reads=made.reads)
        elif isinstance(made, ValueGuidance):
            if self.settings.speculative:
                raise UnsupportedError("value heads do not go with speculative decoding in vLLM")
            check(
                self.settings.parallel[0] == 1,
                "value head",
                f"{self.settings.parallel[0]} tensor parallel ranks",
                "tensor_parallel_size 1: it needs the whole output embedding",
            )
        return artifact, self._crowded_out(artifact, set(used))

    def _crowded_out(self, new: PackedArtifact, used: set[str]) -> list[str]:
        held = list(self.artifacts.items())  # another thread may be noting their use
        kept = {digest: a.size for digest, a in held if digest != new.digest}
        number, size = self.settings.artifacts, self.settings.artifact_bytes

        def fits() -> bool:
            return len(kept) < number and sum(kept.values()) + new.size <= size

        gone = []
        for digest, _ in held:
            if fits():
                break
            if digest in kept and digest not in used:
                gone.append(digest)
                del kept[digest]
        check(
            fits(),
            "artifact",
            f"{new.size} bytes, with {len(kept)} artifacts in use",
            f"at most {number} artifacts and {size} bytes in all",
        )
        return gone

    def add(self, name: str, artifact: PackedArtifact, gone: Iterable[str]) -> None:
        """Enter an artifact that the workers hold under its name, and strike out those that they dropped."""
        for digest in gone:
            self.artifacts.pop(digest, None)
            self.names = {n: d for n, d in self.names.items() if d != digest}
        self.names[name] = artifact.digest
        self.artifacts[artifact.digest] = artifact
        self.artifacts.move_to_end(artifact.digest)

    def remove(self, name: str, used: Iterable[str]) -> list[str]:
        """Forget a name; returns the digests that nobody needs any more. Raises `InputError`."""
        digest = self._digest(name)
        del self.names[name]
        unneeded = digest not in self.names.values() and digest not in set(used)
        if unneeded:
            self.artifacts.pop(digest, None)
        return [digest] if unneeded else []

    def _digest(self, name: str) -> str:
        known = ", ".join([*self._tuned, *sorted(self.names)][:20]) or "none is registered"
        check(name in self.names, "steer.edits.name", name, f"registered artifacts: {known}")
        return self.names[name]

    # ---- requests

    def parse(self, given: Any) -> Inside:
        """What a client asked for, checked as far as it can be without the prompt. Raises `InputError`."""
        if isinstance(given, Inside):
            asked = given
        else:
            request = SteerRequest.parse(given)
            for name in _SEARCH:
                check(
                    getattr(request, name) is None,
                    f"steer.{name}",
                    getattr(request, name),
                    "unset: the engine draws token by token; search runs in front of it",
                )
            allowed = "truncated: without a sampler nothing is weighed"
            check(request.base == "truncated", "steer.base", request.base, allowed)
            for name in ("readings", "stop_if"):
                given = getattr(request, name)
                allowed = "unset here: answers of vLLM's own have no place for them; a steer field's have"
                check(not given, f"steer.{name}", given, allowed)
            check(not request.settings, "steer.settings", request.settings, "unset: there is no sampler to set")
            for i, edit in enumerate(request.edits):
                allowed = 'a name: vectors of a request\'s own go in its field "steer", not in vllm_xargs'
                check(edit.vector is None, f"steer.edits.{i}.vector", "a vector", allowed)
            asked = Inside(tuple(request.edits), request.beta)
        need(self.settings, stages=stages_of([m.compiled for m in self._of(asked) if m.compiled is not None]))
        return asked

    def hidden(self, asked: Inside) -> list[HiddenEdit]:
        """The edits of hidden states that a request asks for."""
        return [m.edit for m in self._of(asked) if isinstance(m.edit, HiddenEdit)]

    def _of(self, asked: Inside) -> list[ReadyEdit]:
        return [
            self._towards(edit)
            if edit.name in self._tuned
            else self._mounted(self._digest(edit.name), json.dumps(_options(edit), sort_keys=True))
            for edit in asked.edits
        ]

    def _towards(self, edit: EditRequest) -> ReadyEdit:
        for name, given in edit.options().items():
            raise InputError(f"steer.edits.{name}", given, f"unset: {edit.name} is a tuned model, with a strength only")
        weight = 1.0 if edit.strength is None else edit.strength
        check(abs(weight) <= _LARGEST, "steer.edits.strength", weight, f"at most {_LARGEST:g} (1 is the tuned model)")
        return ReadyEdit("", "", {}, _Towards(self._tuned[edit.name], weight), None)

    def _mount(self, digest: str, options: str) -> ReadyEdit:
        artifact = self.artifacts[digest]
        edit = artifact.edit(self.info, json.loads(options))
        key = hashlib.sha256(f"{digest} {options}".encode()).hexdigest()[:32]
        if isinstance(edit, TransitionEdit):
            return ReadyEdit(key, digest, json.loads(options), edit, None)
        assert isinstance(edit, HiddenEdit)
        compiled = Compiled.of(edit, self.info)
        if edit.scope.marks(self.info.token_id) is not None:
            for wrong, what in (
                (self.settings.parallel[1] != 1, "several pipeline ranks"),
                (self.settings.speculative, "speculative decoding"),
            ):
                if wrong:
                    raise UnsupportedError(
                        f"scope={edit.scope} goes by the reply's tokens, which does not go with {what}"
                    )
        need(self.settings, reads=edit.reads, layers=tuple({layer for layer, _ in compiled.operators}))
        return ReadyEdit(key, digest, json.loads(options), edit, compiled)

    def resolve(
        self, asked: Inside, length: int, max_tokens: int | None = None, ids: Sequence[int] | None = None
    ) -> Resolved:
        """What the engine is told, for a prompt of `length` tokens `ids` and at most `max_tokens` more. Raises
        `InputError` where buffers of a fixed size could overflow, or where marks are looked for in a prompt that has
        no tokens.
        """
        prompt = asked.prompt_length or length
        hidden: list[ResolvedEdit] = []
        values: list[ResolvedEdit] = []
        tuned: list[tuple[int, float]] = []
        reads = False
        for mounted in self._of(asked):
            if isinstance(mounted.edit, _Towards):
                tuned.append((mounted.edit.number, mounted.edit.weight))
                continue
            self.artifacts.move_to_end(mounted.digest)
            if not isinstance(mounted.edit, HiddenEdit):
                values.append(ResolvedEdit(mounted.digest, mounted.options))
                continue
            known = asked.weights[len(hidden)] if asked.weights else None
            one = _resolved(mounted, mounted.edit, prompt, known)
            hidden.append(self._among(ids, one, mounted.edit))
            reads = reads or (known is None and bool(mounted.edit.reads))
        first = min((e.start for e in hidden if e.stop is None or e.stop > e.start), default=None)
        rewind = first if reads and first is not None and first < prompt else None
        resolved = Resolved(
            tuple(hidden),
            tuple(values),
            tuple(tuned),
            asked.beta,
            prompt,
            length,
            ends=asked.ends or length + (max_tokens or 0),
            reads=reads,
            rewind=rewind,
            private=rewind is not None and rewind < prompt - 1,
            measure=asked.measure,
            tag=asked.tag,
            read=asked.read,
        )
        need(self.settings, rows=resolved.rows)
        return resolved

    def _among(self, ids: Sequence[int] | None, edit: ResolvedEdit, made: HiddenEdit) -> ResolvedEdit:
        """An edit with the marks that it goes by, and its turns in the tokens that the request brings."""
        marks = made.scope.marks(self.info.token_id)
        if marks is None:
            return edit
        check(ids is not None, "scope", str(made.scope), "for prompts of embeddings one that goes by positions")
        return replace(edit, marks=marks, turns=turns_of(marks, ids or (), edit.start))


def _resolved(mounted: ReadyEdit, edit: HiddenEdit, prompt: int, known: tuple[float, ...] | None) -> ResolvedEdit:
    start, stop = edit.scope.bounds(prompt)
    # What an edit that reads decides depends on where the prompt ends.
    key = f"{mounted.key}@{prompt}" if edit.reads else mounted.key
    weights = tuple(known) if edit.reads and known is not None else None
    return ResolvedEdit(mounted.digest, mounted.options, key, start, None if math.isinf(stop) else int(stop), weights)


def _options(edit: EditRequest) -> dict[str, Any]:
    options = edit.options()
    return options if edit.strength is None else {**options, "strength": edit.strength}
