"""Numbers for planning: the simulated fleet against closed forms, and examples of deployment, which have to parse."""

from __future__ import annotations

import re
import shlex
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.bench.fleet import Job, main, predicted, simulate
from steer.bulk.source import Shard
from steer.cli.options import COMMANDS
from steer.core import InputError

FLEET = Path(__file__).parents[1] / "recipes" / "fleet"


# -------------------------------------------------------------------------------------------------------- simulation


def mean_and_error(job: Job, runs: int = 200) -> tuple[float, float]:
    found = [simulate(job, seed).seconds for seed in range(runs)]
    return statistics.mean(found), statistics.stdev(found) / runs**0.5


def test_calls_that_are_alike_come_in_rounds() -> None:
    for shards in (False, True):
        done = simulate(Job(10, 4, mean=2.0, shards=shards))
        assert done.seconds == 6.0 and done.redone == 0 and done.efficiency == pytest.approx(20 / 24)
        assert predicted(Job(10, 4, mean=2.0)) == 6.0


def test_one_queue_of_exponential_calls() -> None:
    """W exponential servers and n calls: `(n - W) m / W` until no call waits, then a drain of `m H_W`."""
    job = Job(60, 5, mean=3.0, spread=1.0)
    mean, error = mean_and_error(job)
    exact = 55 * 3 / 5 + 3 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5)
    assert abs(mean - exact) < 5 * error and predicted(job) == pytest.approx(exact)


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_failures_by_renewal(spread: float) -> None:
    """A call of length s takes `(1 / f + c) (exp(f s) - 1)`; its mean is by the moments of the gamma law of s."""
    job = Job(20, 1, mean=2.0, spread=spread, failures=0.1, restart=1.5)
    mean, error = mean_and_error(job, 1000)
    v = spread**2
    grown = 2.718281828459045**0.2 if v == 0 else (1 - 0.2 * v) ** (-1 / v)
    exact = 20 * (10 + 1.5) * (grown - 1)
    assert abs(mean - exact) < 5 * error and predicted(job) == pytest.approx(exact)
    redone = statistics.mean(simulate(job, seed).redone for seed in range(1000))
    assert redone == pytest.approx(20 * (grown - 1), rel=0.1)


@pytest.mark.parametrize("shards", [False, True])
def test_the_model_is_near_the_simulation(shards: bool) -> None:
    for workers in (1, 8, 64):
        job = Job(20_000, workers, mean=4.0, spread=0.5, failures=1e-4, restart=20.0, shards=shards)
        assert simulate(job).seconds == pytest.approx(predicted(job), rel=0.03)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--calls", "100", "--workers", "1", "4", "--spread", "0", "--failures", "0"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["1", "400", "400", "0", "1.000"], ["4", "100", "100", "0", "1.000"]]
    with pytest.raises(InputError, match="failures"):
        Job(1, mean=10.0, spread=1.0, failures=0.2)


# ---------------------------------------------------------------------------------------------------------- examples


def checked(words: list[str]) -> dict[str, str]:
    """The options of a `steer` command, each of which has to be one of its own."""
    assert words[0] == "steer"
    declared = {f.name for f in fields(COMMANDS[words[1]])}
    given: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            assert word.startswith("--") and word[2:].replace("-", "_") in declared, word
            given[word[2:]] = following
    return given


def documents(name: str) -> dict[str, Any]:
    return {doc["kind"]: doc for doc in yaml.safe_load_all((FLEET / name).read_text(encoding="utf-8"))}


def shards(pattern: str, place: str, count: int) -> None:
    """The shards of all tasks are the whole job."""
    found = [Shard.parse(pattern.replace(place, str(i))) for i in range(count)]
    assert {shard.index for shard in found} == set(range(count)) and {shard.count for shard in found} == {count}


def test_the_array_of_slurm() -> None:
    text = (FLEET / "batch.slurm").read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    array = re.search(r"^#SBATCH --array=0-(\d+)$", text, re.MULTILINE)
    assert array is not None
    command = text.split("srun ", 1)[1].replace("\\\n", " ")
    shards(checked(shlex.split(command))["shard"], "${SLURM_ARRAY_TASK_ID}", int(array[1]) + 1)


def test_the_job_of_kubernetes() -> None:
    spec = documents("batch-job.yaml")["Job"]["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    given = checked(shlex.split(container["args"][0]))
    shards(given["shard"], "$(JOB_COMPLETION_INDEX)", spec["completions"])
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_deployment() -> None:
    found = documents("serve-deployment.yaml")
    spec = found["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = checked(["steer", *container["args"]])
    port = container["ports"][0]["containerPort"]
    assert int(given["port"]) == port == found["Service"]["spec"]["ports"][0]["targetPort"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port}
    assert float(given["drain"]) < pod["terminationGracePeriodSeconds"]
    assert given["artifacts"] == container["volumeMounts"][0]["mountPath"] and "require" in given
    assert {entry["name"] for entry in container["env"]} == {given["api-key-env"]}
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert found["PersistentVolumeClaim"]["metadata"]["name"] == claim
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert found["Service"]["spec"]["selector"] == spec["template"]["metadata"]["labels"]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.vllm"])
def test_the_images(name: str) -> None:
    text = (FLEET / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [line.split(maxsplit=1)[0] for line in lines]
    assert words[0] == "FROM" and set(words) <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "ENTRYPOINT", "CMD"}
    for line in lines:
        if line.startswith(("ENTRYPOINT", "CMD")):
            assert isinstance(yaml.safe_load(line.split(maxsplit=1)[1]), list), "the form without a shell"
