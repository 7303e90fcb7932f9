"""Bad inputs, with the real bytes of each: what a folder, a record, a log, a name or an address may hold.

Each row says which row of the table of bad input it belongs to, how to make it, through which doors it
comes, and which error it must give. The tests are in `test_hub_bad_input.py`; more rows in `bad_hubs.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftory.errors import (
    BaseMismatchError,
    CorruptAdapterError,
    DataError,
    GraftoryError,
    UnsupportedAdapterError,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDECAR = "graftory.json"
PREFIX = "base_model.model."
ROWS: Mapping[str, str] = {
    "layout": "truncated, overlapping, holed, trailing data, overflow, unknown dtype",
    "header": "67 MB header, a million keys",
    "tensors": "duplicate tensor keys, ../../x, empty names, zero tensors",
    "nonfinite": "NaN/Inf weights",
    "fit": "rank or shape that does not fit the base",
    "base": "wrong base model",
    "regex": "a regular expression as target_modules, and what else takes exponential time",
    "pickle": "pickle .bin/.pt",
    "code": "auto_mapping, remote code flags, base pointing elsewhere",
    "path": "path traversal, a\\..\\b, CON, symlinks, tar members",
    "json": "duplicate JSON keys, NaN, 5000-digit ints, deep nesting, giant files",
    "bytes": "a corrupted byte in a blob, record, log or index",
    "version": "two pushers of one version",
    "secret": "token in logs, errors, records",
    "agree": "tensors, configuration and specification that disagree",
    "feature": "features, dtypes and methods that graftory does not do",
    "record": "a record that is not one",
    "reference": "a reference that names nothing",
    "key": "keys and signatures that are none",
}
"""The rows of the table in the design of the registry, and those that docs/format.md adds."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a bad input is made: a user's hub, and what strangers hand over.

    Attributes:
        root: The folder of all of it.
    """

    root: Path

    @property
    def hub(self) -> Path:
        """The user's own hub, with `mine@1`."""
        return self.root / "hub"

    @property
    def folder(self) -> Path:
        """A LoRA as PEFT writes it."""
        return self.root / "folder"

    @property
    def whole(self) -> Path:
        """A LoRA with its sidecar."""
        return self.root / "whole"

    @property
    def remote(self) -> Path:
        """A stranger's hub, with `trec@1` (`trec:prod`), `neck@1` and `other@1`."""
        return self.root / "remote"

    @property
    def twin(self) -> Path:
        """The stranger's hub as it was."""
        return self.root / "twin"

    @property
    def base(self) -> Path:
        """A base model that the LoRA in `folder` fits."""
        return self.root / "base"


Make = Callable[[Place], None]


@dataclass(frozen=True, slots=True)
class Bad:
    """One bad input.

    Attributes:
        id: A name for it.
        row: The row of `ROWS`.
        error: The error that it must give.
        text: A word, or a regular expression, of the message.
        doors: The ways in, by name; each is tried alone.
        make: Makes it in a place that is good otherwise.
        value: What is given at the door, for names, references and addresses.
    """

    id: str
    row: str
    error: type[GraftoryError]
    text: str
    doors: tuple[str, ...]
    make: Make = lambda place: None
    value: str = ""


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    """A row of a header."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
PAIR: Tensors = {
    "l.q.lora_A.weight": ("F32", (2, 3), struct.pack("<6f", *range(6))),
    "l.q.lora_B.weight": ("F32", (5, 2), struct.pack("<10f", *range(10))),
}


def packed(tensors: Tensors, prefix: str = PREFIX) -> bytes:
    """Tensors as a well-formed file."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[prefix + name] = entry(len(data), len(data) + len(content), dtype, list(shape))
        data += content
    return safetensors(header, data)


GOOD_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "task_type": None}
GOOD_WEIGHTS = packed(PAIR)


def config(**changes: object) -> Make:
    """PEFT's configuration with some keys changed."""
    return lambda place: _write(place.folder / CONFIG, json.dumps(GOOD_CONFIG | changes).encode())


def weights(data: bytes) -> Make:
    """These bytes as weights, in the folder and, with a record that vouches for them, in the stranger's hub."""

    def make(place: Place) -> None:
        _write(place.folder / WEIGHTS, data)
        forge_file(place, WEIGHTS, data)

    return make


def forge(place: Place, change: Callable[[dict[str, Any]], object], *, digest: bool = True, name: str = "trec") -> None:
    """Change a record in the stranger's hub, with a digest that fits, as a forger would."""
    path = record_path(place, name)
    record = json.loads(path.read_bytes())
    change(record)
    if digest:
        plain = {"files": record.get("files"), "spec": record.get("spec")}
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        record["digest"] = "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    _write(path, json.dumps(record).encode())


def forge_file(place: Place, file: str, data: bytes, name: str = "trec") -> None:
    """Put a file into the stranger's hub, with a record that vouches for it."""
    sha256 = hashlib.sha256(data).hexdigest()
    _write(blob_path(place, sha256), data)

    def change(record: dict[str, Any]) -> None:
        row = next(row for row in record["files"] if row["path"] == file)
        row.update(sha256=sha256, size=len(data))

    forge(place, change, name=name)


def record_path(place: Place, name: str = "trec") -> Path:
    """Where a record of the stranger's hub lies."""
    return place.remote / ".hub" / "records" / name / "1.json"


def blob_path(place: Place, sha256: str) -> Path:
    """Where a blob of the stranger's hub lies."""
    return place.remote / ".hub" / "blobs" / "sha256" / sha256[:2] / sha256


def recorded_blob(place: Place, file: str = WEIGHTS) -> Path:
    """The blob of a file of `trec@1`."""
    rows = json.loads(record_path(place).read_bytes())["files"]
    return blob_path(place, next(row["sha256"] for row in rows if row["path"] == file))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# ---------------------------------------------------------------- the header of a safetensors file

_BIG = 1 << 20
_HEADERS: list[tuple[str, str, bytes, str]] = [
    ("empty file", "layout", b"", "shorter than its header"),
    ("seven bytes", "layout", b"\x01" + b"\0" * 6, "shorter than its header"),
    ("length beyond the file", "layout", struct.pack("<Q", 3) + b"{}", "shorter than its header"),
    ("length of 2^63", "layout", struct.pack("<Q", 1 << 63) + b"{}", "at most 1048576"),
    ("length of 2^64-1", "layout", b"\xff" * 8 + b"{}", "at most 1048576"),
    ("length too short", "layout", struct.pack("<Q", 9) + GOOD_WEIGHTS[8:], "JSON"),
    ("header of zero bytes", "layout", struct.pack("<Q", 0), "JSON|object"),
    ("header begins with a space", "layout", safetensors(b" " + GOOD_WEIGHTS[8:].split(b"}}")[0] + b"}}"), "begin"),
    ("overlapping", "layout", safetensors({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"), "overlaps"),
    ("the same bytes twice", "layout", safetensors({"a": entry(0, 2), "b": entry(0, 2)}, b"xx"), "overlaps"),
    ("hole in front", "layout", safetensors({"a": entry(1, 2)}, b"xx"), "hole"),
    ("hole between", "layout", safetensors({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"), "hole"),
    ("trailing byte", "layout", GOOD_WEIGHTS + b"\0", "the tensors end at byte"),
    ("trailing zip", "layout", GOOD_WEIGHTS + b"PK\x05\x06" + b"\0" * 18, "the tensors end at byte"),
    ("last byte gone", "layout", GOOD_WEIGHTS[:-1], "the tensors end at byte"),
    ("offsets swapped", "layout", safetensors({"a": entry(1, 0, shape=[1])}, b"x"), "-1 bytes"),
    ("offsets of 2^64", "layout", safetensors({"a": entry(1 << 64, (1 << 64) + 1)}, b"x"), "hole|overflow"),
    ("offset of 30 digits", "layout", safetensors({"a": entry(0, 10**30)}, b"x"), "digits"),
    ("negative offset", "layout", safetensors({"a": entry(-1, 0)}, b"x"), "impossible offsets"),
    ("three offsets", "layout", safetensors({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x"), "offsets"),
    ("float offset", "layout", safetensors({"a": entry(0, 1) | {"data_offsets": [0.0, 1.0]}}, b"x"), "offsets"),
    ("offsets as text", "layout", safetensors({"a": entry(0, 1) | {"data_offsets": "01"}}, b"x"), "offsets"),
    (
        "shape overflows to its bytes",
        "layout",
        safetensors({"a": entry(0, 0, "U8", [1 << 32, 1 << 32])}),
        "need|overflow",
    ),
    ("shape with a zero and 2^80", "layout", safetensors({"a": entry(0, 0, "F32", [0, 1 << 60, 1 << 20])}), "shape"),
    ("negative shape", "layout", safetensors({"a": entry(0, 1, shape=[-1, -1])}, b"x"), "impossible shape"),
    ("float shape", "layout", safetensors({"a": entry(0, 1, shape=[1.0])}, b"x"), "impossible shape"),
    ("boolean shape", "layout", safetensors({"a": entry(0, 1, shape=[True])}, b"x"), "impossible shape"),
    ("null shape", "layout", safetensors({"a": entry(0, 1) | {"shape": None}}, b"x"), "impossible shape"),
    ("shape of nine dimensions", "layout", safetensors({"a": entry(0, 1, shape=[1] * 9)}, b"x"), "impossible shape"),
    ("-0 as offset", "layout", safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"x"), "-0"),
    ("unknown dtype", "layout", safetensors({"a": entry(0, 1, "C64")}, b"x"), "unknown dtype"),
    ("dtype in lower case", "layout", safetensors({"a": entry(0, 1, "u8")}, b"x"), "unknown dtype"),
    ("dtype as list", "layout", safetensors({"a": entry(0, 1, ["U8"])}, b"x"), "unknown dtype"),
    ("dtype null", "layout", safetensors({"a": entry(0, 1) | {"dtype": None}}, b"x"), "unknown dtype"),
    ("wrong number of bytes", "layout", safetensors({"a": entry(0, 2, shape=[3])}, b"xx"), "2 bytes"),
    ("entry without shape", "layout", safetensors({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "broken"),
    ("entry with one key more", "layout", safetensors({"a": entry(0, 1) | {"stride": 1}}, b"x"), "broken entry"),
    ("entry is a list", "layout", safetensors({"a": [0, 1]}, b"x"), "broken entry"),
    ("header is a list", "layout", safetensors([]), "not an object|begin"),
    ("metadata is a number", "layout", safetensors({"__metadata__": 5, "a": entry(0, 1)}, b"x"), "metadata"),
    ("metadata holds a list", "layout", safetensors({"__metadata__": {"a": []}, "a": entry(0, 1)}, b"x"), "metadata"),
    ("one byte above the cap", "header", safetensors(b"{" + b" " * _BIG), "at most 1048576"),
    ("67 MB header", "header", safetensors(b"{" + b" " * (67 << 20)), "at most 1048576"),
    (
        "a million keys",
        "header",
        safetensors(b"{" + b",".join(b'"%d":0' % i for i in range(1_000_000)) + b"}"),
        "at most 1048576",
    ),
    ("no tensor", "tensors", safetensors({}), "no tensor"),
    ("nothing but metadata", "tensors", safetensors({"__metadata__": {"format": "pt"}}), "no tensor"),
    ("a key twice", "tensors", safetensors(b'{"a":1,"a":2}'), "given twice"),
    ("a key twice, once escaped", "tensors", safetensors(b'{"a":1,"\\u0061":2}'), "given twice"),
    ("empty name", "tensors", safetensors({"": entry(0, 1)}, b"x"), "cannot name a tensor"),
    ("../../x", "tensors", packed({"../../x." + k[4:]: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("/etc/passwd", "tensors", packed(PAIR, prefix="/etc/"), "cannot name a tensor"),
    ("backslashes", "tensors", packed({"a\\..\\" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("dots only", "tensors", packed({".." + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("trailing dot", "tensors", packed({k + ".": v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("newline in a name", "tensors", packed({"a\n" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("NUL in a name", "tensors", packed({"a\0" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("escape codes in a name", "tensors", packed({"\x1b[2J" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("right-to-left mark", "tensors", packed({"\u202e" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("cyrillic letter", "tensors", packed({"\u0430" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("combining accent", "tensors", packed({"e\u0301" + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
    ("lone surrogate in a name", "tensors", safetensors(b'{"\\ud800":{}}'), "surrogate|cannot name"),
    ("name of 513 letters", "tensors", packed({"a" * 496 + k: v for k, v in PAIR.items()}), "cannot name a tensor"),
]
HEADER_ROWS = [
    Bad(f"header: {name}", row, CorruptAdapterError, f"{WEIGHTS}.*(?:{text})", ("add", "pull"), weights(data))
    for name, row, data, text in _HEADERS
]


def _truncations() -> Iterator[Bad]:
    size = len(GOOD_WEIGHTS)
    for length in sorted({0, 1, 7, 8, 9, 20, size // 3, size // 2, size - 33, size - 8, size - 2}):
        make = weights(GOOD_WEIGHTS[:length])
        yield Bad(f"cut after {length} bytes", "layout", CorruptAdapterError, WEIGHTS, ("add", "pull"), make)


# ---------------------------------------------------------------- numbers

_NONFINITE = {
    "F16": {"NaN": 0x7E01, "Inf": 0x7C00, "-Inf": 0xFC00},
    "BF16": {"NaN": 0x7FC1, "Inf": 0x7F80, "-Inf": 0xFF80},
    "F32": {"NaN": 0x7FC00001, "signalling NaN": 0x7F800001, "Inf": 0x7F800000, "-Inf": 0xFF800000},
    "F64": {"NaN": 0x7FF8 << 48, "Inf": 0x7FF0 << 48, "-Inf": 0xFFF0 << 48},
}
_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def _nonfinite() -> Iterator[Bad]:
    for dtype, values in _NONFINITE.items():
        for name, bits in values.items():
            size = _BYTES[dtype]
            data = b"\0" * size * 5 + bits.to_bytes(size, "little")
            tensors = {**PAIR, "l.q.lora_A.weight": (dtype, (2, 3), data)}
            make = weights(packed(tensors))
            yield Bad(f"{name} in {dtype}", "nonfinite", CorruptAdapterError, "NaN or infinity", ("add",), make)
    for dtype in ("F8_E4M3", "F8_E5M2", "I8", "BOOL", "U8"):
        tensors = {**PAIR, "l.q.lora_A.weight": (dtype, (2, 3), b"\x7f" * 6)}
        yield Bad(
            f"weights in {dtype}", "feature", UnsupportedAdapterError, dtype, ("add", "pull"), weights(packed(tensors))
        )


def _floats(*shape: int, fill: float = 1.0) -> tuple[str, tuple[int, ...], bytes]:
    count = 1
    for size in shape:
        count *= size
    return "F32", shape, struct.pack("<f", fill) * count


_SHAPES: list[tuple[str, str, type[GraftoryError], dict[str, Any], str]] = [
    ("rank of the file differs", "agree", CorruptAdapterError, {"A": (3, 3), "B": (5, 3)}, "rank 3.*says 2"),
    ("rank of A and B differs", "agree", CorruptAdapterError, {"B": (5, 3)}, r"wanted \[r, in\]"),
    ("no inputs", "agree", CorruptAdapterError, {"A": (2, 0)}, "no number|wanted"),
    ("no outputs", "agree", CorruptAdapterError, {"B": (0, 2)}, "no number|wanted"),
    ("rank of zero", "agree", CorruptAdapterError, {"A": (0, 3), "B": (5, 0)}, "no number|wanted"),
    ("scalars", "agree", UnsupportedAdapterError, {"A": (), "B": ()}, "linear layers"),
    ("one dimension", "agree", UnsupportedAdapterError, {"A": (2,), "B": (2,)}, "linear layers"),
    ("convolution", "agree", UnsupportedAdapterError, {"A": (2, 3, 1, 1), "B": (5, 2, 1, 1)}, "linear layers"),
    ("no B", "agree", CorruptAdapterError, {"B": None}, "only one of"),
    ("no A", "agree", CorruptAdapterError, {"A": None}, "only one of"),
]


def _shapes() -> Iterator[Bad]:
    for name, row, error, changes, text in _SHAPES:
        shapes = {"A": (2, 3), "B": (5, 2)} | changes
        tensors = {f"l.q.lora_{part}.weight": _floats(*shape) for part, shape in shapes.items() if shape is not None}
        yield Bad(name, row, error, f"{WEIGHTS}.*{text}", ("add",), weights(packed(tensors)))


_OTHER_TENSORS: list[tuple[str, type[GraftoryError], bytes, str]] = [
    ("DoRA", UnsupportedAdapterError, packed({**PAIR, "l.q.lora_magnitude_vector": _floats(5)}), "magnitude"),
    ("embedding", UnsupportedAdapterError, packed({**PAIR, "e.lora_embedding_A": _floats(2, 9)}), "embedding_A"),
    ("a stray tensor", UnsupportedAdapterError, packed({**PAIR, "x.weight": _floats(2)}), "x.weight"),
    ("no prefix", UnsupportedAdapterError, packed(PAIR, prefix=""), "prefix"),
    ("part alone", UnsupportedAdapterError, packed({"lora_A.weight": _floats(2, 3)}), "not understood"),
]
TENSOR_ROWS = [
    Bad(f"tensor: {name}", "feature", error, text, ("add",), weights(data))
    for name, error, data, text in _OTHER_TENSORS
]


# ---------------------------------------------------------------- PEFT's configuration

_NO_VERSIONS: tuple[Any, ...] = (3, [])
_NO_METHODS: tuple[Any, ...] = ("XLORA", "POLY", "lora", None, 3, ["LORA"], {})
_NO_STARTS: tuple[Any, ...] = ("pissa", "olora", "loftq", [], {})
_NO_PATTERNS: tuple[Any, ...] = ({"q": 0}, {"q": "2"}, [1], "q", 2)
_UNSUPPORTED: list[tuple[str, str, dict[str, Any]]] = [
    *(("feature", "peft_type", {"peft_type": kind}) for kind in _NO_METHODS),
    ("feature", "use_qalora", {"use_qalora": True}),
    ("feature", "bias", {"bias": "all", "use_dora": True}),
    ("feature", "lora_bias", {"lora_bias": True, "use_dora": True}),
    ("feature", "layer_replication", {"layer_replication": [[0, 2]]}),
    ("feature", "megatron_config", {"megatron_config": {"x": 1}}),
    ("feature", "trainable_token_indices", {"trainable_token_indices": [1]}),
    ("feature", "target_parameters", {"target_parameters": ["w"]}),
    *(("feature", "init_lora_weights", {"init_lora_weights": kind}) for kind in _NO_STARTS),
    ("feature", "task_type", {"task_type": "TOKEN_CLS"}),
    ("feature", "next_year", {"next_year": {"on": True}}),
    ("feature", "next_year", {"next_year": 0.5}),
    ("code", "auto_mapping", {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}),
    ("code", "auto_mapping", {"auto_mapping": {"parent_library": "transformersevil"}}),
    ("code", "auto_mapping", {"auto_mapping": "os.system"}),
    ("code", "trust_remote_code", {"trust_remote_code": True}),
    ("code", "auto_map", {"auto_map": {"AutoModel": "evil--repo.Model"}}),
    ("code", "_target_", {"_target_": "os.system"}),
    ("code", "corda_config", {"corda_config": {"cache_file": "/tmp/x"}}),
    ("code", "loftq_config", {"loftq_config": {"x": 1}}),
    ("regex", "rank_pattern", {"rank_pattern": {"(a+)+$": 3}}),
    ("regex", "alpha_pattern", {"alpha_pattern": {"^l.q": 3}}),
    ("regex", "rank_pattern", {"rank_pattern": {"": 3}}),
    ("regex", "rank_pattern", {"rank_pattern": {f"m{i}": 2 for i in range(30_000)}}),
    ("regex", "modules_to_save", {"modules_to_save": [f"m{i}" for i in range(30_000)]}),
]
_IMPOSSIBLE: list[tuple[str, str, object]] = [
    *(("agree", "r", value) for value in ("8", 0, -1, 2.0, True, None, [2], 10**19)),
    *(("agree", "lora_alpha", value) for value in (None, "4", True, [4])),
    *(("agree", "lora_dropout", value) for value in (1.5, 1, -0.1, "0", None)),
    *(("agree", "use_rslora", value) for value in (1, None, "true")),
    *(("agree", "modules_to_save", value) for value in ("q", [""], [3], {"q": 1})),
    *(("agree", "rank_pattern", value) for value in _NO_PATTERNS),
    *(("agree", "alpha_pattern", value) for value in ({"q": None}, {"q": True}, [1])),
    *(("agree", "peft_version", value) for value in _NO_VERSIONS),
    *(("code", "base_model_name_or_path", value) for value in (3, ["a"], {"id": "x"}, True)),
    *(
        ("code", "base_model_name_or_path", value)
        for value in ("https://evil.example/x", "file:///etc", "a\nb", "\x1b[2J")
    ),
    ("code", "base_model_name_or_path", "x" * 5000),
    ("code", "revision", 3),
    ("code", "revision", "main\n"),
]


def _configs() -> Iterator[Bad]:
    for number, (row, key, changes) in enumerate(_UNSUPPORTED):
        text = f"{CONFIG}.*{key}"
        yield Bad(f"config {number}: {key}", row, UnsupportedAdapterError, text, ("add",), config(**changes))
    for number, (row, key, value) in enumerate(_IMPOSSIBLE):
        text = "" if (key, value) == ("r", 10**19) else f"{CONFIG}.*{key}"
        made = config(**{key: value})
        yield Bad(f"value {number}: {key} = {value!r:.20}", row, CorruptAdapterError, text, ("add",), made)


# ---------------------------------------------------------------- what lies in a folder


class Trap:
    """A pickle that would write a file when it is opened."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (Path(self.target), "boom")


TRAP = "boom.txt"


def _pickle(file: str, *, keep: bool = False) -> Make:
    def make(place: Place) -> None:
        if not keep:
            (place.folder / WEIGHTS).unlink()
        _write(place.folder / file, pickle.dumps(Trap(str(place.root / TRAP))))

    return make


def _replaced(file: str, make: Callable[[Path, Place], object]) -> Make:
    def change(place: Place) -> None:
        path = place.folder / file
        path.unlink()
        make(path, place)

    return change


def _link(target: str) -> Callable[[Path, Place], object]:
    return lambda path, place: path.symlink_to(place.root / target)


def _outside(path: Path, place: Place) -> None:
    _write(
        place.root / "secret" / path.name, GOOD_WEIGHTS if path.name == WEIGHTS else json.dumps(GOOD_CONFIG).encode()
    )
    path.symlink_to(place.root / "secret" / path.name)


def _only(file: str, data: bytes) -> Make:
    def make(place: Place) -> None:
        for path in place.folder.iterdir():
            path.unlink()
        _write(place.folder / file, data)

    return make


def _sidecar_folder(place: Place) -> None:
    (place.folder / SIDECAR).mkdir()


def _sidecar_link(place: Place) -> None:
    (place.folder / SIDECAR).symlink_to(place.root / "gone")


def _sparse(file: str) -> Make:
    def make(place: Place) -> None:
        path = place.folder / file
        path.write_bytes(safetensors({"a": entry(0, 1 << 30)}) if file == WEIGHTS else b"{")
        os.truncate(path, 1 << 40)

    return make


_BAD, _NOT_OURS = CorruptAdapterError, UnsupportedAdapterError
_FOLDERS: list[tuple[str, str, type[GraftoryError], str, Make]] = [
    *((f"pickle {e}", "pickle", _NOT_OURS, "weights_only", _pickle(f"adapter_model{e}")) for e in (".bin", ".pt")),
    *(
        (f"pickle {e}", "pickle", _NOT_OURS, "weights_only", _pickle(f"adapter_model{e}"))
        for e in (".pth", ".CKPT", ".pkl")
    ),
    ("pickle under the right name", "pickle", _BAD, WEIGHTS, _pickle(WEIGHTS)),
    ("pickle as configuration", "pickle", _BAD, CONFIG, _pickle(CONFIG, keep=True)),
    ("pickle as sidecar", "pickle", _BAD, SIDECAR, _pickle(SIDECAR, keep=True)),
    ("no weights", "agree", _BAD, f"{WEIGHTS} is missing", lambda place: (place.folder / WEIGHTS).unlink()),
    ("no configuration", "agree", _BAD, "no adapter here", lambda place: (place.folder / CONFIG).unlink()),
    ("zip", "path", _BAD, "no adapter here", _only("adapter.zip", b"PK\x05\x06" + b"\0" * 18)),
    ("tar with ../ members", "path", _BAD, "no adapter here", _only("adapter.tar", b"../../x".ljust(10240, b"\0"))),
    *(
        (f"{what} is a {kind}", "path", _BAD, f"{what}.*not an ordinary file", _replaced(what, make))
        for what in (CONFIG, WEIGHTS)
        for kind, make in {
            "folder": lambda path, place: path.mkdir(),
            "pipe": lambda path, place: os.mkfifo(path),
            "device": lambda path, place: path.symlink_to("/dev/zero"),
            "dangling link": _link("gone"),
            "link to itself": lambda path, place: path.symlink_to(path),
            "link to a folder": _link("base"),
        }.items()
    ),
    *(
        (f"{what} is a link to outside", "path", _BAD, f"{what}.*outside", _replaced(what, _outside))
        for what in (CONFIG, WEIGHTS)
    ),
    ("the sidecar is a folder", "path", _BAD, f"{SIDECAR}.*not an ordinary file", _sidecar_folder),
    ("the sidecar is a dangling link", "path", _BAD, f"{SIDECAR}.*not an ordinary file", _sidecar_link),
    ("weights of a terabyte", "json", _BAD, WEIGHTS, _sparse(WEIGHTS)),
    ("configuration of a terabyte", "json", _BAD, f"{CONFIG}.*at most", _sparse(CONFIG)),
]
FOLDER_ROWS = [Bad(f"folder: {name}", row, error, text, ("add",), make) for name, row, error, text, make in _FOLDERS]


def _base_weights(data: bytes) -> Make:
    return lambda place: _write(place.base / "model.safetensors", data)


def _without(file: str) -> Make:
    return lambda place: (place.base / file).unlink()


def _wide(*shape: int, name: str = "l.q") -> Make:
    size = 4 * shape[0] * shape[1]
    return _base_weights(safetensors({f"{name}.weight": entry(0, size, "F32", list(shape))}, b"\0" * size))


_BASES: list[tuple[str, str, type[GraftoryError], str, Make]] = [
    ("inputs differ", "fit", BaseMismatchError, "l.q.*3 x 5.*4 x 5", _wide(5, 4)),
    ("outputs differ", "fit", BaseMismatchError, "l.q.*3 x 5.*3 x 6", _wide(6, 3)),
    ("no such module", "fit", BaseMismatchError, "l.q", _wide(9, 9, name="h.k")),
    ("no layers at all", "base", BaseMismatchError, "l.q", _wide(7, 7, name="x")),
    ("base without configuration", "base", DataError, "config.json", _without("config.json")),
    ("base without weights", "base", DataError, "model.safetensors", _without("model.safetensors")),
    ("base cut short", "base", _BAD, "model.safetensors", _base_weights(GOOD_WEIGHTS[:50])),
    ("base of no bytes", "base", _BAD, "model.safetensors", _base_weights(b"")),
    ("base with a huge header", "header", _BAD, "at most", _base_weights(safetensors(b"{" + b" " * (2 << 20)))),
    ("configuration is a list", "base", _BAD, "config.json", lambda p: _write(p.base / "config.json", b"[]")),
    ("configuration is no JSON", "base", _BAD, "config.json", lambda p: _write(p.base / "config.json", b"{")),
]
BASE_ROWS = [Bad(f"base: {name}", row, error, text, ("fits",), make) for name, row, error, text, make in _BASES]

BAD_FOLDERS: tuple[Bad, ...] = (
    *HEADER_ROWS,
    *_truncations(),
    *_nonfinite(),
    *_shapes(),
    *TENSOR_ROWS,
    *_configs(),
    *FOLDER_ROWS,
    *BASE_ROWS,
)
