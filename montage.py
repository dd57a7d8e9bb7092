"""
Volumes as pictures for plot.py: which slice, which way round, which colours. Knows no files and no settings.

Pictures are shown as radiologists do: the patient's right on image left, front up, head up; in sagittal planes the
front is on the left. Volumes are (X, Y, Z) arrays with an affine, in physical units; they are turned to the nearest
RAS first.
"""

from dataclasses import dataclass, field

import matplotlib
import nibabel as nib
import numpy as np

matplotlib.use('Agg')
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

ACROSS = {'axial': 2, 'coronal': 1, 'sagittal': 0}     # the RAS axis across each plane
SIDES = {'axial': 'RL', 'coronal': 'RL', 'sagittal': 'AP'}   # what is on image left and image right
TRUE_COLOUR, FOUND_COLOUR = '#E69F00', '#56B4E9'       # orange and sky blue: told apart by colour-blind readers
MARGIN_MM = 6.0                                        # shown around the brain
INCH = 2.1                                             # width of a panel
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
    focal: bool = True                                 # show where most of the lesion is, else the brain's middle
    probability: np.ndarray | None = None              # of a lesion, 0..1, as the lesion head says

    @property
    def region(self):
        """Where to look: at the lesion, or, where it is not known, at what was found; None: at the brain's middle."""
        return (self.found if self.lesion is None else self.lesion) if self.focal else None


@dataclass
class Image:
    """A volume made from the source, with its heading, unit and colour map."""
    name: str
    array: np.ndarray
    unit: str = ''
    colours: str = 'gray'

    def limits(self, mask):
        """Display range: the 1 and 99.5 % quantiles in the mask."""
        return np.percentile(self.array[mask], (1, 99.5))


@dataclass
class Windows:
    """Display ranges, alike for all subjects: target -> (lo, hi) of true and synthetic; largest error; largest std."""
    value: dict
    error: dict
    std: dict


# ----------------------------------------------------------------------------------------------------------------------
# From a volume to a picture

def to_ras(array, affine):
    """(X, Y, Z) turned and flipped to the nearest RAS: an exact rearrangement."""
    return nib.orientations.apply_orientation(array, nib.io_orientation(affine))


def cut(ras, plane, index):
    """One slice of a RAS volume as (rows, columns), row 0 on top: patient right on the left, front or head up."""
    return np.flip(np.take(ras, index, axis=ACROSS[plane]), (0, 1)).T


def best_index(mask, lesion, plane, affine):
    """The slice across `plane` with most of the lesion (of equals the middle one); without one the brain's middle."""
    shown = lesion if lesion is not None and lesion.any() else None
    axes = tuple({0, 1, 2} - {ACROSS[plane]})
    if shown is not None:
        area = to_ras(shown, affine).sum(axis=axes)
        largest = np.flatnonzero(area == area.max())
        return int(largest[len(largest) // 2])
    inside = np.flatnonzero(to_ras(mask, affine).any(axis=axes))
    return int(inside[0] + inside[-1]) // 2


class View:
    """One plane through one subject, at its best slice, or a given one of the RAS volume.

    It cuts volumes, cropped to the brain, outside of it NaN.
    """

    def __init__(self, case, plane, index=None, margin=MARGIN_MM):
        self.case, self.plane = case, plane
        self.index = best_index(case.mask, case.region, plane, case.affine) if index is None else int(index)
        ras = to_ras(case.mask, case.affine)
        codes = nib.io_orientation(case.affine)[:, 0].astype(int)
        size = np.empty(3)
        size[codes] = np.linalg.norm(case.affine[:3, :3], axis=0)      # mm along R, A, S
        rest = [axis for axis in range(3) if axis != ACROSS[plane]]
        self.dx, self.dy = size[rest[0]], size[rest[1]]
        whole = np.flip(ras.any(axis=ACROSS[plane]), (0, 1)).T
        self.box = tuple(_span(whole.any(axis=1 - axis), step, margin) for axis, step in ((0, self.dy), (1, self.dx)))
        self.mask = cut(ras, plane, self.index)[self.box]
        self.aspect = self.mask.shape[0] * self.dy / (self.mask.shape[1] * self.dx)

    def __call__(self, array, masked=True):
        image = cut(to_ras(array, self.case.affine), self.plane, self.index)[self.box]
        return np.where(self.mask, image, np.nan) if masked else image

    def draw(self, ax, image, lo, hi, colours, background='black'):
        """Show an image in mm, NaN as background, with the letters of its sides."""
        rows, columns = image.shape
        shades = matplotlib.colormaps[colours].with_extremes(bad=background)
        extent = (0, columns * self.dx, rows * self.dy, 0)
        shown = ax.imshow(image, vmin=lo, vmax=hi, cmap=shades, interpolation='nearest', extent=extent, aspect='auto')
        width, height = columns * self.dx, rows * self.dy
        wide = max(width, height * ax.bbox.width / ax.bbox.height)     # the background fills the panel
        high = wide * ax.bbox.height / ax.bbox.width
        ax.set(xlim=((width - wide) / 2, (width + wide) / 2), ylim=((height + high) / 2, (height - high) / 2))
        ax.set(xticks=[], yticks=[], facecolor=background)
        ax.spines[:].set_visible(False)
        ink = 'white' if background == 'black' else 'black'
        for letter, x in zip(SIDES[self.plane], (0.02, 0.98), strict=True):
            side = 'left' if x < 0.5 else 'right'
            ax.text(x, 0.02, letter, transform=ax.transAxes, color=ink, fontsize=9, ha=side, va='bottom')
        return shown

    def outline(self, ax, region, colour, width=1.0):
        """The edge of a region (X, Y, Z) bool, or nothing for None."""
        image = self(region, masked=False) if region is not None else np.zeros((1, 1), bool)
        if image.any():
            rows, columns = image.shape
            x, y = (np.arange(columns) + 0.5) * self.dx, (np.arange(rows) + 0.5) * self.dy
            padded = np.pad(image, 1).astype(float)                        # a region at the border gets an edge, too
            x, y = (np.concatenate([[a[0] - d], a, [a[-1] + d]]) for a, d in ((x, self.dx), (y, self.dy)))
            limits = dict(xlim=ax.get_xlim(), ylim=ax.get_ylim())          # contour widens them
            ax.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width)
            ax.set(**limits)


def _span(line, step, margin):
    """From the first to the last True, with a margin in mm."""
    inside, margin = np.flatnonzero(line), max(1, round(margin / step))
    return slice(max(0, inside[0] - margin), inside[-1] + 1 + margin)


def unit_of(name, rule):
    """What the colour bar of a target says, which is scaled by `rule`."""
    if rule[0] == 'range':
        return {'adc': r'ADC, $10^{-6}$ mm$^2$/s'}.get(name, name.upper())
    return f'{name.upper()}, multiples of the median' if rule[0] == 'median' else f'{name.upper()} scaled, 0 to 1'


# ----------------------------------------------------------------------------------------------------------------------
# Sheets of pictures

class Sheet:
    """A figure of panels placed in inches: rows of given heights; columns, some of them followed by a colour bar."""

    BAR, GAP, TOP, BOTTOM, HEADING = 0.68, 0.06, 0.64, 0.45, 0.24

    def __init__(self, heights, bars, side=0.3, headings=False, width=INCH):
        x, self.lefts, self.width = side, [], width
        for has_bar in bars:
            self.lefts.append(x)
            x += width + self.GAP + (self.BAR if has_bar else 0)
        self.heights = heights
        gap = self.GAP + (self.HEADING if headings else 0)  # between rows; the first one always has room for headings
        self.tops = self.TOP + np.cumsum([0, *heights[:-1]]) + gap * np.arange(len(heights))
        self.size = (x + 0.1, self.tops[-1] + heights[-1] + self.BOTTOM)
        self.figure = Figure(figsize=self.size)  # not pyplot's, which several threads must not make at once

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
        self.figure.colorbar(shown, cax=ax).set_label(label, fontsize=8, labelpad=3)
        ax.tick_params(labelsize=7.5, pad=1.5, length=2)

    def label(self, row, text):
        """Text left of a row, bottom to top."""
        middle = 1 - (self.tops[row] + self.heights[row] / 2) / self.size[1]
        self.figure.text(0.04 / self.size[0], middle, text, rotation=90, va='center', ha='left', fontsize=10,
                         linespacing=1.3, multialignment='center')

    def finish(self, path, title, lines, note, dpi):
        self.figure.text(0.1 / self.size[0], 1 - 0.1 / self.size[1], title, fontsize=12, va='top', fontweight='bold')
        self.figure.text(0.1 / self.size[0], 0.07 / self.size[1], note, fontsize=8.5, va='bottom', color='0.3')
        if lines:
            handles = [Line2D([], [], color=colour, label=name) for name, colour in lines]
            self.figure.legend(handles=handles, loc='lower right', ncols=len(lines), fontsize=8.5, frameon=False,
                               handlelength=1.4, borderaxespad=0.2)
        self.figure.savefig(path, dpi=dpi, facecolor='white')


def outlines(case, names):
    """Legend entries of the outlines of a case; names: what its lesion and the rule's finding are called."""
    lines = [(names[0], TRUE_COLOUR)] if case.lesion is not None else []
    return lines + ([(names[1], FOUND_COLOUR)] if case.found is not None else [])


def draw_case(path, case, planes, windows, units, names, dpi=110):
    """
    One subject: a row for each target and plane; source, true, synthetic, error (synthetic - true), std where known.

    The rows show the source images in turn, so that their column does not repeat itself. names: what the lesion and the
    rule's finding are called in the legend.
    """
    views = [View(case, plane) for plane in planes]
    rows = [(target, view) for target in case.pred for view in views]
    columns = ['source', 'true', 'synthetic', 'error'] if case.truth else ['source', 'synthetic']
    columns += ['std'] if case.std else []
    several = len(case.pred) > 1
    sheet = Sheet([INCH * view.aspect for _, view in rows], [name != 'true' for name in columns], headings=several)
    for row, (target, view) in enumerate(rows):
        sheet.label(row, f'{target.upper()}' + (f', {view.plane}' if len(views) > 1 else ''))
        for column, name in enumerate(columns):
            heading = f'{name} {target.upper()}' if row == 0 or several else None
            _panel(sheet, row, column, name, case, target, view, windows, units, heading)
    size = to_ras(case.mask, case.affine).shape
    slices = ', '.join(f'{view.plane} slice {view.index + 1} of {size[ACROSS[view.plane]]}' for view in views)
    sheet.finish(path, ': '.join(filter(None, [case.id, case.title])), outlines(case, names), f'{slices}; {NOTE}', dpi)


def _panel(sheet, row, column, name, case, target, view, windows, units, heading):
    """One panel of draw_case: source, true, synthetic, error or std of a target in a view."""
    if name == 'source':
        image = case.sources[row % len(case.sources)]
        ax = sheet.panel(row, column, image.name if heading else None)
        shown = view.draw(ax, view(image.array), *image.limits(case.mask), image.colours)
        sheet.bar(row, column, shown, image.unit)
        return
    ax = sheet.panel(row, column, heading)
    if name == 'error':
        limit = windows.error[target]
        shown = view.draw(ax, view(case.pred[target] - case.truth[target]), -limit, limit, 'RdBu_r', 'white')
        label = f'synthetic - true {units[target]}'
    elif name == 'std':
        shown = view.draw(ax, view(case.std[target]), 0, windows.std[target], 'cividis')
        label = f'std (doubt), {units[target]}'
    else:
        image = (case.truth if name == 'true' else case.pred)[target]
        shown = view.draw(ax, view(image), *windows.value[target], 'gray')
        label = units[target]
    if name != 'true':
        sheet.bar(row, column, shown, label)
    colour = {'error': 'black', 'std': 'white'}.get(name, TRUE_COLOUR)     # orange is lost on their colour maps
    view.outline(ax, case.lesion, colour, 0.9 if case.focal else 0.6)
    view.outline(ax, case.found if name == 'synthetic' else None, FOUND_COLOUR, 1.3)


def draw_overview(path, cases, planes, windows, units, title, names, dpi=110):
    """Several subjects, one row each: for every plane the source, then true and synthetic of each target."""
    kinds = ['true', 'synthetic'] if any(case.truth for case in cases) else ['synthetic']
    columns = []
    for plane in planes:
        columns += [(plane, 'source', '')] + [(plane, kind, target) for target in cases[0].pred for kind in kinds]
        columns += [(plane, 'probability', '')] * any(case.probability is not None for case in cases)
    bars = [kind in ('synthetic', 'probability') for _, kind, _ in columns]
    views = [{plane: View(case, plane) for plane in planes} for case in cases]
    labels = [f'{case.id}\n{case.title}'.strip() for case in cases]
    side = 0.15 + 0.19 * max(label.count('\n') + 1 for label in labels)
    sheet = Sheet([INCH * max(view.aspect for view in row.values()) for row in views], bars, side)
    for row, case in enumerate(cases):
        sheet.label(row, labels[row])
        for column, (plane, kind, target) in enumerate(columns):
            view, source = views[row][plane], case.sources[0]
            images = dict(true=case.truth, synthetic=case.pred).get(kind)
            heading = f'{kind} {target.upper()}' if target else source.name if kind == 'source' else 'lesion head'
            ax = sheet.panel(row, column, heading if row == 0 else None)
            if kind == 'source':
                view.draw(ax, view(source.array), *source.limits(case.mask), source.colours)
            elif kind == 'probability' and case.probability is not None:
                shown = view.draw(ax, view(case.probability), 0, 1, 'inferno')
                view.outline(ax, case.lesion, 'white', 0.8)
                if row == 0:
                    sheet.bar(0, column, shown, 'probability of a lesion', len(cases))
            elif kind == 'probability' or target not in images:
                ax.set_axis_off()
            else:
                shown = view.draw(ax, view(images[target]), *windows.value[target], 'gray')
                view.outline(ax, case.lesion, TRUE_COLOUR, 0.8 if case.focal else 0.6)
                view.outline(ax, case.found if kind == 'synthetic' else None, FOUND_COLOUR, 1.1)
                if row == 0 and bars[column]:
                    sheet.bar(0, column, shown, units[target], len(cases))
    note = f'the same window in every row; {NOTE}'
    sheet.finish(path, title, outlines(cases[0], names), note, dpi)
