"""Losses by hand, empty regions, and that the two sides of the adversarial game leave each other's gradients alone."""
import math
import sys

import made_data
import pytest
import torch

import losses
import train_aae
import utils


def image(*values):
    """A batch of one-channel images of 4 voxels."""
    return torch.tensor(values, dtype=torch.float32).view(len(values), 1, 2, 2)


PRED, TARGET = image([0.5, 0.0, -0.5, 1.0]), image([0.0, 0.0, 0.5, -1.0])  # errors 0.5, 0, 1, 2
MASK, LESION, EMPTY = image([1, 1, 1, 0]), image([1, 0, 1, 0]), image([0, 0, 0, 0])


def test_reconstruction_l1_by_hand():
    found = losses.reconstruction_l1(PRED, TARGET, MASK, outside=0.1)
    assert float(found) == pytest.approx((0.5 + 0 + 1 + 0.1 * 2) / 3.1)
    two = losses.reconstruction_l1(PRED.repeat(1, 2, 1, 1), TARGET.repeat(1, 2, 1, 1), MASK, outside=0.1)
    assert float(two) == pytest.approx(float(found))  # a mean over channels, too
    assert float(losses.reconstruction_l1(PRED, TARGET, MASK, outside=1)) == pytest.approx(3.5 / 4)


def test_hinge_losses_by_hand():
    real, fake = image([2, 0.5, 1, -1]), image([-2, 0, -0.5, 1])
    assert float(losses.hinge_discriminator(real, fake)) == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    assert float(losses.hinge_generator(fake)) == pytest.approx(1.5 / 4)
    assert losses.hinge_generator(fake.repeat(3, 1, 1, 1)).shape == (3,)


def test_lesion_cross_entropy_by_hand():
    logit = image([0, 2, -1, 9])
    by_hand = (math.log(2) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 3  # lesion: first and third voxel
    assert float(losses.lesion_cross_entropy(logit, MASK, LESION)) == pytest.approx(by_hand, rel=1e-5)
    half = losses.lesion_cross_entropy(logit, MASK, LESION, weight=0.5, voxels=(torch.tensor([6.0]), None))
    assert float(half) == pytest.approx(by_hand * 3 * 0.5 / 6, rel=1e-5)
    assert float(losses.lesion_cross_entropy(logit, EMPTY, EMPTY)) == 0
    assert losses.lesion_cross_entropy(None, MASK.repeat(2, 1, 1, 1), None).tolist() == [0, 0]


def test_region_l1_by_hand():
    assert float(losses.region_l1(PRED, TARGET, MASK)) == pytest.approx(1.5 / 3)
    assert float(losses.region_l1(PRED, TARGET, LESION)) == pytest.approx(1.5 / 2)
    both = losses.region_l1(PRED.repeat(1, 2, 1, 1), TARGET.repeat(1, 2, 1, 1), LESION)
    assert float(both) == pytest.approx(0.75)


def test_a_small_lesion_counts_by_its_size():
    def e_lesion(lesion, floor):
        return float(losses.post_training_error(PRED, TARGET, MASK, lesion, 'l1', floor)[1])

    assert e_lesion(LESION, floor=0) == pytest.approx(0.75)
    assert e_lesion(LESION, floor=0.5) == pytest.approx(0.75)  # 2 of 3 voxels
    assert e_lesion(image([0, 0, 1, 0]), floor=0.5) == pytest.approx(1 / 1.5)


def test_lapt_error_is_the_published_formula():
    """Sum of squares over the field of view and the channels, over the voxels of the region: (0.25 + 0 + 1 + 4) / 3."""
    image_term, lesion_term = losses.post_training_error(PRED, TARGET, MASK, LESION, 'lapt')
    assert float(image_term) == pytest.approx(5.25 / 3)
    assert float(lesion_term) == pytest.approx(1.25 / 2)
    pair = [x.repeat(1, 2, 1, 1) for x in (PRED, TARGET)]
    assert float(losses.post_training_error(*pair, MASK, LESION, 'lapt')[0]) == pytest.approx(2 * 5.25 / 3)


def test_l2_l1_is_squared_in_the_mask_and_absolute_in_the_lesion():
    e_mask, e_lesion = losses.post_training_error(PRED, TARGET, MASK, LESION, 'l2_l1')
    assert float(e_mask) == pytest.approx((0.25 + 0 + 1) / 3 / 0.1)
    assert float(e_lesion) == pytest.approx(1.5 / 2)
    pred = torch.full((1, 1, 2, 2), 0.05, requires_grad=True)  # an error of 0.05: as steep as L1
    for kind in ('l1', 'l2_l1'):
        e_mask = losses.post_training_error(pred, torch.zeros_like(pred), MASK, EMPTY, kind)[0]
        assert float(torch.autograd.grad(e_mask, pred)[0][0, 0, 0, 0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize('kind', ['l1', 'l2_l1', 'lapt'])
@pytest.mark.parametrize('dims', [2, 3])
def test_samples_without_lesion_give_zero_and_a_clean_gradient(kind, dims):
    torch.manual_seed(0)
    shape = (3, 2, 4, 6, 5)[:2 + dims]
    pred, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mask, lesion = torch.ones(3, 1, *shape[2:]), torch.zeros(3, 1, *shape[2:])
    lesion[1, 0, 1:3] = 1
    mask[2] = 0  # and even without a mask
    e_mask, e_lesion = losses.post_training_error(pred, target, mask, lesion, kind)
    assert e_mask.shape == e_lesion.shape == (3,)
    assert float(e_lesion[0]) == float(e_lesion[2]) == 0 and float(e_lesion[1].detach()) > 0
    grad = torch.autograd.grad(e_lesion.sum(), pred, retain_graph=True)[0]
    assert bool(torch.isfinite(grad).all()) and float(grad[0].abs().max()) == 0 and float(grad[1].abs().max()) > 0
    grad = torch.autograd.grad((e_mask + e_lesion).mean(), pred)[0]
    assert bool(torch.isfinite(grad).all())


def test_post_training_l1_is_a_mean_over_each_region():
    e_mask, e_lesion = losses.post_training_error(PRED, TARGET, MASK, LESION, 'l1')
    assert (float(e_mask), float(e_lesion)) == (pytest.approx(0.5), pytest.approx(0.75))
    assert float(losses.post_training_error(PRED, TARGET, MASK, EMPTY, 'l1')[1]) == 0


# ------------------------------------------------------------------------------------------------------------------
# The autoencoder's step

def grads(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def same(a, b):
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
               for x, y in zip(a, b, strict=True))


def test_generator_and_discriminator_leave_each_others_gradients_alone(monkeypatch):
    """The real script, watched: before and after each backward pass, and at each of the two optimiser steps."""
    made_data.write_stroke('data')
    nets, seen, updates = {}, [], []
    place, backward, update = utils.Run.place, utils.Run.backward, utils.Run.update

    def watched_place(self, net):
        nets[type(net).__name__] = net
        return place(self, net)

    def watched_backward(self, loss):
        before = {name: grads(net) for name, net in nets.items()}
        backward(self, loss)
        seen.append({name for name, net in nets.items() if not same(before[name], grads(net))})

    def watched_update(self, opt, clip):
        owner = [name for name, net in nets.items() if opt.param_groups[0]['params'][0] is next(net.parameters())][0]
        before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
        norm = update(self, opt, clip)
        changed = {name for name, net in nets.items() if not same(before[name], list(net.parameters()))}
        updates.append((owner, changed))
        return norm

    for name, value in dict(place=watched_place, backward=watched_backward, update=watched_update).items():
        monkeypatch.setattr(utils.Run, name, value)
    words = ['--data_root', 'data', '--data_info', 'data/data_info', '--image_size', '(16, 20)', '--frames', '6',
             '--spacing', '(None, None, None)', '--aae_channels', '(8, 8, 8)', '--disc_channels', '(8, 8)',
             '--aae_steps', '4', '--batch_size', '2', '--disc_start', '2', '--disc_ramp', '1', '--warmup', '1']
    monkeypatch.setattr(sys, 'argv', ['train_aae.py', *words])
    train_aae.main()
    assert seen == [{'Discriminator'}, {'AAE'}] * 4  # also in steps 2 and 3, where the adversarial loss counts
    assert updates == [('AAE', {'AAE'}), ('Discriminator', {'Discriminator'})] * 4
    curve = (made_data.os.path.join('result', 'exp_1', 'loss_curve_aae.csv'))
    rows = [line.split(',') for line in open(curve).read().split()]
    adversarial = [float(row[rows[0].index('adversarial')]) for row in rows[1:]]
    assert adversarial[:2] == [0, 0] and all(adversarial[2:])
    total = [float(row[rows[0].index('loss')]) for row in rows[1:]]
    l1 = [float(row[rows[0].index('l1')]) for row in rows[1:]]
    assert total[3] == pytest.approx(100 * l1[3] + adversarial[3], rel=1e-3)


def test_adversarial_weight_is_a_ramp_from_disc_start():
    cfg = made_data.settings('--disc_start', '10', '--disc_ramp', '4', '--w_adversarial', '2.0')
    weights = [train_aae.adversarial_weight(step, cfg) for step in (0, 9, 10, 11, 13, 100)]
    assert weights == pytest.approx([0, 0, 0.5, 1.0, 2.0, 2.0])
