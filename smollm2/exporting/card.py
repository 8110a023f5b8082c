"""The model card: what the model is, how it was trained, how to use it, and the certificate of its export."""

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
continues text, and was not taught to follow instructions. Fill in what only its maker knows: the text it was trained on,
its language, its licence, and what it should not be used for.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

Wherever `<|endoftext|>` or another special token stands in a text, transformers reads the token and not the characters;
`split_special_tokens=True` reads the characters, as the training did.

## Shape

{shape}
{training}
## Parity

This folder was loaded again from the disk and compared with the checkpoint on {tokens} tokens of English; parity.json has
every number. Weights are stored as {dtype}: that changed the logits by at most {rounding:.2g} and the loss from
{exact_loss:.4f} to {rounded_loss:.4f}. Each reader then computed in float32:

{parity}
{absent}
{come_back} of {texts} hostile texts (control characters, emoji, combining accents, unusual spaces) come back from the
tokenizer as they were.
"""

ABSENT = "transformers was not installed where this folder was made, and has not read it there."


def write_card(config: ModelConfig, facts: Mapping[str, str], certificate: Mapping[str, Any], name: str) -> str:
    """README.md of an exported folder."""
    architecture = "Llama (RMSNorm)" if config.norm == "rmsnorm" else "StableLM (LayerNorm)"
    rows = ((key, value) for key, value in config.model_dump().items())
    training = f"\n## Training\n\n{write_table(('what', 'value'), facts.items())}\n" if facts else ""
    absent = "" if len(certificate["readers"]) > 1 else f"\n{ABSENT}\n"
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
        absent=absent,
        come_back=certificate["tokenizer"]["texts_that_come_back"],
        texts=certificate["tokenizer"]["texts"],
    )


PARITY_COLUMNS = ("reader", "largest difference of logits", "same likeliest token", "loss", "greedy tokens", "texts")


def describe_reading(reading: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the table of parity."""
    return (
        reading["reader"],
        f"{reading['max_logit_difference']:.2g}",
        f"{reading['argmax_agreement']:.1%}",
        f"{reading['loss']:.4f}",
        f"{reading['greedy_equal']} of {reading['greedy_tokens']}",
        f"{reading['texts_equal']} of {reading['texts']}",
    )


def write_table(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
