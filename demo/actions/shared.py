"""What all visitors share: the models, loaded when they are first wanted, and one line for what takes long."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer import artifacts
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.adapters.transformers.serving.work import Done, Told
from steer.core import SteerError, check
from steer.embedded import home, resolve
from steer.loading import is_diffusion, is_endpoint, is_masked, load
from steer.serving.requests import relayed
from steer.serving.reward_store import Rewards
from steer.train.vector import train_vector

if TYPE_CHECKING:
    from steer.demo.session import Visitor

__all__ = ["PRESETS", "Preset", "Shared"]

_TEXT, _IMAGES = "smollm2-135m", "fashion-ddpm"
_MAX_ROWS = 64


@dataclass(frozen=True)
class Preset:
    """A vector that the page fits itself, to pairs that steer ships."""

    name: str
    pairs: str
    label: str
    low: str
    high: str
    system_low: str
    system_high: str


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "sentiment",
            "sentiment_pairs",
            "Sad to happy",
            "sad",
            "happy",
            "You are a deeply unhappy assistant. Everything that you write is sad and negative.",
            "You are a very happy assistant. Everything that you write is cheerful and positive.",
        ),
        Preset(
            "formality",
            "style_pairs",
            "Casual to formal",
            "casual",
            "formal",
            "Write casually, as to a friend, with slang and short words.",
            "Write formally, as in an official letter, with long and polite sentences.",
        ),
    )
}


@dataclass
class Shared:
    """The models of one page, and the artifacts that everybody may use.

    Args:
        model: a language model or a diffusion model; the embedded one of the other kind stands beside it.
        artifacts: folder of vectors, controllers and value heads that visitors may use.
        settings: of `steer.load`, for `model`.
    """

    model: str = _TEXT
    artifacts: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = resolve(self.model)
        if is_endpoint(self.model) or (not is_diffusion(where) and is_masked(where)):
            raise SteerError(f"model {self.model}: the demo needs a causal language model or a diffusion model")
        images = is_diffusion(where)
        self.text_model, self.image_model = (_TEXT, self.model) if images else (self.model, _IMAGES)
        self._engine: TransformersEngine | None = None
        self._images: Any = None
        self._loading = threading.Lock()
        self._line, self._fits = Line(), Line()
        self.rewards = Rewards((), None)
        self.policies: dict[Path, Any] = {}
        """Language models that were tuned from the page's, by folder, once they were asked for."""

    # ---- models

    @property
    def loaded(self) -> bool:
        """Whether the language model is there."""
        return self._engine is not None

    def engine(self) -> TransformersEngine:
        """The language model in its running batch, loaded once. Raises `SteerError`. Takes seconds the first time."""
        with self._loading:
            if self._engine is None:
                settings = self.settings if self.text_model == self.model else {}
                model = load(self.text_model, kind="text", **settings)
                self._engine = TransformersEngine(model, max_rows=_MAX_ROWS, split_special_tokens=True)
            return self._engine

    def images(self) -> Any:
        """The diffusion model, loaded once. Raises `SteerError`."""
        with self._loading:
            if self._images is None:
                settings = self.settings if self.image_model == self.model else {}
                self._images = load(self.image_model, kind="images", **settings)
            return self._images

    def close(self) -> None:
        """Stop the running batch."""
        if self._engine is not None:
            self._engine.close()

    def check_model(self, name: str) -> None:
        """Raise `InputError` where a recipe is for another model than this page has."""
        known = (self.text_model, self.image_model)
        check(name in known, "model", name, f"{', '.join(known)}: this page was started with them")

    # ---- waiting

    @property
    def waiting(self) -> int:
        """Searches that run or wait."""
        return len(self._line)

    @contextmanager
    def line(self, fits: bool = False) -> Iterator[AsyncIterator[str]]:
        """A place in the line in which searches and images wait for each other, or in that of `fits`, kept until the
        block ends. Gives what to say until it is one's turn; nothing may be done before that has ended.
        """
        with (self._fits if fits else self._line).place() as ahead:
            yield _until_first(ahead)

    def aside(self, work: Callable[[Callable[[Any], None]], Any]) -> AsyncGenerator[Told | Done]:
        """Run a function in a thread of its own: what it tells as `Told`, what it returns as `Done`. Its argument,
        `tell`, raises once nobody waits any more, so that it stops there.
        """

        def begin(emit: Callable[[Any], None]) -> Callable[[], None]:
            left = threading.Event()

            def tell(value: Any) -> None:
                if left.is_set():
                    raise SteerError("nobody waits for this any more")
                emit(Told(value))

            def worked() -> None:
                try:
                    emit(Done(work(tell)))
                except Exception as error:  # goes to whoever waits
                    emit(error)

            threading.Thread(target=worked, daemon=True).start()
            return left.set

        return relayed(begin, Done)  # type: ignore[return-value]

    # ---- artifacts

    def preset_file(self, name: str) -> Path:
        """Where a preset's vector for the language model lies once it is fitted; the model must be loaded."""
        assert self._engine is not None
        rows = pairs_of(PRESETS[name])
        key = artifacts.data_hash([rows, self._engine.model.info.fingerprint, artifacts.FORMAT])[:16]
        return home() / "demo" / f"{name}-{key}.safetensors"

    async def ready(self, name: str | None = None) -> AsyncIterator[str]:
        """Load the language model, and fit the vector of a preset, where that was not done before; yields what is
        going on. Raises `SteerError`.
        """
        if not self.loaded:
            yield f"Loading the model {self.text_model}. This happens once."
            await asyncio.to_thread(self.engine)
        if name in PRESETS and not (path := self.preset_file(name)).is_file():
            label, rows = PRESETS[name].label.lower(), pairs_of(PRESETS[name])
            yield f"Fitting the vector \u201c{label}\u201d to {len(rows)} pairs of sentences. This happens once."
            async for done, total in self.fit(rows, path):
                yield f"Fitting the vector \u201c{label}\u201d: {done} of {total} sentences read"

    async def fit(self, rows: list[dict[str, str]], path: Path, **settings: Any) -> AsyncGenerator[tuple[int, int]]:
        """Fit a vector to pairs between the steps of the batch, into a file; yields the texts read, and of how many."""
        engine = self.engine()
        model = engine.model

        def work(tell: Callable[[Any], None]) -> Any:
            return train_vector(model, rows, progress=lambda done, total: tell((done, total)), **settings)

        async for event in engine.run_work(work):
            if isinstance(event, Told):
                yield event.value
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                event.value.save(path)

    def named(self, visitor: Visitor) -> dict[str, Path | None]:
        """Artifacts that a visitor may use, by name: their own, the folder's (policies are folders there), the presets
        (None: not fitted yet).
        """
        folder = [] if self.artifacts is None else sorted(self.artifacts.glob("*.safetensors"))
        policies = [] if self.artifacts is None else sorted(self.artifacts.glob("*/steer.json"))
        shared = {path.stem: path for path in folder} | {path.parent.name: path.parent for path in policies}
        return {**dict.fromkeys(PRESETS), **shared, **visitor.artifacts()}

    def is_policy(self, name: Any, visitor: Visitor) -> bool:
        """Whether an artifact of this name is the folder of a policy."""
        path = self.named(visitor).get(name) if isinstance(name, str) else None
        return path is not None and path.is_dir()

    def pairs_behind(self, name: Any, visitor: Visitor) -> str:
        """The shipped pairs that an artifact of this name was fitted to; empty where it is none of the presets."""
        known = self.named(visitor)
        return PRESETS[name].pairs if isinstance(name, str) and name in known and known[name] is None else ""

    def find(self, name: str, visitor: Visitor) -> Path:
        """The file of an artifact; that of a preset must be fitted. Raises `InputError`."""
        known = self.named(visitor)
        check(name in known, "edits", name, ", ".join(known))
        return known[name] or self.preset_file(name)

    def reward(self, expression: str) -> Any:
        """A reward from its expression of named rewards; None for an empty one. Raises `InputError`."""
        return self.rewards.parse(expression) if expression.strip() else None


class Line:
    """One after the other, with a length that can be seen. Safe to use from several threads and event loops."""

    def __init__(self) -> None:
        self._places: list[object] = []

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def place(self) -> Iterator[Callable[[], int]]:
        """The last place; gives a function that counts those before it."""
        mine = object()
        self._places.append(mine)
        try:
            yield lambda: self._places.index(mine)
        finally:
            self._places.remove(mine)


async def _until_first(ahead: Callable[[], int]) -> AsyncIterator[str]:
    shown = 0
    while count := ahead():
        if count != shown:
            shown = count
            yield f"In line: {count} before this one"
        await asyncio.sleep(0.05)


def pairs_of(preset: Preset) -> list[dict[str, str]]:
    """The shipped pairs that a preset is fitted to."""
    text = (files("steer.recipes") / f"{preset.pairs}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
