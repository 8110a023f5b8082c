"""A tokenizer with a chat template: bytes, the three special tokens of ChatML, and the files that came with them."""

import json

from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TEXT, START_OF_TURN, END_OF_TURN = 256, 257, 258


def chat_tokenizer(template: str = CHATML) -> Tokenizer:
    """Return it; its files name another begin of text than its end, and two ids at which generation ends."""
    backend = load_tokenizer("bytes").backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": template,
    }
    generation = {"bos_token_id": START_OF_TURN, "eos_token_id": [END_OF_TEXT, END_OF_TURN]}
    files = {
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }
    return tokenizer_from_text(backend.to_str(), END_OF_TEXT, files)
