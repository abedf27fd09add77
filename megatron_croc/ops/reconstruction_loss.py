"""SmoothL1 between reconstructed and original visual tokens, as a sum and a count."""

from torch import Tensor
from torch.nn.functional import smooth_l1_loss


def reconstruction_loss_sum(prediction: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Sum of SmoothL1 over every element, in float32 (paper eq. 4; released code: its mean).

    Args:
        prediction: [n, N, h], any floating dtype.
        target: [n, N, h].
        beta: where the loss turns from quadratic to linear.

    Returns:
        float32 scalar; its count is prediction.numel().
    """
    return smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="sum")
