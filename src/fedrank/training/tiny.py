"""Models small enough for tests and first steps, drawn at random, and their tokenizer of single bytes: no files."""

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


def network(name: str, task: str, classes: int) -> Any:
    """tiny-encoder, which only classifies, or tiny-decoder: three blocks of width 32, drawn by torch's present generator."""
    if name == "tiny-encoder":
        bert = transformers.BertConfig(
            vocab_size=260, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=256, num_labels=classes, pad_token_id=0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(bert)
    llama = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=256, num_labels=classes, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return (transformers.LlamaForCausalLM if task == "generate" else transformers.LlamaForSequenceClassification)(llama)


def tokenizer(task: str) -> transformers.PreTrainedTokenizerFast:
    """A token for every byte; rows to classify are framed by [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if task == "classify":
        raw.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip
