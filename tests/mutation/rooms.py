"""Tests that guard each part of the package, quickest first.

A mutant of a module is tried against the tests of the longest prefix of its path.
"""

POSITION_OPS = "tests/unit/ops/test_triton_position_ops.py"
FLIP = ["tests/unit/ops/test_flip.py", "tests/unit/ops/test_attention.py"]
MODEL = ["tests/unit/model", "tests/golden", "tests/distributed/test_layouts.py"]

TESTS: dict[str, list[str]] = {
    "megatron_croc/ops/assignment": [
        "tests/unit/ops/test_assignment.py",
        "tests/unit/ops/test_assignment_on_cpu.py",
    ],
    "megatron_croc/ops/attention": FLIP,
    "megatron_croc/ops/attention/dense.py": [
        "tests/unit/model/test_core_attention.py",
        "tests/unit/model/test_vision_tower.py",
        *FLIP,
    ],
    "megatron_croc/ops/attention/flash.py": ["tests/unit/ops/test_flash.py", *FLIP],
    "megatron_croc/ops/attention/flex.py": ["tests/unit/ops/test_flex_kernel.py", *FLIP],
    "megatron_croc/ops/attention/triton_position_ops.py": [POSITION_OPS],
    "megatron_croc/ops/flip_plan.py": [*FLIP, POSITION_OPS],
    "megatron_croc/ops/mixed_mask.py": ["tests/unit/ops/test_mixed_mask.py", *FLIP],
    "megatron_croc/ops/patch_selection.py": ["tests/unit/ops/test_patch_selection.py"],
    "megatron_croc/ops/reconstruction_loss.py": ["tests/unit/ops/test_reconstruction_loss.py"],
    "megatron_croc/model": MODEL,
    "megatron_croc/training/step.py": [
        "tests/unit/training/test_step.py",
        "tests/unit/training/test_optimizer.py",
        "tests/unit/training/test_host_reads.py",
        "tests/golden",
    ],
    "megatron_croc/training/optimizer.py": ["tests/unit/training/test_optimizer.py"],
    "megatron_croc/training/reporting": ["tests/unit/training/reporting"],
    "megatron_croc/data/order": ["tests/unit/data/order", "tests/unit/data/test_loader.py"],
    "megatron_croc/checkpoint": [
        "tests/unit/checkpoint",
        "tests/distributed/test_checkpoint.py",
        "tests/distributed/test_checkpoint_shares.py",
        "tests/distributed/test_checkpoint_faults.py",
    ],
    "megatron_croc/planning": ["tests/unit/planning", "tests/distributed/test_memory_estimate.py"],
}

LEFT_OUT = {
    "megatron_croc/ops/assignment/on_gpu.py": "no test without a GPU runs it",
    "megatron_croc/ops/assignment/triton_kernel.py": "the interpreter takes half a minute",
    "megatron_croc/planning/published.py": "figures that others published",
}
"""Files that are not mutated, and why."""


def tests_of(path: str) -> list[str]:
    """Tests that guard one file; empty where no entry fits."""
    fitting = [prefix for prefix in TESTS if path == prefix or path.startswith(prefix + "/")]
    return TESTS[max(fitting, key=len)] if fitting else []
