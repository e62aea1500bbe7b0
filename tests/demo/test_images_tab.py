"""The tab Images in a real browser, on the embedded diffusion model: what is shown is what the action gives."""

from __future__ import annotations

import base64
import io
import json
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import last, number, open_tab, run

STEPS, PARTICLES = 3, 3


def _recipe(**given: Any) -> Any:
    from steer.demo.recipes.images import ImagesRecipe

    small = {"steps": STEPS, "particles": PARTICLES, "methods": ["plain", "fk", "dts-star"]}
    return ImagesRecipe.parse({"model": "fashion-ddpm", **small, **given})


def _filled(tab: Any, steps: int = STEPS, particles: int = PARTICLES) -> None:
    open_tab(tab, "Images")
    tab.get_by_label("Best-of-N", exact=True).uncheck()
    number(tab, "Images that the budget pays for", particles)
    number(tab, "Steps from noise to image", steps)


def _pixels(src: str) -> bytes:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).tobytes()


def test_images_shows_what_the_action_gives(page: Any, visit: Any) -> None:
    from steer.demo.actions import images

    tab = visit()
    _filled(tab)
    tab.click("#images-go")
    tab.wait_for_function("document.querySelector('#images-note').innerText.startsWith('Done')")
    given = last(images.run(_recipe(), page.page.shared))
    assert [method["name"] for method in given["methods"]] == ["plain", "fk", "dts-star"]
    for method in given["methods"]:
        shown = tab.locator(f'#images section[aria-label="{method["title"]}"]')
        shown.locator(".mark").wait_for()
        assert shown.locator("dd").all_text_contents()[:-1] == [text for _, text, _ in method["facts"]][:-1]
        assert _pixels(shown.locator("img").get_attribute("src")) == _pixels(method["frames"][-1]["src"])
    tab.locator("#images input[type=range]").first.fill("0")
    for method in given["methods"]:
        shown = tab.locator(f'#images section[aria-label="{method["title"]}"]')
        assert shown.locator(".label").inner_text() == method["frames"][0]["label"]
        assert _pixels(shown.locator("img").get_attribute("src")) == _pixels(method["frames"][0]["src"])


def test_x0_hat_is_what_the_network_foresees() -> None:
    """The first frame of plain sampling is x0-hat of the noise that the seed gives."""
    import torch

    import steer
    from steer.demo.actions import images
    from steer.demo.actions.shared import Shared
    from steer.images import to_uint8

    model = steer.load("fashion-ddpm")
    process = model.process(steps=STEPS)
    first = process.init([""], PARTICLES, torch.Generator().manual_seed(5 * 1_000_003))
    want = to_uint8(process.preview(process.read(first)).outputs)
    given = last(images.run(_recipe(methods=["plain"], seed=5), Shared("fashion-ddpm")))
    sheet = torch.frombuffer(bytearray(_pixels(given["methods"][0]["frames"][0]["src"])), dtype=torch.uint8)
    assert torch.equal(sheet.reshape(28, PARTICLES, 28).transpose(0, 1), want[:, 0])


def test_all_forms_give_the_images_on_the_page(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from steer.cli import main
    from steer.demo.actions import images

    recipe = _recipe(methods=["best-of-n", "fk", "dts-star"], seed=3)
    given = last(images.run(recipe, page.page.shared))
    monkeypatch.chdir(tmp_path)
    best = {method["name"]: round(max(method["rewards"]), 4) for method in given["methods"]}

    def of(samples: list[dict[str, Any]]) -> float:
        return round(max(sample["reward"] for sample in samples), 4)

    for line, name in zip(recipe.commands().splitlines(), best, strict=True):
        capsys.readouterr()
        assert main([*shlex.split(line)[1:], "--json"]) == 0
        assert of(json.loads(capsys.readouterr().out)["prompts"][0]["samples"]) == best[name]
    by_command = {name: Image.open(f"{name}.png").tobytes() for name in best}
    exec(compile(recipe.python(), "python", "exec"), {})
    for name in best:
        assert of(json.loads(Path(name, "samples.json").read_text())["prompts"][0]["samples"]) == best[name]
    Path("recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    assert main(["run", "recipe.yaml"]) == 0
    assert {name: Image.open(f"{name}.png").tobytes() for name in best} == by_command
    assert recipe.curl().startswith("# A server has no route")


def test_stop_stands_still(page: Any, visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.diffusion import DiffusionProcess

    steps: list[int] = []
    plain = DiffusionProcess.propose

    def slow(process: Any, state: Any, generator: Any) -> Any:
        steps.append(state.step)
        time.sleep(0.2)  # the whole would take more than a minute
        return plain(process, state, generator)

    monkeypatch.setattr(DiffusionProcess, "propose", slow)
    tab = visit()
    _filled(tab, steps=100, particles=2)
    tab.click("#images-go")
    tab.wait_for_function("document.querySelector('#images img')")
    tab.dispatch_event("#images-stop", "click")
    began, counted = time.monotonic(), -1
    while counted != len(steps):
        assert time.monotonic() - began < 2
        counted = len(steps)
        time.sleep(0.3)
    assert 0 < counted < 400 and page.page.shared.waiting == 0
    tab.wait_for_function("document.querySelector('#images-note').innerText.includes('kept')")
    assert tab.locator("#images img").count() >= 1


def test_who_leaves_stops_the_work(page: Any) -> None:
    """An action that is closed ends its thread."""
    from steer.demo.actions import images

    before = threading.active_count()

    async def left() -> None:
        updates = images.run(_recipe(steps=100, particles=2), page.page.shared)
        async for update in updates:
            if "methods" in update:
                break
        await updates.aclose()

    run(left())
    until = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.02)
    assert threading.active_count() <= before and page.page.shared.waiting == 0


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"reward": "sentiment"}, "sentiment"),
        ({"reward": "class:"}, "class:"),
        ({"reward": "class:spoon"}, "spoon"),
        ({"reward": "'/etc'"}, "reward"),
        ({"prompt": "a spoon"}, "prompt"),
        ({"methods": []}, "methods"),
        ({"beta": float("nan")}, "beta"),
        ({"w": float("inf")}, "w"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_fields_are_named(page: Any, given: dict[str, Any], field: str) -> None:
    from steer.core import SteerError
    from steer.demo.actions import images

    with pytest.raises(SteerError, match=field):
        last(images.run(_recipe(**given), page.page.shared))


def test_the_tuning_of_a_policy_is_a_command_that_steer_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.cli import main

    monkeypatch.chdir(tmp_path)
    head, _, lines = _recipe(methods=["plain", "rlg"]).commands().partition("\nPROMPTS\n")
    Path("tuning_prompts.json").write_text(head.partition("\n")[2])
    assert main([*shlex.split(lines.splitlines()[0])[1:], "--dry-run"]) == 0


@pytest.mark.slow
def test_guidance_goes_towards_the_policy(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images under RL guidance score higher than the model's own; the forms, which tune the policy again, give them."""
    from steer.cli import main
    from steer.demo.actions import images

    recipe = _recipe(methods=["plain", "rlg"], particles=8, steps=10)
    plain, guided = last(images.run(recipe, page.page.shared))["methods"]
    assert sum(guided["rewards"]) > sum(plain["rewards"]) + 8
    monkeypatch.chdir(tmp_path)
    head, _, lines = recipe.commands().partition("\nPROMPTS\n")
    Path("tuning_prompts.json").write_text(head.partition("\n")[2])
    for line in lines.splitlines():
        capsys.readouterr()
        assert main(shlex.split(line)[1:] + (["--json"] if " generate " in line else [])) == 0
    samples = json.loads(capsys.readouterr().out)["prompts"][0]["samples"]
    assert [round(sample["reward"], 3) for sample in samples] == pytest.approx(guided["rewards"], abs=2e-3)
