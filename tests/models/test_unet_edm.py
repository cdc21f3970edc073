"""EDM's UNets against formulas that are written out here from the tensors' names, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EDM_KINDS, tiny_edm

from si_distill.models import EDMUNet2DModel
from si_distill.models.unet_edm import ResamplingConv2d


def lowpass(x, taps, direction, pad=None):
    """Zero-padded filtering and decimation, or zero insertion and filtering, one axis after the other."""
    taps = [tap / sum(taps) for tap in taps]
    pad = len(taps) // 2 - 1 if pad is None else pad
    for axis in (2, 3):
        x = x.transpose(axis, 3)
        size = x.shape[3]
        if direction == "down":
            x = F.pad(x, (pad, pad))
            outputs = (size + 2 * pad - len(taps)) // 2 + 1
            x = sum(tap * x[..., k::2][..., :outputs] for k, tap in enumerate(taps))
        else:
            spread = torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(3)
            spread = F.pad(spread, (len(taps) - 1, len(taps) - 1))
            x = 2 * sum(tap * spread[..., len(taps) - 1 - k + pad :][..., : 2 * size] for k, tap in enumerate(taps))
        x = x.transpose(axis, 3)
    return x


def written_out(network, x, c_noise, label, augment):
    """The network's function, from its tensors by their names."""
    tensors = {name: value.double() for name, value in network.state_dict().items()}
    config = network.config
    adm, fourier = config.architecture == "adm", config.architecture == "ncsnpp"
    taps = [1, 3, 3, 1] if fourier else [1, 1]
    eps = 1e-5 if adm else 1e-6

    def linear(name, value):
        return value @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def conv(name, value):
        weight = tensors[f"{name}.weight"]
        return F.conv2d(value, weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, value):
        grouped = value.reshape(len(value), max(1, min(32, value.shape[1] // 4)), -1)
        mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
        value = ((grouped - mean) / (variance + eps).sqrt()).reshape(value.shape)
        return value * tensors[f"{name}.weight"][:, None, None] + tensors[f"{name}.bias"][:, None, None]

    def resampled(name, value):
        direction = (
            "down" if name.split(".")[-2].endswith("down") else "up" if name.split(".")[-2].endswith("_up") else None
        )
        value = lowpass(value, taps, direction) if direction else value
        return conv(name, value) if f"{name}.weight" in tensors else value

    def block(name, value, emb):
        scale = 1 if adm else math.sqrt(0.5)
        out = resampled(f"{name}.conv0", F.silu(norm(f"{name}.norm0", value)))
        condition = linear(f"{name}.affine", emb)[:, :, None, None]
        if adm:
            gain, shift = condition.chunk(2, 1)
            out = norm(f"{name}.norm1", out) * (1 + gain) + shift
        else:
            out = norm(f"{name}.norm1", out + condition)
        out = (conv(f"{name}.conv1", F.silu(out)) + resampled(f"{name}.skip", value)) * scale
        if f"{name}.qkv.weight" in tensors:
            batch, channels, *image = out.shape
            heads = channels // config.attention_head_dim if adm else 1
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", out))
            q, k, v = qkv.reshape(batch * heads, channels // heads, 3, -1).unbind(2)
            weights = (q.mT @ k / math.sqrt(channels // heads)).softmax(-1)
            out = (out + conv(f"{name}.proj", (v @ weights.mT).reshape(batch, channels, *image))) * scale
        return out

    half = config.model_channels * (2 if fourier else 1) // 2
    frequencies = 10000 ** -(torch.arange(half).double() / (half - (0 if adm else 1)))
    phases = torch.outer(c_noise, 2 * math.pi * tensors["map_noise.freqs"] if fourier else frequencies)
    emb = torch.cat([phases.cos(), phases.sin()] if adm else [phases.sin(), phases.cos()], dim=1)
    one_hot = torch.zeros(len(x), config.num_classes).double()
    for row, y in enumerate(label.tolist()):
        if y < config.num_classes:
            one_hot[row, y] = 1
    emb = emb + linear("map_augment", augment)
    if not adm:
        emb = emb + linear("map_label", one_hot * math.sqrt(config.num_classes))
    emb = linear("map_layer1", F.silu(linear("map_layer0", emb)))
    emb = F.silu(emb + linear("map_label", one_hot) if adm else emb)

    def names(part):
        return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in tensors if name.startswith(part)))

    image, skips = x, []
    for name in names("enc."):
        if name.endswith("aux_residual"):
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            wide = F.conv2d(
                F.pad(image, (2, 2, 2, 2)), weight, bias
            )  # at the high resolution, with room for the filter
            x = skips[-1] = image = (x + lowpass(wide, taps, "down", pad=0)) / math.sqrt(2)
            continue
        x = conv(name, x) if name.endswith("_conv") else block(name, x, emb)
        skips.append(x)
    features = x
    for name in names("dec."):
        x = block(name, torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
    return conv("out_conv", F.silu(norm("out_norm", x))), features


def inputs(network, batch=4):
    generator = torch.Generator().manual_seed(1)
    config = network.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    c_noise = torch.log(torch.tensor([0.002, 0.1, 2.5, 80.0])).div(4)[:batch]
    return x, c_noise, torch.tensor([0, 2, 1, 2])[:batch], torch.rand(batch, config.augment_dim, generator=generator)


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_written_out(kind):
    network = tiny_edm(kind, class_dropout_prob=0.1).double()
    x, c_noise, labels, augment = inputs(network)
    labels[1] = network.null_class
    expected, features = written_out(network, x, c_noise.double(), labels, augment.double())
    with torch.no_grad():
        output = network(x, c_noise, labels, return_features=True, augment_labels=augment)
    # The time features are computed in float32.
    torch.testing.assert_close(output.sample, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.features, features.flatten(2).mT, rtol=1e-6, atol=1e-6)
    assert output.features.shape[-1] == network.feature_width


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling_keeps_constants(taps, direction):
    layer = ResamplingConv2d(2, 2, 0, direction, taps)
    result = layer(torch.full((1, 2, 8, 8), 3.0))
    assert result.shape[-1] == (4 if direction == "down" else 16)
    torch.testing.assert_close(result[..., 1:-1, 1:-1], torch.full_like(result[..., 1:-1, 1:-1], 3.0))


def test_no_augmentation_is_zeros_and_every_parameter_learns():
    network = tiny_edm("ncsnpp").train()
    x, c_noise, labels, augment = inputs(network)
    x = x.float()
    sample = network(x, c_noise, labels).sample
    assert torch.equal(sample, network(x, c_noise, labels, augment_labels=torch.zeros_like(augment)).sample)
    assert not torch.allclose(sample, network(x, c_noise, labels, augment_labels=augment).sample)
    sample.square().sum().backward()
    assert [name for name, value in network.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_every_weight_of_a_fresh_network_is_drawn(kind, monkeypatch):
    """Memory that nobody has written would be NaN here."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(math.nan))
    shape = dict(sample_size=8, in_channels=3, num_classes=3, augment_dim=2, num_blocks=1, channel_mult_emb=2)
    network = EDMUNet2DModel(**{**shape, **EDM_KINDS[kind]})
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_gradient_checkpointing_changes_nothing():
    network = tiny_edm("adm").train()
    x, c_noise, labels, _ = inputs(network)
    gradients = []
    for _ in range(2):
        network.zero_grad()
        network(x.float(), c_noise, labels).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
        network.enable_gradient_checkpointing()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_unconditional():
    network = tiny_edm("ddpmpp", num_classes=0, augment_dim=0)
    assert network.null_class is None
    x, c_noise, labels, _ = inputs(network)
    x = x.float()
    assert torch.equal(network(x, c_noise).sample, network(x, c_noise, labels).sample)


def test_half_precision_keeps_the_frequencies(tmp_path):
    network = tiny_edm("ncsnpp")
    network.save_pretrained(tmp_path)
    x, c_noise, labels, _ = inputs(network)
    with torch.no_grad():
        exact = network(x.float(), c_noise, labels).sample
        for half in (EDMUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16), network.to(torch.bfloat16)):
            assert (half.dtype, half.map_noise.freqs.dtype) == (torch.bfloat16, torch.float32)
            sample = half(x.bfloat16(), c_noise, labels).sample
            assert float((sample - exact).abs().max() / exact.abs().max()) < 0.03


def test_save_and_load(tmp_path):
    network = tiny_edm("ncsnpp")
    network.save_pretrained(tmp_path)
    loaded = EDMUNet2DModel.from_pretrained(tmp_path)
    x, c_noise, labels, _ = inputs(network)
    assert torch.equal(network(x.float(), c_noise, labels).sample, loaded(x.float(), c_noise, labels).sample)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(hidden_states=torch.zeros(4, 1, 8, 8)), "takes images of shape"),
        (dict(class_labels=None), "has 3 classes"),
        (dict(augment_labels=torch.zeros(4, 9)), "augment_dim 2"),
    ],
)
def test_wrong_inputs(change, text):
    network = tiny_edm("ddpmpp")
    arguments = dict(hidden_states=torch.zeros(4, 3, 8, 8), timestep=0.1, class_labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=text):
        network(**{**arguments, **change})


def test_wrong_settings():
    with pytest.raises(ValueError, match="choose one of: ddpmpp, ncsnpp, adm"):
        EDMUNet2DModel(architecture="unet")
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        EDMUNet2DModel(sample_size=30)
