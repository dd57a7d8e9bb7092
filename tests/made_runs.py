"""The scripts with tiny networks on made data, in this process or as processes of their own."""
import contextlib
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent

# Networks that train a step in milliseconds, for the subjects of made_data.
NETWORKS = ('--aae_channels', '(8, 8, 8)', '--disc_channels', '(8, 8)', '--latent_channels', '4',
            '--unet_channels', '(8, 16)', '--cond_channels', '4', '--cond_width', '8', '--detail_channels', '(8, 8, 8)',
            '--regression_channels', '(8, 8)', '--warmup', '2', '--batch_size', '2', '--device', 'cpu')
DATA = ('--data_root', 'data', '--data_info', 'data/data_info', '--spacing', '(None, None, None)')
STROKE = (*DATA, '--image_size', '(16, 20)', '--frames', '6', *NETWORKS)
AMYLOID = ('--preset', 'mri2pet_demo', *DATA, '--image_size', '(16, 16, 16)', *NETWORKS)


def steps(n):
    """Words that set the steps of all stages, with a validation and a save every few."""
    every = str(max(1, n // 2))
    return ('--aae_steps', str(n), '--unet_steps', str(n), '--post_steps', str(n), '--regression_steps', str(n),
            '--eval_every', every, '--save_every', every, '--disc_start', '1', '--disc_ramp', '2')


def call(script, *words):
    """Run a script's main() in this process."""
    argv = sys.argv
    sys.argv = [f'{script}.py', *words]
    try:
        importlib.import_module(script).main()
    finally:
        sys.argv = argv
        release()


def release():
    """Let go of the lock that a stage of this process may still hold: it lives as long as its Stage."""
    import gc
    gc.collect()


def process(script, *words, before=''):
    """The finished process of `python script.py words`; `before` is Python that runs first in it."""
    return subprocess.run(command(script, *words, before=before), capture_output=True, text=True, timeout=300)


# ----------------------------------------------------------------------------------------------------------------------
# Many short runs: forked from a process that has imported everything, which is most of what starting a script takes

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['train_aae', 'train_unet', 'post_train', 'infer', 'plot', 'phantom', 'made_runs'])


def forked(script, *words, before='', env=None, timeout=900):
    """As `process`, in the present folder, but without the seconds that importing takes."""
    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place, name)) for name in ('stdout', 'stderr')]
        child = SERVER.Process(target=_child, args=(os.getcwd(), script, words, before, env or {}, files))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            raise TimeoutError(f'{script} {words} took more than {timeout} s')
        said = [Path(file).read_text(encoding='utf-8', errors='replace') for file in files]
        return subprocess.CompletedProcess([f'{script}.py', *words], child.exitcode, *said)


def _child(folder, script, words, before, env, files):
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    multiprocessing.set_start_method('fork', force=True)  # of loading processes, as in a script started by hand
    os.chdir(folder)
    os.environ.update(env)
    sys.argv = [f'{script}.py', *words]
    exec(before, {})
    runpy.run_path(str(REPO / f'{script}.py'), run_name='__main__')


def command(script, *words, before=''):
    if not before:
        return [sys.executable, str(REPO / f'{script}.py'), *words]
    code = f'{before}\nimport runpy, sys\nsys.argv[0] = "{script}.py"\n'
    return [sys.executable, '-c', code + f'runpy.run_path({str(REPO / script)!r} + ".py", run_name="__main__")', *words]


def loaded(path):
    return torch.load(path, weights_only=True)


def curve(path):
    """Rows of a CSV without the column of seconds."""
    rows = [line.split(',') for line in Path(path).read_text().split()]
    keep = [i for i, name in enumerate(rows[0]) if name != 'seconds']
    return [[row[i] for i in keep] for row in rows]


def differences(a, b, path=''):
    """Places where two nested structures differ (tensors bit for bit); empty if they are equal."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        return [d for key in a for d in differences(a[key], b[key], f'{path}/{key}')]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f'{path}/{i}')]
    return [] if a == b or (a != a and b != b) else [path]


@contextlib.contextmanager
def folder(path):
    """Work in a folder for a while."""
    Path(path).mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(path):
        yield Path(path)
