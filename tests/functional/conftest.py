"""What several commands read."""

from pathlib import Path

import pytest

NUM_IMAGES = 40


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The demo data set as shards, one folder per stage."""
    from megatron_croc.data.demo.dataset import train_tokenizer, write_annotations, write_images
    from megatron_croc.data.preprocess import Preprocessor

    folder = tmp_path_factory.mktemp("demo")
    list(write_images(folder / "images", NUM_IMAGES, seed=1, num_workers=1))
    write_annotations(folder, NUM_IMAGES, seed=1)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed=1))
    for name in ("pretrain_mlp", "pretrain_croc", "finetune", "valid_pretrain_croc"):
        job = Preprocessor(
            input_path=folder / f"{name}.json",
            image_folder=folder / "images",
            output=folder / name,
            samples_per_shard=16,
        )
        list(job.make_shards(1))
        job.finish()
    return folder
