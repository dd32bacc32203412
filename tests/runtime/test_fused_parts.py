"""Which fused kernels a run uses: judged by what imports, switched one by one, said with reasons.

Apex and Transformer Engine cannot exist here, so packages of theirs are stand-ins (stand_ins.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import PARITY
from stand_ins import APEX, run_beside, write

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.runtime.fused_parts import PLAIN, choose_parts, import_problem

CHOOSE = """
from dataclasses import asdict
from pathlib import Path
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.runtime.fused_parts import choose_parts
recipe, device, *overrides = given
try:
    found = asdict(choose_parts(load_recipe(Path(recipe), overrides), device))
except ValueError as error:
    found = str(error)
"""
SWITCHES = (
    "model.transformer_impl=transformer_engine",
    "model.fused_layer_norm=true",
    "model.gradient_accumulation_fusion=true",
    "optimizer.fused_adam=true",
    "model.fp8=hybrid",
)
TE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": (
        "class Linear: ...\nclass LayerNormLinear: ...\nclass DotProductAttention: ...\n"
        "class GroupedLinear: ...\ndef fp8_autocast(): ...\n"
    ),
    "transformer_engine/pytorch/optimizers.py": "class FusedAdam: ...\nclass FusedSGD: ...\n",
    "transformer_engine_torch.py": "",
}


def chosen(folder: Path | None, *overrides: str, device: str = "cuda"):  # noqa: ANN201
    """What ``choose_parts`` settles beside the packages in ``folder``, or its error."""
    return run_beside(folder, CHOOSE, str(PARITY), device, *overrides)


def without(files: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in files.items() if name not in names}


def test_on_the_cpu_nothing_is_used_and_nothing_is_said() -> None:
    assert choose_parts(load_recipe(PARITY, []), "cpu") == PLAIN


def test_on_cuda_every_part_that_is_missing_is_told_with_its_reason() -> None:
    parts = choose_parts(load_recipe(PARITY, []), "cuda")
    assert replace(parts, fallbacks=()) == PLAIN
    words = ("transformer_engine is", "fused_layer_norm_cuda is", "fused_weight_grad", "amp_C is")
    assert len(parts.fallbacks) == len(words)
    for line, word in zip(parts.fallbacks, words, strict=True):
        assert word in line and "not installed" in line


def test_what_is_switched_off_is_not_missed() -> None:
    off = ["model.transformer_impl=local", "model.fused_layer_norm=false"]
    off += ["model.gradient_accumulation_fusion=false", "optimizer.fused_adam=false"]
    assert choose_parts(load_recipe(PARITY, off), "cuda") == PLAIN


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    ("device", "reason"), [("cpu", "its kernels need a CUDA device"), ("cuda", "is not installed")]
)
def test_what_is_asked_for_and_not_there_is_refused(switch: str, device: str, reason: str) -> None:
    execution = ["vq.execution=tokens"]
    with pytest.raises(ValueError, match=f"{switch} cannot be had here .device={device}.*{reason}"):
        choose_parts(load_recipe(PARITY, [switch, *execution]), device)


@pytest.mark.parametrize(
    ("switch", "field"),
    [
        ("model.fused_layer_norm", "apex_norm"),
        ("model.gradient_accumulation_fusion", "gradient_accumulation_fusion"),
        ("optimizer.fused_adam", "fused_adam"),
    ],
)
def test_apexs_parts_are_used_where_they_import_and_switched_one_by_one(
    switch: str, field: str, tmp_path: Path
) -> None:
    write(tmp_path, APEX)
    everything = chosen(tmp_path)
    assert everything["apex_norm"] and everything["fused_adam"]
    assert everything["gradient_accumulation_fusion"]
    (line,) = everything["fallbacks"]
    assert line == "layers are Megatron's own: transformer_engine is not installed"
    assert chosen(tmp_path, f"{switch}=true") == everything
    assert chosen(tmp_path, f"{switch}=false") == {**everything, field: False}


def test_transformer_engine_is_used_where_it_imports(tmp_path: Path) -> None:
    write(tmp_path, TE)
    parts = chosen(tmp_path)
    assert parts["transformer_impl"] == "transformer_engine" and parts["fused_adam"]
    assert not parts["apex_norm"]  # its layers have their own
    assert [line.partition(":")[0] for line in parts["fallbacks"]] == [
        "weight gradients are added up by a pass of their own"
    ]
    local = chosen(tmp_path, "model.transformer_impl=local")
    assert local["transformer_impl"] == "local" and local["fused_adam"]
    assert "whose norms are parts of its linear layers" in chosen(
        tmp_path, "model.fused_layer_norm=false"
    )
    fp8 = ["model.fp8=e4m3", "vq.execution=tokens"]
    assert chosen(tmp_path, *fp8) == parts
    assert "needs Transformer Engine's layers" in chosen(
        tmp_path, *fp8, "model.transformer_impl=local"
    )


def test_apexs_norm_is_a_layer_norm_only(tmp_path: Path) -> None:
    write(tmp_path, APEX)
    rms = "model.normalization=RMSNorm"
    parts = chosen(tmp_path, rms)
    assert not parts["apex_norm"]
    assert any("FusedLayerNorm is no RMSNorm" in line for line in parts["fallbacks"])
    assert "FusedLayerNorm is no RMSNorm" in chosen(tmp_path, rms, "model.fused_layer_norm=true")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (without(TE, "transformer_engine_torch.py"), "transformer_engine_torch is not installed"),
        (
            {**TE, "transformer_engine/pytorch/__init__.py": "raise ImportError('libcudart')"},
            "transformer_engine.pytorch does not import: ImportError: libcudart",
        ),
        (
            {**TE, "transformer_engine/pytorch/__init__.py": ""},
            "transformer_engine/pytorch/__init__.py has no LayerNormLinear",
        ),
    ],
)
def test_a_package_that_lacks_its_kernel_is_named_with_the_reason(
    files: dict, reason: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    parts = chosen(tmp_path)
    assert parts["transformer_impl"] == "local"
    assert reason in parts["fallbacks"][0]
    assert reason in chosen(tmp_path, "model.transformer_impl=transformer_engine")


def test_folders_without_code_change_nothing(tmp_path: Path) -> None:
    for name in ("apex", "transformer_engine"):
        (tmp_path / name).mkdir()
    beside, alone = chosen(tmp_path), chosen(None)
    assert len(beside.pop("fallbacks")) == len(alone.pop("fallbacks")) and beside == alone
    told = chosen(tmp_path, "model.transformer_impl=transformer_engine")
    assert f"transformer_engine at {tmp_path}/transformer_engine is a folder without code" in told


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**APEX, "amp_C.py": ""}, "takes Apex's FusedAdam, since it imports.*has no multi_tensor"),
        (
            {**TE, "transformer_engine/pytorch/__init__.py": "raise OSError('libcudart.so.12')"},
            "megatron-core cannot be imported beside .*OSError: libcudart.so.12",
        ),
    ],
)
def test_what_megatron_would_crash_by_is_refused_before(
    files: dict, message: str, device: str, tmp_path: Path
) -> None:
    """Megatron catches an ImportError and nothing else, and looks for FusedAdam, not its kernel."""
    if "amp_C.py" in files:  # imported without its kernels, as Apex's own is
        files["apex/optimizers/__init__.py"] = "class FusedAdam: ...\nclass FusedSGD: ...\n"
    write(tmp_path, files)
    told = chosen(tmp_path, device=device)
    assert isinstance(told, str)
    assert re.search(message, told), told


def test_a_missing_name_is_told_with_its_place() -> None:
    assert import_problem("json", "loads") is None
    problem = import_problem("json", "no_such_kernel")
    assert problem.reason.endswith("json/__init__.py has no no_such_kernel")
