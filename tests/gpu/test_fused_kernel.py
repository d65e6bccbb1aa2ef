"""The Triton kernel of the loss on a GPU, in a rehearsal in Triton's interpreter, against the plain form on a CPU."""

from importlib.util import find_spec

import pytest
import torch
from chunk_cases import Results, Whole, extreme_chunks, fused_results, ordinary_chunks, run, run_whole
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

CHUNKS = ordinary_chunks() | extreme_chunks()
RELATIVE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Exponentials of GPUs are approximate."""


@pytest.fixture(scope="module")
def fused(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    """The results of the kernel, by the name of the case."""
    return fused_results(device.type, tmp_path_factory.mktemp("fused") / "results.pt")


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks(name: str, fused: dict[str, tuple[Tensor, ...]]) -> None:
    chunk, own = CHUNKS[name], Results(*fused[name])
    plain = run(chunk, fused=False)
    torch.testing.assert_close(own.losses, plain.losses, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(own.correct, plain.correct & ~plain.losses.isnan())
    error = RELATIVE_ERROR[chunk.logits.dtype]
    torch.testing.assert_close(own.gradient, plain.gradient, rtol=error, atol=1e-6, equal_nan=True)
    assert torch.equal(own.losses_alone.nan_to_num(), own.losses.nan_to_num())
    assert torch.equal(own.logits_alone.nan_to_num(), chunk.logits.nan_to_num())


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_of_several_chunks(
    matmul_dtype: torch.dtype, fused: dict[str, tuple[Tensor, ...]]
) -> None:
    error = 1e-5 if matmul_dtype == torch.float32 else 2e-2
    own = Whole(*fused[f"whole-{matmul_dtype}"])
    for of_fused, of_plain in zip(own, run_whole(matmul_dtype, fused=False), strict=True):
        torch.testing.assert_close(of_fused, of_plain, rtol=error, atol=error)
