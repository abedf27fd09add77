"""Every scalar of a run, for Prometheus: http://<host of rank 0>:<prometheus_port>/metrics.

`loss` is the gauge megatron_croc_loss; `lr/projector` is megatron_croc_lr{part="projector"}.
Samples, tokens and skipped steps are counters of this process, zero when it starts.
"""

import re
from collections.abc import Mapping

from megatron_croc.log import get_logger

logger = get_logger(__name__)

PREFIX = "megatron_croc_"

COUNTERS = {
    "samples": "Samples trained on since this process started",
    "tokens": "Tokens without padding trained on since this process started",
    "skipped_steps": "Optimizer steps refused since this process started",
}
"""Counters and their help; a scrape shows them with _total behind the name."""


class Endpoint:
    """A metrics server in a thread of this process."""

    def __init__(self, port: int) -> None:
        """Serve on every address of the machine.

        Args:
            port: 0 takes any free one, see `port`.

        Raises:
            OSError: the port is in use.
            ImportError: prometheus-client is not installed.
        """
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        self._gauge_type = Gauge
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters = {
            name: Counter(PREFIX + name, text, registry=self._registry)
            for name, text in COUNTERS.items()
        }
        self._server, self._thread = start_http_server(port, registry=self._registry)
        self.port: int = self._server.server_port

    def set(self, scalars: Mapping[str, float]) -> None:
        """Show these values from now on; others keep theirs."""
        for name, value in scalars.items():
            metric, part = gauge_name(name)
            if metric not in self._gauges:
                labels = ("part",) if part else ()
                text = f"{name.partition('/')[0]}, as in metrics.jsonl"
                self._gauges[metric] = self._gauge_type(
                    metric, text, labels, registry=self._registry
                )
            gauge = self._gauges[metric]
            (gauge.labels(part=part) if part else gauge).set(value)

    def count(self, **amounts: float) -> None:
        """Add to counters, by name."""
        for name, amount in amounts.items():
            self._counters[name].inc(amount)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def gauge_name(name: str) -> tuple[str, str]:
    """Prometheus name and `part` label of a column of metrics.jsonl; "" for one without parts."""
    group, _, part = name.partition("/")
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", group), part


def open_endpoint(port: int) -> Endpoint | None:
    """An endpoint, if `port` asks for one; a log line and None where it cannot be had."""
    if not port:
        return None
    try:
        endpoint = Endpoint(port)
    except ImportError:
        logger.warning(
            f"prometheus_port={port}: prometheus-client is not installed, nothing is served: "
            "pip install -e '.[prometheus]'"
        )
        return None
    except OSError as error:
        logger.warning(f"prometheus_port={port}: {error.strerror}, nothing is served")
        return None
    logger.info(f"metrics are served at port {endpoint.port} (/metrics)")
    return endpoint
