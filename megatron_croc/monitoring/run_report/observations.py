"""The trained model looking at held-out images: what is replaced, by which row, and how well the
head restores it. One process, whatever layout the checkpoint was trained at.

    held-out batch --> CrocModel (eval: no dropout)
                         projector hook       visual embeddings [n, N, h]
                         on_replacement       pool token and distance of each replaced token
                         output               the head's reconstruction [n, N, h]
"""

import copy
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megatron_croc.checkpoint.sharded import load_weights
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.data.loader import build_valid_loader
from megatron_croc.errors import DataError
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.interface import ModelOutput, StepContext
from megatron_croc.model.prompt_pool import Replacement
from megatron_croc.monitoring.run_report.stages import StageRun
from megatron_croc.parallel.groups import start_distributed, stop_distributed
from megatron_croc.training.build import build_model
from megatron_croc.training.step import to_model_inputs

MAX_SAMPLES = 256
"""Held-out samples that are run."""


@dataclass(frozen=True, kw_only=True)
class Observations:
    """n held-out images of N visual tokens each; P pool rows."""

    pixels: Tensor
    """uint8 [n, 3, height, width]."""

    replaced: Tensor
    """bool [n, N]."""

    rows: Tensor
    """int64 [n, N], pool row of each replaced token; -1 where the token stayed."""

    distance: Tensor
    """float [n, N], distance to that row; nan where the token stayed."""

    similarity: Tensor
    """float [n, N], cosine of the head's output with the original visual embedding."""

    baseline: Tensor
    """float [n, N], cosine of the held-out mean at that position with the original embedding."""

    row_norms: Tensor
    """float [P], length of each pool row."""

    grid: int
    """Visual tokens along a side of the image."""

    @property
    def counts(self) -> Tensor:
        """int64 [P], how often each pool row was matched."""
        return torch.bincount(self.rows[self.rows >= 0], minlength=len(self.row_norms))


def observe(stage: StageRun) -> Observations:
    """Run the stage's latest weights over its held-out data.

    Raises:
        CheckpointError: the weights cannot be read.
        DataError: no held-out images.
    """
    run = in_one_process(stage.run)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    try:
        chunks = build_model(run, pg)
        load_weights(stage.checkpoint, chunks, pg)
        (model,) = chunks
        assert isinstance(model, CrocModel)
        with torch.inference_mode():
            return _observe(model.eval(), run)
    finally:
        stop_distributed()


def in_one_process(run: RunConfig) -> RunConfig:
    """The same run on one process of this machine; checkpoints are resharded when loaded."""
    run = copy.deepcopy(run)
    run.parallel = ParallelConfig()
    run.model.attention_backend = "auto"  # this machine may lack what training had
    run.data.image_decoder = "auto"
    return run


def _observe(model: CrocModel, run: RunConfig) -> Observations:
    original: list[Tensor] = []
    assert model.projector is not None and model.prompt_pool is not None
    hook = model.projector.register_forward_hook(lambda _, __, out: original.append(out.cpu()))
    parts: list[dict[str, Tensor]] = []
    with build_valid_loader(run, dp_rank=0, dp_size=1) as loader:
        available = min(loader.num_samples, MAX_SAMPLES)
        for batch in islice(loader, max(1, available // run.training.micro_batch_size)):
            if batch.num_images:
                parts.append(_observe_batch(model, batch, original))
    hook.remove()
    if not parts:
        raise DataError(f"valid_data_path {run.data.valid_data_path} holds no image")
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    embeddings = joined.pop("embeddings")
    mean = embeddings.mean(dim=0, keepdim=True)
    vision = run.model.vision_tower
    return Observations(
        **joined,
        baseline=cosine_similarity(mean, embeddings, dim=-1),
        row_norms=model.prompt_pool.weight.float().norm(dim=1).cpu(),
        grid=vision.img_size // vision.patch_dim,
    )


def _observe_batch(model: CrocModel, batch: Batch, original: list[Tensor]) -> dict[str, Tensor]:
    """One micro-batch through the model; `original` is filled by the projector's hook."""
    original.clear()
    replacements: list[Replacement] = []
    context = StepContext(on_replacement=replacements.append)
    output = model(to_model_inputs(batch, model.pg_collection.cp), context=context)
    assert isinstance(output, ModelOutput) and output.reconstruction is not None
    assert batch.pixel_values is not None
    (replacement,) = replacements
    embeddings = original[0].float()
    rows = torch.full(batch.replaced.shape, -1, dtype=torch.int64)
    rows[batch.replaced] = replacement.index.flatten().cpu()  # both ascend by position
    distance = torch.full(batch.replaced.shape, torch.nan)
    distance[batch.replaced] = replacement.distance.flatten().float().cpu()
    return {
        "pixels": batch.pixel_values,
        "replaced": batch.replaced,
        "rows": rows,
        "distance": distance,
        "similarity": cosine_similarity(output.reconstruction.float().cpu(), embeddings, dim=-1),
        "embeddings": embeddings,
    }
