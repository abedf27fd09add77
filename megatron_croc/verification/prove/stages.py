"""The list: what is shown on a GPU, most telling first, in boxes of 25 minutes together.

Every stage exists in two sizes: for a GPU, and small, for a dry run on a CPU that keeps the list
itself in order. Kernels, speed and memory are measured by scripts of benchmarks/, correctness by
`croc` and by tests.
"""

from collections.abc import Sequence

from megatron_croc.verification.prove import figures
from megatron_croc.verification.prove.stage import Command, Place, Stage

REAL_RECIPES = ("croc_7b", "croc_13b", "victor_7b")
STAGES_OF_TRAINING = ("pretrain_mlp", "pretrain_croc", "finetune")
HIDDEN_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def _doctor(place: Place) -> Sequence[Command]:
    # The doctor's status says if this machine can train, which the stages below find out anyway.
    command = place.croc("doctor", "--recipe", "tiny/pretrain_croc")
    return [Command(words=command.words, may_fail=True), place.croc("--version")]


def _kernels(place: Place) -> Sequence[Command]:
    tests = sorted((place.checkout / "tests").rglob("test_*_gpu.py"))
    return [
        place.python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu", *tests)
    ]


def _golden(place: Place) -> Sequence[Command]:
    folder = place.checkout / "tests" / "golden" / "cases"
    cases = ["croc/mha_stage15"]
    if not place.is_small:
        cases += ["croc/mha_stage1_plain", "croc/mha_stage2", "victor/stage15"]
        cases += ["croc/mha_stage15_all_textonly", "croc/mha_stage15_image_plus_textonly"]
    return [place.croc("parity", "golden", *(folder / case for case in cases))]


def _against_cpu(place: Place) -> Sequence[Command]:
    words = ("--recipe", "tiny/pretrain_croc", "--layouts", "tp1", "--reference-on-cpu")
    return [place.croc("parity", "layouts", *words, "--steps", 3, "--out", place.folder)]


def _three_stages(place: Place) -> Sequence[Command]:
    demo, runs = place.shared / "demo", place.folder
    commands = [place.croc("data", "demo", "--out", demo, "--num-images", 48)]
    before = None
    for stage in STAGES_OF_TRAINING:
        shards = demo / "shards" / stage
        source = ("--input", demo / f"{stage}.json", "--image-folder", demo / "images")
        commands.append(place.croc("data", "preprocess", *source, "--output", shards))
        start = ("--pretrained-checkpoint", before) if before else ()
        commands.append(_train(place, stage, runs / stage, *start, iters=4))
        before = runs / stage
    export = place.folder / "hf"
    commands += [
        place.croc("convert", "export", "--load", before, "--to", export),
        place.croc("convert", "verify", "--hf", export, "--load", before),
    ]
    return commands


def _train(place: Place, stage: str, save: object, *words: object, iters: int) -> Command:
    demo = place.shared / "demo"
    return place.croc(
        *("train", "--recipe", f"tiny/{stage}", "--train-iters", iters, "--log-interval", 1),
        *("--global-batch-size", 4, "--micro-batch-size", 2, "--bf16", "--save", save),
        *("--data-path", demo / "shards" / stage),
        *("--tokenizer-model", demo / "tokenizer.model", *words),
    )


def _resume(place: Place) -> Sequence[Command]:
    whole, parts = place.folder / "whole", place.folder / "parts"
    words = ("--deterministic",)
    return [
        _train(place, "pretrain_croc", whole, *words, iters=6),
        _train(place, "pretrain_croc", parts, *words, "--exit-interval", 3, iters=6),
        _train(place, "pretrain_croc", parts, *words, iters=6),
        place.croc("parity", "runs", whole, parts, "--bound", 0),
    ]


def _attention(place: Place) -> Sequence[Command]:
    if place.is_small:
        small = ("--heads", 2, "--groups", 1, "--head-dim", 16, "--image", 16, "--repeats", 1)
        return [place.benchmark("attention.py", *small, "--rows", "one sample", "--lengths", 64)]
    return [place.benchmark("attention.py", "--lengths", 2048, 4096, 8192, 16384, 32768)]


def _matching(place: Place) -> Sequence[Command]:
    if place.is_small:
        small = ("--shapes", "24x64", "--batches", 1, "--hidden-size", 16, "--budget", 0.01)
        return [place.benchmark("assignment.py", *small)]
    return [
        place.benchmark(
            "assignment.py", "--device", "cuda", "--shapes", "432x2048", "--batches", 1, 16
        )
    ]


def _layers(place: Place, recipe: str) -> tuple[object, ...]:
    """Options that take as many layers as fit.

    A language model with its optimizer has 18 bytes a parameter: the 7B ones need 141 GB and
    recomputation; on 80 GB, half of the layers.
    """
    half = {"croc_13b": 10, "victor_7b": 12}.get(recipe, 14)
    large = {"croc_13b": 18}.get(recipe)
    layers = half if place.machine.memory_gib < 120 else large
    return ("--num-layers", layers) if layers else ()


def _step(recipe: str) -> Stage:
    def commands(place: Place) -> Sequence[Command]:
        if place.is_small:
            small = ("--recipe", "tiny/pretrain_croc", "--masks", "causal", "visual")
            return [place.benchmark("step.py", *small, "--repeats", 1, "--micro-batch-sizes", 1)]
        words = ("--recipe", f"{recipe}/pretrain_croc", "--masks", "causal", "visual", "--sweep")
        return [place.benchmark("step.py", *words, *_layers(place, recipe), "--repeats", 5)]

    return Stage(
        name=f"step_{recipe}",
        shows=f"a training step of {recipe}/pretrain_croc with random weights: speed and memory",
        minutes=4 if recipe == "croc_7b" else 1.5,
        commands=commands,
        figures=figures.of_step,
        recipes=(recipe,),
        missing=_needs_gpu_unless_small if recipe == "croc_7b" else _needs_gpu,
    )


def _step_fp8(place: Place) -> Sequence[Command]:
    words = ("--recipe", "croc_7b/pretrain_croc", *_layers(place, "croc_7b"), "--masks", "visual")
    sizes = ("--micro-batch-sizes", 4, 8, "--recompute", "--repeats", 5)
    return [place.benchmark("step.py", *words, *sizes, "--fp8-format", "hybrid")]


def _beside_release(place: Place) -> Sequence[Command]:
    assert place.peer is not None, "left out without it"
    folder, python = place.peer
    words = ("--peer-croc", folder, "--python-croc", python)
    if place.is_small:
        small = ("--sizes", "tiny", "--vocabularies", 512, "--repeats", 1)
        return [place.benchmark("step_beside_release.py", *words, *small)]
    words += ("--device", "cuda", "--dtype", "bf16", "--sizes", "wide", "--vocabularies", 32000)
    return [place.benchmark("step_beside_release.py", *words)]


def _loader(place: Place) -> Sequence[Command]:
    if place.is_small:
        small = ("--images", 8, "--seconds", 0.2, "--repeats", 1, "--batch", 4, "--ways", "ours")
        return [place.benchmark("data.py", *small)]
    return [place.benchmark("data.py", "--seconds", 6, "--repeats", 1)]


def _layouts(place: Place) -> Sequence[Command]:
    most = min(place.machine.num_gpus, 8) if not place.is_small else 2
    layouts = f"all{most}" if not place.is_small else "tp2+sp"
    words = ("--recipe", "tiny/pretrain_croc", "--layouts", layouts, "--steps", 2)
    return [place.croc("parity", "layouts", *words, "--out", place.folder)]


def _network(place: Place) -> Sequence[Command]:
    processes = 2 if place.is_small else place.machine.num_gpus
    return [place.torchrun(processes, "doctor", "--network", "--brief")]


def _costs(place: Place) -> Sequence[Command]:
    script = place.checkout / "benchmarks" / "kernel_costs.py"
    words = (script, "--out", place.folder, "--repeats", 2 if place.is_small else 20)
    if place.machine.num_gpus < 2 and not place.is_small:
        return [place.python(*words)]
    processes = 2 if place.is_small else place.machine.num_gpus
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return [place.python("-m", *launcher, *words)]


def _needs_gpu(place: Place) -> str | None:
    return None if place.machine.num_gpus else "needs a GPU"


def _needs_gpu_unless_small(place: Place) -> str | None:
    return None if place.is_small else _needs_gpu(place)


def _needs_gpus(place: Place) -> str | None:
    return None if place.is_small or place.machine.num_gpus > 1 else "needs two GPUs or more"


def _needs_fp8(place: Place) -> str | None:
    if not place.machine.has("transformer-engine"):
        return "Transformer Engine is not installed"
    return _needs_gpu(place)


def _needs_peer(place: Place) -> str | None:
    if place.peer is None:
        return "needs --peer-croc, a checkout of the released code"
    return _needs_gpu_unless_small(place)


def _needs_dali(place: Place) -> str | None:
    return None if place.machine.has("nvidia-dali-cuda130") else "nvidia-dali is not installed"


STAGES = (
    Stage(
        name="doctor",
        shows="devices, versions, and which kernels training will use",
        minutes=0.7,
        commands=_doctor,
        recipes=("tiny", *REAL_RECIPES),
    ),
    Stage(
        name="kernels",
        shows="GPU tests: flash backends against the formula, Triton kernels, matching",
        minutes=2.5,
        commands=_kernels,
        recipes=("tiny", *REAL_RECIPES),
        missing=_needs_gpu_unless_small,
    ),
    Stage(
        name="golden",
        shows="recorded steps of the released code, gradients included (fp32, TF32 off)",
        minutes=1.5,
        commands=_golden,
        figures=figures.of_golden,
        recipes=("croc_7b", "victor_7b"),
    ),
    Stage(
        name="against_cpu",
        shows="losses and every gradient of a tiny step equal those of the CPU",
        minutes=0.8,
        commands=_against_cpu,
        figures=figures.of_layouts,
    ),
    Stage(
        name="three_stages",
        shows="three stages in bf16, saved, exported to Hugging Face, and verified",
        minutes=2.5,
        commands=_three_stages,
    ),
    Stage(
        name="resume",
        shows="with --deterministic a resumed run equals one without a break, bit for bit",
        minutes=1.2,
        commands=_resume,
    ),
    Stage(
        name="attention",
        shows="mixed attention beside causal flash (E: 1 is causal flash's speed per pair)",
        minutes=2.5,
        commands=_attention,
        figures=figures.of_attention,
        recipes=REAL_RECIPES,
        missing=_needs_gpu_unless_small,
    ),
    Stage(
        name="matching",
        shows="one-to-one matching: time of an image beside scipy's",
        minutes=1.3,
        commands=_matching,
        figures=figures.of_matching,
        recipes=("croc_7b",),
        missing=_needs_gpu_unless_small,
    ),
    *map(_step, REAL_RECIPES),
    Stage(
        name="step_fp8",
        shows="the step of croc_7b/pretrain_croc with matrix products in fp8",
        minutes=0.7,
        commands=_step_fp8,
        figures=figures.of_step,
        recipes=("croc_7b",),
        missing=_needs_fp8,
    ),
    Stage(
        name="beside_release",
        shows="a training step of 8 layers of the 7B widths beside the released code's, bf16",
        minutes=2,
        commands=_beside_release,
        figures=figures.of_beside_release,
        recipes=("croc_7b",),
        missing=_needs_peer,
    ),
    Stage(
        name="loader",
        shows="loading of images beside other loaders, and what a step waits for",
        minutes=1.5,
        commands=_loader,
        figures=figures.of_loader,
        recipes=("croc_7b",),
        missing=_needs_dali,
    ),
    Stage(
        name="costs",
        shows="table of costs for croc rehearse --costs",
        minutes=0.7,
        commands=_costs,
        figures=figures.of_costs,
        recipes=("tiny",),
    ),
    Stage(
        name="layouts",
        shows="losses and every gradient of each parallel layout equal one process's",
        minutes=1,
        commands=_layouts,
        figures=figures.of_layouts,
        missing=_needs_gpus,
    ),
    Stage(
        name="network",
        shows="time of collectives between the processes of this machine",
        minutes=0.5,
        commands=_network,
        missing=_needs_gpus,
    ),
)
"""In the order in which they are run."""
