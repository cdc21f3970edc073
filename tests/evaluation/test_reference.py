"""Reference statistics: computed once, read from published files, refused when they do not fit."""

import pickle

import numpy as np
import pytest
import torch
from accelerate import PartialState

from si_distill.data import ImageDataset
from si_distill.errors import InputError
from si_distill.evaluation.features import load_extractor
from si_distill.evaluation.reference import check_reference, data_reference, read_reference
from si_distill.evaluation.samples import DatasetSource


def dataset(count: int = 700, size: int = 4, change: int = 0) -> ImageDataset:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 250, (count, 1, size, size), dtype=np.uint8))
    images[0] += change
    return ImageDataset(images.__getitem__, [n % 3 for n in range(count)], "noise", 1, size, ["a", "b", "c"])


def test_statistics_are_computed_once_and_again_when_anything_changes(tmp_path):
    extractor, state = load_extractor("pixels", None), PartialState()
    source = DatasetSource(dataset(), {"split": "train"})
    first = data_reference(source, extractor, tmp_path, state, 64)
    features = np.stack([dataset().read(i).flatten().numpy() for i in range(700)]) / 127.5 - 1
    np.testing.assert_allclose(first.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    assert (first.count, first.name, first.labels[:4]) == (700, "noise", [0, 1, 2, 0])
    assert first.manifest["resolution"] == 4
    assert len(list(tmp_path.iterdir())) == 1  # the shards are gone

    unread = DatasetSource(dataset(), {"split": "train"})
    unread.read = None  # would fail
    assert data_reference(unread, extractor, tmp_path, state, 64).mean.tolist() == first.mean.tolist()
    for changed in (
        DatasetSource(dataset(change=1), {"split": "train"}),
        DatasetSource(dataset(), {"split": "test"}),
        DatasetSource(dataset(600), {"split": "train"}),
    ):
        data_reference(changed, extractor, tmp_path, state, 64)
    assert len(list(tmp_path.iterdir())) == 4


def test_published_statistics_are_read_and_misfits_refused(tmp_path):
    extractor = load_extractor("pixels", None)
    published, adm = tmp_path / "published.npz", tmp_path / "adm.npz"
    np.savez(published, mu=np.zeros(16, np.float32), sigma=np.eye(16, dtype=np.float32))
    reference = read_reference(published, "pixels")
    assert (reference.count, reference.features, reference.name) == (None, None, "published.npz")
    assert reference.mean.dtype == reference.covariance.dtype == np.float64
    check_reference(reference, "published.npz", extractor, 1, 4, None)
    with pytest.raises(InputError, match="has 16 features and pixels gives 64"):
        check_reference(reference, "published.npz", extractor, 1, 8, None)

    np.savez(adm, arr_0=np.zeros((7, 8, 2, 1), np.uint8), mu=np.zeros(16), sigma=np.eye(16))
    reference = read_reference(adm, "pixels")
    assert reference.count == 7
    with pytest.raises(InputError, match=r"8×8 pixels, but the evaluated ones are 4×4"):
        check_reference(reference, "adm.npz", extractor, 1, 4, None)

    for values, words in (
        (dict(mean=np.zeros(3)), "reference statistics are `mu` and `sigma`"),
        (dict(mu=np.zeros(3), sigma=np.eye(4)), r"mu of shape \(3,\) and sigma of shape \(4, 4\)"),
        (dict(mu=np.full(3, np.nan), sigma=np.eye(3)), "not finite"),
        (dict(mu=np.array([None]), sigma=np.eye(1)), "allow_pickle"),  # a pickle inside is not opened
    ):
        np.savez(tmp_path / "bad.npz", **values)
        with pytest.raises(InputError, match=words):
            read_reference(tmp_path / "bad.npz", "pixels")


def test_our_own_statistics_know_their_features_and_data(tmp_path):
    extractor = load_extractor("pixels", None)
    source = DatasetSource(dataset(), {"split": "train"})
    data_reference(source, extractor, tmp_path, PartialState(), 64)
    (path,) = tmp_path.glob("*.npz")
    reference = read_reference(path, "pixels")
    check_reference(reference, str(path), extractor, 1, 4, source)
    with pytest.raises(InputError, match=r"other images than `data` \(split: 'train' there, 'test' now\)"):
        check_reference(reference, str(path), extractor, 1, 4, DatasetSource(dataset(), {"split": "test"}))
    extractor.weights = "abcd"
    with pytest.raises(InputError, match="made with weights None, but now weights is 'abcd'"):
        check_reference(reference, str(path), extractor, 1, 4, None)


def test_edm2s_pickle_has_statistics_of_several_features(tmp_path):
    path = tmp_path / "img512.pkl"
    statistics = {"mu": np.arange(3.0), "sigma": np.eye(3)}
    path.write_bytes(pickle.dumps({"fid": statistics, "fd_dinov2": {**statistics, "mu": np.zeros(3)}}))
    assert read_reference(path, "inception-v3-compat").mean.tolist() == [0, 1, 2]
    assert read_reference(path, "dinov2-vit-l-14").mean.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="holds fid, fd_dinov2, but no statistics of pixels"):
        read_reference(path, "pixels")
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match="cannot be read"):
        read_reference(path, "inception-v3-compat")
