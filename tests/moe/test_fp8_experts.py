"""Experts in fp8: which modules the spec takes, under whose autocast, and that they are right.

Transformer Engine cannot exist here: a stand-in in plain torch (stand_ins.py) has the classes that
megatron-core derives its own from. Its grouped product rounds to fp8 where, and only where, its
autocast is open.
"""

from __future__ import annotations

from pathlib import Path

import torch
from stand_ins import run_beside, write

PYTORCH = """
import contextlib, torch
is_open = False

@contextlib.contextmanager
def fp8_autocast(enabled, fp8_recipe, fp8_group):
    global is_open
    assert fp8_recipe.fp8_format == "HYBRID"
    is_open = enabled
    yield
    is_open = False

class Nothing(torch.nn.Module): ...

class ops:
    Sequential = FusibleOperation = Nothing
LayerNorm = RMSNorm = Linear = LayerNormLinear = DotProductAttention = Nothing

class GroupedLinear(torch.nn.Module):
    num_fp8, num_other = 0, 0

    def __init__(self, num_gemms, in_features, out_features, bias, return_bias, init_method,
                 params_dtype, **_):
        super().__init__()
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        for e in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype)
            init_method(weight)
            self.register_parameter(f"weight{e}", torch.nn.Parameter(weight))

    def forward(self, x, m_splits, is_first_microbatch):
        assert not self.use_bias and all(m % 16 == 0 for m in m_splits)
        rounded = lambda t: t
        if is_open:
            def rounded(t):  # tensorwise scaling: the largest element becomes fp8's largest
                scale = 448.0 / t.detach().abs().max().clamp(min=1e-30)
                in_fp8 = (t.detach() * scale).to(torch.float8_e4m3fn).to(t.dtype) / scale
                return t + (in_fp8 - t).detach()
        GroupedLinear.num_fp8 += is_open
        GroupedLinear.num_other += not is_open
        parts = [rounded(rows) @ rounded(getattr(self, f"weight{e}")).t()
                 for e, rows in enumerate(x.split(m_splits))]
        return torch.cat(parts)

class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms):
        super().__init__()

    def forward(self, rows, m_splits):
        padded = [-(-m // 16) * 16 for m in m_splits]
        parts = [torch.nn.functional.pad(part, (0, 0, 0, p - m))
                 for part, m, p in zip(rows.split(m_splits), m_splits, padded)]
        return torch.cat(parts), padded

class Fp8Unpadding(Fp8Padding):
    def forward(self, rows, m_splits):
        padded = [-(-m // 16) * 16 for m in m_splits]
        return torch.cat([part[:m] for part, m in zip(rows.split(padded), m_splits)])
"""
TE = {
    "transformer_engine/__init__.py": (
        "__version__ = '2.2.0'\nfrom transformer_engine import common, pytorch\n"
    ),
    "transformer_engine/common/__init__.py": "from transformer_engine.common import recipe\n",
    "transformer_engine/common/recipe.py": """
class Format:
    E4M3, HYBRID = "E4M3", "HYBRID"
class DelayedScaling: ...
class Float8CurrentScaling:
    def __init__(self, fp8_format, fp8_dpa):
        self.fp8_format = fp8_format
""",
    "transformer_engine/pytorch/__init__.py": PYTORCH,
    "transformer_engine/pytorch/fp8.py": (
        "from transformer_engine.pytorch import fp8_autocast\nclass FP8GlobalStateManager: ...\n"
    ),
    "transformer_engine/pytorch/tensor/__init__.py": "class QuantizedTensor: ...\n",
    "transformer_engine/pytorch/float8_tensor.py": "class Float8Tensor: ...\n",
    "transformer_engine/pytorch/distributed.py": (
        "import torch\ndef __getattr__(name): return torch.nn.Identity\n"
    ),
    "transformer_engine_torch.py": "",
}
MODEL = """
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
install_cpu_compat()
import torch
from megatron.core import parallel_state, tensor_parallel
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
from megatron.core.models.gpt import GPTModel
from tiny_layer import transformer_config
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe import get_vqmoe_block_spec
vq = VQConfig(num_codes=8, execution="tokens", init="uniform")
found = {}
for fp8 in (None, "hybrid"):
    config = transformer_config(hidden_size=32, moe_ffn_hidden_size=64, add_bias_linear=False,
                                fp8=fp8, fp8_recipe="tensorwise", transformer_impl="local",
                                hidden_dropout=0.0, attention_dropout=0.0)
    model = GPTModel(config, get_vqmoe_block_spec(config, vq), 64, 16)
    experts = model.decoder.layers[0].mlp.experts
    if fp8 is None:
        state = {n: p for n, p in model.state_dict().items() if torch.is_tensor(p)}
    else:
        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                head, _, last = name.rpartition(".")
                if last in ("weight1", "weight2"):
                    for e, part in enumerate(value):
                        theirs[f"{head}.linear_fc{last[-1]}.weight{e}"].copy_(part)
                elif name in theirs:
                    theirs[name].copy_(value)
    tokens = torch.arange(16).repeat(4, 1) * 3 % 64
    loss = model(tokens, torch.arange(16).repeat(4, 1), None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if fp8 is None:
        of_experts = [gradients[n] for n in sorted(gradients) if ".experts." in n]
    else:
        of_experts = [
            torch.stack([gradients[f"decoder.layers.0.mlp.experts.linear_fc{i}.weight{e}"]
                         for e in range(4)]) for i in (1, 2)]
    found[str(fp8)] = {"experts": type(experts).__name__, "loss": loss.item(),
                       "gradients": [g.tolist() for g in of_experts]}
import transformer_engine.pytorch as te
found["products"] = [te.GroupedLinear.num_fp8, te.GroupedLinear.num_other]
"""


def test_experts_run_under_the_autocast_and_stay_near_those_in_fp32(tmp_path: Path) -> None:
    found = run_beside(write(tmp_path, TE), MODEL)
    plain, fp8 = found["None"], found["hybrid"]
    assert (plain["experts"], fp8["experts"]) == ("GroupedExperts", "TEGroupedMLP")
    assert found["products"] == [2, 0]  # fc1 and fc2, both under the autocast
    assert fp8["loss"] != plain["loss"]
    torch.testing.assert_close(fp8["loss"], plain["loss"], rtol=2e-2, atol=0.0)
    for ours, theirs in zip(plain["gradients"], fp8["gradients"], strict=True):
        ours, theirs = torch.tensor(ours), torch.tensor(theirs)
        assert float((ours - theirs).norm() / ours.norm()) < 0.15  # e4m3 has 3 bits
