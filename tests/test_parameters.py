import papermill
import pytest
import throwaway

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
        ("- a", "holds a list"),
        ("lr: [", "is not YAML"),
    ],
)
def test_bad_values_get_one_line_that_names_file_and_parameter(notebook, text, says):
    with pytest.raises(InputError) as caught:
        load(notebook, text)
    assert says in str(caught.value) and "x.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_missing_tag(notebook):
    with pytest.raises(InputError, match="no such parameter file"):
        parameters.load(notebook.with_name("none.yaml"), notebook)
    untagged = notebook.with_name("u.ipynb")
    untagged.write_text(notebook.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(InputError, match="0 cells are tagged"):
        parameters.defaults(untagged)


def test_computed_default_is_refused(tmp_path):
    throwaway.write(tmp_path, "01_x", parameters="a = 1\nb = a * 2")
    with pytest.raises(InputError, match="line 2 of the parameters cell"):
        parameters.defaults(tmp_path / "notebooks" / "01_x.ipynb")
