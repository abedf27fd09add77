"""megatron-core's DistributedOptimizer around any AdamW: torch's, Transformer Engine's or apex's.

Which of them megatron takes depends on the machine, so a checkpoint of each must load in every
other, and before the first step too. megatron's own path (0.16 and 0.19) fails in these ways, all
of them mended here:
  - saving before the first accepted step raises KeyError 'exp_avg', or an assertion with torch's;
  - loading a checkpoint with torch's AdamW raises KeyError 'step';
  - after loading all its parameters share ONE step tensor, so that every step adds as many as there
    are parameters, and training silently goes on with other bias corrections;
  - a rank without parameters saves no step count (torch, Transformer Engine before 2.20);
  - a group takes its settings from the checkpoint alone, so that fused AdamW after torch's raises
    KeyError 'bias_correction', and torch's after a fused one KeyError 'amsgrad'.
The step count is kept in the parameter groups, as fused AdamW does; torch's has it in each
parameter's state too.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_croc.libraries import name_unknown_version


class AdamDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer whose state is there from the start, in one form for every AdamW."""

    def allocate_state(self) -> None:
        """Give every owned parameter its moments, and every group a step count."""
        counts_per_parameter = isinstance(self.optimizer, torch.optim.AdamW)
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
        """Step, and count it in every group, also in those that hold no parameter here."""
        counts = [group["step"] + 1 for group in self.optimizer.param_groups]
        success = super().step_with_ready_grads()
        for group, count in zip(self.optimizer.param_groups, counts, strict=True):
            group["step"] = count  # fused AdamW has counted in some groups already
        return success

    def state_dict(self) -> dict:
        """Everything but the per-parameter tensors, which are saved sharded."""
        kept = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": kept}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore groups by their identity, then the sharded tensors, then each step count.

        What only another AdamW knows is left out, what only this one knows keeps its default.
        """
        self.allocate_state()
        saved_groups = {_identity(g): g for g in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            saved = saved_groups[_identity(group)]
            group.update({k: v for k, v in saved.items() if k in group and k != "params"})
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
    """What tells parameter groups apart, on any rank and after a resume."""
    return (group["wd_mult"], group["lr_mult"], group["is_expert_parallel"])


def adopt_adam(optimizer: MegatronOptimizer) -> None:
    """Mend every DistributedOptimizer in `optimizer`, and allocate its state."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        # A part without anything to train holds no optimizer.
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and inner is not None:
            if type(inner).__module__.startswith("transformer_engine."):
                name_unknown_version("transformer-engine")
            part.__class__ = AdamDistributedOptimizer
            part.allocate_state()  # type: ignore[attr-defined]
