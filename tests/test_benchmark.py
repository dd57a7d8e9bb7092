"""benchmark.py: rows come from the scripts' own steps, the arithmetic of the table, and going on after a stop."""
import argparse
import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import config
import layers
import peers
import plain
import timed_inference
import timing
import train_unet
import turns
import utils
from model import AAE, Discriminator, UNet, count_parameters


def cost(net, *inputs, **more):
    """FLOPs of a forward pass and parameters, without computing anything (meta tensors)."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs, **more)
    return counter.get_total_flops(), count_parameters(net)


@pytest.mark.parametrize('count', [1, 2])
def test_the_flops_of_volumes_are_counted_without_gradient(count):
    """A single one in float32 goes to oneDNN by name (layers.py)."""
    layer, x = layers.conv(3, 6, 10), torch.randn(count, 6, 8, 9, 10)
    found = timing.repeat(torch.no_grad()(lambda: layer(x)), least=1, budget=0)
    assert found['tflop'] * 1e12 == pytest.approx(2 * count * 6 * 10 * 27 * 8 * 9 * 10)


@pytest.mark.parametrize('side', [16, 32])  # 256 and 1024 positions: written out, and PyTorch's own
def test_the_flops_of_attention_are_counted(side):
    net, x = layers.Attention(2, 64), torch.randn(1, 64, side, side, requires_grad=True)
    found = timing.repeat(lambda: net(x).sum().backward(), least=1, budget=0)['tflop'] * 1e12
    n = side ** 2
    products = 2 * 2 * n * n * 64 * (3 if n <= 512 else 3.5)  # the flash backward computes the scores once more
    assert found == pytest.approx(products + 3 * 2 * n * 64 * (3 * 64 + 64), rel=0.01)


@pytest.mark.parametrize('preset', ['ctp2dwi_demo', 'mri2pet_demo', 'ctp2dwi', 'mri2pet', 'lapt', 'il_cldm'])
def test_plain_modules_are_the_same_networks(preset):
    # Ratios against plain modules mean nothing unless these do the same work.
    cfg = config.load('', ['--preset', preset])
    size = (32,) * cfg.spatial_dims
    channels, sources = len(cfg.targets), timing.dataset.Spec.from_settings(cfg).source_channels
    with torch.device('meta'):
        image, source = torch.empty(1, channels, *size), torch.empty(1, sources, *size)
        z, t = torch.empty(1, cfg.latent_channels, *[n // 4 for n in size]), torch.zeros(1, dtype=torch.long)
        aae = cfg.spatial_dims, channels, cfg.latent_channels, cfg.aae_channels, cfg.aae_blocks
        disc = cfg.spatial_dims, channels, cfg.disc_channels
        unet = (cfg.spatial_dims, cfg.latent_channels, sources, cfg.unet_channels, cfg.unet_blocks, cfg.unet_attention,
                cfg.cond_channels, cfg.cond_width, cfg.num_classes)
        pairs = [(cost(AAE(*aae), image), cost(plain.PlainAAE(*aae), image)),
                 (cost(Discriminator(*disc), image), cost(plain.PlainDiscriminator(*disc), image)),
                 (cost(UNet(*unet), z, t, source=source, label=t),
                  cost(plain.PlainUNet(*unet), z, t, source=source, label=t))]
    for ours, stock in pairs:
        assert ours[0] == pytest.approx(stock[0], rel=0.1) and ours[1] == pytest.approx(stock[1], rel=0.1)


@pytest.mark.parametrize('name', ['ours/ctp2dwi_demo/aae', 'ours/mri2pet_demo/unet', 'ours/ctp2dwi_demo/post',
                                  'ours/ctp2dwi_demo/regression', 'plain/ctp2dwi_demo/unet',
                                  'plain/mri2pet_demo/aae'])
def test_a_training_step_is_the_scripts_own(name):
    before = train_unet.UNet, train_unet.Stage, timing.dataset.Cohort, timing.dataset.augment, sys.argv
    row, = benchmark.measure(name, '', quick=True)
    assert row['name'] == name and row['seconds_step'] > 0 and row['tflop'] > 0 and row['parameters'] > 0
    assert 0 < row['loading'] < 1 and row['memory_mb'] >= row['memory_import_mb'] > 0
    assert row['precision'] == ('fp32' if name.startswith('plain') else utils.Run().precision)
    assert before == (train_unet.UNet, train_unet.Stage, timing.dataset.Cohort, timing.dataset.augment, sys.argv)


def test_the_step_that_is_timed_trains(monkeypatch):
    # The loop, the optimiser and the average are the script's: after the row its weights have moved.
    seen = []

    def update(ema, net, step):
        pairs = zip(ema.net.parameters(), net.parameters(), strict=True)
        seen.append((step, sum(float((a - b).detach().abs().sum()) for a, b in pairs)))

    monkeypatch.setattr(utils.EMA, 'update', update)
    benchmark.measure('ours/ctp2dwi_demo/unet', '', quick=True)
    steps, moved = zip(*seen, strict=True)
    assert steps == tuple(range(len(steps))) and 0 < moved[0] < moved[-1]


def test_samplers_one_row_each():
    rows = benchmark.measure('ours/ctp2dwi_demo/sample', '', quick=True)
    assert [r['name'].split('/')[-1] for r in rows] == [
        'one_step', 'one_step_latent', 'detail_alone', 'image_grid', 'image_grid_one_view', 'ddim', 'ddpm']
    one, latent, detail, alone, view, ddim, ddpm = (r['tflop'] for r in rows)
    assert latent < one / 2 and one < ddim < ddpm
    assert alone <= detail < 1.2 * alone
    assert alone == pytest.approx(2 * view) and alone == pytest.approx(one - 2 * latent, rel=0.1)
    assert 'extrapolated from 1 and 2' in rows[-1]['note'] and 'scaled to 25' in rows[0]['note']
    eps = timed_inference.sample_rows('lapt', benchmark.QUICK[2], items=1, ddim=(1, 2), ddpm=(1, 2), warm=0,
                                      least=1, budget=0)
    assert [r['sampler'] for r in eps] == ['ddim', 'ddpm']


def test_extrapolation_is_a_line():
    def measure(n):
        return dict(seconds_step=2.0 + 0.5 * n, tflop=1.0 + 0.25 * n)

    row = timed_inference.extrapolate('ddpm', 1000, measure, (5, 15))
    assert row['seconds_subject'] == pytest.approx(502.0) and row['seconds_step'] == pytest.approx(0.5)
    assert row['tflop'] == pytest.approx(251.0) and row['gflops'] == pytest.approx(251e3 / 502)
    assert timed_inference.extrapolate('ddim', 50, measure, (50,))['note'] == ''


def test_the_clock_leaves_out_the_first_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
    clock, x = timing.Clock(warm=1, least=2, budget=0), torch.ones(4, 4)
    for seconds, last in ((100, False), (50, False), (3, False), (5, True)):
        x @ x
        now[0] += seconds
        clock.loading = seconds / 4
        assert clock.next() is last
    row = clock.result()
    assert row['seconds_step'] == 4 and row['steps'] == 2 and row['loading'] == pytest.approx(0.25)
    assert row['tflop'] == 2 * 4 ** 3 / 1e12  # of one step, not of four


@pytest.mark.parametrize('fast', [True, False])
def test_peaks_in_the_precisions_that_are_fast_here(fast, monkeypatch):
    monkeypatch.setattr(utils, 'fast_bf16', lambda: fast)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    rows = benchmark.measure('peak', '', quick=True)
    assert len({r['name'] for r in rows}) == (8 if fast else 4) and all(r['gflops'] > 0 for r in rows)
    assert {r['precision'] for r in rows} == ({'fp32', 'bf16'} if fast else {'fp32'})
    assert rows[0]['tflop'] == pytest.approx(2 * 9 * 64 * 64 * 64 / 1e12)


def test_cohorts():
    few, many = benchmark.measure('growth/subjects', '', quick=True)
    sizes = [float(r['note'].split()[-2]) for r in (few, many)]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05) and sizes[0] > 0.1


def test_every_row_has_known_settings():
    for peer in ('', 'monai'):
        for name, (function, how) in benchmark.rows(peer).items():
            module, attribute = function.split('.')
            assert hasattr(import_module(module), attribute)
            assert set(how.get('names', [])) <= set(benchmark.rows(peer))
            if 'preset' in how:
                timing.settings(how['preset'], [*how.get('words', []), *how.get('probe', [])])
                assert how.get('stage') in (None, 'aae', 'unet', 'post', 'regression') and name


def test_what_a_gpu_can_take():
    def row(name, size, batch, memory):
        return dict(name=name, size=size, batch=str(batch), memory_mb=str(memory), parameters='1e6')

    made = [row('growth/batch/ctp2dwi/unet/4', '192x224', 4, 1000 + 4 * 43.008),
            row('growth/batch/ctp2dwi/unet/1', '192x224', 1, 1000 + 43.008)]
    found = {name: value for name, value, *_ in benchmark.conclusions({r['name']: r for r in made})}
    assert found['activations ctp2dwi unet'] == pytest.approx(1000)  # 43.008 MB for 192 x 224 voxels
    assert found['24 GB GPU ctp2dwi unet'] == (24e9 - 20e6 - 1e9) // 43.008e6
    assert found['80 GB GPU ctp2dwi unet'] > 3 * found['24 GB GPU ctp2dwi unet']


def test_ratios():
    table = {'ratio/plain/ctp2dwi_demo/aae': dict(name='', ratio='0.25')}
    assert [v[:2] for v in benchmark.conclusions(table)] == [('time/plain ctp2dwi_demo aae', 0.25)]


PLAYER = '''import sys
print('warming up')
print('TURN 9', flush=True)
for n, line in enumerate(sys.stdin):
    print(f'TURN {{{seconds} * (n + 1)}}', flush=True)
'''


def test_two_programs_take_steps_in_turn():
    commands = [[sys.executable, '-c', PLAYER.format(seconds=seconds)] for seconds in (3, 4)]
    row = turns.in_turn(*commands, rounds=5)  # both become slower, alike
    assert row['ratio'] == pytest.approx(0.75) and row['seconds_step'] == 9 and row['steps'] == 5
    assert '12 s; ratios 0.75 .. 0.75' in row['note']
    with pytest.raises(utils.RunError, match='has stopped'):
        turns.in_turn(commands[0], [sys.executable, '-c', 'exit(1)'], rounds=2)


def test_choosing_the_fastest_setting_takes_no_turn(monkeypatch, capsys):
    """The choice runs fewer samples: taken as turns, its steps made the other program look fast."""
    monkeypatch.setattr(timing.Clock, 'turns', True)
    monkeypatch.setattr(sys, 'stdin', None)  # nobody says go
    cfg, built = timing.settings('ctp2dwi_demo'), []

    def build(cfg, run, batch, place):
        built.append(run.precision)
        return lambda: None, torch.nn.Identity()

    assert peers.best_way(cfg, build, 'ctp2dwi_demo', [])[2].split()[1] in ('contiguous', 'channels_last')
    assert built == [p for p, _ in peers.layouts(cfg)] * 3 and 'TURN' not in capsys.readouterr().out


@pytest.mark.slow
def test_rows_are_measured_in_turn():
    args = argparse.Namespace(peer='', quick=True, limit_gb=0)
    row, = benchmark.run_row('ratio/plain/ctp2dwi_demo/aae', args)
    assert row['name'] == 'ratio/plain/ctp2dwi_demo/aae' and row['ratio'] > 0 and row['others_cores'] is not None


@pytest.fixture
def run_benchmark(monkeypatch):
    """main() in this process, rows made up; returns (call with arguments, names of the rows measured)."""
    measured = []

    def row(name, args):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(name)
        value = dict(name=name, seconds_step=1.0, gflops=50.0, note='')
        return [value | dict(name=f'peak/{k}', gflops=100.0 * k) for k in (1, 2)] if name == 'peak' else [value]

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *words])
        monkeypatch.setattr(benchmark, 'run_row', row)
        benchmark.main()

    monkeypatch.setattr(benchmark, 'rows', lambda peer: dict.fromkeys(['peak', 'a', 'b', 'c', 'd']))
    monkeypatch.setattr(benchmark, 'peak_now', lambda row: row and 160.0)
    return call, measured


def test_an_interrupted_run_goes_on(run_benchmark, capsys):
    call, measured = run_benchmark
    with pytest.raises(KeyboardInterrupt):
        call()
    with open('result/benchmark.csv', 'a') as f:
        f.write('b,b,1.0')  # a line cut short by a kill
    kept = list(measured)
    measured.clear()
    call()
    assert kept == ['peak', 'a', 'b'] and measured == ['c', 'd']
    table = benchmark.read(benchmark.Path('result/benchmark.csv'))
    assert [r['name'] for r in table] == ['peak/1', 'peak/2', 'a', 'b', 'c', 'd']
    assert [r['share_of_peak'] for r in table] == ['0.5', '1'] + 4 * ['0.3125']
    assert [r['speed'] for r in table] == ['', ''] + 4 * ['0.8']
    measured.clear()
    call('--restart', '--only', 'a')
    assert measured == ['peak', 'a']  # both names hold an a
    assert len(benchmark.read(benchmark.Path('result/benchmark.csv'))) == 3


@pytest.mark.parametrize('words, sentence', [
    (('--only', 'no_such_row'), 'names no row'), (('--peer', 'keras'), "--peer is 'keras', must be monai")])
def test_bad_arguments_are_one_sentence(words, sentence, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *words])
    with pytest.raises(utils.RunError, match=sentence):
        benchmark.main()


@pytest.mark.slow
def test_the_script(repo):
    """Rows in processes of their own, two of them under torchrun, and a row that needs too much memory."""
    def call(*words):
        return subprocess.run([sys.executable, repo / 'benchmark.py', '--quick', *words], capture_output=True,
                              text=True)

    done = call('--only', 'growth/processes')
    assert done.returncode == 0, done.stderr
    assert 'throughput 2 processes/1' in done.stdout and 'load average' in done.stdout
    done = call('--only', 'ours/ctp2dwi_demo/aae', '--limit_gb', '0.1')
    assert done.returncode == 0 and 'stopped: more than 0 GB' in done.stdout
    row = call('--row', 'peak').stdout.splitlines()[0]
    assert json.loads(row.removeprefix('ROW '))['gflops'] > 0
