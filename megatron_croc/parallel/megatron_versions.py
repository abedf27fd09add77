"""The versions of megatron-core this code was tried with, and what it leans on."""

import logging

from megatron.core.package_info import __version__

from megatron_croc.log import get_logger, log_once

logger = get_logger(__name__)

TRIED = {
    "0.16.1": "marks weights as tensor-parallel only while it draws them; frees an activation that "
    "the interleaved schedule may still be sending",
    "0.19.2": "always marks them; asks torch.cuda for the current stream while it reduces",
}
"""Version -> what was found there and is allowed for here."""

ASSUMED = (
    "a loss that comes with a token count is not divided again",
    "the optimizer's prepare_grads, get_grad_norm and step_with_ready_grads can be called apart",
    "parameter groups of a checkpoint are told apart by wd_mult and lr_mult",
)
"""What could change without an error, and would make a run wrong."""


def name_untried_megatron(version: str = __version__) -> None:
    """Warn once of a version that was not tried, saying what is assumed of it."""
    if version.partition("+")[0] not in TRIED:
        log_once(
            logger,
            logging.WARNING,
            "megatron-core %s was not tried (%s were); assumed of it: %s",
            version,
            ", ".join(TRIED),
            "; ".join(ASSUMED),
        )
