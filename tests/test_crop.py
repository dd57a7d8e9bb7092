"""The decoded crop of stage 3: over all crops, each by its probability, error and gradient are the whole image's."""
import itertools

import made_data
import made_runs
import numpy as np
import pytest
import torch
from torch import nn

import losses
import post_train
from model import AAE

SHAPE, SIZE = (16, 24, 20), (8, 12, 8)


def regions():
    """A brain that touches the image's border, and lesions in a corner of it; the second sample has none."""
    place = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing='ij'))
    mask = (place.square().sum(0) < 1.1).expand(2, 1, *SHAPE).float()
    lesion = torch.zeros_like(mask)
    lesion[0, 0, 9:13, 15:21, 4:9] = 1
    return mask, lesion * mask


def test_probabilities_by_hand():
    lesion, region = torch.zeros(8, 8, 16), torch.zeros(8, 8, 16)
    region[0, 0, 0] = region[7, 7, 15] = lesion[3, 3, 7] = 1
    odds = post_train.crop_odds(lesion, region, (8, 8, 8))
    assert odds.flatten().tolist() == [0.25, 0.5, 0.25]  # half of the draws go to the lesion, the rest to both ends
    assert post_train.inclusion(odds, (8, 8, 8))[0, 0].tolist() == [0.25, 0.75, 0.75, 0.25]
    assert post_train.crop_odds(0 * lesion, region, (8, 8, 8)).flatten().tolist() == [0.5, 0, 0.5]


def test_crops_are_drawn_with_these_probabilities_and_hold_every_voxel_of_the_region():
    mask, lesion = regions()
    torch.manual_seed(0)
    seen = torch.zeros(2, 5, 7, 6)  # blocks + 1
    draws = 400
    for _ in range(draws):
        starts, weights = post_train.draw_crops(lesion, mask, SIZE)
        assert weights.shape == (2, 1, *SIZE)
        for i, start in enumerate(starts):
            seen[i][tuple(slice(a // 4, (a + s) // 4) for a, s in zip(start, SIZE, strict=True))] += 1
    for i in range(2):
        held = post_train.inclusion(post_train.crop_odds(lesion[i, 0], mask[i, 0], SIZE), SIZE)
        found = seen[i][:4, :6, :5] / draws
        assert float((found - held).abs().max()) < 0.1  # 4 standard errors
        blocks = nn.functional.max_pool3d(mask[i], 4)[0]
        assert float(held[blocks > 0].min()) > 0


def expected(decode, z, target, mask, lesion, kind):
    """The errors of stage 3 over all possible crops, weighed by their probabilities: (E_mask, E_lesion)."""
    total = [0, 0]
    for i in range(len(z)):
        one = [x[i:i + 1] for x in (z, target, mask, lesion)]
        region = one[2] if kind == 'l1' else one[2] >= 0
        odds = post_train.crop_odds(one[3][0, 0], region[0, 0], SIZE)
        whole = 1 / post_train.inclusion(odds, SIZE)
        for place in itertools.product(*map(range, odds.shape)):
            if odds[place] > 0:
                start = [[4 * a for a in place]]
                weight = post_train.cut(whole[None, None].float(), start, SIZE, factor=4)
                for axis in (2, 3, 4):
                    weight = weight.repeat_interleave(4, dim=axis)
                pred = decode(post_train.cut(one[0], start, SIZE, factor=4))
                parts = [post_train.cut(x, start, SIZE) for x in one[1:]]
                errors = losses.post_training_error(pred, *parts, kind, 0.1, weight,
                                                    (losses.count(one[2]), losses.count(one[3])))
                total = [a + float(odds[place]) * b.sum() for a, b in zip(total, errors, strict=True)]
    return total


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize('kind', ['l1', 'l2_l1', 'lapt'])
def test_expected_error_and_gradient_are_those_of_the_whole_image(kind):
    """With a decoder in which blocks of 4 x 4 x 4 voxels do not meet, as the autoencoder's shortcut is: to rounding."""
    torch.manual_seed(1)
    mask, lesion = regions()
    decoder = nn.ConvTranspose3d(3, 2, 4, stride=4)
    z, target = torch.randn(2, 3, 4, 6, 5), torch.randn(2, 2, *SHAPE)
    whole = [x.sum() for x in losses.post_training_error(decoder(z), target, mask, lesion, kind, 0.1)]
    crops = expected(decoder, z, target, mask, lesion, kind)
    for a, b in zip(crops, whole, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5)
        for weight in decoder.parameters():
            grads = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (a, b)]
            assert relative(*grads) < 1e-5 and float(grads[1].norm()) > 0


def test_what_remains_is_that_the_decoder_sees_the_crop_alone(monkeypatch):
    """Its convolutions at the border and its group norms: the expected error moves by 2 % at most, on tiny crops.

    Without the weights the error in the lesion comes out twice as large. (The gradient of these layers is not the whole
    image's; it comes near it as the crop grows.)
    """
    torch.manual_seed(2)
    mask, lesion = regions()
    aae = AAE(3, 1, 3, (8, 8, 8))
    nn.init.normal_(aae.decoder.layers[-1].weight, std=0.02)
    z, target, whole_image = torch.randn(2, 3, 4, 6, 5), torch.randn(2, 1, *SHAPE), losses.post_training_error
    whole = [float(x.sum()) for x in whole_image(aae.decode(z), target, mask, lesion, 'l1', 0.1)]
    crops = [float(x) for x in expected(aae.decode, z, target, mask, lesion, 'l1')]
    assert crops == pytest.approx(whole, rel=0.02)
    monkeypatch.setattr(losses, 'post_training_error', lambda *args: whole_image(*args[:6]))
    plain = [float(x) for x in expected(aae.decode, z, target, mask, lesion, 'l1')]
    assert plain[1] > 1.5 * whole[1]


def test_a_crop_as_large_as_the_image_is_no_crop():
    """The script with and without a crop that holds everything: the same curve."""
    made_data.write_amyloid('data')
    words = (*made_runs.AMYLOID, *made_runs.steps(3), '--precision', 'fp32', '--init_from', 'base')
    for script in ('train_aae', 'train_unet'):
        made_runs.call(script, *words, '--exp', 'base')
    curves = []
    for name, crop in (('whole', 'None'), ('all', '(16, 16, 16)'), ('part', '(8, 8, 8)')):
        made_runs.call('post_train', *words, '--exp', name, '--crop', crop)
        rows = made_runs.curve(f'result/{name}/loss_curve_post.csv')
        curves.append(np.array([[float(x) for x in row[3:]] for row in rows[1:]]))
    np.testing.assert_allclose(curves[1][0], curves[0][0], rtol=1e-4)  # the draw of the crop moves the later noise
    assert np.isfinite(curves[2]).all() and abs(curves[2] - curves[0]).max() > 1e-3
