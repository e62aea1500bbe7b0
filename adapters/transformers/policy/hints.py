"""Policies of hints that are networks: LoRA on a causal language model, or on an encoder-decoder such as T5.

They are trained by `steer.train.stimulus`: hints are drawn token by token from the untruncated law at temperature 1,
their log-probabilities and the KL of every step's law to the reference's are exact. What is drawn is read as phrases
with semicolons between them; doubles and what follows the first line are left out of the hint, not of its probability.

Letters: `N` hints, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.transformers.body import taken
from steer.adapters.transformers.cache import cache_argument
from steer.adapters.transformers.model import LanguageModel, load
from steer.adapters.transformers.policy.trl import quiet, shared_copy
from steer.artifacts import Card, read_folder_card
from steer.core import InputError, SteerError, check
from steer.core.errors import first_line
from steer.embedded import resolve
from steer.methods.extract import excerpt
from steer.train.loop import fit
from steer.train.stimulus.extracting import Drawn
from steer.train.stimulus.rows import Row
from steer.train.stimulus.settings import StimulusSettings

__all__ = ["NetworkPolicy", "load_hints", "open_policy"]

_LONGEST = 512
"""Tokens of an encoder's input."""


def _with_lora(network: Any, rank: int, seq2seq: bool) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SteerError(
            f"hints of a network need the extra train: pip install 'steer-engine[train]' ({error})"
        ) from error
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type=task)
    with quiet():
        return get_peft_model(network, config)


class NetworkPolicy:
    """A network that writes hints; see `steer.train.stimulus.extracting.Policy`.

    Args:
        network: without adapters; never changed.
        tokenizer: the network's.
        encode: token ids of what it is asked.
        ends: ids that end a text; the first is what hints are trained to end with.
        name: of the network, by which a folder finds it again.
    """

    chunk = 8

    def __init__(
        self, network: Any, tokenizer: Any, encode: Callable[[str], list[int]], ends: Sequence[int], name: str
    ) -> None:
        check(bool(ends), "policy_model", name, "a model whose texts end")
        self.network, self.tokenizer, self.encode, self.ends, self.name = network, tokenizer, encode, tuple(ends), name
        self.cache_name = cache_argument(taken(network), network)
        self.seq2seq = bool(getattr(network.config, "is_encoder_decoder", False))
        self.reference: dict[str, Tensor] = {}
        self.settings = StimulusSettings(policy="seq2seq" if self.seq2seq else "lm")

    def prepare(self, settings: StimulusSettings) -> None:
        """Get an adapter that does nothing yet. Deterministic, by the seed."""
        self.settings = settings
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.network = _with_lora(self.network, settings.lora_rank, self.seq2seq).eval()

    def facts(self) -> dict[str, Any]:
        """What a card needs to open it again."""
        kept = {name: getattr(self.settings, name) for name in ("instruction", "hint_tokens")}
        return {**kept, "policy_model": self.name}

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's layout."""
        for name, tensor in self.weights().items():
            if not bool(tensor.isfinite().all()):
                raise SteerError(f"train stimulus: {name} is no longer finite; lower learning_rate")
        with quiet():
            self.network.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    # ---- as a policy

    def asked(self, text: str) -> list[int]:
        """Token ids of what it is asked for an input."""
        shown = excerpt(text, self.settings.words)
        return self.encode(self.settings.instruction.replace("{prompt}", shown))

    def hint(self, tokens: Sequence[int]) -> str:
        """What is read out of drawn tokens."""
        text = self.tokenizer.decode([t for t in tokens if t not in self.ends], skip_special_tokens=True)
        parts = [part.strip() for part in text.strip().split("\n")[0].split(";")]
        return "; ".join([part for part in dict.fromkeys(parts) if part][: self.settings.most])

    def __call__(self, inputs: Sequence[str]) -> list[str]:
        return [self.hint(row) for row in self._written(inputs, 1, None)]

    def draw(self, inputs: Sequence[str], n: int, generator: torch.Generator) -> list[list[Drawn]]:
        rows = [Drawn(self.hint(row), tuple(row)) for row in self._written(inputs, n, generator)]
        return [rows[i * n : (i + 1) * n] for i in range(len(inputs))]

    @torch.no_grad()
    def _written(self, inputs: Sequence[str], n: int, generator: torch.Generator | None) -> list[list[int]]:
        """Tokens of `n` hints for each input, drawn or, without a generator, the likeliest one by one."""
        found: list[list[int]] = []
        for text in inputs:
            ids, rows = self.asked(text), [[] for _ in range(n)]  # type: ignore[var-annotated]
            alive = list(range(n))
            state: Any = None
            for _ in range(self.settings.hint_tokens):
                law, state = self._step(ids, [rows[i] for i in alive], state)
                probabilities = law.float().softmax(-1).cpu()
                drawn = (
                    probabilities.argmax(-1)
                    if generator is None
                    else torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
                )
                for i, token in zip(alive, drawn.tolist(), strict=True):
                    rows[i].append(token)
                kept = [k for k, i in enumerate(alive) if rows[i][-1] not in self.ends]
                if len(kept) < len(alive):
                    alive = [alive[k] for k in kept]
                    if not alive:
                        break
                    state[0].batch_select_indices(torch.tensor(kept, device=law.device))
            found += rows
        return found

    def _step(self, ids: list[int], rows: list[list[int]], state: Any) -> tuple[Tensor, Any]:
        """Logits `[n, V]` of the next token, and what the step after needs: the cache, and the encoder's states."""
        device = next(self.network.parameters()).device
        if state is None:
            asked = torch.tensor([ids] * len(rows), device=device)
            if self.seq2seq:
                start = torch.full((len(rows), 1), self.network.config.decoder_start_token_id, device=device)
                out = self.network(input_ids=asked, decoder_input_ids=start, use_cache=True)
            else:
                out = self.network(input_ids=asked, use_cache=True)
        else:
            cache, encoded = state
            last = torch.tensor([[row[-1]] for row in rows], device=device)
            given = {self.cache_name: cache, "use_cache": True}
            if self.seq2seq:
                out = self.network(encoder_outputs=(encoded[: len(rows)],), decoder_input_ids=last, **given)
            else:
                out = self.network(input_ids=last, **given)
        return out.logits[:, -1], (out.past_key_values, getattr(out, "encoder_last_hidden_state", None))

    def terms(self, inputs: Sequence[str], drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        pairs = [(self.asked(text), list(one.choice)) for text, one in zip(inputs, drawn, strict=True)]
        with torch.no_grad(), self._as(self.reference):
            before, _, _ = self._laws(pairs)
        now, tokens, real = self._laws(pairs)
        logs = now.gather(2, tokens.unsqueeze(2)).squeeze(2)
        gap = (now.exp() * (now - before)).sum(2)
        return (logs * real).sum(1), (gap * real).sum(1)

    def _laws(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-laws `[N, T, V]` of the tokens of hints, the tokens `[N, T]`, and which are there."""
        device = next(self.network.parameters()).device
        longest = max(len(tokens) for _, tokens in pairs)
        tokens, real = torch.zeros(2, len(pairs), longest, dtype=torch.long, device=device)
        for i, (_, row) in enumerate(pairs):
            tokens[i, : len(row)], real[i, : len(row)] = torch.tensor(row, device=device), 1
        if self.seq2seq:
            start = torch.full((len(pairs), 1), self.network.config.decoder_start_token_id, device=device)
            ids, mask = _padded([ids for ids, _ in pairs], device)
            before = torch.cat([start, tokens[:, :-1]], 1)
            logits = self.network(input_ids=ids, attention_mask=mask, decoder_input_ids=before, use_cache=False).logits
        else:
            ids, mask = _padded([[*ids, *row[:-1]] for ids, row in pairs], device)
            out = self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            first = torch.tensor([len(ids) - 1 for ids, _ in pairs], device=device)
            at = (first.unsqueeze(1) + torch.arange(longest, device=device)).clamp_max(out.shape[1] - 1)
            logits = out[torch.arange(len(pairs), device=device).unsqueeze(1), at]
        return logits.float().log_softmax(-1), tokens, real.float()

    # ---- as what is trained

    def weights(self) -> dict[str, nn.Parameter]:
        return {name.replace(".", "/"): p for name, p in self.network.named_parameters() if p.requires_grad}

    def begin(self) -> None:
        self.reference = {name: p.detach().clone() for name, p in self.weights().items()}

    @contextmanager
    def _as(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """The network with other weights in its adapter for a while."""
        now = {name: p.detach().clone() for name, p in self.weights().items()}
        self._put(weights)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.weights().items():
            parameter.data.copy_(weights[name])

    def fit(
        self,
        rows: Sequence[Row],
        settings: StimulusSettings,
        *,
        work: Path | None = None,
        run: dict[str, Any] | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Maximum likelihood of the rows' hints, "a; b; c"."""
        some = [row for row in rows if row.hint]
        pairs = [(self.asked(row.input), self._target(row)) for row in some]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]

        def loss(module: nn.Module, batch: list[int], epoch: int) -> Tensor:
            laws, tokens, real = self._laws([pairs[i] for i in batch])
            return -(laws.gather(2, tokens.unsqueeze(2)).squeeze(2) * real).sum() / real.sum()

        adapter = nn.ParameterList(self.weights().values())
        history = fit(
            adapter,
            batches,
            loss,
            epochs=settings.epochs,
            learning_rate=5 * settings.rate,
            run={**(run or {}), "seed": settings.seed},
            work=work,
            progress=progress,
            what="learning hints of references",
        )
        return {"loss": [round(x, 5) for x in history]}

    def _target(self, row: Row) -> list[int]:
        ids = self.tokenizer("; ".join(row.hint), add_special_tokens=False)["input_ids"]
        return [*ids[: self.settings.hint_tokens - 1], self.ends[0]]


def _padded(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, device=device), 1
    return ids, mask


# -------------------------------------------------------------------------------------------------------------- folders


def open_policy(model: Any, policy: str) -> NetworkPolicy:
    """A network to be trained: of a `LanguageModel` or the name of one ("lm"), or the name or folder of an
    encoder-decoder ("seq2seq"). Raises `InputError`, and `SteerError` where nothing can be loaded.
    """
    if policy == "lm":
        loaded = model if isinstance(model, LanguageModel) else load(resolve(str(model)), name=str(model))
        # The black box may be the very same network, which is not to be adapted.
        return NetworkPolicy(
            shared_copy(loaded.network), loaded.tokenizer, loaded.encode, loaded.eos_token_ids, loaded.name
        )
    check(policy == "seq2seq", "policy", policy, "lm, seq2seq")
    return _encoder_decoder(str(model))


def _encoder_decoder(name: str) -> NetworkPolicy:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise InputError("policy_model", name, "an encoder-decoder such as T5; of others policy lm")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        network = AutoModelForSeq2SeqLM.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except SteerError:
        raise
    except Exception as error:
        raise SteerError(f"policy_model: could not load {name!r}: {first_line(error)}") from error
    network.eval().requires_grad_(False)
    ends = (
        [network.config.eos_token_id] if isinstance(network.config.eos_token_id, int) else network.config.eos_token_id
    )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, truncation=True, max_length=_LONGEST)["input_ids"])

    return NetworkPolicy(network, tokenizer, encode, ends or [], name)


def load_hints(folder: str) -> NetworkPolicy:
    """The policy in a folder of `steer train stimulus`. Raises `InputError`."""
    path = Path(folder)
    card: Card = read_folder_card(path)
    there = card.kind == "stimulus" and (path / "adapter_model.safetensors").is_file()
    check(there, "stimulus", str(path), "a folder of steer train stimulus")
    settings = card.settings
    made = open_policy(str(settings.get("policy_model")), str(settings.get("policy")))
    known = ("most", "words", "instruction", "hint_tokens")
    made.settings = StimulusSettings(**{name: settings[name] for name in known if name in settings})
    try:
        from peft import PeftModel

        with quiet():
            made.network = PeftModel.from_pretrained(made.network, str(path), torch_device="cpu").eval()
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise InputError("stimulus", f"{path} ({first_line(error)})", "a folder of steer train stimulus") from error
    return made
