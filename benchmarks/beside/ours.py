"""Our process: the training step as `croc train` takes it, from the released model's weights.

cd benchmarks && python -m beside.ours      (step_beside_release.py starts it)
"""

from dataclasses import replace
from typing import Any

from safetensors.torch import load_file

from beside.case import CLIP_GRAD, Inputs, Size, make_inputs
from beside.worker import TakeStep, serve
from megatron_croc.convert.names import CROC, VICTOR, build_rules
from megatron_croc.convert.state import load_state
from megatron_croc.data.batch import Batch
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.training.build import build_training_state
from megatron_croc.verification.golden.case import Case, build_batch, build_run


def build(size: Size, order: dict[str, Any]) -> TakeStep:
    """Build our model and optimizer with the released model's weights and settings."""
    is_croc = order["peer"] == "croc"
    case = Case(
        name="stage15",
        info={"config": size.config(order["peer"])},
        tensors=_case_tensors(size, make_inputs(size, 0, 1)),
        state=load_file(order["weights"]),
        layout=CROC if is_croc else VICTOR,
    )
    run = build_run(case, tp=1, pp=1, sequence_parallel=False)
    run.training.freeze_ViT = is_croc
    run.training.bf16 = order["dtype"] == "bf16"
    optim = run.optimizer
    optim.lr = optim.min_lr = order["learning_rate"]
    optim.lr_decay_style, optim.lr_warmup_fraction = "constant", 0.0
    optim.clip_grad = CLIP_GRAD
    groups = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, groups, train_iters=10**6)
    rules = build_rules(run.model, case.layout)
    for model in training.train_step.models:
        load_state(model, case.state, rules)
    training.optimizer.reload_model_params()

    def to_batch(inputs: Inputs, *, dropout: bool) -> Batch:
        batch = build_batch(replace(case, tensors=_case_tensors(size, inputs)), run)
        first = inputs.seed * batch.num_images
        seeds = tuple(range(first, first + batch.num_images))
        return replace(batch, image_seeds=seeds if dropout else ())

    def take_step(inputs: Inputs, dropout: bool) -> dict[str, float]:
        # The batch is made inside the measured time: the released forward pass merges the tokens.
        batches = [to_batch(inputs, dropout=dropout)]
        metrics = training.train_step.train(batches, training.optimizer, training.scheduler)
        return {
            "loss": metrics.loss,
            "reconstruction_loss": metrics.reconstruction_loss or 0.0,
            "text_loss": metrics.text_loss,
        }

    return take_step


def _case_tensors(size: Size, inputs: Inputs) -> dict[str, Any]:
    """Inputs under the names of the golden cases."""
    return {
        "in_input_ids": inputs.input_ids,
        "in_labels": inputs.labels,
        "in_attention_mask": inputs.attention_mask,
        "in_pixel_values": inputs.pixel_values,
        "image_masked_patches": inputs.draw_replaced(size.num_visual_tokens),
    }


if __name__ == "__main__":
    serve(build)
