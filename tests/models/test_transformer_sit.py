"""SiT: published sizes, DiT's layout and initialisation, and Diffusers' model features."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from helpers import tiny_sit
from safetensors.torch import load_file

from si_distill.models import SIT_PRESETS, SiTTransformer2DModel
from si_distill.models.transformer_sit import PRODUCT_TOKENS, attention_by_products

PUBLISHED_SIZES = {"S": 33e6, "B": 130e6, "L": 458e6, "XL": 675e6}


@pytest.fixture
def inputs():
    """(x_t, t, labels) for `tiny_sit`; the last label is its null class."""
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([0.0, 0.3, 0.7, 1.0]), torch.tensor([0, 1, 2, 3])


def fresh(**config) -> SiTTransformer2DModel:
    return SiTTransformer2DModel(
        **{
            **dict(sample_size=8, patch_size=4, in_channels=1, num_layers=1, num_attention_heads=2),
            **dict(attention_head_dim=8, num_classes=3),
            **config,
        }
    )


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class TestSizes:
    @pytest.mark.parametrize("size", PUBLISHED_SIZES)
    def test_have_the_published_number_of_parameters(self, size):
        with torch.device("meta"):
            model = SiTTransformer2DModel.from_preset(f"SiT-{size}/2")
        assert count(model) == pytest.approx(PUBLISHED_SIZES[size], rel=0.005)

    @pytest.mark.parametrize("preset", SIT_PRESETS)
    def test_differ_between_patches_only_at_the_borders(self, preset):
        size, patch = preset.removeprefix("SiT-").split("/")
        with torch.device("meta"):
            model = SiTTransformer2DModel.from_preset(preset)
            smallest = SiTTransformer2DModel.from_preset(f"SiT-{size}/2")
        dim = model.config.num_attention_heads * model.config.attention_head_dim
        # A patch of p² · 4 numbers enters through one linear map and leaves through another with biases.
        assert count(model) - count(smallest) == 4 * (int(patch) ** 2 - 4) * (2 * dim + 1)

    def test_may_be_changed(self):
        with torch.device("meta"):
            model = SiTTransformer2DModel.from_preset("SiT-S/4", sample_size=16, in_channels=3, num_layers=2)
        assert (model.config.sample_size, model.config.in_channels, model.config.num_layers) == (16, 3, 2)
        assert model.config.patch_size == 4

    def test_of_an_unknown_name_are_refused_with_the_choices(self):
        with pytest.raises(ValueError, match=r"Unknown preset 'SiT-S/3'.*SiT-S/2, SiT-S/4.*SiT-XL/8"):
            SiTTransformer2DModel.from_preset("SiT-S/3")


class TestStructure:
    def test_a_fresh_network_says_zero(self, inputs):
        assert not fresh()(*inputs).sample.any()

    @pytest.mark.parametrize("learn_sigma", [False, True])
    def test_patches_leave_where_they_entered(self, learn_sigma):
        # Blocks of a fresh network are gated off. The patch's pixels and their negatives are the hidden channels, so
        # that on images of ±1 the last normalisation is the identity; the output is DiT's order (row, column, channel).
        channels, patch = 2, 2
        pixels = channels * patch**2
        model = fresh(
            sample_size=6, patch_size=patch, in_channels=channels, attention_head_dim=pixels, learn_sigma=learn_sigma
        )
        model.pos_embed.pos_embed.zero_()
        identity = torch.eye(pixels)
        with torch.no_grad():
            model.pos_embed.proj.weight.copy_(torch.cat([identity, -identity]).unflatten(1, (channels, patch, patch)))
            weight = model.proj_out.weight.unflatten(0, (patch, patch, model.out_channels))
            weight[:, :, :channels, :pixels] = identity.unflatten(0, (channels, patch, patch)).permute(1, 2, 0, 3)
            weight[:, :, channels:] = 7.0
        image = torch.randn(3, channels, 6, 6, generator=torch.Generator().manual_seed(0)).sign()
        output = model(image, torch.rand(3), torch.tensor([0, 1, 2])).sample
        torch.testing.assert_close(output, image, rtol=1e-5, atol=1e-5)

    def test_augmentation_labels_start_without_a_word_and_zeros_stay_so(self, inputs):
        labels = torch.ones(len(inputs[0]), 9)
        untrained = tiny_sit(augment_dim=9)
        untrained.augment_embed.weight.data.zero_()
        assert torch.equal(untrained(*inputs, augment_labels=labels).sample, untrained(*inputs).sample)
        trained = tiny_sit(augment_dim=9)
        assert torch.equal(trained(*inputs, augment_labels=torch.zeros_like(labels)).sample, trained(*inputs).sample)
        assert not torch.equal(trained(*inputs, augment_labels=labels).sample, trained(*inputs).sample)
        assert not fresh(augment_dim=9).augment_embed.weight.any()
        # Also without labels the map takes part: distributed training waits for its gradient.
        trained(*inputs).sample.sum().backward()
        assert trained.augment_embed.weight.grad is not None

    def test_augmentation_labels_that_do_not_fit_are_refused(self, inputs):
        for augment_dim, given in ((0, (4, 9)), (9, (4, 8)), (9, (1, 9))):
            with pytest.raises(ValueError, match=rf"augment_dim {augment_dim}\) takes \(4, {augment_dim}\)"):
                tiny_sit(augment_dim=augment_dim)(*inputs, augment_labels=torch.zeros(given))

    def test_condition_starts_without_a_word_and_is_heard_later(self, inputs):
        condition = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        model = tiny_sit(condition_channels=3)
        said = model(*inputs, condition=condition).sample
        assert not torch.equal(model(*inputs, condition=condition.roll(1, 0)).sample, said)
        model.condition_embed.weight.data.zero_()
        plain = tiny_sit()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "condition_embed.weight"})
        assert torch.equal(model(*inputs, condition=condition).sample, plain(*inputs).sample)
        assert not fresh(condition_channels=3).condition_embed.weight.any()

    def test_condition_belongs_to_its_patch(self, inputs):
        # Without attention between them a patch's output depends on its own part of the condition alone.
        model = tiny_sit(condition_channels=1, num_layers=0)
        condition = torch.zeros(4, 1, 8, 8)
        changed = condition.clone()
        changed[:, :, 5, 2] = 1.0  # the lower left patch
        difference = model(*inputs, condition=changed).sample - model(*inputs, condition=condition).sample
        assert difference[:, :, 4:, :4].any()
        difference[:, :, 4:, :4] = 0
        assert not difference.any()

    def test_condition_that_does_not_fit_is_refused(self, inputs):
        for channels, given in ((3, None), (3, (4, 2, 8, 8)), (3, (4, 3, 4, 4)), (3, (1, 3, 8, 8))):
            condition = None if given is None else torch.zeros(given)
            with pytest.raises(ValueError, match=r"takes a `condition` .*of shape \(4, 3, 8, 8\) next to x_t"):
                tiny_sit(condition_channels=channels)(*inputs, condition=condition)
        with pytest.raises(ValueError, match=r"takes no `condition` next to x_t"):
            tiny_sit()(*inputs, condition=torch.zeros(4, 1, 8, 8))

    def test_learned_variances_are_dropped(self, inputs):
        model = tiny_sit(learn_sigma=True)
        plain = tiny_sit()
        state = model.state_dict()
        for name in ("proj_out.weight", "proj_out.bias"):
            state[name] = state[name].unflatten(0, (16, 2))[:, 0]
        plain.load_state_dict(state)
        output = model(*inputs).sample
        assert output.shape == inputs[0].shape
        assert output.is_contiguous()
        assert torch.equal(output, plain(*inputs).sample)

    @pytest.mark.parametrize("scale", [1.0, 100.0])
    def test_time_embedding_is_that_of_sit(self, scale):
        t = torch.tensor([0.0, 0.25, 0.999, 1.0])
        frequencies = torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
        phase = scale * t.double()[:, None] * frequencies
        expected = torch.cat([phase.cos(), phase.sin()], dim=1).float()
        torch.testing.assert_close(fresh(timestep_scale=scale).time_proj(t), expected, rtol=0, atol=2e-5)

    def test_times_keep_float32_in_a_bfloat16_network(self, inputs):
        # In bfloat16 0.999 is 1, and times 100 the phase would be wrong by a tenth.
        model, embedded = tiny_sit().to(torch.bfloat16), []
        model.time_embed.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
        model(inputs[0].bfloat16(), torch.full((4,), 0.999), inputs[2])
        assert torch.equal(embedded[0], model.time_proj(torch.full((4,), 0.999)).bfloat16())
        assert not torch.equal(embedded[0], model.time_proj(torch.ones(4)).bfloat16())

    def test_one_number_is_a_time_for_the_whole_batch(self, inputs):
        model, (images, _, labels) = tiny_sit(), inputs
        expected = model(images, torch.full((4,), 0.3), labels).sample
        assert torch.equal(model(images, 0.3, labels).sample, expected)
        assert torch.equal(model(images, torch.tensor(0.3), labels).sample, expected)

    @pytest.mark.parametrize("changed", [0, 1, 2])
    def test_every_input_matters(self, inputs, changed):
        other = list(inputs)
        other[changed] = inputs[changed].flip(0)
        model = tiny_sit()
        assert (model(*inputs).sample - model(*other).sample).abs().amax((1, 2, 3)).min() > 1e-5

    def test_positions_are_fixed(self):
        model = fresh()
        assert [name for name, _ in model.named_buffers()] == ["pos_embed.pos_embed"]
        assert not any("pos_embed.pos_embed" in name for name, _ in model.named_parameters())
        assert len({tuple(position) for position in model.pos_embed.pos_embed[0].tolist()}) == 4

    def test_the_null_class_exists_only_with_label_dropout(self, inputs):
        images, t, _ = inputs
        model = tiny_sit()
        assert model.null_class == 3
        assert model.class_embed.num_embeddings == 4
        without = tiny_sit(class_dropout_prob=0.0)
        assert without.null_class is None
        assert without.class_embed.num_embeddings == 3
        with pytest.raises(IndexError):
            without(images, t, torch.full((4,), 3))

    @pytest.mark.parametrize("shape", [(4, 1, 8, 4), (4, 1, 4, 4), (4, 3, 8, 8), (4, 1, 16, 16), (1, 8, 8)])
    def test_other_images_are_refused(self, inputs, shape):
        with pytest.raises(ValueError, match=r"square images of shape \(batch, 1, 8, 8\)"):
            tiny_sit()(torch.zeros(shape), *inputs[1:])

    def test_impossible_shapes_are_refused(self):
        with pytest.raises(ValueError, match="`patch_size` 3 does not divide `sample_size` 8"):
            fresh(patch_size=3)
        with pytest.raises(ValueError, match="= 6 must be a multiple of 4"):
            fresh(num_attention_heads=1, attention_head_dim=6)

    def test_returns_a_tuple_on_request(self, inputs):
        model = tiny_sit()
        (sample,) = model(*inputs, return_dict=False)
        assert torch.equal(sample, model(*inputs).sample)


def fused_attention(query, key, value):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


class TestAttentionInBfloat16OnACPU:
    @pytest.mark.parametrize("spread", [1, 8])  # the scores' standard deviation
    @pytest.mark.parametrize("head_dim", [64, 72])
    def test_by_products_is_as_accurate_as_the_fused_kernel(self, spread, head_dim):
        generator = torch.Generator().manual_seed(0)
        query, key, value, gradient = (
            torch.randn(2, 64, 3, head_dim, generator=generator).bfloat16() for _ in range(4)
        )

        def results(attention, dtype):
            inputs = [x.to(dtype).requires_grad_() for x in (query * spread, key, value)]
            output = attention(*inputs)
            return [output, *torch.autograd.grad(output, inputs, gradient.to(dtype))]

        exact = results(fused_attention, torch.float64)
        for ours, fused, right in zip(
            results(attention_by_products, torch.bfloat16), results(fused_attention, torch.bfloat16), exact, strict=True
        ):
            assert ours.dtype == torch.bfloat16
            size = right.norm()
            assert (ours - right).norm() / size < max(0.003, (fused - right).norm() / size)

    def test_is_by_products_where_gradients_flow(self, inputs):
        """The two round otherwise, so that the bits say which one it was."""
        model = tiny_sit().bfloat16()
        images, t, labels = inputs
        trained = model(images.bfloat16(), t, labels).sample
        with torch.no_grad():
            sampled = model(images.bfloat16(), t, labels).sample
        assert not torch.equal(trained, sampled)
        assert (trained - sampled).abs().max() < 0.03 * sampled.abs().max()
        with attention_backend("native"):  # puts Diffusers' process-wide default back
            model.set_attention_backend("native")
            assert torch.equal(model(images.bfloat16(), t, labels).sample, sampled)

    def test_is_fused_for_long_sequences(self):
        side = math.isqrt(PRODUCT_TOKENS) + 1
        model = fresh(sample_size=side, patch_size=1).bfloat16()
        torch.nn.init.normal_(model.proj_out.weight)
        torch.nn.init.normal_(model.transformer_blocks[0].modulation.bias)
        images = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
        trained = model(images, 0.5, torch.tensor([0])).sample
        with torch.no_grad():
            assert torch.equal(model(images, 0.5, torch.tensor([0])).sample, trained)
        assert trained.any()

    def test_takes_the_transforms_of_torch_func_and_second_derivatives(self, inputs):
        model = tiny_sit().bfloat16()
        images, t, labels = inputs
        images = images.bfloat16().requires_grad_()
        output = model(images, t, labels).sample
        (gradient,) = torch.autograd.grad(output.sum(), images, create_graph=True)
        transformed, pull_back = torch.func.vjp(lambda x: model(x, t, labels).sample, images.detach())
        assert torch.equal(transformed, output)
        torch.testing.assert_close(pull_back(torch.ones_like(output))[0], gradient)
        (second,) = torch.autograd.grad(gradient.float().square().sum(), images)
        assert second.any()
        assert second.isfinite().all()

    def test_under_autocast_has_the_gradients_of_float32(self, inputs):
        model = tiny_sit()
        # Of matrices: a key's bias has none, for the softmax does not see it.
        weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        gradients = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = model(*inputs).sample
            gradients.append(torch.autograd.grad(output.float().square().sum(), weights))
        for exact, rounded in zip(*gradients, strict=True):
            assert (rounded - exact).norm() < 0.05 * exact.norm()

    def test_compiles_as_one_graph(self, inputs):
        torch._dynamo.reset()
        model = tiny_sit()
        results = []
        for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            with torch.autocast("cpu", torch.bfloat16):
                output = network(*inputs).sample
            results.append(torch.autograd.grad(output.float().sum(), model.transformer_blocks[0].attn.to_q.weight)[0])
        torch.testing.assert_close(*results, rtol=0.02, atol=1e-3)


class TestDiffusersFeatures:
    def test_tokens_lie_together_in_memory(self, inputs):
        seen = []
        model = tiny_sit()
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].is_contiguous()))
        model(*inputs)
        assert seen == [True] * len(model.transformer_blocks)

    def test_gradient_checkpointing_gives_the_same_gradients(self, inputs):
        gradients, calls = [], []
        for checkpointing in (False, True):
            model = tiny_sit()
            if checkpointing:
                model.enable_gradient_checkpointing()
            for block in model.transformer_blocks:
                block.register_forward_pre_hook(lambda *_, kind=checkpointing: calls.append(kind))
            model(*inputs).sample.square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert calls.count(False) == 2
        assert calls.count(True) == 4  # each block again in the backward pass
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(checkpointed, plain)

    def test_every_parameter_gets_a_gradient(self, inputs):
        model = tiny_sit()
        model(*inputs).sample.square().sum().backward()
        assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]

    def test_fused_projections_give_the_same_output(self, inputs):
        model = tiny_sit()
        expected = model(*inputs).sample
        model.fuse_qkv_projections()
        assert all(block.attn.fused_projections for block in model.transformer_blocks)
        torch.testing.assert_close(model(*inputs).sample, expected)
        model.unfuse_qkv_projections()
        assert torch.equal(model(*inputs).sample, expected)

    def test_attention_backend_can_be_chosen(self, inputs):
        model = tiny_sit()
        expected = model(*inputs).sample
        with attention_backend("_native_math"):
            torch.testing.assert_close(model(*inputs).sample, expected)
        with attention_backend("native"):  # Diffusers also changes the process-wide default; this puts it back
            model.set_attention_backend("_native_math")
            torch.testing.assert_close(model(*inputs).sample, expected)
        assert {block.attn.processor._attention_backend for block in model.transformer_blocks} == {"_native_math"}

    def test_save_and_load_are_bit_identical(self, inputs, tmp_path):
        model = tiny_sit(learn_sigma=True)
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        assert set(weights) == {name for name, _ in model.named_parameters()}
        loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
        public = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (model, loaded)]
        assert public[0] == public[1]
        for name, parameter in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter)
        assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)

    def test_loads_in_bfloat16(self, inputs, tmp_path):
        model = tiny_sit()
        model.save_pretrained(tmp_path)
        loaded = SiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        images, t, labels = inputs
        output = loaded(images.bfloat16(), t, labels).sample
        expected = model(*inputs).sample
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).abs().max() < 0.03 * expected.abs().max()

    def test_compiles_as_one_graph(self, inputs):
        torch._dynamo.reset()
        model = tiny_sit()
        expected = model(*inputs).sample
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs).sample, expected)

    def test_compiles_its_repeated_blocks(self, inputs):
        torch._dynamo.reset()
        model = tiny_sit()
        expected = model(*inputs).sample
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
        torch.testing.assert_close(model(*inputs).sample, expected)

    def test_layerwise_casting_stores_blocks_in_8_bits(self, inputs):
        model = tiny_sit()
        expected = model(*inputs).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert model.transformer_blocks[0].ff[0].weight.dtype == torch.float8_e4m3fn
        assert model.pos_embed.proj.weight.dtype == torch.float32
        output = model(*inputs).sample
        assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max()
