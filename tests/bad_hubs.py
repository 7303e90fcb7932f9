"""More rows of bad input: JSON of every file, records, logs, indexes, names, references, addresses, keys."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from graftory.errors import (
    AdapterNotFoundError,
    CorruptAdapterError,
    GraftoryError,
    InvalidNameError,
    RemoteError,
    SignatureError,
    VersionConflictError,
)
from tests.bad_inputs import (
    BAD_FOLDERS,
    CONFIG,
    SIDECAR,
    WEIGHTS,
    Bad,
    Make,
    Place,
    forge,
    forge_file,
    record_path,
    recorded_blob,
    safetensors,
)

_BAD = CorruptAdapterError

# ---------------------------------------------------------------- JSON

_MEMBERS: list[tuple[str, bytes, str]] = [
    ("a key twice", b'"x":1,"x":2', "given twice"),
    ("a key twice, once escaped", b'"x":1,"\\u0078":2', "given twice"),
    ("a key twice, deep inside", b'"x":[{"y":{"z":1,"z":1}}]', "given twice"),
    ("NaN", b'"x":NaN', "NaN"),
    ("-Infinity", b'"x":[-Infinity]', "Infinity"),
    ("1e999", b'"x":1e999', "overflows"),
    ("5000 digits", b'"x":' + b"9" * 5000, "5000 digits"),
    ("21 digits", b'"x":-' + b"9" * 21, "digits"),
    ("33 levels", b'"x":' + b"[" * 32 + b"]" * 32, "deeper than 32"),
    ("100,000 levels", b'"x":' + b'{"x":' * 100_000, "deeper than 32"),
    ("lone surrogate", b'"x":"\\ud800"', "surrogate"),
    ("lone surrogate as key", b'"\\udfff":1', "surrogate"),
    ("raw control character", b'"x":"\x01"', "JSON"),
    ("trailing comma", b'"x":1,', "JSON"),
    ("not UTF-8", b'"x":"\xff"', "utf-8"),
    ("overlong UTF-8", b'"x":"\xc0\xaf"', "utf-8"),
]
"""What stands behind the members of an object that is good otherwise."""
_WHOLES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "JSON"),
    ("white space", b" \t ", "JSON"),
    ("byte-order mark", b"\xef\xbb\xbf{}", "BOM"),
    ("UTF-16", "{}".encode("utf-16"), "utf-8"),
    ("unfinished", b'{"a": 1', "JSON"),
    ("two values", b"{} {}", "JSON"),
    ("a comment", b"{/* no */}", "JSON"),
    ("single quotes", b"{'a': 1}", "JSON"),
    ("NUL bytes", b"\0" * 64, "JSON"),
    ("a number", b"5", ""),
    ("a list", b"[]", ""),
    ("null", b"null", ""),
    ("a list of lists", b"[[[]]]", ""),
    ("escaped quotes without an end", b'{"a":"' + b'\\"' * 500_000, "JSON"),
]


def _spoiled(data: bytes, members: bytes) -> bytes:
    return data.rstrip()[:-1] + b"," + members + b"}"


def _file(path: Callable[[Place], Path], change: Callable[[bytes], bytes]) -> Make:
    def make(place: Place) -> None:
        target = path(place)
        data = change(target.read_bytes() if target.is_file() else b'{"origin": "file:///srv"}')
        target.write_bytes(data)

    return make


def _header(change: Callable[[bytes], bytes]) -> Make:
    def make(place: Place) -> None:
        data = (place.folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = change(data[8:end])
        (place.folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return make


def _forged_config(change: Callable[[bytes], bytes]) -> Make:
    return lambda place: forge_file(place, CONFIG, change(recorded_blob(place, CONFIG).read_bytes()))


_Change = Callable[[bytes], bytes]
_FILES: dict[str, tuple[tuple[str, ...], str, int, Callable[[_Change], Make]]] = {
    "config": (("add",), CONFIG, 1 << 20, lambda change: _file(lambda place: place.folder / CONFIG, change)),
    "config elsewhere": (("pull",), CONFIG, 1 << 20, _forged_config),
    "header": (("add",), WEIGHTS, 1 << 20, _header),
    "sidecar": (("add whole",), SIDECAR, 1 << 20, lambda change: _file(lambda place: place.whole / SIDECAR, change)),
    "record": (("pull", "record"), r"1\.json", 16 << 20, lambda change: _file(record_path, change)),
    "index": (
        ("index",),
        r"registry\.json",
        16 << 20,
        lambda change: _file(lambda place: place.remote / "registry.json", change),
    ),
    "alias log": (
        ("aliases",),
        r"trec\.jsonl",
        1 << 20,
        lambda change: _file(lambda place: alias_path(place), change),
    ),
    "remotes": (
        ("remotes",),
        r"remotes\.json",
        1 << 20,
        lambda change: _file(lambda place: place.remote / ".hub" / "remotes.json", change),
    ),
    "base": (
        ("fits",),
        r"config\.json",
        1 << 20,
        lambda change: _file(lambda place: place.base / "config.json", change),
    ),
}
"""Files of JSON: the doors they come through, their names, most bytes, and how to change them."""


def alias_path(place: Place) -> Path:
    """The alias log of `trec` in the stranger's hub."""
    return place.remote / ".hub" / "aliases" / "trec.jsonl"


def _json() -> Iterator[Bad]:
    for file, (doors, name, limit, make) in _FILES.items():
        for what, members, text in _MEMBERS:
            change = make(lambda data, members=members: _spoiled(data, members))  # type: ignore[misc]
            yield Bad(f"{file}: {what}", "json", _BAD, f"{name}.*{text}", doors, change)
        for what, whole, text in _WHOLES:
            if (file, what) in _FINE:
                continue
            change = make(lambda data, whole=whole: whole)  # type: ignore[misc]
            text = "" if file == "header" else text
            yield Bad(f"{file}: {what}", "json", _BAD, f"{name}.*{text}", doors, change)
        change = make(lambda data, limit=limit: b'{"a":"' + b"x" * limit + b'"}')  # type: ignore[misc]
        yield Bad(f"{file}: too long", "json", _BAD, f"{name}.*at most", doors, change)


_FINE = {("alias log", "empty")}
"""A log without a line is a log."""

# ---------------------------------------------------------------- records

_EVIL_PATHS = (
    "../adapter_config.json",
    "../../../../x",
    "a/../../b",
    "a\\..\\b",
    "/etc/passwd",
    "C:\\x",
    "\\\\host\\x",
    "CON",
    "NUL.json",
    "adapter_config.json\0",
    "adapter_config.json ",
    "adapter_config.json.",
    "ADAPTER_CONFIG.JSON",
    "adapter_c\u043enfig.json",
    "adapter_model.bin",
    "graftory.json",
    ".",
    "",
    "a" * 300,
)
_EVIL_HASHES = (
    "",
    "../" * 21 + "x",
    "A" * 64,
    "0" * 63,
    "0" * 65,
    "g" * 64,
    "0" * 64,
    "\u0660" * 64,
    "sha256:" + "0" * 57,
)


def _set(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        item: Any = record
        for key in path[:-1]:
            item = item[key]
        item[path[-1]] = value

    return change


def _forged(change: Callable[[dict[str, Any]], object], *, digest: bool = True) -> Make:
    return lambda place: forge(place, change, digest=digest)


_FORGED: list[tuple[str, str, str, Make]] = [
    ("no files", "record", "other files", _forged(_set("files", value=[]))),
    ("one file", "record", "other files", _forged(lambda record: record["files"].pop())),
    ("a file twice", "record", "other files", _forged(lambda record: record["files"].append(record["files"][0]))),
    ("a file more", "record", "other files", _forged(
        lambda record: record["files"].append({"path": "x.py", "sha256": "0" * 64, "size": 1}))),
    *((f"file named {path!r:.30}", "path", "other files|impossible", _forged(_set("files", 0, "path", value=path)))
      for path in _EVIL_PATHS),
]  # fmt: skip
_PULL_FORGED: list[tuple[str, str, str, Make]] = [
    *(
        (
            f"a file of {size} bytes",
            "record",
            "not the recorded|bytes, recorded",
            _forged(_set("files", 0, "size", value=size)),
        )
        for size in (3, -1, 10**18)
    ),
    ("no tensors listed", "record", "other tensors", _forged(_set("tensors", value=[]))),
    ("another shape listed", "record", "other tensors", _forged(_set("tensors", 0, "shape", value=[7]))),
    ("another dtype listed", "record", "other tensors", _forged(_set("tensors", 0, "dtype", value="F16"))),
    ("another hash listed", "record", "other tensors", _forged(_set("tensors", 0, "sha256", value="0" * 64))),
    ("../ as tensor", "tensors", "other tensors", _forged(_set("tensors", 0, "name", value="../../x"))),
]
_SPEC_FORGED: list[tuple[str, str, str, Make]] = [
    ("rank differs", "agree", "rank", _forged(_set("spec", "config", "rank", value=7))),
    ("alpha differs", "agree", "scaled", _forged(_set("spec", "config", "alpha", value=7.5))),
    ("rsLoRA differs", "agree", "scaled", _forged(_set("spec", "config", "rslora", value=True))),
    ("a target more", "agree", "m.9.q", _forged(lambda record: record["spec"]["config"]["targets"].append("m.9.q"))),
    ("a target twice", "agree", "twice", _forged(lambda record: record["spec"]["config"]["targets"].append("m.0.q"))),
    ("../ as target", "path", "targets", _forged(_set("spec", "config", "targets", 0, value="../../x"))),
    ("no target", "agree", "targets", _forged(_set("spec", "config", "targets", value=[]))),
    ("rank of zero", "agree", "rank", _forged(_set("spec", "config", "rank", value=0))),
    ("dropout of two", "agree", "dropout", _forged(_set("spec", "config", "dropout", value=2.0))),
    ("a head more", "agree", "head", _forged(lambda record: record["spec"]["task"]["head"].append("x"))),
    ("no head", "agree", "understood|head", _forged(_set("spec", "task", "head", value=[]))),
    ("labels differ", "agree", "labels", _forged(_set("spec", "task", "labels", value=["a"]))),
]
_IDENTITY: list[tuple[str, str, str, Make]] = [
    ("another digest", "bytes", "digest", _forged(_set("digest", value="sha256:" + "0" * 64), digest=False)),
    ("empty digest", "record", "digest", _forged(_set("digest", value=""), digest=False)),
    ("specification changed", "bytes", "digest", _forged(_set("spec", "licence", value="x"), digest=False)),
    ("a file's hash changed", "bytes", "digest", _forged(_set("files", 0, "sha256", value="0" * 64), digest=False)),
    ("another name", "record", "moved by hand", _forged(_set("name", value="other"), digest=False)),
    ("../ as name", "path", "name", _forged(_set("name", value="../../x"), digest=False)),
    ("CON as name", "path", "name", _forged(_set("name", value="con"), digest=False)),
    ("a name in Cyrillic", "path", "name", _forged(_set("name", value="tr\u0435c"), digest=False)),
    *((f"version {version}", "record", "version|digest|moved", _forged(_set("version", value=version), digest=False))
      for version in (0, -1, 2, 10**9, 10**19)),
    *((f"schema {schema!r}", "record", "schema", _forged(_set("schema", value=schema), digest=False))
      for schema in (0, 2, 1.0, True, "1", None)),
    ("a field more", "record", "digest|unknown", _forged(_set("extra", value=1), digest=False)),
    ("a field more in a file", "record", "unknown key", _forged(_set("files", 0, "mode", value=7))),
    ("a field more in the config", "record", "unknown key", _forged(_set("spec", "config", "use_dora", value=True))),
    ("an unknown method", "feature", "method", _forged(_set("spec", "config", "method", value="mora"))),
    ("a method that is a path", "code", "method", _forged(_set("spec", "config", "method", value="os.system"))),
]  # fmt: skip


def _neck(place: Place) -> None:
    """A bottleneck of width 0, with a record that vouches for it."""
    header, sizes = {}, {"m.0": 2, "m.1": 3}
    for site, size in sizes.items():
        for part, shape in {
            "down.weight": [size, 0],
            "down.bias": [size],
            "up.weight": [0, size],
            "up.bias": [0],
        }.items():
            header[f"{site}.adapter_{part}"] = shape
    rows, end = {}, 0
    for name, shape in header.items():
        count = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        rows[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + count]}
        end += count
    forge_file(place, "adapter.safetensors", safetensors(rows, b"\0" * end), "neck")


def _records() -> Iterator[Bad]:
    both = ("pull", "record")
    for name, row, text, make in _FORGED:
        yield Bad(f"record: {name}", row, _BAD, text, ("pull", "get", "verify"), make)
    for name, row, text, make in _PULL_FORGED:
        yield Bad(f"record: {name}", row, _BAD, text, ("pull", "verify"), make)
    for name, row, text, make in _SPEC_FORGED:
        error = GraftoryError if name == "no head" else _BAD
        yield Bad(f"specification: {name}", row, error, text, ("pull", "get"), make)
    for name, row, text, make in _IDENTITY:
        yield Bad(f"record: {name}", row, _BAD, text, (*both, "verify"), make)
    for value in _EVIL_HASHES:
        make = _forged(_set("files", 0, "sha256", value=value))
        yield Bad(f"hash {value!r:.30}", "path", _BAD, "sha256", ("pull", "get", "verify"), make)
    for digest in ("", "x", "sha256:" + "0" * 64):
        row_ = {"ref": "gone@1", "digest": digest, "relation": "composed", "weight": None}
        make = _forged(lambda record, row=row_: record["spec"]["lineage"]["parents"].append(row))  # type: ignore[misc]
        yield Bad(f"parent {digest!r:.15}", "record", AdapterNotFoundError, "gone@1.*missing", ("pull",), make)
    row_ = {"ref": "../../x", "digest": "sha256:" + "0" * 64, "relation": "composed", "weight": None}
    make = _forged(lambda record: record["spec"]["lineage"]["parents"].append(row_))
    yield Bad("parent named ../../x", "path", AdapterNotFoundError, "missing", ("pull",), make)
    yield Bad("a bottleneck of width 0", "agree", _BAD, "adapter.safetensors", ("pull neck",), _neck)


# ---------------------------------------------------------------- bytes of a hub


def _flip(path: Callable[[Place], Path], at: int) -> Make:
    def make(place: Place) -> None:
        target = path(place)
        data = bytearray(target.read_bytes())
        data[at] ^= 0x01
        target.write_bytes(data)

    return make


def _instead(path: Callable[[Place], Path], make: Callable[[Path], object]) -> Make:
    def change(place: Place) -> None:
        target = path(place)
        target.unlink(missing_ok=True)
        make(target)

    return change


def _record_bytes() -> Iterator[Bad]:
    for file in (CONFIG, WEIGHTS):
        for at in (0, 40, -1):
            make = _flip(lambda place, file=file: recorded_blob(place, file), at)  # type: ignore[misc]
            doors = ("pull", "get", "verify", "push")
            yield Bad(f"{file}: byte {at} flipped", "bytes", _BAD, "damaged|recorded|has sha256", doors, make)
    blob = recorded_blob
    things: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "empty": lambda path: path.write_bytes(b""),
        "a folder": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a dangling link": lambda path: path.symlink_to("gone"),
    }
    for what, thing in things.items():
        text = "missing|recorded|has sha256|ordinary"
        yield Bad(f"blob: {what}", "bytes", _BAD, text, ("pull", "get", "verify"), _instead(blob, thing))
    for at in (2, 100, -5):
        yield Bad(
            f"record: byte {at} flipped",
            "bytes",
            _BAD,
            r"1\.json",
            ("pull", "record", "verify"),
            _flip(record_path, at),
        )
    yield Bad(
        "record: a folder", "bytes", AdapterNotFoundError, "trec", ("pull", "record"), _instead(record_path, Path.mkdir)
    )
    yield Bad(
        "record: a pipe", "bytes", AdapterNotFoundError, "trec", ("pull", "record"), _instead(record_path, os.mkfifo)
    )


_LINES: list[tuple[str, bytes, str]] = [
    ("garbage", b"garbage\n", "JSON"),
    ("half a line", b'{"alias":"x","ver', "JSON"),
    ("blank line", b"\n", "JSON"),
    ("binary", bytes(range(256)) + b"\n", ""),
    ("a list", b"[]\n", ""),
    ("version as text", b'{"alias":"x","at":"","version":"1"}\n', "version"),
    ("version true", b'{"alias":"x","at":"","version":true}\n', "version"),
    ("version 0", b'{"alias":"x","at":"","version":0}\n', "version"),
    ("version -1", b'{"alias":"x","at":"","version":-1}\n', "version"),
    ("no alias", b'{"at":"","version":1}\n', "alias"),
    ("a key more", b'{"alias":"x","at":"","version":1,"run":"rm"}\n', "unknown key"),
    ("alias ../../x", b'{"alias":"../../x","at":"","version":1}\n', "alias"),
    ("alias with escape codes", b'{"alias":"\\u001b[2J","at":"","version":1}\n', "alias"),
    ("empty alias", b'{"alias":"","at":"","version":1}\n', "alias"),
]
_NO_ALIASES: tuple[Any, ...] = ([], {"prod": "1"}, None)
_INDEXES: list[tuple[str, dict[str, Any], str]] = [
    *(
        (f"name {name!r:.20}", {"name": name}, "name")
        for name in ("../../x", "CON", "con", "a\\b", "", "\x1b[2J", 5, None)
    ),
    *((f"version {version!r}", {"version": version}, "version") for version in (0, -1, "1", True, None, 1.0)),
    *((f"aliases {value!r:.20}", {"aliases": value}, "aliases") for value in _NO_ALIASES),
    ("alias", {"aliases": {"../x": 1}}, "alias"),
    ("digest", {"digest": "x"}, "sha256"),
    ("a key more", {"run": "rm"}, "unknown key"),
    ("method null", {"method": None}, "method"),
    ("base is a list", {"base": []}, "base"),
]


def _row(changes: dict[str, Any]) -> Make:
    def change(data: bytes) -> bytes:
        index = json.loads(data)
        index["adapters"][0] |= changes
        return json.dumps(index).encode()

    return _file(lambda place: place.remote / "registry.json", change)


def _index_key(key: str, value: object) -> Make:
    return _file(
        lambda place: place.remote / "registry.json", lambda data: json.dumps(json.loads(data) | {key: value}).encode()
    )


def _remotes_path(place: Place) -> Path:
    return place.remote / ".hub" / "remotes.json"


def _logs() -> Iterator[Bad]:
    for name, line, text in _LINES:
        make = _file(alias_path, lambda data, line=line: data + line)  # type: ignore[misc]
        yield Bad(f"alias log: {name}", "bytes", _BAD, rf"trec\.jsonl.*{text}", ("aliases", "pull", "verify"), make)
    for name, changes, text in _INDEXES:
        yield Bad(f"index row: {name}", "bytes", _BAD, rf"registry\.json.*{text}", ("index", "verify"), _row(changes))
    for key, value in (("format", "x"), ("schema", 2), ("schema", True), ("adapters", {}), ("adapters", [1])):
        yield Bad(
            f"index: {key} {value!r}", "bytes", _BAD, r"registry\.json", ("index", "verify"), _index_key(key, value)
        )
    for name, data in {
        "an unknown scheme": b'{"a": "ftp://x/y"}',
        "a password": b'{"a": "s3://me:secret@bucket/x"}',
        "a number": b'{"a": 5}',
        "a name with ../": b'{"../a": "file:///srv"}',
        "a name of a scheme": b'{"hf": "file:///srv"}',
    }.items():
        make = _file(_remotes_path, lambda _, data=data: data)  # type: ignore[misc]
        yield Bad(f"remotes: {name}", "path", _BAD, r"remotes\.json", ("remotes",), make)


# ---------------------------------------------------------------- names, references, addresses

_NAMES = (
    "", " ", ".", "..", "../x", "../../etc/x", "a/../b", "a/b/c", "/a", "a/", "a//b", "a\\..\\b", "a\\b", "C:", "c:x",
    "con", "prn", "aux", "nul", "com1", "lpt9", "con.x", "org/nul", "nul/x", "Trec", "t rec", "trec ", " trec", "trec.",
    ".trec", "-trec", "trec-", "a--b", "a..b", "a\0b", "a\nb", "trec\n", "tr\u0435c", "trec\u0301", "\uff54rec",
    "\u202etrec",
    "\ud800", "\x1b[2J", "a" * 65, "a" * 100_000, "a/" * 50_000, "~", "~root", "$HOME", "%41", "a;b", "a|b", "a*",
    "a?b",
    "x.json", "x.jsonl", "a.json/b", "\u0661", "\u00df", "\u0130", "CON", "a@1", "a:prod",
)  # fmt: skip
_REFS = (
    "trec@", "trec@0", "trec@-1", "trec@01", "trec@1.0", "trec@1e3", "trec@ 1", "trec@1 ", "trec@1\n", "trec@\u0661",
    "trec@9999999999", "trec@" + "9" * 5000, "trec@latest", "trec@sha256:", "trec@sha256:xyz",
    "trec@sha256:" + "A" * 64,
    "trec@sha256:" + "0" * 65, "trec@sha512:" + "0" * 64, "trec@1@2", "trec@1:prod", "trec:prod@1", "trec:",
    "trec:PROD",
    "trec:../x", "trec:a b", "trec:" + "a" * 65, "trec:\u0430", ":prod", "@1", "@", ":",
)  # fmt: skip
_NOWHERE = ("gone", "trec@2", "trec@999999999", "trec:gone", "trec@sha256:" + "0" * 64, "org/trec")
_ADDRESSES = (
    "", "x", "trec@1", "gone/trec@1", "ftp://x/y", "javascript:alert(1)", "http://127.0.0.1/trec", "FILE:///x", "://",
    "s3:",
    "file://", "file:///", "file://[", "file://[::1", "file://host/share/x", "file:relative/x", "file:///gone/trec@1",
    "file:///%00/trec@1", "file:///" + "a" * 5000 + "/trec@1", "file:///dev/null/trec", "file:///etc/passwd",
    "file:///../../etc/trec",
    "file://\ud800/x",
    "file:///\x1b[2Jx/trec@1",
)  # fmt: skip
_SECRET = "s3cr3tpassw0rd"
_SECRETS = (
    f"s3://me:{_SECRET}@bucket/x", f"hf://user:{_SECRET}@org/repo", f"file://me:{_SECRET}@host/x", f"s3://bucket/x?key={_SECRET}",
    f"hf://org/repo#{_SECRET}", "hf://org/hf_abcdefghijklmnopqrstuvwx", "s3://AKIAABCDEFGHIJKLMNOP/x", f"s3://b%40{_SECRET}@h/x",
)  # fmt: skip


def _names() -> Iterator[Bad]:
    for name in _NAMES:
        yield Bad(f"name {name!r:.30}", "path", InvalidNameError, "", ("name",), value=name)
    for ref in _REFS:
        yield Bad(f"reference {ref!r:.30}", "reference", InvalidNameError, "", ("reference",), value=ref)
    for ref in _NOWHERE:
        yield Bad(f"reference {ref!r:.30}", "reference", AdapterNotFoundError, "", ("reference",), value=ref)
    for address in _ADDRESSES:
        error = GraftoryError if address == "file:///dev/null/trec" else RemoteError
        yield Bad(f"address {address!r:.30}", "path", error, "", ("address",), value=address)
    for address in (
        "file://[",
        "file:///%00/x",
        "file:///dev/null/x",
        "file:///etc/passwd",
        "file:relative",
        "nothing",
    ):
        yield Bad(f"push to {address!r:.30}", "path", RemoteError, "", ("push to",), value=address)
    for number, address in enumerate(_SECRETS):
        yield Bad(f"secret {number} in an address", "secret", RemoteError, "", ("new remote",), value=address)


def _other_version(place: Place) -> None:
    forge(place, _set("spec", "licence", value="another"))


def _conflicts() -> Iterator[Bad]:
    text = "a version never changes"
    yield Bad(
        "another version 1", "version", VersionConflictError, text, ("push conflict", "pull conflict"), _other_version
    )
    yield Bad("another folder as version 1", "version", VersionConflictError, text, ("add as mine",))


# ---------------------------------------------------------------- keys and signatures

_KEYS = {
    "empty": b"",
    "garbage": b"\0\xff" * 50,
    "PEM of garbage": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    "P-256": ec.generate_private_key(ec.SECP256R1())
    .public_key()
    .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    "a private key": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    "too long": b"-----BEGIN PUBLIC KEY-----\n" + b"A" * (1 << 17),
    "JSON": b"{}",
}
_SIGNATURES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff\0garbage",
    "a list": lambda data: b"[]",
    "a key twice": lambda data: _spoiled(data, b'"signature":""'),
    "cut": lambda data: data[:-10],
    "a space more": lambda data: data + b" ",
    "no signature": lambda data: json.dumps({"statement": json.loads(data)["statement"]}).encode(),
    "signature of zeros": lambda data: json.dumps(
        json.loads(data) | {"signature": "A" * 86 + "=="}, sort_keys=True, separators=(",", ":")
    ).encode(),
    "not base64": lambda data: json.dumps(json.loads(data) | {"signature": "\u00e9"}).encode(),
    "statement is text": lambda data: json.dumps(json.loads(data) | {"statement": "x"}).encode(),
    "another version": lambda data: data.replace(b'"version":1', b'"version":2'),
    "two megabytes": lambda data: b" " * (2 << 20),
}


def signature_path(place: Place) -> Path:
    """The signature of `trec@1` in the stranger's hub."""
    return next((place.remote / ".hub" / "signatures" / "trec" / "1").glob("*.json"))


def _key(name: str, data: bytes) -> Make:
    def make(place: Place) -> None:
        (place.root / name).write_bytes(data)

    return make


def _trust() -> Iterator[Bad]:
    for name, data in _KEYS.items():
        yield Bad(f"public key: {name}", "key", SignatureError, r"key\.pub", ("public key",), _key("key.pub", data))
        yield Bad(f"private key: {name}", "key", SignatureError, "key", ("private key",), _key("key", data))
    for name, make in {
        "missing": lambda place: (place.root / "key.pub").unlink(),
        "a folder": _instead(lambda place: place.root / "key.pub", Path.mkdir),
    }.items():
        yield Bad(f"public key: {name}", "key", SignatureError, r"key\.pub", ("public key file",), make)
    for name, change in _SIGNATURES.items():
        make = _file(signature_path, change)
        yield Bad(f"signature: {name}", "key", SignatureError, "trec@1", ("signed",), make)


BAD_INPUTS: tuple[Bad, ...] = (
    *BAD_FOLDERS,
    *_json(),
    *_records(),
    *_record_bytes(),
    *_logs(),
    *_names(),
    *_conflicts(),
    *_trust(),
)
"""Every bad input."""
