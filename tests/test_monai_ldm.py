"""MONAI's latent diffusion on our data; its training runs only where MONAI is installed."""
import importlib.util
import json
from pathlib import Path

import made_data
import made_runs
import pandas as pd
import pytest
import torch

import monai_ldm
import utils

HAS_MONAI = all(importlib.util.find_spec(name) for name in ('monai', 'einops'))


@pytest.fixture
def here(tmp_path):
    with made_runs.folder(tmp_path):
        yield tmp_path


def test_the_source_is_averaged_to_the_latent_grid():
    source = torch.arange(2 * 3 * 16 * 8, dtype=torch.float32).view(2, 3, 16, 8)
    pooled = monai_ldm.condition(source, (4, 2))
    assert torch.equal(pooled[1, 2, 3, 1], source[1, 2, 12:, 4:].mean()) and pooled.shape == (2, 3, 4, 2)
    assert monai_ldm.condition(torch.ones(1, 1, 8, 8, 4), (2, 2, 1)).shape == (1, 1, 2, 2, 1)


@pytest.mark.skipif(HAS_MONAI, reason='MONAI is here')
def test_without_monai_one_sentence(here):
    with pytest.raises(utils.RunError, match='needs MONAI and einops .* another environment'):
        made_runs.call('monai_ldm')


@pytest.mark.skipif(not HAS_MONAI, reason='MONAI is not installed')
def test_it_trains_and_translates(here):
    made_data.write_stroke('data')
    made_runs.call('monai_ldm', *made_runs.STROKE, '--aae_channels', '(16, 16, 16)', '--unet_channels', '(32, 32)',
                   '--exp', 'peer', '--cpu_seconds', '4')
    facts = json.loads(Path('result/peer/monai.json').read_text())
    assert facts['aae_steps'] > 0 and facts['unet_steps'] > 0 and facts['scale'] > 0
    assert len(pd.read_csv('result/peer/monai_test.csv')) == 1
