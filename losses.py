"""
Losses, each returning one value per sample (B,), so that a non-finite one can be traced to its subject.
Images are (B, K, *S) in [-1, 1], masks (B, 1, *S) in {0, 1}. Denominators are clamped: an empty region gives 0, never
0/0.
"""

import torch
import torch.nn.functional as F


def reconstruction_l1(pred, target, mask, outside=0.05):
    """Mean absolute error over channels and voxels, those outside the mask with weight `outside`.

    A plain mean lets the background, half of the image and right from the start, decide the sign gradients: it learns
    nothing here.
    """
    weight = outside + (1 - outside) * mask
    return ((pred - target).abs() * weight).flatten(1).sum(1) / (pred.shape[1] * weight.flatten(1).sum(1))


def hinge_discriminator(real_score, fake_score):
    """Hinge loss of the discriminator: scores of real images above 1, of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real_score).flatten(1).mean(1) + F.relu(1 + fake_score).flatten(1).mean(1))


def hinge_generator(fake_score):
    """The autoencoder's side of the hinge loss: raise the score of the reconstruction."""
    return -fake_score.flatten(1).mean(1)


def count(region):
    """Voxels of a region, (B, 1, *S) -> (B,)."""
    return region.flatten(1).sum(1)


def region_l1(pred, target, region, voxels=None):
    """Mean absolute error over channels and the voxels of a region (or a given number of voxels); 0 if it is empty."""
    error = ((pred - target).abs() * region).flatten(1).sum(1)
    return error / (pred.shape[1] * (count(region) if voxels is None else voxels)).clamp(min=1)


def region_l2(pred, target, region, voxels=None):
    """Mean squared error over channels and the voxels of a region, over 0.1: as steep as L1 at an error of 0.05."""
    error = ((pred - target).square() / 0.1 * region).flatten(1).sum(1)
    return error / (pred.shape[1] * (count(region) if voxels is None else voxels)).clamp(min=1)


def lesion_cross_entropy(logit, mask, lesion, weight=1.0, voxels=None):
    """Cross entropy of a lesion head's logit (B, 1, *S) with the lesion mask, mean over the mask's voxels: (B,).

    weight, voxels: of a crop, as post_training_error takes them. Zeros without a head (logit None).
    """
    if logit is None:
        return torch.zeros_like(count(mask))
    error = F.binary_cross_entropy_with_logits(logit.float(), lesion, reduction='none') * mask * weight
    return count(error) / (voxels[0] if voxels else count(mask)).clamp(min=1)


def lapt_error(pred, target, weight, voxels):
    """LAPT's squared error: sum of weight * (pred - target)^2 over channels and field of view, by a number of voxels.

    weight is 1 for the image term (voxels: the brain mask's), the lesion mask for the lesion term (voxels: its own).
    """
    return ((pred - target).square() * weight).flatten(1).sum(1) / voxels.clamp(min=1)


def post_training_error(pred, target, mask, lesion, kind, floor=0.0, weight=1.0, voxels=None):
    """(E_mask, E_lesion) of stage 3 (and of the regression U-Net), each (B,). kind: 'l1', 'l2_l1' or 'lapt'.

    l1: mean absolute error in both, against the real image. l2_l1: squared error in the mask, absolute in the lesion.

    floor, of these two: a lesion below this share of the mask counts by its size, not fully. A mean over five voxels
    would weigh each of them hundreds of times a healthy one, and the network would answer by painting lesions wherever
    one is at all possible.

    Of a crop: weight (B, 1, *S) is 1 / the probability that the crop holds a voxel, voxels the numbers (B,) of the
    whole image's mask and lesion. The expected value over the crops is then the whole image's, and so is the gradient.
    """
    in_mask, in_lesion = voxels or (count(mask), count(lesion))
    if kind != 'lapt':
        error = region_l1 if kind == 'l1' else region_l2
        return (error(pred, target, mask * weight, in_mask),
                region_l1(pred, target, lesion * weight, torch.maximum(in_lesion, floor * in_mask)))
    return (lapt_error(pred, target, torch.ones_like(mask) * weight, in_mask),
            lapt_error(pred, target, lesion * weight, in_lesion))
