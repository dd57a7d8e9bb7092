"""
Speed and memory of every stage and sampler, beside this machine's measured peak, plain modules and MONAI.

python benchmark.py                    the whole table, one process a row, kept in result/benchmark.csv as it is done
python benchmark.py --peer monai       MONAI's rows as well (from an environment that has monai and einops)
python benchmark.py --only il_cldm     rows whose name contains this (or matches it, with * and ?)

Run it again to go on with what is missing; --restart begins anew. What is compared is measured again step by step in
turn (rows ratio/...): a machine's speed may change threefold within a minute. Other figures want a quiet machine: the
column others_cores says how many cores other processes kept busy meanwhile, and speed how fast the best convolution was
just before and after a row, against the peak rows (a virtual machine's neighbours do not show otherwise). The share of
the peak is that of the peak at the time: gflops / (speed x the peak row's).
"""

import argparse
import csv
import fnmatch
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import turns
from conclusions import conclusions
from stage import git_state
from utils import RunError, cli, write_atomic

COLUMNS = ('name', 'row', 'ratio', 'seconds_step', 'seconds_subject', 'memory_mb', 'memory_import_mb', 'tflop',
           'gflops', 'share_of_peak', 'speed', 'loading', 'batch', 'size', 'parameters', 'precision', 'steps',
           'others_cores', 'note', 'machine', 'code')

# ------------------------------------------------------------------------------------------------------------------
# The rows: name -> (module.function, its arguments). What is smaller than the preset says so.

CROP = ['--image_size', '(80, 96, 80)', '--checkpointing', 'False']
LARGE = dict(warm=0, least=2, budget=2.0)  # the step that counts FLOPs warms up
DEMOS = ('ctp2dwi_demo', 'mri2pet_demo')


def words(**settings):
    return [w for name, value in settings.items() for w in (f'--{name}', str(value))]


def rows(peer):
    """All rows in the order they are measured; what is compared stands side by side."""
    found = {'peak': ('timing.peak_rows', dict(least=5, budget=0.5))}

    def step(name, stage, preset, more=(), note='', function='timing.train_step', **how):
        found[name] = (function, dict(stage=stage, preset=preset, words=list(more), note=note, **how))

    def against_monai(stage, preset, more=(), probe=(), note='', **how):
        for who in ('ours', 'monai') if peer == 'monai' else ():
            pair = dict(who=who, probe=list(probe) if who == 'monai' else [])
            step(f'pair/{preset}/{stage}/{who}', stage, preset, more, note, 'peers.pair_step', **pair, **how)
        if peer == 'monai':
            in_turn('monai', preset, stage, f'pair/{preset}/{stage}/ours', f'pair/{preset}/{stage}/monai')

    def in_turn(peer, preset, stage, first, second):
        found[f'ratio/{peer}/{preset}/{stage}'] = ('turns.in_turn', dict(names=(first, second),
                                                                         rounds=15 if preset in DEMOS else 5))

    for preset in DEMOS:
        for stage in ('aae', 'unet'):
            step(f'ours/{preset}/{stage}', stage, preset)
            step(f'plain/{preset}/{stage}', stage, preset, function='plain.plain_step', least=2, budget=1.0)
            in_turn('plain', preset, stage, f'ours/{preset}/{stage}', f'plain/{preset}/{stage}')
            against_monai(stage, preset, probe=words(batch_size=4 if preset == DEMOS[0] else 1))
        step(f'ours/{preset}/post', 'post', preset)
        step(f'ours/{preset}/regression', 'regression', preset)
        found[f'ours/{preset}/sample'] = ('timed_inference.sample_rows', dict(preset=preset, least=2, budget=0.5))
        if peer == 'monai':
            found[f'monai/{preset}/sample'] = ('peers.monai_sampler_rows', dict(preset=preset, least=2, budget=0.5))

    # Sizes of the two papers. 2D: fewer slices a step; 3D: IL-CLDM's autoencoder on a crop.
    some = 'batch {}; the preset has more'
    step('ours/ctp2dwi/aae', 'aae', 'ctp2dwi', words(batch_size=2), some.format(2), **LARGE)
    step('ours/ctp2dwi/unet', 'unet', 'ctp2dwi', words(batch_size=4), some.format(4), **LARGE)
    step('ours/ctp2dwi/post', 'post', 'ctp2dwi', words(batch_size=2), some.format(2), **LARGE)
    small = dict(warm=0, least=1, budget=0)
    found['ours/ctp2dwi/sample'] = ('timed_inference.sample_rows', dict(preset='ctp2dwi', items=4, ddim=(1, 5),
                                                                        ddpm=(1, 5), **small))
    step('ours/lapt/unet', 'unet', 'lapt', words(batch_size=2), some.format(2), **LARGE)
    step('ours/il_cldm/aae', 'aae', 'il_cldm', CROP, 'crop of 80x96x80', **LARGE)
    step('ours/il_cldm/unet', 'unet', 'il_cldm', words(checkpointing=False), 'without checkpointing', **LARGE)
    step('ours/mri2pet/aae', 'aae', 'mri2pet', **LARGE)
    step('ours/mri2pet/unet', 'unet', 'mri2pet', (), 'FLOPs include the recomputation of checkpointing', **LARGE)
    step('ours/mri2pet/post', 'post', 'mri2pet', (), 'decodes a crop of 96x96x96; checkpointing', **LARGE)
    found['ours/mri2pet/sample'] = ('timed_inference.sample_rows', dict(preset='mri2pet', ddim=(1, 5), ddpm=(1, 5),
                                                                        **small))
    against_monai('aae', 'ctp2dwi', words(batch_size=2), words(batch_size=1), **LARGE)
    against_monai('unet', 'ctp2dwi', words(batch_size=4), words(batch_size=1), **LARGE)
    against_monai('aae', 'mri2pet', CROP, words(image_size=(32, 48, 32)), **LARGE)
    against_monai('unet', 'mri2pet', words(checkpointing=False), words(image_size=(64, 96, 64)), **LARGE)
    if peer == 'monai':
        found['monai/ctp2dwi/sample'] = ('peers.monai_sampler_rows',
                                         dict(preset='ctp2dwi', items=4, probe=words(image_size=(96, 112)), **small))
        found['monai/mri2pet/sample'] = ('peers.monai_sampler_rows', dict(
            preset='mri2pet', ddim=(1, 5), ddpm=(1, 5), probe=words(image_size=(64, 96, 64)), **small))

    # How cost grows, and the bytes of activations per voxel. AdamW: while Muon steps it may hold more than those.
    for stage, sizes in (('aae', (48, 96)), ('unet', (96, 160))):
        for n in sizes:
            more = words(image_size=(n, n, n), optimizer='adam')
            step(f'growth/size/mri2pet/{stage}/{n}', stage, 'mri2pet', more, **LARGE)
    for stage, batches in (('aae', (1, 4)), ('unet', (2, 12)), ('post', (2, 6))):
        for batch in batches:
            more = words(batch_size=batch, optimizer='adam')
            step(f'growth/batch/ctp2dwi/{stage}/{batch}', stage, 'ctp2dwi', more, **LARGE)
    for batch in (4, 64):
        step(f'growth/batch/ctp2dwi_demo/unet/{batch}', 'unet', 'ctp2dwi_demo', words(batch_size=batch))
    found['growth/subjects'] = ('timing.cohort_rows', dict(counts=(2, 8)))
    for count in (1, 2):
        step(f'growth/processes/{count}', 'unet', 'ctp2dwi_demo', (), f'{count} processes share the cores',
             least=6, budget=0)
    return found


QUICK = {  # every row's code on tiny networks and images
    2: words(image_size=(32, 32), batch_size=2, aae_channels=(8, 8, 8), disc_channels=(8, 8), aae_blocks=1,
             unet_channels=(32, 32), unet_attention=(1,), cond_channels=8, cond_width=8, detail_channels=(8, 8, 8)),
    3: words(image_size=(16, 16, 16), batch_size=1, aae_channels=(8, 8, 8), disc_channels=(8, 8), aae_blocks=1,
             unet_channels=(32, 32), unet_attention=(1,), cond_channels=8, cond_width=8, detail_channels=(8, 8, 8))}


def measure(name, peer, quick):
    """Measure a row in this process -> list of dicts (one, or one a sampler, a convolution, a count)."""
    import timing
    function, how = rows(peer)[name]
    module, function = function.split('.')
    preset, note = how.get('preset'), how.pop('note', '')
    if quick:
        how.update(least=1, budget=0, warm=0)
        if preset:
            how['words'] = how.get('words', []) + QUICK[timing.settings(preset).spatial_dims]
            how.pop('probe', None)
        if name.endswith('/sample'):
            how.update(items=1, ddim=(1, 2), ddpm=(1, 2))
        if name == 'peak':
            how.update(size_2d=(8, 8), size_3d=(8, 8, 8), batch=1)
    if name == 'growth/subjects':
        how = dict(counts=(1, 2), shape=(64, 64, 4)) if quick else how
    if 'processes' in name:
        timing.torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get('WORLD_SIZE', 1))))
    found = getattr(import_module(module), function)(**how)
    size = 'x'.join(map(str, timing.settings(preset, how.get('words', ())).image_size)) if preset else ''
    lines = []
    for row in found if isinstance(found, list) else [found]:
        row = dict(name=name, size=size) | row
        if 'sampler' in row:
            row['name'] = f'{name.removesuffix("/sample")}/{row["sampler"]}'
        lines.append(row | dict(note='; '.join(filter(None, [note, row.get('note', '')]))))
    return lines


# ------------------------------------------------------------------------------------------------------------------
# The parent: one process a row, rows kept as they come

def machine():
    """Processor (and GPU), cores, PyTorch."""
    import torch
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        names = [x.split(':')[1].strip() for x in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in x]
        name = names[0] if names else name
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    return f'{name}{gpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}'


def busy():
    """Seconds that all processes together, and that our finished children have kept the cores busy."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        ticks = [int(x) for x in Path('/proc/stat').read_text().split('\n')[0].split()[1:9]]
    except OSError:
        return None
    everyone = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for the disk
    return everyone / os.sysconf('SC_CLK_TCK') - children.ru_utime - children.ru_stime


def command_of(name, args, *more):
    """The command that measures a row in a process of its own."""
    return [sys.executable, os.path.abspath(__file__), '--row', name, '--peer', args.peer or '', '--limit_gb',
            str(args.limit_gb), *['--quick'] * args.quick, *more]


def run_row(name, args):
    """Measure a row in a process of its own, or two in turn -> (rows, or the sentence why there are none)."""
    function, how = rows(args.peer)[name]
    before, began, command = busy(), time.perf_counter(), command_of(name, args)
    if function == 'turns.in_turn':
        try:
            found = [turns.in_turn(*[command_of(row, args, '--turns') for row in how['names']],
                                   rounds=2 if args.quick else how['rounds']) | dict(name=name)]
        except RunError as error:
            return str(error)
        wall, after = time.perf_counter() - began, busy()
        return [row | dict(others_cores=others(before, after, wall)) for row in found]
    processes = int(name.split('/')[-1]) if 'processes' in name else 1
    if processes > 1:
        command[1:1] = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, busy()
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith('ROW ')]
    if done.returncode == 77:
        return [dict(name=name, note=f'stopped: more than {args.limit_gb:.0f} GB')]
    if done.returncode or not found:
        return (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
    if processes > 1:
        found[0]['seconds_subject'] = found[0]['seconds_subject'] / processes
    return [row | dict(others_cores=others(before, after, wall)) for row in found]


def others(before, after, wall):
    """Cores that other processes kept busy meanwhile, from busy() before and after."""
    return None if before is None else round(max(0.0, after - before) / wall, 2)


def peak_now(row):
    """GFLOP/s at this moment of the convolution of a peak row; None without one."""
    if not row:
        return None
    import timing
    _, conv, precision, layout = row['name'].split('/')
    size = tuple(int(n) for n in row['size'].split('x'))
    work = timing.peak_work(int(conv[4]), precision, layout, size, int(row['batch']))
    return timing.repeat(work, least=9, budget=0)['gflops']


def read(path):
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return [r for r in csv.DictReader(f) if None not in r.values() and r.get('code')]  # whole lines only


def text(value):
    return f'{value:.4g}' if isinstance(value, float) else value


def write(f, lines, header=False):
    writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore')
    if header:
        writer.writeheader()
    writer.writerows({k: text(v) for k, v in line.items()} for line in lines)


def matches(name, pattern):
    return fnmatch.fnmatch(name, pattern) if set(pattern) & set('*?') else pattern in name


def available_gb():
    """Memory that is free for us, GB."""
    try:
        line = next(x for x in Path('/proc/meminfo').read_text().splitlines() if x.startswith('MemAvailable'))
        return int(line.split()[1]) / 1e6
    except (OSError, StopIteration):
        return 0.0


def describe(line):
    """A row as one line for people."""
    def shown(key, unit, factor=1.0):
        return f'{float(line[key]) * factor:9.3g} {unit}' if line.get(key) not in (None, '') else ' ' * (10 + len(unit))
    columns = (('ratio', 'x', 1), ('seconds_step', 's', 1), ('memory_mb', 'GB', 1e-3), ('tflop', 'TFLOP', 1),
               ('gflops', 'GFLOP/s', 1), ('share_of_peak', '% peak', 100), ('loading', '% loading', 100),
               ('seconds_subject', 's/subject', 1))
    return f'{line["name"]:<40}' + ''.join(shown(*c) for c in columns) + f'  {line.get("note") or ""}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--peer', default='', help='monai: the same rows for MONAI')
    parser.add_argument('--only', default='', metavar='PATTERN', help='only rows whose name contains or matches this')
    parser.add_argument('--quick', action='store_true', help='tiny sizes, to see that all works; no figure counts')
    parser.add_argument('--restart', action='store_true', help='measure anew what is in the table already')
    parser.add_argument('--limit_gb', type=float, default=0.0, metavar='GB',
                        help='stop a row that holds more (default: 85 %% of what is available)')
    parser.add_argument('--row', default='', help=argparse.SUPPRESS)
    parser.add_argument('--turns', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer not in ('', 'monai'):
        raise RunError(f"--peer is '{args.peer}', must be monai")
    if args.row:
        import timing
        timing.watch_memory(args.limit_gb)
        timing.Clock.turns = args.turns
        lines = measure(args.row, args.peer, args.quick)
        if os.environ.get('RANK', '0') == '0':
            print(*(f'ROW {json.dumps(line)}' for line in lines), sep='\n')
        return

    path = Path('result') / ('benchmark_quick.csv' if args.quick else 'benchmark.csv')
    wanted = [name for name in rows(args.peer) if matches(name, args.only)]
    if not wanted:
        raise RunError(f"--only '{args.only}' names no row; there are {', '.join(rows(args.peer))}")
    if args.peer:
        import peers
        peers.load_monai()
    args.limit_gb = args.limit_gb or 0.85 * available_gb()
    same = dict(machine=machine(), code=git_state())
    print(f'{same["machine"]}; {same["code"]}\nload average {os.getloadavg()[0]:.2f} before the first row'
          + (': the machine is not quiet' if os.getloadavg()[0] > 0.3 else ''))
    # Rows of this machine and commit are kept; a line that a kill cut short goes.
    kept = [r for r in read(path) if not args.restart and all(r[k] == v for k, v in same.items())]
    write_atomic(path, lambda f: write(f, kept, header=True), 'w')
    failed, began = [], time.perf_counter()
    for name in wanted:
        if name in {r['row'] for r in kept}:
            continue
        best = max((r for r in kept if r['row'] == 'peak'), key=lambda r: float(r['gflops']), default=None)
        before = peak_now(best)
        lines = run_row(name, args)
        now = [speed for speed in (before, peak_now(best)) if speed]
        if isinstance(lines, str):
            failed.append(f'{name}: {lines}')
            print(failed[-1])
            continue
        kept += [dict(row=name, **line, **same) for line in lines]
        peak = max([float(r['gflops']) for r in kept if r['row'] == 'peak'], default=None)
        for line in kept[-len(lines):]:
            line['speed'] = statistics.mean(now) / peak if now else None
            known = peak and line.get('gflops')
            line['share_of_peak'] = line['gflops'] / (peak * (line['speed'] or 1)) if known else None
            print(describe(line), flush=True)
        with open(path, 'a', newline='', encoding='utf-8') as f:
            write(f, kept[-len(lines):])
    lines = [f'{len(wanted) - len(failed)} of {len(wanted)} rows in {time.perf_counter() - began:.0f} s; {path}']
    for name, value, unit, note in conclusions({r['name']: r for r in kept}):
        lines.append(f'{name:<46} {value:10.3g} {unit}  {note}')
    print('\n'.join(lines))
    if failed:
        raise RunError(f'{len(failed)} rows could not be measured: ' + '; '.join(failed))


if __name__ == '__main__':
    cli(main)
