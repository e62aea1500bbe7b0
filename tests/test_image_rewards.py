"""Rewards for images: exact scores and gradients on hand-made images, and tiny models from a folder."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from steer.core import InputError, Reward, RewardError, Samples, SteerError, UnsupportedError
from steer.rewards import (
    Brightness,
    Constrained,
    Contrast,
    Ensemble,
    ImageClass,
    Sharpness,
    Symmetry,
    as_reward,
    brightness,
    compressibility,
    contrast,
    incompressibility,
    lift,
    parse_reward,
    sharpness,
    symmetry,
)


def samples(images: Any, prompts: tuple[Any, ...] = ("boot",), group: list[int] | None = None) -> Samples:
    rows = torch.zeros(len(images), dtype=torch.long) if group is None else torch.tensor(group)
    return Samples(prompts=list(prompts), outputs=images, group=rows, log_weight=torch.zeros(len(images)))


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def gradient(reward: Reward, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(reward.score(samples(leaf)).sum(), leaf)
    return found


BLACK, WHITE = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
RAMP = torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(1, 1, 4, 4)  # brighter to the right
SIMPLE = (brightness, contrast, symmetry, Symmetry("vertical"), sharpness)


# ------------------------------------------------------------------------------------------------------ exact scores


def test_brightness_by_hand() -> None:
    assert brightness(samples(torch.cat([BLACK, WHITE, RAMP]))).tolist() == [-1, 1, 0]
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    assert brightness(samples(red)).tolist() == pytest.approx([2 / 3 - 1])


def test_contrast_by_hand() -> None:
    halves = torch.cat([BLACK[..., :2], WHITE[..., :2]], 3)
    assert contrast(samples(torch.cat([BLACK, WHITE, halves]))).tolist() == [0, 0, 0.5]
    assert contrast(samples(RAMP)).item() == pytest.approx(np.std([0, 0.25, 0.75, 1]))
    plain_colour = torch.tensor([1.0, 0.2, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert contrast(samples(plain_colour)).tolist() == [0]


def test_symmetry_by_hand() -> None:
    mirrored = torch.cat([RAMP, RAMP.flip(3)], 3)
    assert symmetry(samples(mirrored)).tolist() == [0]
    assert symmetry(samples(RAMP)).tolist() == [-0.75]  # differences 1, 0.5, 0.5, 1
    assert Symmetry("vertical")(samples(RAMP)).tolist() == [0]
    assert Symmetry("vertical")(samples(RAMP.transpose(2, 3))).tolist() == [-0.75]


def test_sharpness_by_hand() -> None:
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * torch.ones(1, 1, 4, 4)
    assert sharpness(samples(torch.cat([WHITE, board]))).tolist() == [0, 2]
    assert sharpness(samples(RAMP)).item() == pytest.approx(1 / 3)  # steps 0.25, 0.5, 0.25 along rows alone
    assert sharpness(samples(torch.ones(2, 1, 1, 1))).tolist() == [0, 0]


@pytest.mark.parametrize("reward", SIMPLE)
def test_rows_do_not_see_each_other_and_scores_are_in_range(reward: Reward) -> None:
    images = noise(6, 3, 5, 7)
    together = reward(samples(images))
    alone = torch.cat([reward(samples(images[i : i + 1])) for i in range(6)])
    assert torch.equal(together, alone)
    assert reward(samples(images[:0])).shape == (0,)
    assert reward(samples(images.half())).dtype == torch.float64


@pytest.mark.parametrize("reward", (*SIMPLE, incompressibility))
def test_what_lies_beyond_black_and_white_counts_as_black_and_white(reward: Reward) -> None:
    images = noise(4, 1, 6, 6) * 3 - 1
    assert torch.equal(reward(samples(images)), reward(samples(images.clamp(0, 1))))


# --------------------------------------------------------------------------------------------------------- gradients


def test_gradient_of_brightness_is_the_same_for_every_pixel() -> None:
    images = noise(2, 3, 4, 5)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -0.2, 1.3  # its gradient passes beyond the range too
    assert torch.allclose(gradient(brightness, images), torch.full_like(images, 2 / 60), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reward", SIMPLE)
def test_gradients_are_those_of_finite_differences(reward: Reward) -> None:
    images = noise(1, 3, 4, 4).double() * 0.8 + 0.1
    found, step = gradient(reward, images), 1e-6
    for at in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 3, 1)):
        up, down = images.clone(), images.clone()
        up[at] += step
        down[at] -= step
        numeric = (reward(samples(up)) - reward(samples(down))).item() / (2 * step)
        assert found[at].item() == pytest.approx(numeric, abs=1e-7)


@pytest.mark.parametrize("reward", SIMPLE)
def test_gradients_of_a_flat_image_are_finite(reward: Reward) -> None:
    assert gradient(reward, torch.full((1, 1, 4, 4), 0.3)).isfinite().all()


def test_composed_rewards_keep_the_gradient() -> None:
    images = noise(3, 1, 4, 4)
    parts = gradient(brightness, images), gradient(contrast, images)
    summed = gradient(2 * brightness - contrast / 4 + 1, images)
    assert torch.allclose(summed, 2 * parts[0] - parts[1] / 4, rtol=1e-5, atol=1e-8)
    assert torch.allclose(gradient(brightness.standardised(1, 0.5).cached(), images), 2 * parts[0])
    assert torch.equal(gradient(brightness.clip(5, 6) + brightness, images), parts[0])
    assert torch.allclose(gradient(Ensemble((brightness, contrast)), images), (parts[0] + parts[1]) / 2)
    held = Constrained(brightness, contrast, 0.1, multiplier=3.0)
    assert torch.allclose(gradient(held, images), parts[0] + 3 * parts[1], rtol=1e-5, atol=1e-8)
    assert torch.allclose(gradient(lift(lambda x: x.mean((1, 2, 3))) * 2 - 1, images), parts[0])


def test_calling_a_reward_detaches() -> None:
    leaf = noise(2, 1, 4, 4).requires_grad_()
    for reward in (brightness, 2 * brightness + contrast):
        assert not reward(samples(leaf)).requires_grad
        assert torch.equal(reward(samples(leaf)), reward(samples(leaf.detach())))


def test_a_part_without_a_gradient_is_refused_rather_than_ignored() -> None:
    leaf = noise(2, 1, 4, 4).requires_grad_()
    with pytest.raises(UnsupportedError, match="compressibility: the size of a JPEG has no gradient"):
        compressibility.score(samples(leaf))
    with pytest.raises(UnsupportedError, match="compressibility"):
        (brightness - 0.1 * compressibility).score(samples(leaf))
    with pytest.raises(UnsupportedError, match=r"lambda.*no gradient"):
        (brightness + lift(lambda images: [0.0, 1.0])).score(samples(leaf))
    with pytest.raises(RewardError, match="NaN for sample 0"):
        (brightness + lift(lambda images: images.mean((1, 2, 3)) * math.nan)).score(samples(leaf))
    with torch.no_grad():
        assert compressibility(samples(leaf)).shape == (2,)


# -------------------------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("channels", [1, 3])
def test_size_is_pillows_jpeg_of_quality_95(channels: int) -> None:
    images = torch.cat([noise(2, channels, 16, 24), torch.full((1, channels, 16, 24), 0.5)])
    expected = []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    assert incompressibility(samples(images)).tolist() == expected
    assert compressibility(samples(images)).tolist() == [-x for x in expected]
    assert expected[2] < expected[0]


# ----------------------------------------------------------------------------------------------------------- classes


class Stub:
    """Logits of three classes: the sum over the left half, over the right half, and 0."""

    def __init__(self) -> None:
        self.classes = ["T-shirt", "Boot", "bag"]

    def __call__(self, images: Tensor) -> Tensor:
        half = images.shape[3] // 2
        left, right = images[..., :half].sum((1, 2, 3)), images[..., half:].sum((1, 2, 3))
        return torch.stack([left, right, torch.zeros_like(left)], 1).log_softmax(1)


MODEL = SimpleNamespace(classifier=Stub())


def independent(images: Tensor, *index: int) -> list[float]:
    scores = []
    for image in images.double().numpy():
        half = image.shape[2] // 2
        odds = np.exp([image[..., :half].sum(), image[..., half:].sum(), 0.0])
        scores.append(math.log(odds[list(index)].sum() / odds.sum()))
    return scores


def test_class_is_the_classifiers_log_probability() -> None:
    images = noise(5, 1, 4, 6)
    bound = parse_reward("class:boot").bind(MODEL)
    assert bound(samples(images)).tolist() == pytest.approx(independent(images, 1), abs=1e-5)
    several = parse_reward('class:bag,"t-shirt"').bind(MODEL)
    assert several(samples(images)).tolist() == pytest.approx(independent(images, 2, 0), abs=1e-5)
    everything = ImageClass(("bag", "Boot", "T-shirt"), Stub())
    assert everything(samples(images)).tolist() == pytest.approx([0] * 5, abs=1e-6)
    assert gradient(bound, images).abs().min() > 0


def test_class_binds_inside_expressions() -> None:
    images = noise(2, 1, 4, 6)
    reward = parse_reward("brightness + 0.5*class:boot").bind(MODEL)
    expected = brightness(samples(images)) + 0.5 * torch.tensor(independent(images, 1), dtype=torch.float64)
    assert torch.allclose(reward(samples(images)), expected, atol=1e-5)
    assert repr(parse_reward('class:"T-shirt",boot')) == 'class:"T-shirt",boot'
    bound = ImageClass("boot").bind(MODEL)
    assert bound.bind(MODEL) is bound and bound == ImageClass(("boot",))


def test_class_errors() -> None:
    with pytest.raises(InputError, match="class: got 'shoe'; allowed: each once: T-shirt, Boot, bag"):
        parse_reward("brightness - class:shoe").bind(MODEL)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="class: got 'BOOT'"):
        ImageClass(("boot", "BOOT"), Stub())
    for model in (object(), SimpleNamespace(classifier=None)):
        with pytest.raises(UnsupportedError, match="class:boot needs a model with a classifier of images"):
            ImageClass("boot").bind(model)
    with pytest.raises(SteerError, match="class:boot: needs a model with a classifier"):
        ImageClass("boot")(samples(BLACK))
    for text in ("class", "class:boot,boot", "class:kind=boot"):
        with pytest.raises(InputError, match="class"):
            parse_reward(text)
    wrong = SimpleNamespace(classes=["boot"])
    with pytest.raises(UnsupportedError):
        ImageClass("boot").bind(SimpleNamespace(classifier=wrong))


def test_a_classifier_with_the_wrong_shape_is_named() -> None:
    class Short(Stub):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images)[:, :2]

    with pytest.raises(InputError, match=r"classifier log-probabilities: got \(1, 2\); allowed: \(1, 3\)"):
        ImageClass("boot", Short())(samples(BLACK))


# ------------------------------------------------------------------------------------------------- expressions, input


def test_expressions() -> None:
    images = noise(3, 3, 8, 8)
    reward = parse_reward("brightness - 0.1*compressibility")
    expected = brightness(samples(images)) + 0.1 * incompressibility(samples(images))
    assert torch.equal(reward(samples(images)), expected)
    for text, kind in (("contrast", Contrast), ("sharpness", Sharpness), ("brightness", Brightness)):
        assert type(parse_reward(text)) is kind
    for text in ("symmetry", "symmetry:vertical", "compressibility", "incompressibility", "sharpness", "contrast"):
        assert repr(parse_reward(text)) == text
    with pytest.raises(InputError, match="symmetry: got 'diagonal'; allowed: horizontal, vertical"):
        parse_reward("symmetry:diagonal")
    with pytest.raises(InputError, match="brightness"):
        parse_reward("brightness:high")


@pytest.mark.parametrize("reward", (*SIMPLE, compressibility, ImageClass("boot", Stub())))
def test_texts_and_other_tensors_are_refused(reward: Reward) -> None:
    with pytest.raises(InputError, match=r"reward .*: got 'a text'; allowed: outputs that are images"):
        reward(samples(["a text"]))
    for tensor in (torch.zeros(2, 8), torch.zeros(2, 4, 3, 3), torch.zeros(2, 1, 3, 3, dtype=torch.long)):
        with pytest.raises(InputError, match="outputs that are images"):
            reward(samples(tensor))


def test_callables_get_the_tensor_of_images() -> None:
    images = noise(3, 3, 4, 4)
    seen: list[Any] = []

    def rate(outputs: Tensor, prompts: list[str]) -> Tensor:
        seen.extend((outputs, prompts))
        return outputs.amax((1, 2, 3))

    rows = samples(images, ("a", "b"), [0, 1, 1])
    reward = as_reward(rate)
    assert reward is not None and torch.equal(reward(rows), images.amax((1, 2, 3)).double())
    assert seen[0] is images and seen[1] == ["a", "b", "b"]
    assert (brightness.cached()(rows) - brightness(rows)).abs().max() == 0


# ------------------------------------------------------------------------------------------------- models from a folder


def processor(folder: Path, **changes: Any) -> None:
    settings = {
        "do_resize": True,
        "size": {"shortest_edge": 16},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "image_processor_type": "CLIPImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random CLIP for images of 16 x 16, embeddings of 8 numbers, a few words and 12 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "<e>", "a", "red", "boot", "bag"])}
    rules = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.post_processor = processors.TemplateProcessing("<s> $A <e>", special_tokens=[("<s>", 1), ("<e>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", eos_token="<e>", pad_token="<e>")
    tokenizer.save_pretrained(folder)
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, "vocab_size": 8, "max_position_embeddings": 12, "eos_token_id": 7, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 2}
    vision = {**common, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.logit_scale, 1.5)
    model.save_pretrained(folder)
    processor(folder)
    return folder


def reference_cosines(folder: Path, images: Tensor, ids: list[int]) -> Tensor:
    """What transformers' own forward pass gives, on images that need no resizing."""
    from transformers import CLIPModel

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    pixels = (images.expand(-1, 3, -1, -1) - mean) / std
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids]), pixel_values=pixels)
    return (out.image_embeds @ out.text_embeds.T)[:, 0].double()


@pytest.mark.parametrize("channels", [1, 3])
def test_clip_is_the_models_own_cosine(clip: Path, channels: int) -> None:
    from steer.adapters.rewards.images import ClipReward

    images = noise(5, channels, 16, 16)
    expected = reference_cosines(clip, images, [1, 3, 4, 5, 2])
    reward = ClipReward("a red boot", clip, batch_size=2, device="cpu")
    assert torch.allclose(reward(samples(images)), expected, atol=1e-5)
    parsed = parse_reward(f'clip:"a red boot",model="{clip}"')
    assert torch.allclose(parsed(samples(images)), expected, atol=1e-5)
    assert repr(parsed) == f'clip:"a red boot",model="{clip}"'
    scaled = ClipReward("a red boot", clip, scaled=True, device="cpu")
    assert torch.allclose(scaled(samples(images)), expected * math.exp(1.5), atol=1e-4)
    assert reward(samples(images[:0])).shape == (0,)
    assert expected.std() > 1e-3


def test_clip_without_a_text_compares_with_the_prompt(clip: Path) -> None:
    from steer.adapters.rewards.images import ClipReward, PickScore

    images, chat = noise(4, 3, 16, 16), [{"role": "user", "content": "a bag"}]
    rows = samples(images, ("a red boot", chat), [1, 0, 1, 0])
    boot, bag = (reference_cosines(clip, images, ids) for ids in ([1, 3, 4, 5, 2], [1, 3, 6, 2]))
    expected = torch.stack([bag[0], boot[1], bag[2], boot[3]])
    assert torch.allclose(parse_reward(f'clip:model="{clip}"')(rows), expected, atol=1e-5)
    pick = PickScore(model=clip, processor=clip, device="cpu")
    assert torch.allclose(pick(rows), expected * math.exp(1.5), atol=1e-4)
    long = ClipReward("a red boot " * 20, clip, device="cpu")
    assert long(samples(images)).isfinite().all()
    with pytest.raises(InputError, match=r"clip.*: got 3; allowed: a prompt that is a text"):
        ClipReward(None, clip)(samples(images, (3,)))


def test_clip_has_a_gradient_and_composes(clip: Path) -> None:
    from steer.adapters.rewards.images import ClipReward

    reward, images = ClipReward("a bag", clip, batch_size=1, device="cpu"), noise(2, 1, 20, 24) * 0.8 + 0.1
    found = gradient(2 * reward + brightness, images)
    direction = torch.sign(found)
    step = 1e-3
    ahead, behind = ((2 * reward + brightness)(samples(images + s * step * direction)) for s in (1, -1))
    numeric = (ahead - behind) / (2 * step)
    assert torch.allclose(numeric, (found * direction).sum((1, 2, 3)).double(), rtol=2e-2)
    assert all(p.grad is None and not p.requires_grad for p in reward._load()[0].parameters())


@pytest.mark.parametrize("size", [(16, 16), (20, 37), (40, 23), (9, 12)])
@pytest.mark.parametrize("resample", [2, 3])
def test_images_are_prepared_as_the_processor_does(tmp_path: Path, size: tuple[int, int], resample: int) -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    from steer.adapters.rewards.images import Preparation

    processor(tmp_path, resample=resample)
    smooth = torch.nn.functional.interpolate(noise(2, 3, 4, 4), size, mode="bilinear")
    images = (smooth * 255).round() / 255
    theirs = pil.CLIPImageProcessorPil.from_pretrained(tmp_path)
    listed = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    expected = torch.tensor(np.stack(theirs(listed)["pixel_values"]))
    ours = Preparation.read(str(tmp_path))(images)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1.6 / 255 / 0.26  # theirs rounds to bytes after resizing


def test_processors_of_other_kinds() -> None:
    from steer.adapters.rewards.images import Preparation

    old = Preparation.of({"size": 224, "crop_size": 224, "do_center_crop": True, "image_mean": [0] * 3})
    assert (old.size, old.crop, old.mode) == (224, (224, 224), "bicubic")
    vit = Preparation.of({"size": 30, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert (vit.size, vit.crop, vit.mode) == ((30, 30), None, "bilinear")
    assert vit(noise(1, 1, 8, 9)).shape == (1, 3, 30, 30)
    plain = Preparation.of({"do_resize": False, "do_normalize": False})
    assert torch.equal(plain(noise(1, 3, 8, 9)), noise(1, 3, 8, 9))
    with pytest.raises(InputError, match="image processor: got 'crop_pct'"):
        Preparation.of({"crop_pct": 0.9})
    with pytest.raises(InputError, match="resample: got 1"):
        Preparation.of({"resample": 1})
    with pytest.raises(InputError, match=r"crop_size: got \(9, 9\)"):
        Preparation.of({"do_resize": False, "do_center_crop": True, "crop_size": 9})(noise(1, 3, 8, 8))


@pytest.fixture
def head(tmp_path: Path) -> tuple[Path, list[tuple[Tensor, Tensor]]]:
    from safetensors.torch import save_file

    layers = [(torch.randn(b, a), torch.randn(b)) for a, b in ((8, 5), (5, 3), (3, 1))]
    names = ("layers.0", "layers.2", "layers.10")  # numbers, not texts, are in order
    tensors = {
        f"{n}.{part}": x
        for n, layer in zip(names, layers, strict=True)
        for part, x in zip(("weight", "bias"), layer, strict=True)
    }
    save_file({**tensors, "vision_model.layers.0.norm.weight": torch.zeros(4)}, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors", layers


def test_aesthetic_head_is_applied_to_the_normalised_embedding(clip: Path, head: Any) -> None:
    from transformers import CLIPModel

    file, layers = head
    images = noise(3, 3, 16, 16)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        ids = torch.tensor([[1, 2]])
        x = model(input_ids=ids, pixel_values=(images - mean) / std).image_embeds  # already of norm 1
        for weight, bias in layers:
            x = x @ weight.T + bias
    reward = parse_reward(f'aesthetic:head="{file}",model="{clip}"')
    assert torch.allclose(reward(samples(images)), x[:, 0].double(), atol=1e-4)
    assert repr(reward) == f'aesthetic:head="{file}",model="{clip}"'
    assert gradient(reward, images).abs().max() > 0


def test_aesthetic_heads_from_the_hub_and_wrong_ones(
    clip: Path, head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from steer.adapters.rewards.images import AestheticReward, _head

    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or str(head[0]))
    assert len(_head("org/name", 8)) == len(_head("org/name/sub/a+b.safetensors", 8)) == 3
    assert asked == [("org/name", "model.safetensors"), ("org/name", "sub/a+b.safetensors")]
    one = {"weight": torch.ones(1, 8), "bias": torch.zeros(1)}
    save_file(one, tmp_path / "one.safetensors")
    assert _head(str(tmp_path / "one.safetensors"), 8)[0][0].tolist() == [[1.0] * 8]
    for width in (7, 16):
        with pytest.raises(InputError, match=f"aesthetic head: got .*linear layers from {width} numbers to 1"):
            _head(str(head[0]), width)
    for wrong in ("weights.pth", "org/name/weights.pth", "", str(clip)):
        with pytest.raises(InputError, match="aesthetic head"):
            AestheticReward(wrong)


def test_image_classifier_gives_log_probabilities_of_a_label(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from steer.adapters.rewards.images import ImageClassifierReward

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        id2label={0: "T-shirt", 1: "boot", 2: "bag"},
        label2id={"T-shirt": 0, "boot": 1, "bag": 2},
    )
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    processor(
        tmp_path, do_center_crop=False, size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images = noise(5, 1, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values=images.expand(-1, 3, -1, -1) * 2 - 1).logits.log_softmax(1)[:, 1]
    reward = parse_reward(f'classifier:boot,model="{tmp_path}"')
    assert torch.allclose(reward(samples(images)), expected.double(), atol=1e-5)
    assert repr(2 * reward) == f'2*classifier:boot,model="{tmp_path}"'
    assert gradient(reward, images).abs().max() > 0
    total = sum(ImageClassifierReward(tmp_path, i, batch_size=2)(samples(images)).exp() for i in range(3))
    assert torch.allclose(total, torch.ones(5, dtype=torch.float64), atol=1e-5)
    with pytest.raises(InputError, match=r"label: got 'shoe'; allowed: 0 \(T-shirt\), 1 \(boot\), 2 \(bag\)"):
        ImageClassifierReward(tmp_path, "shoe")
    model.vit.save_pretrained(tmp_path)
    with pytest.raises(SteerError, match="no trained classifier; it lacks classifier"):
        ImageClassifierReward(tmp_path, "boot")(samples(images))


def test_models_are_refused_in_text_from_a_stranger(clip: Path, tmp_path: Path) -> None:
    for text in (f'clip:boot,model="{clip}"', "brightness + clip", "pickscore", 'aesthetic:head="a/b"'):
        with pytest.raises(InputError) as refused:
            parse_reward(text, trusted=False)
        assert "brightness" in str(refused.value) and "clip" not in str(refused.value).partition("allowed")[2]
    assert parse_reward("brightness + class:boot", trusted=False)
    assert repr(parse_reward('pickscore:"a boot"')) == 'pickscore:"a boot"'
    with pytest.raises(InputError, match="aesthetic:head"):
        parse_reward("aesthetic")
    with pytest.raises(InputError, match=r"config\.json"):
        parse_reward(f'clip:boot,model="{tmp_path}/nothing"')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SteerError, match="cannot load"):
        parse_reward(f'clip:boot,model="{tmp_path}"')(samples(BLACK))
