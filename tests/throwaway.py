"""Small notebooks made in a test's own folder."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SAVE = 'from mmsae_helpers.suite.results import Run\n\nrun = Run("{name}", globals())'


def write(root, name, cells=(), parameters='profile = "tiny"', after=(), yaml="profile: {profile}\n"):
    """Write ``notebooks/<name>.ipynb`` and its parameters; a cell that starts with # is Markdown."""
    body = [new_markdown_cell(c) if c.startswith("#") else new_code_cell(c) for c in cells]
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = new_notebook(
        cells=[first, new_code_cell(SAVE.format(name=name)), *body, new_code_cell("run.save()")],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "mmsae": {"after": list(after)},
        },
    )
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
    (root / "params" / "tiny").mkdir(parents=True, exist_ok=True)
    (root / "params" / "tiny" / f"{name}.yaml").write_text(yaml.format(profile="tiny"))
