"""
Look at a data set before training: are source and targets registered, is the mask right, does the lesion lie where the
images show it? No check can tell that; a look can.

python pictures.py                     a picture of each listed subject, and result/<exp>/pictures.html with all of them
python pictures.py --ids sub-1,sub-2   these subjects alone; the page has those drawn before, too

Every image is shown as it is, not only in the mask, to 40 mm around it, on the source's grid (by the affines), with the
outlines of mask and lesion (amyloid: composite): slices through the largest area of the lesion, else the middle of the
brain, and above and below it; of volumes the three planes.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

import config
import dataset
import grid
import montage
import report
import utils
import volume

APART = 0.2  # between the slices shown, as a share of the brain's extent
MARGIN = 40  # mm shown around the mask


def whole_images(spec, subject):
    """name -> (X, Y, Z) of a subject's source (of a series the mean) and targets on the source's grid, nothing cut."""
    images = {}
    for name in ('source', *(spec.target_names if subject.target is not None else ())):
        read = volume.read_volume(spec.path(name, subject.id))
        array = read.array.mean(axis=3) if read.array.ndim == 4 else read.array
        if grid.difference(array.shape, read.affine, subject.shape, subject.affine):
            array = grid.onto(array[None], read.affine, subject.affine, subject.shape)[0]
        images[name] = array
    return images


def views_of(case, dims):
    """The slices to show: of volumes three planes, of slices three axial ones."""
    if dims == 3:
        return [montage.View(case, plane, margin=MARGIN) for plane in montage.ACROSS]
    middle = montage.View(case, 'axial')
    inside = np.flatnonzero(montage.to_ras(case.mask, case.affine).any(axis=(0, 1)))
    step = max(1, round(APART * len(inside)))
    numbers = [min(max(middle.index + move, inside[0]), inside[-1]) for move in (step, 0, -step)]
    return [montage.View(case, 'axial', number, MARGIN) for number in dict.fromkeys(numbers)]


def draw(path, spec, id):
    """The picture of one subject. DataError for a file that cannot be read or does not fit."""
    subject = dataset.load_listed(spec, id)
    images, mask = whole_images(spec, subject), subject.native_mask
    case = montage.Case(id, '', subject.affine, mask, [], {}, lesion=subject.native_lesion)
    views = views_of(case, spec.spatial_dims)
    sheet = montage.Sheet([montage.INCH * view.aspect for view in views], [False] * len(images))
    for row, view in enumerate(views):
        sheet.label(row, f'{view.plane} {view.index + 1}')
        for column, (name, image) in enumerate(images.items()):
            ax = sheet.panel(row, column, (name if name == 'source' else name.upper()) if row == 0 else None)
            low, high = np.percentile(image[mask], (1, 99))
            view.draw(ax, view(image, masked=False), low, high if high > low else low + 1, 'gray')
            view.outline(ax, mask, montage.FOUND_COLOUR, 0.8)
            view.outline(ax, case.lesion, montage.TRUE_COLOUR, 1.2)
    lines = [('mask', montage.FOUND_COLOUR)]
    lines += [('lesion' if spec.task == 'ctp2dwi' else 'composite', montage.TRUE_COLOUR)] * (case.lesion is not None)
    sheet.finish(path, id, lines, 'R: patient right', 80)


def write_page(path, name, files):
    """The page with all pictures; files: ID -> file."""
    parts = [f'<figure><img alt="{escape(id)}" loading="lazy" src="{path.stem}/{quote(file.name)}"></figure>'
             for id, file in files.items()]
    lead = 'Outlines of mask and lesion on source and targets, as the affines place them. Do they fit the images?'
    text = report.page(f'Data of {name}', lead, [('', '\n'.join(parts))])
    utils.write_atomic(path, lambda file: file.write(text), 'w')


def main():
    cfg = config.load(__doc__, extra=dict(ids=('', 'these subjects alone: ID,ID')))
    spec, folder = dataset.Spec.from_settings(cfg), Path('result') / cfg.exp / 'pictures'
    lists, _ = dataset.read_lists(cfg.data_info)
    listed = [id for part in lists.values() for id in part]
    ids = [id.strip() for id in cfg.ids.split(',')] if cfg.ids else listed
    if not ids:
        raise dataset.DataError(f'the lists in {cfg.data_info} name no subject; write one ID a line, or give --ids.')
    folder.mkdir(parents=True, exist_ok=True)
    files = {id: folder / f'{quote(id, safe="")}.png' for id in dict.fromkeys([*listed, *ids])}
    faults = {}

    def attempt(id):
        try:
            draw(files[id], spec, id)
        except dataset.DataError as error:
            faults[id] = str(error).removeprefix(f'{id}: ')

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each holds a subject in memory
        list(pool.map(attempt, ids))
    page = folder.with_suffix('.html')
    write_page(page, cfg.exp, {id: file for id, file in files.items() if id not in faults and file.exists()})
    print(f'{len(ids) - len(faults)} subjects in {folder}, all of them in {page}')
    if faults:
        print(*(f'{id}: {text}' for id, text in sorted(faults.items())), sep='\n')
        raise utils.RunError(f'{len(faults)} of {len(ids)} subjects could not be shown (listed above); python '
                             'dataset.py says more')


if __name__ == '__main__':
    utils.cli(main)
