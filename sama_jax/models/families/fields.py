"""Reads the fields of a `config.json`: each by its type and range, and none that matters unread.

A family asks `Fields` for all that shapes its network. What it has not asked for, and what names a
part of the arithmetic that is easily overlooked (rotary embedding, attention, windows, scales,
quantisation), must be off: a model that is read wrongly gives numbers all the same.
"""

import math
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from sama_jax.errors import ModelError
from sama_jax.untrusted import printable, shown

SIZE_LIMIT = 2**22
"""Of widths and vocabularies: the largest published ones are 53,248 and 262,144."""
COUNT_LIMIT = 2**14
"""Of layers and experts: the most in a published model are some 100 and 512."""
_COUNTS = re.compile(r"layers?$|^n_blocks$|experts|^first_k_dense")

_TELLING = re.compile(
    r"rope|rotary|theta|yarn|alibi|attn|attention|window|sliding|layer_types|causal|scal|multiplier"
    r"|soft_?cap|sink|quant|original_max_position|block_(?:length|size)|^bd_size$"
)
_SILENT = re.compile(
    # Training only, which program computes the same numbers, what else is returned, and the
    # number of heads under the name that another family gives it.
    r"dropout|pdrop|attn_implementation|flash|sdpa|xformers|output_attentions|max_window_layers"
    r"|^num_attention_heads$"
)
_SCALE, _ATTENTION = re.compile("scal|multiplier|factor"), re.compile("attn|attention|query")


class Fields:
    """Holds a config's fields, and which of them were asked for."""

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        asked: set[str] | None = None,
    ):
        self.where = where
        """The file, for messages."""
        self._config, self._defaults = config, defaults
        self._asked = set() if asked is None else asked

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Fields":
        """Returns the same config; a field that it leaves out has the value of its class."""
        return Fields(self._config, self.where, defaults, self._asked)

    def states(self, name: str) -> bool:
        """Returns whether the config has a field, be it null."""
        return name in self._config

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field as it stands, else its class default, else `default`."""
        self._asked.add(name)
        return self._config.get(name, self._defaults.get(name, default))

    def refuse(self, problem: str) -> NoReturn:
        """Raises `ModelError` about this file."""
        raise ModelError(f"{self.where}: {problem}")

    def sizes(
        self, *names: str, null: Collection[str] = (), limit: int = SIZE_LIMIT
    ) -> tuple[Any, ...]:
        """Returns positive integers up to `limit`; None for those of `null` that are null."""
        values = [self.get(name) for name in names]
        wrong = [
            f"{name} is {shown(value)}"
            for name, value in zip(names, values)
            if not (value is None and name in null) and not _is_size(name, value, 1, limit)
        ]
        if wrong:
            self.refuse(
                f"expected positive integers (layers and experts up to {COUNT_LIMIT:,}, others up "
                f"to {limit:,}), but " + "; ".join(wrong)
            )
        return tuple(values)

    def size(self, name: str) -> int:
        """Returns a positive integer."""
        return self.sizes(name)[0]

    def count(self, name: str, most: int = COUNT_LIMIT) -> int:
        """Returns an integer from 0 to `most`; 0 if it is null."""
        value = self.get(name)
        if value is None:
            return 0
        if not _is_size(name, value, 0, most):
            self.refuse(f"{name} is {shown(value)}; expected an integer from 0 to {most:,}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """Returns a finite positive number."""
        value = self.get(name, default)
        number = _finite(value)
        if number is None or not number > 0:
            self.refuse(f"{name} is {shown(value)}; expected a positive number")
        return number

    def flag(self, name: str, null: bool | None = None) -> bool:
        """Returns a boolean; `null`, if it is given, for a null."""
        value = self.get(name)
        if value is None and null is not None:
            return null
        if type(value) is not bool:
            self.refuse(f"{name} is {shown(value)}; expected true or false")
        return value

    def only(self, supported: Mapping[str, Any]) -> None:
        """Refuses fields that have another value; a tuple lists several, the default first."""
        wrong = []
        for name, have in supported.items():
            options = have if isinstance(have, tuple) else (have,)
            value = self.get(name, options[0])
            if not any(_same(value, option) for option in options):
                absent = "" if self.states(name) else " (class default, field is absent)"
                wrong.append(f"{name} is {shown(value)}{absent}, only {options[0]!r} is supported")
        if wrong:
            self.refuse("not supported: " + "; ".join(wrong))

    def section(self, name: str) -> "Fields":
        """Returns the fields of an object inside."""
        value = self.get(name)
        if not isinstance(value, dict):
            self.refuse(f"{name} is {shown(value)}; expected an object")
        return Fields(value, f"{self.where}, {name}")

    def refuse_rest(self, *, all_matter: bool = False) -> None:
        """Raises `ModelError` for fields that nobody asked for, unless they change nothing.

        Args:
          all_matter: whatever its name, a field counts.
        """
        rest = {
            name: value
            for name, value in self._config.items()
            if name not in self._asked
            and (all_matter or (_TELLING.search(name.lower()) and not _SILENT.search(name.lower())))
            and not self._is_off(name.lower(), value)
        }
        if not rest:
            return
        known = sorted(n for n in self._asked if all_matter or _TELLING.search(n))
        hint = ""
        if any("quant" in name for name in rest):
            hint = ". Quantised weights are read where quantization_config says how they are stored"
        self.refuse(
            "not understood: "
            + "; ".join(f"{printable(name)} is {shown(value)}" for name, value in rest.items())
            + f"; it may change what the model computes. Read here are {', '.join(known)}; any "
            f"other of that kind must be absent, null or off{hint}"
        )

    def _is_off(self, name: str, value: Any) -> bool:
        """Returns whether a field has the value that changes nothing."""
        if value is None or value is False or value in ([], {}, "", "default", "full_attention"):
            return True
        if name == "layer_types":
            return isinstance(value, list) and all(kind == "full_attention" for kind in value)
        if name == "sliding_window":
            return self.get("use_sliding_window") is False
        number = _finite(value)
        if number == 1:  # an attention scale of 1 stands for 1 / sqrt(head size), which is another
            return bool(_SCALE.search(name)) and not _ATTENTION.search(name)
        return number == 0 and "cap" in name


def _is_size(name: str, value: Any, least: int, most: int) -> bool:
    most = min(most, COUNT_LIMIT) if _COUNTS.search(name) else most
    return type(value) is int and least <= value <= most


def _finite(value: Any) -> float | None:
    """Returns a JSON number as a float; None for anything else, and for those beyond floats."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _same(a: Any, b: Any) -> bool:
    return a == b and (type(a) is bool) == (type(b) is bool)
