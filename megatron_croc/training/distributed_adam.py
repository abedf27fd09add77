"""megatron-core's DistributedOptimizer with any AdamW: torch's, Transformer Engine's or apex's.

megatron's choice depends on the machine, so a checkpoint of one AdamW must load into another, also
before the first step. megatron's own code (0.16 and 0.19) fails in these cases, which are fixed
here:
  - saving before the first accepted step raises KeyError 'exp_avg', or an assertion with torch's;
  - loading a checkpoint with torch's AdamW raises KeyError 'step';
  - after loading, all parameters share one step tensor, so each step adds the number of parameters
    to the count, and training silently continues with wrong bias corrections;
  - a rank without parameters saves no step count (torch, Transformer Engine before 2.20);
  - a group takes its settings from the checkpoint only: fused AdamW after torch's raises KeyError
    'bias_correction', and torch's after a fused one KeyError 'amsgrad'.
The step count is kept in the parameter groups, as in fused AdamW; torch's AdamW also keeps it in
the state of each parameter.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_croc.libraries import name_unknown_version
from megatron_croc.parallel.device import has_cuda

_OF_THE_MACHINE = ("fused", "foreach")
"""Settings of torch's AdamW that choose a kernel; each machine keeps its own on a resume."""


class AdamDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer with state allocated from the start, in one form for every AdamW."""

    def allocate_state(self) -> None:
        """Allocate the moments of every owned parameter, and a step count in every group."""
        counts_per_parameter = isinstance(self.optimizer, torch.optim.AdamW)
        if counts_per_parameter and not has_cuda():
            for group in self.optimizer.param_groups:
                group["fused"] = True  # one pass over the memory instead of eight
        for group in self.optimizer.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if state:
                    continue
                if counts_per_parameter:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)

    def step_with_ready_grads(self) -> bool:
        """Step, and advance the count of every group, also of groups without parameters here."""
        counts = [group["step"] + 1 for group in self.optimizer.param_groups]
        success = super().step_with_ready_grads()
        for group, count in zip(self.optimizer.param_groups, counts, strict=True):
            group["step"] = count  # fused AdamW has counted in some groups already
        return success

    def state_dict(self) -> dict:
        """State without the per-parameter tensors, which are saved sharded."""
        kept = [
            {k: v for k, v in group.items() if k not in ("params", *_OF_THE_MACHINE)}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": kept}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the settings of groups, then the sharded tensors, then the step counts.

        Settings that only another AdamW has are ignored; settings that only this one has keep
        their defaults.
        """
        self.allocate_state()
        saved_groups = {_identity(g): g for g in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            saved = saved_groups[_identity(group)]
            kept = ("params", *_OF_THE_MACHINE)
            group.update({k: v for k, v in saved.items() if k in group and k not in kept})
        if "param_state" in state_dict:
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if "step" in state:
                    state["step"].fill_(group["step"])

    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: dict[str, Tensor]
    ) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        with torch.no_grad():
            main_param.copy_(tensors["param"])
            state["exp_avg"].copy_(tensors["exp_avg"])
            state["exp_avg_sq"].copy_(tensors["exp_avg_sq"])


def _identity(group: dict) -> tuple:
    """Key of a parameter group, equal on every rank and after a resume."""
    return (group["wd_mult"], group["lr_mult"], group["is_expert_parallel"])


def adopt_adam(optimizer: MegatronOptimizer) -> None:
    """Turn every DistributedOptimizer into an AdamDistributedOptimizer, and allocate its state."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        # A part without trained parameters holds no optimizer.
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and inner is not None:
            if type(inner).__module__.startswith("transformer_engine."):
                name_unknown_version("transformer-engine")
            part.__class__ = AdamDistributedOptimizer
            part.allocate_state()  # type: ignore[attr-defined]
