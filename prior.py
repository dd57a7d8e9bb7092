"""
Where the label is not known: its probability, from the source alone. Part of PixelUNet's label head (model.py).
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

BINS = 16                                 # of the histogram, over the scaled source's range -1..1
STRENGTHS = 10.0 ** np.arange(-4, 1.5, 0.5)  # inverse weights of the penalty that cross-validation chooses from
POWER = 2                                 # shares are p ** POWER: see LabelPrior.shares


def classes_of(cfg, spec):
    """Number of classes that a label head mixes: those of the labels, two or more, of volumes; 0 without a head."""
    return spec.num_classes if cfg.label_head and spec.spatial_dims == 3 and spec.num_classes > 1 else 0


class LabelPrior(nn.Module):
    """
    The probability of each class given a source: a logistic regression on the histogram of its voxels in the mask.

    A histogram knows how much of a T1 image is fluid, grey or white, whatever the brain's place and size: that is what
    some hundred subjects can teach about a label. A network trained with them learns their labels by heart instead. It
    is fitted once, on the training subjects, before the network that holds it is trained.
    """

    def __init__(self, channels, classes):
        super().__init__()
        self.classes = classes
        self.register_buffer('weight', torch.zeros(classes, channels * BINS))
        self.register_buffer('bias', torch.zeros(classes))

    @staticmethod
    def histogram(source):
        """Log shares of the voxels in the mask, (B, C * BINS) float32, of sources (B, C, *S), -1 outside the mask."""
        values = source.float().flatten(2)
        inside = (values > -1).any(1, keepdim=True).expand_as(values).float()
        place = ((values + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        count = torch.zeros(*values.shape[:2], BINS, device=values.device).scatter_add_(2, place, inside)
        return ((count + 20) / (count.sum(2, keepdim=True) + 20 * BINS)).log().flatten(1)

    def fit(self, cohort):
        """Fit to a dataset.Cohort of volumes: those whose label is known (0 .. classes - 1).

        The penalty is the one with the least log loss in a cross-validation of at most ten folds. Where a class has
        fewer than two subjects, the probabilities are the classes' shares of the subjects (one is added to each).
        """
        features, labels = [], []
        for i in range(len(cohort)):  # one volume in memory at a time
            item = cohort.__getitems__([i])
            features.append(self.histogram(item['source']))
            labels.append(item['label'])
        self.fit_to(torch.cat(features).numpy(), torch.cat(labels).numpy())

    def fit_to(self, features, labels):
        """fit, from histograms (N, C * BINS) and labels (N,)."""
        known = (labels >= 0) & (labels < self.classes)
        features, labels = features[known].astype(np.float64), labels[known]
        counts = np.bincount(labels, minlength=self.classes)
        weight, bias = np.zeros(self.weight.shape), np.log((counts + 1) / (counts + 1).sum())
        if counts.min() >= 2:
            folds = StratifiedKFold(int(min(10, counts.min())), shuffle=True, random_state=0)

            def model(strength):
                return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))

            best = max(STRENGTHS, key=lambda strength: cross_val_score(
                model(strength), features, labels, cv=folds, scoring='neg_log_loss').mean())
            scaler, line = (step for _, step in model(best).fit(features, labels).steps)
            coef, intercept = line.coef_ / scaler.scale_, line.intercept_
            intercept = intercept - coef @ scaler.mean_
            if self.classes == 2:  # one line, of the second class
                coef, intercept = np.stack([0 * coef[0], coef[0]]), np.array([0, intercept[0]])
            weight, bias = coef, intercept
        self.weight.copy_(torch.from_numpy(weight))
        self.bias.copy_(torch.from_numpy(bias))

    def forward(self, source):
        """Probabilities (B, classes) of sources (B, C, *S)."""
        with torch.autocast(source.device.type, enabled=False):
            scores = (self.histogram(source)[:, None] * self.weight).sum(2)  # not a product of matrices: TF32 rounds
            return (scores + self.bias).softmax(1)

    def shares(self, source, label=None, power=POWER):
        """What of each class's image a prediction holds, (B, classes), summing to 1.

        A known label (B,), 0 .. classes - 1, counts fully; elsewhere, and with None, the shares are p ** 2, normalised:
        between the mean over the classes (p: least squared error) and the likelier one (the median: least absolute
        error), close to the best of both. power 1: how likely each class is.
        """
        p = self(source) ** power
        p = p / p.sum(1, keepdim=True)
        if label is None:
            return p
        given = torch.nn.functional.one_hot(label.clamp(max=self.classes - 1), self.classes).to(p.dtype)
        return torch.where((label < self.classes)[:, None], given, p)
