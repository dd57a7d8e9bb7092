"""
What the rows of benchmark.py say: ratios, and, computed from the measured activations, what a GPU can take.
"""

import statistics


def conclusions(table):
    """(name, value, unit, note) computed from the rows (name -> row)."""
    def of(name, key='seconds_step'):
        value = table.get(name, {}).get(key)
        return float(value) if value not in (None, '') else None

    def ratio(name, above, below, key, note=''):
        above, below = of(above, key), of(below, key)
        if above and below:
            found.append((name, above / below, '', note))

    def in_turn(name, row, note=''):
        if of(row, 'ratio'):
            found.append((name, of(row, 'ratio'), '', note))

    def held(name):
        """Memory of a row beyond the imports, MB."""
        return of(name, 'memory_mb') - of(name, 'memory_import_mb') if of(name, 'memory_import_mb') else None

    found = []
    for preset in ('ctp2dwi_demo', 'mri2pet_demo', 'ctp2dwi', 'mri2pet'):
        for stage in ('aae', 'unet'):
            in_turn(f'time/plain {preset} {stage}', f'ratio/plain/{preset}/{stage}')
            ours, monai = f'pair/{preset}/{stage}/ours', f'pair/{preset}/{stage}/monai'
            if of(monai, 'tflop') and of(ours, 'tflop'):
                note = (f'FLOPs x {of(ours, "tflop") / of(monai, "tflop"):.2f}, parameters x '
                        f'{of(ours, "parameters") / of(monai, "parameters"):.2f}')
                if of(monai, 'share_of_peak'):
                    note += f', MONAI at {100 * of(monai, "share_of_peak"):.0f} % of the peak'
                in_turn(f'time/monai {preset} {stage}', f'ratio/monai/{preset}/{stage}', note)
                found.append((f'memory/monai {preset} {stage}', held(ours) / held(monai), '', 'without the imports'))
        for ours, theirs in (('one_step', 'ddim'), ('one_step_latent', 'ddim'), ('detail_alone', 'ddim'),
                             ('image_grid', 'ddim'),
                             ('image_grid_one_view', 'ddim'), ('ddim', 'ddim'), ('ddpm', 'ddpm')):
            ratio(f'subject {ours}/monai {theirs} {preset}', f'ours/{preset}/{ours}', f'monai/{preset}/{theirs}',
                  'seconds_subject')
        ratio(f'subject one_step/ddpm {preset}', f'ours/{preset}/one_step', f'ours/{preset}/ddpm', 'seconds_subject')
    ratio('throughput 2 processes/1', 'growth/processes/1', 'growth/processes/2', 'seconds_subject')
    for preset, stage, note in (('mri2pet', 'aae', '160x192x160'), ('mri2pet', 'unet', '160x192x160, checkpointing'),
                                ('ctp2dwi', 'aae', '192x224'), ('ctp2dwi', 'unet', '192x224'),
                                ('ctp2dwi', 'post', '192x224')):
        found += capacity(table, preset, stage, note)
    return found


def voxels(row):
    count = int(row['batch'])
    for n in row['size'].split('x'):
        count *= int(n)
    return count


def capacity(table, preset, stage, note):
    """Computed: bytes a voxel from a line through the rows of growing size or batch; samples a step of two GPUs."""
    names = [n for n in table if n.startswith('growth/') and f'/{preset}/{stage}/' in n]
    points = [(voxels(table[n]), float(table[n]['memory_mb']) * 1e6) for n in names if table[n].get('memory_mb')]
    if len({x for x, _ in points}) < 2:
        return []
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    found = [(f'activations {preset} {stage}', slope, 'bytes/voxel', 'from peak memory against voxels x batch')]
    one = 1
    for n in note.split(',')[0].split('x'):
        one *= int(n)
    fixed = 20 * float(table[names[0]]['parameters']) + 1e9  # fp32 weights, gradient, two moments, average; the context
    return found + [(f'{gb} GB GPU {preset} {stage}', max(0, gb * 1e9 - fixed) // (slope * one), 'samples a step',
                     f'computed: {note}') for gb in (24, 80) if slope > 0]
