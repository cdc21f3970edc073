"""Feature extractors: the contract of custom ones, and what is said when weights are missing or are something else."""

import pickle

import pytest
import torch

from si_distill.errors import InputError
from si_distill.evaluation.features import load_extractor

MODULE = '''
import torch

class Means(torch.nn.Module):
    """Channel means, and logits of two classes."""

    def __init__(self, weights=None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0 if weights is None else float(open(weights).read())))

    def forward(self, images):
        means = images.float().mean((2, 3)) * self.scale
        return means, torch.stack([means[:, 0], -means[:, 0]], 1)

class Wrong:
    def __call__(self, images):
        return images.float()
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)  # found in the present folder, like a script's own modules
    return "own_features"


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An empty torch hub folder, and a proxy that nobody is behind."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    yield tmp_path / "hub"
    torch.hub.set_dir(before)


def test_pixels_are_the_image():
    images = torch.randint(256, (3, 1, 2, 2), dtype=torch.uint8)
    features, logits = load_extractor("pixels", None)(images)
    assert features.equal(images.flatten(1).double() / 127.5 - 1)
    assert logits is None


def test_a_custom_extractor_gives_features_and_logits_and_a_hash_of_its_weights(module, tmp_path):
    images = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    extractor = load_extractor(f"{module}:Means", None)
    features, logits = extractor(images)
    assert features.tolist() == [[7, 7, 7]] * 2
    assert logits.tolist() == [[7, -7]] * 2
    (tmp_path / "weights.txt").write_text("2")
    other = load_extractor(f"{module}:Means", str(tmp_path / "weights.txt"))
    assert other(images)[0].tolist() == [[14, 14, 14]] * 2
    assert extractor.weights != other.weights
    assert extractor.distance_name == "Fréchet distance"


def test_what_is_no_extractor_is_refused(module, tmp_path):
    for name, weights, words in (
        ("inceptionv3", None, r"Unknown `features` 'inceptionv3'.*dinov2.*inception-v3-compat.*package.module:Class"),
        ("no_such_module:X", None, "Cannot import the module"),
        (f"{module}:Missing", None, "has no class 'Missing'"),
        ("pixels", str(tmp_path / "nowhere"), "is not a file"),
    ):
        with pytest.raises(InputError, match=words):
            load_extractor(name, weights)
    with pytest.raises(InputError, match=r"gave features of shape \(2, 1, 4, 4\) for 2 images; \(2, D\) is needed"):
        load_extractor(f"{module}:Wrong", None)(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inception-v3-compat", r"Get https://.*weights-inception-2015-12-05-6726825d.pth and put it into .*hub"),
        ("clip", r"Get https://.*ViT-B-32.pt and save it as .*clip-vit-b-32-.*, or give --feature_weights"),
        ("dinov2", r"run `python -c .*dinov2_vitl14.*copy its torch hub folder to .*hub"),
    ],
)
def test_missing_weights_say_what_to_get_and_where_to_put_it(no_network, name, words):
    with pytest.raises(InputError, match=words):
        load_extractor(name, None)


def test_weights_that_are_something_else_are_refused_before_they_run(no_network, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    hostile, other = tmp_path / "hostile.pth", tmp_path / "other.pth"
    hostile.write_bytes(pickle.dumps(Hostile()))
    torch.save({"weight": torch.zeros(1)}, other)
    for path, words in (
        (hostile, "no plain file of tensors"),
        (other, "does not hold the inception-v3-compat network"),
    ):
        with pytest.raises(InputError, match=words):
            load_extractor("inception-v3-compat", str(path))
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(InputError, match="takes no weights file for dinov2-vit-l-14"):
        load_extractor("dinov2", str(other))
    with pytest.raises(InputError, match="Cannot load the weights of clip-vit-b-32 from the file"):
        load_extractor("clip", str(other))
