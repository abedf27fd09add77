"""Load an export as a transformers model, without running the code beside the weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_croc.errors import CheckpointError, first_line


def load_export(
    folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Load our export as a transformers model.

    The code beside the weights is compared with ours; our own copy is run.

    Args:
        folder: the export.
        dtype: of the weights; None: as stored.
        trust_remote_code: run the code beside the weights even if it is not ours.

    Raises:
        CheckpointError: transformers is not installed, the code differs from ours, or weights are
            missing or extra (named).
    """
    try:
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging
    except ImportError as error:
        raise CheckpointError("transformers is needed for this: pip install -e '.[hf]'") from error
    from megatron_croc.convert.remote_code import modeling_croc

    logging.disable_progress_bar()
    if (foreign := _foreign_code(folder)) is None:
        build: Any = modeling_croc.CrocForConditionalGeneration
        trust: dict[str, bool] = {}
    elif trust_remote_code:
        build, trust = AutoModelForImageTextToText, {"trust_remote_code": True}
    else:
        raise CheckpointError(
            f"{foreign}: is not the code this program exports (an older version's, or a "
            "stranger's), and is not run; export again, or add --trust-remote-code if you know it"
        )
    # The attention is set here because a configuration may name one to download.
    try:
        model, info = build.from_pretrained(
            folder,
            torch_dtype=dtype or "auto",
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **trust,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: does not load: {first_line(error)}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{folder}: {fault}: {', '.join(map(str, sorted(info[fault])))}")
    return model.eval()


def _foreign_code(folder: Path) -> Path | None:
    """Return the first code file beside the weights whose bytes differ from ours; None if none.

    A folder saved again by transformers may have no code: then there is none to run.
    """
    from megatron_croc.convert.remote_code import configuration_croc, modeling_croc

    for module in (configuration_croc, modeling_croc):
        ours = Path(str(module.__file__))
        theirs = folder / ours.name
        if theirs.is_file() and theirs.read_bytes() != ours.read_bytes():
            return theirs
    return None
