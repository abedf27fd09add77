"""Devices and kernels that training will use here, with the reasons against faster ones."""

import logging
from collections.abc import Iterator

import torch

from megatron_croc.cli.doctor.finding import Finding
from megatron_croc.cli.doctor.installed import version_of
from megatron_croc.config.run import RunConfig
from megatron_croc.data.sample.decode import resolve_decoder
from megatron_croc.errors import DataError
from megatron_croc.parallel import device


def look_at_devices() -> Iterator[Finding]:
    """GPUs of this node, or that there is none."""
    if not device.has_cuda():
        built_for = torch.version.cuda
        reason = "torch is a CPU build" if built_for is None else "no GPU is visible"
        yield Finding("note", "device", f"CPU and gloo: {reason}", "fine for tests and trials")
        return
    for line in device.describe_gpus():
        yield Finding("ok", "GPU", line)
    yield Finding("ok", "CUDA, NCCL", device.describe_cuda())


def look_at_choices(run: RunConfig) -> Iterator[Finding]:
    """Find the implementation that each part of `run` will use."""
    yield _attention(run)
    yield _adam()
    yield _images(run)


def _attention(run: RunConfig) -> Finding:
    from megatron_croc.errors import ConfigError
    from megatron_croc.ops.attention.backends import choose_backend

    model = run.model.language_model
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    query = torch.empty(
        8, model.num_attention_heads, model.head_dim, dtype=dtype, device=device.current_device()
    )
    try:
        name = choose_backend(run.model.attention_backend, query)
    except ConfigError as error:
        return Finding("error", "attention", str(error))
    slow = device.has_cuda() and name == "dense"
    remedy = "install flash-attn, or a torch with flash kernels" if slow else ""
    return Finding("warning" if slow else "ok", "attention", name, remedy)


def _adam() -> Finding:
    """megatron-core takes the first of these that imports."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for name, module in (
        ("Transformer Engine's FusedAdam", "transformer_engine.pytorch.optimizers"),
        ("apex's FusedAdam", "apex.optimizers"),
    ):
        try:
            __import__(module)
        except Exception:  # absent, or broken: `look_at_packages` says which
            continue
        found = version_of(module)
        return Finding("ok", "optimizer", f"{name} {found}" if found else name)
    level = "note" if device.has_cuda() else "ok"
    remedy = "Transformer Engine or apex bring a fused one" if device.has_cuda() else ""
    return Finding(level, "optimizer", "torch's AdamW", remedy)


def _images(run: RunConfig) -> Finding:
    try:
        decoder = resolve_decoder(run.data.image_decoder)
    except DataError as error:
        return Finding("error", "image decoder", str(error))
    if decoder != "pil":
        return Finding("ok", "image decoder", {"dali": "DALI", "dali_gpu": "DALI, GPU"}[decoder])
    return Finding("note", "image decoder", "PIL", "DALI takes less CPU time: install nvidia-dali")
