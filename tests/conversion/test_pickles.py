"""Pickles are read without running anything that is in them."""

import io
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_pickles import Persistent, module_tree, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from si_distill.conversion import checkpoints, pickle_values
from si_distill.conversion.checkpoints import choose_weights, read_checkpoint
from si_distill.conversion.pickles import PickledObject, load_plain_pickle
from si_distill.conversion.shown import printable, shown, some
from si_distill.errors import InputError

#: NumPy's function that a pickled scalar names; its module has another name before NumPy 2.
SCALAR = np.float64(0).__reduce__()[0]


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
        "size of an array": ReducedTo(SCALAR, (np.dtype("f8"), b"123")),
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
    "a scalar of another array": ReducedTo(SCALAR, (np.dtype("u8"), np.arange(3))),
    "a state for a name": ReducedTo(np.ndarray, ((0,),), {"shape": (4,)}),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", FORGED)
def test_names_that_are_arguments_cannot_be_called(case, protocol, tmp_path):
    path = tmp_path / "forged.pkl"
    path.write_bytes(pickle.dumps(FORGED[case], protocol))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_plain_pickle(path)


def test_what_is_shared_stays_shared_and_forty_deep_is_refused(tmp_path):
    path = tmp_path / "nested.pkl"
    for depth in (10, 40):
        nested = []
        for _ in range(depth):
            nested = [nested, nested]
        path.write_bytes(pickle.dumps({"lists": nested}))
        if depth == 40:
            with pytest.raises(InputError, match="stands for more than 5,000,000 values"):
                load_plain_pickle(path)
        else:
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


def rezipped(content, **changes: bytes) -> bytes:
    """A checkpoint of `torch.save` in which records are replaced, or added."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records |= {f"archive/{name}": data for name, data in changes.items()}
    return _zip(records)


def data_of(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


P2 = b"\x80\x02"
#: Programs in the instructions of pickles; each once brought down a reader of pickles, or a scanner of them.
ATTACKS = {
    # Names and calls.
    "a name of a module": P2 + b"cos\nsystem\nX\x04\x00\x00\x00echo\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x14serialization.os.sys\x93.",
    "a name below an allowed one": b"\x80\x04\x8c\x0bcollections\x8c\x17OrderedDict.__init__\x93.",
    "a name made of numbers": P2 + b"K\x01K\x02\x93.",
    "an old instance": b"(cos\nsystem\nX\x04\x00\x00\x00echoo.",
    "an old instance of a name": b"(X\x04\x00\x00\x00echoios\nsystem\n.",
    "a call of a tensor": P2 + b"K\x01)R.",
    "a call of a type": P2 + b"ctorch\nfloat32\n)R.",
    "a call of an argument": P2 + b"cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00Ot\x81.",
    "a call with arguments by name": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "getattr of a name": P2 + b"cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x05\x00\x00\x00clear\x86R)R.",
    "a name alone": P2 + b"ctorch._utils\n_rebuild_tensor_v2\n.",
    "pathlib": P2 + b"cpathlib\nPosixPath\nX\x01\x00\x00\x00/\x85R.",
    "runpy": P2 + b"crunpy\nrun_path\nX\x04\x00\x00\x00x.py\x85R.",
    "numpy's own evaluation": P2 + b"cnumpy.testing._private.utils\nrunstring\nX\x01\x00\x00\x00x}\x86R.",
    # States.
    "a state of a name": P2 + b"ctorch._utils\n_rebuild_parameter\nN}\x86b.",
    "a state of a class": P2 + b"ccollections\nOrderedDict\n}X\x08\x00\x00\x00__init__K\x01sb.",
    "slots of a record": P2 + b"cargparse\nNamespace\n)R}}X\x09\x00\x00\x00__class__ccollections\nOrderedDict\ns\x86b.",
    "a state of a number": P2 + b"K\x01}b.",
    # What is outside the file.
    "extension of one byte": P2 + b"\x82\x01.",
    "extension of two bytes": P2 + b"\x83\x01\x00.",
    "extension of four bytes": P2 + b"\x84\x01\x00\x00\x00.",
    "a persistent id": P2 + b"K\x01Q.",
    "a persistent id as text": b"Pkey\n.",
    "a buffer": b"\x80\x05\x97.",
    "a buffer read only": b"\x80\x05\x97\x98.",
    # Memory.
    "a jump in the memo": P2 + b"Nr\xff\xff\xff\x7f.",
    "a jump in the memo as text": b"Np99999999999\n.",
    "text of 2^62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "bytes of 2^40 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "a bytearray of 2^36 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"a.",
    "a frame of 2^62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62),
    "a number of 2^31 bytes": P2 + b"\x8b\xff\xff\xff\x7fa.",
    "a number in a million digits": b"I" + b"9" * 10**6 + b"\n.",
    "an array type of 2^30 letters": P2 + b"cnumpy\ndtype\nX\x0b\x00\x00\x00U1073741824K\x00K\x01\x87R.",
    "tuples 200,000 deep as a key": P2 + b"})" + b"\x85" * 200_000 + b"Ns.",
    "tuples 200,000 deep as a name": b"\x80\x04)" + b"\x85" * 200_000 + b"\x8c\x01a\x93.",
    "lists that share one another, as a device": P2 + b"ctorch\ndevice\n]q\x00"
    + b"".join(b"]q" + bytes([n]) + b"h" + bytes([n - 1]) + b"ah" + bytes([n - 1]) + b"a" for n in range(1, 60))
    + b"\x85R.",
    "bytes repeated as arrays": P2 + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87Rq\x00"
    + b"B" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x010"
    + (b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00b\x87R"
       + b"(K\x01J" + struct.pack("<i", 2**20) + b"\x85h\x00\x89h\x01tb") * 3000 + b".",
    "lists 100,000 deep": P2 + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": P2 + b"]q\x00h\x00a.",
    "a dict in itself": P2 + b"}q\x00K\x01h\x00s.",
    "bytes repeated": P2
    + b"c_codecs\nencode\nq\x00X\x10\x27\x00\x00" + b"a" * 10_000 + b"X\x06\x00\x00\x00latin1\x86q\x01R"
    + b"h\x00h\x01R" * 1000 + b".",
    "a list repeated as sets": P2 + b"]q\x00(" + b"".join(b"M" + struct.pack("<H", n) for n in range(10_000)) + b"e"
    + b"cbuiltins\nset\nq\x01h\x00\x85q\x02R" + b"h\x01h\x02R" * 10_000 + b".",
    # Instructions in the wrong place.
    "nothing": b"",
    "an end without a value": P2 + b".",
    "two values": P2 + b"NN.",
    "no end": P2 + b"N",
    "a mark that is missing": P2 + b"]e.",
    "a value that is missing": P2 + b"a.",
    "an odd number of items": P2 + b"}(K\x01u.",
    "a protocol of the future": b"\x80\xffN.",
    "an unhashable key": P2 + b"}]Ns.",
}  # fmt: skip


def in_a_process(path: Path) -> subprocess.CompletedProcess:
    """Reads a file as both kinds with little memory and time, and prints the errors."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from si_distill.conversion.checkpoints import read_checkpoint\n"
        "from si_distill.conversion.pickles import load_plain_pickle\n"
        "from si_distill.errors import InputError\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    for read in (load_plain_pickle, read_checkpoint):\n"
        "        try:\n"
        "            print(path.name, 'READ', repr(read(path))[:50])\n"
        "        except InputError as error:\n"
        "            print(path.name, 'refused:', str(error)[:500])\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30,) * 2)  # noqa: E731
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=limit)


def test_attacks_end_in_a_sentence(tmp_path):
    """In a process of its own: some of them end the process, others fill its memory."""
    for number, program in enumerate(ATTACKS.values()):
        (tmp_path / f"{number:02d}.pkl").write_bytes(program)
        (tmp_path / f"{number:02d}.pt").write_bytes(rezipped({"a": 1}, **{"data.pkl": program}))
    result = in_a_process(tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 4 * len(ATTACKS)
    names = list(ATTACKS)
    read = {names[int(line[:2])]: line.split()[-1] for line in lines if " READ " in line}
    assert read == {"a jump in the memo": "None"}  # which is a dictionary here, with one entry


def text(letters: str) -> bytes:
    return b"X" + struct.pack("<I", len(letters)) + letters.encode()


def nested(content) -> bytes:
    """The call that reads a checkpoint in bytes, and its argument, as numbers 0 and 1 of the memo."""
    data = legacy_bytes(content)
    return P2 + b"(ctorch.storage\n_load_from_bytes\nq\0B" + struct.pack("<I", len(data)) + data + b"\x85q\1"


NUMBERS = b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(3000))
GROWTH, STEPS = "bytes, 8 times its own size", "more than 30,000 steps"
#: Programs that few bytes make large or slow, and what refuses them, where 30,000 steps are allowed.
GROWING = {
    "devices of devices": (
        P2 + b"(ctorch\ndevice\nq\0" + text("a" * 10) + b"q\1" + b"h\0h\1h\1\x86Rq\1" * 28 + b"t.", "a device",
    ),
    "a device of many letters": (P2 + b"ctorch\ndevice\n" + text("a" * 21) + b"\x85R.", "the device 'aaa"),
    "copies of a tensor's bytes": (nested([torch.zeros(2**14)[:1]]) + b"h\0h\1R" * 100 + b"t.", GROWTH),
    "steps in a tensor's bytes": (nested([0] * 1000) + b"h\0h\1R" * 100 + b"t.", STEPS),
    "a long tuple as a key": (P2 + b"}(" + b"N" * 17 + b"tNs.", "a tuple of 17 items as a key"),
    "a long number as a key": (P2 + b"}\x8a\x0c" + b"\1" * 12 + b"Ns.", "more than 64 bits as a key"),
    "a number among many": (P2 + b"}(" + NUMBERS + b"u" + b"K\0Ns" * 3000 + b".", STEPS),
    "long keys that are equal": (
        P2 + b"](" + text("a" * 20_000) + b"q\0" + text("a" * 20_000) + b"q\1}" + b"h\0Nsh\1Ns" * 1000 + b"e.", STEPS,
    ),
    "a list as many sets": (P2 + b"](cbuiltins\nset\nq\0](" + b"N" * 999 + b"e\x85q\1" + b"h\0h\1R" * 50 + b"e.", STEPS),
    "text in many keys": (
        P2 + b"}(" + text("a" * 10**5) + b"q\0N" + b"".join(b"(K%ch\0h\0tN" % n for n in range(50)) + b"u.", "bytes of text",
    ),
    "text in many places": (P2 + b"](" + text("a" * 10**5) + b"q\0" + b"h\0" * 50 + b"e.", "bytes of text"),
    "empty sets": (b"\x80\4](" + b"\x8f" * 25_000 + b"e.", GROWTH),
    "a tower of tuples, by its floors": (P2 + b"](N\x85q\0" + (b"h\0" + b"\x85" * 190 + b"q\0") * 2 + b"e.", "200 deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", GROWING)
def test_what_grows_is_refused_before_it_has_grown(case, tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_values, "MAX_WORK", 30_000)
    program, refusal = GROWING[case]
    for read, data in ((load_plain_pickle, program), (read_checkpoint, rezipped({"a": 1}, **{"data.pkl": program}))):
        (tmp_path / "growing").write_bytes(data)
        with pytest.raises(InputError, match=refusal):
            read(tmp_path / "growing")


def test_keys_of_text_cost_one_step_however_many(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_values, "MAX_WORK", 30_000)
    content = {f"blocks.{n}.weight": n for n in range(3000)}
    (tmp_path / "names.pkl").write_bytes(pickle.dumps([content, content]))
    assert load_plain_pickle(tmp_path / "names.pkl") == [content, content]


TITLE = "\x1b]0;title\x07"


def test_errors_are_short_and_printable(tmp_path):
    path = tmp_path / "weights.pt"

    def reason(content) -> str:
        torch.save(content, path)
        with pytest.raises(InputError) as error:
            choose_weights(read_checkpoint(path), None, None)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 2000
        return str(error.value)

    assert "begins with \\x1b]0;title\\x07." in reason({TITLE: 1})
    assert "decays \\x1b" in reason({"ema_models": {TITLE: {}, "0.9": {}}})
    reason({"a" * 10**5: 1, ("b" * 10**5, 2): 1})
    path.write_bytes(P2 + f"cos{TITLE}\nsystem\n.".encode())
    with pytest.raises(InputError, match=r"would use os\\x1b\]0;title\\x07\.system"):
        load_plain_pickle(path)


def test_shown():
    assert printable("a\x1b\n\u202eé") == "a\\x1b\\n\\u202eé"
    assert printable("a" * 1000) == "a" * 300 + "…"
    assert some(["a", 1, ("b",), 2.5, "c"]) == "a, 1, ('b',), 2.5, …"
    assert some(["a"]) == "a"
    for value in (b"\x1b" * 10**6, {"\x1b" * 10**6}, set(range(10**6)), dict.fromkeys(range(10**6), "\x1b")):
        assert len(shown(value)) < 300
        assert shown(value).isprintable()


def test_names_of_modules_do_not_multiply(tmp_path):
    """Each tensor's name has the names of all modules around it."""
    read = load_plain_pickle(
        write(tmp_path / "a.pkl", module_tree(Persistent("Net"), {"a" * 301 + ".weight": torch.ones(1)}))
    )
    with pytest.raises(InputError, match="has 302 letters"):
        read.tensors()


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    def read(path):
        raise MemoryError

    monkeypatch.setattr(checkpoints, "read_torch_file", read)
    (tmp_path / "dev.pt").write_bytes(b"")
    with pytest.raises(InputError, match="it needs more memory than there is"):
        read_checkpoint(tmp_path / "dev.pt")


def changed_pickle(content, old: bytes, new: bytes) -> bytes:
    data = data_of(content)
    assert data.count(old) == 1
    return rezipped(content, **{"data.pkl": data.replace(old, new)})


WEIGHTS = {"a": torch.arange(4.0), "b": torch.arange(100.0, 104.0)}
ARCHIVES = {
    "more values than the record": lambda: rezipped({"a": torch.ones(4)}, **{"data/0": b"\0" * 8}),
    "a record that is missing": lambda: changed_pickle({"a": torch.ones(4)}, b"X\x01\0\0\x000", b"X\x01\0\0\x007"),
    "a record elsewhere": lambda: changed_pickle({"a": torch.ones(4)}, b"X\x01\0\0\x000", b"X\x0c\0\0\x00../../../etc"),
    "numbers of another machine": lambda: rezipped(WEIGHTS, byteorder=b"big"),
    "two pickles": lambda: _zip({"archive/data.pkl": b"N.", "other/data.pkl": b"N."}),
    "no pickle": lambda: _zip({"archive/version": b"3"}),
    "an archive in the archive": lambda: _zip({"archive/data.pkl": rezipped(WEIGHTS)}),
    "an archive in the bytes in the bytes": lambda: _pickled(NestedBytes(_pickled(NestedBytes(legacy_bytes(WEIGHTS))))),
}


def _zip(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def _pickled(content) -> bytes:
    return pickle.dumps(content)


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_are_not_what_they_say(case, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(ARCHIVES[case]())
    with pytest.raises(InputError, match=r"cannot be read as a PyTorch|loading it would call torch\.storage"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_that_nobody_wrote_is_not_read(zipped, tmp_path):
    """A tensor that is larger than its storage, or a storage whose bytes are not in the file."""
    path = tmp_path / "weights.pt"
    file = io.BytesIO()
    torch.save({"a": torch.ones(4)}, file, _use_new_zipfile_serialization=zipped)
    data = data_of({"a": torch.ones(4)}) if zipped else file.getvalue()
    changed = data.replace(b"K\x04\x85", b"M\x00\x10\x85")  # the shape: 4096 instead of 4
    assert changed != data
    path.write_bytes(rezipped({"a": torch.ones(4)}, **{"data.pkl": changed}) if zipped else changed)
    with pytest.raises(InputError, match="reaches past its 4 values"):
        read_checkpoint(path)
    if not zipped:
        key = data.rindex(b"]")  # the list of the keys whose bytes follow
        path.write_bytes(data[:key] + b"].")
        with pytest.raises(InputError, match="storages without bytes"):
            read_checkpoint(path)


def test_a_few_bytes_do_not_become_a_tensor_of_gigabytes(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(1).expand(2**33, 1)}, path)
    with pytest.raises(InputError, match="reaches past its 1 values"):
        read_checkpoint(path)
    whole = torch.ones(1000)
    torch.save({str(n): whole.view(10, 100) for n in range(1000)}, path)  # the same storage a thousand times
    with pytest.raises(InputError, match="stands for more than"):
        read_checkpoint(path)


def test_checkpoints_are_read_as_torch_reads_them(tmp_path):
    """Every type, views, shared and empty tensors, parameters, with both formats."""
    base = torch.arange(24.0)
    types = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    content = {
        "view": base.view(4, 6).T[1:, ::2],
        "shared": [base[:5], base],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.ones(2, 3).shape,
        "type": torch.float16,
        "bytes": b"\x00\xff",
        "module": torch.nn.Linear(2, 3).state_dict(),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in types},
    }
    path = tmp_path / "weights.pt"
    for zipped in (False, True):
        if zipped:  # the old format does not have it
            content["float8"] = torch.ones(3).to(torch.float8_e4m3fn)
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        read, expected = read_checkpoint(path), torch.load(path, weights_only=True)
        assert read.keys() == expected.keys()
        for name, value in expected.items():
            found = read[name]
            if torch.is_tensor(value):
                assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride())
                assert torch.equal(found.view(torch.uint8) if value.itemsize == 1 else found, value.view(torch.uint8)
                                   if value.itemsize == 1 else value)  # fmt: skip
        assert read["size"] == (2, 3)
        assert read["type"] is torch.float16
        assert read["bytes"] == b"\x00\xff"
        assert torch.equal(read["module"]["weight"], content["module"]["weight"])
        assert read["shared"][0].untyped_storage().data_ptr() == read["shared"][1].untyped_storage().data_ptr()


# Property: whatever the bytes, an `InputError` or plain content; nothing else, and little memory.

GRAMMAR = st.lists(
    st.sampled_from(
        [bytes([code]) for code in b"()]}Ne.abstuQR\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
        + [b"q\x00", b"h\x00", b"K\x03", b"\x8a\x01\x05", b"X\x02\0\0\0f4", b"C\x04abcd", b"\x80\x04", b"J\xff\xff\xff\xff"]
        + [
            f"c{module}\n{name}\n".encode()
            for module, name in [
                ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct"),
                ("numpy.core.multiarray", "scalar"), ("torch._utils", "_rebuild_tensor_v2"), ("builtins", "set"),
                ("collections", "OrderedDict"), ("argparse", "Namespace"), ("torch.storage", "_load_from_bytes"),
                ("torch_utils.persistence", "_reconstruct_persistent_obj"), ("os", "system"),
            ]
        ]
    ),
    max_size=40,
).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")  # fmt: skip
LIMITS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(plain, value))
    if isinstance(value, PickledObject):
        return plain(value.state)
    known = (str, bytes, int, float, complex, bool, type(None), np.ndarray, torch.Tensor, torch.dtype)
    return isinstance(value, known)


def read_or_refused(path: Path) -> None:
    for read in (load_plain_pickle, read_checkpoint):
        try:
            value = read(path)
        except InputError as error:
            value = str(error)[:1000]
        assert plain(value)


@given(GRAMMAR)
@LIMITS
def test_any_program_is_refused_or_plain(tmp_path, program):
    path = tmp_path / "any.pkl"
    path.write_bytes(program)
    read_or_refused(path)


@given(st.data())
@LIMITS
def test_damaged_files_are_refused_or_plain(tmp_path, data):
    content = {"a": torch.arange(4.0), "b": [np.arange(3), 1.5, "text"], "c": torch.ones(2, dtype=torch.float16)}
    whole = data.draw(st.sampled_from([
        rezipped({"a": torch.arange(4.0), "b": [1, "text"]}), legacy_bytes({"a": torch.arange(4.0)}), pickle.dumps(content),
    ]))  # fmt: skip
    damaged = bytearray(whole)
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6)):
        damaged[place] = value
    path = tmp_path / "damaged.pt"
    path.write_bytes(damaged[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    read_or_refused(path)
