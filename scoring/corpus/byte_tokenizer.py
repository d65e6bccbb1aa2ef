"""The tokenizer of byte-level models: each byte of UTF-8 is a token (arXiv 2404.19737, section 3.3)."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS, EOS = "<bos>", "<eos>"


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 258 ids: bytes are their own ids, BOS is 256 and EOS is 257. By default it adds BOS.

    It is an ordinary fast tokenizer: byte-level BPE without merges.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocabulary, [], cache_capacity=0))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (BOS, EOS)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, len(vocabulary))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, name_or_path="bytes")
