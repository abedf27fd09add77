"""Group samples into global batches of one modality, long samples first, as LLaVA and Croc do.

Their sampler (`get_modality_length_grouped_indices`) cuts the shuffled samples with images, and
those without, into global batches, sorts each by length, shuffles the batches, and collects the
rest in a mixed batch. Here each window is grouped by itself, which needs no pass over the data, and
batches are aligned with optimizer steps wherever a window begins.
"""

import numpy as np

from megatron_croc.data.order.permutation import Permutation

GROUPED_WINDOW = 64
"""Optimizer steps of a window when samples are grouped or balanced; at most one mixes
modalities."""


def group_by_modality_length(
    lengths: np.ndarray,
    has_image: np.ndarray,
    *,
    global_batch_size: int,
    begin: int,
    key: tuple[int, ...],
) -> np.ndarray:
    """Compute the order of the samples of one window.

    Args:
        lengths: int [n], tokens of each sample.
        has_image: bool [n].
        global_batch_size: samples of one optimizer step.
        begin: number of samples before this window; gives its offset within a step.
        key: of the random order of the batches.

    Returns:
        int64 [n], a permutation. Every whole step inside the window has one modality, except at
        most one mixed step and the steps shared with the neighbouring windows.
    """
    size = global_batch_size
    batches, left_over = [], []
    for kind in (True, False):
        samples = np.flatnonzero(has_image == kind)
        whole = samples.size // size * size
        batches += list(samples[:whole].reshape(-1, size))
        left_over.append(samples[whole:])
    head = min(-begin % size, lengths.size)  # samples that complete the previous step
    tail = (lengths.size - head) % size
    mixed = np.concatenate(left_over)
    if mixed.size < head + tail:  # too few for both ends: split one batch
        mixed = np.concatenate([mixed, batches.pop()])
    middle = mixed[head : mixed.size - tail]
    if middle.size:
        batches.append(middle)
    shuffled = Permutation(len(batches), key)(np.arange(len(batches)))
    pieces = [mixed[:head], *(batches[i] for i in shuffled), mixed[mixed.size - tail :]]
    return np.concatenate([_longest_first(piece, lengths) for piece in pieces]).astype(np.int64)


def _longest_first(samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return samples[np.argsort(-lengths[samples], kind="stable")]
