"""All scalars of a run for Prometheus, at http://<host of rank 0>:<prometheus_port>/metrics.

`loss` is the gauge megatron_croc_loss; `lr/projector` is megatron_croc_lr{part="projector"}.
Samples, tokens and skipped steps are counters that start at zero with the process.
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
"""Help texts of the counters; a scrape shows each name with the suffix _total."""


class Endpoint:
    """Metrics server in a thread of this process."""

    def __init__(self, port: int) -> None:
        """Start serving on all addresses of the host.

        Args:
            port: TCP port; 0: any free one, then found in `port`.

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
        """Set the gauges of these scalars; other gauges keep their values."""
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
    """Prometheus name and `part` label of an entry of metrics.jsonl; label "" without a part."""
    group, _, part = name.partition("/")
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", group), part


def open_endpoint(port: int) -> Endpoint | None:
    """Open an endpoint; None if `port` is 0, or after a warning when it cannot be opened."""
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
