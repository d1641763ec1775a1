"""environment.yml and pyproject.toml agree with what is imported, and install without a compiler into an empty environment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())

# What the study's user asked for.
ASKED = [
    "jupyterlab",
    "papermill",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "openai",
    "pandas",
    "plotly",
    "ipywidgets",
]
EXACT = ("transformers", "peft", "openai", "huggingface_hub")
MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pandas-stubs": None, "nbstripout": "nbstripout"}


def name(requirement: str) -> str:
    return re.split(r"[<>=\[;~! ]", requirement)[0].lower()


def test_every_package_that_was_asked_for_is_a_dependency() -> None:
    assert set(ASKED) <= {name(r) for r in PROJECT["dependencies"]}


def test_packages_that_change_numbers_are_pinned_exactly() -> None:
    pinned = {name(r) for r in PROJECT["dependencies"] if "==" in r}
    assert set(EXACT) <= pinned


def test_environment_yml_is_a_conda_environment_that_installs_the_project() -> None:
    assert set(ENVIRONMENT) == {"name", "channels", "dependencies"}
    parts = [d for d in ENVIRONMENT["dependencies"] if isinstance(d, dict)]
    assert [list(p) for p in parts] == [["pip"]]
    assert "pip" in ENVIRONMENT["dependencies"]
    assert parts[0]["pip"] == ["--editable .[dev]"], "dependencies are listed once, in pyproject.toml"


@pytest.mark.slow
def test_the_pip_part_installs_into_an_empty_environment_and_everything_imports(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    lines = next(d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict))
    words = [word for line in lines for word in line.split()]
    # --only-binary: nothing may need a compiler.
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [name(r) for r in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]] if not name(r).startswith("types-")]
    modules = [MODULES.get(n, n.replace("-", "_")) for n in wanted]
    modules += [f"lib.{p.stem}" for p in sorted((ROOT / "lib").glob("*.py")) if p.stem != "__init__"]
    code = "import importlib, json, sys\nfor m in json.loads(sys.argv[1]): importlib.import_module(m)\nimport lib; print(lib.__file__)"
    done = subprocess.run([str(python), "-c", code, json.dumps([m for m in modules if m])], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip().splitlines()[-1]) == ROOT / "lib" / "__init__.py"
    packages = next((venv / "lib").glob("python*/site-packages"))
    own = [p for p in packages.iterdir() if not p.name.startswith(("torch", "nvidia", "triton", "functorch"))]
    size = sum(f.stat().st_size for p in own for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    assert size < 1.5e9, f"{size / 1e9:.2f} GB besides torch"


LOCK = ROOT / "requirements.lock"


def locked() -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.\-]+)==([^ ;]+)", LOCK.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_holds_every_dependency_within_its_bounds() -> None:
    """If this fails after a change of pyproject.toml, `make lock` makes the lock anew."""
    from packaging.requirements import Requirement

    pins = locked()
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        package = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if package != "torch":
            assert package in pins, f"{package}: run `make lock`"
            assert requirement.specifier.contains(pins[package], prereleases=True), (
                f"{line}, but {pins[package]} is locked: run `make lock`"
            )


def test_the_lock_has_hashes_for_all_it_pins_and_leaves_torch_and_its_accelerators_out() -> None:
    entries = re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text())
    pinned = [entry for entry in entries if re.match(r"[A-Za-z0-9_.\-]+==", entry)]
    assert len(pinned) == len(re.findall(r"^\S+==", LOCK.read_text(), re.MULTILINE)) > 100
    assert [entry.splitlines()[0] for entry in pinned if "--hash=sha256:" not in entry] == []
    assert [package for package in locked() if re.match(r"nvidia|cuda|torch|triton", package)] == []
