"""(IA)³ in PEFT's files: one vector a module, [out, 1], or [1, in] where it scales what the module reads."""

from __future__ import annotations

from dataclasses import dataclass

from graftory.adapter import AdapterSpec
from graftory.config import Ia3Config
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.codecs.peft_common import (
    Accepted,
    PeftFile,
    Reader,
    as_file,
    common_values,
    keeps_transposed,
    opening,
    places,
    refuse_features,
)
from graftory.hub.codecs.peft_kind import CONFIG, WEIGHTS, PeftKind, Stored
from graftory.schema import Json

_ACCEPTED: Accepted = {"init_ia3_weights": lambda value: value in (None, True, False)}
(_VECTOR,) = Ia3Config.parts


@dataclass(frozen=True, slots=True)
class PeftIa3(PeftFile):
    """What graftory reads of (IA)³."""

    feedforward: tuple[str, ...] | None
    """Ends of the modules whose input is scaled; None if unsaid or a regular expression, which is never evaluated."""

    def disagrees(self, path: str, scales_input: bool) -> bool:
        """Whether PEFT would use a module's vector on its other side."""
        return self.feedforward is not None and path.endswith(self.feedforward) != scales_input


def _read(data: Json, where: str) -> PeftIa3:
    refuse_features(data, where, known={"feedforward_modules"}, accepted=_ACCEPTED)
    read = Reader(data, where)
    said = data.get("feedforward_modules")
    ends = None if said is None or isinstance(said, str) else read.texts("feedforward_modules")
    return PeftIa3(**common_values(read), feedforward=ends)


def _config(file: PeftIa3, body: Stored) -> Ia3Config:
    """The shape of a vector says what it scales: a column the output, a row the input."""
    refusal = f"{WEIGHTS}: tensor %r is not understood; graftory reads ia3_l and modules_to_save"
    paths = shared.paths_of(body, Ia3Config.parts, refusal)
    if not paths:
        raise CorruptAdapterError(f"{WEIGHTS}: no (IA)³ tensor in the file; wanted <module>.ia3_l")
    rows = tuple(path for path in paths if _scales_input(path, body[f"{path}.{_VECTOR}"].shape))
    for path in paths:
        if file.disagrees(path, path in rows):
            raise CorruptAdapterError(
                f"{CONFIG}: feedforward_modules and the shape of {path}.{_VECTOR} disagree on whether it scales the "
                "input; save both again"
            )
    return Ia3Config(targets=paths, init_seed=None, feedforward=rows)


def _scales_input(path: str, shape: tuple[int, ...]) -> bool:
    if len(shape) != 2 or max(shape) < 2 or min(shape) != 1:
        raise UnsupportedAdapterError(
            f"{WEIGHTS}: {path}.{_VECTOR} is {shape}; graftory does (IA)³ on linear layers, [out, 1] or [1, in]"
        )
    return shape[0] == 1


def _check(file: PeftIa3, body: Stored, config: Ia3Config) -> None:
    found = _config(file, body).feedforward
    if set(found) != set(config.feedforward):
        odd = sorted(set(found) ^ set(config.feedforward))[0]
        raise CorruptAdapterError(
            f"{WEIGHTS}: only one of the tensors and the specification says that {odd!r} scales its input; save both"
        )


def _write(spec: AdapterSpec) -> bytes:
    config = spec.config
    assert isinstance(config, Ia3Config)
    made = {
        **opening(spec, "IA3"),
        **places(spec),
        "feedforward_modules": list(config.feedforward),
        "fan_in_fan_out": keeps_transposed(spec),
        "init_ia3_weights": True,
    }
    return as_file(made)


IA3 = PeftKind("IA3", _read, _config, _check, _write)
