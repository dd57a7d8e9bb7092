"""The networks: shapes in 2D and 3D, where they start, gradients by hand-written backward passes, full-size presets."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

import config
import dataset
import layers
from model import AAE, Discriminator, PixelUNet, UNet, count_parameters, fingerprint

SIZES = {2: (16, 20), 3: (8, 12, 16)}


def awake(net, seed=0):
    """The network with small random numbers in all its weights: what starts at zero would hide a fault."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def small_unet(dims=2, **more):
    given = dict(widths=(16, 32), blocks=1, attention=(1,), cond_channels=6, cond_width=8, num_classes=2)
    return awake(UNet(dims, 3, 5, **given | more))


# ------------------------------------------------------------------------------------------------------------------
# The autoencoder

@pytest.mark.parametrize('dims', [2, 3])
def test_autoencoder_shapes_and_forward_is_decode_of_encode(dims):
    aae, image = awake(AAE(dims, 2, 5, (8, 12, 16))), torch.randn(2, 2, *SIZES[dims])
    aae.latent_mean.normal_()
    aae.latent_std.uniform_(0.5, 2)
    z = aae.encode(image)
    assert z.shape == (2, 5, *[n // 4 for n in SIZES[dims]])
    assert aae.decode(z).shape == image.shape
    torch.testing.assert_close(aae(image), aae.decode(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z * aae.latent_std + aae.latent_mean, aae.encoder(image), rtol=1e-4, atol=1e-4)
    assert Discriminator(dims, 2, (8, 16))(image).shape == (2, 1, *[n // 4 for n in SIZES[dims]])


def test_autoencoder_refuses_sizes_that_do_not_divide_by_4():
    with pytest.raises(ValueError, match=r'\(16, 18\) must be a multiple of 4'):
        AAE(2, 1, 2, (8, 8, 8)).encode(torch.zeros(1, 1, 16, 18))


@pytest.mark.parametrize('dims', [2, 3])
def test_autoencoder_starts_as_the_principal_components_of_blocks(dims):
    """Against NumPy: blocks of 4 voxels an axis, targets over the std of their detail, the best c vectors."""
    torch.manual_seed(0)
    size, c = SIZES[dims], 7
    image = torch.randn(5, 2, *size).cumsum(2).cumsum(3)
    image = image * torch.tensor([0.1, 3.0]).view(1, 2, *[1] * dims) + 0.4
    aae = AAE(dims, 2, c, (8, 12, 16))
    aae.start_from_blocks(image)
    found = aae(image).detach().numpy()

    x = image.numpy().astype(np.float64)
    split = x.reshape(5, 2, *[v for n in size for v in (n // 4, 4)])
    inner, outer = [3 + 2 * i for i in range(dims)], [2 + 2 * i for i in range(dims)]
    blocks = split.transpose(0, *outer, 1, *inner).reshape(-1, 2, 4 ** dims)
    mean, detail = blocks.mean((0, 2)), np.sqrt(np.square(blocks - blocks.mean(2, keepdims=True)).mean((0, 2)))
    rows = ((blocks - mean[:, None]) / detail[:, None]).reshape(len(blocks), -1)
    basis = np.linalg.svd(rows, full_matrices=False)[2][:c]
    best = (rows @ basis.T @ basis).reshape(-1, 2, 4 ** dims) * detail[:, None] + mean[:, None]
    back = best.reshape(5, *[n // 4 for n in size], 2, *[4] * dims)
    order = [0, 1 + dims, *[v for i in range(dims) for v in (1 + i, 2 + dims + i)]]
    np.testing.assert_allclose(found, back.transpose(order).reshape(x.shape), atol=1e-3 * np.abs(x).max())
    error, spread = np.square(found - x).mean(), np.square(x - x.mean((0, 2, 3), keepdims=True)).mean()
    assert 0 < error < 0.2 * spread  # and it is a useful start, not an exact one


def test_as_many_latents_as_voxels_in_a_block_lose_nothing():
    image = torch.randn(4, 1, 16, 16)
    aae = AAE(2, 1, 16, (8, 8, 8))
    aae.start_from_blocks(image)
    torch.testing.assert_close(aae(image), image, rtol=1e-4, atol=1e-4)
    wider = AAE(2, 1, 20, (8, 8, 8))  # more latents than components
    wider.start_from_blocks(image)
    torch.testing.assert_close(wider(image), image, rtol=1e-4, atol=1e-4)


def test_the_unknown_label_starts_as_nothing():
    """And stays so where no label is ever dropped: IL-CLDM's way, absent at sampling."""
    torch.manual_seed(0)
    unet = UNet(2, 4, 3, (16, 32), 1, (), 16, 16, num_classes=2)
    size = unet.label.weight.detach().abs().sum(1)
    assert float(size[2]) == 0 and bool((size[:2] > 0).all())


# ------------------------------------------------------------------------------------------------------------------
# Group norm

@pytest.mark.parametrize('shape', [(2, 32, 6, 7), (3, 24, 5, 4, 3), (2, 8, 1, 1), (2, 16, 48, 48)])  # the last: large
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('silu', [False, True])
@pytest.mark.parametrize('embedded', [False, True])
def test_group_norm_is_torchs_with_its_gradient(shape, channels_last, silu, embedded):
    torch.manual_seed(0)
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    mine = layers.group_norm(shape[1], silu).double()
    nn.init.normal_(mine.weight)
    nn.init.normal_(mine.bias)
    more = torch.randn(2, *shape[:2], dtype=torch.float64) if embedded else torch.zeros(0)
    goal = torch.randn_like(x)

    def theirs(x, scale=None, shift=None):
        y = nn.functional.group_norm(x, mine.num_groups, mine.weight, mine.bias, mine.eps)
        if scale is not None:
            scale, shift = (v.view(*v.shape, *[1] * (x.ndim - 2)) for v in (scale, shift))
            y = y * (1 + scale) + shift
        return nn.functional.silu(y) if silu else y

    grads = []
    for norm in (mine, theirs):
        leaves = [v.clone().requires_grad_() for v in (x, *more)]
        y = norm(*leaves)
        grads.append((y, *torch.autograd.grad(y, [*leaves, mine.weight, mine.bias], goal)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_group_norm_without_gradient_and_in_bf16():
    torch.manual_seed(0)
    norm, x = layers.group_norm(32), torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), nn.functional.group_norm(x, norm.num_groups))
    goal = torch.randn_like(x)
    exact = torch.autograd.grad(nn.functional.group_norm(y := x.clone().requires_grad_(), norm.num_groups), y, goal)[0]
    found = torch.autograd.grad(norm(y := x.bfloat16().requires_grad_()), y, goal.bfloat16())[0]
    assert found.dtype == torch.bfloat16 and float((found.float() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize('size', [(9, 8), (48, 48)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_group_norm_under_autocast_takes_its_sums_in_float32(size, memory_format):
    torch.manual_seed(0)
    norm = layers.group_norm(32)
    x = (torch.randn(4, 32, *size) + 10).bfloat16().contiguous(memory_format=memory_format).requires_grad_()
    goal = torch.randn_like(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = norm(x)
    found = y.detach(), *torch.autograd.grad(y, x, goal)
    y = nn.functional.group_norm(wide := x.detach().float().requires_grad_(), norm.num_groups)
    exact = y.detach(), *torch.autograd.grad(y, wide, goal.float())
    for a, b in zip(found, exact, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize('size', [(8, 9, 10), (112, 112, 96)])  # the second: computed with more channels than asked for
def test_last_convolution_is_a_plain_one_with_its_gradient(size):
    layer = awake(layers.conv_out(3, 3, 2))
    x = torch.randn(1, 3, *size, requires_grad=True)
    found, wanted = layer(x), torch.nn.functional.conv3d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, (x, *layer.parameters()), up),
                    torch.autograd.grad(wanted, (x, *layer.parameters()), up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('size, kernel, stride', [((2, 2, 2), 3, 1), ((2, 4, 4), 3, 1), ((4, 4, 1), 3, 2),
                                                  ((1, 3, 3), 3, 2), ((4, 4, 4), 5, 2), ((5, 6, 5), 3, 1),
                                                  ((9, 1), 3, 2), ((12, 1), 5, 2), ((1, 1), 3, 2), ((8, 4), 5, 2)])
def test_gradient_of_a_thin_image_in_bf16(size, kernel, stride):
    """oneDNN leaves part of it unwritten where an axis is shorter than the kernel: whatever the memory held."""
    torch.manual_seed(0)
    layer = layers.conv(len(size), 16, 32, kernel, stride)
    x = torch.randn(2, 16, *size)
    out = layer(x)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    exact, layer.weight.grad = layer.weight.grad, None
    for _ in range(3):
        junk = [torch.full((100_000,), float('nan')) for _ in range(20)]  # what fresh memory may hold
        del junk
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(x)
        (out.float() * weights).sum().backward()
        assert float((layer.weight.grad - exact).norm()) < 0.03 * float(exact.norm())
        layer.weight.grad = None


@pytest.mark.parametrize('kernel, stride', [(3, 1), (3, 2), (1, 1), (5, 2)])
@pytest.mark.parametrize('size', [(9, 7, 5), (2, 2, 2), (20, 24, 20)])
def test_a_single_volume_without_gradient(size, kernel, stride):
    """Not computed by PyTorch's own choice of kernel on a CPU in float32: it must be the same image."""
    layer, x = layers.conv(3, 6, 10, kernel, stride), torch.randn(1, 6, *size)
    with torch.no_grad():
        found = layer(x)
    expected = layer(x)
    assert expected.requires_grad and not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_whitening_of_one_channel_is_its_convolution():
    whiten, x = awake(layers.SourceWhitening(3, 1)), torch.randn(2, 1, 4, 5, 6)
    torch.testing.assert_close(whiten(x), whiten.conv(x))


# ------------------------------------------------------------------------------------------------------------------
# The latent U-Net

@pytest.mark.parametrize('dims, size', [(2, (4, 5)), (2, (7, 9)), (3, (3, 5, 4)), (3, (5, 6, 7))])
def test_unet_takes_odd_latent_sizes(dims, size):
    net = small_unet(dims)
    out = net(torch.randn(2, 3, *size), torch.tensor([0, 999]), source=torch.randn(2, 5, *[4 * n for n in size]))
    assert out.shape == (2, 3, *size) and bool(torch.isfinite(out).all())


def test_unet_uses_time_label_and_source_and_unknown_is_none():
    net, z, t = small_unet().eval(), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
    source = torch.randn(2, 5, 32, 32)
    unknown = net(z, t, source=source)
    torch.testing.assert_close(net(z, t, source=source, label=torch.tensor([2, 2])), unknown)
    for label in (0, 1):
        assert float((net(z, t, source=source, label=torch.full((2,), label)) - unknown).abs().max()) > 1e-4
    assert float((net(z, t + 400, source=source) - unknown).abs().max()) > 1e-4
    assert float((net(z, t, source=source.flip(2)) - unknown).abs().max()) > 1e-4
    torch.testing.assert_close(net(z, t, cond=net.encode_source(source)), unknown)


def test_samples_of_a_batch_do_not_meet():
    """Group norm and attention work within a sample: a case alone and in a batch gives the same."""
    net, z, source = small_unet().eval(), torch.randn(3, 3, 8, 8), torch.randn(3, 5, 32, 32)
    t, label = torch.tensor([3, 500, 999]), torch.tensor([0, 1, 2])
    together = net(z, t, source=source, label=label)
    for i in range(3):
        one = slice(i, i + 1)
        alone = net(z[one], t[one], source=source[one], label=label[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_unet_starts_at_zero_and_levels_have_the_attention_asked_for():
    net = UNet(2, 3, 5, (16, 32, 48), blocks=2, attention=(2,))
    assert float(net(torch.randn(1, 3, 8, 8), torch.tensor([5]), source=torch.randn(1, 5, 32, 32)).abs().max()) == 0
    heads = sum(isinstance(m, layers.Attention) for m in net.modules())
    none = sum(isinstance(m, layers.Attention) for m in UNet(2, 3, 5, (16, 32, 48), blocks=2, attention=()).modules())
    assert (none, heads) == (1, 1 + 2 + 3)  # the middle; two blocks down and three up


@pytest.mark.parametrize('dims, size', [(2, (7, 8)), (3, (4, 5, 6))])
def test_checkpointing_gives_the_same_gradient(dims, size):
    net = small_unet(dims).train()
    inputs = torch.randn(2, 3, *size), torch.tensor([7, 900])
    source = torch.randn(2, 5, *[4 * n for n in size])
    grads = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(*inputs, source=source, label=torch.tensor([0, 2])).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 40
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_args_rebuild_the_network():
    for net in (small_unet(), AAE(2, 2, 3, (8, 12, 16), 2), PixelUNet(2, 3, 2, True, (8, 16), 2)):
        again = type(net)(**net.args)
        again.load_state_dict(net.state_dict())
        assert fingerprint(again) == fingerprint(net)
        assert fingerprint(awake(again, seed=5)) != fingerprint(net)


# ------------------------------------------------------------------------------------------------------------------
# The image grid

@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('with_image', [False, True])
def test_pixel_unet_starts_at_zero_and_then_uses_all_it_is_given(dims, with_image):
    net = PixelUNet(dims, 5, 2, with_image, (8, 16, 24))
    source = torch.randn(2, 5, *SIZES[dims])
    images = (torch.randn(2, 2, *SIZES[dims]),) if with_image else ()
    out = net(source, *images)
    assert out.shape == (2, 2, *SIZES[dims])
    assert torch.equal(out, images[0] if with_image else torch.zeros_like(out))  # it starts as the prediction, or at 0
    out.mean().backward()
    assert float(net.out[-1].bias.grad.abs().max()) > 0  # zero, yet it learns
    out = awake(net)(source, *images)
    assert float((net(source.flip(2), *images) - out).abs().max()) > 1e-4
    if with_image:
        assert float((net(source, -images[0]) - out).abs().max()) > 1e-4


@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('widths', [(8,), (8, 16), (8, 16, 24), (8, 16, 24, 32)])
def test_pixel_unet_uses_the_source_features_whatever_its_levels(dims, widths):
    net = awake(PixelUNet(dims, 5, 2, True, widths, feature_channels=6))
    source, image = torch.randn(2, 5, *SIZES[dims]), torch.randn(2, 2, *SIZES[dims])
    cond = torch.randn(2, 6, *[n // 4 for n in SIZES[dims]])
    out = net(source, image, cond)
    assert out.shape == image.shape and float((net(source, image, -cond) - out).abs().max()) > 1e-4


@pytest.mark.parametrize('dims', [2, 3])
def test_lesion_head_blends_two_images(dims):
    net = awake(PixelUNet(dims, 3, 2, True, (8, 16), feature_channels=4, lesion_head=True))
    size = (8, 12, 8)[:dims]
    source, image = torch.randn(2, 3, *size), torch.randn(2, 2, *size)
    features = torch.randn(2, 4, *[n // 4 for n in size])
    pred, logit = net(source, image, features, logit=True)
    assert pred.shape == image.shape and logit.shape == (2, 1, *size)
    assert torch.equal(pred, net(source, image, features))
    with torch.no_grad():
        bias = net.out[-1].bias
        ends = []
        for value in (-40, 40):  # nowhere a lesion, everywhere one
            bias[-1] = value
            ends.append(net(source, image, features))
        bias[-1] = 0
        zero, logit = net(source, image, features, logit=True)
    assert torch.allclose(zero, ends[0] + logit.sigmoid() * (ends[1] - ends[0]), atol=1e-4)
    thrice, same = net(source, image, features, logit=True, odds=3)
    p = logit.sigmoid()  # odds p / (1 - p): three times these in the image, the logit as it was
    assert torch.equal(same, logit)
    assert torch.allclose(thrice, ends[0] + 3 * p / (1 - p + 3 * p) * (ends[1] - ends[0]), atol=1e-4)
    assert float((ends[1] - ends[0]).abs().mean()) > 1e-3


@pytest.mark.parametrize('with_image', [False, True])
def test_the_error_of_the_image_reaches_the_logit_of_a_regression_only(with_image):
    net = awake(PixelUNet(2, 3, 2, with_image, (8, 16), lesion_head=True))
    image = torch.randn(2, 2, 8, 12) if with_image else None
    pred, logit = net(torch.randn(2, 3, 8, 12), image, logit=True)
    pred.square().mean().backward(retain_graph=True)
    of_logit = net.out[-1].weight.grad[-1]  # the last of the output's channels
    assert bool(of_logit.any()) != with_image and net.out[-1].weight.grad[:-1].any()
    logit.mean().backward()
    assert of_logit.any()


@pytest.mark.parametrize('lesion_head', [False, True])
def test_label_head_mixes_one_image_a_class(lesion_head):
    net = awake(PixelUNet(3, 1, 2, True, (8, 16), feature_channels=4, lesion_head=lesion_head, classes=3))
    with torch.no_grad():
        net.prior.weight.normal_()
    source, image = torch.rand(2, 1, 8, 12, 8) * 2 - 1, torch.randn(2, 2, 8, 12, 8)
    features = torch.randn(2, 4, 2, 3, 2)

    def pred(shares=None, **more):
        return net(source, image, features, shares=shares, **more)

    ends = [pred(torch.eye(3)[[c, c]]) for c in range(3)]
    assert all(float((ends[c] - ends[0]).abs().mean()) > 1e-3 for c in (1, 2))
    p = net.prior(source)
    shares = p ** 2 / (p ** 2).sum(1, keepdim=True)
    assert float(p.std()) > 0.05
    mixed = sum(shares[:, c].view(2, 1, 1, 1, 1) * ends[c] for c in range(3))
    torch.testing.assert_close(pred(), mixed, rtol=1e-4, atol=1e-4)
    given = net.prior.shares(source, torch.tensor([2, 3]))  # 3: unknown
    torch.testing.assert_close(given, torch.stack([torch.tensor([0.0, 0, 1]), shares[1]]))
    torch.testing.assert_close(pred(given)[0], ends[2][0])
    logit = pred(logit=True)[1]
    assert (logit is not None) == lesion_head


def test_detail_branch_takes_the_prior_of_the_regression_it_starts_as():
    regression = awake(PixelUNet(3, 1, 1, False, (8, 16), classes=2))
    with torch.no_grad():
        regression.prior.weight.normal_()
    detail = awake(PixelUNet(3, 1, 1, True, (8, 16), feature_channels=4, classes=2), seed=1)
    detail.start_from(regression)
    source = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(detail(source, torch.randn(1, 1, 8, 8, 8), torch.randn(1, 4, 2, 2, 2)),
                               regression(source), rtol=1e-5, atol=1e-5)


def test_without_a_lesion_head_there_is_no_logit():
    source = torch.randn(1, 3, 8, 8)
    pred, logit = awake(PixelUNet(2, 3, 2, False, (8, 16)))(source, logit=True)
    assert pred.shape == (1, 2, 8, 8) and logit is None


@pytest.mark.parametrize('dims', [2, 3])
def test_detail_branch_started_as_a_regression_gives_its_image_and_learns_the_rest(dims):
    regression = awake(PixelUNet(dims, 5, 2, False, (8, 16)))
    detail = awake(PixelUNet(dims, 5, 2, True, (8, 16), feature_channels=6), seed=1)
    detail.start_from(regression)
    source, image = torch.randn(2, 5, *SIZES[dims]), torch.randn(2, 2, *SIZES[dims], requires_grad=True)
    features = torch.randn(2, 6, *[n // 4 for n in SIZES[dims]])
    out = detail(source, image, features)
    torch.testing.assert_close(out, regression(source), rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    for weight in (detail.share, detail.join.weight, detail.conv_in.weight[:, 5:]):
        grad = weight.grad if weight.is_leaf else detail.conv_in.weight.grad[:, 5:]
        assert float(weight.detach().abs().max()) == 0 and float(grad.abs().max()) > 0


def test_whitening_of_channels_that_repeat_each_other_is_no_rounding_error():
    torch.manual_seed(0)
    source = 0.3 + 0.1 * torch.randn(4, 2, *SIZES[2]).repeat(1, 9, 1, 1)  # two signals, nine times each, no noise
    net = layers.SourceWhitening(2, 18)
    net.start_from(source, torch.ones(4, 1, *SIZES[2]))
    exact = copy.deepcopy(net).double()(source.double())
    assert float((net(source) - exact).detach().abs().max()) < 0.01  # 0.18 without the least noise


@pytest.mark.parametrize('dims, channels', [(2, 6), (2, 40), (3, 1)])
def test_source_whitening_brings_the_channels_in_the_mask_to_unit_size(dims, channels):
    torch.manual_seed(0)
    base = torch.randn(4, 1, *SIZES[dims])  # one signal that all channels share, and a hundredth of noise
    source = 0.3 + 0.01 * base + 1e-4 * torch.randn(4, channels, *SIZES[dims])
    mask = (torch.rand(4, 1, *SIZES[dims]) < 0.5).float()
    source = torch.where(mask > 0, source, -1.0)
    net = layers.SourceWhitening(dims, channels)
    net.start_from(source, mask)
    white = net(source).movedim(1, -1)[mask[:, 0] > 0]
    variance, mean = white.var(0), white.mean(0)
    assert float(mean.abs().max()) < 0.02 and white.shape[1] == min(channels, 16)
    if channels > 1:
        assert float(variance.max()) == pytest.approx(1, abs=0.02)
        half = variance.median() if channels <= 16 else variance[-1]  # of many, the noisiest noise alone is kept
        assert float(half) == pytest.approx(0.5, abs=0.05 if channels <= 16 else 0.2)  # noise alone comes to half
        signal = torch.corrcoef(torch.stack([white[:, 0], base.movedim(1, -1)[mask[:, 0] > 0][:, 0]]))[0, 1]
        assert abs(float(signal)) > 0.99  # the largest component comes first
        cov = torch.cov(white.T)
        assert float((cov - cov.diag().diag()).abs().max()) < 0.02


# ------------------------------------------------------------------------------------------------------------------
# The networks of the presets

def source_channels(cfg):
    return dataset.Spec.from_settings(cfg).source_channels


def build(cfg):
    """All networks of a preset: dict name -> network."""
    targets, dims, channels = len(cfg.targets), cfg.spatial_dims, source_channels(cfg)
    return dict(
        aae=AAE(dims, targets, cfg.latent_channels, cfg.aae_channels, cfg.aae_blocks),
        disc=Discriminator(dims, targets, cfg.disc_channels),
        unet=UNet(dims, cfg.latent_channels, channels, cfg.unet_channels, cfg.unet_blocks, cfg.unet_attention,
                  cfg.cond_channels, cfg.cond_width, cfg.num_classes, cfg.dropout, cfg.checkpointing),
        detail=PixelUNet(dims, channels, targets, True, cfg.detail_channels,
                         feature_channels=cfg.cond_channels + cfg.unet_channels[0]),
        regression=PixelUNet(dims, channels, targets, False, cfg.regression_channels))


@pytest.mark.parametrize('preset', config.PRESETS)
def test_networks_of_every_preset(preset):
    """Built without memory: shapes through all of them, and a number of parameters that fits the preset's scale."""
    cfg = config.load('', argv=['--preset', preset])
    with torch.device('meta'):
        nets = build(cfg)
        image = torch.empty(1, len(cfg.targets), *cfg.image_size)
        source = torch.empty(1, source_channels(cfg), *cfg.image_size)
        z = nets['aae'].encode(image)
        out, features = nets['unet'](z, torch.zeros(1, dtype=torch.long), source=source, features=True)
        assert features.shape[1] == nets['unet'].feature_channels
        pred = nets['aae'].decode(out)
        assert z.shape == out.shape == (1, cfg.latent_channels, *[n // 4 for n in cfg.image_size])
        detail = nets['detail'](source, pred, features)
        assert pred.shape == detail.shape == nets['regression'](source).shape == image.shape
        assert nets['disc'](pred).shape[1] == 1
    counts = {name: count_parameters(net) for name, net in nets.items()}
    print(preset, *[f'{name} {n:,}' for name, n in counts.items()])
    full = not preset.endswith('_demo')
    low, high = (80e6, 700e6) if full else (1e6, 15e6)
    assert low < counts['unet'] < high
    assert 1e5 < counts['aae'] < (2e7 if full else 5e6)
    assert counts['disc'] < counts['aae']
    assert 1e5 < counts['detail'] < 1e7 and 2e5 < counts['regression'] < 1e8


@pytest.mark.slow
def test_full_size_2d_networks_take_a_training_step():
    """One step of the U-Net of preset ctp2dwi with detail branch and decoder, on a small crop."""
    cfg = config.load('', argv=['--preset', 'ctp2dwi'])
    nets = build(cfg)
    nets.pop('regression')
    source, image = torch.randn(1, source_channels(cfg), 16, 16), torch.randn(1, len(cfg.targets), 16, 16)
    before = nets['unet'].out[-1].weight.detach().clone()
    params = [p for name in ('aae', 'unet', 'detail') for p in nets[name].parameters()]
    z = nets['aae'].encode(image)
    out, features = nets['unet'](z, torch.tensor([500]), source=source, features=True)
    pred = nets['aae'].decode(out + z)
    loss = (pred + nets['detail'](source, pred, features) - image).square().mean() - nets['disc'](pred).mean()
    loss.backward()
    torch.optim.SGD(params, lr=0.1).step()
    assert float((nets['unet'].out[-1].weight - before).abs().max()) > 0
    assert all(bool(torch.isfinite(p).all()) for p in params)
