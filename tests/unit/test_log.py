import logging

import pytest

from megatron_croc.log import get_logger, log_on_rank_zero, log_once


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages that the project's logger writes."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    monkeypatch.setattr(get_logger("megatron_croc"), "handlers", [Ear()])
    return heard


def test_names_are_the_modules(lines: list[str]):
    get_logger("megatron_croc.data.loader").info("read %d", 3)
    assert lines == ["INFO megatron_croc.data.loader: read 3"]
    assert not get_logger("megatron_croc").propagate


def test_only_rank_zero_speaks_for_all(lines: list[str], monkeypatch: pytest.MonkeyPatch):
    logger = get_logger("megatron_croc.x")
    monkeypatch.setenv("RANK", "1")
    log_on_rank_zero(logger, logging.INFO, "from rank 1")
    monkeypatch.setenv("RANK", "0")
    log_on_rank_zero(logger, logging.INFO, "from rank 0")
    assert lines == ["INFO megatron_croc.x: from rank 0"]


def test_once_is_once_per_message(lines: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    logger = get_logger("megatron_croc.y")
    for number in (1, 1, 2, 2, 1):
        log_once(logger, logging.WARNING, "number %d", number)
    assert lines == ["WARNING megatron_croc.y: number 1", "WARNING megatron_croc.y: number 2"]
