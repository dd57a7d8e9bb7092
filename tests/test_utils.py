"""Plumbing: files that are whole or not there, checkpoints that execute nothing, keyed seeds, schedules of the step."""
import errno
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optim
import utils
from utils import RunError


def sentence(error):
    """The one sentence of an error raised for the user."""
    text = str(error.value)
    assert error.value.one_sentence and '\n' not in text
    return text


# ------------------------------------------------------------------------------------------------------------------
# Files

def test_write_atomic_replaces_only_when_all_is_written():
    path = Path('sub/folder/file.bin')
    utils.write_atomic(path, lambda f: f.write(b'first'))
    assert path.read_bytes() == b'first'

    def half(f):
        f.write(b'half of the sec')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomic(path, half)
    assert path.read_bytes() == b'first' and [p.name for p in path.parent.iterdir()] == ['file.bin']
    utils.write_atomic(path, lambda f: f.write('text\n'), 'w')
    assert path.read_bytes() == b'text\n'


def test_write_atomic_killed_in_the_middle_leaves_the_old_file():
    code = ('import os, signal, utils\n'
            'def write(f):\n'
            '    f.write(b"half"); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n'
            'utils.write_atomic("file.bin", lambda f: f.write(b"old"))\n'
            'utils.write_atomic("file.bin", write)')
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert Path('file.bin').read_bytes() == b'old'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_a_full_disk_is_one_sentence_and_the_old_file_stays(monkeypatch, capsys):
    """Writes go to /dev/full, which the system refuses as a full disk does: with a torch.save and with plain text."""
    utils.save_checkpoint('a.pth.tar', dict(kind='aae', step=1))
    old = Path('a.pth.tar').read_bytes()
    monkeypatch.setattr(utils, 'open', lambda path, mode, **more: open('/dev/full', mode, **more), raising=False)
    for write in (lambda: utils.save_checkpoint('a.pth.tar', dict(kind='aae', x=torch.zeros(300000))),
                  lambda: utils.write_atomic('a.pth.tar', lambda f: f.write('x' * 100000), 'w')):
        with pytest.raises(SystemExit) as caught:
            utils.cli(write)
        text = str(caught.value.code)
        assert 'a.pth.tar' in text and '\n' not in text
        assert 'No space left' in text or 'is the disk full' in text
        assert Path('a.pth.tar').read_bytes() == old
        assert os.listdir() == ['a.pth.tar']


def test_errors_for_the_user_are_one_line_and_others_keep_their_traceback():
    def full():
        raise OSError(errno.ENOSPC, 'No space left on device', 'x.csv')

    def missing():
        raise FileNotFoundError(errno.ENOENT, 'No such file or directory', 'train.txt')

    def user():
        raise RunError('set it back')

    def memory():
        raise torch.OutOfMemoryError('CUDA out of memory. Tried ...')

    def interrupted():
        raise KeyboardInterrupt

    found = []
    for main in (full, missing, user, memory, interrupted):
        with pytest.raises(SystemExit) as caught:
            utils.cli(main)
        found.append(caught.value.code)
    assert found[0] == 'x.csv: No space left on device; free some space and run the same command again'
    assert found[1] == 'train.txt: No such file or directory' and found[2] == 'set it back'
    assert 'set accumulate' in found[3] and 'run the same command again' in found[4]
    with pytest.raises(ZeroDivisionError):
        utils.cli(lambda: 1 / 0)


@pytest.mark.parametrize('text, start', [
    ('NCCL error in: x.cpp:3, remote process exited\nncclRemoteError: A call failed', 'another process of this'),
    ('[Rank 1] NCCL error in: x.cpp:3, unhandled system error\nncclSystemError: System call failed.\nLast error:\n'
     'Error while creating shared memory segment /dev/shm/nccl-1',
     'the GPUs cannot work together: Error while creating shared memory segment /dev/shm/nccl-1 (NCCL_DEBUG')])
def test_what_several_gpus_say(monkeypatch, text, start):
    monkeypatch.setattr(utils.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(utils.dist, 'destroy_process_group', lambda: None)

    def main():
        raise utils.dist.DistBackendError(text)

    with pytest.raises(SystemExit) as caught:
        utils.cli(main)
    assert caught.value.code.startswith(start)


def test_processes_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RunError) as caught:
        utils.Run('cuda:0')
    assert "device 'cuda:0' would be that of all 2 processes" in sentence(caught)


class Malicious:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def test_a_malicious_checkpoint_is_refused_and_executes_nothing():
    torch.save(dict(kind='aae', net=Malicious()), 'a.pth.tar')
    Path('b.pth.tar').write_bytes(pickle.dumps(Malicious()))
    for path in ('a.pth.tar', 'b.pth.tar'):
        with pytest.raises(RunError) as caught:
            utils.load_checkpoint(path, 'aae')
        assert path in sentence(caught) and 'refused' in sentence(caught)
        assert not os.path.exists('executed')
    pickle.loads(Path('b.pth.tar').read_bytes())
    assert os.path.exists('executed')  # so it would have


def test_a_checkpoint_that_is_not_one():
    utils.save_checkpoint('whole.pth.tar', dict(kind='aae', step=3, net=dict(w=torch.arange(9000.0))))
    assert torch.equal(utils.load_checkpoint('whole.pth.tar', 'aae')['net']['w'], torch.arange(9000.0))
    whole = Path('whole.pth.tar').read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(9000.0).numpy().tobytes()) + 20000] ^= 64  # one bit of one weight
    cases = {'flipped': bytes(flipped), 'truncated': whole[:len(whole) // 2], 'short': whole[:10], 'empty': b'',
             'text': b'no checkpoint\n' * 99}
    for name, content in cases.items():
        Path(name).write_bytes(content)
        with pytest.raises(RunError) as caught:
            utils.load_checkpoint(name, 'aae')
        assert sentence(caught).startswith(name)
        assert 'truncated or not a checkpoint' in sentence(caught) or 'is refused: it is damaged' in sentence(caught)
    with pytest.raises(RunError) as caught:
        utils.load_checkpoint('nowhere.pth.tar', 'unet')
    assert 'nowhere.pth.tar does not exist; run python train_unet.py first' in sentence(caught)


@pytest.mark.parametrize('data, found', [(dict(kind='unet'), "'unet'"), (dict(model=1), 'None'), ([1, 2], 'None')])
def test_a_checkpoint_of_another_kind(data, found):
    torch.save(data, 'a.pth.tar')
    with pytest.raises(RunError) as caught:
        utils.load_checkpoint('a.pth.tar', 'aae')
    assert f"not a checkpoint of kind 'aae' of this software (found {found})" in sentence(caught)


def test_weights_of_another_shape_are_one_sentence():
    with pytest.raises(RunError) as caught:
        utils.load_weights(nn.Linear(3, 4), nn.Linear(3, 5).state_dict(), 'a.pth.tar')
    assert 'a.pth.tar holds a network of another shape' in sentence(caught)
    assert '5, 3' in sentence(caught) and '4, 3' in sentence(caught)
    with pytest.raises(RunError) as caught:
        utils.load_weights(nn.Linear(3, 4), {'other': torch.zeros(1)}, 'a.pth.tar')
    assert 'another shape' in sentence(caught)


def test_old_folders_are_counted_up():
    folder = Path('result')
    assert [utils.old_folder(folder).name for _ in range(3)] == ['old_1', 'old_2', 'old_3']
    (folder / 'old_9').mkdir()
    assert utils.old_folder(folder).name == 'old_10'


# ------------------------------------------------------------------------------------------------------------------
# Randomness and schedules

def test_seeds_differ_with_every_key_and_are_the_same_tomorrow():
    keys = [(s, r, step) for s in range(3) for r in range(3) for step in range(50)]
    seeds = {utils.seed_key(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert utils.seed_key(1, 'sub-01') != utils.seed_key(1, 'sub-02') != utils.seed_key('1', 'sub-02')
    code = 'import utils; print(utils.seed_key(0, "sub-01", 7))'
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           env=dict(os.environ, PYTHONHASHSEED='77'))
    assert int(other.stdout) == utils.seed_key(0, 'sub-01', 7)


def test_seed_everything_gives_the_same_noise_again():
    draws = []
    for step in (3, 4, 3):
        utils.seed_everything(0, 0, step)
        draws.append(torch.randn(5))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_learning_rate_by_hand():
    lr = [utils.lr_at(step, 1000, 2.0, 10) for step in (0, 4, 9, 500, 1000, 2000)]
    assert lr[0] == pytest.approx(0.2, rel=1e-3) and lr[1] == pytest.approx(1.0, rel=1e-3)
    assert lr[2] == pytest.approx(2.0, rel=1e-3)
    assert lr[3] == pytest.approx(2 * (0.01 + 0.99 / 2)) and lr[4] == lr[5] == pytest.approx(0.02)
    assert utils.lr_at(0, 0, 1.0, 1) > 0  # no steps at all divide nothing by 0
    rates = [utils.lr_at(step, 1000, 2.0, 10) for step in range(10, 1001)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_set_lr_honours_the_scale_of_a_group():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    opt = optim.make('adam', [(a, 1.0), (b, 3.0)])
    utils.set_lr(opt, 0.5)
    assert [group['lr'] for group in opt.param_groups] == [0.5, 1.5]


def test_ema_by_hand():
    net = nn.BatchNorm1d(1)
    nn.init.constant_(net.weight, 0.0)
    ema = utils.EMA(net, 0.5)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.running_mean.fill_(7.0)
    ema.update(net, 0)
    assert float(ema.net.weight) == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    assert float(ema.net.running_mean) == 7  # buffers are copied
    with torch.no_grad():
        net.weight.fill_(2.0)
    ema.update(net, 1000)
    assert float(ema.net.weight) == pytest.approx(0.5 * 0.9 + 0.5 * 2)
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    again = utils.EMA(nn.BatchNorm1d(1), 0.5)
    again.load_state_dict(ema.state_dict())
    assert float(again.net.weight) == float(ema.net.weight)


# ------------------------------------------------------------------------------------------------------------------
# Run

def test_run_refuses_what_the_machine_does_not_have():
    for device in ('cuda:99', 'tpu'):
        with pytest.raises(RunError) as caught:
            utils.Run(device)
        assert f"device '{device}' cannot be used here" in sentence(caught)
    with pytest.raises(RunError) as caught:
        utils.Run('cpu', 'fp16')
    assert 'fp16' in sentence(caught)
    run = utils.Run('cpu', 'fp32')
    assert run.main and run.world == 1 and run.gather([1, 2]) == [1, 2]
    assert 'cpu' in run.describe() and 'fp32' in run.describe()


def test_one_process_of_torchrun_speaks_to_a_group(monkeypatch):
    """The very calls that many processes make: on a single GPU they can be tried."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, TORCHELASTIC_RUN_ID='x', MASTER_ADDR='127.0.0.1',
                            MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    run, net, called = utils.Run('cpu', 'fp32'), nn.Linear(2, 1), []
    try:
        for name in ('all_reduce', 'all_gather_object', 'broadcast', 'barrier'):
            real = getattr(torch.distributed, name)
            monkeypatch.setattr(torch.distributed, name,
                                lambda *a, name=name, real=real: called.append(name) or real(*a))
        before = [p.clone() for p in net.parameters()]
        run.same_start(net)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert run.gather([1, 2]) == [1, 2] and run.mean(torch.tensor([3.0])).item() == 3
        run.barrier()
        assert set(called) == {'all_reduce', 'all_gather_object', 'broadcast', 'barrier'}
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_is_on_in_bf16_only():
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
        with utils.Run('cpu', precision).autocast():
            assert net(x).dtype == dtype


@pytest.mark.parametrize('flags, two, three', [({'avx2', 'fma'}, False, True), ({'avx2', 'avx512f'}, True, True),
                                               (set(), False, True)])
@pytest.mark.parametrize('training', [True, False])
def test_which_networks_are_channels_last_on_a_cpu(monkeypatch, flags, two, three, training):
    """Volumes always; slices in inference, and where AVX-512 makes it fast in training; there not on small grids."""
    monkeypatch.setattr(utils, 'cpu_flags', lambda: flags)
    run, small = utils.Run('cpu', 'fp32', training=training), 'avx512f' not in flags
    for layer, dims, expected in ((nn.Conv2d, 2, two or not training), (nn.Conv3d, 3, three)):
        last = dict(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
        for grid, here in (((), expected), ((64, 64, 64)[:dims], expected), ((16, 18, 4)[:dims], small and expected)):
            weight = run.place(layer(8, 8, 3), grid).weight
            assert weight.is_contiguous(**last) is here and weight.is_contiguous() is not here


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is always fast')
@pytest.mark.parametrize('flags, kind', [({'avx2'}, 'slow'), ({'avx512f', 'avx512_bf16'}, 'bf16'),
                                         ({'avx512_bf16', 'amx_bf16'}, 'fast')])
def test_machines_are_told_apart(monkeypatch, flags, kind):
    monkeypatch.setattr(utils, 'cpu_flags', lambda: flags)
    assert utils.machine() == (kind, torch.get_num_threads())
    assert utils.Run('cpu').precision == ('fp32' if kind == 'slow' else 'bf16')


def test_the_flags_of_this_cpu_are_read(monkeypatch):
    text = 'processor : 0\nflags\t\t: fpu sse2 avx512_bf16\nbugs : none\nprocessor : 1\nflags : fpu\n'
    monkeypatch.setattr(Path, 'read_text', lambda path: text)
    assert utils.cpu_flags() == {'fpu', 'sse2', 'avx512_bf16'} and utils.fast_bf16()
    monkeypatch.setattr(Path, 'read_text', lambda path: 'processor : 0\nFeatures : fp asimd\n')
    assert utils.cpu_flags() == set() and not utils.fast_bf16()


def test_update_clips_steps_and_returns_the_norm():
    run, net = utils.Run('cpu', 'fp32'), nn.Linear(1, 1, bias=False)
    opt = torch.optim.SGD(net.parameters(), lr=1.0)
    before = float(net.weight.detach())
    run.backward((3 * net.weight).sum())
    assert float(run.update(opt, clip=0.5)) == pytest.approx(3)
    assert float(net.weight.detach()) == pytest.approx(before - 0.5, rel=1e-4)
    assert net.weight.grad is None


def test_in_batches_gives_what_one_batch_gives():
    net, x = nn.Conv2d(2, 2, 3, padding=1), np.random.default_rng(0).normal(size=(7, 2, 5, 6)).astype(np.float32)
    run = utils.Run('cpu', 'fp32')
    whole = net(torch.from_numpy(x)).detach().numpy()
    for groups in ([[0], [1, 2, 3, 4, 5, 6]], [[6, 0, 3], [2, 1, 4, 5]], [list(range(7))]):
        found = utils.in_batches(run, net, [(numbers, (slice(0, 5), slice(0, 6))) for numbers in groups], x)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, whole, atol=1e-5)


def test_in_batches_of_boxes():
    net, x = nn.Conv2d(2, 2, 1), np.random.default_rng(0).normal(size=(3, 2, 5, 6)).astype(np.float32)
    found = utils.in_batches(utils.Run('cpu', 'fp32'), net, [([2, 0], (slice(1, 4), slice(2, 6)))], x)
    whole = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found[[2, 0], :, 1:4, 2:6], whole[[2, 0], :, 1:4, 2:6], atol=1e-5)
    assert (found[1] == -1).all() and (found[:, :, 0] == -1).all() and (found[:, :, :, :2] == -1).all()


def test_a_quarter_of_the_cosine():
    assert utils.lr_at(250, 1000, 1.0, 1) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
