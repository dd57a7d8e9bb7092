"""
The page that plot.py writes: one self-contained HTML file, pictures inside, no script, nothing from a network.
"""

import base64
import html
import math

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif; color: #1d2433;
       background: #fff; max-width: 1180px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; padding-bottom: .2rem; border-bottom: 2px solid #0072B2; }
p, li { max-width: 62rem; }
.lead { color: #4b5566; margin: 0 0 1rem; }
.missing { background: #fff6e0; border-left: 4px solid #E69F00; padding: .5rem .9rem; }
.missing ul { margin: .2rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, #summary td:nth-child(2), table.plain th, table.plain td { text-align: left; }
table.plain th, table.plain td { white-space: normal; vertical-align: top; }
thead th { border-bottom: 1.5px solid #1d2433; vertical-align: bottom; }
tbody tr:nth-child(even) { background: #f4f6f9; }
td.own { font-weight: 600; }
#summary th { white-space: normal; max-width: 9rem; }
#summary td { vertical-align: top; }
#summary td:nth-child(2) { white-space: normal; }
#summary td[data-value] small { display: block; }
small { color: #5b6577; font-weight: 400; }
figure { margin: 1.2rem 0 2rem; }
figure img { max-width: 100%; height: auto; border: 1px solid #e3e7ee; }
figcaption { font-size: .88rem; color: #4b5566; max-width: 62rem; }
code, pre { font-size: .84rem; background: #f4f6f9; }
pre { padding: .6rem .8rem; overflow-x: auto; }
summary { cursor: pointer; color: #0072B2; }
"""

# What the columns of test.csv are, with their unit; a target stands before the first ones (dwi_mae).
MEANING = {
    'mae': 'mean |synthetic - true|, {unit}', 'psnr': 'dB', 'ssim': 'similarity, 1 = equal',
    'ms_ssim': 'the same over several scales', 'lesion_mae': 'mean |synthetic - true| in the lesion, {unit}',
    'coverage_50': 'share of voxels in their 50 % interval', 'width_50': 'half its width, {unit}',
    'coverage_90': 'share of voxels in their 90 % interval', 'width_90': 'half its width, {unit}',
    'lesion_coverage_50': 'in the lesion or composite', 'lesion_width_50': 'half its width there, {unit}',
    'lesion_coverage_90': 'in the lesion or composite', 'lesion_width_90': 'half its width there, {unit}',
    'rim_coverage_50': 'within 6 mm of the lesion', 'rim_width_50': 'half its width there, {unit}',
    'rim_coverage_90': 'within 6 mm of the lesion', 'rim_width_90': 'half its width there, {unit}'}
MEANING_OF = {
    'lesion_mae': 'in the lesion, mean of DWI and ADC scaled 0 to 1',
    'lesion_contrast_error': '|difference| of DWI lesion / rest of the brain',
    'adc_lesion_bias': 'mean synthetic - true ADC, 1e-6 mm^2/s', 'adc_lesion_bias_abs': 'its size in each subject',
    'lesion_dice': 'all subjects', 'lesion_dice_2ml': 'lesions above 2 ml',
    'lesion_dice_ceiling': 'lesion rule on the real images', 'lesion_ml': 'true lesion, ml',
    'lesion_avd_ml': '|found - true volume|, ml', 'lesion_detected': 'share of lesions touched',
    'false_lesion_ml': 'found, touching no lesion, ml', 'lesion_rim_mae': '6 mm around the lesion, scaled 0 to 1',
    'suvr_true': 'true PET, composite SUVR', 'suvr_pred': 'synthetic PET, composite SUVR',
    'lesion_head_ml_covered': 'share of true volumes in their 90 % interval',
    'suvr_pred_covered': 'share of true SUVRs in their 90 % interval',
    'suvr_error': 'synthetic - true, SUVR', 'suvr_error_abs': 'its size in each subject'}


def meaning(metric, units):
    """What a line of the summary is, in a few words with its unit; units: target -> unit."""
    for target, unit in units.items():
        rest = metric.removeprefix(f'{target}_')
        if metric not in MEANING_OF and rest != metric and rest in MEANING:
            return MEANING[rest].format(unit=unit)
    return MEANING_OF.get(metric, '')


def escape(value):
    return html.escape(str(value))


def short(value):
    """Four significant digits, as in the printed summary; an empty figure is a dash."""
    if value is None or not math.isfinite(value):
        return '-'
    digits = 0 if value == 0 else min(max(3 - math.floor(math.log10(abs(value))), 0), 4)
    return f'{value:.{digits}f}'


def hundredths(value):
    """Two decimals, all that a few dozen subjects can bear; an empty figure is a dash."""
    return '-' if value is None or not math.isfinite(value) else f'{value:.2f}'


def summary_table(summary, models, labels, units):
    """
    test_summary.csv as HTML: a line for each metric, a column for each model, mean and 95 % interval.

    models: '' for this model, then the baselines, named in `labels`; units: target -> unit. data-value holds each
    mean as in the CSV.
    """
    head = ''.join(f'<th>{escape(labels[model])}</th>' for model in models)
    lines = []
    for _, row in summary.iterrows():
        cells = []
        for model in models:
            prefix = f'{model}_' if model else ''
            mean, low, high = (row[f'{prefix}{part}'] for part in ('mean', 'ci_low', 'ci_high'))
            star = '*' if model and row.get(f'{model}_p_holm', math.nan) < 0.05 else ''
            range_ = f' <small>{short(low)} to {short(high)}</small>' if math.isfinite(low) else ''
            cells.append(f'<td{"" if model else " class=own"} data-value="{mean:.6g}">{short(mean)}{star}{range_}</td>')
        what = f'<td>{escape(row["metric"])}</td><td><small>{escape(meaning(row["metric"], units))}</small></td>'
        lines.append(f'<tr>{what}<td>{int(row["n"])}</td>{"".join(cells)}</tr>')
    return (f'<div class="scroll"><table id="summary"><thead><tr><th>metric</th><th></th><th>n</th>{head}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def status_table(frame, limit):
    """test_status.csv as HTML: how well each score tells amyloid positive, true SUVR above `limit`, from negative."""
    names = {'synthetic': 'SUVR of the synthetic PET', 'mri_volumes': 'ventricle and grey-matter volume of the MRI',
             'true_pet': 'SUVR of the true PET, which defines the status'}
    rows = []
    for line in frame.to_dict('records'):
        parts = [[hundredths(line.get(name + end)) for end in ('', '_ci_low', '_ci_high')]
                 for name in ('auc', 'balanced_accuracy')]
        ranges = [f'{mean} ({low} to {high})' for mean, low, high in parts]
        plain = [short(line.get('threshold')), *(hundredths(line.get(k)) for k in ('sensitivity', 'specificity'))]
        sizes = [' / '.join(f'{line.get(f"{part}_{sign}", math.nan):.0f}' for sign in ('negative', 'positive'))
                 for part in ('n', 'fit')]
        rows.append((names.get(line['score'], line['score']), *ranges, *plain, *sizes))
    head = ('score', 'AUC (95 % CI)', 'balanced accuracy (95 % CI)', 'threshold', 'sensitivity', 'specificity',
            'test subjects, negative / positive', 'fitted on, negative / positive')
    text = f'Positive: SUVR of the true PET above {limit:g}. Thresholds are fitted on training + validation subjects.'
    return pairs(rows, head) + note(text)


def table(frame, id=''):
    """Any table as HTML, numbers as they stand in the CSV, empty ones as a dash."""
    def cell(value):
        if isinstance(value, float):
            return f'{value:.6g}' if math.isfinite(value) else '-'
        return escape(value)
    head = ''.join(f'<th>{escape(name)}</th>' for name in frame)
    rows = frame.itertuples(index=False)
    body = ''.join('<tr>' + ''.join(f'<td>{cell(value)}</td>' for value in row) + '</tr>' for row in rows)
    return f'<div class="scroll"><table id="{id}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows, head=None):
    """A plain table of text, for settings and facts."""
    top = f'<thead><tr>{"".join(f"<th>{escape(name)}</th>" for name in head)}</tr></thead>' if head else ''
    body = ''.join('<tr>' + ''.join(f'<td>{escape(value)}</td>' for value in row) + '</tr>' for row in rows)
    return f'<div class="scroll"><table class="plain">{top}<tbody>{body}</tbody></table></div>'


def figure(path, caption):
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
            f'<figcaption>{escape(caption)} <code>fig/{escape(path.name)}</code></figcaption></figure>')


def details(title, body):
    """Folded away until it is clicked."""
    return f'<details><summary>{escape(title)}</summary>{body}</details>'


def note(text):
    """Small print below a table."""
    return f'<p><small>{escape(text)}</small></p>'


def lines(text):
    """Text as it is, line by line."""
    return f'<pre>{escape(text)}</pre>'


def missing(items):
    """The box that says what is not there yet, or cannot be shown."""
    points = ''.join(f'<li>{escape(item)}</li>' for item in items)
    return f'<div class="missing">Not there, or not readable:<ul>{points}</ul></div>' if items else ''


def warning(text):
    """A box that cannot be overlooked."""
    return f'<div class="missing">{escape(text)}</div>'


def page(title, lead, sections):
    """The whole page; sections: (heading, HTML), left out where the HTML is empty."""
    parts = [(f'<h2>{escape(heading)}</h2>\n' if heading else '') + content for heading, content in sections if content]
    body = '\n'.join(parts)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f'<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
            f'{body}\n</body></html>\n')
