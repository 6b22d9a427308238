import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WANTED = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
WANTED += [Requirement(text) for extra in PROJECT["project"]["optional-dependencies"].values() for text in extra]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if line and line[0] != "#")


def test_constraints_pin_everything_pyproject_asks_for():
    for wanted in WANTED:
        pin = PINS[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pin), f"{wanted} against {pin}"


def test_constraints_are_exact_portable_and_sorted():
    assert list(PINS) == sorted(PINS) and all(name == canonicalize_name(name) for name in PINS)
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", pin) for pin in PINS.values()), "no local version labels such as +cpu"
    assert PINS["torch"] == "2.13.0" and Version(PINS["transformer-lens"]) < Version("4")
    assert "ipywidgets" not in PINS, "tqdm prints text only without it"


def test_installed_versions_are_the_pins():
    for name, pin in PINS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        assert installed.split("+")[0] == pin, f"{name}: {installed} installed, {pin} pinned; make env"


def test_environment_yml_installs_the_package_with_the_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    assert last["pip"] == ["-c constraints.txt", "-e .[dev]"], "versions stand in constraints.txt alone"
    (python,) = [d.split("=")[1] for d in conda if d.startswith("python")]
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains(python)
    assert set(PROJECT["project"]["optional-dependencies"]) == {"dev", "real", "scale"}


def test_what_real_asks_to_install_is_its_extra():
    from mmsae_helpers.tinyworld import real

    asked = {Requirement(word).name: Requirement(word).specifier for word in real.INSTALL.split()[3:]}
    assert set(asked) == {Requirement(text).name for text in PROJECT["project"]["optional-dependencies"]["real"]}
    assert all(specifier.contains(PINS[name]) for name, specifier in asked.items())


def test_makefile_and_ci_use_the_same_files():
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci/run").read_text()
    assert f"torch=={PINS['torch']}" in makefile and "-c constraints.txt -e '.[dev]'" in makefile
    assert "make test" in ci and "make hygiene" in ci and "|| true" not in ci + makefile
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_package_carries_its_data():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert data["mmsae_helpers.suite"] == ["claims.yaml", "preflight.yaml", "report_template/*", "browser_template/*"]
    assert data["mmsae_helpers.meters"] == ["post_features.csv"]
    assert data["mmsae_helpers.tinyworld"] == ["checkpoints/**/*"]
    version_line = (ROOT / "mmsae_helpers/__init__.py").read_text()
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in version_line
