"""`steer lm-eval`: EleutherAI's harness over a steered model."""

from __future__ import annotations

import json
from collections.abc import Sequence

from steer.cli import checks
from steer.cli.options import ModelOptions
from steer.core import SteerError, check

__all__ = ["lm_eval"]


def lm_eval(model: str, edit: Sequence[str], engine: str, dtype: str, rest: Sequence[str]) -> None:
    """Check the model and its edits, then run the harness with the other arguments as they are.

    Raises `InputError`, and `SteerError` where the harness is not installed.
    """
    taken = [text for text in rest if text.split("=")[0] in ("--model_args", "-a")]
    if model == "steer" or taken:
        check(not edit, "edit", list(edit), 'unset beside --model_args, which has its own: {"edit": [...]}')
        arguments = ["--model", model, *rest]
    else:
        checks.check_model(ModelOptions(model=model, dtype=dtype))
        checks.check_causal(ModelOptions(model=model))
        check(engine in ("transformers", "vllm"), "engine", engine, "transformers, vllm")
        for text in edit:
            checks.edit_maker(text)
        own = {"model": model, "edit": list(edit), "engine": engine, "dtype": dtype}
        arguments = ["--model", "steer", "--model_args", json.dumps(own), *rest]
    try:
        import lm_eval as library
    except ImportError:
        raise SteerError("lm-eval is not installed: pip install 'steer-engine[eval]'") from None
    assert library
    from steer.harness.lm_eval import evaluate

    evaluate(arguments)
