"""Artifacts by name: a hub on the loopback, features of sparse autoencoders, and presets as models of their own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import steer
from steer.cli import main
from steer.core import InputError
from steer.sae import import_sae, read_feature

PAIRS = [{"positive": "the sun is good", "negative": "the rain is bad"}, {"positive": "happy", "negative": "sad"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as uploads and downloads of small files need."""

    files: ClassVar[dict[str, bytes]] = {}

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, found: Any) -> None:
        self._send(200, json.dumps(found).encode(), Content_Type="application/json")

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body = self._read()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self._json({"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}", "id": "1"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            repository = self.path.split("/api/models/")[1].split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{repository}/{line['value']['path']}"] = content
            where = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
            self._json({"commitUrl": where, "commitOid": COMMIT, "pullRequestUrl": None})
        else:
            self._json({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            repository = self.path.removeprefix("/api/models/").split("/revision/")[0].split("?")[0].split("/tree/")[0]
            mine = [name.removeprefix(f"{repository}/") for name in self.files if name.startswith(f"{repository}/")]
            if "/tree/" in self.path:
                self._json([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in mine])
            else:
                self._json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in mine]})
            return
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        data = self.files.get(f"{repository}/{rest.partition('/')[2]}")
        if data is None:
            self._send(404, b"no", X_Error_Code="EntryNotFound")
            return
        tag = hashlib.sha256(data).hexdigest()
        self._send(200, data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT, X_Linked_Size=str(len(data)))

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    """Where the hub of this process listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def hub(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """A hub in this process, which `huggingface_hub` is told of as it is by HF_ENDPOINT when it is imported."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    api = HfApi(endpoint=address, token="hf_of_the_tests")
    cache = {"endpoint": address, "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: hf_hub_download(*a, **{**cache, **k}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Hub.files


@pytest.fixture(scope="module")
def vector(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS)


def test_a_vector_goes_to_a_hub_and_comes_back_by_its_name(
    hub: dict[str, bytes], tiny_lm: Any, vector: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector.save(tmp_path / "up.safetensors")
    report = steer.evaluate(tiny_lm, ["the sun", "a cat"], vector, strengths=[0.2], max_new_tokens=4, control=False)
    report.write(tmp_path / "sweep")
    line = f"push {tmp_path / 'up.safetensors'} me/up --report {tmp_path / 'sweep'}"
    assert main(line.split()) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == "hf://me/up/up.safetensors\n"
    page = hub["me/up/README.md"].decode()
    assert "tags: [steer, vector]" in page and "perplexity" in page and 'edits="hf://me/up/up.safetensors:0.15"' in page
    for address in ("hf://me/up/up.safetensors", "hf://me/up", f"hf://me/up@{COMMIT}"):
        back = steer.load_artifact(address)
        assert back.card == vector.card and all(torch.equal(back.tensors[k], x) for k, x in vector.tensors.items())
    want = tiny_lm.generate("the sun", edits=vector(0.5), seed=0, max_new_tokens=5).tokens
    assert tiny_lm.generate("the sun", edits="hf://me/up:0.5", seed=0, max_new_tokens=5).tokens == want
    assert main(["push", str(tmp_path / "absent.safetensors"), "me/up"]) == 2
    assert main(["push", str(tmp_path / "up.safetensors"), "me/up", "--report", str(tmp_path)]) == 2
    assert [line.split(":")[2].strip() for line in capsys.readouterr().err.strip().splitlines()] == ["file", "report"]


@pytest.mark.slow
def test_another_hub_is_named_by_the_environment(
    address: str, tiny_lm_dir: Path, tiny_lm: Any, vector: Any, tmp_path: Path
) -> None:
    """`steer push` and `steer serve` in processes of their own, told of the hub by HF_ENDPOINT alone."""
    from openai import OpenAI
    from serving_tools import serving

    vector.save(tmp_path / "up.safetensors")
    told = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_of_the_tests", "HF_HUB_CACHE": str(tmp_path / "cache")}
    told |= {"HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "steer", "push", str(tmp_path / "up.safetensors"), "me/up"]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, timeout=120)
    assert done.stdout == "hf://me/up/up.safetensors\n", done.stderr
    options = ["--name", "tiny", "--preset", "calm=hf://me/up:0.6", "--dtype", "float32"]
    with serving(tiny_lm_dir, *options, **told) as running:
        client = OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"prompt": "the sun", "max_tokens": 6, "temperature": 0}
        text = client.completions.create(model="tiny:calm", **asked).choices[0].text
    mine = tiny_lm.generate(steer.RawText("the sun"), edits=vector(0.6), temperature=0, max_new_tokens=6)
    assert text == mine.texts[0]


def test_features_of_both_layouts_are_decoder_rows(tiny_lm: Any, tmp_path: Path) -> None:
    decoder = torch.randn(6, tiny_lm.info.width, generator=torch.Generator().manual_seed(0))
    lens = tmp_path / "lens"
    lens.mkdir()
    save_file({"W_dec": decoder, "b_dec": torch.zeros(tiny_lm.info.width)}, lens / "sae_weights.safetensors")
    (lens / "cfg.json").write_text(json.dumps({"hook_name": "blocks.1.hook_resid_pre", "d_sae": 6}))
    scope = tmp_path / "layer_1" / "width_6" / "average_l0_2"
    scope.mkdir(parents=True)
    np.savez(scope / "params.npz", W_dec=decoder.numpy(), threshold=np.zeros(6))
    for source, layer, layout in ((lens, 0, "saelens"), (scope / "params.npz", 1, "gemma-scope")):
        made = import_sae(source, 4, tiny_lm.info)
        assert made.card.layers == [layer] and made.card.recipe["layout"] == layout
        assert torch.allclose(made.tensors[f"direction.{layer}"], decoder[4] / decoder[4].norm(), atol=1e-6)
    own = steer.SteeringVector({1: decoder[4]}, 0.3).normalised()
    drawn = {"seed": 0, "max_new_tokens": 6}
    mine = tiny_lm.generate("the sun", edits=made(0.3), **drawn)
    assert mine.tokens == tiny_lm.generate("the sun", edits=own, **drawn).tokens
    assert read_feature(lens, 2, layer=1).layer == 1
    for bad, field in (
        ((lens, 6), "feature"),
        ((lens, -1), "feature"),
        ((tmp_path, 0), "sae"),
        ((lens / "x", 0), "sae"),
    ):
        with pytest.raises(InputError, match=field):
            read_feature(*bad)
    (lens / "cfg.json").write_text(json.dumps({"hook_name": "blocks.1.hook_mlp_out"}))
    with pytest.raises(InputError, match="hook_mlp_out"):
        read_feature(lens, 0)
    (lens / "cfg.json").write_text("{}")
    with pytest.raises(InputError, match="layer"):
        read_feature(lens, 0)
    np.savez(scope / "params.npz", W_dec=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="Object arrays"):
        read_feature(scope, 0)


def test_a_feature_is_imported_on_the_command_line(
    tiny_lm: Any, tiny_lm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"W_dec": torch.eye(4, tiny_lm.info.width)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"metadata": {"hook_name": "blocks.0.hook_resid_post"}}))
    line = f"import sae {tmp_path} --model {tiny_lm_dir} --feature 3 --out {tmp_path / 'f.safetensors'}"
    assert main(line.split()) == 0, capsys.readouterr().err
    assert "feature 3" in capsys.readouterr().out
    assert float(steer.load_artifact(tmp_path / "f.safetensors").tensors["direction.0"][3]) == 1
    assert main(line.split()) == 2 and "--overwrite" in capsys.readouterr().err


def test_presets_are_models_for_clients_that_send_nothing_more(tiny_lm_dir: Path, vector: Any, tmp_path: Path) -> None:
    from openai import BadRequestError, NotFoundError, OpenAI
    from serving_tools import serving_here

    vector.save(tmp_path / "up.safetensors")
    options = ["--name", "tiny", "--preset", f"calm={tmp_path / 'up.safetensors'}:0.6", "--dtype", "float32"]
    with serving_here(tiny_lm_dir, *options) as running:
        client = OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["tiny", "tiny:calm"]
        assert client.models.retrieve("tiny:calm").id == "tiny:calm"
        asked: dict[str, Any] = {"prompt": "the sun", "max_tokens": 6, "temperature": 0}
        plain, calm = (client.completions.create(model=name, **asked) for name in ("tiny", "tiny:calm"))
        steered = {"steer": {"edits": [{"name": "up", "strength": 0.6}]}}
        same = client.completions.create(model="tiny", extra_body=steered, **asked)
        assert calm.choices[0].text == same.choices[0].text != plain.choices[0].text and calm.model == "tiny:calm"
        with pytest.raises(BadRequestError, match="a preset"):
            client.completions.create(model="tiny:calm", extra_body=steered, **asked)
        with pytest.raises(NotFoundError, match="tiny:calm"):
            client.completions.create(model="tiny:clam", **asked)
        echoed(client)
        harness_over_http(running.url, tiny_lm_dir)


def echoed(client: Any) -> None:
    """A prompt is sent back with a log-probability for each token that follows another."""
    asked: dict[str, Any] = {
        "prompt": "the sun is good",
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
    }
    for name in ("tiny", "tiny:calm"):
        choice = client.completions.create(model=name, **asked).choices[0]
        assert choice.text.startswith("the sun is good")
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert all(x <= 0 for x in logprobs.token_logprobs[1:])
        assert all(
            len(top) in (2, 3) and max(top.values()) >= x
            for top, x in zip(logprobs.top_logprobs[1:], logprobs.token_logprobs[1:], strict=True)
        )


def harness_over_http(url: str, folder: Path) -> None:
    """lm-eval's own HTTP client gets what it gets from the model in this process."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from steer.harness.lm_eval import SteerLM

    asked = [
        Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([("the sun is", " good"), ("a", " dog is")])
    ]
    over = {"base_url": f"{url}/v1/completions", "tokenizer_backend": "huggingface", "tokenizer": str(folder)}
    theirs = LocalCompletionsAPI(model="tiny", **over).loglikelihood(asked)
    mine = SteerLM(steer.load(folder, dtype="float32")).loglikelihood(asked)
    for (a, greedy_a), (b, greedy_b) in zip(theirs, mine, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and bool(greedy_a) == bool(greedy_b)
