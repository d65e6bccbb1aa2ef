import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.engines.vllm_arguments import check_engine_args


@pytest.mark.usefixtures("vllm_installed")
def test_engine_arguments_are_vllms_own_and_not_ours():
    check_engine_args({"max_num_batched_tokens": 4096, "quantization": "fp8"})
    with pytest.raises(
        UserError, match=r"--engine_args\.max_num_batchd_tokens: .* did you mean max_num_batched_tokens"
    ):
        check_engine_args({"max_num_batchd_tokens": 4096})
    with pytest.raises(UserError, match=r"--engine_args\.dtype: is set by wmtp; use --dtype"):
        check_engine_args({"dtype": "float16"})
    with pytest.raises(UserError, match=r"--engine_args\.modle: vLLM .* has no such argument; see"):
        check_engine_args({"modle": "llama"})
    with pytest.raises(UserError, match=r"--engine_args\.load_format dummy: would score with random weights"):
        check_engine_args({"load_format": "dummy"})
