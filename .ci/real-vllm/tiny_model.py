"""Write a tiny random Llama with tokenizer and chat template: tiny_model.py DIR [SEED].

Runs in the environment that `install` builds. The same seed gives the same weights, so that a
greedy answer can be compared between two starts; different seeds tell two models apart.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_TOKENS = 2048
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = """
The house was quiet and the world was calm, the reader became the book, and summer night was like
the conscious being of the book. Three models share one card; one of them is awake and two are
asleep. A request arrives, waits for its turn, and is answered by the model that it named. Words
follow words, numbers follow numbers: one two three four five six seven eight nine ten hundred.
"""


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
    )


def model(words: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.2,  # ten times the usual: greedy answers wander instead of looping
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():  # a zero row is never the most likely one: plain words, no early end
        for token in range(len(words)):
            text = words.decode([token])
            if not (text.isascii() and text.isprintable()) or token in words.all_special_ids:
                made.lm_head.weight[token] = 0.0
    return made.to(torch.bfloat16)


def main() -> None:
    folder = Path(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    words = tokenizer()
    words.save_pretrained(folder)
    model(words, seed).save_pretrained(folder)
    print(folder.resolve())


if __name__ == "__main__":
    main()
