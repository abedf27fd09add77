"""FLOPs against PyTorch's own counter on plain modules of the same shapes, and by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Work, count_flops, matching_flops, visible_pairs
from megatron_croc.recipes import get_recipe


class Layer(nn.Module):
    """Products of one transformer layer, with full attention over [tokens, width]."""

    def __init__(self, width: int, queries: int, keys: int, feed_forward: int, *, gated: bool):
        super().__init__()
        self.q = nn.Linear(width, queries, bias=False)
        self.k = nn.Linear(width, keys, bias=False)
        self.v = nn.Linear(width, keys, bias=False)
        self.o = nn.Linear(queries, width, bias=False)
        self.up = nn.Linear(width, (1 + gated) * feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)
        self.group = queries // keys
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x).repeat(1, self.group), self.v(x).repeat(1, self.group)
        x = x + self.o((q @ k.T).softmax(-1) @ v)
        return x + self.down(self.up(x)[:, : self.feed_forward].relu())


class PlainCroc(nn.Module):
    """One image and some text through modules as wide as those of the recipe."""

    def __init__(self, run: RunConfig):
        super().__init__()
        vision, llm = run.model.vision_tower, run.model.language_model
        v, h = vision.vision_hidden_size, llm.hidden_size
        self.vision_tower = nn.Sequential(
            nn.Linear(3 * vision.patch_dim**2, v, bias=False),
            *(
                Layer(v, v, v, vision.vision_ffn_hidden_size, gated=False)
                for _ in range(vision.num_active_layers)
            ),
        )
        self.projector = nn.Sequential(nn.Linear(v, h), nn.ReLU(), nn.Linear(h, h))
        keys = llm.num_query_groups * llm.head_dim
        self.language_model = nn.Sequential(
            *(Layer(h, h, keys, llm.ffn_hidden_size, gated=True) for _ in range(llm.num_layers))
        )
        self.output = nn.Linear(h, llm.vocab_size, bias=False)
        self.head = nn.Sequential(
            *([Layer(h, h, h, 4 * h, gated=False)] if run.reconstructs else []),
            nn.Linear(h, h, bias=False),
        )

    def loss(self, pixels: Tensor, text: Tensor, *, reconstructs: bool) -> Tensor:
        visual = self.projector(self.vision_tower(pixels))
        hidden = self.language_model(torch.cat([visual, text]))
        loss = self.output(hidden).sum()
        return loss + self.head(hidden[: len(visual)]).sum() if reconstructs else loss


@pytest.mark.parametrize("stage", ["pretrain_mlp", "pretrain_croc", "finetune"])
@pytest.mark.parametrize("vision_trained", [False, True])
@pytest.mark.parametrize("projector_trained", [False, True])
def test_flops_equal_pytorchs_count(stage: str, vision_trained: bool, projector_trained: bool):
    run = get_recipe(f"tiny/{stage}")
    run.model.vision_tower.vision_model_type = "siglip"  # no class token: one length for all
    run.training.freeze_ViT = not vision_trained
    run.training.freeze_projector = not projector_trained
    model = PlainCroc(run)
    model.vision_tower.requires_grad_(vision_trained)
    model.projector.requires_grad_(projector_trained)
    model.language_model.requires_grad_(not run.training.freeze_LM)
    model.output.requires_grad_(not run.training.freeze_LM)
    num_visual, num_text = run.model.vision_tower.num_visual_tokens, 24
    pixels = torch.randn(num_visual, 3 * run.model.vision_tower.patch_dim**2)
    # The prompt pool stands among the language model's inputs: they need a gradient.
    text = torch.randn(num_text, run.model.language_model.hidden_size).requires_grad_(
        run.reconstructs
    )
    with FlopCounterMode(display=False) as counter:
        loss = model.loss(pixels, text, reconstructs=run.reconstructs)
        if loss.requires_grad:
            loss.backward()
    length = num_visual + num_text
    # Full attention, and logits of every position.
    work = Work(num_tokens=length, num_pairs=length**2, num_labels=length, num_images=1)
    flops = count_flops(run, work)
    flops.pop("matching", None)
    if stage == "finetune" and not (vision_trained or projector_trained):
        # Nothing before the first layer learns, so autograd omits the input gradient of its four
        # input products, which ours keeps: one layer of many.
        llm = run.model.language_model
        omitted = (
            2
            * length
            * llm.hidden_size
            * (llm.hidden_size + 2 * llm.num_query_groups * llm.head_dim)
        )
        assert sum(flops.values()) - omitted == counter.get_total_flops()
    else:
        assert sum(flops.values()) == counter.get_total_flops()


def test_causal_and_mixed_pairs_are_those_of_the_mask():
    assert visible_pairs([3]) == 1 + 2 + 3
    assert visible_pairs([3, 2], [2]) == 6 + 3 + 1
    from megatron_croc.ops.mixed_mask import MixedMask

    mask = MixedMask.build([0, 9, 14], [(2, 6), (10, 13)], length=14)
    assert visible_pairs([9, 5], [4, 3]) == int(mask.visible().sum())


def test_a_seven_billion_sample_by_hand():
    run = get_recipe("croc_7b/finetune")
    flops = count_flops(run, Work.from_lengths([800], num_labels=200, num_images=1))
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    dense = 6 * 800 * layers + 6 * 200 * 4096 * 32000
    attention = 3 * 4 * (800 * 801 // 2) * 4096 * 32
    assert flops["language_model"] == dense + attention
    # CLIP-L/14-336: 23 layers over 577 tokens, forward only.
    linear = 23 * 2 * 577 * 12 * 1024**2
    assert flops["vision_tower"] == linear + 23 * 4 * 577**2 * 1024 + 2 * 576 * 588 * 1024
    assert "matching" not in flops and "reconstruction_head" not in flops


def test_training_the_tower_costs_three_times_its_forward():
    run = get_recipe("victor_7b/finetune")
    work = Work.from_lengths([800], num_labels=200, num_images=1)
    trained = count_flops(run, work)["vision_tower"]
    run.training.freeze_ViT = True
    frozen = count_flops(run, work)["vision_tower"]
    patches = 2 * 729 * 588 * 1152
    assert trained == 3 * frozen - patches  # nothing lies before the patches


def test_matching_by_hand_and_work_adds_up():
    run = get_recipe("croc_7b/pretrain_croc")
    assert matching_flops(run) == 2 * 432 * 2048 * 4096
    one = Work.from_lengths([700], num_labels=124, num_images=1, span_lengths=[576])
    two = Work.from_lengths([700, 700], num_labels=248, num_images=2, span_lengths=[576, 576])
    assert one + one == two
    one, two = count_flops(run, one), count_flops(run, two)
    assert two == {part: 2 * count for part, count in one.items()}
    text_only = count_flops(run, Work.from_lengths([700], num_labels=700, num_images=0))
    assert text_only["vision_tower"] == text_only["reconstruction_head"] == 0
