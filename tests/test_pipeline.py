"""Both tasks through all stages on phantoms, with tiny networks: what is written, that it learns, no label leaks."""
import csv
import json
import shutil
from pathlib import Path

import made_runs
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import config
import infer
import outputs
import phantom
import stage
import translate
import utils

COMMON = ('--data_root', 'data', '--data_info', 'data/data_info', '--spacing', '(None, None, None)', '--device', 'cpu',
          '--precision', 'fp32', '--eval_every', '1000', '--save_every', '1000', '--disc_start', '40',
          '--disc_ramp', '20', '--warmup', '10', '--ema', '0.97', '--disc_channels', '(8, 8)')
TASKS = dict(
    ctp2dwi=dict(
        phantom=('--subjects', '14', '--spacing', '6,6,8'), targets=('dwi', 'adc'), exp='exp_1',
        words=(*COMMON, '--image_size', '(32, 36)', '--aae_channels', '(8, 16, 24)', '--latent_channels', '8',
               '--unet_channels', '(24, 48)', '--cond_channels', '16', '--cond_width', '16',
               '--detail_channels', '(16, 24)', '--regression_channels', '(8, 16)', '--batch_size', '8',
               '--aae_steps', '80', '--unet_steps', '80', '--post_steps', '130', '--regression_steps', '20')),
    mri2pet=dict(
        phantom=('--subjects', '16', '--spacing', '8,8,8'), targets=('suvr',), exp='exp_mri2pet_demo',
        words=('--preset', 'mri2pet_demo', *COMMON, '--image_size', '(20, 24, 20)', '--aae_channels', '(8, 12, 16)',
               '--latent_channels', '8', '--unet_channels', '(16, 32)', '--cond_channels', '16', '--cond_width', '8',
               '--detail_channels', '(8, 16)', '--regression_channels', '(8, 16)', '--batch_size', '4',
               '--aae_steps', '60', '--unet_steps', '80', '--post_steps', '60', '--regression_steps', '10',
               '--detail_lr_scale', '0.9')))


@pytest.fixture(scope='module', params=TASKS)
def trained(request, tmp_path_factory):
    """A folder in which one task went through all stages: (task, settings, folder of the experiment)."""
    task = TASKS[request.param]
    with made_runs.folder(tmp_path_factory.mktemp(request.param)) as path:
        phantom.main(['--task', request.param, '--out', 'data', '--seed', '1', '--workers', '1', *task['phantom']])
        for script, *more in (['train_aae'], ['train_unet'], ['train_unet', '--regression', 'True'], ['post_train'],
                              ['infer']):
            made_runs.call(script, *task['words'], *more)
        yield request.param, task, path / 'result' / task['exp']


@pytest.fixture(autouse=True)
def in_its_folder(trained, in_empty_folder, monkeypatch):
    monkeypatch.chdir(trained[2].parent.parent)


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def ids(split):
    return Path('data/data_info', f'{split}.txt').read_text().split()


def source(task, id):
    return Path('data', id, 'ctp.nii.gz') if task == 'ctp2dwi' else next(Path('data/whole_MRI').glob(f'{id}.nii*'))


def truth(task, id, target):
    return Path('data', id, f'{target}.nii.gz') if task == 'ctp2dwi' else next(
        Path('data/whole_Abeta').glob(f'{id}.nii*'))


def mask(task, id):
    return Path('data', id, 'mask.nii.gz') if task == 'ctp2dwi' else next(Path('data/mask').glob(f'{id}.nii*'))


def composite(id):
    return next(Path('data/roi').glob(f'{id}.nii*'), 'none')


def images(folder):
    return {str(p.relative_to(folder)): np.asanyarray(nib.load(p).dataobj) for p in sorted(folder.rglob('*.nii.gz'))}


def test_every_file_of_the_contract_is_there(trained):
    task, settings, folder = trained
    files = ['config.json', 'log.txt', 'git.txt', 'test.csv', 'test_mean.csv', 'test_aae.csv', 'test_unet.csv',
             'test_regression.csv', 'test_summary.csv', 'CHECKPOINT_AAE.pth.tar', 'CHECKPOINT_Unet.pth.tar',
             'CHECKPOINT_Unet_post.pth.tar']
    for name in ('aae', 'unet', 'post', 'regression'):
        files += [f'last_{name}.pth.tar', f'loss_curve_{name}.csv', f'validation_{name}.csv']
    assert [name for name in files if not (folder / name).stat().st_size] == []
    assert [row['ID'] for row in table(folder / 'test.csv')] == ids('test')
    for id in ids('test'):
        found = {p.name for p in (folder / 'pred' / id).iterdir()}
        files = {f'{name}{kind}.nii.gz' for name in settings['targets'] for kind in ('', '_std', '_half_90')}
        lesion = {'lesion_probability.nii.gz', 'lesion_rule.nii.gz'} if task == 'ctp2dwi' else set()
        assert found == files | lesion | {'prediction.json'}
        doubt = [nib.load(folder / 'pred' / id / f'{name}_std.nii.gz').get_fdata() for name in settings['targets']]
        fits = json.loads((folder / 'pred' / id / 'prediction.json').read_text())['intervals']
        inside = np.asanyarray(nib.load(mask(task, id)).dataobj) > 0
        for name, std in zip(settings['targets'], doubt, strict=True):
            half = nib.load(folder / 'pred' / id / f'{name}_half_90.nii.gz').get_fdata()
            width = np.interp(std, fits[name]['std'], fits[name]['half'][fits[name]['q'].index(0.9)])
            np.testing.assert_allclose(half, width * inside, rtol=1e-4, atol=1e-6)
        assert all(image.min() == 0 < image.max() for image in doubt)  # of the lesion or the label head
        if task == 'ctp2dwi':
            image = nib.load(folder / 'pred' / id / 'lesion_probability.nii.gz').get_fdata()
            assert 0 <= image.min() and image.max() <= 1 and np.ptp(image[inside]) > 0 and not image[~inside].any()
            image = nib.load(folder / 'pred' / id / 'lesion_rule.nii.gz')
            volume = np.count_nonzero(image.dataobj) * np.prod(image.header.get_zooms()) / 1000
            said = {row['ID']: row['lesion_rule_ml'] for row in table(folder / 'test_predictions.csv')}
            assert set(np.unique(image.dataobj)) <= {0, 1} and volume == pytest.approx(float(said[id]), rel=1e-4)
        record = json.loads((folder / 'pred' / id / 'prediction.json').read_text())
        assert record['id'] == id and record['sampler'] == 'one_step' and 'Unet_post' in record['checkpoint']
        assert record['lesion_odds'] == 8 and record['lesion_core'] == 0.9
        assert (record['seed'], record['label'], set(record['units'])) == (0, 'unknown', set(settings['targets']))
        assert record['settings']['task'] == task and record['settings']['scaling']['source']
    calibration = folder / 'test_lesion_calibration.csv'
    assert calibration.exists() == (task == 'ctp2dwi')
    if calibration.exists():  # every voxel of every mask counts once
        inside = sum(np.count_nonzero(nib.load(mask(task, id)).dataobj) for id in ids('test'))
        assert sum(int(row['voxels']) for row in table(calibration)) == inside
    assert not list(folder.rglob('*.tmp'))


def test_the_detail_branch_starts_as_the_regression_of_its_widths(trained):
    task, _, folder = trained
    start = {'ctp2dwi': 'at zero', 'mri2pet': 'as the regression U-Net'}[task]  # there the widths are the same
    assert f'the detail branch starts {start}' in (folder / 'log.txt').read_text()
    groups = torch.load(folder / 'last_post.pth.tar', weights_only=True)['parts']['opt']['adamw']['param_groups']
    detail = {'ctp2dwi': 1, 'mri2pet': 0.9}[task]  # the factor is for a branch that has learned already
    assert [group['lr_scale'] for group in groups] == [1, 1, detail]
    before = {'ctp2dwi': 'unet', 'mri2pet': 'regression'}[task]  # what row 0 is: D(z_0_hat), or the regression itself
    rows = {name: table(folder / f'validation_{name}.csv') for name in (before, 'post')}
    best = max(float(row['psnr']) for row in rows[before])
    assert float(rows['post'][0]['psnr']) == pytest.approx(best, abs=1e-3)


def test_the_latent_path_is_left_out_where_stage_3_found_nothing_in_it(trained, capsys):
    """What was compared on validation is in the checkpoint, and inference says and records what it does."""
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'])
    # As the regression and not trained since, the latent path is unused; at zero it makes the image.
    made_runs.call('post_train', *words, '--exp', 'begun', '--post_steps', '0')
    data = torch.load('result/begun/CHECKPOINT_Unet_post.pth.tar', weights_only=True)
    assert data['latent_adds'] == (task == 'ctp2dwi')
    capsys.readouterr()
    for exp, more in (('begun', ()), ('with', ('--init_from', 'begun', '--skip_latent', 'False'))):
        made_runs.call('infer', *words, '--exp', exp, '--only_model', *more)
        said = 'the latent path is left out' in capsys.readouterr().out
        left_out = task == 'mri2pet' and exp == 'begun'
        assert said == json.loads(Path('result', exp, 'inference.json').read_text())['skip_latent'] == left_out
    for (name, mine), theirs in zip(images(Path('result/begun/pred')).items(),
                                    images(Path('result/with/pred')).values(), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * np.ptp(theirs), name
    log, adds = (folder / 'log.txt').read_text(), torch.load(folder / 'CHECKPOINT_Unet_post.pth.tar',
                                                             weights_only=True)['latent_adds']
    assert adds or 'the latent path adds nothing' in log
    assert json.loads((folder / 'inference.json').read_text())['skip_latent'] == (not adds)


def test_the_control_and_the_regression_alone(trained):
    """The README's commands for them; --only_model leaves out baselines and intervals."""
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'])
    control = ('--exp', 'control', '--detail_branch', 'False', '--w_image', '0', '--w_lesion', '0', '--post_steps', '2')
    made_runs.call('post_train', *words, *control)
    made_runs.call('infer', *words, '--exp', 'control', '--only_model')
    made_runs.call('infer', *words, '--exp', 'alone', '--stage', 'regression', '--only_model')
    made_runs.call('train_unet', *words, '--exp', 'rival', '--regression', 'True', '--regression_steps', '2',
                   '--lesion_head', 'False', '--trim', 'False')
    made_runs.call('infer', *words, '--exp', 'rival', '--only_model')  # its own, not stage 3 of init_from
    assert 'regression' in json.loads(Path('result/rival/inference.json').read_text())['checkpoint']
    for name in ('control', 'alone', 'rival'):
        found = {path.name for path in Path('result', name).glob('test*.csv')}
        head = {'test_lesion_calibration.csv'} if task == 'ctp2dwi' and name == 'alone' else set()
        assert found == {'test.csv', 'test_summary.csv', 'test_predictions.csv'} | head
        assert not any('coverage' in column for column in table(Path('result', name, 'test.csv'))[0])
    assert torch.load('result/control/CHECKPOINT_Unet_post.pth.tar', weights_only=True)['detail'] is None
    figure = f"{settings['targets'][0]}_psnr"
    for mine, theirs in zip(table(Path('result/alone/test.csv')), table(folder / 'test_regression.csv'), strict=True):
        assert mine['ID'] == theirs['ID'] and float(mine[figure]) == pytest.approx(float(theirs[figure]), abs=1e-3)


def test_a_regression_needs_no_other_stage(trained, capsys):
    """Two commands, and it has images, doubt, intervals, tables and figures of its own."""
    task, settings, _ = trained
    words, folder = (*settings['words'], '--exp', 'no_other'), Path('result/no_other')
    made_runs.call('train_unet', *words, '--regression', 'True', '--regression_steps', '2')
    made_runs.call('infer', *words)                                   # auto: what there is
    more = {'ctp2dwi': {'test_lesion_calibration.csv'}, 'mri2pet': {'test_status.csv'}}[task]
    assert {path.name for path in folder.glob('test*.csv')} == {
        'test.csv', 'test_mean.csv', 'test_summary.csv', 'test_predictions.csv'} | more
    name = settings['targets'][0]
    for row in table(folder / 'test.csv'):
        assert row['qc'] and 0 <= float(row[f'{name}_coverage_90']) <= 1
        assert nib.load(folder / 'pred' / row['ID'] / f'{name}_std.nii.gz').get_fdata().max() > 0
    record = json.loads((folder / 'inference.json').read_text())
    assert record['aae'] is None and record['checkpoint'].startswith('CHECKPOINT_regression')
    id = ids('test')[0]
    new = '--input', str(source(task, id)), '--input_mask', str(mask(task, id)), '--out', 'one'
    made_runs.call('infer', *words, *new)
    assert json.loads(Path('one/prediction.json').read_text())['intervals'] == record['intervals']
    mine, theirs = (nib.load(place / f'{name}.nii.gz').get_fdata() for place in (Path('one'), folder / 'pred' / id))
    np.testing.assert_allclose(mine, theirs, atol=1e-3 * np.ptp(theirs))
    # An autoencoder beside it is one more line of the table, and changes nothing else.
    made_runs.call('infer', *words, '--init_from', settings['exp'], '--num_steps', '3', '--samples', '2')
    assert 'have no effect' in capsys.readouterr().out and (folder / 'test_aae.csv').exists()
    assert json.loads((folder / 'inference.json').read_text()) == record and not list(folder.glob('old_*'))
    made_runs.call('plot', *words)
    assert 'train_aae' not in capsys.readouterr().out and (folder / 'report.html').exists()
    assert 'train_aae' not in (folder / 'report.html').read_text()


def test_lesion_odds_are_chosen_in_inference(trained, capsys):
    """The README's settings: other images from the same networks, the same probability of a lesion."""
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'odds', '--only_model')
    made_runs.call('infer', *words, '--lesion_odds', '12', '--lesion_core', '0')  # 14 phantoms teach no p above 0.9
    for id in ids('test'):
        record = json.loads(Path('result/odds/pred', id, 'prediction.json').read_text())
        assert record['lesion_odds'] == 12 and record['lesion_core'] == 0
        there = {path.name for path in Path('result/odds/pred', id).glob('*.nii.gz')}
        assert not any('half_90' in name for name in there)  # no interval was fitted for these odds
        for path in (folder / 'pred' / id).glob('*.nii.gz'):
            if path.name not in there or 'lesion_rule' in path.name:
                continue
            mine, theirs = (nib.load(p).get_fdata() for p in (Path('result/odds/pred', id, path.name), path))
            moved = np.abs(mine - theirs).max() > 1e-6 * np.ptp(theirs)
            assert moved == (task == 'ctp2dwi' and 'probability' not in path.name), path
    # Where nothing is as sure as asked for, the odds do nothing, and that is said.
    assert 'lesion_odds changed' not in capsys.readouterr().out
    made_runs.call('infer', *words, '--lesion_core', '1')
    assert ('lesion_core 1 (at most 0.' in capsys.readouterr().out) == (task == 'ctp2dwi')


def test_the_lesion_rule_is_a_setting(trained):
    task, settings, folder = trained
    if task != 'ctp2dwi':
        return
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'rule', '--only_model')
    made_runs.call('infer', *words, '--lesion_rule', '2000,0.5,0.1')
    for row, before in zip(table(Path('result/rule/test.csv')), table(folder / 'test.csv'), strict=True):
        assert row['lesion_mae'] == before['lesion_mae'] and float(row['lesion_dice_ceiling']) < 0.5
        image = nib.load(Path('result/rule/pred', row['ID'], 'lesion_rule.nii.gz'))
        assert np.count_nonzero(image.dataobj) > 1000
        record = json.loads(Path('result/rule/pred', row['ID'], 'prediction.json').read_text())
        assert record['settings']['lesion_rule'] == [2000, 0.5, 0.1] and record['intervals']  # those fitted before


def test_predictions_lie_on_the_subjects_own_grid(trained):
    task, settings, folder = trained
    for id in ids('test'):
        inside = np.asanyarray(nib.load(mask(task, id)).dataobj) > 0
        for name in settings['targets']:
            pred, real = nib.load(folder / 'pred' / id / f'{name}.nii.gz'), nib.load(truth(task, id, name))
            assert pred.shape == real.shape and pred.get_data_dtype() == np.float32
            np.testing.assert_allclose(pred.affine, real.affine, atol=1e-5)
            assert int(pred.header['sform_code']) == int(real.header['sform_code'])
            values = np.asanyarray(pred.dataobj)
            assert np.isfinite(values).all() and not values[~inside].any() and values[inside].std() > 0
            scale = np.median(np.asanyarray(real.dataobj)[inside]) / np.median(values[inside])
            if name != 'dwi':  # which comes in multiples of its median
                assert 0.7 < scale < 1.4  # physical units


def psnr(path, targets):
    return np.mean([[float(row[f'{name}_psnr']) for name in targets] for row in table(path)])


def test_the_trained_model_beats_the_untrained_one_and_the_mean_image(trained):
    task, settings, folder = trained
    targets = settings['targets']
    first = float(table(folder / 'validation_unet.csv')[0]['psnr'])
    for name in ('unet', 'post'):
        assert float(table(folder / f'validation_{name}.csv')[-1]['psnr']) > first + 3
    model, mean = psnr(folder / 'test.csv', targets), psnr(folder / 'test_mean.csv', targets)
    assert model > mean + 0.1, f'{model:.2f} dB against {mean:.2f} of the mean image, on the test split'
    assert psnr(folder / 'test_aae.csv', targets) > mean + 1


def test_inference_again_gives_equal_images_and_overwrites_nothing_silently(trained, capsys):
    task, settings, folder = trained
    first, rows = images(folder / 'pred'), table(folder / 'test.csv')
    made_runs.call('infer', *settings['words'])
    assert 'replacing the predictions of' in capsys.readouterr().out
    again = images(folder / 'pred')
    assert first and set(again) == set(first)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert [{k: v for k, v in row.items() if k != 'seconds'} for row in table(folder / 'test.csv')] == [
        {k: v for k, v in row.items() if k != 'seconds'} for row in rows]
    made_runs.call('infer', *settings['words'], '--eval_batch', '3')
    for name, image in images(folder / 'pred').items():
        assert np.abs(image - first[name]).max() <= 1e-5 * np.ptp(first[name]), name


def test_predictions_of_other_data_do_not_replace_those_there(trained, tmp_path, capsys):
    task, settings, folder = trained
    first = images(folder / 'pred')
    words = settings['words']
    (tmp_path / 'elsewhere').symlink_to(Path(words[words.index('--data_root') + 1]).resolve())
    made_runs.call('infer', *words, '--data_root', str(tmp_path / 'elsewhere'))
    assert 'made with other settings, are kept in' in capsys.readouterr().out
    again = images(folder / 'pred')
    assert first and set(again) == set(first)
    for name, image in again.items():  # those there may have been made in other batches
        assert np.abs(image - first[name]).max() <= 1e-5 * np.ptp(first[name]), name


def test_ddim_with_samples_gives_a_map_of_their_spread(trained, capsys):
    task, settings, folder = trained
    first = images(folder / 'pred')
    more = ('--sampler', 'ddim', '--num_steps', '3', '--samples', '2')
    made_runs.call('infer', *settings['words'], *more)
    assert 'made with other settings, are kept in' in capsys.readouterr().out
    found = images(folder / 'pred')
    assert set(found) == set(first)
    for name, image in found.items():
        assert np.isfinite(image).all() and ('lesion_rule' in name or not np.array_equal(image, first[name]))
        if '_std' in name:
            assert image.min() >= 0 and image.max() > 0
    record = json.loads((folder / 'pred' / ids('test')[0] / 'prediction.json').read_text())
    assert (record['sampler'], record['num_steps'], record['samples']) == ('ddim', 3, 2)
    old = max(folder.glob('old_*'))
    kept = images(old / 'pred')
    assert all(np.array_equal(kept[name], first[name]) for name in first) and (old / 'test.csv').exists()
    shutil.rmtree(folder / 'pred')
    made_runs.call('infer', *settings['words'])  # the noise is keyed: the first images come back
    for name, image in images(folder / 'pred').items():
        assert np.abs(image - first[name]).max() <= 1e-5 * np.ptp(first[name]), name


def test_an_image_does_not_depend_on_batch_order_or_company(trained):
    """Also where noise is drawn at every step: another batch size, the lists reversed, subjects in another list."""
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'], '--sampler', 'ddpm', '--num_steps', '3', '--samples',
             '2')
    found = {}
    first, second = ids('test')[:2]
    held_out = [*ids('validation'), *ids('test')]
    for name, test, batch in (('one', [first, second], '32'), ('other', [held_out[0], second, first], '3')):
        info = Path(f'lists_{name}')
        shutil.copytree('data/data_info', info)
        (info / 'test.txt').write_text('\n'.join(test))
        (info / 'validation.txt').write_text('\n'.join(id for id in held_out if id not in test))
        made_runs.call('infer', *words, '--data_info', str(info), '--exp', name, '--eval_batch', batch)
        found[name] = images(Path('result', name, 'pred'))
    checked = [name for name in found['one'] if name in found['other']]
    checked = [name for name in checked if 'half_90' not in name and 'lesion_rule' not in name]  # of these lists
    head = task == 'ctp2dwi'
    assert len(checked) == 2 * (2 * len(settings['targets']) + head)  # two subjects: image and std, lesion probability
    for name in checked:
        size = np.ptp(found['one'][name.replace('_std', '')])
        assert np.abs(found['one'][name] - found['other'][name]).max() <= 1e-5 * size, name
        assert np.ptp(found['one'][name]) > 1e-3 * size
    alike = images(Path('result/one/pred', first)), images(Path('result/one/pred', second))
    assert all(a.shape != b.shape or np.abs(a - b).max() > 0 for a, b in zip(alike[0].values(), alike[1].values(),
                                                                             strict=True))


def test_starting_noise_is_keyed_bit_for_bit():
    def draw(*key, k=0):
        return translate.starting_noise(key, (2, 3), k, 'cpu')()

    torch.manual_seed(1)
    first = draw(0, 'sub-1')
    torch.manual_seed(2)
    torch.randn(7)
    assert torch.equal(first, draw(0, 'sub-1')) and first.shape == (1, 2, 3)
    for other in (draw(0, 'sub-2'), draw(1, 'sub-1'), draw(0, 'sub-1', k=1)):
        assert not torch.equal(first, other)


def test_intervals_are_fitted_on_validation_for_the_sampler_in_use(trained):
    """Coverage by hand from the files: on validation what was asked for, on test what test.csv says."""
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'spread', '--sampler', 'ddim', '--num_steps',
             '2', '--samples', '4')
    place, fits = Path('result/spread'), {}
    for split in ('validation', 'test'):
        made_runs.call('infer', *words, '--split', split)
        rows = {row['ID']: row for row in table(place / ('test.csv' if split == 'test' else 'infer_validation.csv'))}
        cover = {}
        for id in ids(split):
            inside = np.asanyarray(nib.load(mask(task, id)).dataobj) > 0
            fits[split] = json.loads((place / 'pred' / id / 'prediction.json').read_text())['intervals']
            for name, fit in fits[split].items():
                pred, std, real = (np.asanyarray(nib.load(path).dataobj)[inside].astype(float) for path in (
                    place / 'pred' / id / f'{name}.nii.gz', place / 'pred' / id / f'{name}_std.nii.gz',
                    truth(task, id, name)))
                if name == 'dwi':                                # in multiples of its median
                    real = real / np.median(real)
                top = dict(dwi=3, adc=3000, suvr=3)[name]
                error = np.abs(np.clip(pred, 0, top) - np.clip(real, 0, top))
                assert std.max() > 0
                for q, half in zip(fit['q'], fit['half'], strict=True):
                    share = np.mean(error <= np.interp(std, fit['std'], half))
                    if split == 'test':                          # not judged where it was fitted
                        assert float(rows[id][f'{name}_coverage_{100 * q:.0f}']) == pytest.approx(share, abs=2e-3)
                    cover.setdefault((name, q), []).append(share)
        assert len(cover) == 2 * len(settings['targets'])
        if split == 'validation':
            for (name, q), shares in cover.items():
                assert np.mean(shares) == pytest.approx(q, abs=0.01), name
    assert fits['test'] == fits['validation'] == json.loads((place / 'inference.json').read_text())['intervals']
    other = json.loads(next((folder / 'pred').glob('*/prediction.json')).read_text())['intervals']
    assert other != fits['test']                                  # one_step has its own
    id = ids('test')[0]
    new = ('--input', str(source(task, id)), '--input_mask', str(mask(task, id)))
    for more, expected in (((), fits['test']), (('--num_steps', '3'), {})):  # known for this sampler, not for another
        made_runs.call('infer', *words, *more, *new, '--out', f'new{len(more)}')
        assert json.loads(Path(f'new{len(more)}', 'prediction.json').read_text())['intervals'] == expected


@pytest.mark.parametrize('words, text', [
    (('--sampler', 'ddim', '--timesteps', '3000', '--num_steps', '2000'), 'num_steps 2000 is more than the 1000 steps'),
    (('--label', 'true', '--input', 'x.nii', '--out', 'o'), 'label'), (('--samples', '0'), "'samples' is 0")])
def test_settings_the_network_cannot_take_touch_nothing(trained, words, text):
    task, settings, folder = trained
    before = {path: path.stat().st_mtime for path in folder.rglob('*')}
    with pytest.raises(Exception, match=text) as caught:
        made_runs.call('infer', *settings['words'], *words)
    assert caught.value.one_sentence
    assert {path: path.stat().st_mtime for path in folder.rglob('*')} == before


def test_one_new_file_without_truth(trained, capsys):
    task, settings, folder = trained
    id = ids('test')[0]
    shutil.copy(source(task, id), 'new.nii.gz' if source(task, id).name.endswith('.gz') else 'new.nii')
    file = next(Path('.').glob('new.nii*'))
    shutil.copy(mask(task, id), name := 'new_mask' + ''.join(mask(task, id).suffixes))
    made_runs.call('infer', *settings['words'], '--input', str(file), '--input_mask', name, '--out', 'out')
    for target in settings['targets']:
        pred, real = nib.load(f'out/{target}.nii.gz'), nib.load(truth(task, id, target))
        assert pred.shape == real.shape and pred.get_data_dtype() == np.float32
        np.testing.assert_allclose(pred.affine, real.affine, atol=1e-5)
        assert np.asanyarray(pred.dataobj).any()
    assert Path('out/prediction.json').exists() and 'Note: no --input_mask' not in capsys.readouterr().out
    # Without its mask: said, since the networks were trained with mask files.
    made_runs.call('infer', *settings['words'], '--input', str(file), '--out', 'out_2')
    assert 'Note: no --input_mask was given, though the settings have mask = {root}/' in capsys.readouterr().out
    assert nib.load(f'out_2/{target}.nii.gz').shape == pred.shape
    # Under the settings of the other task: the preset that is needed is named.
    preset, other = ('ctp2dwi_demo', 'mri2pet_demo')[::1 if task == 'ctp2dwi' else -1]
    with pytest.raises(Exception, match=f'{task}.*give the preset it was trained with: --preset {preset}$') as caught:
        made_runs.call('infer', '--preset', other, '--exp', folder.name, '--input', str(file), '--out', 'out_3')
    assert caught.value.one_sentence and not Path('out_3').exists()
    with pytest.raises(Exception, match='--out') as caught:
        made_runs.call('infer', *settings['words'], '--input', str(file))
    assert caught.value.one_sentence
    # Into the folder of its own images again: an old map of the spread goes. Of another's: refused.
    again = *settings['words'], '--input', str(file), '--input_mask', name, '--out', 'out'
    maps = [Path(f'out/{target}_{kind}.nii.gz') for kind in ('std', 'half_90')]
    assert all(path.exists() for path in maps)  # of a head and two views; here there is neither, nor an interval
    made_runs.call('infer', *again, '--stage', 'unet', '--mirror', 'False')
    assert not any(path.exists() for path in maps)
    Path('copy').mkdir(exist_ok=True)
    shutil.copy(file, 'copy')
    before = Path(f'out/{target}.nii.gz').read_bytes()
    with pytest.raises(Exception, match='there already and was not made from copy/new.nii.*choose another --out'):
        made_runs.call('infer', *settings['words'], '--input', f'copy/{file.name}', '--out', 'out')
    assert Path(f'out/{target}.nii.gz').read_bytes() == before


def test_a_test_subject_without_truth_gets_images_and_loses_no_table(trained, capsys):
    task, settings, folder = trained
    lone, others = ids('test')[0], ids('test')[1:]
    file = truth(task, lone, settings['targets'][0])
    file.rename('aside')
    try:
        made_runs.call('infer', *settings['words'], '--seed', '2')
    finally:
        Path('aside').rename(file)
    said = capsys.readouterr().out
    assert f'1 of {1 + len(others)} subjects have no truth, no figures: {lone} (looked for ' in said
    for name in ('test', 'test_aae', 'test_unet'):
        assert [row['ID'] for row in table(folder / f'{name}.csv')] == others
    assert (folder / 'pred' / lone / f'{settings["targets"][0]}.nii.gz').exists()


def test_intervals_are_not_judged_on_the_subjects_they_were_fitted_on(trained):
    task, settings, folder = trained
    made_runs.call('infer', *settings['words'], '--split', 'validation')
    rows = table(folder / 'infer_validation.csv')
    assert rows and not [name for name in rows[0] if 'coverage' in name]
    assert not (folder / 'infer_validation_status.csv').exists()
    assert json.loads((folder / 'inference.json').read_text())['intervals'].keys() == set(settings['targets'])


def test_the_number_of_a_subject_has_an_interval(trained):
    """Lesion volume, composite SUVR: from nine validation subjects on; the same in the table and the json."""
    task, settings, folder = trained
    shutil.copytree('data/data_info', 'lists_number', dirs_exist_ok=True)
    held_out = [*ids('train'), *ids('validation')]
    Path('lists_number/train.txt').write_text('\n'.join(held_out[9:]))
    Path('lists_number/validation.txt').write_text('\n'.join(held_out[:9]))
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'number', '--data_info', 'lists_number')
    made_runs.call('infer', *words)
    name, true = dict(ctp2dwi=('lesion_head_ml', 'lesion_ml'), mri2pet=('suvr_pred', 'suvr_true'))[task]
    fit = json.loads(Path('result/number/inference.json').read_text())['intervals'][name]
    rows = table(Path('result/number/test.csv'))
    for row in rows:
        value, low, high, real = (float(row[column]) for column in (name, f'{name}_low', f'{name}_high', true))
        assert 0 <= low <= value < high and high - value >= 0.999 * fit['k'][1] * fit['s_0']
        assert low == 0 or value - low == pytest.approx(high - value, rel=1e-3, abs=1e-4)
        assert float(row[f'{name}_covered']) == (low <= real <= high)
        record = json.loads(Path('result/number/pred', row['ID'], 'prediction.json').read_text())
        assert record[name] == pytest.approx(dict(value=value, low_90=low, high_90=high), abs=1e-3)
        region = float(row[f'{settings["targets"][0]}_lesion_coverage_90'] or 'nan')
        assert 0 <= region <= 1 or not float(row.get('lesion_ml', 1))
    summary = {row['metric'] for row in table(Path('result/number/test_summary.csv'))}
    assert f'{name}_covered' in summary and not summary & {f'{name}_low', f'{name}_high'}
    # What the images say stands in a table of its own, of a subject without truth and of one in no list, too.
    predicted, id = Path('result/number/test_predictions.csv'), ids('test')[0]
    said = {row['ID']: row for row in table(predicted)}
    assert list(said) == ids('test') and not {f'{name}_covered', true} & set(said[id])
    for row in rows:
        for column in (name, f'{name}_low', f'{name}_high'):
            assert float(said[row['ID']][column]) == pytest.approx(float(row[column]), rel=1e-4, abs=1e-5)
        assert said[row['ID']]['qc'] == row['qc']
        if task == 'ctp2dwi':
            error = abs(float(said[row['ID']]['lesion_rule_ml']) - float(row['lesion_ml']))
            assert error == pytest.approx(float(row['lesion_avd_ml']), rel=1e-4, abs=1e-4)
            p = nib.load(Path('result/number/pred', row['ID'], 'lesion_probability.nii.gz')).get_fdata().max()
            assert float(said[row['ID']]['lesion_head_max']) == pytest.approx(p, abs=1e-3)
        else:
            p = [float(said[row['ID']][f'label_probability_{c}']) for c in (0, 1)]
            assert sum(p) == pytest.approx(1, abs=1e-3) and p[1] == float(row['label_probability'])
    expected = json.loads(Path('result/number/pred', id, 'prediction.json').read_text())[name]
    file = truth(task, id, settings['targets'][0])
    file.rename('aside')
    try:
        made_runs.call('infer', *words, '--only_model')
    finally:
        Path('aside').rename(file)
    assert table(predicted)[0] == said[id] and id not in [row['ID'] for row in table(predicted.with_name('test.csv'))]
    new = '--input', str(source(task, id)), '--input_mask', str(mask(task, id)), '--out', 'one'
    made_runs.call('infer', *words, *new)
    known = json.loads(Path('one/prediction.json').read_text())
    assert (name in known) == (task == 'ctp2dwi')  # the composite of a new file is not known
    new += '--input_composite', str(composite(id))
    if task == 'ctp2dwi':
        with pytest.raises(Exception, match='--input_composite is of mri2pet') as caught:
            made_runs.call('infer', *words, *new)
        assert caught.value.one_sentence
    else:
        made_runs.call('infer', *words, *new)
        known = json.loads(Path('one/prediction.json').read_text())
    assert known[name] == pytest.approx(expected, rel=0.01)  # the noise is that of another name


def test_networks_that_see_other_arrays_are_not_put_together(trained, capsys):
    task, settings, folder = trained
    target = settings['targets'][-1]
    rules = {name: ('range', 0, 7) for name in ('source', *settings['targets'])}
    words = (*settings['words'], '--init_from', settings['exp'], '--scaling', str(rules))
    with pytest.raises(Exception, match=f'the autoencoder was trained with another .*scaling of {target}') as caught:
        made_runs.call('train_unet', *words, '--exp', 'other')
    assert caught.value.one_sentence
    made_runs.call('train_unet', *words, '--exp', 'other', '--regression', 'True', '--regression_steps', '2')
    capsys.readouterr()
    made_runs.call('post_train', *settings['words'], '--init_from', settings['exp'], '--exp', 'other', '--post_steps',
                   '2', '--detail_channels', '(8, 16)')
    assert 'the detail branch starts at zero' in capsys.readouterr().out
    made_runs.call('infer', *settings['words'], '--init_from', settings['exp'], '--exp', 'other')
    assert 'the regression network is left out of the table: trained with another ' in capsys.readouterr().out
    assert Path('result/other/test_unet.csv').exists() and not Path('result/other/test_regression.csv').exists()


def test_stages_begin_with_the_weights_of_another_experiment(trained, monkeypatch, capsys):
    """--pretrained: the first validation is that of the network it begins with, and nothing of it comes again later."""
    task, settings, folder = trained
    words = (*settings['words'], '--exp', 'mine', '--pretrained', settings['exp'])
    few = Path('few_info')
    shutil.copytree('data/data_info', few)
    Path(few, 'train.txt').write_text('\n'.join(ids('train')[:4]) + '\n')
    stages = ([('train_aae', 'aae'), *[(f'train_unet --{on}regression {value}', name) for on, value, name in
                                       (('', 'False', 'unet'), ('', 'True', 'regression'))]])
    for command, stage_name in stages:
        script, *more = command.split()
        made_runs.call(script, *words, *more, '--data_info', str(few), f'--{stage_name}_steps', '2')
        assert f'starts from result/{settings["exp"]}/CHECKPOINT_' in capsys.readouterr().out
        last = torch.load(folder / f'last_{stage_name}.pth.tar', weights_only=True)['state']
        first = table(Path('result/mine') / f'validation_{stage_name}.csv')[0]
        for name, value in last['best_row'].items():
            if stage_name != 'unet' and first[name]:  # the U-Net's latents are those of another autoencoder by then
                # The label head's prior is that of the new subjects.
                near = 0.01 if (task, stage_name) == ('mri2pet', 'regression') else 1e-4
                assert float(first[name]) == pytest.approx(value, rel=near, abs=1e-5), (stage_name, name)
    # Where the autoencoder stays, so does the U-Net's first validation.
    made_runs.call('train_unet', *words[:-3], 'same', *words[-2:], '--init_from', settings['exp'], '--unet_steps', '1')
    best = torch.load(folder / 'last_unet.pth.tar', weights_only=True)['state']['best_row']['psnr']
    assert float(table(Path('result/same/validation_unet.csv'))[0]['psnr']) == pytest.approx(best, rel=1e-4)
    # A run that goes on needs the other experiment no more, but will not change it.
    moved = folder.rename(folder.with_name('moved'))
    try:
        made_runs.call('train_aae', *words, '--data_info', str(few), '--aae_steps', '3')
        assert 'resuming' in capsys.readouterr().out
        with pytest.raises(utils.RunError, match='does not exist'):
            made_runs.call('train_aae', *words, '--data_info', str(few), '--restart')
    finally:
        moved.rename(folder)
    with pytest.raises(utils.RunError, match="pretrained = .*, now it is None"):
        made_runs.call('train_unet', *words[:-2], '--data_info', str(few), '--unet_steps', '3')
    with pytest.raises(utils.RunError, match='another shape'):
        made_runs.call('train_unet', *words, '--exp', 'wide', '--regression', 'True', '--regression_channels', '(8, 8)')
    if task == 'ctp2dwi':
        with pytest.raises(utils.RunError, match='makes dwi, adc, the settings ask for adc, dwi'):
            made_runs.call('train_aae', *words, '--exp', 'turned', '--targets', str(
                {name: f'{{root}}/{{id}}/{name}.nii.gz' for name in ('adc', 'dwi')}))


def test_subjects_that_were_trained_on_are_named_in_inference(trained, capsys):
    task, settings, folder = trained
    shutil.copytree('data/data_info', 'mixed')
    seen, new = ids('train')[0], ids('test')[0]
    Path('mixed/test.txt').write_text(f'{seen}\n{new}\n')
    Path('mixed/train.txt').write_text('\n'.join(ids('train')[1:]) + '\n')
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'mixed', '--only_model')
    made_runs.call('infer', *words, '--data_info', 'mixed')
    assert f'1 of these 2 subjects were trained on ({seen}): their figures say nothing' in capsys.readouterr().out
    made_runs.call('infer', *words, '--exp', 'not_mixed')
    assert 'were trained on' not in capsys.readouterr().out
    made_runs.call('infer', *words, '--exp', 'not_mixed', '--split', 'train')  # asked for
    assert 'were trained on' not in capsys.readouterr().out


def test_an_image_that_is_not_finite_is_not_written(trained, monkeypatch, capsys):
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'not_finite', '--only_model')
    decide = translate.decide
    monkeypatch.setattr(translate, 'decide', lambda *parts: decide(*parts) * float('nan'))
    with pytest.raises((utils.RunError, SystemExit)):
        made_runs.call('infer', *words)
    said = capsys.readouterr()
    assert 'the prediction is not finite; use --precision fp32' in said.out + said.err
    assert not list(Path('result/not_finite').rglob('*.nii.gz'))


def test_stage_3_of_another_unet_is_refused(trained):
    task, settings, folder = trained
    shutil.copytree(folder, 'result/changed', ignore=shutil.ignore_patterns('pred', 'old_*', 'fig', 'last_*'))
    path = Path('result/changed/CHECKPOINT_Unet.pth.tar')
    data = torch.load(path, weights_only=True)
    data['net']['conv_in.bias'] = data['net']['conv_in.bias'] + 1
    torch.save(data, path)
    with pytest.raises(Exception, match='another U-Net than .* post_train.py --restart, or infer') as caught:
        made_runs.call('infer', *settings['words'], '--exp', 'changed')
    assert caught.value.one_sentence
    made_runs.call('infer', *settings['words'], '--exp', 'changed', '--stage', 'unet', '--only_model')
    shutil.rmtree('result/changed')


def test_the_folds_of_a_cross_validation_are_pooled(tmp_path, monkeypatch, capsys):
    """Each fold's test subjects once, with the baselines that all have; figures as of one table."""
    monkeypatch.chdir(tmp_path)
    rng, words = np.random.default_rng(0), ('--data_root', 'data/x')
    tables = {}
    for k in (1, 2, 3):
        folder = Path('result', f'cv_{k}')
        folder.mkdir(parents=True)
        rows = pd.DataFrame(dict(ID=[f's{k}{i}' for i in range(6)], dwi_psnr=rng.normal(30, 1, 6), seconds=1.0))
        tables[k] = rows
        rows.to_csv(folder / 'test.csv', index=False)
        rows.assign(dwi_psnr=rows['dwi_psnr'] - 2)[::-1].to_csv(folder / 'test_regression.csv', index=False)
        if k == 2:
            rows.to_csv(folder / 'test_unet.csv', index=False)
        (folder / 'inference.json').write_text(json.dumps(dict(split='test', data_root='data/x')))
    Path('result/cv').mkdir()
    Path('result/cv/test_unet.csv').write_text('ID\n')  # of an earlier pool
    made_runs.call('infer', *words, '--exp', 'cv', '--pool', 'cv_1,cv_2,cv_3')
    assert not Path('result/cv/test_unet.csv').exists() and Path('result/cv/old_1/test_unet.csv').exists()
    assert '18 subjects of cv_1, cv_2, cv_3' in capsys.readouterr().out
    found, summary = pd.read_csv('result/cv/test.csv'), pd.read_csv('result/cv/test_summary.csv').set_index('metric')
    assert list(found['ID']) == list(pd.concat(tables.values())['ID'])
    assert list(pd.read_csv('result/cv/test_regression.csv')['ID']) == list(found['ID'])
    assert summary.loc['dwi_psnr', 'mean'] == pytest.approx(pd.concat(tables.values())['dwi_psnr'].mean(), rel=1e-5)
    assert summary.loc['dwi_psnr', 'regression_mean'] == pytest.approx(summary.loc['dwi_psnr', 'mean'] - 2, rel=1e-4)
    assert summary.loc['dwi_psnr', 'n'] == 18 and not any('unet' in name for name in summary)
    with pytest.raises(utils.RunError, match=r's10 \(6 subjects in all\) is a test subject of more than one'):
        shutil.copytree('result/cv_1', 'result/again')
        made_runs.call('infer', *words, '--exp', 'cv', '--pool', 'cv_1,again')
    with pytest.raises(utils.RunError, match='was made with lesion_rule = .620, 1.25, 0.1., now it is .700'):
        rule = json.dumps(dict(split='test', data_root='data/x', settings=dict(task='ctp2dwi')))
        Path('result/cv_1/inference.json').write_text(rule)  # of before it was a setting
        made_runs.call('infer', *words, '--exp', 'cv', '--pool', 'cv_1,cv_2', '--lesion_rule', '700,1.25,0.1')
    with pytest.raises(utils.RunError, match='result/cv_9/test.csv is missing'):
        made_runs.call('infer', *words, '--exp', 'cv', '--pool', 'cv_1,cv_9')
    (Path('result/cv_1/pred')).mkdir()
    with pytest.raises(utils.RunError, match='has predictions of its own'):
        made_runs.call('infer', *words, '--exp', 'cv_1', '--pool', 'cv_2,cv_3')


def test_two_inferences_do_not_write_into_one_folder(trained):
    task, settings, folder = trained
    before = {path: path.stat().st_mtime for path in (folder / 'pred').rglob('*')}
    with stage.lock(folder, '.lock_infer'), pytest.raises(utils.RunError, match='in use by another run'):
        made_runs.call('infer', *settings['words'], '--stage', 'unet')
    assert {path: path.stat().st_mtime for path in (folder / 'pred').rglob('*')} == before


def test_stage_3_refuses_settings_of_something_else(trained):
    task, settings, folder = trained
    other = 'mri2pet_demo' if task == 'ctp2dwi' else 'ctp2dwi_demo'
    with pytest.raises(config.SettingError, match='give the preset it was trained with'):
        made_runs.call('post_train', '--preset', other, '--data_root', 'data', '--data_info', 'data/data_info', '--exp',
                       'other', '--init_from', folder.name)


@pytest.mark.parametrize('ids', [('a', 'b', 'c'), ('a/1', 'a/2', 'b/1')])
def test_images_of_subjects_that_left_the_list_move_aside(tmp_path, ids):
    for id in ids:
        (tmp_path / 'pred' / id).mkdir(parents=True)
        (tmp_path / 'pred' / id / 'dwi.nii.gz').write_text(id)
    (tmp_path / 'pred' / 'note.txt').write_text('not a subject')
    (tmp_path / 'pred' / ids[0] / 'notes').mkdir()
    (tmp_path / 'pred' / ids[0] / 'notes' / 'n.txt').write_text('nor this')
    (tmp_path / 'test.csv').write_text('x')
    (tmp_path / 'inference.json').write_text('{"seed": 0}')
    record = dict(seed=0, skip_latent=False)
    assert 'not on the list' not in outputs.keep_aside(tmp_path, record, ids, tmp_path / 'test')
    said = outputs.keep_aside(tmp_path, record, ids[:2], tmp_path / 'test')
    assert f'those of 1 subjects that are not on the list now are in {tmp_path}/old_1/pred' in said
    assert (tmp_path / 'old_1/pred' / ids[2] / 'dwi.nii.gz').read_text() == ids[2]
    assert (tmp_path / 'old_1/test.csv').exists() and not (tmp_path / 'test.csv').exists()
    assert all((tmp_path / 'pred' / id).exists() for id in ids[:2]) and not (tmp_path / 'pred' / ids[2]).exists()


def test_what_files_are_like_is_said_by_the_settings_of_inference(trained):
    scale = {'source': 1, 'dwi': 1, 'adc': 1e6}
    cfg = config.load('', ['--frame_interval', '1.5', '--resample', 'True', '--unit_scale', str(scale)])
    assert infer.of_these_files(cfg) == dict(frame_interval=1.5, resample=True, unit_scale=scale)
    assert infer.of_these_files(config.load('', [])) == {}
    ones = dict.fromkeys(scale, 1)  # trained with other factors, and these files need none
    words = ['--frame_interval', 'None', '--resample', 'False', '--unit_scale', str(ones)]
    assert infer.of_these_files(config.load('', words)) == dict(frame_interval=None, resample=False, unit_scale=ones)


def test_one_bad_subject_does_not_lose_the_others(trained, capsys):
    task, settings, folder = trained
    bad, good = ids('test')[0], ids('test')[1:]
    file = source(task, bad)
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    try:
        with pytest.raises(Exception, match=f'1 of {1 + len(good)} subjects could not be translated') as caught:
            made_runs.call('infer', *settings['words'], '--seed', '1')
        assert caught.value.one_sentence
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f'{bad}: ')]
        assert len(lines) == 1 and str(file) in lines[0]
        assert [row['ID'] for row in table(folder / 'test.csv')] == good
        assert sorted(p.name for p in (folder / 'pred').iterdir()) == sorted(good)  # no older image of the bad one
    finally:
        file.write_bytes(whole)


def test_a_cohort_for_testing_alone(trained, capsys):
    """Only test.txt: the intervals that this checkpoint has elsewhere, no amyloid status; no other list is read."""
    task, settings, folder = trained
    Path('alone').mkdir()
    shutil.copy('data/data_info/test.txt', 'alone')
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'alone', '--data_info', 'alone')
    made_runs.call('infer', *settings['words'])  # the tests before may have left others
    capsys.readouterr()
    intervals = json.loads((folder / 'inference.json').read_text())['intervals']
    preset = '' if task == 'ctp2dwi' else ' --preset mri2pet_demo'
    scale = {name: 1.001 if name == 'source' else 1 for name in ('source', *settings['targets'])}
    for more in ((), ('--num_steps', '3', '--sampler', 'ddim'), ('--unit_scale', str(scale))):
        made_runs.call('infer', *words, *more)
        said = capsys.readouterr().out
        assert task == 'ctp2dwi' or 'amyloid status is not judged: its thresholds are fitted on training' in said
        rows, known = table('result/alone/test.csv'), 'ddim' not in more  # of another sampler there are none
        assert 'the intervals are those that were fitted before' in said if known else (
            f'no intervals: python infer.py --exp {settings["exp"]}{preset} fits them' in said and
            '(its last inference had sampler one_step, not ddim, num_steps 1, not 3)' in said)
        assert [row['ID'] for row in rows] == ids('test') and any('coverage' in k for k in rows[0]) == known
        found = json.loads(Path('result/alone/inference.json').read_text())['intervals']
        assert found == (intervals if known else {}) and bool(intervals)
    # On a subject that they were fitted on they are not judged; one of another data_root may have its name.
    Path('alone/test.txt').write_text('\n'.join([*ids('test'), ids('validation')[0]]))
    shutil.copytree('data', 'other_data')
    for root, known in (('data', False), ('data/../data', False), ('other_data', True)):
        made_runs.call('infer', *words, '--only_model', '--data_root', root)
        assert any('coverage' in column for column in table('result/alone/test.csv')[0]) == known
    shutil.rmtree('other_data')
    made_runs.call('infer', *words)
    assert len({row['ms_ssim_scales'] for row in rows}) == 1
    assert Path('result/alone/test_unet.csv').exists() and not Path('result/alone/test_status.csv').exists()


def test_new_subjects_without_truth(trained, capsys):
    """The README's commands for a folder of them: sources, masks and composites, one list."""
    task, settings, folder = trained
    first, second, broken = *ids('test')[:2], ids('validation')[0]
    for id in (first, second, broken):
        for file in (source(task, id), mask(task, id), composite(id)) if task == 'mri2pet' else (
                source(task, id), mask(task, id)):
            Path('new', file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, Path('new', file))
    shutil.move('new/data', 'data_new')
    Path('data_new/data_info').mkdir()
    Path('data_new/data_info/test.txt').write_text('\n'.join([first, second, broken]))
    new = ('--data_root', 'data_new', '--data_info', 'data_new/data_info')
    words = (*settings['words'], '--exp', 'new', '--init_from', settings['exp'], *new)
    checked = made_runs.process('dataset', *settings['words'], *new, '--without_truth')
    assert not checked.returncode and 'No fault in 3 subjects' in checked.stdout and '3 in test\n' in checked.stdout
    assert made_runs.process('dataset', *settings['words'], *new).returncode == 1
    made_runs.call('infer', *settings['words'])  # the tests before may have left other intervals
    capsys.readouterr()
    made_runs.call('infer', *words)
    said = capsys.readouterr().out
    assert 'the intervals are those that were fitted before' in said and '3 of 3 subjects have no truth' in said
    assert [path.name for path in Path('result/new').glob('*.csv')] == ['test_predictions.csv']
    theirs = {row['ID']: row for row in table(folder / 'test_predictions.csv')}
    rows = table('result/new/test_predictions.csv')
    assert [row['ID'] for row in rows] == [first, second, broken]
    for row in rows[:2]:  # the same as where the truth is there
        assert row == {name: theirs[row['ID']][name] for name in row} and row['qc']
    assert task == 'ctp2dwi' or {'suvr_pred', 'label_probability_1'} <= set(rows[0])
    rest = list(settings['words'])
    del rest[rest.index('--data_root'):rest.index('--data_root') + 2]  # it knows where inference read them
    made_runs.call('plot', *rest, '--exp', 'new', '--init_from', settings['exp'])
    said = capsys.readouterr().out
    assert 'the images were made from data_new' in said and 'no subject has truth' in said and 'run python' not in said
    page = Path('result/new/report.html').read_text()
    assert {'ctp2dwi': 'lesion head ', 'mri2pet': 'composite SUVR '}[task] in page.split('<figcaption>', 1)[1]
    assert 'id="predictions"' in page and 'synthetic minus true' not in page and ', true and' not in page
    # A composite that cannot be used costs the SUVR, not the image; a damaged source the subject, not its line.
    if task == 'mri2pet':
        image = nib.load(Path('data_new', *composite(first).parts[1:]))
        nib.save(nib.Nifti1Image(3 * image.get_fdata(), image.affine), image.get_filename())
        Path('data_new', *composite(second).parts[1:]).unlink()
    Path('data_new', *source(task, broken).parts[1:]).write_bytes(b'no image')
    with pytest.raises(Exception, match='1 of 3 subjects could not be translated'):
        made_runs.call('infer', *words)
    said, again = capsys.readouterr().out, table('result/new/test_predictions.csv')
    assert [row['ID'] for row in again] == [first, second, broken] and again[2]['qc'] == 'not translated'
    assert not any(value for name, value in again[2].items() if name not in ('ID', 'qc'))
    if task == 'ctp2dwi':
        assert again[:2] == rows[:2]
    else:
        assert f'{first}: no composite SUVR: ' in said and again[0]['qc'] and 'suvr_pred' not in again[0]
    # Another list: what was said of the others goes aside with their images.
    Path('data_new/data_info/test.txt').write_text(second)
    made_runs.call('infer', *words)
    aside, = Path('result/new').glob('old_*/test_predictions.csv')
    assert table(aside) == again and (aside.parent / 'pred' / first).exists()
    assert [row['ID'] for row in table('result/new/test_predictions.csv')] == [second]
    # Figures of before, with truth, do not stay beside images of subjects without.
    Path('result/new/test.csv').write_text('ID\n')
    made_runs.call('infer', *words)
    assert not Path('result/new/test.csv').exists()
    shutil.rmtree('data_new')


def test_images_of_who_is_not_on_the_list_any_more_go_aside(trained, capsys):
    task, settings, folder = trained
    shutil.copytree('data/data_info', 'fewer')
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'fewer', '--data_info', 'fewer',
             '--only_model')
    made_runs.call('infer', *words)
    gone, kept = ids('test')[0], ids('test')[1:]
    Path('fewer/test.txt').write_text('\n'.join(kept))
    before = images(Path('result/fewer/pred') / gone)
    capsys.readouterr()
    made_runs.call('infer', *words)
    assert 'those of 1 subjects that are not on the list now are in result/fewer/old_1/pred' in capsys.readouterr().out
    assert sorted(p.name for p in Path('result/fewer/pred').iterdir()) == sorted(kept)
    after = images(Path('result/fewer/old_1/pred') / gone)
    assert before and all(np.array_equal(after[name], image) for name, image in before.items())


def test_intervals_outlive_an_inference_that_fits_none_and_are_judged_there(trained):
    task, settings, folder = trained
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'kept')
    rows = []
    for more in ((), ('--only_model',)):
        made_runs.call('infer', *words, *more)
        rows.append({k: v for k, v in table('result/kept/test.csv')[0].items() if 'coverage' in k or 'width' in k})
        intervals = json.loads(Path('result/kept/inference.json').read_text())['intervals']
        assert intervals.keys() == set(settings['targets'])
    assert rows[0] == rows[1] and any('rim' in column for column in rows[0]) == (task == 'ctp2dwi')
    made_runs.call('infer', *words, '--only_model', '--seed', '4')  # not those of other settings
    assert json.loads(Path('result/kept/inference.json').read_text())['intervals'] == {}


def test_experiments_are_compared_without_inference(trained, capsys):
    task, settings, folder = trained
    made_runs.call('infer', *settings['words'])
    words = (*settings['words'], '--init_from', settings['exp'])
    made_runs.call('infer', *words, '--exp', 'beside', '--stage', 'regression', '--only_model')
    pred = {path: path.stat().st_mtime_ns for path in folder.rglob('pred/*/*')}
    capsys.readouterr()
    made_runs.call('infer', *settings['words'], '--compare', 'beside')
    assert f'this model is {settings["exp"]}' in capsys.readouterr().out
    assert pred and {path: path.stat().st_mtime_ns for path in folder.rglob('pred/*/*')} == pred
    found = {row['metric']: row for row in table(folder / 'test_compare.csv')}
    summary = {row['metric']: row for row in table(folder / 'test_summary.csv')}
    name = f'{settings["targets"][-1]}_mae'
    alike = dict(rel=1e-5)  # of tables with six digits
    assert float(found[name]['mean']) == pytest.approx(float(summary[name]['mean']), **alike)
    assert found[name]['mean'] != found[name]['beside_mean']
    for column in ('mean', 'p'):  # the regression is a baseline of the summary, too: the same subjects, the same test
        theirs = float(summary[name][f'regression_{column}'])
        assert float(found[name][f'beside_{column}']) == pytest.approx(theirs, **alike)
    for other, text in (('nothing', 'result/nothing/test.csv is missing; run python infer.py --exp nothing first'),
                        (settings['exp'], 'must name other experiments'), ('beside,beside', 'each once')):
        with pytest.raises(Exception, match=text) as caught:
            made_runs.call('infer', *settings['words'], '--compare', other)
        assert caught.value.one_sentence
    rows = Path('result/beside/test.csv').read_text().splitlines()
    Path('result/beside/test.csv').write_text('\n'.join(rows[:-1]) + '\n')
    with pytest.raises(Exception, match=r'\(1 subjects in all\) is in one of the tables') as caught:
        made_runs.call('infer', *settings['words'], '--compare', 'beside')
    assert caught.value.one_sentence
    shutil.copy(folder / 'test.csv', 'result/beside')
    how = json.loads(Path('result/beside/inference.json').read_text())
    Path('result/beside/inference.json').write_text(json.dumps(how | dict(data_root='elsewhere')))
    with pytest.raises(Exception, match="was not made from the split 'test' of data"):
        made_runs.call('infer', *settings['words'], '--compare', 'beside')


# ------------------------------------------------------------------------------------------------------------------
# Labels

@pytest.fixture
def data_info(trained):
    """The label table, put back after the test."""
    path = Path('data/data_info/data_info.csv')
    text = path.read_text()
    yield path
    path.write_text(text)


def test_labels_of_other_splits_reach_neither_training_nor_prediction(trained, data_info):
    """The same, bit for bit, when the labels of validation and test subjects are turned round or not there at all."""
    task, settings, folder = trained
    if task == 'ctp2dwi':
        pytest.skip('this task has no labels')
    head, *lines = data_info.read_text().split()
    held_out = {*ids('validation'), *ids('test')}
    turned = [','.join([id, str(1 - int(label)) if id in held_out else label, *rest])
              for id, label, *rest in (line.split(',') for line in lines)]
    removed = [','.join([id, '' if id in held_out else label, *rest])  # who is whose visit stays known
               for id, label, *rest in (line.split(',') for line in lines)]
    assert turned != lines and removed != lines
    found = {}
    for name, rows in (('true', lines), ('turned', turned), ('removed', removed)):
        data_info.write_text('\n'.join([head, *rows]) + '\n')
        words = (*settings['words'], '--exp', f'labels_{name}', '--init_from', settings['exp'], '--unet_steps', '3',
                 '--post_steps', '2', '--regression_steps', '3')
        made_runs.call('train_unet', *words, '--regression', 'True')
        for script in ('train_unet', 'post_train', 'infer'):
            made_runs.call(script, *words)
        place = Path('result', f'labels_{name}')
        parts = [made_runs.loaded(place / f'last_{stage}.pth.tar')['parts'] for stage in ('unet', 'post', 'regression')]
        assert parts[2]['net']['prior.bias'].any()  # the regression has a label head
        found[name] = dict(parts=parts, curve=made_runs.curve(place / 'validation_post.csv'),
                           images={k: v.tolist() for k, v in images(place / 'pred').items()})
    assert made_runs.differences(found['true'], found['turned']) == []
    assert made_runs.differences(found['true'], found['removed']) == []


def test_labels_of_the_training_subjects_do_reach_it(trained, data_info):
    """So that the test above can fail."""
    task, settings, folder = trained
    if task == 'ctp2dwi':
        pytest.skip('this task has no labels')
    head, *lines = data_info.read_text().split()
    found = []
    for name in ('as_is', 'flipped'):
        words = (*settings['words'], '--exp', f'training_labels_{name}', '--init_from', settings['exp'],
                 '--unet_steps', '3', '--label_drop', '0.0')
        made_runs.call('train_unet', *words)
        found.append(made_runs.loaded(f'result/training_labels_{name}/last_unet.pth.tar')['parts']['unet'])
        rows = (line.split(',') for line in lines)
        flipped = [','.join([id, str(1 - int(label)), *rest]) for id, label, *rest in rows]
        data_info.write_text('\n'.join([head, *flipped]) + '\n')
    assert made_runs.differences(*found)


def test_the_probability_of_the_label_is_written_and_mixes_the_images(trained):
    task, settings, folder = trained
    words = (*settings['words'], '--exp', 'label_head', '--init_from', settings['exp'], '--regression_steps', '40')
    made_runs.call('train_unet', *words, '--regression', 'True')
    found = {}
    for label in ('unknown', *(('0', '1') if task == 'mri2pet' else ())):
        made_runs.call('infer', *words, '--stage', 'regression', '--label', label)
        rows = {row['ID']: row for row in table(Path('result/label_head/test.csv'))}
        found[label] = images(Path('result/label_head/pred'))
        records = {id: json.loads(Path('result/label_head/pred', id, 'prediction.json').read_text()) for id in rows}
        if task == 'ctp2dwi':  # no labels: no label head
            assert not any('label_probability' in row for row in [*rows.values(), *records.values()])
            return
        assert all(sum(record['label_probability']) == pytest.approx(1, abs=1e-3) for record in records.values())
        assert all(float(rows[id]['label_probability']) == records[id]['label_probability'][1] for id in rows)
    for name, image in found['unknown'].items():
        if 'half_90' in name:
            continue
        chances = records[Path(name).parent.name]['label_probability']
        p = [q ** 2 / sum(q ** 2 for q in chances) for q in chances]
        if '_std' in name:  # what the status would change
            change = np.abs(found['1'][name.replace('_std', '')] - found['0'][name.replace('_std', '')])
            least = change * np.sqrt(chances[0] * p[1] ** 2 + chances[1] * p[0] ** 2)
            assert (image > least - 0.02).all() and image.max() > 0.01
            assert np.all([found[label][name].mean() < 0.5 * image.mean() for label in ('0', '1')])  # views differ
            continue
        negative, positive = found['0'][name], found['1'][name]
        assert np.abs(positive - negative).max() > 0.01
        inside = (negative > 0.05) & (negative < 2.9) & (positive > 0.05) & (positive < 2.9)  # not clipped
        mixed = p[0] * negative + p[1] * positive
        assert np.abs(image - mixed)[inside].max() < 0.02, name


def test_a_label_given_at_inference_changes_the_image_and_is_said(trained, capsys):
    task, settings, folder = trained
    if task == 'ctp2dwi':
        pytest.skip('this task has no labels')
    found = []
    for label in ('0', '1', 'true'):
        made_runs.call('infer', *settings['words'], '--label', label, '--guidance', '1.5')
        assert f'the label was given (--label {label})' in capsys.readouterr().out
        assert {row['label_given'] for row in table(folder / 'test_summary.csv')} == {label}
        found.append(images(folder / 'pred'))
    assert any(not np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_amyloid_status_of_synthetic_and_true_pet_and_of_the_mri(trained, capsys):
    task, settings, folder = trained
    if task == 'ctp2dwi':
        pytest.skip('this task has no status')
    shutil.copytree('data/data_info', 'lists_status')             # both classes in the test list
    known = {row['ID']: row['label'] for row in table('data/data_info/data_info.csv')}
    chosen = [id for label in ('0', '1') for id in sorted(known) if known[id] == label and id not in ids('validation')]
    chosen = [*chosen[:3], *chosen[-3:]]
    Path('lists_status/test.txt').write_text('\n'.join(chosen))
    train = [id for id in known if id not in (*chosen, *ids('validation'))]
    Path('lists_status/train.txt').write_text('\n'.join(train))
    words = (*settings['words'], '--init_from', settings['exp'], '--exp', 'status', '--data_info', 'lists_status')
    made_runs.call('infer', *words)
    rows = {row['score']: row for row in table('result/status/test_status.csv')}
    assert list(rows) == ['synthetic', 'mri_volumes', 'true_pet']
    test = table('result/status/test.csv')
    score, label = ([float(row[k]) for row in test] for k in ('suvr_pred', 'suvr_true'))
    label = [value > 1.11 for value in label]
    assert 0 < sum(label) < len(label)
    assert float(rows['synthetic']['auc']) == pytest.approx(roc_auc_score(label, score), abs=1e-5)
    assert float(rows['true_pet']['auc']) == 1
    limit = float(rows['synthetic']['threshold'])
    assert [int(float(row['status_pred'])) for row in test] == [int(value > limit) for value in score]
    for row in rows.values():
        assert [int(row['n_negative']), int(row['n_positive'])] == [len(label) - sum(label), sum(label)]
        assert int(row['fit_negative']) + int(row['fit_positive']) == len(train) + len(ids('validation'))
    capsys.readouterr()
    made_runs.call('infer', *words, '--lesion', 'None')          # no composite: all but the status is there
    assert 'amyloid status is not judged: it needs' in capsys.readouterr().out
    again = table('result/status/test.csv')
    assert [row['suvr_psnr'] for row in again] == [row['suvr_psnr'] for row in test]
    assert {row['status_pred'] for row in again} == {''}
    assert not Path('result/status/test_status.csv').exists()
