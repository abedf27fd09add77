"""Reconstruction loss: SmoothL1 between reconstructed and original visual tokens, as a sum."""

from torch import Tensor
from torch.nn.functional import smooth_l1_loss


def reconstruction_loss_sum(prediction: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Sum of SmoothL1 over all elements, in float32 (paper eq. 4; the released code: the mean).

    Args:
        prediction: [n, N, D], any floating dtype.
        target: [n, N, D].
        beta: difference at which the loss changes from quadratic to linear.

    Returns:
        float32 scalar; divide by prediction.numel() for the mean.
    """
    return smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="sum")
