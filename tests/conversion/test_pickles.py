"""Pickles are read without running anything that is in them."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from edm_pickles import Persistent, module_tree, write

from si_distill.conversion.checkpoints import read_checkpoint
from si_distill.conversion.pickles import PickledObject, load_plain_pickle
from si_distill.errors import InputError


class Hostile:
    """Runs a command when a pickle of it is loaded by Python's own means."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class NestedBytes(Hostile):
    """As PyTorch pickles a storage: bytes that are given to `_load_from_bytes`."""

    def __init__(self, data: bytes):
        super().__init__(torch.storage._load_from_bytes, data)


def touch(sentinel):
    return Hostile(os.system, f"touch {sentinel}")


def legacy_bytes(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_plain_content(tmp_path):
    storage = torch.arange(12.0)
    content = {
        "list": [1, 2.5, "text", None, True, b"bytes", (1, 2), {3}],
        "float64": np.float64(0.5),
        "matrix": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(4, dtype=">f4"),
        "empty": np.zeros((0, 3), dtype=np.int16),
        "mask": np.array([True, False]),
        "tensor": storage[2:8].view(2, 3).T,
        "half": torch.tensor([1.0, 2.0], dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(7),
    }
    read = load_plain_pickle(write(tmp_path / "plain.pkl", content))
    assert read["list"] == content["list"]
    assert read["float64"] == 0.5
    for name in ("matrix", "big_endian", "empty", "mask"):
        assert type(read[name]) is np.ndarray
        np.testing.assert_array_equal(read[name], content[name])
        assert read[name].dtype == content[name].dtype.newbyteorder("=")
    for name in ("tensor", "half", "parameter", "scalar"):
        assert torch.equal(read[name], content[name].data)
        assert read[name].dtype == content[name].dtype


def test_persistent_objects_are_records(tmp_path):
    tensors = {"enc.a.weight": torch.ones(2, 3), "freqs": torch.zeros(2), "bias": torch.arange(3.0)}
    root = module_tree(Persistent("Net", {"size": 3}, sigma=np.float32(0.5)), tensors)
    # A forward hook is pickled as the method of a module.
    root.enc["a"]._forward_pre_hooks[0] = Hostile(getattr, Persistent("Net"), "normalise")
    read = load_plain_pickle(write(tmp_path / "net.pkl", {"ema": root}))["ema"]
    assert isinstance(read, PickledObject)
    assert (read.class_name, read.state["_init_kwargs"], read.state["sigma"]) == ("Net", {"size": 3}, 0.5)
    found = read.tensors()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


HOSTILE = {
    "system": touch,
    "eval": lambda sentinel: Hostile(eval, f"open({str(sentinel)!r}, 'w')"),
    "in a list": lambda sentinel: [1, {"ema": touch(sentinel)}],
    "in an object": lambda sentinel: Persistent("Net", weights=touch(sentinel)),
    "in the bytes of a tensor": lambda sentinel: NestedBytes(pickle.dumps(touch(sentinel))),
    "in a checkpoint in the bytes": lambda sentinel: NestedBytes(legacy_bytes({"weights": touch(sentinel)})),
    "torch.load": lambda sentinel: Hostile(torch.load, io.BytesIO(legacy_bytes(touch(sentinel)))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_do_not_run(case, tmp_path):
    sentinel = tmp_path / "sentinel"
    path = write(tmp_path / "hostile.pkl", HOSTILE[case](sentinel))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_plain_pickle(path)
    assert not sentinel.exists()
    if case == "system":  # the sentinel can tell: Python's own loader does run it
        pickle.loads(path.read_bytes())
        assert sentinel.exists()


def test_the_name_is_in_the_error(tmp_path):
    path = write(tmp_path / "hostile.pkl", touch(tmp_path / "sentinel"))
    with pytest.raises(InputError, match=r"would use (posix|nt)\.system"):
        load_plain_pickle(path)
    with pytest.raises(InputError, match=r"would use test_pickles\.Hostile"):
        load_plain_pickle(write(tmp_path / "class.pkl", Hostile))


class ReducedTo:
    """Pickled as a call of a function with arguments, then a state."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def test_crooked_content(tmp_path):
    """Allowed names with arguments that they cannot have."""
    storage = torch.ones(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    rebuild = torch._utils._rebuild_tensor_v2
    cases = {
        "past the end": ReducedTo(rebuild, (typed, 2, (3,), (1,), False, {})),
        "before the start": ReducedTo(rebuild, (typed, -1, (2,), (1,), False, {})),
        "no storage": ReducedTo(rebuild, ("text", 0, (1,), (1,), False, {})),
        "object array": np.array([print, 1], dtype=object),
        "structured array": np.zeros(2, dtype=[("a", "f4")]),
        "change of a function": ReducedTo(rebuild, (typed, 0, (4,), (1,), False, {})),
        "size of an array": ReducedTo(np._core.multiarray.scalar, (np.dtype("f8"), b"123")),
    }
    path = tmp_path / "crooked.pkl"
    for name, content in cases.items():
        write(path, content)
        if name == "change of a function":  # a state for the function itself: {"__defaults__": ...}
            path.write_bytes(b"ctorch._utils\n_rebuild_tensor_v2\nN}\x86b.")
        with pytest.raises(InputError, match="cannot be read"):
            load_plain_pickle(path)


def test_not_a_pickle(tmp_path):
    whole = write(tmp_path / "whole.pkl", {"ema": torch.ones(100)}).read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pkl").write_bytes(b"")
    (tmp_path / "text.pkl").write_text("<html>Not found</html>")
    torch.save({"a": 1}, tmp_path / "zip.pkl")
    for name in ("cut", "empty", "text", "zip"):
        path = tmp_path / f"{name}.pkl"
        with pytest.raises(
            InputError, match=rf"{name}\.pkl \({path.stat().st_size} bytes\) cannot be read as a pickle"
        ):
            load_plain_pickle(path)
    with pytest.raises(InputError, match="There is no pickle file"):
        load_plain_pickle(tmp_path / "missing.pkl")


FORGED = {
    "an array of objects": ReducedTo(np.ndarray, ((1,), "O", b"\x10" * 8)),
    "in a set": ReducedTo(set, (ReducedTo(np.ndarray, ((1,), "O", b"\x10" * 8)),)),
    "memory that nobody wrote": ReducedTo(np.ndarray, ((1000,), "f8")),
    "a scalar of another array": ReducedTo(np._core.multiarray.scalar, (np.dtype("u8"), np.arange(3))),
    "a state for a name": ReducedTo(np.ndarray, ((0,),), {"shape": (4,)}),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", FORGED)
def test_names_that_are_arguments_cannot_be_called(case, protocol, tmp_path):
    path = tmp_path / "forged.pkl"
    path.write_bytes(pickle.dumps(FORGED[case], protocol))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_plain_pickle(path)


def test_what_is_shared_forty_deep_stays_shared(tmp_path):
    nested = []
    for _ in range(40):
        nested = [nested, nested]
    path = tmp_path / "nested.pkl"
    path.write_bytes(pickle.dumps({"lists": nested}))
    read = load_plain_pickle(path)["lists"]
    assert read[0] is read[1]


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(None))
        archive.writestr("archive/data/0", bytes(2**26))
    checkpoint = tmp_path / "bomb.pt"
    checkpoint.write_bytes(file.getvalue())
    pickled = write(tmp_path / "bomb.pkl", NestedBytes(file.getvalue()))
    for read, path in ((read_checkpoint, checkpoint), (load_plain_pickle, pickled)):
        with pytest.raises(InputError, match="would unpack to"):
            read(path)
