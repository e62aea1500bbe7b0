"""`steer serve` with the embedded model, where it has been fetched: what users will do first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from serving_tools import serving_here, write_vector

from steer.embedded import find

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not find("smollm2-135m").fetched,
        reason="smollm2-135m is not in the cache: run `steer models fetch smollm2-135m`",
    ),
]
PROMPTS = ["My day at the lake", "Describe the new neighbour.", "Name three colours."]


def test_the_embedded_model_served(tmp_path: Path) -> None:
    """Steered, plain and searched texts, at once and streamed, equal those of the model itself."""
    from steer.edits import load_edit
    from steer.loading import load

    model = load("smollm2-135m")
    path = write_vector(tmp_path / "bright.safetensors", model.info, width=576, layers=tuple(range(10, 20)))
    edit = load_edit(path, 0.15, model=model)
    with serving_here("smollm2-135m", "--artifacts", tmp_path) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)

        def ask(i: int, **more: Any) -> Any:
            messages: Any = [{"role": "user", "content": PROMPTS[i % 3]}]
            steer = {"steer": {"edits": [{"name": "bright", "strength": 0.15}]}} if i % 2 else {}
            return client.chat.completions.create(
                model="smollm2-135m", messages=messages, temperature=0, max_tokens=12, extra_body=steer, **more
            )

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        texts = [answer.choices[0].message.content for answer in answers]
        alone = [
            model.generate(PROMPTS[i % 3], edits=edit if i % 2 else (), temperature=0, max_new_tokens=12).texts[0]
            for i in range(6)
        ]
        assert texts == alone and len(set(texts)) > 3
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(1, stream=True)]
        assert "".join(pieces) == texts[1] and len(pieces) > 8
        best = client.completions.create(
            model="smollm2-135m",
            prompt="The best thing about",
            max_tokens=10,
            seed=1,
            extra_body={"steer": {"sampler": "best-of-n", "candidates": 6, "reward": "sentiment"}},
        )
        assert best.steer["candidates"] == 6 and best.choices[0].steer["reward"] == best.steer["reward"]
