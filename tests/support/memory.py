"""Memory that a rank allocates: model, optimizer, and the peak of one training step."""

import importlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.sample.collate import ReadySample, expand_sample
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.data.synthetic import make_batch
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.training.build import build_training_state


class SavedTensors:
    """Bytes of the storages that autograd keeps for backward, each counted once, and their peak.

    Parameters (and what else lived before) are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.users: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "_Held":
        return _Held(self, tensor)

    @staticmethod
    def unpack(held: "_Held") -> torch.Tensor:
        return held.tensor


class _Held:
    def __init__(self, owner: SavedTensors, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.owner, self.tensor = owner, tensor
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        if self.key in owner.known:
            self.size = 0
        owner.users[self.key] += 1
        if owner.users[self.key] == 1:
            owner.now += self.size
            owner.peak = max(owner.peak, owner.now)

    def __del__(self) -> None:
        self.owner.users[self.key] -= 1
        if not self.owner.users[self.key]:
            self.owner.now -= self.size


class FusedNorm(torch.autograd.Function):
    """RMSNorm that saves what the CUDA kernel saves; on a CPU torch puts it together from parts."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        rstd = (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (x.float() * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        weighted = (grad * weight).float()
        mean = (weighted * normed).mean(-1, keepdim=True)
        d_weight = (grad.float() * normed).flatten(0, -2).sum(0)
        return (rstd * (weighted - normed * mean)).to(x.dtype), None, d_weight.to(x.dtype), None


def use_fused_norm() -> None:
    """Norms save what they save on a GPU; attention does with attention_backend=flip."""
    functional = importlib.import_module("megatron_croc.model.norm").functional
    functional.rms_norm = lambda *args: FusedNorm.apply(*args)


def full_batch(run: RunConfig, number: int) -> Batch:
    """micro_batch_size samples of exactly seq_length tokens, one image each."""
    size, tokens = run.model.vision_tower.img_size, run.model.vision_tower.num_visual_tokens
    rng = np.random.default_rng(number)
    answer = run.data.seq_length - tokens - 4
    samples = []
    for _ in range(run.training.micro_batch_size):
        text = rng.integers(1, run.model.language_model.vocab_size, 4 + answer).tolist()
        ids = [*text[:2], IMAGE_TOKEN_INDEX, *text[2:]]
        sample = TokenizedSample(
            sample_id="full",
            input_ids=np.array(ids),
            labels=np.array([IGNORE_INDEX] * 5 + ids[5:]),
        )
        expanded = expand_sample(sample, num_visual_tokens=tokens, seq_length=run.data.seq_length)
        pixels = rng.integers(0, 256, (1, 3, size, size), dtype=np.uint8)
        samples.append(
            ReadySample(tokens=expanded, epoch=0, pixel_values=list(torch.from_numpy(pixels)))
        )
    return make_batch(run, samples)


def measure(run: RunConfig) -> dict[str, float]:
    """Bytes on this rank, by the names of MemoryEstimate; `activations` holds all of a step."""
    use_fused_norm()
    pg = start_distributed(run.parallel, seed=1)
    training = build_training_state(run, pg, train_iters=100)
    count = run.num_microbatches(torch.distributed.get_world_size())
    batches = [full_batch(run, n) for n in range(count)]
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    training.train_step.forward_backward(batches)  # caches of masks and rotary tables
    known = [t for chunk in training.chunks for t in chunk.parameters()]
    saved = SavedTensors(known)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        training.train_step.forward_backward(batches)
    training.optimizer.step()
    state: dict[int, int] = {}
    for tensor in optimizer_tensors(training.optimizer):
        state[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
    parameters = {p.data_ptr(): p for chunk in training.chunks for p in chunk.parameters()}
    buffers = [
        buffer
        for chunk in training.chunks
        for buffer in chunk.buffers  # type: ignore[attr-defined]
    ]
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters.values()),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(state.values()),
        "activations": saved.peak,
    }


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Moments, and main weights where they are not the weights themselves."""
    tensors = []
    for part in optimizer.chained_optimizers:
        shards = [s for group in part.shard_fp32_from_float16_groups for s in group]
        tensors += [s for s in shards if s is not None]
        for state in part.optimizer.state.values():
            tensors += [t for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    return tensors
