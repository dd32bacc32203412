"""docker/install_dependencies.py: in real environments, with real pip and small local wheels."""

import importlib.util
import os
import re
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "docker" / "install_dependencies.py"
SPEC = importlib.util.spec_from_file_location("install_dependencies", SCRIPT)
install_dependencies = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(install_dependencies)


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """Write a wheel with one module of that name and, if given, one requirement."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def image(tmp_path):
    """An environment as in the image: pip from elsewhere, packages only from local wheels."""
    (tmp_path / "wheels").mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(tmp_path / "wheels", "torch", version)
    write_wheel(tmp_path / "wheels", "easy", "1.0", "torch>=1")
    write_wheel(tmp_path / "wheels", "greedy", "1.0", "torch>=2")
    venv.create(tmp_path / "env", with_pip=False)
    (tmp_path / "pip").mkdir()
    pip = Path(importlib.util.find_spec("pip").origin).parent
    (tmp_path / "pip" / "pip").symlink_to(pip)
    return tmp_path


def write_setup(path: Path, torch: list[str], others: list[str], extra: str = "") -> None:
    """Write a setup.cfg as ours: ``torch`` in its extra, ``extra`` in one that ``all`` names."""
    indented = {
        name: "".join(f"\n    {line}" for line in lines)
        for name, lines in (("torch", torch), ("others", others))
    }
    path.write_text(
        f"[options]\ninstall_requires ={indented['others']}\n[options.extras_require]\n"
        f"torch ={indented['torch']}\nplots =\n    {extra}\nall =\n    ours[plots]\n",
        encoding="utf-8",
    )


def install(image: Path, requirements: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in the environment, for a setup.cfg with these requirements, torch first."""
    torch, *others = requirements.split()
    write_setup(image / "setup.cfg", [torch], others)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {
        "PYTHONPATH": str(image / "pip"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(image / "wheels"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    return subprocess.run(
        [
            image / "env/bin/python",
            SCRIPT,
            image / "setup.cfg",
            image / "constraints.txt",
            *arguments,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def put_into_base(image: Path, version: str) -> Path:
    """Unpack that torch into the environment, as a base image would bring it."""
    (site,) = (image / "env/lib").glob("python*/site-packages")
    with zipfile.ZipFile(image / "wheels" / f"torch-{version}-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    return site


def test_reads_the_projects_own_requirements():
    torch, others = install_dependencies.read_requirements(REPOSITORY / "setup.cfg")
    assert torch.startswith("torch>=")
    names = {re.match(r"[\w-]+", one)[0] for one in others}
    assert {"megatron-core", "mlflow", "SQLAlchemy", "matplotlib", "sentencepiece"} <= names
    assert "torch" not in names and not [one for one in others if one.startswith(("#", "vqmoe"))]


@pytest.mark.parametrize(
    ("torch", "others", "extra"),
    [
        ([], ["numpy"], ""),
        (["torch==2", "torch==3"], ["numpy"], ""),
        (["torch>=2"], ["numpy", "torch>=2"], ""),
        (["torch>=2"], ["numpy"], "torch"),
    ],
)
def test_refuses_a_torch_that_another_requirement_asks_for(tmp_path, torch, others, extra):
    write_setup(tmp_path / "setup.cfg", torch, others, extra)
    with pytest.raises(ValueError, match="must require torch by its extra torch alone, once"):
        install_dependencies.read_requirements(tmp_path / "setup.cfg")


def test_a_requirement_that_only_begins_with_torch_is_another(tmp_path):
    write_setup(tmp_path / "setup.cfg", ["torch>=2"], ["torch-geometric"], "torchvision")
    found = install_dependencies.read_requirements(tmp_path / "setup.cfg")
    assert found == ("torch>=2", ["torch-geometric", "torchvision"])


def test_finds_the_torch_of_this_interpreter():
    import torch

    assert install_dependencies.find_torch() == (torch.__version__, torch.__file__)


def test_a_base_without_torch_gets_one_of_the_extra(image):
    done = install(image, "torch==1.0 easy", "--also", "greedy>=0")
    assert done.returncode != 0  # greedy wants torch 2: nothing may give way
    done = install(image, "torch==1.0 easy")
    assert done.returncode == 0, done.stderr
    assert (image / "constraints.txt").read_text() == "torch==1.0\n"


def test_the_bases_torch_stays_whatever_the_extra_says(image):
    site = put_into_base(image, "1.0")
    done = install(image, "torch==2.0 easy")
    assert done.returncode == 0, done.stderr
    assert "torch 1.0: the base image's, kept" in done.stdout
    assert (image / "constraints.txt").read_text() == "torch==1.0\n"
    assert (site / "easy").is_dir() and "'1.0'" in (site / "torch/__init__.py").read_text()


def test_a_dependency_that_wants_another_torch_fails_the_build(image):
    site = put_into_base(image, "1.0")
    done = install(image, "torch==2.0 easy greedy")
    assert done.returncode != 0 and "torch==1.0" in done.stdout + done.stderr
    assert "'1.0'" in (site / "torch/__init__.py").read_text()
    assert not (site / "easy").exists()  # pip resolves before it installs anything
