"""The model card: what the model is, how it was trained, how to use it, and how its export was verified."""

from collections.abc import Iterable, Mapping
from typing import Any

from smollm2.config.schema import ModelConfig
from smollm2.plan.arithmetic import count_parameters

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- smollm2-training
---

# {name}

A {architecture} language model of {parameters} parameters, trained from text with SmolLM2 Training. It is a base model: it
continues text and was not trained to follow instructions. Add what only its author knows: the text it was trained on, its
language, its licence, and what it should not be used for.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

If a text contains `<|endoftext|>` or another special token, transformers encodes it as that token; with
`split_special_tokens=True` it encodes the characters, as training did.

## Shape

{shape}
{training}
## Parity

This folder was loaded from the disk and compared with the checkpoint on {tokens} tokens of text; parity.json has every
number. Weights are stored as {dtype}: that changed the logits by at most {rounding:.2g} and the loss from
{exact_loss:.4f} to {rounded_loss:.4f}. Each reader then computed in float32:

{parity}
{unusable}
The tokenizer encodes and decodes {come_back} of {texts} hostile texts (control characters, emoji, combining accents,
unusual spaces) without a change.
"""


def write_card(config: ModelConfig, facts: Mapping[str, str], certificate: Mapping[str, Any], name: str) -> str:
    """Return the text of README.md for an exported folder."""
    architecture = "Llama (RMSNorm)" if config.norm == "rmsnorm" else "StableLM (LayerNorm)"
    rows = ((key, value) for key, value in config.model_dump(exclude={"init_from"}).items())
    training = f"\n## Training\n\n{write_table(('what', 'value'), facts.items())}\n" if facts else ""
    unusable = "".join(
        f"\n{reader['reader']} was not used to check this folder when it was made ({reader['reason']}).\n"
        for reader in certificate["unusable_readers"]
    )
    return CARD.format(
        name=name,
        architecture=architecture,
        parameters=f"{count_parameters(config):,}",
        shape=write_table(("key", "value"), rows),
        training=training,
        tokens=f"{certificate['text']['tokens']:,}",
        dtype=certificate["dtype"],
        rounding=certificate["rounding"]["max_logit_difference"],
        exact_loss=certificate["source"]["loss"],
        rounded_loss=certificate["rounding"]["loss"],
        parity=write_table(PARITY_COLUMNS, map(describe_reading, certificate["readers"])),
        unusable=unusable,
        come_back=certificate["tokenizer"]["texts_that_come_back"],
        texts=certificate["tokenizer"]["texts"],
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
