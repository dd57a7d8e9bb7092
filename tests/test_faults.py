"""Bad input and faults, each met by the command of a user: one sentence, no traceback, and what docs/FAULTS.md says.

python tests/test_faults.py writes the document from what the commands say.
"""
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import conftest  # noqa: F401  (the paths, where this file is run as a script)
import made_data
import made_faults
import made_runs
import pytest

LIMIT = '''import os, resource
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
'''
DOCUMENT = made_runs.REPO / 'docs' / 'FAULTS.md'
HEAD = '''# What happens when something is wrong

Each line was run as it stands here, on four small made subjects and an experiment `exp_1` trained for two steps, after
the fault named above it (`tests/made_faults.py` has it in code). Below it is the sentence in which the command ended,
with exit code 1 (2 where the command line itself is not understood, 0 where what was asked for was done); none ended in
a traceback, and no checkpoint that was there before was lost. `(ulimit -f N; ...)` stands for a full disk:
no file may grow beyond N KiB. `$TINY` and `$PET` are the settings of tiny networks for the made subjects of both tasks:

    TINY  {tiny}

    PET   {pet}

Written by `python tests/test_faults.py`; `python -m pytest -m slow tests/test_faults.py` runs all lines again and
compares. {count} faults.
'''


def make_base(work):
    """Made subjects of both tasks and their trained experiments, exp_1 and exp_pet."""
    with made_runs.folder(work):
        made_data.write_stroke('data')
        made_data.write_amyloid('pet')
        for words in (made_faults.TINY, made_faults.PET + ' --exp exp_pet'):
            words = made_faults.shlex.split(words)
            for script in ('train_aae', 'train_unet', 'post_train'):
                made_runs.call(script, *words)
        words = made_faults.shlex.split(made_faults.TINY)
        made_runs.call('infer', *words)


def run(fault, work, base):
    """The sentence in which a command ended, from a fresh copy of the base; AssertionError if all is not as it must."""
    shutil.rmtree(work)
    shutil.copytree(base, work, copy_function=shutil.copy2)
    with made_runs.folder(work):
        if fault.prepare:
            fault.prepare()
        before = {path: path.read_bytes() for path in Path('result').glob('*/*.pth.tar') if path.is_file()}
        script, *words = fault.words()
        limit = LIMIT.format(bytes=1024 * fault.limit)
        if script.endswith('.sh'):
            done = subprocess.run(['bash', str(made_runs.REPO / script), *words], capture_output=True, text=True,
                                  env=os.environ | (fault.env or {}))
        else:
            before_it = (limit if fault.limit else '') + fault.before
            done = made_runs.forked(script[:-3], *words, env=fault.env, before=before_it)
        made_faults.held = None
        said = done.stdout + done.stderr
        assert 'Traceback' not in said and not Path('harm').exists(), said[-3000:]
        assert done.returncode == fault.code, f'exit code {done.returncode}: {said[-3000:]}'
        assert {path: path.read_bytes() for path in before} == before, 'a checkpoint was changed'
        where = said if fault.says else done.stderr
        lines = [line.strip() for line in re.split('[\r\n]', where) if line.strip().startswith(fault.says)]
        return plain(next(line for line in lines if line) if fault.says else lines[-1] if lines[-1] else lines[-2])


def plain(text):
    """A sentence without what differs from machine to machine."""
    text = text.replace(f'{os.getcwd()}/', '').replace(f'{made_runs.REPO}/', '')
    text = re.sub(r'-[0-9a-f]{16}\.npy', '-0123456789abcdef.npy', text)
    text = re.sub(r'\b[0-9a-f]{16}\b(?!\d)', '0123456789abcdef', text)
    return re.sub(r'(cannot be used here: |cannot reach the others \().*?(?=; |\))', r'\1...', text)


def document(sections):
    """docs/FAULTS.md; sections: {name: [(fault, sentence)]}."""
    count = sum(map(len, sections.values()))
    lines, number = [HEAD.format(count=count, tiny=made_faults.TINY, pet=made_faults.PET)], 0
    for name, rows in sections.items():
        lines += [f'## {name}', '']
        for fault, sentence in rows:
            number += 1
            lines += [f'{number}. {fault.what}', '', f'       {fault.shown()}', f'       {sentence}', '']
    return '\n'.join(lines)


def test_the_document_holds_every_fault_of_the_table():
    text, faults = DOCUMENT.read_text(), [fault for rows in made_faults.TABLE.values() for fault in rows]
    assert len(faults) >= 60 and f' {len(faults)} faults' in text.replace('\n', ' ')
    assert [fault.what for fault in faults] == re.findall(r'^\d+\. (.*)$', text, flags=re.M)
    assert all(f'       {fault.shown()}\n' in text for fault in faults)
    scripts = {fault.command.split('.')[0] for fault in faults}
    assert scripts == {'train_aae', 'train_unet', 'post_train', 'infer', 'plot', 'phantom', 'dataset', 'demo',
                       'pictures'}


@pytest.mark.slow
def test_every_fault_ends_in_the_sentence_of_the_document(tmp_path):
    text, found = DOCUMENT.read_text(), every(tmp_path)
    wrong = [f'{fault.what}: {sentence}' for rows in found.values() for fault, sentence in rows
             if f'       {fault.shown()}\n       {sentence}\n' not in text]
    assert not wrong, '\n'.join(wrong + ['python tests/test_faults.py writes the document anew'])


def every(folder, only='', failures=None):
    """{section: [(fault, sentence)]} of all faults, or of those whose line holds `only`."""
    work, base, found = Path(folder, 'work'), Path(folder, 'base'), {}
    if not base.exists():
        make_base(work)
        shutil.copytree(work, base, copy_function=shutil.copy2)
    for name, faults in made_faults.TABLE.items():
        found[name] = []
        for fault in faults:
            if only in f'{fault.what} {fault.command}':
                try:
                    found[name].append((fault, run(fault, work, base)))
                except Exception as error:
                    if failures is None:
                        raise AssertionError(f'{fault.what}: {error}') from error
                    failures.append(f'*** {fault.what}: {error}')
    return found


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as place:
        DOCUMENT.write_text(document(every(place)))
