"""pictures.py: every listed subject is shown as its files place it, and one that cannot be read is said."""
import sys

import made_data
import numpy as np
import pytest

import config
import dataset
import montage
import pictures
import utils


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_data.write_stroke('data', made_data.IDS)
    made_data.write_lists('data/data_info', *(made_data.IDS[i:j] for i, j in ((0, 2), (2, 3), (3, 4))))
    return ['--data_root', 'data', '--data_info', 'data/data_info', '--frames', '6', '--image_size', '16,20']


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['pictures.py', *words])
    pictures.main()


def test_a_picture_of_each_subject_and_a_page(data, monkeypatch, capsys, tmp_path):
    call(monkeypatch, *data)
    assert {p.stem for p in (tmp_path / 'result/exp_1/pictures').glob('*.png')} == set(made_data.IDS)
    page = (tmp_path / 'result/exp_1/pictures.html').read_text()
    assert all(f'src="pictures/{id}.png"' in page for id in made_data.IDS)
    assert '4 subjects in result/exp_1/pictures' in capsys.readouterr().out
    (tmp_path / 'data/s02/adc.nii.gz').write_bytes(b'')
    with pytest.raises(utils.RunError, match='1 of 2 subjects could not be shown'):
        call(monkeypatch, *data, '--ids', 's01,s02', '--exp', 'two')
    assert 's02: ' in capsys.readouterr().out and (tmp_path / 'result/two/pictures/s01.png').exists()
    call(monkeypatch, *data, '--ids', 's03', '--exp', 'two')  # the page has those drawn before, too
    page = (tmp_path / 'result/two/pictures.html').read_text()
    assert 'pictures/s01.png' in page and 'pictures/s03.png' in page and 's02.png' not in page


def test_what_is_drawn_is_the_file_as_its_affine_places_it(data, monkeypatch):
    """A target of two voxels off by its affine is drawn so; the mean of a series stands for it; nothing is masked."""
    spec = dataset.Spec.from_settings(config.load('', data))
    subject = dataset.load_listed(spec, 's01')
    images = pictures.whole_images(spec, subject)
    assert list(images) == ['source', 'dwi', 'adc'] and {image.shape for image in images.values()} == {subject.shape}
    volumes = made_data.volumes(seed=0)
    moved = made_data.OBLIQUE.copy()
    moved[:3, 3] += 2 * moved[:3, 0]
    made_data.write('data/s01/adc.nii.gz', volumes['adc'] + 7.0, moved)
    spec = dataset.Spec.from_settings(config.load('', [*data, '--resample', 'True']))
    shown = pictures.whole_images(spec, dataset.load_listed(spec, 's01'))['adc']
    assert np.allclose(shown[2:], volumes['adc'][:-2] + 7.0, rtol=1e-4) and not shown[:2].any()


def test_slices_and_planes(data):
    subject = dataset.load_listed(dataset.Spec.from_settings(config.load('', data)), 's01')
    case = montage.Case('s01', '', subject.affine, subject.native_mask, [], {}, lesion=subject.native_lesion)
    flat = pictures.views_of(case, 2)
    assert {view.plane for view in flat} == {'axial'} and len({view.index for view in flat}) == len(flat) == 3
    assert flat[1].index == montage.best_index(case.mask, case.lesion, 'axial', case.affine)
    assert all(view.mask.any() for view in flat) and [view.plane for view in pictures.views_of(case, 3)] == [
        'axial', 'coronal', 'sagittal']
