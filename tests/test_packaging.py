"""What users get: the wheel, not the checkout.

The wheel is built from the source distribution, so that both are checked at once and nothing that an earlier build
left in the checkout can slip in. It is installed into an empty virtual environment that sees the dependencies it
declares and theirs, as links to the copies installed here, and nothing else: neither the checkout, nor its editable
install, nor the tools for testing. An import of something undeclared fails there as it would for a user.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llmprune

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on Python 3.10

ROOT = Path(__file__).resolve().parents[1]

# Folders of code, and where they lie in the wheel.
TOPS = {"llmprune": "llmprune", "eval": "llmprune/eval", "triton_kernels": "llmprune/triton_kernels"}

# Declared because transformers asks for it where our code never names it.
INDIRECT = {"accelerate", "gguf"}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; fails with all that it printed."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built by way of the source distribution."""
    copy = tmp_path_factory.mktemp("source") / "llmprune"
    # A copy, because setuptools writes beside the sources and would pick up what an earlier build left there.
    leftovers = shutil.ignore_patterns(".*", "venv", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=leftovers)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a clean environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-I", "-c", code, cwd=folder).strip())
    for dependency in _closure(project["project"]["dependencies"]):
        _link(dependency, site_packages)
    # pip of this environment, working on that one.
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def _closure(requirements: list[str]) -> list[Distribution]:
    """The installed distributions that pip would choose for these requirements, theirs included."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found[name] = distribution(name)
        extras = requirement.extras or {""}
        needs = [Requirement(line) for line in found[name].requires or []]
        waiting += [
            need for need in needs if not need.marker or any(need.marker.evaluate({"extra": x}) for x in extras)
        ]
    return list(found.values())


def _link(dependency: Distribution, site_packages: Path) -> None:
    """Show one distribution's top-level folders and modules to the clean environment."""
    for top in {file.parts[0] for file in dependency.files or []} - {"..", "__pycache__"}:
        source, target = Path(str(dependency.locate_file(top))), site_packages / top
        if not target.exists() and source.suffix != ".pth":
            target.symlink_to(source)


def test_package_list_is_the_folders(project: dict[str, Any]) -> None:
    """An unlisted folder would import from a checkout and be missing from the wheel."""
    table = project["tool"]["setuptools"]
    mapped, packages = table["package-dir"], table["packages"]
    assert mapped == {place.replace("/", "."): top for top, place in TOPS.items() if top != place}
    places = {_folder(package) for package in packages}
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert tops == set(TOPS)
    assert places == {path.parent for top in tops for path in (ROOT / top).rglob("__init__.py")}
    assert packages == sorted(set(packages))


def _folder(package: str) -> Path:
    """Where the checkout keeps a package that may lie in a mapped one."""
    path = package.replace(".", "/")
    top, place = max(
        ((top, place) for top, place in TOPS.items() if f"{path}/".startswith(f"{place}/")),
        key=lambda each: len(each[1]),
    )
    return ROOT / (top + path.removeprefix(place))


def test_folders_of_code_are_packages() -> None:
    """The test above finds folders by their `__init__.py`, so none may lack it."""
    folders = {path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_wheel_holds_one_package_and_every_module(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"llmprune", f"llmprune-{llmprune.__version__}.dist-info"}
    modules = {
        f"{place}/{path.relative_to(ROOT / top)}" for top, place in TOPS.items() for path in (ROOT / top).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmprune" / "runtime").glob("cpu_*.[ch]*")}
    assert {"llmprune/py.typed", *sources} <= set(names)
    assert "llmprune/checkpoint/card.md.jinja" in names
    room = ROOT / "llmprune" / "report"
    pages = {str(path.relative_to(ROOT)) for path in [*room.glob("*.json"), *room.glob("templates/*")]}
    assert len(pages) > 5
    assert pages <= set(names)


def test_command_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert llmprune.__version__ in run(installed / "llmprune", "--version", cwd=tmp_path)


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Where there is no triton, too: only the kernels themselves and the tools for testing them need it."""
    needs_triton = r"__main__|\.triton_kernels\.(_|testing\.)"
    code = (
        "import importlib, pkgutil, re, llmprune\n"
        "names = [m.name for m in pkgutil.walk_packages(llmprune.__path__, 'llmprune.')]\n"
        f"names = [name for name in names if not re.search({needs_triton!r}, name)]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(llmprune.__file__, *names)"
    )
    file, *names = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent), "this tested the checkout, not the wheel"
    assert {"llmprune.eval", "llmprune.methods", "llmprune.errors", "llmprune.triton_kernels.matmul_24"} <= set(names)


def test_dependencies_are_what_the_code_imports(project: dict[str, Any]) -> None:
    lines = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["eval"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    imported = set()
    for path in [*(ROOT / "llmprune").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    owners = packages_distributions()  # `yaml` comes from PyYAML
    modules = imported - sys.stdlib_module_names - {"llmprune"}
    foreign = {canonicalize_name(owners.get(module, [module])[0]) for module in modules}
    assert foreign <= declared, "imported but not declared"
    assert declared <= foreign | INDIRECT, "declared but not imported"


def test_pins_meet_the_minimums(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, map(_uncommented, lines)))}
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    for need in map(Requirement, wanted):
        if need.name == "llmprune":  # its extra for GPUs: triton, which torch's own builds pin
            continue
        pin = pins[canonicalize_name(need.name)]
        (version,) = (clause.version for clause in pin.specifier)
        assert need.specifier.contains(version), f"{pin} does not meet {need}"


def _uncommented(line: str) -> str:
    return line.split("#")[0].strip()


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == llmprune.__version__


FORBIDDEN = {
    "a registry's host": r"\b(pypi\.org|pythonhosted\.org|download\.pytorch\.org)",
    # Ada is the user whom tests invent.
    "a path of one machine": r"(?<![\w.$}])/(((work|root|mnt|tmp)/\w)|((home|Users)/(?!ada)\w))",
}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git to tell which files are the repository's")
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _kept_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not found


def _kept_files() -> list[Path]:
    """The text files that git keeps or would keep."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    paths = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    return [path for path in paths if b"\0" not in path.read_bytes()[:8000]]
