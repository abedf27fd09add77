"""Compare the training step with a recorded run of the released Croc or ViCToR code.

CASE.json      configuration ----> RunConfig
state*.safetensors --name map----> CrocModel (any TP, PP)
CASE.safetensors  ids, labels ---> collate ---> Batch, with the recorded patch draw and pixels
                  outputs <------- compare ---- hooks, losses, gradients of one real step
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_croc.config.checks import check_run
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.names import CROC, VICTOR, Layout, Rule, build_rules
from megatron_croc.convert.state import gather_state, load_state
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.collate import ReadySample, collate, expand_sample
from megatron_croc.data.tokenization import TokenizedSample
from megatron_croc.errors import CrocError, DataError
from megatron_croc.log import rank
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.parallel.groups import start_distributed, stop_distributed
from megatron_croc.training.build import build_model, wrap_model
from megatron_croc.training.step import Stepper

SPLIT_IMAGE = (
    "the released head reshapes [images * N, h] to [samples, -1, h], so a text-only sample beside "
    "an image makes it attend within pieces of images; ours groups by image"
)
"""Why the reconstruction of a batch with images and text-only samples cannot agree."""

ROUNDING = 1e-6
"""A gradient this small beside the largest one is an exact zero plus rounding (a key bias inside a
softmax is); the two roundings have nothing to do with each other, so only its size is checked."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recorded run."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]
    layout: Layout

    @property
    def is_recorded(self) -> bool:
        """Whether the reference got to its end (a CRASH case has inputs only)."""
        return "loss" in self.tensors

    @property
    def has_reconstruction(self) -> bool:
        """Whether the reference replaced visual tokens and reconstructed them."""
        if not self.is_recorded:
            return "stage15" in self.name
        return "pool_index" in self.tensors

    @property
    def splits_images(self) -> bool:
        """Whether the reference's head mixed up pieces of images, see SPLIT_IMAGE."""
        has_image = (self.tensors["in_input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
        is_bert = any(name.startswith("transform_block.") for name in self.state)
        return is_bert and self.has_reconstruction and bool(has_image.any() and ~has_image.all())


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the comparison."""

    what: str
    error: float
    note: str = ""
    counts: bool = True
    """Whether an error above the bound is a failure."""


def load_case(path: Path) -> Case:
    """Read a case and the weights it was recorded with."""
    path = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    for file in (path.with_suffix(".json"), path.with_suffix(".safetensors")):
        if not file.exists():
            raise DataError(f"{file}: no such file; name a case as FOLDER/CASE")
    prefixed = path.parent / f"state_{path.name.split('_')[0]}.safetensors"
    state_file = prefixed if prefixed.exists() else path.parent / "state.safetensors"
    if not state_file.exists():
        raise DataError(f"{path}: neither {prefixed.name} nor {state_file.name} lies beside it")
    state = {name: tensor.float() for name, tensor in load_file(state_file).items()}
    return Case(
        name=path.name,
        info=json.loads(path.with_suffix(".json").read_text()),
        tensors=load_file(path.with_suffix(".safetensors")),
        state=state,
        layout=VICTOR if VICTOR.prompt_pool in state else CROC,
    )


def build_run(case: Case, *, tp: int, pp: int, sequence_parallel: bool) -> RunConfig:
    """The reference's configuration in ours."""
    run = RunConfig(stage="pretrain_croc" if case.has_reconstruction else "finetune")
    theirs, vision = case.info["config"]["llm"], case.info["config"]["vision"]
    llm = run.model.language_model
    llm.num_layers = theirs["num_hidden_layers"]
    llm.hidden_size = theirs["hidden_size"]
    llm.ffn_hidden_size = theirs["intermediate_size"]
    llm.num_attention_heads = theirs["num_attention_heads"]
    llm.num_query_groups = theirs["num_key_value_heads"]
    llm.kv_channels = theirs.get("head_dim")
    llm.vocab_size = theirs["vocab_size"]
    llm.norm_epsilon = theirs["rms_norm_eps"]
    llm.rotary_base = theirs["rope_theta"]
    llm.untie_embeddings_and_output_weights = not theirs.get("tie_word_embeddings", False)
    llm.add_qkv_bias = "model.layers.0.self_attn.q_proj.bias" in case.state
    scaling = theirs.get("rope_scaling") or {}
    if scaling:
        llm.rope_scaling_type = scaling.get("rope_type") or scaling["type"]
        llm.rope_scaling_factor = scaling["factor"]
    tower = run.model.vision_tower
    is_clip = f"{case.layout.vision_tower}embeddings.class_embedding" in case.state
    tower.vision_model_type = "clip" if is_clip else "siglip"
    tower.img_size, tower.patch_dim = vision["image_size"], vision["patch_size"]
    tower.vision_num_layers = vision["num_hidden_layers"]
    tower.vision_hidden_size = vision["hidden_size"]
    tower.vision_ffn_hidden_size = vision["intermediate_size"]
    tower.vision_num_attention_heads = vision["num_attention_heads"]
    tower.vision_norm_epsilon = vision["layer_norm_eps"]
    activation = vision.get("hidden_act", "quick_gelu")
    tower.vision_activation = "quick_gelu" if activation == "quick_gelu" else "gelu_tanh"
    tower.vision_select_layer = theirs.get("mm_vision_select_layer", -2)
    pool = case.state[case.layout.prompt_pool]
    run.model.prompt_pool.pool_size = pool.shape[0]
    run.model.prompt_pool.assign_mode = "hungarian" if case.layout is VICTOR else "nearest"
    is_linear = f"{case.layout.linear_head}weight" in case.state
    run.model.reconstruction.reconstruction_head = "linear" if is_linear else "bert"
    has_prefix = case.has_reconstruction and case.layout is CROC
    run.model.attention_mask_type = "prefix" if has_prefix else "causal"
    run.data.seq_length = theirs.get("tokenizer_model_max_length", 2048)
    run.training.bf16 = False
    run.training.freeze_ViT = not any(
        "vision_tower" in name for name in case.info.get("grad_norm", {})
    )
    run.training.micro_batch_size = run.training.global_batch_size = case.tensors[
        "in_input_ids"
    ].shape[0]
    run.parallel.tensor_model_parallel_size = tp
    run.parallel.pipeline_model_parallel_size = pp
    run.parallel.sequence_parallel = sequence_parallel
    return run


def build_batch(case: Case, run: RunConfig) -> Batch:
    """The reference's inputs through our collate, with its patch draw and pixels."""
    num_visual_tokens = run.model.vision_tower.num_visual_tokens
    size = run.model.vision_tower.img_size
    samples = []
    for number, (ids, labels, real) in enumerate(
        zip(
            *(case.tensors[f"in_{k}"] for k in ("input_ids", "labels", "attention_mask")),
            strict=True,
        )
    ):
        tokens = TokenizedSample(
            sample_id=f"{case.name}[{number}]",
            input_ids=ids[real].numpy(),
            labels=labels[real].numpy(),
        )
        tokens = expand_sample(
            tokens, num_visual_tokens=num_visual_tokens, seq_length=run.data.seq_length
        )
        samples.append(ReadySample(tokens=tokens, epoch=0))
    batch = collate(
        samples,
        num_visual_tokens=num_visual_tokens,
        mask_type=run.model.attention_mask_type,
        pad_to_multiple_of=run.parallel.tensor_model_parallel_size,
        seed=0,
        replace_ratio=run.model.prompt_pool.replace_ratio if run.reconstructs else None,
        image_shape=None,
    )
    has_image = (case.tensors["in_input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
    pixels = case.tensors.get("in_pixel_values")
    if pixels is None:  # a CRASH case records none
        pixels = torch.randn(batch.num_images, 3, size, size, generator=torch.manual_seed(0))
    else:
        pixels = pixels[has_image].float()
    replaced = batch.replaced
    if "image_masked_patches" in case.tensors and run.reconstructs:
        replaced = case.tensors["image_masked_patches"][has_image]
    # Recorded in eval mode: no seeds, no dropout.
    return replace(batch, pixel_values=pixels, replaced=replaced, image_seeds=())


class Recorder:
    """Keeps what the model's parts compute during one step, on whichever rank that is."""

    def __init__(self, models: Sequence[CrocModel], tp: dist.ProcessGroup) -> None:
        """Hook the parts this rank holds."""
        self.seen: dict[str, Tensor] = {}
        self.tp = tp
        for model in models:
            parts = {
                "image_features_l2": (model.projector, lambda out: out),
                "vision_features": (model.vision_tower, lambda out: out),
                "pool_index": (model.prompt_pool, lambda out: out.index.flatten()),
                "reconstruction": (model.reconstruction_head, lambda out: out),
            }
            if model.post_process:
                output_layer = model.language_model.output_layer
                parts["logits"] = (output_layer, lambda out: out[0].squeeze(1))
            for name, (module, take) in parts.items():
                if module is not None:
                    module.register_forward_hook(self._hook(name, take))

    def _hook(self, name: str, take: Any) -> Any:
        def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
            # A copy: megatron's cross entropy works on the logits in place.
            self.seen[name] = take(output).detach().clone()

        return keep

    def collect(self) -> dict[str, Tensor]:
        """What was seen anywhere, on every rank; logits joined over the TP ranks."""
        if "logits" in self.seen and self.tp.size() > 1:
            parts = [torch.empty_like(self.seen["logits"]) for _ in range(self.tp.size())]
            dist.all_gather(parts, self.seen["logits"].contiguous(), group=self.tp)
            self.seen["logits"] = torch.cat(parts, dim=-1)
        everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self.seen)
        return {name: tensor for seen in everyone for name, tensor in seen.items()}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest entry."""
    if ours.shape != reference.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    difference = (ours.double() - reference.double()).abs().max().item()
    error = difference / max(reference.double().abs().max().item(), 1e-12)
    return error if math.isfinite(error) else math.inf


def compare_forward(
    case: Case, batch: Batch, seen: dict[str, Tensor], losses: dict[str, float]
) -> Iterator[Finding]:
    """Activations, mask and losses."""
    reference = case.tensors
    has_image = (reference["in_input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
    real = reference["merged_attention_mask"]
    if has_image.any():
        for name, label in {
            "vision_features": "vision features",
            "image_features_l2": "visual embeddings",
        }.items():
            if name in reference:
                yield Finding(
                    what=label, error=relative_error(seen[name], reference[name][has_image])
                )
    if reference.get("pool_index") is not None and reference["pool_index"].numel():
        wrong = (seen["pool_index"] != reference["pool_index"]).sum().item()
        yield Finding(
            what="pool indices",
            error=wrong / reference["pool_index"].numel(),
            note=f"{wrong} of {reference['pool_index'].numel()} differ",
        )
    yield Finding(what="mask", error=float(_mask_differences(batch, reference, real)))
    num_real = int(real.sum())
    vocabulary = reference["logits"].shape[-1]
    yield Finding(
        what="logits (real tokens)",
        error=relative_error(seen["logits"][:num_real, :vocabulary], reference["logits"][real]),
    )
    yield Finding(what="text loss", error=abs(losses["text"] / reference["text_loss"].item() - 1.0))
    if not case.has_reconstruction:
        return
    note = SPLIT_IMAGE if case.splits_images else ""
    counts = not case.splits_images
    recorded = reference["smooth_l1_mean"].item()
    yield Finding(
        what="reconstruction loss",
        error=abs(losses["reconstruction"] - recorded) / max(abs(recorded), 1e-12)
        if recorded or losses["reconstruction"]
        else 0.0,
        note=note,
        counts=counts,
    )
    yield Finding(
        what="total loss",
        error=abs(losses["loss"] / reference["loss"].item() - 1.0),
        note=note,
        counts=counts,
    )


def _mask_differences(batch: Batch, reference: dict[str, Tensor], real: Tensor) -> int:
    """Query-key pairs of real tokens on which the masks disagree; samples must not meet."""
    visible = batch.mixed_mask.visible()
    bounds = batch.mixed_mask.cu_seqlens.tolist()
    theirs = torch.zeros_like(visible)
    for sample, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = real[sample]
        seen = reference["layer_attention_visible"][sample, 0][rows][:, rows]
        theirs[begin:end, begin:end] = seen
    num_real = bounds[-1]
    return int((visible ^ theirs)[:num_real, :num_real].sum())


def compare_gradients(case: Case, ours: dict[str, Tensor]) -> Iterator[Finding]:
    """Every recorded gradient entry by entry, and the norm of those recorded as a norm only."""
    note = SPLIT_IMAGE if case.splits_images else ""
    counts = not case.splits_images
    norms = case.info.get("grad_norm", {})
    largest = max(norms.values(), default=0.0)
    for name, norm in norms.items():
        label = f"grad {name}"
        reference = _recorded_gradient(case, name)
        if name not in ours:
            yield Finding(what=label, error=math.inf, note="no gradient here")
        elif norm < ROUNDING * largest:
            error = ours[name].double().norm().item() / largest
            yield Finding(what=label, error=error, note="zero up to rounding")
        elif reference is not None:
            grad = ours[name][: reference.shape[0]]
            padding = reference.shape[0] - grad.shape[0]  # positions that images never reach
            grad = nn.functional.pad(grad, (0, 0, 0, padding)) if padding else grad
            error = relative_error(grad, reference)
            yield Finding(what=label, error=error, note=note, counts=counts)
        else:
            error = abs(ours[name].double().norm().item() - norm) / norm
            yield Finding(what=label, error=error, note=note or "norm only", counts=counts)


def _recorded_gradient(case: Case, name: str) -> Tensor | None:
    if f"grad.{name}" in case.tensors:
        return case.tensors[f"grad.{name}"]
    if f"grad_rows.{name}" not in case.tensors:
        return None
    rows = case.tensors[f"grad_rows.{name}"]
    full = torch.zeros(case.state[name].shape[0], *rows.shape[1:])
    full[case.tensors[f"grad_rows_index.{name}"]] = rows
    return full


def run_golden(path: Path, *, tp: int, pp: int, sequence_parallel: bool, bound: float) -> int:
    """Compare one case; 0 when every error that counts is within the bound."""
    try:
        return _run_golden(path, tp, pp, sequence_parallel, bound)
    except CrocError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        stop_distributed()


def _run_golden(path: Path, tp: int, pp: int, sequence_parallel: bool, bound: float) -> int:
    case = load_case(path)
    run = build_run(case, tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    check_run(run, tp * pp)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    models = build_model(run, pg)
    rules = build_rules(run.model, case.layout)
    used = set().union(*(load_state(model, case.state, rules) for model in models))
    unused = _unused(case, run, used)
    chunks = wrap_model(run, models, pg)
    recorder = Recorder(models, pg.tp)
    batch = build_batch(case, run)
    totals = Stepper(run, chunks, pg).forward_backward([batch])
    losses = totals.reduce(grad_norm=None)
    seen = recorder.collect()
    gradients = gather_gradients(models, rules)
    if rank() != 0:
        return 0
    print(f"{case.name}: tp {tp}, pp {pp}, sequence parallel {sequence_parallel}")
    if unused:
        print(f"  not part of the computation: {', '.join(unused)}")
    if not case.is_recorded:
        return _report_crash(case, losses.loss, gradients)
    as_dict = {
        "text": losses.text_loss,
        "reconstruction": losses.reconstruction_loss or 0.0,
        "loss": losses.loss,
    }
    findings = [
        *compare_forward(case, batch, seen, as_dict),
        *compare_gradients(case, gradients),
    ]
    return report(findings, bound)


def gather_gradients(models: Sequence[CrocModel], rules: dict[str, Rule]) -> dict[str, Tensor]:
    """Gradients of all trained parameters in the reference's names."""
    return gather_state(models, rules, lambda parameter: getattr(parameter, "main_grad", None))


def _unused(case: Case, run: RunConfig, used: set[str]) -> list[str]:
    """Prefixes of recorded tensors that no rank needed."""
    everyone: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, used)
    left = set(case.state).difference(*everyone)
    return sorted({".".join(name.split(".")[:2]) for name in left})


def _report_crash(case: Case, loss: float, gradients: dict[str, Tensor]) -> int:
    """The reference raised; ours must train."""
    finite = math.isfinite(loss) and all(g.isfinite().all() for g in gradients.values())
    moved = sum(bool(g.abs().max() > 0) for g in gradients.values())
    print(f"  the reference raised: {case.info['exception']}")
    print(f"  here: loss {loss:.4f}, {moved} of {len(gradients)} gradients not zero")
    print("PASSED: it trains here" if finite and moved else "FAILED: it does not train here")
    return 0 if finite and moved else 1


def report(findings: list[Finding], bound: float) -> int:
    """Print the comparison, worst gradients last."""
    forward = [f for f in findings if not f.what.startswith("grad ")]
    gradients = sorted((f for f in findings if f.what.startswith("grad ")), key=lambda f: -f.error)
    for finding in forward:
        _print(finding, bound)
    if gradients:
        print(f"  {len(gradients)} gradients, the worst:")
        for finding in gradients[:5]:
            _print(finding, bound)
    counted = [f for f in findings if f.counts]
    worst = max(counted, key=lambda f: f.error)
    failed = worst.error > bound
    explained = {f.note for f in findings if not f.counts and f.error > bound}
    for note in explained:
        print(f"  differs as it should: {note}")
    verdict = "FAILED" if failed else "PASSED"
    print(f"{verdict}: worst relative error {worst.error:.2e} ({worst.what}), bound {bound:.0e}")
    return int(failed)


def _print(finding: Finding, bound: float) -> None:
    mark = " " if finding.error <= bound else ("!" if finding.counts else "~")
    note = "  (" + finding.note + ")" if finding.note and len(finding.note) < 40 else ""
    print(f"  {mark} {finding.error:9.2e}  {finding.what}{note}")


assert IGNORE_INDEX == -100, "the recorded labels mark positions without a loss with -100"
