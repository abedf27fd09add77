"""The time model against throughputs others measured and published (text-only models).

It was fitted to the rows marked `fitted`: their small errors prove nothing. The systems differ from
ours (FSDP instead of the distributed optimizer in all but Megatron's rows).
"""

from dataclasses import dataclass

from megatron_croc.config.run import RunConfig
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.step_time import estimate_step
from megatron_croc.planning.workload import Workload

_FOUNDRY = "llm-foundry benchmarking README, 061f2c7"
_TITAN = "torchtitan llama3_h100_202412, 31a17bf"
_SC21 = "Megatron-LM, arXiv 2104.04473, table 1"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published measurement."""

    name: str
    gpu: str
    gpus: int
    tokens: float
    """Per second and GPU."""

    source: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    """Of a gated feed-forward; 8/3 of the width stands for an ungated one of 4 widths."""

    vocab: int
    length: int
    micro: int
    batch: int
    groups: int | None = None
    tp: int = 1
    pp: int = 1
    recompute: bool = False
    fitted: bool = False

    def run(self) -> RunConfig:
        """As a run of ours, without images."""
        run = RunConfig(stage="finetune")
        llm = run.model.language_model
        llm.num_layers, llm.hidden_size, llm.ffn_hidden_size = self.layers, self.hidden, self.ffn
        llm.num_attention_heads, llm.num_query_groups = self.heads, self.groups or self.heads
        llm.vocab_size = self.vocab
        run.model.attention_mask_type = "causal"
        run.data.seq_length = self.length
        run.parallel.tensor_model_parallel_size = self.tp
        run.parallel.pipeline_model_parallel_size = self.pp
        run.training.micro_batch_size, run.training.global_batch_size = self.micro, self.batch
        run.training.recompute_granularity = "full" if self.recompute else "none"
        run.training.freeze_projector = True
        run.optimizer.overlap_grad_reduce = True
        return run

    def predict(self) -> float:
        """Tokens per second and GPU by our model."""
        lengths = (float(self.length),)
        workload = Workload(lengths=lengths, images=0.0, peak_tokens=self.length)
        step = estimate_step(self.run(), self.gpus, get_gpu(self.gpu), workload)
        return step.tokens / step.total / self.gpus


def _mpt(size: str, gpu: str, gpus: int, tokens: float, micro: int, batch: int, **kw) -> Published:
    layers, hidden, heads = {"7b": (32, 4096, 32), "13b": (40, 5120, 40), "70b": (80, 8192, 64)}[
        size
    ]
    settings = {"length": 2048, **kw}
    return Published(
        name=f"MPT-{size}, {settings['length']} tokens",
        gpu=gpu,
        gpus=gpus,
        tokens=tokens,
        source=_FOUNDRY,
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=round(hidden * 8 / 3),
        vocab=50368,
        micro=micro,
        batch=batch,
        **settings,
    )


def _llama3(gpus: int, tokens: float) -> Published:
    return Published(
        name="Llama-3.1-8B, 8192 tokens, compiled",
        gpu="h100",
        gpus=gpus,
        tokens=tokens,
        source=_TITAN,
        layers=32,
        hidden=4096,
        heads=32,
        groups=8,
        ffn=14336,
        vocab=128256,
        length=8192,
        micro=2,
        batch=2 * gpus,
    )


def _megatron(
    billions: float,
    layers: int,
    hidden: int,
    heads: int,
    *,
    tp: int,
    pp: int,
    gpus: int,
    batch: int,
    tflops: float,
) -> Published:
    # The paper's own count, recomputation included: 96 B s l h^2 (1 + s/6h + V/16lh).
    length, vocab = 2048, 51200
    per_token = (
        96 * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))
    )
    return Published(
        name=f"GPT {billions}B, TP {tp} x PP {pp}",
        gpu="a100",
        gpus=gpus,
        tokens=tflops * 1e12 / per_token,
        source=_SC21,
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=round(hidden * 8 / 3),
        vocab=vocab,
        length=length,
        micro=1,  # the paper does not say which; no sequence parallelism existed then
        batch=batch,
        tp=tp,
        pp=pp,
        recompute=True,
    )


CASES = (
    _mpt("7b", "h100", 8, 10643, 6, 48, fitted=True),
    _mpt("13b", "h100", 8, 4792, 2, 16, fitted=True),
    _mpt("13b", "h100", 64, 4800, 2, 128),
    _mpt("70b", "h100", 64, 1039, 8, 2048, recompute=True, fitted=True),
    _mpt("7b", "h100", 8, 8611, 16, 256, length=4096, recompute=True),
    _mpt("7b", "a100", 8, 4641, 6, 96, fitted=True),
    _mpt("13b", "a100", 8, 2262, 2, 48, fitted=True),
    _mpt("7b", "a100", 8, 3684, 16, 256, length=4096, recompute=True),
    _mpt("70b", "a100", 64, 410, 8, 2048, recompute=True),
    _llama3(8, 6667),
    _llama3(128, 6514),
    _megatron(7.5, 36, 4096, 32, tp=4, pp=1, gpus=128, batch=512, tflops=142),
    _megatron(18.4, 40, 6144, 48, tp=8, pp=1, gpus=256, batch=1024, tflops=135),
    _megatron(39.1, 48, 8192, 64, tp=8, pp=2, gpus=512, batch=1536, tflops=138),
    _megatron(76.1, 60, 10240, 80, tp=8, pp=4, gpus=1024, batch=1792, tflops=140),
    _megatron(145.6, 80, 12288, 96, tp=8, pp=8, gpus=1536, batch=2304, tflops=148),
)


def comparison() -> str:
    """Markdown: published, predicted, error."""
    lines = [
        "| model | GPUs | published tokens/s/GPU | model | error | source |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        predicted = case.predict()
        mark = " (fitted)" if case.fitted else ""
        lines.append(
            f"| {case.name}{', recomputed' if case.recompute else ''} | {case.gpus} {case.gpu} | "
            f"{case.tokens:,.0f} | {predicted:,.0f} | {predicted / case.tokens - 1:+.0%}{mark} | "
            f"{case.source} |"
        )
    return "\n".join(lines)
