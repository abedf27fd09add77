"""The demo data set as shards, small and quick."""

from pathlib import Path


def write_demo(folder: Path, names: tuple[str, ...], *, num_images: int = 40) -> Path:
    """Images, every JSON file, a tokenizer, and shards of the files named."""
    from megatron_croc.data.demo.dataset import train_tokenizer, write_annotations, write_images
    from megatron_croc.data.preprocess import Preprocessor

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
