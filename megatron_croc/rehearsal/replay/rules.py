"""Rules by which a backend lets ranks go on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Order, buffers and waits of a communication backend."""

    meets_at_first_use: bool
    """The first use of a communicator holds the host until all its ranks have come to it, and the
    first transfer between two ranks of it until both have."""

    orders_communicator: bool
    """Operations of one communicator run in the order of their calls, one after the other."""

    buffers_sends: bool
    """A send is complete without its receiver."""

    host_computes: bool
    """Kernels run on the host, and waiting for a work holds the host: a CPU."""


NCCL = Rules(
    meets_at_first_use=True, orders_communicator=True, buffers_sends=False, host_computes=False
)
"""A send stays open until it is received: nothing is promised about buffers."""

GLOO = Rules(
    meets_at_first_use=False, orders_communicator=False, buffers_sends=True, host_computes=True
)
"""Tensors on a CPU; a small send is complete when it is in the socket."""

RULES = {"nccl": NCCL, "gloo": GLOO}
