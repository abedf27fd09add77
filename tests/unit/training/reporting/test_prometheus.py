"""The endpoint as Prometheus sees it: scraped over HTTP, read by the client's own parser."""

import socket
import sys
from urllib.request import urlopen

import pytest

from megatron_croc.training.reporting.prometheus import Endpoint, gauge_name, open_endpoint
from tests.support.synthetic import tiny_run

parser = pytest.importorskip("prometheus_client.parser")


def scrape(port: int) -> dict[tuple[str, str], float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.get("part", "")): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def endpoint():
    endpoint = Endpoint(0)
    yield endpoint
    endpoint.close()


def test_scalars_are_gauges_and_amounts_are_counters(endpoint: Endpoint):
    endpoint.set({"loss": 3.5, "lr/projector": 1e-3, "lr/prompt_pool": 2e-3, "iteration": 4})
    endpoint.set({"loss": 2.5})
    endpoint.count(samples=8, tokens=100)
    endpoint.count(samples=8, tokens=50)
    seen = scrape(endpoint.port)
    assert seen["megatron_croc_loss", ""] == 2.5
    assert seen["megatron_croc_iteration", ""] == 4
    assert seen["megatron_croc_lr", "projector"] == 1e-3
    assert seen["megatron_croc_lr", "prompt_pool"] == 2e-3
    assert seen["megatron_croc_samples_total", ""] == 16
    assert seen["megatron_croc_tokens_total", ""] == 150
    assert seen["megatron_croc_skipped_steps_total", ""] == 0


def test_a_name_never_has_what_prometheus_refuses():
    assert gauge_name("time_share/pipeline_wait") == ("megatron_croc_time_share", "pipeline_wait")
    assert gauge_name("timers/forward-recv") == ("megatron_croc_timers", "forward-recv")
    assert gauge_name("odd name-1") == ("megatron_croc_odd_name_1", "")


def test_the_reporter_serves_what_it_writes(tmp_path, monkeypatch):
    from megatron_croc.training.build import build_reporter
    from megatron_croc.training.reporting import reporting
    from tests.unit.training.reporting.test_metrics import make_metrics

    endpoint = Endpoint(0)
    monkeypatch.setattr(reporting, "open_endpoint", lambda port: endpoint)
    run = tiny_run(log_dir=str(tmp_path), log_interval=2, tensorboard=False)
    reporter = build_reporter(run, train_iters=4, world_size=1)
    for number in (1, 2, 3):
        reporter.add_step(number, make_metrics(number), waited=0.0)
    reporter.add_validation(3, make_metrics(0))
    seen = scrape(endpoint.port)
    assert seen["megatron_croc_iteration", ""] == 3
    assert seen["megatron_croc_grad_norm", ""] == 3.0  # of step 2, the last with a line
    assert seen["megatron_croc_valid_text_loss", ""] == 3.0
    assert seen["megatron_croc_samples_total", ""] == 3 * 8
    assert seen["megatron_croc_tokens_total", ""] == 100 + 200 + 300
    reporter.close()
    with pytest.raises(OSError):
        scrape(endpoint.port)


def test_a_port_in_use_is_one_line(endpoint: Endpoint, caplog):
    from megatron_croc.config.checks import find_faults

    run = tiny_run(prometheus_port=endpoint.port)
    (fault,) = [f for f in find_faults(run, 1, for_training=True) if "prometheus" in f]
    assert fault.startswith(f"prometheus_port={endpoint.port}: Address already in use")
    with caplog.at_level("WARNING"):
        assert open_endpoint(endpoint.port) is None  # taken since: training goes on without
    (message,) = caplog.messages
    assert f"prometheus_port={endpoint.port}: Address already in use" in message


def test_a_missing_package_is_one_line(monkeypatch, caplog):
    from megatron_croc.config import logging_checks

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(logging_checks.importlib.util, "find_spec", lambda name: None)
    faults = logging_checks.find_logging_faults(
        tiny_run(prometheus_port=port), 1, for_training=True
    )
    assert [f for f in faults if "pip install -e '.[prometheus]'" in f]
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with caplog.at_level("WARNING"):
        assert open_endpoint(port) is None
    assert "not installed" in caplog.messages[0]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (dict(timing_log_level=3), "timing_log_level=3"),
        (dict(straggler_percent=0.0), "straggler_percent=0.0"),
        (dict(prometheus_port=70000), "prometheus_port=70000"),
        (dict(profile=True, log_dir="x", profile_step_end=10), "profile_step_start=10"),
        (dict(profile=True, log_dir="x", profile_step_start=0), "profile_step_start=0"),
        (dict(profile=True, log_dir="x", profile_ranks=(0, 2)), "profile_ranks=2"),
        (dict(record_memory_history=True), "log_dir or save"),
    ],
)
def test_impossible_settings_are_named(changes: dict, fragment: str):
    from megatron_croc.config.checks import find_faults

    (fault,) = find_faults(tiny_run(**changes), 2)
    assert fragment in fault
