"""Reads experiments: YAML files that name models, texts, settings and attacks, run as audits.

A file is a mapping with

    summary   one line
    models    `demo` (made here, see `sama-jax demo`), `demo:llama` or `demo:bert` (the same of a
              next-token or a masked language model), `smol` (SmolLM2 as a diffusion model, see
              `programs.smol`) or `smol:causal` (as it is), or {target: DIR, reference: DIR}; with
              {adapter: DIR} a LoRA adapter on the target (left out: on the reference);
              or {laboratory: {..}}, models that are made in as many regimes as its fields name:
              those of `programs.laboratory.Regime`, each a value or a list of values
    data      with models of one's own: {data: FILE} or {members: FILE, nonmembers: FILE}, and
              {prefixes: FILE} where attacks want them; {text_field: NAME, label_field: NAME}, or
              {template: NAME, loss_on: response|text, end_tokens: K}, as an audit's flags
    runs      list of {name, attacks: [..], models, data, set: [key=value, ..]} with any setting
              that is no group (preset, passes, max_length, seed, ..); `models` and `data` of a
              run go before those of the file. The name is that of a folder
    compare   list of [attack, attack]: AUC of the second minus the first, paired, in every run
              that has both
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sama_jax import config
from sama_jax.errors import DataError, UsageError, nearest
from sama_jax.programs import demo, laboratory, smol
from sama_jax.storage.yaml_file import read_yaml
from sama_jax.texts.conversations import FOLDER, named_template
from sama_jax.untrusted import printable

_SETTINGS = {name for name in config.setting_names(config.AuditSettings()) if "." not in name}
_MODELS: dict[str, Any] = {
    **dict.fromkeys(("target", "reference", "adapter"), (str, "a folder")),
    "laboratory": (dict, "a mapping of fields of a regime"),
}
FIELD_NAMES = ("text_field", "label_field")
FORM = ("template", "loss_on", "end_tokens")
"""How conversations become texts, in the words of an audit's flags."""
_DATA: dict[str, Any] = {
    **dict.fromkeys(("data", "members", "nonmembers", "prefixes"), (str, "a file")),
    **dict.fromkeys(FIELD_NAMES, (str, "the name of a field")),
    "template": (str, "the name of a template"),
    "loss_on": (str, "response or text"),
    "end_tokens": (int, "a number of tokens"),
}
_INPUTS = {
    "models": ((str, dict), "a name, or a mapping of folders"),
    "data": (dict, "a mapping of files"),
}
_FIELDS = {
    **_INPUTS,
    "summary": (str, "a line"),
    "runs": ([dict], "a list `runs` of mappings"),
    "compare": ([[str]], "a list of pairs of attacks"),
}
_RUN_FIELDS = {
    **_INPUTS,
    "name": (str, "a word"),
    "attacks": ([str], "a list of names"),
    "set": ([str], "a list of key=value"),
    # `run_settings` checks these.
    **dict.fromkeys(_SETTINGS, (object, "a value")),
}
"""Field -> what it must be, as a type, and in words."""
DEMOS = {"demo": "llada", **{f"demo:{name}": name for name in demo.NETWORKS if name != "llada"}}
"""What `models` may be called -> the network of the demo."""
SMOL = {"smol": False, "smol:causal": True}
"""What `models` may be called -> whether SmolLM2 stays a causal model."""


def _folders() -> list[Path]:
    """Returns where experiments are shipped: in the package, or next to it in a clone."""
    here = Path(__file__).parents[1]
    return [here / "experiments", here.parent / "experiments"]


def available() -> dict[str, str]:
    """Returns the summaries of the experiments that are shipped, by name."""
    files = [f for folder in _folders() for f in sorted(folder.glob("*.yaml"))]
    return {file.stem: read(file)["summary"] for file in files}


def find(name: str) -> Path:
    """Returns the file of an experiment's name, or the path itself. Raises `UsageError`."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such file; expected the YAML of an experiment")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UsageError(f"unknown experiment '{name}'{nearest(name, available())}")


def read(path: Path) -> dict[str, Any]:
    """Reads and checks an experiment.

    Raises:
      DataError: it is none, or something in it is of a wrong kind.
      UsageError: a setting of a run cannot be.
    """
    found = read_yaml(path)
    _check(found, _FIELDS, ("runs",), str(path))
    full = {"summary": "", "models": "demo", "data": {}, "compare": [], **found}
    names = ["losses", "experiment.json"]  # stand beside the runs' folders
    for number, run in enumerate(full["runs"]):
        _check(run, _RUN_FIELDS, ("name", "attacks"), f"{path}: run {number}")
        where = f"{path}: run {number} ('{printable(run['name'])}')"
        if not re.fullmatch(r"[\w+-][\w.+-]{,99}", run["name"]) or run["name"] in names:
            raise DataError(
                f"{where}: its name must be a folder's of its own: letters, digits, . _ + -"
            )
        names.append(run["name"])
        models, data = (run.get(k, full[k]) for k in ("models", "data"))
        _check_models(models, where)
        _check_data(models, data, where)
        try:
            run_settings(run, base_settings(models))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    for pair in full["compare"]:
        known = [{*pair} <= {*run["attacks"]} or "all" in run["attacks"] for run in full["runs"]]
        if len(pair) != 2 or not any(known):
            shown = printable(", ".join(pair))
            raise DataError(f"{path}: compare [{shown}]: no run has both attacks")
    return full


def _check(found: Any, fields: dict[str, Any], needed: Sequence[str], where: str) -> None:
    """Raises `DataError` unless a mapping has the fields that it needs, each of its kind."""
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a mapping with {', '.join(needed or fields)}")
    for name, value in found.items():
        if name not in fields:
            shown = str(name)[:60]
            raise DataError(
                f"{where}: unknown field '{printable(shown)}'{nearest(shown, sorted(fields))}"
            )
        kind, words = fields[name]
        if not _is(value, kind):
            raise DataError(f"{where}: expected {name} to be {words}")
    missing = [name for name in needed if not found.get(name)]
    if missing:
        raise DataError(f"{where} needs {' and '.join(needed)}")


def _is(value: Any, kind: Any) -> bool:
    """Tells whether a value is of a type, or a list of such values."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(entry, kind[0]) for entry in value)
    return isinstance(value, kind)


def _check_models(models: Any, where: str) -> None:
    """Raises `DataError` unless these are a demo, or folders."""
    if isinstance(models, dict) and "laboratory" in models:
        _check(models, {"laboratory": _MODELS["laboratory"]}, (), f"{where}, models")
        try:
            regimes_of(models)
        except (UsageError, TypeError) as error:
            raise DataError(f"{where}, laboratory: {error}") from None
    elif isinstance(models, dict):
        _check(models, _MODELS, ("reference",), f"{where}, models")
        if not {"target", "adapter"} & set(models):
            raise DataError(f"{where}: models need a target, or an adapter on the reference")
    elif models not in (known := [*DEMOS, *SMOL]):
        raise DataError(
            f"{where}: models are '{printable(models)}'; expected {', '.join(known)}, or target "
            "and reference folders"
        )


def _check_data(models: Any, data: Any, where: str) -> None:
    """Raises `DataError` unless files are given just where they are read."""
    _check(data, _DATA, (), f"{where}, data")
    files = sorted(data.keys() - {"prefixes", *FIELD_NAMES, *FORM})
    _check_form(data, where)
    if isinstance(models, str) or "laboratory" in models:
        if data:
            raise DataError(
                f"{where}: has data ({', '.join(data)}), but its models bring their own texts; "
                "leave one of them out"
            )
    elif files not in (["data"], ["members", "nonmembers"]):
        raise DataError(
            f"{where}: data name {' and '.join(files) or 'no file'}; expected a file `data`, or "
            "files `members` and `nonmembers`"
        )


def _check_form(data: dict[str, Any], where: str) -> None:
    """Raises `DataError` unless conversations are read as an audit's flags can say."""
    template, loss_on, end_tokens = (data.get(name) for name in FORM)
    if template is None and (loss_on is not None or end_tokens):
        raise DataError(f"{where}: loss_on and end_tokens are about conversations: add a template")
    if loss_on not in (None, "response", "text"):
        raise DataError(f"{where}: loss_on is '{printable(loss_on)}'; expected response or text")
    if type(end_tokens or 0) is not int or (end_tokens or 0) < 0:
        raise DataError(f"{where}: end_tokens is {end_tokens}; expected 0 or more")
    if template not in (None, FOLDER):
        try:
            named_template(template)
        except UsageError as error:
            raise DataError(f"{where}: {error}") from None


def regimes_of(models: Any) -> list[laboratory.Regime]:
    """Returns the regimes in which models are made; none where they are not made so."""
    if isinstance(models, dict) and "laboratory" in models:
        return laboratory.grid(models["laboratory"])
    return []


def base_settings(models: Any) -> config.AuditSettings:
    """Returns the settings that go with these models: in a laboratory, those of a regime."""
    if isinstance(models, laboratory.Regime):
        return laboratory.audit_settings(models)
    if not isinstance(models, str):
        return config.AuditSettings()
    return smol.audit_settings() if models in SMOL else demo.audit_settings()


def run_settings(run: dict[str, Any], base: config.AuditSettings) -> config.AuditSettings:
    """Returns the settings of a run: those of its models, its own, and its preset's."""
    own, overrides = {name: run[name] for name in _SETTINGS & set(run)}, run.get("set", [])
    left = {"sama", "passes", *(text.partition("=")[0].strip() for text in overrides)}
    fields = {name: value for name, value in vars(base).items() if name not in left}
    return config.AuditSettings.of(overrides=overrides, **fields | own)
