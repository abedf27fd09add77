from pathlib import Path

import pytest

from megatron_croc.config.base import apply_changes, changes_from_words
from megatron_croc.config.checks import check_run, find_faults, find_warnings
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.ops.patch_selection import num_kept
from megatron_croc.recipes import get_recipe


def tiny(words: str, stage: str = "pretrain_croc") -> RunConfig:
    run, faults = get_recipe(f"tiny/{stage}"), list[str]()
    apply_changes(run, changes_from_words(RunConfig, words.split(), faults))
    assert faults == []
    return run


# One impossible setting each, on a run that is fine without it; the fault names all of `says`.
IMPOSSIBLE = [
    ("--tensor-model-parallel-size 4", 4, "num_query_groups=2"),
    ("--balance-replicas 5", 1, "balance_replicas=5: must be a positive divisor of"),
    ("--balance-replicas 0", 1, "balance_replicas=0"),
    ("--tensor-model-parallel-size 8", 8, "num_attention_heads=4"),
    ("--tensor-model-parallel-size 2 --ffn-hidden-size 255", 2, "ffn_hidden_size=255"),
    (
        "--tensor-model-parallel-size 2 --vision-num-attention-heads 1",
        2,
        "vision_num_attention_heads=1",
    ),
    ("--tensor-model-parallel-size 2 --vision-ffn-hidden-size 99", 2, "vision_ffn_hidden_size=99"),
    ("--pipeline-model-parallel-size 3", 3, "num_layers=4"),
    ("--pipeline-model-parallel-size 8", 8, "num_layers=4"),
    (
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4",
        2,
        "decoder_first_pipeline_num_layers=4",
    ),
    ("--decoder-last-pipeline-num-layers 2", 1, "decoder_last_pipeline_num_layers=2"),
    (
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 "
        "--decoder-last-pipeline-num-layers 1",
        2,
        "2 layers cannot be split evenly over 0",
    ),
    ("--virtual-pipeline-model-parallel-size 2", 1, "virtual_pipeline_model_parallel_size=2"),
    (
        "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 3",
        2,
        "must divide the 2 layers",
    ),
    (
        "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2 "
        "--global-batch-size 12",
        2,
        "groups of pipeline_model_parallel_size=2",
    ),
    ("--sequence-parallel", 1, "sequence_parallel needs tensor_model_parallel_size > 1"),
    ("--tensor-model-parallel-size 2", 3, "world_size=3"),
    ("--context-parallel-size 2", 3, "context_parallel_size=2"),
    ("--context-parallel-size 2 --seq-length 511", 2, "seq_length=511: must be a multiple of 2"),
    ("--micro-batch-size 5", 1, "global_batch_size=32: must be a multiple of micro_batch_size=5"),
    ("", 16, "data_parallel_size=16 = 64"),
    ("--img-size 100", 1, "img_size=100: must be a multiple of patch_dim=14; 98"),
    ("--vision-model-type siglip --img-size 13", 1, "smaller than one patch"),
    ("--vision-hidden-size 66", 1, "vision_hidden_size=66"),
    ("--vision-select-layer 5", 1, "vision_select_layer=5"),
    ("--image-std 0 1 1", 1, "image_std"),
    ("--hidden-size 130", 1, "hidden_size=130"),
    ("--kv-channels 31", 1, "even width"),
    ("--num-query-groups 3", 1, "num_query_groups=3"),
    ("--hidden-size 96", 1, "reconstruction_head=linear"),
    ("--rope-scaling-factor 2", 1, "without rope_scaling_type"),
    ("--rope-scaling-type linear --rope-scaling-factor 0.5", 1, "at least 1.0"),
    ("--num-layers 0", 1, "num_layers=0: must be positive"),
    ("--micro-batch-size -1", 1, "micro_batch_size=-1: must be positive"),
    ("--pool-size 47", 1, "pool_size=47: assign_mode=hungarian gives each of the 48"),
    ("--replace-ratio 1", 1, "replace_ratio=1.0"),
    ("--replace-ratio 0", 1, "replace_ratio=0.0"),
    ("--smooth-l1-beta 0", 1, "smooth_l1_beta"),
    ("--reconstruction-dropout 1", 1, "reconstruction_dropout"),
    ("--reconstruction-loss-weight -1", 1, "reconstruction_loss_weight"),
    ("--seq-length 64", 1, "seq_length=64: one image alone takes 64"),
    ("--lr 0", 1, "lr=0.0: must be positive"),
    ("--projector-lr -1", 1, "projector_lr=-1.0"),
    ("--min-lr 1", 1, "min_lr=1.0"),
    ("--lr-warmup-fraction 1", 1, "lr_warmup_fraction=1.0"),
    ("--adam-beta2 1", 1, "adam_beta2=1.0"),
    ("--adam-eps 0", 1, "adam_eps"),
    ("--clip-grad -1", 1, "clip_grad=-1.0"),
    ("--vision-lr 1e-6", 1, "vision_lr=1e-06 for a part that freeze_ViT"),
    ("--freeze-projector", 1, "projector_lr=0.002 for a part that freeze_projector"),
    ("--overlap-param-gather", 1, "overlap_param_gather needs overlap_grad_reduce"),
    (
        "--fp8-format hybrid --bf16 --fp8-recipe blockwise --hidden-size 192 --sequence-parallel "
        "--tensor-model-parallel-size 2",
        2,
        "hidden_size=192: fp8_recipe=blockwise with sequence_parallel takes multiples of 128",
    ),
    ("--optimizer-cpu-offload", 1, "optimizer_cpu_offload=True: megatron's hybrid optimizer"),
    ("--no-use-distributed-optimizer", 1, "use_distributed_optimizer=False"),
    ("--eval-interval 5", 1, "eval_interval=5 without valid_data_path"),
    ("--exit-interval 0", 1, "exit_interval=0"),
    ("--exit-duration-in-mins 0", 1, "exit_duration_in_mins=0"),
    ("--distributed-timeout-minutes 0", 1, "distributed_timeout_minutes=0"),
    ("--stall-timeout-minutes 0", 1, "stall_timeout_minutes=0"),
    ("--distributed-timeout-minutes 14", 1, "1.5 x stall_timeout_minutes=10.0 = 15 or more"),
    ("--first-step-timeout-minutes 30", 1, "1.5 x first_step_timeout_minutes=30.0 = 45 or more"),
    ("--max-consecutive-skips=-1", 1, "max_consecutive_skips=-1"),
    ("--spike-factor 0.5", 1, "spike_factor=0.5: must be above 1"),
    ("--eval-answers-iters 2", 1, "eval_answers_iters=2 without validation"),
    ("--eval-answers-iters 2", 1, "eval_answers_iters=2 with stage=pretrain_croc"),
    ("--train-iters 0", 1, "train_iters=0"),
    ("--train-epochs 0", 1, "train_epochs=0.0"),
    ("--num-workers -1", 1, "num_workers=-1"),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 5",
        1,
        "recompute_num_layers=5",
    ),
    ("--save runs/a --pretrained-checkpoint ./runs/a/", 1, "pretrained_checkpoint"),
]


@pytest.mark.parametrize(("words", "world_size", "says"), IMPOSSIBLE)
def test_an_impossible_setting_is_refused_by_name(words: str, world_size: int, says: str):
    faults = find_faults(tiny(words), world_size)
    assert any(says in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("", 1),
        ("", 8),
        ("--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2", 4),
        ("--pipeline-model-parallel-size 4", 4),
        ("--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2", 4),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2),
        (
            "--num-layers 6 --pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 2",
            3,
        ),
        ("--pool-size 48", 1),
        ("--pool-size 1 --assign-mode nearest", 1),
        ("--vision-model-type siglip --img-size 116", 1),
        ("--hidden-size 96 --reconstruction-head linear", 1),
        ("--freeze-LM --freeze-projector --projector-lr none", 1),  # pool and head still train
        ("--overlap-grad-reduce --overlap-param-gather", 2),
    ],
)
def test_a_possible_run_is_not_refused(words: str, world_size: int):
    assert find_faults(tiny(words), world_size) == []


def test_frozen_everything_is_refused_where_nothing_else_trains():
    run = tiny("--freeze-LM --freeze-projector --projector-lr none", stage="finetune")
    assert any("trains nothing else" in fault for fault in find_faults(run, 1))


def test_pool_rules_bind_only_where_tokens_are_reconstructed():
    assert find_faults(tiny("--pool-size 1 --replace-ratio 1", stage="finetune"), 1) == []


def test_all_faults_in_one_error():
    run = tiny("--tensor-model-parallel-size 3 --lr 0 --pool-size 1 --seq-length 10 --img-size 99")
    with pytest.raises(ConfigError) as error:
        check_run(run, 7)
    text = str(error.value)
    for name in ("tensor_model_parallel_size=3", "world_size=7", "lr=0.0", "seq_length=10"):
        assert name in text
    assert len(text.splitlines()) >= 7


def test_training_needs_its_inputs_to_exist(tmp_path: Path):
    run = tiny("--valid-data-path gone --pretrained-checkpoint away --eval-interval 1")
    text = "\n".join(find_faults(run, 1, for_training=True))
    for says in ("data_path is not given", "valid_data_path=gone", "tokenizer_model is not given"):
        assert says in text
    assert "pretrained_checkpoint=away" in text
    tokenizer = tmp_path / "tokenizer.model"
    run.data.data_path = run.data.valid_data_path = (str(tmp_path),)
    run.data.tokenizer_model = str(tokenizer)
    run.checkpoint.pretrained_checkpoint = str(tmp_path)
    assert "no such file" in "\n".join(find_faults(run, 1, for_training=True))
    tokenizer.touch()
    assert find_faults(run, 1, for_training=True) == []
    run.data.tokenizer_type = "HuggingFaceTokenizer"  # a directory, not a file
    assert "no such directory" in "\n".join(find_faults(run, 1, for_training=True))


@pytest.mark.parametrize(
    ("words", "stage", "says"),
    [
        ("--seq-length 8192", "pretrain_croc", "made for 4096 positions"),
        ("--prompt-pool-lr 1e-3", "finetune", "prompt_pool_lr=0.001 has no effect"),
        ("--recompute-vision", "finetune", "recompute_vision has no effect"),
        (
            "--attention-mask-type prefix --conversation-template qwen_1_5",
            "pretrain_croc",
            "nearly causal",
        ),
        ("--valid-data-path a", "finetune", "never validates"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(words: str, stage: str, says: str):
    run = tiny(words, stage=stage)
    assert find_faults(run, 1) == []
    assert any(says in line for line in find_warnings(run))
    assert find_warnings(tiny("", stage=stage)) == []


def test_stretched_positions_do_not_warn():
    run = tiny("--seq-length 8192 --rope-scaling-type linear --rope-scaling-factor 2")
    assert find_warnings(run) == []


def test_check_run_logs_warnings_once_per_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = tiny("--recompute-vision")
    monkeypatch.setenv("RANK", "1")
    check_run(run, 1)
    assert "recompute_vision" not in capsys.readouterr().out


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("size", [28, 112, 336, 378, 384])
def test_replaced_tokens_are_counted_as_they_are_drawn(ratio: float, size: int):
    run = tiny(f"--vision-model-type siglip --img-size {size} --replace-ratio {ratio}")
    num_tokens = (size // 14) ** 2
    assert run.model.num_replaced_tokens == num_tokens - num_kept(num_tokens, ratio)


def test_layers_are_dealt_as_megatron_core_deals_them():
    run = tiny("--pipeline-model-parallel-size 4")
    parallel = run.parallel
    assert parallel.pipeline_layers(32) == (8, 8, 8, 8)
    parallel.decoder_first_pipeline_num_layers = 5
    assert parallel.pipeline_layers(32) == (5, 9, 9, 9)
    parallel.decoder_last_pipeline_num_layers = 7
    assert parallel.pipeline_layers(32) == (5, 10, 10, 7)
