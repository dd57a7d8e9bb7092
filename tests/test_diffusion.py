"""The diffusion against a published library, an oracle that knows the answer, and a Gaussian with a closed form."""
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import diffusion as room
from diffusion import PREDICTIONS, SAMPLERS, SCHEDULES, Diffusion, ddim_sample, one_step, sample, trailing_steps

# Made by reference/make_diffusers.py, which says how.
REFERENCE = json.loads((Path(__file__).parent / 'reference' / 'diffusers.json').read_text())
ALL = [(p, s) for p in PREDICTIONS for s in SCHEDULES]


def toy_net(z, t):
    """The stand-in for a network that the reference was made with."""
    return 0.3 * z + 0.1 * (t.to(z.dtype) / 1000)[:, None] - 0.05 * torch.sin(3 * z)


def oracle(diffusion, z_0):
    """A network that knows z_0: its output is what the diffusion would have it regress on."""
    def net(z_t, t):
        a, s = diffusion._ab(t, z_t)
        eps = (z_t - a * z_0) / s
        return diffusion.net_target(z_0, eps, t)
    return net


# ------------------------------------------------------------------------------------------------------------------
# Against diffusers. Its tables are float32; ours are float64.

@pytest.mark.parametrize('predict, schedule', ALL)
def test_alpha_bar_is_diffusers_alphas_cumprod_but_for_its_float32(predict, schedule):
    diffusion = Diffusion(predict, schedule)
    table = REFERENCE[f'{predict} {schedule}']['alpha_bar']
    # A product of 1000 factors rounded to 24 bits drifts like a random walk: by sqrt(1000) roundings; four times that.
    tolerance = 4 * math.sqrt(1000) * 2 ** -24
    for t, value in table.items():
        assert math.sqrt(float(diffusion.alpha_bar[int(t)])) == pytest.approx(math.sqrt(value), abs=tolerance)
    if predict != 'eps':
        assert table['999'] == 0 and float(diffusion.alpha_bar[999]) == 0
    else:
        assert float(diffusion.alpha_bar[999]) == pytest.approx(table['999'], rel=1e-4) and table['999'] > 0


@pytest.mark.parametrize('predict, schedule', ALL)
def test_samplers_are_diffusers_ddim(predict, schedule):
    """With the reference's own table put in, all agrees to float64's rounding; without, to the table's float32."""
    made = REFERENCE[f'{predict} {schedule}']
    x, noise = (torch.tensor(REFERENCE[name], dtype=torch.float64)[None] for name in ('x', 'noise'))
    own, theirs = Diffusion(predict, schedule), Diffusion(predict, schedule)
    for t, value in made['alpha_bar'].items():
        theirs.alpha_bar[int(t)] = value
    for n, goal in made['ddim'].items():
        assert trailing_steps(1000, int(n)) == made['steps'][n]
        goal = torch.tensor(goal, dtype=torch.float64)[None]
        torch.testing.assert_close(ddim_sample(theirs, toy_net, x, int(n)), goal, rtol=1e-9, atol=1e-9)
        # eps alone is divided by sqrt(ab), down to 5e-5, which multiplies the table's relative rounding.
        torch.testing.assert_close(ddim_sample(own, toy_net, x, int(n)), goal, rtol=1e-4, atol=1e-4)
    if predict != 'eps':
        goal = torch.tensor(made['ddim']['1'], dtype=torch.float64)[None]
        torch.testing.assert_close(one_step(theirs, toy_net, x), goal, rtol=1e-9, atol=1e-9)
    steps = trailing_steps(1000, 10)
    step = _one_ancestral_step(theirs, x, noise, steps[3], steps[4])
    torch.testing.assert_close(step, torch.tensor(made['ancestral'], dtype=torch.float64)[None], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('predict, schedule', ALL)
def test_the_ddpm_sampler_is_diffusers_ddpm(predict, schedule):
    made = REFERENCE[f'{predict} {schedule}']
    x, noise = (torch.tensor(REFERENCE[name], dtype=torch.float64)[None] for name in ('x', 'noise'))
    theirs = Diffusion(predict, schedule)
    for t, value in made['alpha_bar'].items():
        theirs.alpha_bar[int(t)] = value
    for n, goal in made['ddpm'].items():
        drawn = (noise * math.cos(k) for k in itertools.count())
        z = sample(theirs, toy_net, x, 'ddpm', int(n), lambda z, drawn=drawn: next(drawn))
        # The library's last step adds noise of variance 1e-20, and its coefficients multiply a few roundings.
        torch.testing.assert_close(z, torch.tensor(goal, dtype=torch.float64)[None], rtol=1e-7, atol=1e-7)


def _one_ancestral_step(diffusion, x, noise, t, t_next):
    """The state after one step from t to t_next with eta = 1: what the network is called with next."""
    seen = []

    def net(z, tt):
        seen.append(z)
        return toy_net(z, tt)

    original = room.trailing_steps
    room.trailing_steps = lambda timesteps, num_steps: [t, t_next]
    try:
        ddim_sample(diffusion, net, x, 2, eta=1.0, noise=lambda z: noise)
    finally:
        room.trailing_steps = original
    return seen[1]


def test_schedules_by_hand():
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    assert float(room.alpha_bars('linear', 1000, False)[1]) == pytest.approx((1 - betas[0]) * (1 - betas[1]), rel=1e-12)
    zero = room.alpha_bars('linear', 1000, True)
    assert float(zero[0]) == pytest.approx(1 - betas[0], rel=1e-12) and float(zero[-1]) == 0
    assert bool((zero[1:] < zero[:-1]).all())
    with pytest.raises(ValueError, match='linaer'):
        room.alpha_bars('linaer', 1000, True)


# ------------------------------------------------------------------------------------------------------------------
# What the network predicts

@pytest.mark.parametrize('predict', PREDICTIONS)
@pytest.mark.parametrize('shape', [(5, 3, 4, 6), (5, 2, 3, 4, 5)])
def test_split_is_the_way_back_from_net_target(predict, shape):
    torch.manual_seed(0)
    diffusion, t = Diffusion(predict), torch.tensor([0, 1, 300, 998, 999])
    z_0, eps = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    z_t = diffusion.add_noise(z_0, eps, t)
    z_0_hat, eps_hat = diffusion.split(diffusion.net_target(z_0, eps, t), z_t, t)
    torch.testing.assert_close(z_0_hat, z_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-10)


def test_forward_process_by_hand():
    diffusion = Diffusion('v')
    t, z_0, eps = torch.tensor([500]), torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), -1.0)
    ab = float(diffusion.alpha_bar[500])
    assert diffusion.add_noise(z_0, eps, t)[0, 0, 0] == pytest.approx(2 * ab ** 0.5 - (1 - ab) ** 0.5, rel=1e-6)
    assert diffusion.net_target(z_0, eps, t)[0, 0, 0] == pytest.approx(-ab ** 0.5 - 2 * (1 - ab) ** 0.5, rel=1e-6)
    end = torch.tensor([999])  # nothing is left of z_0, and v = -z_0: a plain regression
    torch.testing.assert_close(diffusion.add_noise(z_0, eps, end), eps)
    torch.testing.assert_close(diffusion.net_target(z_0, eps, end), -z_0)


@pytest.mark.parametrize('name, value', [('predict', 'x'), ('schedule', 'square'), ('loss_weight', 'snr')])
def test_unknown_names_are_refused(name, value):
    with pytest.raises(ValueError, match=value):
        Diffusion(**{name: value})


# ------------------------------------------------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize('predict', ['v', 'z_0'])
@pytest.mark.parametrize('loss_weight', ['none', 'min_snr'])
def test_the_last_step_has_a_gradient(predict, loss_weight):
    torch.manual_seed(0)
    diffusion, net = Diffusion(predict, loss_weight=loss_weight), torch.nn.Conv2d(2, 2, 1)
    loss, z_0_hat = diffusion.loss(lambda z, t: net(z), torch.randn(4, 2, 3, 3), torch.full((4,), 999))
    assert loss.shape == (4,) and z_0_hat.shape == (4, 2, 3, 3)
    loss.mean().backward()
    assert net.weight.grad.abs().max() > 1e-3 and net.bias.grad.abs().max() > 1e-5
    net.zero_grad()
    z_0_hat = diffusion.loss(lambda z, t: net(z), torch.randn(4, 2, 3, 3), torch.full((4,), 999))[1]
    z_0_hat.square().mean().backward()  # the pixel terms of stage 3 reach the network through the estimate
    assert net.weight.grad.abs().max() > 1e-3


def test_loss_is_the_mean_square_against_the_target_for_each_sample():
    torch.manual_seed(0)
    diffusion, z_0 = Diffusion('v'), torch.randn(3, 2, 4, 4)
    t, eps = torch.tensor([0, 500, 999]), torch.randn(3, 2, 4, 4)
    loss, z_0_hat = diffusion.loss(lambda z, t: torch.zeros_like(z), z_0, t, eps)
    torch.testing.assert_close(loss, diffusion.net_target(z_0, eps, t).square().mean((1, 2, 3)))
    a = diffusion.alpha_bar[t].sqrt().float().view(3, 1, 1, 1)
    torch.testing.assert_close(z_0_hat, a * diffusion.add_noise(z_0, eps, t))  # v_hat = 0
    seen = {}
    diffusion.loss(lambda z, t, **cond: seen.update(cond) or z, z_0, t, eps, source=1, label=2)
    assert seen == dict(source=1, label=2)


def test_min_snr_weights_by_hand():
    t = torch.tensor([0, 1])
    for predict, at_high, at_low in (('eps', 5 / 24, 1), ('z_0', 5, 1.25), ('v', 5 / 25, 1)):
        diffusion = Diffusion(predict, loss_weight='min_snr')
        diffusion.alpha_bar[0], diffusion.alpha_bar[1] = 24 / 25, 0.2  # SNR 24 and 0.25
        torch.testing.assert_close(diffusion.weight(t), torch.tensor([at_high, at_low]))
    last = torch.tensor([999])
    assert float(Diffusion('v', loss_weight='min_snr').weight(last)) == 1
    assert float(Diffusion('z_0', loss_weight='min_snr').weight(last)) == 1
    assert float(Diffusion('v').weight(last)) == 1
    weight = Diffusion('v', loss_weight='min_snr').weight(torch.arange(1000))
    assert weight.dtype == torch.float32 and bool((weight > 0).all()) and bool((weight <= 1).all())


def test_last_step_share_of_the_draws():
    torch.manual_seed(0)
    n = 200000
    for share in (0, 0.15, 0.75):
        t = Diffusion('v', last_step_share=share).draw(n, 'cpu')
        expected = share + (1 - share) / 1000
        assert float((t == 999).float().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))
        rest = t[t < 999].float()
        assert int(t.min()) == 0 and int(t.max()) == 999
        assert float(rest.mean()) == pytest.approx(499, abs=4 * 289 / math.sqrt(len(rest)))
    assert float((Diffusion('v', last_step_share=0).draw(n, 'cpu', share=1) == 999).float().mean()) == 1
    eps = Diffusion('eps', last_step_share=0.9).draw(n, 'cpu', share=0.9)  # never for eps
    assert float((eps == 999).float().mean()) < 0.005


def test_drop_labels():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1] * 5000)
    assert torch.equal(Diffusion.drop_labels(labels, 2, 0.0), labels)
    assert bool((Diffusion.drop_labels(labels, 2, 1.0) == 2).all())
    some = Diffusion.drop_labels(labels, 2, 0.3)
    assert float((some == 2).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(some[some != 2], labels[some != 2]) and some.dtype == labels.dtype


# ------------------------------------------------------------------------------------------------------------------
# Samplers

@pytest.mark.parametrize('predict, schedule', ALL)
@pytest.mark.parametrize('num_steps', [1, 7, 50])
@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_an_oracle_is_brought_back_to_z_0(predict, schedule, num_steps, eta):
    torch.manual_seed(1)
    diffusion = Diffusion(predict, schedule)
    z_0, z_T = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    z = ddim_sample(diffusion, oracle(diffusion, z_0), z_T, num_steps, eta)
    assert float((z - z_0).abs().max()) < 1e-5


@pytest.mark.parametrize('predict', ['v', 'z_0'])
def test_one_step_of_an_oracle(predict):
    diffusion = Diffusion(predict)
    z_0, z_T = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    assert float((one_step(diffusion, oracle(diffusion, z_0), z_T) - z_0).abs().max()) < 1e-5


def test_one_step_is_refused_with_eps():
    with pytest.raises(ValueError, match="needs predict 'v' or 'z_0'.*use 'ddim'"):
        one_step(Diffusion('eps'), toy_net, torch.zeros(1, 6))
    with pytest.raises(ValueError, match='heun'):
        sample(Diffusion('v'), toy_net, torch.zeros(1, 6), 'heun')


def test_trailing_steps():
    assert trailing_steps(1000, 1) == [999]
    assert trailing_steps(1000, 4) == [999, 749, 499, 249]
    assert trailing_steps(10, 10) == list(range(9, -1, -1))
    for n in range(1, 1001):
        steps = trailing_steps(1000, n)
        assert len(set(steps)) == n and steps[0] == 999 and min(steps) >= 0 and steps == sorted(steps, reverse=True)
    for n in (0, 1001):
        with pytest.raises(ValueError, match=str(n)):
            trailing_steps(1000, n)


MEAN, STD = 0.7, 0.5


def gaussian_net(diffusion):
    """The optimal network where z_0 is N(MEAN, STD^2): the posterior mean of z_0 given z_t, as the prediction."""
    def net(z_t, t):
        a, s = diffusion._ab(t, z_t)
        z_0_hat = MEAN + a * STD ** 2 / (a ** 2 * STD ** 2 + s ** 2) * (z_t - a * MEAN)
        if diffusion.predict == 'z_0':
            return z_0_hat
        eps_hat = (z_t - a * z_0_hat) / s
        return eps_hat if diffusion.predict == 'eps' else a * eps_hat - s * z_0_hat
    return net


@pytest.mark.parametrize('predict', PREDICTIONS)
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_gaussian_target_is_sampled_with_its_mean_and_variance(predict, sampler):
    if sampler == 'one_step' and predict == 'eps':
        pytest.skip('refused')
    torch.manual_seed(0)
    diffusion, z_T = Diffusion(predict), torch.randn(20000, 1, dtype=torch.float64)
    found = {}
    for num_steps in (5, 50, 500):
        z = sample(diffusion, gaussian_net(diffusion), z_T, sampler, num_steps)
        found[num_steps] = float(z.mean()), float(z.std())
        # With eps, z_T of the data keeps a trace of the mean that pure noise lacks: sqrt(ab_T) = 0.012 of it.
        assert found[num_steps][0] == pytest.approx(MEAN, abs=0.012 * STD * MEAN + 4 * STD / 20000 ** 0.5)
    if sampler == 'one_step':
        assert float(z.std()) < 1e-6  # the mean, and nothing but the mean
        return
    errors = [abs(std - STD) for _, std in found.values()]
    assert errors[2] < 0.02 and errors[2] < errors[1] < errors[0]  # more steps, less error


def test_noise_is_drawn_only_where_it_is_used():
    calls = []

    def noise(z):
        calls.append(z.shape)
        return torch.zeros_like(z)

    x = torch.zeros(1, 6, dtype=torch.float64)
    sample(Diffusion('v'), toy_net, x, 'ddim', 5, noise)
    assert not calls
    sample(Diffusion('v'), toy_net, x, 'ddpm', 5, noise)
    assert len(calls) == 4


def test_sampling_in_low_precision_keeps_the_latents_type():
    z = sample(Diffusion('v'), lambda z, t: z.bfloat16(), torch.randn(2, 3, 4, 4), 'ddpm', 5)
    assert z.dtype == torch.float32 and bool(torch.isfinite(z).all())
