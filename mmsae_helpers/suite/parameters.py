"""Parameter files checked against the notebook they are for.

Papermill only warns of an unknown key, and YAML reads ``1e-4`` as text. Here both are an `InputError`.
"""

import ast
import difflib
import json
import os
import re
from pathlib import Path

from mmsae_helpers.errors import InputError

PROFILES = ("smoke", "tiny", "paper")


def repo_root():
    """``MMSAE_ROOT``, or the first folder with ``notebooks/`` and ``params/`` up from here, else the package's own."""
    if os.environ.get("MMSAE_ROOT"):
        return Path(os.environ["MMSAE_ROOT"]).resolve()
    for folder in [*(here := Path.cwd().resolve(), *here.parents), Path(__file__).resolve().parents[2]]:
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise InputError(f"no notebooks/ and params/ above {Path.cwd()}; run from the repository or set MMSAE_ROOT")


def read_notebook(path):
    """Notebook as a plain dict; `InputError` if it is not there."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such notebook") from None


def source(cell):
    """Text of a cell, which the format may store as a list of lines."""
    return "".join(cell["source"])


def defaults(notebook_path):
    """Names and values of a notebook's cell tagged ``parameters``: assignments of literals, one name each."""
    cells = [c for c in read_notebook(notebook_path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook_path}: {len(cells)} cells are tagged 'parameters'; tag exactly one")
    found = {}
    for node in ast.parse(source(cells[0])).body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        try:
            found[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            where = f"{notebook_path}: line {node.lineno} of the parameters cell"
            raise InputError(f"{where} must read 'name = literal'") from None
    return found


def check(values, expected, where):
    """``values`` checked against the defaults ``expected``: same names, same types; ints given for floats made floats.

    A default of None accepts any value; the items of a list or dict are held to the type of the default's items when
    those agree. ``where`` is the file or notebook named in the message.
    """
    if unknown := [key for key in values if key not in expected]:
        close = difflib.get_close_matches(str(unknown[0]), expected, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(expected)}"
        raise InputError(f"{where}: unknown parameter '{unknown[0]}'; {hint}")
    return {key: _fit(value, expected[key], f"{where}: {key}") for key, value in values.items()}


def _fit(value, default, where):
    number = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
    if isinstance(value, str) and not isinstance(default, str) and re.fullmatch(number, value, re.I):
        raise InputError(f"{where} is the text '{value}', not a number; YAML reads 1e-4 as text, write 1.0e-4")
    if default is None:
        return value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kinds = type(value).__name__, type(default).__name__
        raise InputError(f"{where} is {value!r} ({kinds[0]}); give a {kinds[1]}, like {default!r}")
    if value != value:
        raise InputError(f"{where} is not a number (nan); give one")
    if isinstance(default, list):
        return [_fit(item, _common(default), f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(default, dict):
        shared = _common(list(default.values()))
        return {k: _fit(item, default.get(k, shared), f"{where}.{k}") for k, item in value.items()}
    return value


def _common(items):
    """An item that stands for the type of all, None where they disagree."""
    types = {type(item) for item in items}
    return 0.0 if types == {int, float} else items[0] if len(types) == 1 else None


def load(params_path, notebook_path):
    """What a parameter file sets, checked against the notebook's parameters cell.

    `InputError` for a missing or malformed file, an unknown key or a wrong type.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(params_path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InputError(f"{params_path}: no such parameter file; every notebook has one per profile") from None
    except yaml.YAMLError as error:
        raise InputError(f"{params_path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{params_path}: holds a {type(values).__name__}; write 'name: value' lines")
    return check(values, defaults(notebook_path), str(params_path))
