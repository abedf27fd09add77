"""torch's AdamW inside megatron-core's DistributedOptimizer (used without TE and apex).

megatron's own code path for it fails in four ways (0.16 and 0.19), all of them mended here:
  - saving or loading before the first step, or on a rank that owns no parameters, asserts;
  - loading a checkpoint raises KeyError 'step';
  - after loading all parameters share ONE step tensor, so that every step adds as many as there
    are parameters, and training silently goes on with other bias corrections;
  - a rank without parameters saves no step count.
The step count is kept in the parameter groups, as fused Adam implementations do.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


class TorchAdamDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer whose inner optimizer is torch.optim.AdamW."""

    def allocate_state(self) -> None:
        """Give every owned parameter its moments and a step count of its own."""
        for group in self.optimizer.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    def step_with_ready_grads(self) -> bool:
        """Step, and count it in every group, also in those that hold no parameter here."""
        success = super().step_with_ready_grads()
        for group in self.optimizer.param_groups:
            group["step"] += 1
        return success

    def state_dict(self) -> dict:
        """Everything but the per-parameter tensors, which are saved sharded."""
        groups = self.optimizer.state_dict()["param_groups"]
        kept = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return {"optimizer": {"param_groups": kept}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore groups by their identity, then the sharded tensors, then each step count."""
        self.allocate_state()
        saved_groups = {_identity(g): g for g in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            saved = saved_groups[_identity(group)]
            group.update({k: v for k, v in saved.items() if k != "params"})
        if "param_state" in state_dict:
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"].fill_(group["step"])

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


def adopt_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Mend every DistributedOptimizer in `optimizer` that runs torch's AdamW."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and isinstance(inner, torch.optim.AdamW):
            part.__class__ = TorchAdamDistributedOptimizer
            part.allocate_state()  # type: ignore[attr-defined]
