"""Small made volumes for the tests of the data rooms: a bright ellipsoid with a lesion, on any grid, in any layout."""
import os

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation

import config
import dataset

SHAPE = (14, 17, 5)


def affine(codes='RAS', spacing=(3.0, 3.0, 5.0), angles=(0, 0, 0), origin=(-20.0, 10.0, 5.0)):
    """An affine of the given axis codes and voxel sizes, turned by angles in degrees."""
    rows = np.zeros((3, 3))
    for column, code in enumerate(codes):
        row = [i for i, pair in enumerate(('LR', 'PA', 'IS')) if code in pair][0]
        rows[row, column] = spacing[column] * (1 if code in 'RAS' else -1)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler('xyz', angles, degrees=True).as_matrix() @ rows
    matrix[:3, 3] = origin
    return matrix


OBLIQUE = affine('LAS', angles=(8, -5, 12))


def volumes(shape=SHAPE, frames=6, seed=0, lesion=True):
    """dict of arrays with plausible values: ctp (HU), dwi, adc (1e-6 mm^2/s), mri, suvr, mask, lesion; 0 outside."""
    rng = np.random.default_rng(seed)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) * min(1, (n - 1) / 2) for n in shape), indexing='ij'))
    mask = (place ** 2).sum(0) < 0.8
    centre = np.array([0.3, 0.2, 0.0])[:, None, None, None]
    core = (((place - centre) ** 2).sum(0) < 0.08) & mask & lesion
    noise = rng.normal(1, 0.05, shape)
    bolus = 1 + 0.3 * np.sin(np.linspace(0, np.pi, frames))
    made = dict(ctp=(32 * noise)[..., None] * bolus, dwi=np.where(core, 220, 100) * noise,
                adc=np.where(core, 450, 850) * noise, mri=500 * noise + 100 * place[0], suvr=1.2 * noise)
    made = {name: array * (mask[..., None] if array.ndim == 4 else mask) for name, array in made.items()}
    return dict(made, mask=mask, lesion=core)


def write(path, array, matrix=OBLIQUE, dtype=np.float32, sform=1, qform=1, step=2.0, unit='sec'):
    """One NIfTI file; bool arrays become uint8."""
    array = np.asarray(array)
    img = nib.Nifti1Image(array.astype(np.uint8 if array.dtype == bool else dtype), matrix)
    if array.ndim == 4:
        img.header.set_zooms((*img.header.get_zooms()[:3], step))
        img.header.set_xyzt_units('mm', unit)
    img.set_sform(matrix, sform)
    img.set_qform(matrix, qform)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    nib.save(img, path)


def write_lists(folder, train, validation, test, labels=None):
    """The three lists, and data_info.csv where labels (ID -> row of label[, patient]) are given."""
    os.makedirs(folder, exist_ok=True)
    for split, ids in (('train', train), ('validation', validation), ('test', test)):
        with open(f'{folder}/{split}.txt', 'w') as file:
            file.write(''.join(f'{id}\n' for id in ids))
    if labels is not None:
        write_table(folder, labels)


def write_table(folder, labels):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/data_info.csv', 'w') as file:
        file.write('ID,label,patient\n' + ''.join(f'{id},{row}\n' for id, row in labels.items()))


IDS = ('s01', 's02', 's03', 's04')


def write_stroke(root='data', ids=IDS, **made):
    """Subjects in LAPT's layout and their lists: two in train, one each in validation and test."""
    for number, id in enumerate(ids):
        arrays = volumes(seed=number, **made)
        for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'):
            write(f'{root}/{id}/{name}.nii.gz', arrays[name])
    write_lists(f'{root}/data_info', ids[:-2], ids[-2:-1], ids[-1:], {id: '1,' for id in ids})


def write_amyloid(root='data', ids=IDS):
    """Subjects in IL-CLDM's layout and their lists."""
    for number, id in enumerate(ids):
        arrays = volumes((12, 14, 12), seed=number)
        for folder, name in (('whole_MRI', 'mri'), ('whole_Abeta', 'suvr'), ('mask', 'mask'), ('roi', 'lesion')):
            write(f'{root}/{folder}/{id}.nii', arrays[name])
    write_lists(f'{root}/data_info', ids[:-2], ids[-2:-1], ids[-1:], {id: f'{i % 2},' for i, id in enumerate(ids)})


def settings(*words, root='data'):
    """Settings of the small stroke subjects; words: further command-line words."""
    return config.load('', argv=['--data_root', root, '--data_info', f'{root}/data_info', '--image_size', '(16, 20)',
                                 '--frames', '6', '--spacing', '(None, None, None)', *words])


def amyloid_settings(*words, root='data'):
    return config.load('', argv=['--preset', 'mri2pet_demo', '--data_root', root, '--data_info', f'{root}/data_info',
                                 '--image_size', '(16, 16, 16)', '--spacing', '(None, None, None)', *words])


def spec(*words, root='data', **override):
    return dataset.Spec.from_settings(settings(*words, root=root), **override)
