"""Interventions of pyreft: linear algebra by hand, the files as pyreft lays them out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import steer
from steer.adapters.transformers.serving.preparing import Preparer
from steer.core import InputError, RawText, UnsupportedError
from steer.edits import parse_edit
from steer.methods.operators import LowRank
from steer.methods.reft import Ends, Reft, position
from steer.serving.artifact_store import digest
from steer.serving.engine import NamedEdit
from steer.serving.wire import EditRequest

WIDTH, RANK = 32, 3
KEY = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#{}.safetensors"


def rotation(seed: int) -> torch.Tensor:
    """`[D, r]` with orthonormal columns."""
    return torch.linalg.qr(torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(seed)))[0].contiguous()


def linear(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, WIDTH, generator=generator), torch.randn(RANK, generator=generator)


def parametrised(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What torch saves of a rotation, and the rotation `[D, r]` itself, away from where it was begun."""
    torch.manual_seed(seed)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(WIDTH, RANK))
    nn.init.orthogonal_(layer.weight)
    nn.utils.parametrizations.orthogonal(layer)
    with torch.no_grad():  # the diagonal has no gradient, and stays
        layer.parametrizations.weight.original += 0.3 * torch.randn(WIDTH, RANK).tril(-1)
    return {f"rotate_layer.{k}": v.clone() for k, v in layer.state_dict().items()}, layer.weight.detach().clone()


def written(folder: Path, kinds: dict[tuple[int, int], tuple[str, dict[str, torch.Tensor]]], **more: Any) -> Path:
    """A folder as pyreft saves it, with safetensors for its pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    places, types = [], []
    for (layer, group), (kind, tensors) in kinds.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / KEY.format(layer, group))
        places.append([layer, "block_output", "pos", 1, RANK, *[None] * 9])
        types.append(f"<class 'pyreft.interventions.{kind}Intervention'>")
    config = {"representations": places, "intervention_types": types, "sorted_keys": None, "mode": "parallel", **more}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loreft(seed: int = 0) -> tuple[str, dict[str, torch.Tensor]]:
    weight, bias = linear(seed)
    return "Loreft", {"weight": weight, "bias": bias, "rotate_layer": rotation(seed)}


def hidden() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9))


# ----------------------------------------------------------------------------------------------------------- oracles


def test_loreft_sets_the_coordinates_in_its_subspace(tmp_path: Path) -> None:
    """`R h' = W h + b`, and nothing changes outside of the rows of R."""
    _, tensors = loreft()
    edit = steer.load_edit(written(tmp_path, {(1, 0): loreft()}), scope="all")
    assert isinstance(edit, Reft)
    r, h = tensors["rotate_layer"].T, hidden()
    made = edit.operators[1](h)
    torch.testing.assert_close(made @ r.T, h @ tensors["weight"].T + tensors["bias"], rtol=0, atol=1e-5)
    outside = torch.eye(WIDTH) - r.T @ r
    torch.testing.assert_close(made @ outside, h @ outside, rtol=0, atol=1e-5)


def test_every_kind_is_its_formula(tmp_path: Path) -> None:
    """In float64, one position at a time, from what the files hold."""
    weight, bias = linear(1)
    other, more = linear(2)
    saved, rotated = parametrised(3)
    sizes = {"embed_dim": torch.tensor(WIDTH), "interchange_dim": torch.tensor(WIDTH)}
    source = {"learned_source.weight": weight, "learned_source.bias": bias}
    projection = {"proj_layer.weight": other, "proj_layer.bias": more}
    r, w, p = rotated.T.double(), weight.double(), other.double()
    b, c = bias.double(), more.double()
    kinds = {
        "Consreft": ({**saved, "learned_source": bias, **sizes}, lambda h: h + r.T @ (b - r @ h)),
        "Lobireft": ({**saved, "learned_source": bias, **sizes}, lambda h: h + r.T @ b),
        "Direft": ({**saved, **source, **sizes}, lambda h: h + r.T @ (w @ h + b)),
        "Noreft": ({**projection, **source, **sizes}, lambda h: h + p.T @ (w @ h + b - (p @ h + c))),
        "Nodireft": ({**projection, **source, **sizes}, lambda h: h + p.T @ (w @ h + b)),
    }
    for kind, (tensors, formula) in kinds.items():
        edit = steer.load_edit(written(tmp_path / kind, {(0, 0): (kind, tensors)}), scope="all")
        wanted = torch.stack([formula(row) for row in hidden().double().reshape(-1, WIDTH)]).reshape(2, 5, WIDTH)
        torch.testing.assert_close(edit.operators[0](hidden()).double(), wanted, rtol=0, atol=1e-4)


def test_strength_is_the_share_of_the_change() -> None:
    weight, bias = linear(0)
    operator = LowRank(weight, bias, rotation(0).T.contiguous())
    h = hidden()
    half = LowRank(operator.reads, operator.bias, operator.writes, 0.5)
    torch.testing.assert_close(half(h), (h + operator(h)) / 2)
    assert operator.constant is None and half(h.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(LowRank(weight, bias, operator.writes, 0.0)(h), h)


def test_positions_are_those_of_pyreft() -> None:
    """`get_intervention_locations` by hand: N from an end, at most half of the prompt."""
    for length in range(1, 12):
        for number in (1, 3, 7):
            count = min(length // 2, number)
            assert range(*map(int, position(f"f{number}").bounds(length))) == range(count)
            assert range(*map(int, position(f"l{number}").bounds(length))) == range(length - count, length)
    assert str(position("l1")) == "l1" and isinstance(position("f2"), Ends)


# ---------------------------------------------------------------------------------------------------------- on a model


def test_a_model_under_it_is_the_network_with_the_formula_in_a_hook(tiny_lm: Any, tmp_path: Path) -> None:
    """Two layers and both ends, prompts of several lengths in one batch; the oracle writes one prompt at a time."""
    kinds = {(layer, group): loreft(10 * layer + group) for layer in (0, 1) for group in (0, 1)}
    for _, tensors in kinds.values():
        tensors["bias"] *= 4
    folder = written(tmp_path, kinds)
    edits = [steer.load_edit(folder, position=end, model=tiny_lm) for end in ("f1", "l2")]
    prompts = [RawText("the sun is a very good dog"), RawText("tell me about the sun"), RawText("a calm")]
    together = tiny_lm.generate(prompts, edits=edits, temperature=0, max_new_tokens=6)
    network = tiny_lm.body.network
    layers = network.model.layers
    for prompt, text in zip(prompts, together.texts, strict=True):
        ids = torch.tensor([tiny_lm.encode(prompt)])
        length = ids.shape[1]
        for _ in range(6):
            held = [layers[layer].register_forward_hook(_hook(kinds, layer, length)) for layer in (0, 1)]
            logits = network(ids, use_cache=False).logits
            for handle in held:
                handle.remove()
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) in tiny_lm.eos_token_ids:
                ids = ids[:, :-1]
                break
        assert text == tiny_lm.decode(ids[0, length:].tolist())
    assert together.texts != tiny_lm.generate(prompts, temperature=0, max_new_tokens=6).texts


def _hook(kinds: Any, layer: int, length: int) -> Any:
    def hook(module: Any, given: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        first, last = min(1, length // 2), min(2, length // 2)
        for group, places in ((0, range(first)), (1, range(length - last, length))):
            t = kinds[layer, group][1]
            for i in places:
                r = t["rotate_layer"].T
                h[:, i] = h[:, i] + (h[:, i] @ t["weight"].T + t["bias"] - h[:, i] @ r.T) @ r
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook


def test_it_is_an_artifact_like_others(tiny_lm: Any, tmp_path: Path) -> None:
    """Saved, loaded, one file of it, on the command line; the card tells the position where the configuration does."""
    folder = written(tmp_path / "reft", {(0, 0): loreft(1), (1, 0): loreft(2)}, position="l1")
    whole = steer.load_artifact(folder)
    whole.save(tmp_path / "saved.safetensors")
    asked = {"temperature": 0, "max_new_tokens": 6}
    by_folder = tiny_lm.generate(["the sun"], edits=str(folder), **asked).texts
    assert tiny_lm.generate(["the sun"], edits=str(tmp_path / "saved.safetensors"), **asked).texts == by_folder
    saved = tmp_path / "saved.safetensors"
    server = Preparer(tiny_lm, 8, 4096)
    server.check_artifact(saved)
    request = EditRequest.parse({"name": "saved", "strength": 0.5, "position": "f1"})
    served = server.read_edit(NamedEdit(saved, digest(saved), request), 1.0)
    assert isinstance(served, Reft) and str(served.scope) == "f1" and served.strength == 0.5
    one = parse_edit(f"{folder / KEY.format(1, 0)}:0.5:position=f2", tiny_lm)
    assert isinstance(one, Reft) and list(one.operators) == [1] and one.strength == 0.5 and str(one.scope) == "f2"
    assert "layers 0-1, rank 3" in repr(steer.load_edit(folder)) and "reft" in repr(whole)
    with pytest.raises(InputError, match="wrong"):
        tiny_lm.generate("the sun", edits=f"{folder}:wrong=1")


def test_vllm_refuses_it_by_name(tmp_path: Path, tiny_lm: Any) -> None:
    from steer.adapters.vllm.artifacts import PackedArtifact
    from steer.adapters.vllm.plugin.compiled import Compiled

    edit = steer.load_edit(written(tmp_path, {(0, 0): loreft()}), position="l1", model=tiny_lm)
    with pytest.raises(UnsupportedError, match="LowRank has no closed form in vLLM"):
        Compiled.of(edit, tiny_lm.info)
    saved = tmp_path / "saved.safetensors"
    steer.load_artifact(tmp_path).save(saved)
    with pytest.raises(InputError, match=r"got \"kind 'reft'\"; allowed: vector, .*transformers"):
        PackedArtifact.parse(saved.read_bytes())


# ------------------------------------------------------------------------------------------------------------ refused


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, tiny_lm: Any) -> None:
    def refused(folder: Path, *words: str, **options: Any) -> None:
        with pytest.raises(InputError) as caught:
            steer.load_edit(folder, **{"position": "l1", **options})
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value), str(caught.value)

    good = written(tmp_path / "good", {(0, 0): loreft()})
    refused(good, "position: got None", "fN", position=None)
    refused(good, "position=f1 and position=l1", position="f1+l1")
    refused(good, "position", "fN", position="all")
    refused(good, "position", scope="all")
    refused(good, "layers", layers="5")
    refused(good, "strength", strength=float("nan"))
    two = written(tmp_path / "two", {(0, 0): loreft(), (0, 1): loreft(1)})
    refused(two, "each end has its own weights", position=None, scope="all")

    pickled = written(tmp_path / "pickled", {(0, 0): loreft()})
    (pickled / KEY.format(0, 0)).rename(pickled / KEY.format(0, 0).replace(".safetensors", ".bin"))
    refused(pickled, ".bin", "pickle", "weights_only=True", "save_file")
    refused(next(pickled.glob("*.bin")), "pickle")

    kind, tensors = loreft()
    skewed = {**tensors, "rotate_layer": tensors["rotate_layer"] * 1.1}
    refused(written(tmp_path / "skewed", {(0, 0): (kind, skewed)}), "R^T R", "orthonormal")
    small = {**tensors, "weight": tensors["weight"][:2]}
    refused(written(tmp_path / "small", {(0, 0): (kind, small)}), "weight", "shape (2, 32)", "shape (3, 32)")
    broken = {**tensors, "bias": torch.full((RANK,), float("nan"))}
    refused(written(tmp_path / "broken", {(0, 0): (kind, broken)}), "bias")
    refused(written(tmp_path / "other", {(0, 0): ("Direft", tensors)}), "DireftIntervention")
    refused(
        written(tmp_path / "unknown", {(0, 0): ("Loraft", tensors)}), "intervention_types[0]", "did you mean Loreft"
    )

    for name, place, word in (
        ("part", [0, "mlp_output", "pos", 1, RANK], "component"),
        ("unit", [0, "block_output", "h.pos", 1, RANK], "unit"),
        ("link", [0, "block_output", "pos", 1, RANK, None, None, None, None, 7], "links"),
        ("layer", ["x", "block_output", "pos", 1, RANK], "layer"),
        ("short", [0], "component"),
    ):
        refused(written(tmp_path / name, {(0, 0): loreft()}, representations=[place]), "representations[0]", word)
    refused(written(tmp_path / "more", {(0, 0): loreft()}, intervention_types=[]), "representations")
    fewer = written(tmp_path / "fewer", {(0, 0): loreft(), (1, 0): loreft()})
    (fewer / KEY.format(1, 0)).unlink()
    refused(fewer, "layer 0", "layer 1")
    bare = written(tmp_path / "bare", {(0, 0): loreft()})
    (bare / "config.json").write_text("[")
    refused(bare, "config.json")
    (bare / "config.json").unlink()
    refused(bare, "no config.json")
    named = written(tmp_path / "named", {(7, 0): loreft()})
    refused(named, "layer", "0 to 1", model=tiny_lm)


def test_a_component_may_be_written_as_a_path(tmp_path: Path) -> None:
    place = [0, "model.layers[1].output", "pos", 1, RANK]
    folder = written(tmp_path, {(0, 0): loreft()}, representations=[place])
    (folder / KEY.format(0, 0)).rename(folder / "intkey_comp_model_layers[1]_output_unit_pos_nunit_1#0.safetensors")
    edit = steer.load_edit(folder, position="l1")
    assert isinstance(edit, Reft) and list(edit.operators) == [1]
