"""One W&B run over all restarts; errors of W&B do not stop training. The client is a stub."""

import sys
from types import SimpleNamespace

import pytest

from megatron_croc.config.logging_checks import find_logging_faults
from megatron_croc.training.build import build_reporter
from tests.support.synthetic import tiny_run


class OfflineError(Exception):
    """Error type of the client."""


@pytest.fixture
def client(monkeypatch):
    """Stub of the client that records the arguments of `init` and the logged lines."""
    started, logged = [], []

    def init(**settings):
        started.append(settings)
        return SimpleNamespace(
            log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end")
        )

    client = SimpleNamespace(init=init, Error=OfflineError, started=started, logged=logged)
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def report(folder, iteration: int) -> None:
    run = tiny_run(wandb_project="croc", wandb_exp_name="first", save=folder, tensorboard=False)
    reporter = build_reporter(run, train_iters=9, world_size=1)
    reporter._write(iteration, {"iteration": iteration, "loss": 0.5})
    reporter.close()


def test_a_run_that_goes_on_in_its_folder_goes_on_in_wandb(client, tmp_path):
    report(str(tmp_path / "a"), 3)
    report(str(tmp_path / "a"), 4)
    report(str(tmp_path / "b"), 1)
    first, again, other = client.started
    assert (first["project"], first["name"], first["resume"]) == ("croc", "first", "allow")
    assert first["dir"] == tmp_path / "a"
    assert first["config"]["logging"]["wandb_project"] == "croc"
    assert first["id"] == again["id"] != other["id"]
    rows = [entry for entry in client.logged if entry != "end"]
    assert rows == [(3, {"loss": 0.5}), (4, {"loss": 0.5}), (1, {"loss": 0.5})]
    assert client.logged[1::2] == ["end"] * 3


def test_without_a_folder_every_start_is_a_run(client):
    for _ in range(2):
        report(None, 1)
    assert [(s["id"], s["resume"]) for s in client.started] == [(None, None)] * 2


def test_what_cannot_be_reached_is_one_line(client, caplog, tmp_path):
    def init(**settings):
        raise OfflineError("api_key not configured\nmore")

    client.init = init
    report(str(tmp_path), 3)
    (message,) = [m for m in caplog.messages if "wandb" in m]
    assert message == (
        "wandb_project=croc: api_key not configured; WANDB_MODE=offline needs no network; "
        "metrics go to metrics.jsonl"
    )
    assert '"loss": 0.5' in (tmp_path / "metrics.jsonl").read_text()


def test_a_missing_package_is_told_before_and_survived_after(monkeypatch, caplog, tmp_path):
    def faults(**changes) -> list[str]:
        return [
            fault
            for fault in find_logging_faults(tiny_run(**changes), 1, for_training=True)
            if "wandb" in fault
        ]

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()  # what the client leaves where it ran is no client
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (fault,) = faults(wandb_project="croc")
    assert fault.startswith("wandb_project=croc: wandb is not installed: pip install")
    assert not faults()
    report(str(tmp_path / "save"), 1)
    assert any("wandb is not installed" in message for message in caplog.messages)


def test_a_name_without_a_project(tmp_path):
    (fault,) = find_logging_faults(tiny_run(wandb_exp_name="first"), 1, for_training=False)
    assert fault == "wandb_exp_name=first: names nothing without wandb_project"
