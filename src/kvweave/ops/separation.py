"""Whether what rounding changes is told from what an error would."""

from torch import Tensor


def share_of_way(found: Tensor, right: Tensor, wrong: Tensor) -> float:
    """How far from `right` to `wrong` a result lies: 0 there, 1 here; of rounding only what points there counts.

    Args:
        found, right, wrong: [...], of one shape.
    """
    way = (wrong.float() - right.float()).flatten()
    return float((found.float() - right.float()).flatten() @ way / way.square().sum().clamp(min=1e-12))
