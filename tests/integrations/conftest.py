"""A tiny causal LM with random weights and a tokenizer trained here: nothing comes from a hub."""

import os

import pytest
import torch

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):  # before transformers is imported
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = "the cat sat on a mat and saw one red dog run to its small house near old trees while birds sang".split()


def sentence(generator: torch.Generator, low: int, high: int) -> str:
    n = int(torch.randint(low, high, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """The folder of a saved Llama of 2 layers and a vocabulary of 400, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator([" ".join(WORDS)], tokenizers.trainers.WordLevelTrainer(special_tokens=specials))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        initializer_range=0.3,  # log-probabilities that differ
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)
