"""Images from idx files, the denoiser's and the classifiers' training, and the embedded diffusion model as shipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steer.core import InputError, SteerError
from steer.train.fashion.classifier import ClassifierSettings, accuracy, augment, train_classifier
from steer.train.fashion.denoiser import (
    DenoiserSettings,
    linear_alphas,
    to_images,
    to_latents,
    train_denoiser,
    velocity_loss,
)
from steer.train.fashion.images import FASHION_CLASSES, idx_sha256, read_idx
from steer.train.fashion.nets import JudgeNet, RewardNet, load_net, read_facts, save_net

SHIPPED = Path(__file__).parent.parent / "recipes" / "fashion-ddpm"


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 `[count, 28, 28]` with one bright bar each, whose height is its class, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    rows = torch.arange(28).view(1, -1, 1)
    bright = (rows // 2 - 3 == labels.view(-1, 1, 1)).expand(-1, 28, 28)
    speckle = torch.randint(0, 40, (count, 28, 28), generator=generator)
    return (bright * 200 + speckle).to(torch.uint8), labels


def write_idx(folder: Path, split: str, images: Tensor, labels: Tensor, packed: bool = True) -> None:
    """The two files of a split, as they are published."""
    for name, tensor in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
        head = bytes([0, 0, 8, tensor.dim()]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
        content = head + tensor.to(torch.uint8).numpy().tobytes()
        folder.mkdir(exist_ok=True)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with 192 training and 40 test images of bars."""
    folder = tmp_path / "data"
    write_idx(folder, "train", *bars(192, 0))
    write_idx(folder, "t10k", *bars(40, 1), packed=False)
    return folder


class Line(nn.Module):
    """A denoiser small enough to be trained in a test; raises `KeyboardInterrupt` at call number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stop, self.calls = stop, 0
        self.classes = nn.Embedding(11, 4)
        self.level = nn.Linear(1, 4)
        self.mix = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        more = torch.cat([self.classes(labels), self.level(level.view(-1, 1) / 1000)], 1)
        return self.mix(torch.cat([x, more.view(-1, 8, 1, 1).expand(-1, -1, *x.shape[2:])], 1))


# ------------------------------------------------------------------------------------------------------------- images


def test_idx_files_are_read_plain_and_packed(data: Path) -> None:
    for split, expected in (("train", bars(192, 0)), ("test", bars(40, 1))):
        images, labels = read_idx(data, split)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    packed = idx_sha256(data)
    assert len(packed) == 4
    write_idx(data, "train", *bars(192, 0), packed=False)
    (data / "train-images-idx3-ubyte.gz").unlink()
    assert idx_sha256(data) == packed


def test_what_is_no_idx_file_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_idx(tmp_path / "nowhere")
    with pytest.raises(InputError, match="split"):
        read_idx(data, "validation")
    path = data / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    for damaged, reason in (
        (gzip.compress(b"\0\0\x0d\x03" + whole[4:]), "begins with 00000d03"),
        (gzip.compress(whole[:-1]), "as its header says"),
        (gzip.compress(whole[:3]), "idx file"),
        (gzip.compress(whole[:9]), "as its header says"),
        (path.read_bytes()[:-20], "cannot be read"),
        (b"not gzip", "cannot be read"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=reason):
            read_idx(data)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        read_idx(data)
    write_idx(data, "train", bars(192, 0)[0], torch.zeros(191))
    with pytest.raises(InputError, match="one label for each image"):
        read_idx(data)
    write_idx(data, "train", bars(192, 0)[0], torch.full((192,), 10))
    with pytest.raises(InputError, match="label 10"):
        read_idx(data)
    write_idx(data, "train", torch.zeros(192, 28, 27), torch.zeros(192))
    with pytest.raises(InputError, match="images of shape"):
        read_idx(data)


# ----------------------------------------------------------------------------------------------------------- denoiser


def test_latents_are_pixel_unshuffled_and_come_back_exactly() -> None:
    images, _ = bars(5, 0)
    latents = to_latents(images)
    plain = nn.functional.pixel_unshuffle(images.unsqueeze(1).float() / 127.5 - 1, 2)
    assert torch.equal(latents, plain)
    assert torch.equal((to_images(latents) * 255).round().to(torch.uint8)[:, 0], images)


def test_the_right_velocity_has_no_loss() -> None:
    """From x_t and the true velocity, x_0 = a x_t - s v."""
    alphas, generator = linear_alphas(), torch.Generator().manual_seed(0)
    assert alphas.shape == (1000,) and float(alphas[0]) == pytest.approx(1 - 1e-4)
    clean, noise = (torch.randn(3, 4, 14, 14, generator=generator) for _ in range(2))
    level = torch.tensor([0, 400, 999])
    a, s = (x[level].sqrt().view(-1, 1, 1, 1) for x in (alphas, 1 - alphas))

    class Truth(nn.Module):
        def forward(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
            velocity = a * noise - s * clean
            assert torch.allclose(a * x - s * velocity, clean, atol=1e-4)
            return velocity

    assert float(velocity_loss(Truth(), clean, level, level, noise, alphas)) == 0


def test_the_loss_falls_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    images, labels = bars(40, 0)
    settings = DenoiserSettings(steps=40, batch_size=8, learning_rate=1e-2, ema=0.9, seed=3)
    whole, history = train_denoiser(Line(), images, labels, settings, every=10)
    assert len(history) == 4 and history[-1] < 0.7 * history[0]
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(Line(stop=26), images, labels, settings, every=10, work=tmp_path)
    resumed = Line()
    again, told = train_denoiser(resumed, images, labels, settings, every=10, work=tmp_path)
    assert resumed.calls == 40 - 20
    assert told == history and all(torch.equal(again[name], whole[name]) for name in whole)
    assert not torch.equal(again["mix.weight"], resumed.mix.weight)
    with pytest.raises(InputError, match="work"):
        train_denoiser(Line(), images.flip(0), labels, settings, every=10, work=tmp_path)


def test_hidden_classes_are_shown_as_the_null_class() -> None:
    images, labels = bars(40, 0)
    seen = []

    class Watching(Line):
        def forward(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
            seen.append((level, labels))
            return super().forward(x, level, labels)

    train_denoiser(Watching(), images, labels, DenoiserSettings(steps=20, batch_size=40, label_dropout=0.25))
    levels, shown = (torch.stack(x) for x in zip(*seen, strict=True))
    assert 0.18 < float((shown == 10).float().mean()) < 0.32
    assert bool((levels // 25 == torch.arange(40)).all()), "one level from each of 40 equal ranges"


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 2.5), ("ema", 1.0), ("label_dropout", 1.2), ("learning_rate", 0), ("beta_end", 1.0)],
)
def test_settings_of_a_denoiser_are_checked(name: str, value: float) -> None:
    with pytest.raises(InputError):
        DenoiserSettings(**{name: value})  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- classifiers


def test_augmented_images_keep_shape_and_range() -> None:
    images = bars(8, 0)[0].unsqueeze(1).float() / 255
    same = augment(images, ClassifierSettings(shift=0), torch.Generator().manual_seed(0))
    assert torch.equal(same, images)
    settings = ClassifierSettings(shift=2, noise=0.5, blur=0.5)
    changed = augment(images, settings, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape and float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert all(not torch.equal(a, b) for a, b in zip(changed, images, strict=True))


@pytest.mark.parametrize("kind", [RewardNet, JudgeNet])
def test_a_classifier_learns_and_comes_back_from_disk(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = kind()
    settings = ClassifierSettings(epochs=3, batch_size=16, shift=0, noise=0.1, blur=0.2)
    history = train_classifier(net, *bars(256, 0), settings)
    assert history[-1] < history[0]
    right = accuracy(net, *bars(100, 1))
    assert right > 0.95
    save_net(tmp_path / "net", net, {"test_accuracy": right})
    loaded = load_net(tmp_path / "net")
    assert type(loaded) is kind and read_facts(tmp_path / "net") == {"test_accuracy": right}
    images = (bars(4, 2)[0].unsqueeze(1).float() / 255).requires_grad_(True)
    scores = loaded(images)
    assert torch.equal(scores, net(images))
    assert torch.allclose(scores.exp().sum(-1), torch.ones(4), atol=1e-5)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), images)
    assert float(gradient.abs().sum()) > 0
    if isinstance(loaded, JudgeNet):
        assert loaded.features(images).shape == (4, 64)


def test_a_resumed_classifier_is_the_same_classifier(tmp_path: Path) -> None:
    images, labels = bars(64, 0)

    class Stopping(JudgeNet):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(images)

    Stopping.__name__ = "JudgeNet"
    settings = ClassifierSettings(epochs=3, batch_size=32, noise=0.2)
    nets: list[nn.Module] = []
    for build, work in ((JudgeNet, None), (Stopping, tmp_path), (JudgeNet, tmp_path)):
        torch.manual_seed(0)
        nets.append(build())
        if build is Stopping:
            with pytest.raises(KeyboardInterrupt):
                train_classifier(nets[-1], images, labels, settings, work=work)
        else:
            torch.manual_seed(len(nets))
            train_classifier(nets[-1], images, labels, settings, work=work)
    whole, resumed = nets[0].state_dict(), nets[2].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_folder_without_a_whole_net_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_net(tmp_path)
    with pytest.raises(InputError, match="RewardNet, JudgeNet"):
        save_net(tmp_path, nn.Linear(1, 1), {})
    with pytest.raises(InputError, match="facts"):
        save_net(tmp_path, RewardNet(), {"loss": float("nan")})
    save_net(tmp_path, RewardNet(), {})
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("RewardNet", "JudgeNet"))
    with pytest.raises(InputError, match="whole safetensors of a JudgeNet"):
        load_net(tmp_path)
    for broken in ("{", "[]", config.replace("RewardNet", "Other"), config.replace('"classes": 10', '"classes": "x"')):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(InputError):
            load_net(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(InputError, match="whole safetensors"):
        load_net(tmp_path)


# --------------------------------------------------------------------------------------------------- the whole recipe


def test_the_recipe_writes_a_model_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from steer.adapters.diffusers.fashion import draw_images, load_unet, main, train_fashion

    out = tmp_path / "made"
    card = train_fashion(data, out, steps=2, batch_size=8, epochs=1, measured=1, work=tmp_path / "work")
    assert json.loads((out / "MODEL_CARD.json").read_text()) == json.loads(json.dumps(card))
    assert card["training"]["steps"] == 2 and card["data"]["sha256"] == idx_sha256(data)
    assert sorted(p.name for p in out.iterdir()) == ["MODEL_CARD.json", "classifier", "judge", "scheduler", "unet"]
    unet, scheduler = load_unet(out)
    labels = torch.tensor([0, 10])
    drawn = draw_images(unet, scheduler, labels, steps=2, seed=5)
    assert drawn.shape == (2, 1, 28, 28) and torch.equal(drawn, draw_images(unet, scheduler, labels, steps=2, seed=5))
    with pytest.raises(InputError, match="out"):
        train_fashion(data, out)
    assert main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    (out / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(SteerError, match="not a model that can be loaded"):
        load_unet(out)


def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    from steer.adapters.diffusers.fashion import draw_images, load_unet

    card = json.loads((SHIPPED / "MODEL_CARD.json").read_text())
    assert tuple(card["classes"]) == FASHION_CLASSES
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 3_500_000
    unet, scheduler = load_unet(SHIPPED)
    reward, judge = load_net(SHIPPED / "classifier"), load_net(SHIPPED / "judge")
    assert isinstance(reward, RewardNet) and isinstance(judge, JudgeNet)
    wanted = torch.arange(10).repeat(6)
    drawn = draw_images(unet, scheduler, wanted, steps=12, seed=0)
    seen = [net(drawn).argmax(-1) for net in (reward, judge)]
    assert float((seen[0] == seen[1]).float().mean()) > 0.8
    assert float((seen[1] == wanted).float().mean()) > 0.75
