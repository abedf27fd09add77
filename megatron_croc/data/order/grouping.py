"""Global batches of one modality, long samples first: the order LLaVA and Croc train in.

Their sampler (`get_modality_length_grouped_indices`) cuts the shuffled samples with images, and
those without, into global batches, sorts each by length, shuffles the batches, and puts what is
left over into a mixed one. Here this is done window by window, so it needs no pass over the data,
and in whole optimizer steps wherever a window begins.
"""

import numpy as np

from megatron_croc.data.order.permutation import Permutation


def group_by_modality_length(
    lengths: np.ndarray,
    has_image: np.ndarray,
    *,
    global_batch_size: int,
    begin: int,
    key: tuple[int, ...],
) -> np.ndarray:
    """A new order of the samples of one window.

    Args:
        lengths: int [n], tokens of each sample.
        has_image: bool [n].
        global_batch_size: samples of one optimizer step.
        begin: samples of the run before this window; says where in a step the window begins.
        key: what the order of the batches is drawn from.

    Returns:
        int64 [n], a permutation: every whole step inside the window has one modality, but for at
        most one mixed step and the steps that the window shares with its neighbours.
    """
    size = global_batch_size
    batches, left_over = [], []
    for kind in (True, False):
        samples = np.flatnonzero(has_image == kind)
        whole = samples.size // size * size
        batches += list(samples[:whole].reshape(-1, size))
        left_over.append(samples[whole:])
    head = min(-begin % size, lengths.size)  # samples that complete the step before
    tail = (lengths.size - head) % size
    mixed = np.concatenate(left_over)
    if mixed.size < head + tail:  # they cannot fill both ends: give up one batch
        mixed = np.concatenate([mixed, batches.pop()])
    middle = mixed[head : mixed.size - tail]
    if middle.size:
        batches.append(middle)
    shuffled = Permutation(len(batches), key)(np.arange(len(batches)))
    pieces = [mixed[:head], *(batches[i] for i in shuffled), mixed[mixed.size - tail :]]
    return np.concatenate([_longest_first(piece, lengths) for piece in pieces]).astype(np.int64)


def _longest_first(samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return samples[np.argsort(-lengths[samples], kind="stable")]
