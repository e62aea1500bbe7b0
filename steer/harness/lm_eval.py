"""A steered model for EleutherAI's lm-evaluation-harness (0.4.13): likelihood, rolling likelihood and generation tasks.

The harness finds no plug-ins by itself: `steer lm-eval` registers this class as model `steer` and hands over to the
harness's own command; in Python it is `lm_eval.simple_evaluate(model=SteerLM(model, edit=[...]), tasks=[...])`. A
context is the prompt that scopes and gates refer to, and a continuation the text after it, as in generation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from steer.core import Edit, PromptEdit, RawText, SteerError, check
from steer.loading import load

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise SteerError(f"lm-eval is not installed: pip install 'steer-engine[eval]' ({error})") from error

__all__ = ["SteerLM", "evaluate", "register"]

_ROWS = 64
"""Rows that are scored together at most."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class SteerLM(TemplateLM):
    """A language model under edits.

    Args:
        model: a name for `steer.load`, or a model.
        edit: edits for every text: `FILE[:strength][:key=value]...`, or edit objects.
        engine: transformers or vllm.
        dtype, device: of loading. The harness's own `device` is a GPU unless it is told another: without one it is the
            processor.
        max_gen_toks: the longest continuation of a task that does not say.
        batch_size, max_batch_size: taken from the harness; rows are batched by their length.

    Raises `InputError` for edits that no likelihood can be told of: those of the prompt, since the harness writes it.
    """

    def __init__(
        self,
        model: Any,
        edit: Sequence[Any] | str = (),
        engine: str = "transformers",
        dtype: str = "auto",
        device: str | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        named = isinstance(model, str)
        settings: dict[str, Any] = {"dtype": dtype}
        if engine == "transformers" and _is_here(device):
            settings["device"] = device
        opened: Any = load  # its overloads are for engines that are written out
        self.model: Any = opened(model, engine=engine, **settings) if named else model
        check(hasattr(self.model, "scorer"), "model", type(self.model).__name__, "a language model of this machine")
        self.tokenizer = self.model.tokenizer
        given = [edit] if isinstance(edit, str) else list(edit)
        self.max_gen_toks = max_gen_toks
        scorer = self.model.scorer(1, given, 1)
        self.edits: list[Edit] = [mounted for mounted, _ in scorer.edits]
        for one in self.edits:
            allowed = "edits of hidden states or of the next token; --system_instruction is the harness's own"
            check(not isinstance(one, PromptEdit), "edit", type(one).__name__, allowed)

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, and that stands for an empty context."""
        own = self.tokenizer.eos_token_id
        return int(self.model.eos_token_ids[0] if own is None else own)

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return int(self.model.context_length or 2048)

    @property
    def tokenizer_name(self) -> str:
        """What results of other tokenizers are told apart by."""
        return str(getattr(self.tokenizer, "name_or_path", self.model.name)).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the tokenizer's own special tokens unless the text has its first one already."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # ---- likelihood

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [_fitted(context, continuation, self.max_length) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) + len(rows[i][1]), i), reverse=True)
        for first in range(0, len(order), _ROWS):
            some = order[first : first + _ROWS]
            longest = max(len(rows[i][1]) for i in some)
            process = self.model.scorer(longest, [self.edits] * len(some), len(some))
            total, greedy = process.score_tokens([rows[i][0] for i in some], [rows[i][1] for i in some])
            for i, log_prob, likeliest in zip(some, total.tolist(), greedy.tolist(), strict=True):
                found[i] = (log_prob, likeliest)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in the harness's windows, each after a context of one token: edits that act
        on the prompt alone have nothing to act on, and are refused.
        """
        for edit in self.edits:
            scope = str(getattr(edit, "scope", "all"))
            check(
                scope not in ("prompt", "last"), "edit", f"scope={scope}", "another scope: these texts have no prompt"
            )
        windows, owner = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_prob
        return totals

    # ---- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to a string of the task; greedy unless the task samples."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for rows in groups.values():
            drawn = self._settings(dict(requests[rows[0]].args[1]))
            prompts = [self._context(requests[i].args[0], drawn["max_new_tokens"]) for i in rows]
            samples = self.model.generate(prompts, edits=[self.edits] * len(rows), seed=0, **drawn)
            for i, text in zip(rows, samples.texts, strict=True):
                found[i] = text
        return found

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """A task's `generation_kwargs` as `generate` takes them. Raises `InputError` for those that it has not."""
        until = given.pop("until", None) or []
        stop = [until] if isinstance(until, str) else list(until)
        longest = given.pop("max_gen_toks", None) or given.pop("max_new_tokens", None) or self.max_gen_toks
        samples = given.pop("do_sample", None)
        given.pop("max_gen_toks", None)
        asked = {name: given.pop(name) for name in _SAMPLING if name in given}
        if samples is False or (samples is None and not asked.get("temperature")):
            asked = {"temperature": 0.0}
        check(not given, "generation_kwargs", sorted(given), f"until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}")
        return {"stop": [s for s in stop if s], "max_new_tokens": int(longest), **asked}

    def _context(self, text: str, new: int) -> RawText:
        """The context, cut on its left where it leaves no room."""
        ids, room = self.tok_encode(text), self.max_length - new
        check(room > 0, "max_gen_toks", new, f"fewer than {self.max_length}, the model's context")
        return RawText(text if len(ids) <= room else self.tokenizer.decode(ids[-room:]))


def _is_here(device: str | None) -> bool:
    return bool(device) and not (str(device).startswith("cuda") and not torch.cuda.is_available())


def _fitted(context: list[int], continuation: list[int], longest: int) -> tuple[list[int], list[int]]:
    """Context and continuation in the model's context, cut on the left, with a token of context at least."""
    whole = [*context, *continuation][-longest:]
    kept = min(len(continuation), len(whole) - 1)
    return whole[: len(whole) - kept], whole[len(whole) - kept :]


def register() -> None:
    """Make the class known to the harness as model `steer`."""
    import lm_eval.models  # noqa: F401  (fills the registry, which it does only while that is empty)
    from lm_eval.api.registry import model_registry

    if "steer" not in model_registry:
        model_registry.register("steer", target=f"{__name__}:SteerLM")


def evaluate(arguments: Sequence[str]) -> None:
    """Run the harness's own command with these arguments, `steer` among its models."""
    from lm_eval.__main__ import cli_evaluate

    register()
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
