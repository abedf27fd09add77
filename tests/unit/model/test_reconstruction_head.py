"""The heads against transformers' BertLayer and torch's Linear, and dropout's independence."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertLayer

from megatron_croc.config.model import ReconstructionConfig
from megatron_croc.convert.names import _BERT_HEAD
from megatron_croc.model.reconstruction_head import (
    BertHead,
    LinearHead,
    build_reconstruction_head,
)
from tests.unit.model.huggingface import randomise


class ReleasedHead(nn.Module):
    """The released transform_block, on transformers' own layer."""

    def __init__(self, hidden_size: int, num_positions: int) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=hidden_size,
            num_attention_heads=hidden_size // 64,
            intermediate_size=4 * hidden_size,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            attn_implementation="eager",
        )
        self.position_embeddings = nn.Embedding(num_positions, hidden_size)
        self.layers = nn.ModuleList([BertLayer(config)])
        self.resize = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        x = x + self.position_embeddings.weight[: x.shape[1]]
        out = self.layers[0](x)
        return self.resize(out if isinstance(out, torch.Tensor) else out[0])


def released_and_ours(hidden_size: int, scale: float = 1.0) -> tuple[ReleasedHead, BertHead]:
    """Both heads with the same random weights, all of them times `scale`."""
    theirs = ReleasedHead(hidden_size, 16)
    randomise(theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(scale)
    ours = BertHead(hidden_size, 16, dropout=0.1).eval()
    state = theirs.state_dict()
    names = {f"{ours_name}.": f"{name}." for ours_name, name in _BERT_HEAD.items()}
    renamed = {
        mine + kind: state.pop(their + kind)
        for mine, their in names.items()
        for kind in ("weight", "bias")
    }
    renamed["position_embeddings.weight"] = state.pop("position_embeddings.weight")
    assert not state
    ours.load_state_dict(renamed)
    return theirs, ours


@pytest.mark.parametrize("hidden_size", [64, 192])
def test_bert_head_is_the_released_one(hidden_size):
    theirs, ours = released_and_ours(hidden_size)
    x = torch.randn(3, 16, hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(x)
        # Values of size 1 to 3 in fp32.
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
        # Fewer images do not change what one image gives.
        torch.testing.assert_close(ours(x[1:2]), expected[1:2], rtol=1e-5, atol=1e-5)
        # In evaluation seeds do nothing.
        assert torch.equal(ours(x, (1, 2, 3)), ours(x))


def test_layer_norms_have_the_released_epsilon():
    """On inputs and weights of 1e-3 the variance is 1e-6: an epsilon of 1e-5 would change all."""
    theirs, ours = released_and_ours(64, scale=1e-3)
    x = 1e-3 * torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(x) - theirs.resize.bias
        torch.testing.assert_close(ours(x) - ours.resize.bias, expected, rtol=1e-3, atol=1e-9)
        for norm in (ours.attention_norm, ours.output_norm):
            row = norm(1e-4 * x[0, 0])
            small = functional.layer_norm(1e-4 * x[0, 0], (64,), norm.weight, norm.bias, 1e-12)
            torch.testing.assert_close(row, small, rtol=1e-5, atol=0)


def test_linear_head_is_one_linear_layer():
    head = LinearHead(64)
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        expected = x @ head.resize.weight.T + head.resize.bias
        torch.testing.assert_close(head(x, (1, 2)), expected, rtol=1e-5, atol=1e-6)


def test_the_configuration_chooses_the_head():
    sizes = dict(hidden_size=64, num_visual_tokens=16, dtype=torch.bfloat16)
    bert = build_reconstruction_head(ReconstructionConfig(), **sizes)
    assert isinstance(bert, BertHead)
    linear = build_reconstruction_head(ReconstructionConfig(reconstruction_head="linear"), **sizes)
    assert isinstance(linear, LinearHead)
    assert linear.resize.weight.dtype == torch.bfloat16
    assert bert.num_heads == 1  # 64 // 64, as released


def test_dropout_belongs_to_the_image_and_not_to_its_neighbours():
    head = BertHead(64, 16, dropout=0.5).train()
    x = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = head(x, (7, 8, 9))
        assert torch.equal(together, head(x, (7, 8, 9)))
        assert not torch.allclose(together, head(x, (7, 8, 10)))
        assert not torch.allclose(together, head(x, None))
        # Cut into micro-batches, in another order: only the order of sums may differ.
        apart = torch.cat([head(x[i : i + 1], (7 + i,)) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean_and_drops_the_given_share():
    from megatron_croc.model.reconstruction_head import _Dropout

    drop = _Dropout(0.1, (1, 2))
    ones = torch.ones(2, 20_000)
    dropped = drop(ones)
    zero_share = (dropped == 0).double().mean().item()
    assert zero_share == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / 40_000) ** 0.5)
    assert dropped[dropped != 0].unique().tolist() == pytest.approx([1 / 0.9])
    assert not torch.equal(dropped, drop(ones))  # a second layer draws anew
