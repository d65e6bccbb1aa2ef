from transformers import BertConfig, Gemma2Config, JambaConfig, LlamaConfig, MambaConfig

from weighted_mtp.scoring.engines.architectures import architectures, is_causal_lm, is_recurrent


def test_recurrent_models():
    assert is_recurrent(MambaConfig())
    assert is_recurrent(JambaConfig())
    assert not is_recurrent(Gemma2Config())


def test_a_config_without_architectures_means_the_causal_lm_of_its_type():
    assert architectures(LlamaConfig()) == ["LlamaForCausalLM"]
    assert architectures(LlamaConfig(architectures=["Mine"])) == ["Mine"]
    assert is_causal_lm(LlamaConfig())
    assert not is_causal_lm(BertConfig(architectures=["BertForMaskedLM"]))
