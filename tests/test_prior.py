"""The label's probability from the source's histogram."""
import types

import numpy as np
import pytest
import torch

from prior import BINS, LabelPrior, classes_of


class Made:
    """Volumes whose share of bright voxels is drawn around what their label says; `apart` in standard deviations."""

    def __init__(self, n, classes=2, apart=3.0, seed=0, unlabeled=0):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, classes, n)
        share = 0.5 + 0.05 * (apart * (self.labels - (classes - 1) / 2) + rng.normal(size=n))
        self.sources = np.where(rng.random((n, 1, 12, 12, 12)) < share.clip(0, 1)[:, None, None, None, None], 0.6, -0.4)
        self.sources += 0.1 * rng.normal(size=self.sources.shape)
        self.sources[..., :3] = -1  # outside of the mask
        self.seen = np.where(np.arange(n) < unlabeled, classes, self.labels)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, index):
        return dict(source=torch.from_numpy(self.sources[index]).float(), label=torch.from_numpy(self.seen[index]))


def fitted(cohort, classes=2):
    prior = LabelPrior(1, classes)
    prior.fit(cohort)
    return prior


def p_of(prior, cohort):
    return prior(torch.from_numpy(cohort.sources).float()).numpy()


@pytest.mark.parametrize('classes', [2, 3])
def test_it_tells_classes_that_differ(classes):
    prior = fitted(Made(90, classes), classes)
    new = Made(60, classes, seed=1)
    p = p_of(prior, new)
    assert p.shape == (60, classes) and np.allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == new.labels).mean() > 0.8
    log_loss = -np.log(p[np.arange(60), new.labels]).mean()
    assert log_loss < 0.7 * np.log(classes)


def test_where_the_source_knows_nothing_it_gives_little_more_than_the_shares_of_the_classes():
    new = Made(200, apart=0.0, seed=1)
    p = p_of(fitted(Made(120, apart=0.0)), new)
    assert -np.log(p[np.arange(200), new.labels]).mean() < np.log(2) + 0.03
    sure = np.abs(p - 0.5).max()
    assert sure < 0.3, f'as sure as {sure:.2f} of nothing'


def test_subjects_without_label_are_left_out():
    some, whole = Made(60, unlabeled=20), Made(60)
    left = fitted(some)
    cut = types.SimpleNamespace(sources=whole.sources[20:], seen=whole.labels[20:])
    only = LabelPrior(1, 2)
    only.fit_to(LabelPrior.histogram(torch.from_numpy(cut.sources).float()).numpy(), cut.seen)
    assert torch.equal(left.weight, only.weight) and torch.equal(left.bias, only.bias)
    assert not torch.equal(left.weight, fitted(whole).weight)


def test_it_is_the_same_each_time():
    a, b = fitted(Made(50)), fitted(Made(50))
    assert torch.equal(a.weight, b.weight) and a.weight.any()


@pytest.mark.parametrize('labels', [[0] * 9 + [1], [0] * 10, [2] * 10])
def test_with_less_than_two_subjects_of_a_class_it_gives_the_shares_of_the_classes(labels):
    prior = LabelPrior(1, 2)
    prior.fit_to(np.random.default_rng(0).normal(size=(10, BINS)), np.array(labels))
    known = [label for label in labels if label < 2]
    one = (known.count(1) + 1) / (len(known) + 2)
    torch.testing.assert_close(prior(torch.rand(1, 1, 8, 8, 8)), torch.tensor([[1 - one, one]]))


def test_the_histogram_knows_no_place_and_leaves_out_what_is_outside():
    source = torch.rand(2, 1, 8, 10, 12) * 1.9 - 0.95
    found = LabelPrior.histogram(source)
    assert found.shape == (2, BINS)
    torch.testing.assert_close(found, LabelPrior.histogram(source.flip(2).roll(3, 4)))
    larger = torch.full((2, 1, 12, 12, 12), -1.0)
    larger[:, :, 2:10, :10] = source
    torch.testing.assert_close(found, LabelPrior.histogram(larger))
    assert not torch.allclose(found, LabelPrior.histogram(source * 0.5))
    everywhere_low = LabelPrior.histogram(torch.full((1, 1, 8, 8, 8), -1.0))
    assert everywhere_low.isfinite().all()


@pytest.mark.parametrize('label_head, dims, classes, expected', [(True, 3, 2, 2), (False, 3, 2, 0), (True, 2, 2, 0),
                                                                 (True, 3, 0, 0), (True, 3, 1, 0)])
def test_it_is_for_volumes_with_labels(label_head, dims, classes, expected):
    spec = types.SimpleNamespace(spatial_dims=dims, num_classes=classes)
    assert classes_of(types.SimpleNamespace(label_head=label_head), spec) == expected
