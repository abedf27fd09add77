"""A run of two pipeline stages, watched: times, a slow rank, a scrape, a trace."""

import gzip
import importlib.util
import json
import socket
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.functional.test_train import words
from tests.support.distributed import run_distributed

DELAY = 1.0
"""Seconds that rank 1 takes longer for each forward pass than it needs, in one of the runs."""


def train_watched(arguments: list[str], delay: float) -> str:
    """Train; what a scrape shows just before the end, on rank 0."""
    from megatron_croc.cli.train import main
    from megatron_croc.log import rank
    from megatron_croc.model.language_model import LanguageModel
    from megatron_croc.training.reporting.prometheus import Endpoint

    seen = []
    close = Endpoint.close

    def scrape_and_close(endpoint: Endpoint) -> None:
        with urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=60) as answer:
            seen.append(answer.read().decode())
        close(endpoint)

    Endpoint.close = scrape_and_close
    if delay and rank() == 1:
        forward = LanguageModel.forward

        def slow(self, *args, **kwargs):
            time.sleep(delay)
            return forward(self, *args, **kwargs)

        LanguageModel.forward = slow
    assert main(arguments) == 0
    return "".join(seen)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pipelined(demo: Path, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("pp2")
    arguments = words(
        demo,
        "pretrain_croc",
        f"--save={folder}",
        "--train-iters=4",
        "--log-interval=2",
        "--save-interval=2",
        "--eval-interval=2",
        "--eval-iters=1",
        "--global-batch-size=2",
        "--micro-batch-size=1",
        f"--valid-data-path={demo / 'valid_pretrain_croc'}",
        "--pipeline-model-parallel-size=2",
        "--timing-log-level=2",
        "--straggler-percent=0.01",  # any two ranks with the same work would differ by more
        "--profile",
        "--profile-step-start=2",
        "--profile-step-end=3",
        "--profile-ranks",
        "1",
    )
    if importlib.util.find_spec("prometheus_client"):  # optional
        arguments.append(f"--prometheus-port={free_port()}")
    scraped, nothing = run_distributed(train_watched, 2, arguments, 0.0)
    assert nothing == ""  # only rank 0 serves
    return folder, scraped


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.distributed
def test_the_shares_of_an_interval_are_all_of_its_time(pipelined):
    folder, _ = pipelined
    first, second = (row for row in rows_of(folder) if "loss" in row)
    for row in (first, second):
        shares = {n[11:]: v for n, v in row.items() if n.startswith("time_share/")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(row[f"time_share_max/{name}"] >= share for name, share in shares.items())
        for name in ("data_wait", "vision", "matching", "forward", "reconstruction", "backward"):
            assert shares[name] > 0, name
        for name in ("pipeline_wait", "sync", "optimizer"):
            assert shares[name] > 0, name
        # The tower is on one of two ranks, so its share over both is half of the larger.
        for name in ("vision", "matching", "reconstruction"):
            assert row[f"time_share_max/{name}"] == pytest.approx(2 * shares[name])
    # Events after the first line are counted in the second.
    assert "time_share/checkpoint" not in first and "validation_seconds" not in first
    assert second["time_share/checkpoint"] > 0 and second["time_share/validation"] > 0
    pauses = second["checkpoint_seconds"] + second["validation_seconds"]
    assert second["interval_seconds"] > pauses > 0
    assert second["timers_max/forward-compute"] > 0 and second["timers/forward-recv"] > 0


@pytest.mark.distributed
def test_rank_1_alone_is_profiled(pipelined):
    folder, _ = pipelined
    (path,) = (folder / "profile").iterdir()
    assert path.name == "rank_00001_steps_2_2.json.gz"
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"reconstruction", "backward/backward-compute"} <= names and "vision" not in names


@pytest.mark.distributed
def test_the_endpoint_serves_what_the_last_lines_say(pipelined):
    parser = pytest.importorskip("prometheus_client.parser")
    folder, scraped = pipelined
    seen = {
        (sample.name, sample.labels.get("part", "")): sample.value
        for family in parser.text_string_to_metric_families(scraped)
        for sample in family.samples
    }
    train, valid = (row for row in rows_of(folder) if row["iteration"] == 4)
    for name, value in {**train, **valid}.items():
        group, _, part = name.partition("/")
        assert seen[f"megatron_croc_{group}", part] == pytest.approx(value), name
    assert seen["megatron_croc_samples_total", ""] == 4 * 2


@pytest.mark.distributed
def test_ranks_alone_in_their_stage_are_never_stragglers(pipelined):
    lines = rows_of(pipelined[0], "stragglers.jsonl")
    assert [line["iteration"] for line in lines] == [2, 4]
    for line in lines:
        assert len(line["compute_seconds"]) == 2
        assert all(entry["cause"] != "compute" for entry in line["slow"])
        pairs = zip(line["compute_seconds"], line["step_seconds"], strict=True)
        assert all(0 < compute < step for compute, step in pairs)


@pytest.mark.distributed
def test_a_slow_rank_is_named_and_the_others_wait_for_it(demo: Path, tmp_path: Path):
    arguments = words(
        demo,
        "pretrain_mlp",
        f"--log-dir={tmp_path}",
        "--train-iters=2",
        "--log-interval=2",
        "--global-batch-size=2",
        "--micro-batch-size=1",
        "--straggler-percent=20",
    )
    run_distributed(train_watched, 2, arguments, DELAY)
    (line,) = rows_of(tmp_path, "stragglers.jsonl")
    slow = {(entry["rank"], entry["host"]) for entry in line["slow"] if entry["cause"] == "compute"}
    assert slow == {(1, socket.gethostname())}
    (row,) = rows_of(tmp_path)
    assert row["time_share_max/sync"] > row["time_share/sync"]


@pytest.mark.distributed
def test_every_metric_is_explained(pipelined):
    text = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    names = {name for row in rows_of(pipelined[0]) for name in row}
    for name in names:
        group = name.partition("/")[0]
        assert f"`{group}`" in text or f"`{group}/<" in text, f"docs/observability.md lacks {name}"
        if group == "time_share":
            assert f"`{name.partition('/')[2]}`" in text
