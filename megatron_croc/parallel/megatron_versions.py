"""Versions of megatron-core that this code was tested with, and its assumptions about others."""

import logging

from megatron.core.package_info import __version__

from megatron_croc.log import get_logger, log_once

logger = get_logger(__name__)

TESTED = {
    "0.16.1": "marks weights as tensor-parallel only while it draws them; frees an activation that "
    "the interleaved schedule may still be sending",
    "0.19.2": "always marks them; asks torch.cuda for the current stream while it reduces",
}
"""Version -> behaviour of that version that this code handles."""

ASSUMED = (
    "a loss with a token count is not divided again",
    "prepare_grads, get_grad_norm and step_with_ready_grads of the optimizer are separate steps",
    "wd_mult and lr_mult identify the parameter groups of a checkpoint",
)
"""Behaviour that another version could change without an error, and with wrong results."""


def name_untested_megatron(version: str = __version__) -> None:
    """Warn once about a version that was not tested, with the assumptions about it."""
    if version.partition("+")[0] not in TESTED:
        log_once(
            logger,
            logging.WARNING,
            "megatron-core %s is not tested (%s are); the run is right only if: %s",
            version,
            ", ".join(TESTED),
            "; ".join(ASSUMED),
        )
