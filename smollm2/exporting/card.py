"""The model card: what the model is, how it was trained, how to use it, and how its export was verified."""

from collections.abc import Iterable, Mapping
from typing import Any

from smollm2.exporting.source import Source
from smollm2.plan.arithmetic import count_parameters

CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- smollm2-training
---

# {name}

A {architecture} language model of {parameters} parameters, trained from text with SmolLM2 Training. {purpose}
Add what only its author knows: the text it was trained on, its language, its licence, and what it should not be used for.

{use}

## Shape

{shape}
{training}
## Parity

This folder was loaded from the disk and compared with the checkpoint on {tokens} tokens of text; parity.json has every
number. Weights are stored as {dtype}: that changed the logits by at most {rounding:.2g} and the loss from
{exact_loss:.4f} to {rounded_loss:.4f}. {check}

{parity}
{unusable}
The tokenizer encodes and decodes {come_back} of {texts} hostile texts (control characters, emoji, combining accents,
unusual spaces) without a change.
"""

HUGGING_FACE_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

If a text contains `<|endoftext|>` or another special token, transformers encodes it as that token; with
`split_special_tokens=True` it encodes the characters, as training did."""

GGUF_USE = """## Use

```
ollama create {name} -f Modelfile && ollama run {name}
llama-cli -m {file}
```"""

BASE = "It is a base model: it\ncontinues text and was not trained to follow instructions."
CHAT = "Its chat template\nsays how to write a conversation."


def write_card(source: Source, certificate: Mapping[str, Any], name: str) -> str:
    """Return the text of README.md for an exported folder."""
    config = source.model.config
    architecture = "Llama (RMSNorm)" if config.norm == "rmsnorm" else "StableLM (LayerNorm)"
    rows = ((key, value) for key, value in config.model_dump(exclude={"init_from"}).items())
    facts = write_table(("what", "value"), source.facts.items())
    unusable = "".join(
        f"\n{reader['reader']} was not used to check this folder when it was made ({reader['reason']}).\n"
        for reader in certificate["unusable_readers"]
    )
    file = certificate.get("file")
    readers = certificate["readers"]
    return CARD.format(
        library="gguf" if file else "transformers",
        name=name,
        architecture=architecture,
        parameters=f"{count_parameters(config):,}",
        purpose=BASE if source.tokenizer.chat_template is None else CHAT,
        use=GGUF_USE.format(name=name, file=file["name"]) if file else HUGGING_FACE_USE.format(name=name),
        shape=write_table(("key", "value"), rows),
        training=f"\n## Training\n\n{facts}\n" if source.facts else "",
        tokens=f"{certificate['text']['tokens']:,}",
        dtype=certificate["dtype"],
        rounding=certificate["rounding"]["max_logit_difference"],
        exact_loss=certificate["source"]["loss"],
        rounded_loss=certificate["rounding"]["loss"],
        check=describe_check(certificate),
        parity=write_table(PARITY_COLUMNS, map(describe_reading, readers)) if readers else "",
        unusable=unusable,
        come_back=certificate["tokenizer"]["texts_that_come_back"],
        texts=certificate["tokenizer"]["texts"],
    )


def describe_check(certificate: Mapping[str, Any]) -> str:
    """Return the sentence before the table of readers."""
    file = certificate.get("file")
    if not file:
        return "Each reader then computed in float32:"
    return (
        f"{file['reader']} read the file back: its {file['keys']} keys, {file['tensors']} tensors\n"
        f"and {file['tokens']:,} tokens are the checkpoint's."
    )


PARITY_COLUMNS = ("reader", "largest difference of logits", "same most likely token", "loss", "greedy tokens", "texts")


def describe_reading(reading: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one row of the parity table."""
    return (
        reading["reader"],
        f"{reading['max_logit_difference']:.2g}",
        f"{reading['argmax_agreement']:.1%}",
        f"{reading['loss']:.4f}",
        f"{reading['greedy_equal']} of {reading['greedy_tokens']}",
        f"{reading['texts_equal']} of {reading['texts']}",
    )


def write_table(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """Return a Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
