"""Images become bytes and files exactly as they are; pictures of lineages and trees show what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steer.core import InputError, SteerError
from steer.images import MARGIN, save_png, to_pil, to_uint8
from steer.pictures import lineage, tree_layout
from steer.pictures.lineage import draw_lineage, draw_previews
from steer.pictures.tree import draw_tree


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_bytes_are_rounded_and_clamped() -> None:
    images = torch.tensor([0.0, 1.0, 0.2, 0.5, -0.3, 1.4, 0.4990, 1 / 255]).view(1, 1, 2, 4)
    assert to_uint8(images).flatten().tolist() == [0, 255, 51, 128, 0, 255, 127, 1]
    assert to_uint8(images.half()).dtype == torch.uint8
    assert len(to_uint8(torch.zeros(0, 3, 2, 2))) == 0


def test_pillow_images_keep_rows_columns_and_colours() -> None:
    images = torch.rand(2, 3, 4, 5)
    for image, pixels in zip(to_pil(images), images, strict=True):
        assert (image.mode, image.size) == ("RGB", (5, 4))
        assert np.array_equal(np.asarray(image), (pixels.permute(1, 2, 0) * 255).round().byte().numpy())
    grey = to_pil(images[:, :1])[0]
    assert grey.mode == "L" and grey.getpixel((4, 1)) == round(float(images[0, 0, 1, 4]) * 255)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 0, 4), torch.zeros(1, 3, 4, 4).byte()],
)
def test_other_tensors_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"images: got .*allowed: a float tensor \[N, 1 or 3, H, W\]"):
        to_uint8(images)


def test_grid_has_every_pixel_in_its_place(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 2, 3)
    save_png(tmp_path / "a.png", images, columns=2, scale=4)
    grid = opened(tmp_path / "a.png")
    assert grid.shape == (3 * (8 + MARGIN) + MARGIN, 2 * (12 + MARGIN) + MARGIN, 3)
    rebuilt = np.full_like(grid, 255)
    for i, pixels in enumerate(images):
        y, x = MARGIN + i // 2 * (8 + MARGIN), MARGIN + i % 2 * (12 + MARGIN)
        large = (pixels.permute(1, 2, 0) * 255).round().byte().numpy().repeat(4, 0).repeat(4, 1)
        rebuilt[y : y + 8, x : x + 12] = large
    assert np.array_equal(grid, rebuilt)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("size", "tile"), [((28, 28), (84, 84)), ((64, 32), (192, 96)), ((100, 90), (100, 90)), ((1, 400), (1, 400))]
)
def test_small_images_are_enlarged_by_a_whole_factor(
    tmp_path: Path, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    save_png(tmp_path / "a.png", torch.zeros(1, 1, *size))
    assert opened(tmp_path / "a.png").shape[:2] == (tile[0] + 2 * MARGIN, tile[1] + 2 * MARGIN)


def test_grid_is_about_square_and_captions_stand_below(tmp_path: Path) -> None:
    images = torch.ones(7, 1, 28, 28)
    save_png(tmp_path / "plain.png", images)
    assert opened(tmp_path / "plain.png").shape[:2] == (3 * (84 + MARGIN) + MARGIN,) * 2
    captions = torch.tensor([0.125, -3.0, 1e6, 2, 2, 2, 2])
    save_png(tmp_path / "number.png", images, captions=captions)
    save_png(tmp_path / "text.png", images, captions=["0.12", "-3.00", "1000000.00", *["2.00"] * 4])
    number = opened(tmp_path / "number.png")
    assert np.array_equal(number, opened(tmp_path / "text.png"))
    rows = (number < 255).any((1, 2))
    assert not rows[: MARGIN + 84].any() and rows[MARGIN + 84 : MARGIN + 102].any()
    save_png(tmp_path / "long.png", images[:1], captions=["a caption that is much wider than its image\nand has lines"])
    ink = (opened(tmp_path / "long.png") < 200).any((0, 2)).nonzero()[0]
    assert ink.min() >= MARGIN and ink.max() < MARGIN + 84


def test_bad_grids_leave_no_file(tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 4, 4)
    bad = [{"columns": 0}, {"scale": 0}, {"scale": 1.5}, {"captions": ["one"]}]
    for options, field in zip(bad, ("columns", "scale", "scale", "captions"), strict=True):
        with pytest.raises(InputError, match=f"{field}: got"):
            save_png(tmp_path / "a.png", images, **options)  # type: ignore[arg-type]
    for broken in (images[:0], torch.full((1, 1, 2, 2), float("nan"))):
        with pytest.raises(InputError, match="images: got"):
            save_png(tmp_path / "a.png", broken)
    (tmp_path / "file").touch()
    with pytest.raises(SteerError, match="cannot write"):
        save_png(tmp_path / "file" / "a.png", images)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------------------------------- pictures


def test_lines_of_a_lineage_never_cross() -> None:
    generator = np.random.default_rng(0)
    parents = [generator.integers(0, 9, 9) for _ in range(6)]
    places = lineage._uncrossed(parents)
    for parent, before, after in zip(parents, places[:-1], places[1:], strict=True):
        assert sorted(after) == list(range(9))
        assert (np.diff(before[parent][np.argsort(after)]) >= 0).all()


def test_survivors_by_hand() -> None:
    alive = lineage._surviving([np.array([0, 0, 2]), np.array([1, 1, 1])])
    assert [a.tolist() for a in alive] == [[True, False, False], [False, True, False], [True, True, True]]


def test_best_path_and_most_visited_nodes_by_hand() -> None:
    up = np.array([-1, 0, 0, 1, 1, 2, 3, 4, 5])
    depth = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3])
    worth = np.array([0, 9, 1, 8, 0, 5, 1, np.nan, 7.0])
    count = np.array([4, 2, 2, 1, 1, 2, 1, 1, 1.0])
    best = tree_layout.best_path(up, depth, worth)
    assert best == [0, 2, 5, 8]
    assert tree_layout.most_visited(up, depth, worth, count, best, 5) == [0, 1, 2, 5, 8]
    assert tree_layout.most_visited(up, depth, worth, count, best, 7) == [0, 1, 2, 3, 5, 6, 8]
    rows = tree_layout.layered(up, depth, [0, 1, 2, 3, 5, 6, 8])
    assert rows == {6: 0, 3: 0, 1: 0, 8: 1, 5: 1, 2: 1, 0: 0.5}


def test_images_beside_a_tree_do_not_overlap() -> None:
    placed = tree_layout.spread([9.0, 8.9, 8.8, 1.0], 1.0, 0.0, 10.0)
    assert placed == [9.0, 8.0, 7.0, 1.0]
    assert tree_layout.spread([0.1, 0.1], 1.0, 0.0, 10.0) == [1.5, 0.5]


@pytest.mark.parametrize(("count", "times", "extra"), [(1, 1, 0), (4, 3, 1), (40, 2, 0)])
def test_lineage_is_drawn(tmp_path: Path, count: int, times: int, extra: int) -> None:
    torch.manual_seed(0)
    ancestors = [torch.randint(0, count, (count,)) for _ in range(times)]
    thumbnails = [torch.rand(count, 3, 6, 4) for _ in range(times + extra)]
    rewards = [torch.randn(count) for _ in range(times + extra)]
    draw_lineage(tmp_path / "full.png", ancestors, thumbnails, rewards, list(range(times + extra)))
    draw_lineage(tmp_path / "bare.png", ancestors)
    full, bare = opened(tmp_path / "full.png"), opened(tmp_path / "bare.png")
    assert (full < 250).any() and (bare < 250).any()
    assert np.ptp(full.astype(int), axis=2).max() > 100  # coloured by reward


def test_tree_is_drawn_whole_cut_and_alone(tmp_path: Path) -> None:
    parent, level = [-1, 0, 0, 1, 2, 2], [0, 1, 1, 2, 2, 2]
    value, visits = [0, 1, float("nan"), 2, 3, -40], [3, 1, 2, 1, 1, 1]
    thumbnails = {i: torch.rand(1, 5, 5) for i in range(6)}
    draw_tree(tmp_path / "a.png", parent, level, value, visits, thumbnails)
    draw_tree(tmp_path / "b.png", parent, level, value, visits, max_nodes=2)
    draw_tree(tmp_path / "c.png", [-1], [0], [float("nan")], [0])
    for name in "abc":
        assert (opened(tmp_path / f"{name}.png") < 250).any()
    orange = (opened(tmp_path / "a.png") == (0xC2, 0x57, 0x1A)).all(2)
    assert orange.any()  # the best path


def test_previews_are_drawn(tmp_path: Path) -> None:
    black, white = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4) * 1.2
    draw_previews(tmp_path / "a.png", [black, white, black], [0, 5, 9])
    picture = opened(tmp_path / "a.png")
    row = picture[picture.shape[0] // 2, :, 0]
    runs = np.flatnonzero(np.diff((row < 10).astype(int)) == 1)
    assert len(runs) == 2  # two black tiles with a white one between them


def test_bad_pictures_are_refused(tmp_path: Path) -> None:
    ancestors, path = [torch.tensor([0, 1])], tmp_path / "a.png"
    image = torch.zeros(2, 1, 2, 2)
    with pytest.raises(InputError, match=r"ancestors: got \[0, 2\]; allowed: 2 indices from 0 to 1"):
        draw_lineage(path, [torch.tensor([0, 2])])
    with pytest.raises(InputError, match="ancestors: got 0"):
        draw_lineage(path, [])
    with pytest.raises(InputError, match="steps: got 3; allowed: 1, or 2 with the result"):
        draw_lineage(path, ancestors, steps=[1, 2, 3])
    with pytest.raises(InputError, match=r"rewards: got \[1\]; allowed: 2 in every column"):
        draw_lineage(path, ancestors, rewards=[torch.zeros(1)])
    with pytest.raises(InputError, match="parent: got"):
        draw_tree(path, [-1, 0], [0, 0], [0, 0], [1, 1])
    with pytest.raises(InputError, match=r"visits: got \(1,\)"):
        draw_tree(path, [-1, 0], [0, 1], [0, 0], [1])
    with pytest.raises(InputError, match="previews: got 1"):
        draw_previews(path, [image], [0, 1])
    with pytest.raises(InputError, match="one shape in every column"):
        draw_previews(path, [image, image[:1]], [0, 1])
    assert not path.exists()
