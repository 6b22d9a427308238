"""Parameter files checked against the notebook they are for.

Papermill only warns of an unknown key, YAML reads 1e-4 as text, of equal keys the last counts. Here all are refused.
"""

import ast
import difflib
import json
import math
import os
import re
from pathlib import Path

import yaml

from mmsae_helpers.errors import InputError, first_line

RECORDS = ("control", "tuning")  # parameters whose keys are names that the notebook asks for


def profiles(root):
    """Names of the profiles: the folders of ``params/`` that are letters, digits, - and _."""
    return sorted(p.name for p in (Path(root) / "params").glob("*/") if re.fullmatch(r"[A-Za-z0-9_-]+", p.name))


def repo_root():
    """``MMSAE_ROOT``, or the first folder with ``notebooks/`` and ``params/`` up from here, else the package's own."""
    if os.environ.get("MMSAE_ROOT"):
        return Path(os.environ["MMSAE_ROOT"]).resolve()
    for folder in [*(here := Path.cwd().resolve(), *here.parents), Path(__file__).resolve().parents[2]]:
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise InputError(f"no notebooks/ and params/ above {Path.cwd()}; run from the repository or set MMSAE_ROOT")


def read_notebook(path):
    """Notebook as a plain dict; `InputError` if it is not there or not of nbformat 4."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such notebook") from None
    except ValueError as error:
        raise InputError(f"{path}: is no notebook ({first_line(error)}); cut off, or a merge conflict?") from None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or "cells" not in notebook:
        raise InputError(f"{path}: is no notebook of nbformat 4; open it in JupyterLab and save it")
    return notebook


def source(cell):
    """Text of a cell, which the format may store as a list of lines."""
    return "".join(cell["source"])


def defaults(notebook_path):
    """Names and values of a notebook's cell tagged ``parameters``: assignments of literals, one name each."""
    cells = [c for c in read_notebook(notebook_path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook_path}: {len(cells)} cells are tagged 'parameters'; tag exactly one")
    found = {}
    try:
        for node in ast.parse(source(cells[0])).body:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value)
    except (AttributeError, TypeError, ValueError, SyntaxError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else node.lineno
        raise InputError(f"{notebook_path}: line {line} of the parameters cell must read 'name = literal'") from None
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
    found = {key: _fit(value, expected[key], f"{where}: {key}") for key, value in values.items()}
    for key, value in found.items():
        if key in RECORDS and {*value} != {*expected[key]}:
            raise InputError(f"{where}: {key} has {', '.join(value)}; give {', '.join(expected[key])}")
        whole = [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
        if re.search(r"batch_sizes?$|^images_per_class$", key) and min(whole, default=1) < 1:
            raise InputError(f"{where}: {key} is {value}; give 1 or more")
        if key == "seeds" and (not value or min(whole, default=0) < 0 or len({*whole}) < len(whole)):
            raise InputError(f"{where}: {key} is {value}; give at least one, none below 0, each once")
    return found


def _fit(value, default, where):
    number = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
    if isinstance(value, str) and not isinstance(default, str) and re.fullmatch(number, value, re.I):
        raise InputError(f"{where} is the text '{value}', not a number; YAML reads 1e-4 as text, write 1.0e-4")
    if default is None:
        return value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise InputError(
            f"{where} is {value!r} ({type(value).__name__}); give a {type(default).__name__}, like {default!r}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}; give a finite number")
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


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = [str(key.value) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"'{twice}' is there twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def load(params_path, notebook_path):
    """What a parameter file sets, checked against the notebook's parameters cell; `InputError` where it is wrong."""
    try:
        values = yaml.load(Path(params_path).read_bytes(), _Loader) or {}  # bytes: it knows UTF-8 and UTF-16
    except FileNotFoundError:
        raise InputError(f"{params_path}: no such parameter file; every notebook has one per profile") from None
    except yaml.YAMLError as error:
        raise InputError(f"{params_path}: is not YAML in UTF-8 ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{params_path}: holds a {type(values).__name__}; write 'name: value' lines")
    return check(values, defaults(notebook_path), str(params_path))
