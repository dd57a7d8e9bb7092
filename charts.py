"""
Tables as diagrams for plot.py: training curves, scatter, figures with their intervals, calibration. Knows no files.
"""

from itertools import cycle

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# Colours of Okabe and Ito, told apart by colour-blind readers; each model has a marker, too.
LOOKS = {'': ('#0072B2', 'o'), 'unet': ('#E69F00', 's'), 'regression': ('#009E73', 'D'), 'aae': ('#7F7F7F', '^'),
         'mean': ('#CC79A7', 'v')}
NAMES = {'': 'this model', 'unet': 'stage 2, before post-training', 'regression': 'regression U-Net',
         'aae': 'autoencoder (given the true image)', 'mean': 'mean training image'}
STAGES = {'aae': 'stage 1: autoencoder', 'unet': 'stage 2: latent U-Net', 'post': 'stage 3: post-training',
          'regression': 'regression U-Net'}
COLOURS = ['#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#7F7F7F', '#000000', '#882255']
POSITIVE, NEGATIVE = '#D55E00', '#0072B2'
PANELS = {
    'ctp2dwi': [
        ('dwi_psnr', 'DWI PSNR (dB)', 'higher'), ('adc_psnr', 'ADC PSNR (dB)', 'higher'),
        ('dwi_ssim', 'DWI SSIM', 'higher'), ('adc_ssim', 'ADC SSIM', 'higher'),
        ('lesion_mae', 'lesion MAE (scaled 0 to 1)', 'lower'), ('lesion_dice_2ml', 'Dice > 2 ml', 'higher'),
        ('lesion_detected', 'lesions detected (share)', 'higher'),
        ('lesion_avd_ml', '|volume difference| (ml)', 'lower'), ('false_lesion_ml', 'false lesion (ml)', 'lower'),
        ('adc_lesion_bias', r'ADC bias in the lesion ($10^{-6}$ mm$^2$/s)', ''),
        ('lesion_contrast_error', 'lesion contrast error (ratio)', 'lower'),
        ('lesion_rim_mae', 'MAE 6 mm around it (scaled 0 to 1)', 'lower')],
    'mri2pet': [
        ('suvr_psnr', 'PSNR (dB)', 'higher'), ('suvr_ssim', 'SSIM', 'higher'), ('suvr_ms_ssim', 'MS-SSIM', 'higher'),
        ('suvr_mae', 'MAE (SUVR)', 'lower'), ('suvr_error', 'composite error (SUVR)', ''),
        ('suvr_error_abs', '|composite error| (SUVR)', 'lower')]}


def _save(figure, path, dpi):
    for ax in figure.axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(which='both', labelsize=8)
    figure.savefig(path, dpi=dpi, facecolor='white')
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Training

def draw_curves(path, losses, validations, best, region='lesion', dpi=110):
    """
    A row for each stage: its loss terms, then each validation figure.

    losses, validations: stage -> table as the training writes them; best: stage -> step of the checkpoint that is used;
    region: what lesion_mae is taken over.
    """
    stages = [stage for stage in STAGES if stage in losses or stage in validations]
    labels = {'psnr': 'PSNR (dB)', 'ssim': 'SSIM', 'lesion_mae': f'{region} MAE (0 to 1)', 'mae': 'MAE (0 to 1)'}
    figures = [name for name in labels if any(name in table for table in validations.values())][:3]
    size = (2.8 * (1 + len(figures)) + 0.3, 2.3 * len(stages) + 0.4)
    figure, axes = plt.subplots(len(stages), 1 + len(figures), figsize=size, squeeze=False, layout='constrained')
    figure.suptitle('Training loss (thin: each step, thick: running mean) and validation'
                    + (' (ring: the checkpoint in use)' if best else ''), fontsize=11)
    for row, stage in zip(axes, stages, strict=True):
        row[0].set_ylabel(f'{STAGES[stage]}\n\nloss terms', fontsize=9)
        if stage in losses:
            _draw_losses(row[0], losses[stage])
        for ax, name in zip(row[1:], figures, strict=True):
            table = validations.get(stage)
            if table is None or name not in table or table[name].isna().all():
                ax.set_visible(False)
                continue
            ax.plot(table['step'], table[name], '-o', color='#0072B2', markersize=3.5)
            used = table[table['step'] == best.get(stage)]
            ax.plot(used['step'], used[name], 'o', color='#D55E00', markersize=10, fillstyle='none', mew=1.6)
            ax.set_ylabel(f'validation {labels[name]}', fontsize=8.5)
    for ax in axes.flat:
        ax.set_xlabel('step', fontsize=8.5)
        ax.grid(alpha=0.25)
    _save(figure, path, dpi)


def _draw_losses(ax, table):
    terms = [name for name in table if name not in ('step', 'epoch', 'lr', 'grad_norm', 'seconds')]
    width = max(1, len(table) // 40)
    for term, colour in zip(terms, COLOURS, strict=False):
        values = table[term].where(table[term] != 0)  # a term that is not switched on yet is exactly 0
        if values.notna().any():
            ax.plot(table['step'], values, color=colour, alpha=0.25, linewidth=0.7)
            smooth = values.rolling(width, center=True, min_periods=1).mean().where(values.notna())
            ax.plot(table['step'], smooth, color=colour, linewidth=1.5, label=term)
    lowest = min((table[term].min() for term in terms), default=0)
    ax.set_yscale('log' if lowest > 0 else 'symlog', **({} if lowest > 0 else dict(linthresh=0.1)))
    ax.legend(fontsize=7, framealpha=0.6, edgecolor='none', ncols=2 if len(terms) > 3 else 1)


# ----------------------------------------------------------------------------------------------------------------------
# Test subjects

def draw_metrics(path, summary, models, panels, ceilings=None, dpi=110):
    """
    Mean and 95 % interval of each figure, a line for each model.

    summary: test_summary.csv indexed by metric; models: '' (this model) and the baselines; panels: (metric, label,
    better), better 'higher', 'lower' or '' (nearest to zero); ceilings: metric -> what a perfect image would score.
    """
    columns, ceilings = min(3, len(panels)), ceilings or {}
    rows = -(-len(panels) // columns)
    size = (3.1 * columns + 1.7, (0.55 + 0.24 * len(models)) * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained', sharey=True)
    figure.suptitle('Test subjects: mean and bootstrap 95 % interval; * differs from this model (p < 0.05, Holm)',
                    fontsize=11)
    places = np.arange(len(models))[::-1]
    for ax, panel in zip(axes.flat, panels, strict=False):
        metric, label, better = panel
        line = summary.loc[metric]
        for place, model in zip(places, models, strict=True):
            prefix, (colour, marker) = f'{model}_' if model else '', LOOKS.get(model, ('black', 'x'))
            mean, low, high = (line[f'{prefix}{part}'] for part in ('mean', 'ci_low', 'ci_high'))
            ax.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle='butt')
            ax.plot(mean, place, marker, color=colour, markersize=7, markeredgecolor='white', markeredgewidth=0.6)
            if model and line.get(f'{model}_p_holm', np.nan) < 0.05:
                ax.text(1, place - 0.12, '*', transform=ax.get_yaxis_transform(), ha='right', va='center', fontsize=13)
        if np.isfinite(ceilings.get(metric, np.nan)):
            ax.axvline(ceilings[metric], color='black', linestyle=':', linewidth=1)
            label += ' (dotted: rule on real images)'
        if not better:
            ax.axvline(0, color='black', linewidth=0.7)
        hint = {'higher': r'$\rightarrow$ better', 'lower': r'$\leftarrow$ better', '': '0 is best'}[better]
        ax.set_title(label, fontsize=9, loc='left')
        ax.set_xlabel(f'{hint}, n = {int(line["n"])}', fontsize=8)
        ax.set_yticks(places, [NAMES.get(model, model) for model in models], fontsize=8.5)
        ax.set_ylim(-0.6, len(models) - 0.4)
        ax.margins(x=0.12)
        ax.grid(axis='x', alpha=0.25)
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    _save(figure, path, dpi)


def draw_stroke_scatter(path, facts, head=None, dpi=110):
    """
    Lesion volume and lesion ADC, synthetic against true.

    facts: table with the columns true_ml, pred_ml, rule_ml (the lesion; by the rule on the synthetic and on the real
    images), true_adc and pred_adc (mean in the true lesion, nan without one). head: of the lesion head lesion_ml,
    lesion_head_ml, lesion_head_ml_low and _high, or None.
    """
    head = None if head is None or head.dropna().empty else head.dropna()
    count = 2 + (head is not None)
    figure, axes = plt.subplots(1, count, figsize=(5.3 * count, 5.5), layout='constrained')
    highest = [table.max().max() for table in (facts[['true_ml', 'pred_ml', 'rule_ml']], head) if table is not None]
    top = max(max(highest) * 1.6, 1)
    for ax in (axes[0], axes[-1])[:count - 1]:
        ax.plot([0, top], [0, top], color='0.5', linewidth=0.9, zorder=1)
        for set_scale, set_limits in ((ax.set_xscale, ax.set_xlim), (ax.set_yscale, ax.set_ylim)):
            set_scale('symlog', linthresh=0.1, linscale=0.4)
            set_limits(-0.04, top)
        ax.set_xlabel('true lesion (ml; linear below 0.1, no lesion = 0)')
    if head is not None:
        _draw_volume_intervals(axes[-1], head)
    ax = axes[0]
    ax.plot(facts['true_ml'], facts['rule_ml'], 'o', color='0.45', fillstyle='none', markersize=8,
            label='rule on the real images (ceiling)')
    ax.plot(facts['true_ml'], facts['pred_ml'], 'o', color='#0072B2', alpha=0.8, markersize=6,
            label='rule on the synthetic images')
    facts = facts.dropna(subset=['true_ml', 'pred_ml'])  # those with lesion masks
    both = facts['pred_ml'] - facts['true_ml']
    ax.set_title(f'Lesion volume, n = {len(facts)}, median |difference| {both.abs().median():.3g} ml', fontsize=10)
    ax.set_ylabel('found by the lesion rule (ml)')
    ax.legend(fontsize=8.5, loc='upper left')
    known = facts.dropna(subset=['true_adc', 'pred_adc'])
    ax = axes[1]
    if len(known):
        values = known[['true_adc', 'pred_adc']].to_numpy()
        low, high = values.min() - 40, values.max() + 40
        ax.plot([low, high], [low, high], color='0.5', linewidth=0.9, zorder=1)
        ax.plot(known['true_adc'], known['pred_adc'], 'o', color='#0072B2', alpha=0.8, markersize=7)
        ax.set(xlim=(low, high), ylim=(low, high))
    bias = f', bias {round((known["pred_adc"] - known["true_adc"]).mean()):+d}' if len(known) else ''
    ax.set_title(f'Mean ADC in the true lesion, n = {len(known)}{bias}', fontsize=10)
    ax.set(xlabel=r'true ADC ($10^{-6}$ mm$^2$/s)', ylabel=r'synthetic ADC ($10^{-6}$ mm$^2$/s)')
    _finish_scatter(figure, axes, path, dpi)


def _draw_volume_intervals(ax, head):
    """The lesion head's volume with its interval against the true one, a line for each subject."""
    low, high = head['lesion_head_ml_low'], head['lesion_head_ml_high']
    inside = (low <= head['lesion_ml']) & (head['lesion_ml'] <= high)
    for chosen, colour, text in ((inside, '#0072B2', 'truth inside'), (~inside, '#D55E00', 'truth outside')):
        if chosen.any():
            ax.vlines(head['lesion_ml'][chosen], low[chosen], high[chosen], color=colour, alpha=0.6, linewidth=1.5)
            ax.plot(head['lesion_ml'][chosen], head['lesion_head_ml'][chosen], 'o', color=colour, alpha=0.8,
                    markersize=6, label=f'{text} (n = {int(chosen.sum())})')
    ax.set_title('Lesion volume by the lesion head, with its 90 % interval', fontsize=10)
    ax.set_ylabel('sum of the probabilities (ml)')
    ax.legend(fontsize=8.5, loc='upper left')


def draw_amyloid_scatter(path, table, threshold, fitted, dpi=110):
    """
    SUVR of the cortical composite, synthetic against true, and the difference against the true value.

    table: suvr_true, suvr_pred, where known suvr_pred_low and _high; threshold: of the true PET; fitted: of the
    synthetic one, or None if it is not known.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.6, 5.5), layout='constrained')
    values = table[['suvr_true', 'suvr_pred']].to_numpy()
    shown = table.filter(['suvr_true', 'suvr_pred', 'suvr_pred_low', 'suvr_pred_high']).to_numpy()
    low, high = np.nanmin(shown) - 0.05, np.nanmax(shown) + 0.05
    axes[0].plot([low, high], [low, high], color='0.5', linewidth=0.9)
    difference = table['suvr_pred'] - table['suvr_true']
    for name, chosen, colour, marker in (('negative', table['suvr_true'] <= threshold, NEGATIVE, 'o'),
                                         ('positive', table['suvr_true'] > threshold, POSITIVE, '^')):
        text = f'truly {name} (n = {int(chosen.sum())})'
        for ax, y in zip(axes, (table['suvr_pred'], difference), strict=True):
            ax.plot(table['suvr_true'][chosen], y[chosen], marker, color=colour, alpha=0.8, markersize=7, label=text)
    if 'suvr_pred_low' in table:
        axes[0].vlines(table['suvr_true'], table['suvr_pred_low'], table['suvr_pred_high'], color='0.6', linewidth=1,
                       zorder=0, label='90 % interval')
    for ax in axes:
        ax.axvline(threshold, color='black', linestyle='--', linewidth=1,
                   label=f'threshold of the true PET, {threshold:g}')
        ax.set_xlabel('true SUVR, cortical composite')
    if fitted is not None:
        axes[0].axhline(fitted, color='black', linestyle=':', linewidth=1.4,
                        label=f'threshold fitted on training + validation, {fitted:.3f}')
    axes[1].axhline(0, color='0.5', linewidth=0.9)
    axes[1].axhline(difference.mean(), color='#009E73', linewidth=1.2, label=f'mean {difference.mean():+.2g}')
    spread = difference.std()
    if np.isfinite(spread):
        edges = difference.mean() - 1.96 * spread, difference.mean() + 1.96 * spread
        axes[1].axhspan(*edges, color='#009E73', alpha=0.1, linewidth=0, label=r'mean $\pm$ 1.96 SD')
    axes[0].set(ylabel='synthetic SUVR', xlim=(low, high), ylim=(low, high))
    axes[1].set(ylabel='synthetic - true SUVR')
    varies = len(table) > 2 and values.std(axis=0).min() > 0
    note = f', r = {np.corrcoef(values.T)[0, 1]:.2f}' if varies else ''
    axes[0].set_title(f'SUVR, n = {len(table)}{note}', fontsize=10)
    axes[1].set_title(f'Difference, mean |difference| {difference.abs().mean():.2g}', fontsize=10)
    axes[0].legend(fontsize=7.5, loc='lower right')
    axes[1].legend(fontsize=7.5)
    _finish_scatter(figure, axes, path, dpi)


def _finish_scatter(figure, axes, path, dpi):
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.set_box_aspect(1)
    _save(figure, path, dpi)


def draw_calibration(path, targets, head=None, dpi=110):
    """
    Nominal against empirical coverage, one diagram for each target; and of a lesion head, how often it is right.

    targets: target -> {series name: list of (nominal, mean, low, high)}, shares 0..1, low and high of the subjects.
    head: its probability (n,) and the share of lesion among the voxels that have it (n,).
    """
    count = len(targets) + (head is not None)
    size = (4.6 * count + 0.3, 5.2)
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout='constrained')
    for ax in axes.flat:
        ax.plot([0, 1], [0, 1], color='0.5', linewidth=0.9)
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.grid(alpha=0.25)
        ax.set_box_aspect(1)
    looks = ('#0072B2', 'o'), ('#D55E00', '^')
    for ax, (target, series) in zip(axes.flat, targets.items(), strict=False):
        for (name, points), (colour, marker) in zip(series.items(), looks, strict=False):
            x, mean, low, high = np.array(points).T
            bars = np.maximum([mean - low, high - mean], 0)  # rounding, where all subjects are equal
            ax.errorbar(x, mean, bars, color=colour, marker=marker, capsize=3, label=name)
        ax.set(xlabel='nominal coverage', ylabel='share of voxels covered')
        ax.set_title(f'{target.upper()}: voxels inside their interval', fontsize=10)
        ax.legend(fontsize=8, loc='upper left')
    if head is not None:
        axes.flat[-1].plot(*head, color='#0072B2', marker='o')
        axes.flat[-1].set(xlabel='probability of a lesion', ylabel='share of brain voxels with lesion')
        axes.flat[-1].set_title('lesion head: is it there as often as it says?', fontsize=10)
    _save(figure, path, dpi)


def draw_tradeoff(path, curves, dpi=110):
    """
    Lesion MAE against PSNR: all with their intervals, then what lies within 1.2 dB of the best without.

    curves: name -> list of ((PSNR, low, high), (lesion MAE, low, high)), joined in their order.
    """
    figure, (whole, close) = plt.subplots(1, 2, figsize=(12.4, 4.8), layout='constrained', width_ratios=(3, 2))
    best = max(psnr[0] for points in curves.values() for psnr, _ in points)
    heights = []
    for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle('osD^vP*Xh'), strict=False):
        (x, x_low, x_high), (y, y_low, y_high) = np.array(points).transpose(1, 2, 0)
        whole.errorbar(x, y, [y - y_low, y_high - y], [x - x_low, x_high - x], color=colour, marker=marker, capsize=2,
                       markersize=7, linewidth=1.4, elinewidth=0.7, label=name)
        if x.max() > best - 1.2:
            close.plot(x, y, color=colour, marker=marker, markersize=7, linewidth=1.4)
            heights += y[x > best - 1.2].tolist()
    room = 0.08 * (max(heights) - min(heights)) + 1e-3
    close.set(xlim=(best - 1.2, best + 0.1), ylim=(min(heights) - room, max(heights) + room), title='the best, closer')
    for ax in (whole, close):
        ax.set(xlabel=r'PSNR, mean of DWI and ADC (dB, $\rightarrow$ better)',
               ylabel=r'lesion MAE (scaled 0 to 1, $\downarrow$ better)')
        ax.grid(alpha=0.25)
    whole.legend(fontsize=8)
    _save(figure, path, dpi)
