"""Conversion of files of other formats into folders that transformers loads directly."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

__all__ = ["CARD_NAME", "gguf_to_safetensors"]


CARD_NAME = "MODEL_CARD.json"
_TRACKS = ("_name_or_path", "_model_name_or_path", "name_or_path", "gguf_file", "is_local", "local_files_only")


def gguf_to_safetensors(gguf_path: Path | str, out_dir: Path | str, card: Mapping[str, Any] | None = None) -> Path:
    """Dequantise a GGUF causal language model to float32 and write model, tokenizer and chat template to `out_dir`.

    `card` (source, licence, hash) is written last, as MODEL_CARD.json: a folder that has it is complete.
    """
    source, out = Path(gguf_path), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
        )
        _forget_quantisation(model)
        _set_tokens(model, tokenizer)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    _tidy(out)
    text = {"format": "safetensors", "dtype": "float32", "converted_from": source.name, **(card or {})}
    (out / CARD_NAME).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    return out


def _forget_quantisation(model: Any) -> None:
    # The weights are plain float32 by now, yet the model still says that it is quantised and refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _set_tokens(model: Any, tokenizer: Any) -> None:
    """End and padding tokens and the context length agree between model, generation settings and tokenizer."""
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokenizer.pad_token_id = padding
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.eos_token_id, model.config.pad_token_id = end, padding
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=padding
    )


def _tidy(folder: Path) -> None:
    """Drop this machine's and GGUF's tracks from the saved settings; make every file as readable as the others."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in _TRACKS:
            settings.pop(key, None)
        # GGUF keeps float32: 9.999999747378752e-06 was written as 1e-05, and is the same number once it is used.
        settings = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in settings.items()}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    mode = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or warnings of transformers inside; its settings come back afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader obeys no setting.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
