"""EDM2's magnitude-preserving UNet against formulas that are written out here, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_edm2

from si_distill.models import EDM2_PRESETS, EDM2UNet2DModel
from si_distill.models.unet_edm2 import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize


def inputs(batch=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64)
    c_noise = torch.log(torch.tensor([0.002, 0.1, 2.5, 80.0], dtype=torch.float64)).div(4)[:batch]
    return x, c_noise, torch.tensor([0, 2, 1, 2])[:batch]


def written_out(network, x, c_noise, labels):
    """The network's function, from its tensors by their names."""
    tensors = {name: value.double() for name, value in network.state_dict().items()}

    def unit(value, *dims):
        return value / (value.pow(2).mean(dims, keepdim=True).sqrt() + 1e-4)

    def layer(name, value, gain=1.0):
        weight = tensors[f"{name}.weight"]
        weight = unit(weight, *range(1, weight.ndim)) * gain / math.sqrt(weight[0].numel())
        return value @ weight.T if weight.ndim == 2 else F.conv2d(value, weight, padding=weight.shape[-1] // 2)

    def act(value):
        return value * torch.sigmoid(value) / 0.596

    def mix(a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    def block(name, value, emb):
        if name.endswith("_down"):
            value = value.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        if name.endswith("_up"):
            value = value.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skip = f"{name}.conv_skip"
        if name.startswith("enc"):
            value = unit(layer(skip, value) if f"{skip}.weight" in tensors else value, 1)
        out = layer(f"{name}.conv_res0", act(value))
        out = out * (1 + layer(f"{name}.emb_linear", emb, tensors[f"{name}.emb_gain"]))[:, :, None, None]
        out = layer(f"{name}.conv_res1", act(out))
        if name.startswith("dec") and f"{skip}.weight" in tensors:
            value = layer(skip, value)
        value = mix(value, out, 0.3)
        if f"{name}.attn_qkv.weight" in tensors:
            batch, channels, height, width = value.shape
            dim = network.config.attention_head_dim
            qkv = layer(f"{name}.attn_qkv", value).reshape(batch, channels // dim, dim, 3, height * width)
            q, k, v = unit(qkv, 2).unbind(3)
            weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(dim), -1)
            out = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(value.shape)
            value = mix(value, layer(f"{name}.attn_proj", out), 0.3)
        return value

    emb = math.sqrt(2) * torch.cos(torch.outer(c_noise, tensors["emb_fourier.freqs"]) + tensors["emb_fourier.phases"])
    emb = layer("emb_noise", emb)
    one_hot = F.one_hot(labels, 4).double()[:, :3]
    emb = act(mix(emb, layer("emb_label", one_hot * math.sqrt(3)), 0.5))

    def names(part):
        return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in tensors if name.startswith(part)))

    x, skips = torch.cat([x, torch.ones(len(x), 1, 8, 8).double()], 1), []
    for name in names("enc."):
        x = layer(name, x) if name.endswith("_conv") else block(name, x, emb)
        skips.append(x)
    features = x
    for name in names("dec."):
        if "_block" in name:
            other = skips.pop()
            total = x.shape[1] + other.shape[1]
            a, b = (value * math.sqrt(total / 2 / value.shape[1]) for value in (x, other))
            x = torch.cat([a, b], 1)
        x = block(name, x, emb)
    return layer("out_conv", x, tensors["out_gain"]), features


def test_written_out():
    network = tiny_edm2(class_dropout_prob=0.1).double()
    x, c_noise, labels = inputs()
    labels[1] = network.null_class
    expected, features = written_out(network, x, c_noise, labels)
    with torch.no_grad():
        output = network(x, c_noise, labels, return_features=True)
    torch.testing.assert_close(output.sample, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.features, features.flatten(2).mT, rtol=1e-10, atol=1e-10)
    assert output.features.shape[-1] == network.feature_width


def test_magnitudes_are_preserved():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 48, 16, 16, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    layer = MPConv(48, 64, 3).double()
    # Zero padding takes some of the variance at the border away.
    with torch.no_grad():
        inner = layer(a)[..., 1:-1, 1:-1]
    features = MPFourier(4096)(torch.tensor([0.3]))
    for value in (mp_sum(a, b, 0.3), mp_cat(a, b[:, :16]), mp_silu(a), inner, features, normalize(7 * a, dim=1)):
        assert float(value.square().mean()) == pytest.approx(1.0, abs=0.03)
    halves = mp_cat(a, b[:, :16]).square().sum((0, 2, 3))
    assert float(halves[:48].sum() / halves[48:].sum()) == pytest.approx(1.0, abs=0.03)


def test_a_random_network_keeps_unit_variance():
    network = tiny_edm2(model_channels=32, num_classes=100)
    torch.nn.init.ones_(network.out_gain)
    x = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = network(x, torch.linspace(-1.5, 1.1, 32), torch.arange(32), return_features=True)
    assert 0.7 < float(output.sample.std()) < 1.3
    assert 0.7 < float(output.features.std()) < 1.3


def test_weights_are_normalised_in_training_only():
    network = tiny_edm2()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(5.0 if parameter.ndim else 1.0)
    x, c_noise, labels = inputs()
    before = {name: value.clone() for name, value in network.named_parameters()}
    evaluated = network(x.float(), c_noise, labels).sample
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    trained = network.train()(x.float(), c_noise, labels).sample
    torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-3)
    for name, value in network.named_parameters():
        if value.ndim:
            rms = value.detach().square().mean(tuple(range(1, value.ndim))).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(value, before[name])


def test_the_gradient_is_perpendicular_to_the_weights():
    network = tiny_edm2().train()
    x, c_noise, labels = inputs()
    network(x.float(), c_noise, labels).sample.square().sum().backward()
    for name, value in network.named_parameters():
        assert value.grad is not None, name
        if value.ndim:
            along = (value.grad * value.detach()).flatten(1).sum(1).abs()
            assert float((along / value.grad.flatten(1).norm(dim=1).clamp_min(1e-9)).max()) < 0.02, name


def test_published_sizes():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in EDM2UNet2DModel.from_preset(name).parameters()) for name in EDM2_PRESETS}
    millions = {name: round(count / 1e6) for name, count in counts.items()}
    # Karras et al. 2024, table 2 (with the log-variance head, which is 128 parameters).
    assert millions == {
        "EDM2-XS": 125,
        "EDM2-S": 280,
        "EDM2-M": 498,
        "EDM2-L": 777,
        "EDM2-XL": 1119,
        "EDM2-XXL": 1523,
    }
    with pytest.raises(ValueError, match="Choose one of: EDM2-XS"):
        EDM2UNet2DModel.from_preset("EDM2-XXXL")


def test_half_precision_keeps_the_frequencies(tmp_path):
    network = tiny_edm2()
    network.save_pretrained(tmp_path)
    x, c_noise, labels = inputs()
    with torch.no_grad():
        exact = network(x.float(), c_noise, labels).sample
        for half in (EDM2UNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16), network.to(torch.bfloat16)):
            assert (half.dtype, half.emb_fourier.freqs.dtype) == (torch.bfloat16, torch.float32)
            sample = half(x.bfloat16(), c_noise, labels).sample
            assert float((sample - exact).abs().max() / exact.abs().max()) < 0.03


def test_save_and_load(tmp_path):
    network = tiny_edm2()
    network.save_pretrained(tmp_path)
    loaded = EDM2UNet2DModel.from_pretrained(tmp_path)
    x, c_noise, labels = inputs()
    assert torch.equal(network(x.float(), c_noise, labels).sample, loaded(x.float(), c_noise, labels).sample)


def test_wrong_inputs():
    network = tiny_edm2()
    with pytest.raises(ValueError, match="takes images of shape"):
        network(torch.zeros(1, 3, 8, 8), 0.0, torch.tensor([0]))
    with pytest.raises(ValueError, match="has 3 classes"):
        network(torch.zeros(1, 4, 8, 8), 0.0)
    with pytest.raises(ValueError, match="cannot be halved 3 times"):
        EDM2UNet2DModel(sample_size=28)
