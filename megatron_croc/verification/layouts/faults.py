"""Known bugs of parallel training, planted on purpose: the comparison must report each."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_croc.config.run import RunConfig


def norm_gradients_not_summed(run: RunConfig) -> None:
    """Sequence parallelism: a norm's gradient stays each rank's own."""
    from megatron_croc.model import norm

    born = norm.Norm.__init__

    def without_mark(self: Any, *args: Any, **kwargs: Any) -> None:
        born(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.sequence_parallel = False

    norm.Norm.__init__ = without_mark  # type: ignore[method-assign]


def encoder_gradient_scaled(run: RunConfig) -> None:
    """The projector's gradient grows with the number of pipeline stages."""
    from megatron_croc.model.projector import Projector

    forward, factor = Projector.forward, float(run.parallel.pipeline_model_parallel_size)

    def scaled(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        out = forward(self, hidden_states)
        return factor * out + (1.0 - factor) * out.detach()

    Projector.forward = scaled  # type: ignore[method-assign]


def loss_averaged_per_rank(run: RunConfig) -> None:
    """Each data-parallel rank divides by its own count of labels, then ranks are averaged."""
    from megatron_croc.training import step

    denominators = step.TrainStep._denominators

    def own_counts(self: Any, batches: list) -> Any:
        exact = denominators(self, batches)
        own = torch.tensor(float(sum(b.num_label_tokens for b in batches)), dtype=torch.float64)
        return step.Denominators(text=own * self.pg.dp.size(), reconstruction=exact.reconstruction)

    step.TrainStep._denominators = own_counts  # type: ignore[method-assign]


def patches_from_global_generator(run: RunConfig) -> None:
    """The replaced set comes from torch's global generator, seeded per rank as usual."""
    from megatron_croc.log import rank
    from megatron_croc.model.prompt_pool import PromptPool

    forward = PromptPool.forward
    torch.manual_seed(run.training.seed + rank())

    def redrawn(self: Any, visual: torch.Tensor, replaced: torch.Tensor, *_: Any) -> Any:
        order = torch.rand(replaced.shape, device=replaced.device).argsort(dim=1)
        return forward(self, visual, order < self.num_replaced)

    PromptPool.forward = redrawn  # type: ignore[method-assign]


FAULTS: dict[str, tuple[Callable[[RunConfig], None], str]] = {
    "norm_gradients_not_summed": (norm_gradients_not_summed, "tp2+sp"),
    "encoder_gradient_scaled": (encoder_gradient_scaled, "pp2"),
    "loss_averaged_per_rank": (loss_averaged_per_rank, "dp2"),
    "patches_from_global_generator": (patches_from_global_generator, "dp2"),
}
"""Each fault, and a layout at which it must show."""
