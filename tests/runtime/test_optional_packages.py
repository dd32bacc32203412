"""Without any of the optional packages everything else works, and what does not says so.

Here a finder that finds none of them hides them from a subprocess; ``make test-versions``
runs these tests where they are not installed at all.
"""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_megatron.runtime.optional_packages import OPTIONAL_PACKAGES, missing, require

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
# What they bring besides, which must not be needed without them either.
HIDDEN = (
    "deepspeed",
    "mlflow",
    "matplotlib",
    "sentencepiece",
    "requests",
    "sqlalchemy",
    "tensorboard",
    "tokenizers",
    "transformers",
    "wandb",
    "scipy",
    "PIL",
    "sklearn",
)
# A finder that says "not found" would let the next one find it.
HIDE = f"""
import importlib.machinery, sys

class Hide:
    def find_spec(name, path=None, target=None, real=importlib.machinery.PathFinder.find_spec):
        return None if name.partition(".")[0] in {HIDDEN} else real(name, path, target)

sys.meta_path[:] = [
    Hide if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
"""
RUN = HIDE + "from vqmoe_megatron.cli import main\nmain()\n"
SMALL = [
    "model.num_layers=2",
    "code_memory.layers=[1]",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "parallel.expert_model_parallel_size=1",
    "train.train_iters=2",
    "train.log_interval=1",
    "optimizer.lr_warmup_iters=1",
    "train.eval_iters=0",
]


def vqmoe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(small_corpus, tmp_path_factory) -> tuple[Path, str]:
    """A run without the packages: its directory, and what it printed."""
    folder = tmp_path_factory.mktemp("untracked")
    places = [f"data.path={small_corpus}", f"train.output_dir={folder / 'runs' / 'one'}"]
    done = vqmoe("pretrain", QUICKSTART, "--nproc", "1", *places, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "one", done.stdout


def test_the_extras_of_setup_cfg_are_the_same() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    others = {"matplotlib": "plots", "scipy": "analysis", "transformers": "hf"}
    others |= {"PIL": "images", "sklearn": "images"}
    for package in OPTIONAL_PACKAGES:
        extra = others.get(package, package)
        assert OPTIONAL_PACKAGES[package].requirement in extras[extra].split("\n")
        assert package not in parser["options"]["install_requires"].lower()


def test_missing_says_what_to_install_and_require_for_what(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("mlflow") == "mlflow is not installed (pip install 'mlflow>=3.5,<4')"
    with pytest.raises(ValueError, match="a plot is not possible: matplotlib is not installed"):
        require("matplotlib", "a plot")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert missing("mlflow") is None
    require("json", "a plot")  # one that is found, and imports


def test_a_run_trains_untracked_without_plots_and_says_each_once(trained) -> None:
    run_dir, printed = trained
    assert printed.count("not tracked: mlflow is not installed (pip install 'mlflow") == 1
    assert printed.count("no plots: matplotlib is not installed (pip install 'matplotlib") == 1
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run_dir / "status.json").read_text())["state"] == "completed"
    assert (run_dir / "checkpoints" / "iter_0000002" / "common.pt").is_file()
    assert not (run_dir / "plots").exists() and not (run_dir.parent / "mlflow.db").exists()


def test_its_record_is_kept_for_a_later_sync(trained) -> None:
    run_dir, _ = trained
    record = json.loads((run_dir / "mlflow.json").read_text())
    assert record["is_completed"] and record["num_attempts"] == 1 and record["runs"] == {}
    assert record["tags"]["iteration"] == "2"
    pytest.importorskip("mlflow", reason="the sync itself needs MLflow")
    done = subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", "mlflow-sync", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (run_id,) = json.loads((run_dir / "mlflow.json").read_text())["runs"].values()
    assert run_id in done.stdout and "FINISHED" in done.stdout


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["prepare", "stdlib", "--tokenizer", "sentencepiece", "--out", "new"], "sentencepiece"),
        (["mlflow-sync", "."], "mlflow"),
        (["study", "report", "study.yaml"], "matplotlib"),
        (["bench", "layer", "--plot", "new.png"], "matplotlib"),
        (["generate", ".", "def"], "transformers"),
        (["analyze", "."], "matplotlib"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_what_needs_one_is_refused_in_one_line_before_anything_is_written(
    command, package, tmp_path
) -> None:
    done = vqmoe(*command, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: ")
    assert f"{package} is not installed (pip install '{package}" in line
    assert list(tmp_path.iterdir()) == []


def test_every_module_but_those_that_are_about_one_imports_without_them() -> None:
    needs_one = ("analysis.plots", "analysis.analyze", "analysis.part", "study.report.")
    needs_one += ("analysis.consistency", "hf.modeling_vqmoe", "engines.deepspeed.expert_groups")
    needs_one += ("engines.deepspeed.optimizer", "engines.deepspeed.parameter_groups")
    program = HIDE + (
        "import importlib, pkgutil, vqmoe_megatron\n"
        "for module in pkgutil.walk_packages(vqmoe_megatron.__path__, 'vqmoe_megatron.'):\n"
        f"    if not any(name in module.name for name in {needs_one}):\n"
        "        if not module.name.endswith('__main__'):\n"
        "            importlib.import_module(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_package_that_raises_on_import_is_a_sentence(tmp_path, monkeypatch) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text("raise TypeError('half installed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"mlflow cannot be imported \(TypeError: half installed"):
        require("mlflow", "syncing")


def test_a_package_is_asked_for_by_the_name_that_pip_knows() -> None:
    names = {module: package.distribution for module, package in OPTIONAL_PACKAGES.items()}
    assert names["PIL"] == "pillow" and names["sklearn"] == "scikit-learn"
    assert names["mlflow"] == "mlflow"
