"""Checks of files and folders: the inputs of a run exist, and its folders can be written."""

from collections.abc import Iterator
from pathlib import Path

from megatron_croc.atomic_files import why_unwritable
from megatron_croc.config.run import RunConfig


def find_missing_inputs(run: RunConfig) -> Iterator[str]:
    """Find data, tokenizer and initial weights that are not there."""
    data = run.data
    if not data.data_path:
        yield "data_path is not given: name the folders of shards to train on"
    for name, folders in {
        "data_path": data.data_path,
        "valid_data_path": data.valid_data_path,
        "eval_answers_data_path": data.eval_answers_data_path,
    }.items():
        for folder in folders:
            if folder.endswith((".yaml", ".yml")):
                if not Path(folder).is_file():
                    yield f"{name}={folder}: no such file; fix the path of the blend"
            elif not folder.startswith("s3://") and not Path(folder).is_dir():
                yield f"{name}={folder}: no such folder; croc data preprocess writes it"
    for path in run.training.eval_tasks:
        if not Path(path).is_file():
            yield f"eval_tasks={path}: no such file; give task files, see croc eval --help"
    tokenizer = data.tokenizer_model
    is_file = data.tokenizer_type == "SentencePieceTokenizer"
    if tokenizer is None:
        yield f"tokenizer_model is not given: {data.tokenizer_type} needs its path"
    elif not (Path(tokenizer).is_file() if is_file else Path(tokenizer).is_dir()):
        what = "file (tokenizer.model)" if is_file else "directory"
        yield f"tokenizer_model={tokenizer}: no such {what}, which {data.tokenizer_type} needs"
    start = run.checkpoint.pretrained_checkpoint
    if start is not None and not Path(start).is_dir():
        yield f"pretrained_checkpoint={start}: no such folder; fix the path, or set it to none"


def find_unwritable_folders(run: RunConfig) -> Iterator[str]:
    """Find folders of the run that cannot be written; they need not exist yet."""
    for name, folder in {"save": run.checkpoint.save, "log_dir": run.logging.log_dir}.items():
        if folder is not None and (reason := why_unwritable(Path(folder))) is not None:
            yield f"{name}={folder}: cannot be written ({reason}); choose another folder"
