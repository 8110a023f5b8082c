"""Small tokenizers of the kinds that released models have: what they do besides merging differs."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from smollm2.data.tokenizer import LLAMA_3_PATTERN

TEXTS = ["the cat sat on the mat, and 1234 dogs don't mind.\n\nNew   line\r\n ünïcode 漢字 \U0001f600"] * 20


def make_tokenizer(kind: str) -> Any:
    """Return a trained tokenizer: gpt2, qwen, llama2, llama3 or gemma."""
    made = Tokenizer(
        models.BPE(byte_fallback=kind in ("llama2", "gemma"), unk_token="<unk>" if kind == "llama2" else None)
    )
    specials = {"llama2": ["<unk>", "<s>", "</s>"], "gemma": ["<pad>", "<eos>", "<bos>"]}.get(
        kind, ["<|endoftext|>", "<|begin_of_text|>"]
    )
    if kind in ("llama2", "gemma"):
        steps = [normalizers.Prepend("▁")] if kind == "llama2" else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        specials += alphabet
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    else:
        made.normalizer = normalizers.NFC() if kind == "qwen" else None
        pattern = LLAMA_3_PATTERN.replace("{1,3}", "") if kind == "qwen" else LLAMA_3_PATTERN
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        made.pre_tokenizer = level if kind == "gpt2" else pre_tokenizers.Sequence([split, level])
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    made.train_from_iterator(TEXTS, trainer)
    if kind in ("llama2", "gemma"):
        made.add_tokens([AddedToken(name, special=False, normalized=False) for name in alphabet])
    begin = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "gemma": "<bos>"}.get(kind)
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
        )
    return made


KINDS = ("gpt2", "qwen", "llama2", "llama3", "gemma")
ENDS = {"llama2": "</s>", "gemma": "<eos>"}
