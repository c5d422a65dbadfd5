"""Checkpoints made by hand: any state, any manifest, with digests that are right."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from eventrain.engine.checkpoint.reader import encode_manifest, manifest_digest


def forge_manifest(checkpoint: Path, **changes: Any) -> None:
    """Change what a manifest says, and have its digest say that it is right."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    manifest = {key: value for key, value in {**manifest, **changes}.items() if value is not None}
    (checkpoint / "manifest.json").write_bytes(encode_manifest(manifest, manifest_digest(manifest)))


def forge_state(checkpoint: Path, state: bytes) -> None:
    """Replace the state, and have the manifest say that it is right."""
    (checkpoint / "state.pt").write_bytes(state)
    written = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    forge_manifest(checkpoint, files={"state.pt": written})


def archive(pickled: bytes, *records: bytes, more: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """What `torch.save` would have written: a pickle, the bytes of its tensors, and more."""
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        for i, record in enumerate(records):
            file.writestr(f"archive/data/{i}", record)
        file.writestr("archive/version", b"3\n")
        for name, content in more:
            file.writestr(name, content)
    return held.getvalue()


class Op:
    """A pickle, from its operations: what a pickler would never write, too."""

    def __init__(self, code: bytes) -> None:
        self.code = code

    @property
    def whole(self) -> bytes:
        return b"\x80\x02" + self.code + b"."


def op(value: Any) -> Op:
    """Operations that put a plain value on the stack; the items of a dict or tuple may be `Op`."""
    match value:
        case Op():
            return value
        case None | bool():
            return Op({None: b"N", False: b"\x89", True: b"\x88"}[value])
        case int():
            encoded = pickle.encode_long(value)
            return Op(b"\x8a" + bytes([len(encoded)]) + encoded)
        case str():
            return Op(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
        case tuple():
            return Op(b"(" + b"".join(op(item).code for item in value) + b"t")
        case dict():
            items = b"".join(op(key).code + op(item).code for key, item in value.items())
            return Op(b"}(" + items + b"u")
    raise TypeError(f"no operations for {value!r}")


def named(module: str, name: str) -> Op:
    return Op(f"c{module}\n{name}\n".encode())


def called(function: Op, *args: Any) -> Op:
    return Op(function.code + op(args).code + b"R")


def storage(n: int, key: str = "0", kind: str = "FloatStorage") -> Op:
    """A tensor's memory: `n` numbers, of the record with that key."""
    return Op(op(("storage", named("torch", kind), key, "cpu", n)).code + b"Q")


def tensor(memory: Op, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Op:
    hooks = called(named("collections", "OrderedDict"))
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return called(rebuild, memory, offset, shape, stride, False, hooks)
