"""What every test gets: the repository's files can be imported from any working folder, few threads, no screen."""
import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# Scripts that a test starts as processes inherit these. They are set before numpy and torch are imported.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')]))
os.environ['MPLBACKEND'] = 'Agg'
os.environ.setdefault('OMP_NUM_THREADS', '2')

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture
def repo():
    """The repository's folder."""
    return REPO


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test starts in an empty folder of its own, so that data/, cache/ and result/ are never the user's."""
    monkeypatch.chdir(tmp_path)
