"""Is training still learning something? Numbers that show a collapse, and one sentence about it.

Shapes: N images, D width, K prototypes. Entropies are in nats.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

_USED = "health/prototypes_used"

# A mean cosine of .9975 between images (std^2 = 1 - cosine); trained backbones are above .5.
MIN_FEATURE_STD = 0.05
MIN_EFFECTIVE_RANK = 2.0  # fewer than two directions cannot tell three kinds of images apart
# Random prototypes on a bottleneck of 256 stay 0.4 nats below log K at temperature .07 (logits with
# a standard deviation of 1/16, gap = variance / 2 temperature^2). Less means logits without signal.
MIN_ENTROPY_GAP = 0.05
MIN_ENTROPY = 0.05  # nats; one prototype has over 99 % of the mass


def feature_std(features: Tensor) -> Tensor:
    """Spread of L2-normalised features, 0-d: 0 where all are equal, 1 where they are isotropic.

    Mean over the dimensions of the standard deviation over the images, times sqrt(D) (Chen and He,
    "Exploring simple Siamese representation learning", section 4.1).

    Args:
        features: [N, D], any scale.
    """
    unit = functional.normalize(features.float(), dim=1)
    spread: Tensor = unit.std(0, correction=0).mean() * math.sqrt(features.shape[1])
    return spread


def effective_rank(features: Tensor) -> Tensor:
    """Number of directions the features use, 0-d: exp of the entropy of the singular values.

    Of the centred features, their singular values taken as shares of their sum (Roy and Vetterli,
    "The effective rank", EUSIPCO 2007). At most min(N - 1, D), so compare at equal N.

    Args:
        features: [N, D].
    """
    centred = features.double() - features.double().mean(0)
    if not torch.isfinite(centred).all():
        return centred.new_tensor(math.nan).float()
    values: Tensor = torch.linalg.svdvals(centred)
    # Round-off is not a direction: equal features have rank 0.
    floor = features.double().abs().amax() * 1e-6 * math.sqrt(max(features.shape))
    values = values[values > floor]
    if not len(values):
        return values.new_zeros(()).float()
    shares = values / values.sum()
    rank: Tensor = torch.exp(-(shares * shares.log()).sum()).float()
    return rank


def teacher_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of target rows, 0-d, in nats: near 0 or near log K says collapse.

    Args:
        targets: probabilities [N, K].
    """
    entropy: Tensor = torch.special.entr(targets.float()).sum(1).mean()
    return entropy


def alarm(metrics: Mapping[str, float], prototypes: int, *, warming_up: bool = False) -> str | None:
    """One sentence if training has collapsed: which number says so, what it means, what to change.

    Args:
        metrics: by metric name (`health/...`); those that are absent are not judged.
        prototypes: K.
        warming_up: judge only whether the numbers are finite. An untrained backbone has a
            `feature_std` of 3e-5 and would be called collapsed.
    """
    for name, value in metrics.items():
        if name.startswith("health/") and not math.isfinite(value):
            return (
                f"{name} is {value}: the network puts out numbers that are not finite; go back to "
                "the last good checkpoint with a lower optim.lr."
            )
    if warming_up:
        return None
    entropy = metrics.get("health/teacher_entropy")
    highest = math.log(prototypes)
    if entropy is not None and entropy < MIN_ENTROPY and metrics.get(_USED, 1.0) <= 1:
        return (
            f"health/teacher_entropy is {entropy:.3f} nats with one prototype in use: the teacher "
            "gives every image the same answer; start again with loss.centring=sinkhorn or a "
            "higher teacher.temperature."
        )
    if entropy is not None and highest - entropy < MIN_ENTROPY_GAP:
        return (
            f"health/teacher_entropy is {entropy:.3f} nats of at most {highest:.3f}: the targets "
            "are uniform and teach nothing; start again with a lower teacher.temperature_end or a "
            "lower optim.lr."
        )
    spread = metrics.get("health/feature_std")
    if spread is not None and spread < MIN_FEATURE_STD:
        return (
            f"health/feature_std is {spread:.3f}, where 0 is one feature for all images and 1 is "
            "an even spread: the backbone hardly tells images apart; start again with a lower "
            "optim.lr, a longer optim.warmup or a larger optim.global_batch_size."
        )
    rank = metrics.get("health/effective_rank")
    if rank is not None and rank < MIN_EFFECTIVE_RANK:
        return (
            f"health/effective_rank is {rank:.2f}: the features differ in about one direction; "
            "start again with a larger optim.global_batch_size, a lower optim.lr, or (not with "
            "objective=dino) a higher loss.koleo_weight."
        )
    return None
