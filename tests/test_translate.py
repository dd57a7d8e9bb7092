"""From source to prediction, with networks of random weights."""
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import made_data
import made_runs
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

import config
import dataset
import evaluate
import post_train
import utils
from diffusion import Diffusion
from model import AAE, PixelUNet, UNet
from translate import Model, Sampling, checkpoint_path, decide, doubt, found_stage, mean_prediction, translate


def model(dims, kind):
    torch.manual_seed(0)
    regression = PixelUNet(dims, 3, 2, False, (8, 8))
    unet = UNet(dims, 4, 3, (8, 16), 1, (), 4, 8)
    detail = PixelUNet(dims, 3, 2, True, (8, 8), feature_channels=unet.feature_channels, lesion_head=kind == 'head')
    found = Model(AAE(dims, 2, 4, (8, 8, 8)), unet, Diffusion(), detail if kind in ('detail', 'head') else None,
                  regression if kind == 'regression' else None)
    for net in (found.aae, unet, detail, regression):
        for p in net.parameters():  # the layers that start at zero, too
            p.data = torch.randn_like(p) * 0.1
    return found.eval()


@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('kind, samples', [('regression', 1), ('latent', 1), ('detail', 1), ('detail', 3),
                                           ('head', 1), ('head', 3)])
def test_the_mean_with_the_mirrored_source_is_symmetric(dims, kind, samples):
    """Mirrored source, mirrored prediction and std: exactly so with `mirror`, far from it without."""
    net, run = model(dims, kind), utils.Run('cpu', 'fp32')
    source = np.random.default_rng(0).normal(size=(3, 3, *(16, 8, 8)[:dims])).astype(np.float32)

    def images(mirror):
        how = Sampling(samples=samples, mirror=mirror, eval_batch=2)
        return [translate(run, net, x, 'sub', how) for x in (source, source[:, :, ::-1])]

    for image, other in zip(*images(True), strict=True):
        assert image is other is None or np.allclose(image[:, :, ::-1], other, atol=1e-4)
    plain, mirrored = images(False)
    assert not np.allclose(plain[0][:, :, ::-1], mirrored[0], atol=1e-2)
    assert np.allclose(images(True)[0][0], (plain[0] + mirrored[0][:, :, ::-1]) / 2, atol=1e-4)
    assert (plain[1] is None) == (samples == 1 and kind != 'head') and images(True)[0][1] is not None
    assert plain[0].shape[1] == 2 + (kind == 'head')  # the probability of a lesion as a further channel
    if kind == 'head':
        assert 0 <= plain[0][:, 2].min() < plain[0][:, 2].max() <= 1


@pytest.mark.parametrize('dims', [2, 3])
def test_the_latent_path_is_left_out_where_it_adds_nothing(dims):
    """The same images without it as with weights of zero; it runs where that is not known, or sampling is asked for."""
    net, run = model(dims, 'head'), utils.Run('cpu', 'fp32')
    source = np.random.default_rng(0).normal(size=(3, 3, *(16, 8, 8)[:dims])).astype(np.float32)
    net.latent_adds = False
    left_out, std = translate(run, net, source, 'sub', Sampling(mirror=True))
    assert not np.allclose(left_out, translate(run, net, source, 'sub', Sampling(mirror=True, skip_latent=False))[0],
                           atol=1e-2)
    with torch.no_grad():
        net.detail.conv_in.weight[:, -2:] = 0
        for p in (net.detail.share, net.detail.join.weight, net.detail.join.bias):
            p.zero_()
    with_it = translate(run, net, source, 'sub', Sampling(mirror=True, skip_latent=False))
    assert np.allclose(left_out, with_it[0], atol=1e-5) and np.allclose(std, with_it[1], atol=1e-5)
    net.unet = None
    assert np.array_equal(translate(run, net, source, 'sub', Sampling(mirror=True))[0], left_out)
    for more in (dict(sampler='ddim', num_steps=2), dict(samples=2), dict(guidance=2.0), dict(skip_latent=False)):
        with pytest.raises(AttributeError):
            translate(run, net, source, 'sub', Sampling(**more))
    net.latent_adds = True
    with pytest.raises(AttributeError):
        translate(run, net, source, 'sub', Sampling())


def test_the_latent_path_adds_what_is_more_than_chance():
    row = dict(psnr=31.0, lesion_mae=0.06)
    for change, adds in ((dict(), False), (dict(psnr=30.99), False), (dict(psnr=30.9), True), (dict(psnr=31.2), False),
                         (dict(lesion_mae=0.0602), False), (dict(lesion_mae=0.0604), True),
                         (dict(lesion_mae=0.05), False), (dict(lesion_mae=float('nan')), False)):
        assert post_train.latent_adds(row, row | change) == adds, change
    assert post_train.latent_adds(row, row, reads_label=True)


@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('kind, samples', [('regression', 1), ('latent', 2), ('head', 2)])
def test_a_box_is_translated_as_an_image_of_its_size(dims, kind, samples, monkeypatch):
    """trim: what lies around the brain changes nothing, and is background; the noise is that of the place."""
    net, run = model(dims, kind), utils.Run('cpu', 'fp32')
    grid, box = (24, 16, 16)[:dims], (slice(5, 17), slice(4, 12), slice(3, 11))[:dims]
    whole = np.full((3, 3, *grid), -1, np.float32)
    inside = (slice(0, 2), slice(None), *box)  # the last item has no brain
    whole[inside] = np.random.default_rng(0).uniform(-0.9, 1, whole[inside].shape)
    noise = torch.randn(1, 4, *[n // 4 for n in grid], generator=torch.Generator().manual_seed(1))
    here = noise[(..., *(slice(b.start // 4, b.start // 4 + (b.stop - b.start) // 4) for b in box))]
    asked = []

    def starting_noise(key, shape, k, device):
        asked.append(shape)
        return lambda: (k + 1) * (noise if shape[1] == grid[0] // 4 else here)
    monkeypatch.setattr('translate.starting_noise', starting_noise)
    trimmed, std = translate(run, net, whole, 'sub', Sampling(trim=True, samples=samples))
    mask = np.zeros((3, 1, *grid), np.float32)
    mask[(slice(0, 2), slice(None), *box)] = 1
    again = translate(run, net, whole, 'sub', Sampling(trim=True, samples=samples), mask=mask)
    assert np.array_equal(trimmed, again[0])
    small, small_std = translate(run, net, whole[inside], 'sub', Sampling(samples=samples))
    np.testing.assert_allclose(trimmed[inside], small, atol=1e-5)
    assert (std is None) == (small_std is None)
    if std is not None:
        np.testing.assert_allclose(std[inside], small_std, atol=1e-5)
    outside = np.ones((3, *grid), bool)
    outside[(slice(0, 2), *box)] = False
    assert (trimmed[:, :2][np.broadcast_to(outside[:, None], trimmed[:, :2].shape)] == -1).all()
    if kind == 'head':
        assert trimmed[:, 2][outside].max() < 1e-6 < trimmed[:, 2][~outside].min()
    assert kind == 'regression' or {shape[1] for shape in asked} == {grid[0] // 4, 3}


def test_what_is_dark_in_the_mask_is_translated_too():
    net, run = model(2, 'regression'), utils.Run('cpu', 'fp32')
    source, mask = np.full((1, 3, 16, 16), -1, np.float32), np.zeros((1, 1, 16, 16), np.float32)
    source[:, :, 6:10, 6:10], mask[:, :, 2:14, 2:14] = 0.5, 1
    found = translate(run, net, source, 'sub', Sampling(trim=True), mask=mask)[0]
    assert (found[:, :, 2:14, 2:14] != -1).all() and (found[:, :, :2] == -1).all()


@pytest.mark.parametrize('kind', ['head', 'regression'])
def test_lesion_odds_move_the_image_and_not_the_probability(kind):
    net, run = model(2, 'head'), utils.Run('cpu', 'fp32')
    if kind == 'regression':
        torch.manual_seed(0)
        net.regression = PixelUNet(2, 3, 2, False, (8, 8), lesion_head=True)
        for p in net.regression.parameters():
            p.data = torch.randn_like(p) * 0.1
    source = np.random.default_rng(0).normal(size=(3, 3, 16, 8)).astype(np.float32)
    one, three, nine = (translate(run, net, source, 'sub', Sampling(lesion_odds=odds))[0] for odds in (1, 3, 9))
    assert np.array_equal(one[:, 2], nine[:, 2])
    p, steps = one[:, 2:], (three[:, :2] - one[:, :2], nine[:, :2] - one[:, :2])
    q = [odds * p / (1 - p + odds * p) - p for odds in (3, 9)]  # what the odds add to p, the same image both times
    assert np.abs(steps[0]).max() > 1e-3 and np.allclose(steps[0] * q[1], steps[1] * q[0], atol=1e-5)


@pytest.mark.parametrize('dims', [2, 3])
def test_odds_count_only_near_what_is_surely_a_lesion(dims):
    p = torch.full((6, 1, 9, 8) if dims == 2 else (1, 1, 6, 9, 8), 0.25)
    p[(2, 0, 4, 1) if dims == 2 else (0, 0, 2, 4, 1)] = 0.75
    healthy, change, logit = torch.zeros_like(p), torch.ones_like(p), p.logit()

    def image(**how):
        found = decide(healthy, change, logit, Sampling(lesion_odds=6, **how))
        assert torch.allclose(found[:, 1:], p)
        return found[:, 0].reshape(6, 9, 8)

    high, low = 6 * 0.25 / (0.75 + 6 * 0.25), 0.25
    assert torch.allclose(image()[0], torch.tensor(high))  # without a core everywhere
    near = torch.zeros(6, 9, 8, dtype=torch.bool)
    near[1:4, 2:7, :4] = True                              # slices, x, y; cut off at the border
    found = image(lesion_core=0.7, reach=(1, 2, 2))
    assert torch.allclose(found[2, 4, 1], torch.tensor(18 / 19))
    found[2, 4, 1] = high
    assert torch.allclose(found, torch.where(near, high, low))
    assert torch.allclose(image(lesion_core=0.8, reach=(1, 2, 2)), p.reshape(6, 9, 8))


def test_doubt_is_how_far_a_truth_drawn_by_the_heads_lies_from_the_image():
    """Against draws: a lesion with probability p, a class with its chance, each moving the image as the heads say."""
    p, change = torch.tensor([0.02, 0.3, 0.5, 0.9]).view(1, 1, 2, 2), torch.tensor([0.5, -0.4]).view(1, 2, 1, 1)
    how = Sampling(lesion_odds=6)
    image = decide(torch.zeros(1, 2, 2, 2), change, p.logit(), how)[:, :2]
    truth = (torch.rand(40000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) < p) * change
    drawn = ((truth - image) ** 2).mean(0).sqrt()
    std = doubt(change, p.logit(), None, how)
    torch.testing.assert_close(std[0], drawn, rtol=0.03, atol=0.003)
    assert (std > doubt(change, p.logit(), None, Sampling(lesion_odds=1))).all()  # least where the image is the mean
    both = doubt(change, p.logit(), torch.full((1, 2, 1, 1), 0.2), how)
    torch.testing.assert_close(both ** 2, std ** 2 + 0.04)
    assert doubt(None, None, None, how) is None

    shares, chances = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.8, 0.2, 0.0], [0.3, 0.3, 0.4]])
    torch.manual_seed(0)
    net = PixelUNet(3, 2, 1, False, (8, 8), classes=3).eval()
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    source = torch.randn(2, 2, 8, 8, 4)
    with torch.no_grad():
        pred, change, logit, spread = net(source, shares=shares, apart=True, chances=chances)
        each = torch.stack([net(source, shares=one.expand(2, 3)) for one in torch.eye(3)])
        silent = net(source, shares=shares, apart=True)
    assert change is logit is silent[3] is None
    torch.testing.assert_close(pred, sum(s.view(2, 1, 1, 1, 1) * x for s, x in zip(shares.T, each, strict=True)))
    expected = sum(c.view(2, 1, 1, 1, 1) * (x - pred) ** 2 for c, x in zip(chances.T, each, strict=True))
    torch.testing.assert_close(spread, expected.sqrt(), rtol=1e-4, atol=1e-5)


def test_views_that_disagree_are_in_doubt():
    """Two views that are each sure, of a lesion and of none: the mean of both images is as far from either truth."""
    net, run, source = model(2, 'head'), utils.Run('cpu', 'fp32'), np.zeros((2, 3, 16, 8), np.float32)
    source[:, :, :8] = 1  # told apart from its mirror image by the left half

    def sure(source, shares, apart, chances):
        sign = torch.where(source[:, :1, :1] > 0, 10.0, -10.0).expand(-1, 1, 16, 8)
        return torch.zeros(len(source), 2, 16, 8), torch.full((len(source), 2, 16, 8), 0.5), sign, None
    sure.prior, sure.args = None, dict(lesion_head=True)
    net.regression = sure
    pred, std = translate(run, net, source, 'sub', Sampling(mirror=True))
    assert std.shape == (2, 2, 16, 8)
    np.testing.assert_allclose(pred[:, :2], 0.25, atol=1e-3)
    np.testing.assert_allclose(std, 0.25, atol=1e-3)
    assert translate(run, net, source, 'sub', Sampling())[1].max() < 0.01


def test_a_known_label_leaves_no_doubt():
    net, run = model(3, 'latent'), utils.Run('cpu', 'fp32')
    torch.manual_seed(0)
    net.regression = PixelUNet(3, 3, 2, False, (8, 8), classes=2)
    for p in net.regression.parameters():
        p.data = torch.randn_like(p) * 0.1
    source = np.random.default_rng(0).normal(size=(1, 3, 16, 8, 8)).astype(np.float32)
    std = {label: translate(run, net, source, 'sub', Sampling(), label)[1] for label in (None, 0, 1)}
    assert std[None].shape == (1, 2, 16, 8, 8) and std[None].mean() > 1e-3
    assert np.abs(std[0]).max() < 1e-6 and np.abs(std[1]).max() < 1e-6


def test_neighbouring_slices_count_beyond_a_chunk():
    net, run = model(2, 'head'), utils.Run('cpu', 'fp32')
    source = np.random.default_rng(0).normal(size=(5, 3, 16, 8)).astype(np.float32)
    how = dict(lesion_odds=9, lesion_core=0.9, reach=(1, 2, 2))
    one, all_, off = (translate(run, net, source, 'sub', Sampling(eval_batch=n, **how | more))[0]
                      for n, more in ((1, {}), (5, {}), (5, dict(lesion_core=0))))
    assert np.allclose(one, all_, atol=1e-5) and not np.allclose(all_, off, atol=1e-2)


def test_reach_is_six_millimetres():
    """In the voxels of the subject's working grid, which `spacing` = None leaves as they are."""
    cfg = config.load('', [])
    spec = dataset.Spec.from_settings(cfg, spacing=(None, None, None))
    for size, dims, reach in (((3, 3, 5), 2, (1, 2, 2)), ((1, 2, 5), 2, (1, 6, 3)), ((1, 4, 20), 3, (6, 2, 1))):
        turn = Rotation.from_euler('xyz', (4, -7, 9), degrees=True).as_matrix()
        matrix = np.eye(4)
        matrix[:3, :3] = turn @ np.diag(size)
        subject = SimpleNamespace(grid=((8, 8, 8), matrix), spec=dataclasses.replace(spec, spatial_dims=dims))
        assert Sampling.of(cfg, spec).at(subject).reach == reach


@pytest.mark.parametrize('size', [(8, 12), (16, 8), (4, 20), (12, 16)])
def test_the_mean_image_of_another_image_size_keeps_its_centre(size):
    image = np.random.default_rng(0).random((3, 2, 12, 16)).astype(np.float32)
    subject = SimpleNamespace(mask=np.ones((3, 1, *size), np.float32))
    found = mean_prediction(dict(image=torch.from_numpy(image), centre=1), subject)
    assert found.shape == (3, 2, *size)
    cut = [min(a, b) for a, b in zip(size, (12, 16), strict=True)]
    here, there = ([slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(full, cut, strict=True)]
                   for full in (size, (12, 16)))
    assert np.array_equal(found[(..., *here)], image[(..., *there)])
    rest = np.ones(size, bool)
    rest[tuple(here)] = False
    assert (found[..., rest] == -1).all()


def test_figures_of_the_lesion_head_by_hand():
    mask = np.zeros((4, 4, 2), bool)
    mask[:3] = True
    lesion, probability = np.zeros((2, *mask.shape))
    lesion[0, :2] = lesion[3] = 1                        # 4 voxels in the mask; what lies outside does not count
    probability[0, :3], probability[2], probability[3] = 0.75, 0.25, 1.0
    row = evaluate.lesion_head_row(probability, mask, lesion, 0.5)
    assert row['lesion_head_dice'] == pytest.approx(2 * 4 / (6 + 4))
    assert row['lesion_head_ml'] == pytest.approx(0.5 * (6 * 0.75 + 8 * 0.25))
    assert row['lesion_head_avd_ml'] == pytest.approx(abs(3.25 - 2))
    assert evaluate.lesion_head_row(None, mask, lesion, 0.001) == {}
    assert evaluate.lesion_head_row(probability, mask, None, 0.001) == {}
    counts = evaluate.calibration_counts(probability, mask, lesion)
    assert counts[[0, 2, 7]].tolist() == [[10, 0, 0], [8, 8 * 0.25, 0], [6, 6 * 0.75, 4]] and counts[:, 0].sum() == 24
    table = evaluate.calibration_table([counts, counts, evaluate.calibration_counts(None, mask, lesion)])
    assert table.loc[7].tolist() == pytest.approx([0.7, 12, 0.75, 4 / 6])
    assert table.loc[2].tolist() == pytest.approx([0.2, 16, 0.25, 0])
    assert table.loc[[1, 3, 4, 5, 6, 8, 9], ['mean_p', 'lesion_share']].isna().all(axis=None)


def test_a_checkpoint_that_knows_no_context_saw_single_slices(tmp_path):
    with made_runs.folder(tmp_path):
        made_data.write_stroke('data')
        for script in ('train_aae', 'train_unet'):
            made_runs.call(script, *made_runs.STROKE, *made_runs.steps(1), '--context', '0')
        for name in ('AAE', 'Unet'):
            path = f'result/exp_1/CHECKPOINT_{name}.pth.tar'
            data = torch.load(path, weights_only=True)
            del data['prep']['context']
            torch.save(data, path)
        made_runs.call('infer', *made_runs.STROKE, '--only_model')
        assert Path('result/exp_1/test.csv').exists()


def test_stroke_without_lesion_masks(tmp_path):
    """The README's settings for it: every stage and inference, and no figure of a lesion."""
    with made_runs.folder(tmp_path):
        made_data.write_stroke('data')
        for file in Path('data').glob('*/lesion.nii.gz'):
            file.unlink()
        words = (*made_runs.STROKE, *made_runs.steps(1), '--lesion', 'None', '--lesion_head', 'False',
                 '--w_lesion', '0')
        for script, *more in (['train_aae'], ['train_unet'], ['train_unet', '--regression', 'True'], ['post_train'],
                              ['infer']):
            made_runs.call(script, *words, *more)
        summary = pd.read_csv('result/exp_1/test_summary.csv', index_col='metric')
        lesion = summary.index.str.contains('lesion')
        assert lesion.sum() > 10 and not summary.loc[lesion, 'n'].any() and summary.loc[~lesion, 'n'].all()


def test_which_experiment_a_checkpoint_is_taken_from(in_empty_folder):
    """The nearest that has any of the stages says which model; what lies beside it may come from further back."""
    for exp, stages, began in (('first', ('aae', 'unet', 'post'), None), ('second', ('regression',), 'first'),
                               ('third', (), 'second'), ('round', (), 'round')):
        Path('result', exp).mkdir(parents=True)
        Path('result', exp, 'config.json').write_text(json.dumps(dict(init_from=began)))
        for stage in stages:
            Path('result', exp, f'{utils.BEST[stage]}.pth.tar').touch()
    for exp, began, stage, of_aae in (('first', None, 'post', 'first'), ('second', 'first', 'regression', 'first'),
                                      ('new', 'second', 'regression', 'first'), ('new', 'third', 'regression', 'first'),
                                      ('new', 'first', 'post', 'first'), ('new', None, 'unet', 'new'),
                                      ('new', 'round', 'unet', 'round')):
        cfg = config.load('', ['--exp', exp, '--init_from', str(began)])
        assert found_stage(cfg) == stage
        assert checkpoint_path(cfg, 'aae').parent.name == of_aae
    Path('result/second/config.json').write_text('no json')
    assert checkpoint_path(config.load('', ['--exp', 'new', '--init_from', 'second']), 'aae').parent.name == (
        'second')
