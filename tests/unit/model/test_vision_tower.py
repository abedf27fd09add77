"""The tower and the projector against transformers' modules with the same weights."""

import pytest
import torch
import transformers
from torch import nn

from megatron_croc.convert.names import Layout
from tests.support.synthetic import tiny_run
from tests.unit.model.huggingface import fill, randomise, state_with_prefix

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}
KINDS = {
    # type, pixels, activation, epsilon, transformers' classes
    "clip": ("clip", 56, "quick_gelu", 1e-5, "CLIPVisionConfig", "CLIPVisionModel"),
    "siglip": ("siglip", 56, "gelu_tanh", 1e-6, "SiglipVisionConfig", "SiglipVisionModel"),
    # 62 = 4 * 14 + 6, as 384 = 27 * 14 + 6: the last pixels belong to no patch.
    "siglip_rest": ("siglip", 62, "gelu_tanh", 1e-6, "SiglipVisionConfig", "SiglipVisionModel"),
}


def build_pair(kind, pg_collection):
    """transformers' tower, ours with its weights, and the run."""
    from megatron_croc.model.transformer_configs import vision_tower_config
    from megatron_croc.model.vision_tower import VisionTower

    model_type, pixels, activation, epsilon, config_name, model_name = KINDS[kind]
    config = getattr(transformers, config_name)(
        **SIZES,
        image_size=pixels,
        hidden_act="quick_gelu" if activation == "quick_gelu" else "gelu_pytorch_tanh",
        layer_norm_eps=epsilon,
    )
    theirs = getattr(transformers, model_name)(config)
    randomise(theirs)
    run = tiny_run(
        vision_model_type=model_type,
        img_size=pixels,
        vision_activation=activation,
        vision_norm_epsilon=epsilon,
    )
    vision = run.model.vision_tower
    config = vision_tower_config(vision, parallel=run.parallel, training=run.training)
    ours = VisionTower(vision, config, pg_collection, implementation="local").eval()
    prefix = Layout().vision_tower
    tensors = state_with_prefix(theirs, lambda name: prefix + name.removeprefix("vision_model."))
    used = fill(ours, "vision_tower.", run.model, tensors)
    return theirs, ours, run, set(tensors) - used


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_second_to_last_hidden_state(kind, pg_collection):
    theirs, ours, run, unused = build_pair(kind, pg_collection)
    size = run.model.vision_tower.img_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = theirs(pixels, output_hidden_states=True).hidden_states[-2]
        features = ours(pixels)
    expected = hidden[:, 1:] if kind == "clip" else hidden
    assert features.shape == (3, run.model.vision_tower.num_visual_tokens, 32)
    # Entries are of size 1 to 3; fp32 differs in the order of sums only.
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    # Everything else of the tower lies behind the layer that is read.
    assert all(
        "layers.2." in name or "post_layernorm" in name or "head." in name for name in unused
    )
    assert any("layers.2." in name for name in unused)


def test_bytes_are_normalised_as_the_image_processor_does(pg_collection):
    _, ours, run, _ = build_pair("clip", pg_collection)
    vision = run.model.vision_tower
    pixels = torch.randint(
        0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    assert tuple(processor.image_mean) == vision.image_mean
    assert tuple(processor.image_std) == vision.image_std
    images = [image.permute(1, 2, 0).numpy() for image in pixels]
    expected = torch.stack([torch.as_tensor(image) for image in processor(images)["pixel_values"]])
    # (x / 255 - mean) / std against x * (1 / 255): values up to 2.7.
    torch.testing.assert_close(ours.normalise(pixels), expected, rtol=1e-5, atol=1e-6)
    floats = expected.clone()
    assert torch.equal(ours.normalise(floats), floats)  # normalised already


def test_the_projector_is_mlp2x_gelu_and_an_l2_norm(pg_collection):
    from megatron_croc.model.projector import Projector
    from megatron_croc.model.transformer_configs import projector_config

    theirs = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    randomise(theirs)
    run = tiny_run()
    config = projector_config(
        run.model.language_model.hidden_size, parallel=run.parallel, training=run.training
    )
    input_size = run.model.vision_tower.vision_hidden_size
    ours = Projector(config, pg_collection, input_size=input_size).eval()
    tensors = state_with_prefix(theirs, lambda name: Layout().projector + name)
    assert fill(ours, "projector.", run.model, tensors) == set(tensors)
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        projected = theirs(features)
        embeddings = ours(features)
    expected = projected / projected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)
    assert embeddings.norm(dim=-1).sub(1).abs().max() < 1e-6
