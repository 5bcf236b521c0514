"""f_theta as an ordinary module: hooks, replaced norms, weight norm, dropout; in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mdeq import MDEQConfig, Scales
from mdeq.transformation import ChannelDropout, Convolution, Transformation


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SCALES = Scales.of((8, 8, 16), 9, 13)


def transformation(**settings) -> Transformation:
    return Transformation(MDEQConfig(channels=(8, 8, 16), expansion=2, groups=4, **settings))


def states(batch=2):
    return [torch.randn(batch, *shape) for shape in SCALES.shapes], torch.randn(batch, 8, 9, 13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ()}, "channels: an MDEQ has 1 to 16 scales"),
        ({"channels": (12,)}, "channels: 12 is not divisible by the 8 groups"),
        ({"groups": 3}, "groups: must be even"),
        ({"expansion": 0}, "expansion: must be a whole number"),
        ({"downsamplings": 3}, "downsamplings: must be one of 0, 1, 2"),
        ({"dropout": 1.0}, "dropout: must be a number in"),
        ({"unrolled": 0}, "unrolled: must be a whole number"),
        ({"upsampling": "cubic"}, "upsampling: must be one of 'nearest', 'bilinear'"),
        ({"weight_norm": "yes"}, "weight_norm: must be"),
    ],
)
def test_a_wrong_setting_is_an_error(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MDEQConfig(**settings)


def test_a_state_is_flattened_and_split_without_loss():
    z, _ = states()
    flat = SCALES.flatten(z)
    assert flat.shape == (2, sum(SCALES.lengths))
    assert SCALES.shapes == ((8, 9, 13), (8, 5, 7), (16, 3, 4))
    for ours, expected in zip(SCALES.split(flat), z, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("settings", [{}, {"weight_norm": False}, {"upsampling": "bilinear"}])
def test_f_is_written_out(settings):
    """Eq. 5 and the fusion of Fig. 1, in plain functions of the module's own parameters."""
    f, (z, x) = transformation(post_fusion_affine=True, **settings), states()

    def conv(layer, x):
        weight = layer.v
        if layer.g is not None:
            weight = layer.g * F.normalize(layer.v.flatten(1), dim=1).view_as(layer.v)
        return F.conv2d(x, weight, stride=layer.stride, padding=layer.v.shape[-1] // 2)

    def norm(layer, x):
        mean_of = x.unflatten(1, (layer.num_groups, -1))
        mean = mean_of.mean((2, 3, 4), keepdim=True)
        variance = mean_of.var((2, 3, 4), correction=0, keepdim=True)
        plain = ((mean_of - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        return plain * layer.weight[:, None, None] + layer.bias[:, None, None]

    features = []
    for i, block in enumerate(f.blocks):
        hidden = conv(block.conv2, norm(block.norm1, conv(block.conv1, z[i])).clamp(min=0))
        hidden = hidden + x if i == 0 else hidden
        features.append(norm(block.norm3, (norm(block.norm2, hidden) + z[i]).clamp(min=0)))
    for j, post in enumerate(f.post):
        total = features[j].clone()
        for i, layer in enumerate(f.fusion[j]):
            sent = features[i]
            if i < j:
                for k, step in enumerate(layer.layers):
                    sent = norm(step.norm, conv(step.conv, sent.clamp(min=0) if k else sent))
            elif i > j:
                sent = norm(layer.norm, conv(layer.conv, sent))
                mode = {"mode": "nearest"}
                if f.upsampling == "bilinear":
                    mode = {"mode": "bilinear", "align_corners": False}
                sent = F.interpolate(sent, z[j].shape[-2:], **mode)
            total = total + sent if i != j else total
        expected = norm(post.norm, conv(post.conv, total.clamp(min=0)))
        torch.testing.assert_close(f(z, x)[j], expected, rtol=1e-10, atol=1e-10)


def test_on_flat_states_it_is_the_same_function_of_its_inputs():
    f, (z, x) = transformation(), states()
    flat = f.on_states(x, SCALES)
    torch.testing.assert_close(flat(SCALES.flatten(z)), SCALES.flatten(f(z, x)), rtol=0, atol=0)
    assert all(layer.held is None for layer in f.modules() if isinstance(layer, Convolution))
    doubled = flat(SCALES.flatten(z), 2 * x, *flat.inputs[1:])
    torch.testing.assert_close(doubled, SCALES.flatten(f(z, 2 * x)), rtol=0, atol=0)
    part = flat.part(slice(1, 2))(SCALES.flatten(z)[1:])
    torch.testing.assert_close(part, SCALES.flatten(f(z, x))[1:])
    reached = torch.autograd.grad(flat(SCALES.flatten(z)).sum(), list(f.parameters()))
    assert len(reached) == len(list(f.parameters()))


def test_a_failing_evaluation_leaves_the_module_as_it_was():
    f, (z, x) = transformation(), states()
    flat = f.on_states(x, SCALES)
    before = list(f.parameters())
    with pytest.raises(RuntimeError):
        flat(SCALES.flatten(z), x[:, :3], *[2 * t for t in flat.inputs[1:]])
    assert all(a is b for a, b in zip(f.parameters(), before, strict=True))


def test_hooks_fire_and_a_norm_may_be_replaced():
    f, (z, x) = transformation(), states()
    seen = []
    f.blocks[1].norm1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    f.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    f.on_states(x, SCALES)(SCALES.flatten(z))
    assert seen == [(2, 16, 5, 7), 3]
    f.blocks[0].norm3 = nn.InstanceNorm2d(8, affine=True)
    flat = f.on_states(x, SCALES)
    torch.testing.assert_close(flat(SCALES.flatten(z)), SCALES.flatten(f(z, x)), rtol=0, atol=0)
    assert any(tensor is f.blocks[0].norm3.weight for tensor in flat.inputs)


def test_weight_norm_has_g_as_its_norm_and_right_second_derivatives():
    layer = Convolution(2, 3, 3, weight_norm=True)
    torch.testing.assert_close(layer.weight, layer.v)  # at the start
    with torch.no_grad():
        layer.v.mul_(torch.rand(3, 1, 1, 1) + 1)
    norms = torch.linalg.vector_norm(layer.weight, dim=(1, 2, 3))
    torch.testing.assert_close(norms, layer.g.flatten())

    def output(v, g):
        return torch.func.functional_call(layer, {"v": v, "g": g}, (image,))

    image = torch.randn(1, 2, 4, 4)
    inputs = tuple(p.detach().requires_grad_() for p in (layer.v, layer.g))
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


def test_dropout_drops_channels_and_keeps_the_mean():
    layer = ChannelDropout(500, 0.25, variational=True)
    x = torch.ones(40, 500, 2, 2)
    dropped = layer(x)
    assert set(dropped.unique().tolist()) == {0, 1 / 0.75}
    assert (dropped == dropped[:, :, :1, :1]).all()  # a channel as a whole
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval()(x), x)


def test_a_variational_mask_is_one_per_solve_and_others_one_per_evaluation():
    (z, x), different = states(), []
    z = SCALES.flatten(z)
    for variational in (True, False):
        f = transformation(dropout=0.5, variational=variational)
        first, other = f.on_states(x, SCALES), f.on_states(x, SCALES)
        values = first(z), other(z), first(z)
        assert not torch.equal(values[0], values[1])
        different.append(not torch.equal(values[0], values[2]))
        f.eval()
        assert torch.equal(f.on_states(x, SCALES)(z), f.on_states(x, SCALES)(z))
    assert different == [False, True]


def test_softplus_of_great_curvature_is_the_relu():
    f, (z, x) = transformation(), states()
    flat = SCALES.flatten
    torch.testing.assert_close(flat(f(z, x, 1e7)), flat(f(z, x)), rtol=1e-4, atol=1e-5)
    assert (flat(f(z, x, 1.0)) - flat(f(z, x))).abs().max() > 1e-3
