"""Small demo dataset as shards, made in seconds, for tests and trial runs."""

from collections.abc import Sequence
from pathlib import Path

from megatron_croc.data.demo.dataset import train_tokenizer, write_annotations, write_images
from megatron_croc.data.prepare.preprocess import Preprocessor


def write_demo(folder: Path, names: Sequence[str], *, num_images: int = 40) -> Path:
    """Write images, every JSON file, a tokenizer, and shards of the named files.

    Args:
        folder: output folder; created if missing.
        names: JSON files without suffix, as in `data.demo.dataset`. The shards of each go to a
            folder of that name.
        num_images: at least `data.demo.dataset.MIN_IMAGES`.

    Returns:
        `folder`.
    """
    list(write_images(folder / "images", num_images, seed=1, num_workers=1))
    write_annotations(folder, num_images, seed=1)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed=1))
    for name in names:
        job = Preprocessor(
            input_path=folder / f"{name}.json",
            image_folder=folder / "images",
            output=folder / name,
            samples_per_shard=16,
        )
        list(job.make_shards(1))
        job.finish()
    return folder
