"""The data, the pipeline and the figures of `make demo-text`."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_autoencoder_only_enlarges():
    from text_digits_data import SCENES, enlarge, enlarging_autoencoder, paint
    from text_digits_judge import as_tensor

    small = paint(SCENES[:8], seed=0)
    pixels, images = as_tensor(small), as_tensor(enlarge(small))
    vae = enlarging_autoencoder()
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        assert torch.allclose(posterior.mean, pixels, atol=1e-4)
        assert posterior.std.max() < 1e-5
        assert torch.allclose(vae.decode(pixels).sample, images, atol=1e-4)


def test_a_plain_stock_call_draws_a_picture_and_texts_are_words(tmp_path):
    from diffusers import DiffusionPipeline
    from text_digits_data import SCENES, build_pipeline

    from si_distill.text_to_image.texts import encode_texts

    build_pipeline(seed=0).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    (image,) = pipeline("a red seven on the left", num_inference_steps=1, output_type="np").images
    assert image.shape == (128, 128, 3)
    assert (image >= 0).all()

    texts = encode_texts(pipeline, [scene.caption for scene in SCENES])
    words = texts.condition(torch.arange(len(SCENES) + 1)).text["encoder_hidden_states"]
    assert words.shape[1] == 8  # the beginning, what the pipeline says first, and the six words of a caption
    assert len({row.numpy().tobytes() for row in words}) == len(SCENES) + 1


def test_captions_say_what_images_show(tmp_path):
    from text_digits_data import COLOURS, DIGITS, PLACES, write_images

    from si_distill.data import DataConfig, load_training_data

    write_images(tmp_path / "images.parquet", 40, seed=0)
    config = DataConfig("parquet", data_files=str(tmp_path / "images.parquet"), image_size=128, caption_column="text")
    data = load_training_data(config)
    for index in range(40):
        _, colour, digit, place = data.class_names[data.labels[index]].split(" ", 3)
        image = data[index]["images"]
        assert digit in DIGITS
        left, top = (8 * side for side in PLACES[place])
        box = image[:, top : top + 64, left : left + 64]
        mean = box.mean((1, 2)) + 1
        strongest = {
            name for name, strength in zip(("red", "green", "blue"), mean, strict=True) if strength == mean.max()
        }
        assert strongest <= ({"red", "green"} if colour == "yellow" else {colour})
        assert box.max() == image.max()
        assert colour in COLOURS


def test_the_figures_of_images_against_themselves():
    from text_digits import measure
    from text_digits_data import SCENES, paint
    from text_digits_judge import Judge, as_tensor

    torch.manual_seed(0)
    judge, scenes = Judge().eval(), SCENES * 2
    once = as_tensor(paint(SCENES, seed=0))
    figures = measure(judge, torch.cat([once, once]), scenes, torch.cat([once, once]))
    assert figures["Fréchet distance"] == pytest.approx(0, abs=1e-3)
    assert figures["diversity"] == 0
    brighter = measure(judge, torch.cat([once, once + 0.5]), scenes, torch.cat([once, once]))
    assert brighter["diversity"] == pytest.approx(0.5, rel=1e-5)
    assert brighter["Fréchet distance"] > 0


def test_a_judge_counts_what_is_right():
    from text_digits_data import Scene
    from text_digits_judge import Judge

    class Fixed(Judge):
        def forward(self, images):
            logits = {name: torch.eye(head.out_features)[[1] * len(images)] for name, head in self.heads.items()}
            return images.flatten(1), logits  # one, green, on the right

    right = Fixed().right(torch.zeros(3, 3, 16, 16), [Scene(1, 1, 1), Scene(1, 0, 1), Scene(2, 1, 0)])
    assert {name: seen.tolist() for name, seen in right.items()} == {
        "digit": [True, True, False],
        "colour": [True, False, True],
        "place": [True, True, False],
        "all": [True, False, False],
    }
