"""Tests that guard each part of the package, quickest first.

A mutant of a module is tried against the tests of the longest prefix of its path.
"""

ATTENTION = [
    "tests/unit/ops/test_attention.py",
    "tests/unit/ops/test_flip.py",
    "tests/unit/ops/test_flash.py",
    "tests/unit/ops/test_flex_kernel.py",
    "tests/unit/ops/test_triton_rows.py",
]
ASSIGNMENT = ["tests/unit/ops/test_assignment.py", "tests/unit/ops/test_assignment_on_device.py"]
SAVES = [
    "tests/unit/checkpoint",
    "tests/distributed/test_checkpoint.py",
    "tests/distributed/test_checkpoint_shares.py",
    "tests/distributed/test_checkpoint_faults.py",
]
MODEL = ["tests/unit/model", "tests/golden", "tests/distributed/test_layouts.py"]

TESTS: dict[str, list[str]] = {
    "megatron_croc/ops/attention": ATTENTION,
    "megatron_croc/ops/flip_plan.py": ATTENTION,
    "megatron_croc/ops/mixed_mask.py": ["tests/unit/ops/test_mixed_mask.py", *ATTENTION],
    "megatron_croc/ops/assignment": ASSIGNMENT,
    "megatron_croc/ops/patch_selection.py": ["tests/unit/ops/test_patch_selection.py"],
    "megatron_croc/ops/reconstruction_loss.py": ["tests/unit/ops/test_reconstruction_loss.py"],
    "megatron_croc/model": MODEL,
    "megatron_croc/training/step.py": [
        "tests/unit/training/test_step.py",
        "tests/unit/training/test_optimizer.py",
        "tests/unit/training/test_host_reads.py",
        "tests/golden",
    ],
    "megatron_croc/training/optimizer.py": [
        "tests/unit/training/test_optimizer.py",
        "tests/unit/training/test_grad_norm.py",
        "tests/unit/training/test_distributed_adam.py",
    ],
    "megatron_croc/training/reporting": ["tests/unit/training/reporting"],
    "megatron_croc/data/order": ["tests/unit/data/order", "tests/unit/data/test_loader.py"],
    "megatron_croc/checkpoint": SAVES,
    "megatron_croc/planning": ["tests/unit/planning", "tests/distributed/test_memory_estimate.py"],
}

NEEDS_GPU = (
    "megatron_croc/ops/assignment/on_gpu.py",
    "megatron_croc/ops/assignment/triton_kernel.py",
)
"""Left out: no test without a GPU runs them."""


def tests_of(path: str) -> list[str]:
    """Tests that guard one file; empty where no entry fits."""
    fitting = [prefix for prefix in TESTS if path == prefix or path.startswith(prefix + "/")]
    return TESTS[max(fitting, key=len)] if fitting else []
