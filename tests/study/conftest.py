"""A small study file to change, a small corpus, and the command line in this process."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from vqmoe_megatron import cli

ROOT = Path(__file__).resolve().parents[2]
PARITY = str(ROOT / "recipes" / "parity.yaml")
SHAPES = [  # of recipes/parity.yaml, smaller
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "train.global_batch_size=4",
    "train.train_iters=8",
    "train.eval_iters=0",
    "optimizer.lr_warmup_iters=0",
]


@pytest.fixture(scope="session")
def study_corpus(tmp_path_factory) -> Path:
    """One file of the interpreter's library as a byte corpus."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("studies") / "corpus"
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    prepare_corpus("text", out, [text], "byte", None, False, False)
    return out


@pytest.fixture
def write_study(tmp_path, study_corpus):
    """``write_study(grid=..., rule=...)`` writes a study file; unset parts are a 2 x 2 grid."""

    def write(name: str = "tiny.yaml", **changes) -> Path:
        study = {
            "name": "tiny",
            "output_dir": str(tmp_path / "study"),
            "recipe": PARITY,
            "rule": "equal_tokens",
        }
        content = {
            "study": study | changes.pop("study", {}),
            "set": [f"data.path={study_corpus}", *SHAPES, "vq.num_codes=2 * experts"],
            "grid": {
                "experts": [4, 8],
                "router": {"smoe": ["vq.path=continuous"], "vq": ["vq.path=dual"]},
            },
        }
        content["set"] += changes.pop("more", [])
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def vqmoe(monkeypatch, capsys):
    """Run the command in this process; return its exit code and all it printed."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vqmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out + shown.err

    return run
