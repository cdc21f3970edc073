"""`.npz` files of others: what is damaged, forged, or no statistics or images is refused in a sentence."""

import io
import json
import os
import zipfile

import numpy as np
import pytest

from si_distill.errors import InputError
from si_distill.evaluation.npz import open_npz
from si_distill.evaluation.reference import read_reference
from si_distill.evaluation.samples import FileSource

EYE = np.eye(3)


def header(shape: tuple, descr: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def archive(path, compression=zipfile.ZIP_STORED, **members: bytes):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def damaged_deflate(path):
    np.savez_compressed(path, mu=np.random.default_rng(0).random(1000), sigma=np.eye(1000))
    content = bytearray(path.read_bytes())
    content[200:400] = b"\xff" * 200
    path.write_bytes(content)


def renamed_npy(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


STRUCTURE = [
    (lambda path: archive(path, mu=header((10**15,)), sigma=header((3, 3))), r"mu, float64 \(10{15},\), does not fit"),
    (lambda path: archive(path, mu=header((-1,)) + bytes(8), sigma=header((3, 3))), "does not fit"),
    (lambda path: archive(path, mu=b"\x93NUMPY\x01\x00\xff\xff{", sigma=header((3, 3))), "EOF"),
    (lambda path: archive(path, mu=header((1,), "|O") + b"cos\nsystem\n.", sigma=b""), "is a pickle"),
    (damaged_deflate, "decompress"),
    (renamed_npy, "not a zip file"),
    (lambda path: path.write_bytes(b"PK"), "not a zip file"),
    (os.mkfifo, "not a file"),
    (lambda path: None, "No such file"),
]


@pytest.mark.parametrize(("write", "words"), STRUCTURE)
def test_a_file_that_is_no_whole_archive_is_refused(tmp_path, write, words):
    write(tmp_path / "a.npz")
    with pytest.raises(InputError, match=f"Cannot read reference statistics from .*a.npz: .*{words}"):
        read_reference(tmp_path / "a.npz", "pixels")


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("si_distill.evaluation.npz.UNPACKED_BYTES", 2**16)
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(2**17), sigma=EYE)
    with pytest.raises(InputError, match=r"bytes of mu would unpack to 1,048,\d+"):
        read_reference(tmp_path / "a.npz", "pixels")


def test_sizes_that_the_archive_declares_are_not_believed(tmp_path):
    path = archive(tmp_path / "a.npz", mu=header((2**40,)))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 20  # the sizes in the list of contents; the larger ones do not fit 32 bits
    declared = len(header((2**40,))) + 8 * 2**28
    for offset in (place, place + 4):
        content[offset : offset + 4] = declared.to_bytes(4, "little")
    forged = bytes(content).replace(header((2**40,)), header((2**28,)).ljust(len(header((2**40,)))))
    path.write_bytes(forged)
    with pytest.raises(InputError, match=r"bytes of mu would unpack to 2,147,483,\d+"), open_npz(path, "it") as file:
        file.read("mu", 1, np.floating)


def test_only_what_is_wanted_is_read_and_in_the_byte_order_of_the_machine(tmp_path):
    values = dict(mu=np.arange(3, dtype=">f4"), sigma=np.asfortranarray(np.eye(3)), other=np.array([None]))
    np.savez_compressed(tmp_path / "a.npz", **values)
    reference = read_reference(tmp_path / "a.npz", "pixels")
    assert reference.mean.tolist() == [0, 1, 2]
    with open_npz(tmp_path / "a.npz", "it") as file:
        assert file.read("mu", 1, np.floating).dtype == np.float32


MEASURED = dict(features=np.zeros((4, 3), np.float32), indices=np.arange(4), labels=np.zeros(4, int))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(manifest="nope"), "of its manifest, Expecting value"),
        (dict(manifest="[1]"), "must be a mapping"),
        (dict(manifest='{"source": 3}'), "source must be a mapping"),
        (dict(manifest='{"count": "many"}'), "count must be a whole number, got 'many'"),
        (dict(manifest='{"count": -1}'), "said to be of -1 images"),
        (dict(mu=np.array(["a", "b", "c"])), "holds mu of <U1"),
        (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "are needed"),
        (dict(mu=np.full(3, 1e300)), "values of mu that are not finite, or beyond"),
        (dict(sigma=EYE * 1e300), "values of sigma that are not finite, or beyond"),
        (dict(sigma=-EYE), "negative eigenvalues"),
        (dict(sigma=EYE - np.triu(np.ones((3, 3)), 1)), "not symmetric"),
        (dict(sigma=EYE + 1j), "holds sigma of complex128"),
        (dict(arr_0=np.zeros(4, np.uint8)), r"holds arr_0 of uint8 \(4,\)"),
        (dict(MEASURED, features=np.full((4, 3), np.nan)), "values of features that are not finite"),
        (dict(MEASURED, features=np.array([["a"] * 3] * 4)), "holds features of <U1"),
        (dict(MEASURED, features=np.zeros((4, 5))), r"features of shape \(4, 5\)"),
        (dict(MEASURED, indices=np.arange(4) + 1), "which of 4 images"),
        (dict(MEASURED, indices=np.arange(4) - 1), "which of 4 images"),
        (dict(MEASURED, indices=np.arange(3)), "which of 4 images"),
        (dict(MEASURED, indices=np.arange(4.0)), "holds indices of float64"),
    ],
)
def test_what_is_no_statistics_of_images_is_refused(tmp_path, values, words):
    np.savez(tmp_path / "a.npz", **{"mu": np.zeros(3), "sigma": EYE, **values})
    with pytest.raises(InputError, match=words):
        read_reference(tmp_path / "a.npz", "pixels")


def test_rounding_does_not_make_a_covariance_of_few_images_wrong(tmp_path):
    for images in (np.zeros((5, 8)), np.random.default_rng(0).random((3, 200))):
        covariance = np.cov(images, rowvar=False)
        for dtype in (np.float64, np.float32):
            np.savez(tmp_path / "a.npz", mu=images.mean(0), sigma=covariance.astype(dtype), manifest=json.dumps({}))
            read_reference(tmp_path / "a.npz", "pixels")


def images(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(arr_0=images(0, 8, 8, 1)), r"arr_0 of \(0, 8, 8, 1\), and images \(N, H, W, 1 or 3\) are needed"),
        (dict(arr_0=images(2, 8, 8, 4)), "1 or 3"),
        (dict(arr_0=images(2, 8, 8, 0)), "1 or 3"),
        (dict(arr_0=images(2, 8, 8)), r"arr_0 of uint8 \(2, 8, 8\)"),
        (dict(other=images(2, 8, 8, 3)), "has no `arr_0`"),
        (dict(arr_0=images(2, 8, 8, 3), arr_1=np.int64(1)), r"arr_1 of int64 \(\)"),
        (dict(arr_0=images(2, 8, 8, 3), arr_1=np.array(["a", "b"])), "arr_1 of <U1"),
        (dict(arr_0=images(2, 8, 8, 3), arr_1=np.array([0.5, 1])), "arr_1 of float64"),
        (dict(arr_0=images(2, 8, 8, 3), arr_1=np.arange(3)), "2 images and 3 labels"),
    ],
)
def test_what_is_no_samples_is_refused(tmp_path, values, words):
    np.savez(tmp_path / "a.npz", **values)
    with pytest.raises(InputError, match=f"Cannot read samples from .*{words}"):
        FileSource(str(tmp_path / "a.npz"), 3)


def test_a_pipe_among_pictures_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png .* is not a file"):
        FileSource(str(tmp_path), 3)
