"""The floor plan as a test: imports point down, training draws no figures, and no room is too large to read."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(REPO.glob('*.py'))
NAMES = {file.stem for file in FILES}

LEAVES = {'config', 'settings', 'dataset', 'model', 'diffusion', 'losses', 'metrics', 'utils',
          'layers', 'stage', 'optim',                            # model.py and utils.py, split by name
          'volume', 'grid', 'splits', 'check', 'subject', 'loader',  # dataset.py, split by name; it is their door
          'prior', 'quality', 'status',                              # beside metrics.py: trust, amyloid status
          'anatomy', 'stroke', 'amyloid', 'describe',            # the parts of phantom.py
          'experiment', 'charts', 'montage', 'report'}           # the parts of plot.py
SCRIPTS = {'phantom', 'translate', 'evaluate', 'outputs', 'train_aae', 'train_unet', 'post_train', 'infer', 'plot',
           'pictures', 'benchmark', 'study', 'trials', 'tables', 'monai_ldm',
           'timing', 'timed_inference', 'turns', 'conclusions', 'plain', 'peers'}  # the parts of benchmark.py
MORE = {                                                         # what else a file may import of ours
    'config': {'settings'},
    'model': {'layers', 'prior'},
    'stage': {'utils'},
    'infer': {'translate', 'evaluate', 'outputs'},               # infer.py, split by name
    'outputs': {'translate', 'evaluate'},
    'grid': {'volume'},
    'splits': {'volume'},
    'check': {'volume'},
    'subject': {'volume', 'grid', 'splits', 'check'},
    'loader': {'grid'},
    'dataset': {'volume', 'grid', 'splits', 'check', 'subject', 'loader'},
    'train_unet': {'infer'},                                     # validation runs the very code that inference runs
    'post_train': {'infer'},
    'benchmark': {'timing', 'timed_inference', 'turns', 'conclusions', 'plain', 'peers'},
    'timing': {'train_aae', 'train_unet', 'post_train', 'translate'},  # the scripts' own steps, with a clock in them
    'plain': {'timing', 'train_aae', 'train_unet'},
    'timed_inference': {'timing', 'translate'},
    'peers': {'timing', 'timed_inference'},
    'monai_ldm': {'peers', 'evaluate', 'translate'},
    'study': {'trials', 'tables'},
    'tables': {'trials'},
}
TRAINING = {'train_aae', 'train_unet', 'post_train'}
MAX_LINES = 380


def is_main_block(node):
    """Whether a statement is `if __name__ == '__main__':`."""
    return isinstance(node, ast.If) and '__name__' in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}


def imports(node, main_block=True):
    """Yield (top-level module, line, is a star import) of every import below a node, in functions too."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name.split('.')[0], node.lineno, False
    elif isinstance(node, ast.ImportFrom):
        star = any(alias.name == '*' for alias in node.names)
        for name in [node.module] if node.module else [alias.name for alias in node.names]:
            yield name.split('.')[0], node.lineno, star
    elif main_block or not is_main_block(node):
        for child in ast.iter_child_nodes(node):
            yield from imports(child, main_block)


def tree(name):
    return ast.parse((REPO / f'{name}.py').read_text(encoding='utf-8'))


def allowed(name):
    """The files of ours that a file may import."""
    return (LEAVES if name in SCRIPTS else set()) | MORE.get(name, set())


def test_every_file_has_its_place():
    assert NAMES <= LEAVES | SCRIPTS, f'name the place of {NAMES - LEAVES - SCRIPTS} in LEAVES or SCRIPTS'


@pytest.mark.parametrize('name', sorted(NAMES))
def test_imports_point_down(name):
    # What dataset.py runs as a script is the one place outside the scripts that reads the settings, as a script does.
    found = list(imports(tree(name), main_block=name != 'dataset'))
    wrong = [f'{name}.py:{line} imports {other}' for other, line, _ in found if other in NAMES - allowed(name)]
    assert not wrong
    if name == 'dataset':
        assert {other for other, _, _ in imports(tree(name))} & NAMES <= allowed(name) | {'config', 'utils'}


@pytest.mark.parametrize('name', sorted(NAMES))
def test_no_star_imports(name):
    assert not [line for _, line, star in imports(tree(name)) if star]


@pytest.mark.parametrize('name', sorted(NAMES & TRAINING))
def test_training_never_imports_matplotlib(name):
    reached, todo = set(), [name]
    while todo:
        for other, _, _ in imports(tree(todo.pop()), main_block=False):
            if other in NAMES - reached:
                todo.append(other)
            reached.add(other)
    assert 'matplotlib' not in reached and 'plot' not in reached


def test_training_loads_no_matplotlib_through_others():
    names = ', '.join(['sys', *sorted(NAMES & (TRAINING | {'infer'}))])
    code = f'import {names}; sys.exit("matplotlib" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or 'matplotlib was loaded'


def test_config_is_free_of_torch():
    if 'config' in NAMES:
        assert 'torch' not in {other for other, _, _ in imports(tree('config'))}


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_room_is_readable_in_one_go(file):
    lines = len(file.read_text(encoding='utf-8').splitlines())
    assert lines <= MAX_LINES, f'{file.name} has {lines} lines: split it along a name that a newcomer would guess'
