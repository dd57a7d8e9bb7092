"""
Volumes as pictures for plot.py: which slice, which way round, which colours. Knows no files and no settings.

Every picture is shown as radiologists do: the patient's right on image left, front up, head up; in sagittal planes the front is on
the left. Volumes are (X, Y, Z) arrays with an affine, in physical units; they are turned to the nearest RAS first.
"""

from dataclasses import dataclass, field

import matplotlib
import nibabel as nib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

ACROSS = {'axial': 2, 'coronal': 1, 'sagittal': 0}     # the RAS axis across each plane
SIDES = {'axial': 'RL', 'coronal': 'RL', 'sagittal': 'AP'}   # what is on image left and image right
TRUE_COLOUR, FOUND_COLOUR = '#E69F00', '#56B4E9'       # orange and sky blue: told apart by colour-blind readers
MARGIN_MM = 6.0                                        # shown around the brain
INCH = 2.1                                             # width of a panel
UNITS = {'dwi': 'multiples of the median', 'adc': r'$10^{-6}$ mm$^2$/s', 'suvr': 'SUVR'}
NOTE = 'radiological convention: patient right (R) is on image left'


@dataclass
class Case:
    """One subject to be drawn; arrays (X, Y, Z) on its own grid, keyed by target."""
    id: str
    title: str
    affine: np.ndarray
    mask: np.ndarray
    sources: list                                      # Image, the first the main one
    pred: dict
    truth: dict = field(default_factory=dict)          # empty: none known
    std: dict = field(default_factory=dict)
    lesion: np.ndarray | None = None                   # or the cortical composite
    found: np.ndarray | None = None                    # what the lesion rule finds on pred


@dataclass
class Image:
    """A volume made from the source, with its heading, unit and colour map."""
    name: str
    array: np.ndarray
    unit: str = ''
    colours: str = 'gray'


@dataclass
class Windows:
    """Display ranges, the same for every subject and for prediction and truth: target -> (lo, hi), and the largest error and std."""
    value: dict
    error: dict
    std: dict


# ----------------------------------------------------------------------------------------------------------------------
# From a volume to a picture

def to_ras(array, affine):
    """(X, Y, Z) turned and flipped to the nearest RAS: an exact rearrangement."""
    return nib.orientations.apply_orientation(array, nib.io_orientation(affine))


def cut(ras, plane, index):
    """One slice of a RAS volume as an image (rows, columns), row 0 on top: right of the patient on the left, front or head up."""
    return np.flip(np.take(ras, index, axis=ACROSS[plane]), (0, 1)).T


def best_index(mask, lesion, plane, affine):
    """The slice across `plane` with the largest lesion area (ties: the middle one); without a lesion the middle of the mask."""
    shown = lesion if lesion is not None and lesion.any() else None
    axes = tuple({0, 1, 2} - {ACROSS[plane]})
    if shown is not None:
        area = to_ras(shown, affine).sum(axis=axes)
        largest = np.flatnonzero(area == area.max())
        return int(largest[len(largest) // 2])
    inside = np.flatnonzero(to_ras(mask, affine).any(axis=axes))
    return int(inside[0] + inside[-1]) // 2


class View:
    """One plane through one subject: cuts its volumes, cropped to the brain, outside of it NaN."""

    def __init__(self, case, plane, index):
        self.case, self.plane, self.index = case, plane, index
        ras = to_ras(case.mask, case.affine)
        codes = nib.io_orientation(case.affine)[:, 0].astype(int)
        size = np.empty(3)
        size[codes] = np.linalg.norm(case.affine[:3, :3], axis=0)      # mm along R, A, S
        rest = [axis for axis in range(3) if axis != ACROSS[plane]]
        self.dx, self.dy = size[rest[0]], size[rest[1]]
        whole = np.flip(ras.any(axis=ACROSS[plane]), (0, 1)).T
        self.box = tuple(_span(whole.any(axis=1 - axis), step) for axis, step in ((0, self.dy), (1, self.dx)))
        self.mask = cut(ras, plane, index)[self.box]
        self.aspect = self.mask.shape[0] * self.dy / (self.mask.shape[1] * self.dx)

    def __call__(self, array, masked=True):
        image = cut(to_ras(array, self.case.affine), self.plane, self.index)[self.box]
        return np.where(self.mask, image, np.nan) if masked else image

    def draw(self, ax, image, lo, hi, colours, background='black'):
        """Show an image in mm, NaN as background, with the letters of its sides."""
        rows, columns = image.shape
        shades = matplotlib.colormaps[colours].with_extremes(bad=background)
        shown = ax.imshow(image, vmin=lo, vmax=hi, cmap=shades, interpolation='nearest', extent=(0, columns * self.dx, rows * self.dy, 0))
        ax.set(xticks=[], yticks=[], facecolor=background)
        ax.spines[:].set_visible(False)
        ink = 'white' if background == 'black' else 'black'
        for letter, x in zip(SIDES[self.plane], (0.02, 0.98), strict=True):
            ax.text(x, 0.02, letter, transform=ax.transAxes, color=ink, fontsize=9, ha='left' if x < 0.5 else 'right', va='bottom')
        return shown

    def outline(self, ax, region, colour, width=1.0):
        """The edge of a region (X, Y, Z) bool."""
        image = self(region, masked=False)
        if image.any():
            rows, columns = image.shape
            x, y = (np.arange(columns) + 0.5) * self.dx, (np.arange(rows) + 0.5) * self.dy
            padded = np.pad(image, 1).astype(float)                        # a region at the border gets an edge, too
            x, y = (np.concatenate([[a[0] - d], a, [a[-1] + d]]) for a, d in ((x, self.dx), (y, self.dy)))
            ax.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width)
            ax.set(xlim=(0, columns * self.dx), ylim=(rows * self.dy, 0))  # contour widens them


def _span(line, step):
    """From the first to the last True, with a margin in mm."""
    inside, margin = np.flatnonzero(line), max(1, round(MARGIN_MM / step))
    return slice(max(0, inside[0] - margin), inside[-1] + 1 + margin)


def unit_of(name, quantile=False):
    return 'scaled, 0 to 1' if quantile else UNITS.get(name, '')


# ----------------------------------------------------------------------------------------------------------------------
# Sheets of pictures

class Sheet:
    """A figure of panels placed in inches: rows of given heights; columns, of which some are followed by a colour bar."""

    BAR, SIDE, GAP, TOP, BOTTOM = 0.62, 0.3, 0.06, 0.78, 0.55

    def __init__(self, heights, bars, width=INCH, side=SIDE):
        x, self.lefts, self.width = side, [], width
        for has_bar in bars:
            self.lefts.append(x)
            x += width + self.GAP + (self.BAR if has_bar else 0)
        self.heights = heights
        self.tops = self.TOP + np.cumsum([0, *heights[:-1]]) + self.GAP * np.arange(len(heights))
        self.size = (x + 0.1, self.tops[-1] + heights[-1] + self.BOTTOM)
        self.figure = plt.figure(figsize=self.size)

    def place(self, x, top, width, height):
        w, h = self.size
        return self.figure.add_axes([x / w, 1 - (top + height) / h, width / w, height / h])

    def panel(self, row, column, heading=None):
        ax = self.place(self.lefts[column], self.tops[row], self.width, self.heights[row])
        if heading:
            ax.set_title(heading, fontsize=11, pad=4)
        return ax

    def bar(self, row, column, shown, label, heights=1):
        """A colour bar right of a panel, over one or more rows."""
        last = row + heights - 1
        height = self.tops[last] + self.heights[last] - self.tops[row]
        ax = self.place(self.lefts[column] + self.width + self.GAP, self.tops[row] + 0.08 * height, 0.09, 0.84 * height)
        self.figure.colorbar(shown, cax=ax).set_label(label, fontsize=8, labelpad=1)
        ax.tick_params(labelsize=7.5, pad=1.5, length=2)

    def label(self, row, text):
        """Text left of a row, bottom to top."""
        middle = 1 - (self.tops[row] + self.heights[row] / 2) / self.size[1]
        self.figure.text(0.04 / self.size[0], middle, text, rotation=90, va='center', ha='left', fontsize=10, linespacing=1.3)

    def finish(self, path, title, lines, note, dpi):
        self.figure.text(0.1 / self.size[0], 1 - 0.1 / self.size[1], title, fontsize=12, va='top', fontweight='bold')
        self.figure.text(0.1 / self.size[0], 0.07 / self.size[1], note, fontsize=8.5, va='bottom', color='0.3')
        if lines:
            self.figure.legend(handles=[Line2D([], [], color=colour, label=name) for name, colour in lines], loc='lower right',
                               ncols=len(lines), fontsize=8.5, frameon=False, handlelength=1.4, borderaxespad=0.2)
        self.figure.savefig(path, dpi=dpi, facecolor='white')
        plt.close(self.figure)


def outlines(case, names):
    """Legend entries of the outlines of a case; names: what its lesion and the rule's finding are called."""
    lines = [(names[0], TRUE_COLOUR)] if case.lesion is not None else []
    return lines + ([(names[1], FOUND_COLOUR)] if case.found is not None else [])


def draw_case(path, case, planes, windows, units, names=('true lesion', 'lesion rule on the synthetic image'), dpi=110):
    """
    One subject: a row for each target and plane; source, true, synthetic, error (synthetic - true), std where known.

    Several rows show several source images in turn, so that the source's column is never a repetition.
    """
    views = [View(case, plane, best_index(case.mask, case.lesion, plane, case.affine)) for plane in planes]
    rows = [(target, view) for target in case.pred for view in views]
    columns = ['source', *(['true'] if case.truth else []), 'synthetic', *(['error'] if case.truth else []), *(['std'] if case.std else [])]
    sheet = Sheet([INCH * view.aspect for _, view in rows], [name != 'true' for name in columns])
    for row, (target, view) in enumerate(rows):
        sheet.label(row, f'{target.upper()}' + (f', {view.plane}' if len(views) > 1 else ''))
        for column, name in enumerate(columns):
            heading = dict(source=None, true=f'true {target.upper()}', synthetic=f'synthetic {target.upper()}').get(name, name)
            heading = heading if row == 0 or (name in ('true', 'synthetic') and len(case.pred) > 1) else None
            _panel(sheet, row, column, name, case, target, view, windows, units, heading)
    slices = ', '.join(f'{view.plane} slice {view.index + 1} of {to_ras(case.mask, case.affine).shape[ACROSS[view.plane]]}' for view in views)
    sheet.finish(path, f'{case.id}: {case.title}', outlines(case, names), f'{slices}; {NOTE}', dpi)


def _panel(sheet, row, column, name, case, target, view, windows, units, heading):
    """One panel of draw_case: source, true, synthetic, error or std of a target in a view."""
    if name == 'source':
        image = case.sources[row % len(case.sources)]
        fresh = row < len(case.sources)
        values = image.array[case.mask]
        ax = sheet.panel(row, column, image.name if fresh else None)
        shown = view.draw(ax, view(image.array), *np.percentile(values, (1, 99.5)), image.colours)
        sheet.bar(row, column, shown, image.unit)
        return
    ax = sheet.panel(row, column, heading)
    if name == 'error':
        limit = windows.error[target]
        shown = view.draw(ax, view(case.pred[target] - case.truth[target]), -limit, limit, 'RdBu_r', 'white')
        label = f'synthetic - true, {units[target]}'
    elif name == 'std':
        shown = view.draw(ax, view(case.std[target]), 0, windows.std[target], 'cividis')
        label = f'std over samples, {units[target]}'
    else:
        shown = view.draw(ax, view((case.truth if name == 'true' else case.pred)[target]), *windows.value[target], 'gray')
        label = units[target]
    if name != 'true':
        sheet.bar(row, column, shown, label)
    if case.lesion is not None:
        view.outline(ax, case.lesion, TRUE_COLOUR if name != 'error' else 'black', 0.9)
    if case.found is not None and name == 'synthetic':
        view.outline(ax, case.found, FOUND_COLOUR, 1.3)


def draw_overview(path, cases, planes, windows, units, title, names=('true lesion', 'lesion rule on the synthetic image'), dpi=110):
    """Several subjects, one row each: for every plane the source, then true and synthetic of each target."""
    rows = [[View(case, plane, best_index(case.mask, case.lesion, plane, case.affine)) for plane in planes] for case in cases]
    targets = list(cases[0].pred)
    kinds = ['true', 'synthetic'] if cases[0].truth else ['synthetic']
    columns = [(plane, None, 'source') for plane in range(len(planes))]
    columns += [(plane, target, kind) for target in targets for plane in range(len(planes)) for kind in kinds]
    ends = {max(i for i, column in enumerate(columns) if column[1] == target): target for target in targets}
    sheet = Sheet([INCH * max(view.aspect for view in views) for views in rows], [i in ends for i in range(len(columns))], side=0.55)
    for row, (case, views) in enumerate(zip(cases, rows, strict=True)):
        sheet.label(row, f'{case.id}\n{case.title}')
        for column, (plane, target, kind) in enumerate(columns):
            view, image = views[plane], case.sources[0]
            ax = sheet.panel(row, column, (image.name if kind == 'source' else f'{kind} {target.upper()}') if row == 0 else None)
            if kind == 'source':
                view.draw(ax, view(image.array), *np.percentile(image.array[case.mask], (1, 99.5)), image.colours)
                continue
            shown = view.draw(ax, view((case.truth if kind == 'true' else case.pred)[target]), *windows.value[target], 'gray')
            if case.lesion is not None:
                view.outline(ax, case.lesion, TRUE_COLOUR, 0.8)
            if case.found is not None and kind == 'synthetic':
                view.outline(ax, case.found, FOUND_COLOUR, 1.1)
            if column in ends and row == 0:
                sheet.bar(0, column, shown, f'{target.upper()}, {units[target]}', len(cases))
    sheet.finish(path, title, outlines(cases[0], names), f'same window in every row; {NOTE}', dpi)
