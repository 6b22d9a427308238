from pathlib import Path

import papermill
import pytest
import throwaway
import yaml

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import parameters

CELL = """
# comments and several lines are fine
profile = "tiny"  # which
lr = 1e-4  # step size
steps = 200
layers = [
    0,
    6,
]
rates = [0.1, 0.5]
binarise = True
release = None  # or a name
labels = {"a": 1}
seeds = [0, 1]
batch_size = 8
control = {"split": "train", "tokens": 9}
"""


@pytest.fixture
def notebook(tmp_path):
    throwaway.write(tmp_path, "01_x", parameters=CELL)
    return tmp_path / "notebooks" / "01_x.ipynb"


def load(notebook, text):
    path = notebook.with_name("x.yaml")
    path.write_text(text)
    return parameters.load(path, notebook)


def test_defaults_are_the_values_of_the_cell(notebook):
    found = parameters.defaults(notebook)
    assert found["lr"] == 1e-4 and found["layers"] == [0, 6] and found["release"] is None
    assert set(papermill.inspect_notebook(notebook)) <= set(found)


def test_good_values_pass_and_ints_become_floats(notebook):
    text = "profile: paper\nlr: 1\nlayers: []\nrates: [1, 0.5]\nrelease: gemma\nlabels: {b: 2}\n"
    values = load(notebook, text)
    assert values["lr"] == 1.0 and isinstance(values["lr"], float)
    assert values["rates"] == [1.0, 0.5] and values["release"] == "gemma" and values["labels"] == {"b": 2}
    assert load(notebook, "") == {}


@pytest.mark.parametrize(
    "text, says",
    [
        ("lrr: 0.1", "unknown parameter 'lrr'; did you mean 'lr'?"),
        ("lr: 1e-4", "lr is the text '1e-4', not a number; YAML reads 1e-4 as text"),
        ("release: 1e-4", "release is the text '1e-4'"),
        ("rates: [1e-4]", "rates[0] is the text '1e-4'"),
        ("steps: 1.5", "steps is 1.5 (float); give a int"),
        ("steps: true", "steps is True (bool)"),
        ("binarise: 1", "binarise is 1 (int)"),
        ("layers: 6", "layers is 6 (int); give a list"),
        ("layers: [a]", "layers[0] is 'a' (str)"),
        ("labels: {a: x}", "labels.a is 'x'"),
        ("profile: null", "profile is None"),
        ("lr: .nan", "nan"),
        ("lr: .inf", "lr is inf; give a finite number"),
        ("seeds: []", "seeds is []; give at least one"),
        ("seeds: [-1]", "seeds is [-1]; give at least one, none below 0"),
        ("seeds: [0, 0]", "seeds is [0, 0]; give at least one, none below 0, each once"),
        ("batch_size: 0", "batch_size is 0; give 1 or more"),
        ("control: {split: train, token: 5}", "control has split, token; give split, tokens"),
        ("- a", "holds a list"),
        ("lr: [", "is not YAML"),
        ("lr: 0.1\nsteps: 1\nlr: 0.2", "'lr' is there twice"),
        ("labels: {b: 1, b: 2}", "'b' is there twice"),
        ("lr: 0.1\n---\nlr: 0.2", "is not YAML"),
        ("{[1]: 2}", "is not YAML"),
    ],
)
def test_bad_values_get_one_line_that_names_file_and_parameter(notebook, text, says):
    with pytest.raises(InputError) as caught:
        load(notebook, text)
    assert says in str(caught.value) and "x.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_encodings(notebook):
    path = notebook.with_name("x.yaml")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("release: jalapeño\n".encode(encoding))
        assert parameters.load(path, notebook) == {"release": "jalapeño"}
    for encoding in ("latin-1", "utf-16-le"):
        path.write_bytes("release: jalapeño\n".encode(encoding))
        with pytest.raises(InputError, match="x.yaml: is not YAML in UTF-8") as caught:
            parameters.load(path, notebook)
        assert "\n" not in str(caught.value)


def test_profiles_are_the_folders_of_params(tmp_path):
    for name in ("tiny", "my-own_2", ".ipynb_checkpoints", "with space"):
        (tmp_path / "params" / name).mkdir(parents=True)
    (tmp_path / "params/README").write_text("no folder")
    assert parameters.profiles(tmp_path) == ["my-own_2", "tiny"]


def test_missing_file_and_missing_tag(notebook):
    with pytest.raises(InputError, match="no such parameter file"):
        parameters.load(notebook.with_name("none.yaml"), notebook)
    untagged = notebook.with_name("u.ipynb")
    untagged.write_text(notebook.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(InputError, match="0 cells are tagged"):
        parameters.defaults(untagged)


def test_computed_default_is_refused(tmp_path):
    for line in ("b = a * 2", "b = c = 1", "print(1)", "%matplotlib inline", "<<<<<<< HEAD"):
        throwaway.write(tmp_path, "01_x", parameters=f"a = 1\n{line}")
        with pytest.raises(InputError, match="line 2 of the parameters cell"):
            parameters.defaults(tmp_path / "notebooks" / "01_x.ipynb")


@pytest.mark.parametrize("name", ["claims.yaml", "preflight.yaml"])
def test_no_key_of_the_packages_own_files_is_there_twice(name):
    text = (Path(parameters.__file__).parent / name).read_bytes()
    assert yaml.load(text, parameters._Loader)
