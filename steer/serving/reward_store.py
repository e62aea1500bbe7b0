"""Rewards that a request may name: shipped ones that load nothing, those that the server's owner allowed, and
registered ones under a name: an expression of the others, a reward model in the folder of artifacts, or a registered
file of `steer train reward`.

Registered rewards are remembered in `FOLDER/registered/rewards.json`, which any number of servers may share: it is read
again whenever it has changed.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from steer.artifacts import read_card
from steer.core import InputError, Reward, SteerError, check
from steer.files import replacing
from steer.rewards import parse_reward, shipped
from steer.rewards.algebra import check_reward
from steer.serving.engine import TooLargeError
from steer.serving.wire import NAME

__all__ = ["Registered", "Rewards", "UnknownRewardError"]


_LIMIT = 256


class UnknownRewardError(SteerError):
    """No reward is registered under this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"reward {name!r} is not registered")


_FACTS = ("reward", "folder", "label", "file", "options")
"""What is remembered of a registered reward."""


@dataclass(frozen=True)
class Registered:
    """A reward with a name of its own: an expression, a folder in that of the artifacts and its label, or an artifact
    of kind reward with the options of its expression.
    """

    name: str
    reward: str | None = None
    folder: str | None = None
    label: str | None = None
    file: str | None = None
    options: str | None = None
    fixed: bool = False
    """Whether the server's owner put it there."""
    scorer: Reward = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    @property
    def usage(self) -> str:
        label = "" if self.label is None else f":{self.label}"
        options = "" if self.options is None else f":{self.options}"
        return self.reward or (f"{self.folder}{label}" if self.folder else f"{self.file}{options}")


class Rewards:
    """Reads the `reward` of requests. Safe to call from several threads.

    Args:
        allowed: further rewards, as `NAME=REWARD` (from then on part of expressions) or as a whole text that a request
            must repeat letter by letter.
        folder: that of the artifacts, where registered ones are remembered; None takes no registrations.
    """

    def __init__(self, allowed: Sequence[str] = (), folder: Path | None = None) -> None:
        self.folder = folder
        self.refused: dict[str, str] = {}
        """Remembered rewards that could not be read at start, with the reason."""
        self._whole: dict[str, Reward] = {}
        self._named: dict[str, Registered] = {}
        self._lock = threading.RLock()
        self._find: Callable[[str], Path] | None = None
        self._seen: tuple[int, int, int] | None = None
        for text in allowed:
            name, equals, given = text.partition("=")
            if equals and name.isidentifier():
                check(name not in shipped(), "allow_reward", text, "a name that is not taken")
                self._named[name] = Registered(name, given, fixed=True, scorer=parse_reward(given))
            else:
                self._whole[text] = parse_reward(text)
        self._recall()

    def follow(self, find: Callable[[str], Path]) -> None:
        """Read registered files where `find` says that an artifact lies, which raises for one that is not there; those
        that were remembered are registered again.
        """
        self._find, self._seen = find, None
        self.refused.clear()
        self._recall()

    # ---- reading

    def parse(self, text: str) -> Reward:
        """The reward that a request asks for. Raises `InputError` that names `steer.reward`."""
        if text in self._whole:
            return self._whole[text]
        self._recall()
        return self._read(text, "steer.reward")

    def _read(self, text: str, where: str) -> Reward:
        with self._lock:  # not while another thread is reading what is remembered
            names = {name: entry.scorer for name, entry in self._named.items()}
        try:
            reward = parse_reward(text, trusted=False, names=names)
            check_reward(reward, images=False)
        except InputError as error:
            raise InputError(where, error.given, error.allowed) from error
        except (OSError, ValueError, RecursionError) as error:  # too long to be the name of anything, or too deep
            raise InputError(where, text, "an expression of named rewards") from error
        return reward

    def usages(self) -> dict[str, str]:
        """Names that requests may use, and how each is written or what it stands for."""
        usages = {}
        for name, usage in shipped().items():
            example = usage.split("[")[0].replace("WORD,WORD", "word").replace("LABEL,LABEL", "label")
            try:
                check_reward(parse_reward(example, trusted=False), images=False)
            except InputError:
                continue
            usages[name] = usage
        return {**usages, **{text: text for text in self._whole}, **{e.name: e.usage for e in self.registered()}}

    def registered(self) -> list[Registered]:
        """Rewards with names of their own."""
        self._recall()
        with self._lock:
            return list(self._named.values())

    # ---- changing

    def add(
        self,
        name: str,
        reward: str | None = None,
        folder: str | None = None,
        label: str | None = None,
        file: str | None = None,
        options: str | None = None,
    ) -> Registered:
        """Register an expression, a reward model in the folder of artifacts, or a registered artifact of kind reward
        with options as in an expression ("how=worst"), in place of what was sent under the name before. Raises
        `InputError`, and `TooLargeError` where there are too many.
        """
        check(self.folder is not None, "name", name, "nothing: the server was started without --artifacts")
        one = sum(given is not None for given in (reward, folder, file)) == 1
        check(one, "reward", reward, "one of reward, folder and file")
        check(label is None or folder is not None, "label", label, "unset without folder")
        check(options is None or file is not None, "options", options, "unset without file")
        check(
            name.isidentifier() and name.isascii() and len(name) <= 64,
            "name",
            name,
            "letters, digits and _, a letter first, at most 64 of them",
        )
        check(name not in shipped(), "name", name, "a name that no shipped reward has")
        self._recall()
        made = self._made(Registered(name, reward, folder, label, file, options))
        with self._changing():
            before = self._named.get(name)
            check(before is None or not before.fixed, "name", name, "a name that the server's owner did not give")
            if before is None and len(self._named) >= _LIMIT:
                raise TooLargeError("name", f"{len(self._named) + 1} rewards", f"at most {_LIMIT}")
            self._remember({**self._named, name: made})
        return made

    def lend(self, name: str, scorer: Reward) -> None:
        """Take a reward of this program under a name, which is not remembered."""
        self._named[name] = Registered(name, name, fixed=True, scorer=scorer)

    def remove(self, name: str) -> None:
        """Forget a reward. Raises `UnknownRewardError`, and `InputError` where the owner gave it or others need it."""
        with self._changing():
            if name not in self._named:
                raise UnknownRewardError(name)
            check(not self._named[name].fixed, "name", name, "a reward that was registered here")
            word = re.compile(rf"\b{re.escape(name)}\b")
            others = [e.name for e in self._named.values() if e.name != name and word.search(e.reward or "")]
            check(not others, "name", name, f"a reward that no other is made of; here: {', '.join(others)}")
            self._remember({n: entry for n, entry in self._named.items() if n != name})

    def _made(self, asked: Registered) -> Registered:
        """The registration with what scores by it."""
        if asked.reward is not None:
            others = re.search(rf"\b{re.escape(asked.name)}\b", asked.reward) is None
            check(others, "reward", asked.reward, "an expression of other rewards than itself")
            scorer = self._read(asked.reward, "reward")
        elif asked.file is not None:
            scorer = self._heads(asked.file, asked.options)
        else:
            scorer = self._model(str(asked.folder), asked.label)
        return replace(asked, scorer=scorer)

    def _heads(self, file: str, options: str | None) -> Reward:
        """The reward in a registered artifact, which was compared with the served model when it was registered."""
        name = file.removesuffix(".safetensors")
        allowed = "the name of a registered artifact of kind reward, as steer train reward makes them"
        try:
            assert self._find is not None
            path = self._find(name)
        except (SteerError, AssertionError) as error:
            raise InputError("file", file, allowed) from error
        check(read_card(path).kind == "reward", "file", f"{file} (a {read_card(path).kind})", allowed)
        text = f'"{path}"' if options is None else f'"{path}":{options}'
        try:
            return parse_reward(text)
        except InputError as error:
            given = str(error.given).replace(str(path), name)
            raise InputError("options" if options else "file", given, error.allowed.replace(str(path), name)) from error

    def _model(self, folder: str, label: str | None) -> Reward:
        assert self.folder is not None
        path = self.folder / folder
        plain = NAME.fullmatch(folder) is not None and path.is_dir() and not path.is_symlink()
        check(
            plain and (path / "config.json").is_file() and any(path.glob("*.safetensors")),
            "folder",
            folder,
            "the name of a folder among the artifacts, with config.json and safetensors",
        )
        text = f'"{path}"' if label is None else f'"{path}":"{label}"'
        try:
            return parse_reward(text)
        except InputError as error:  # clients need not know where a folder lies
            given = str(error.given).replace(str(path), folder)
            raise InputError("label" if label else "folder", given, error.allowed) from error

    # ---- remembering

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / "registered" / "rewards.json"

    def _remember(self, named: dict[str, Registered]) -> None:
        facts = {
            e.name: {k: v for k in _FACTS if (v := getattr(e, k)) is not None} for e in named.values() if not e.fixed
        }
        with replacing(self._file) as temporary:
            temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        self._named, self._seen = named, _stamp(self._file)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold what all servers remember, as it is now."""
        with self._lock, ExitStack() as held:
            if self.folder is not None:
                try:
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(FileLock(self._file.with_name(".rewards.lock")))
                except OSError as error:
                    why = error.strerror or error
                    raise SteerError(f"the folder of artifacts cannot be written ({why})") from error
            self._recall()
            yield

    def _recall(self) -> None:
        """Register what is remembered, in its order (what an expression is made of came before it), where it is not
        what was read before; what is no longer there is forgotten.
        """
        if self.folder is None:
            return
        with self._lock:
            if (stamp := _stamp(self._file)) == self._seen:
                return
            before, self._seen = dict(self._named), stamp
            self._named = {name: entry for name, entry in before.items() if entry.fixed}
            for name, given in self._remembered():
                if name in self._named:
                    continue
                facts: dict[str, Any] = {k: given.get(k) for k in _FACTS}
                known = before.get(name)
                try:
                    same = known is not None and all(getattr(known, k) == facts[k] for k in _FACTS)
                    self._named[name] = known if same and known is not None else self._made(Registered(name, **facts))
                except Exception as error:  # one that is wrong by now keeps no others away
                    self.refused[name] = str(error)

    def _remembered(self) -> list[tuple[str, dict[str, str]]]:
        if not self._file.is_file():
            return []
        try:
            facts = json.loads(self._file.read_text(encoding="utf-8"))
            return [(str(name), {k: str(v) for k, v in given.items()}) for name, given in facts.items()]
        except (ValueError, AttributeError, OSError, RecursionError) as error:
            self.refused[self._file.name] = str(error)
            return []


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
