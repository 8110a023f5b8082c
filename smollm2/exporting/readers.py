"""The libraries that load an exported folder to verify it: this package, and transformers if it is usable here.

There are two because this package could make the same mistake in reading as in writing. If transformers fails, it is
tested on a small model that it wrote itself. If it cannot load that either, it is reported as unusable here, and the
folder is not reported as wrong.
"""

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

import smollm2
from smollm2.data.tokenizer import tokenizer_from_text
from smollm2.errors import ConfigError, Smollm2Error
from smollm2.inference.loading import load_model
from smollm2.inference.weight_files import open_weights
from smollm2.model.cache import KeyValueCache
from smollm2.model.loss import next_token_loss
from smollm2.model.transformer import SmolLM2

CONTINUATION, GENERATED = 64, 8
"""Greedy tokens that are compared, and how many of them transformers generates one by one."""


@dataclass(frozen=True)
class Tolerance:
    """What a reader may differ by; logits are relative to the largest one or to 1, the loss to itself or to 1."""

    logits: float = 1e-4
    """float32 sums in another order differ by up to 2e-5, a wrong rotary base by 6.7 (measured on a 135M model)."""
    tie: float = 1e-5
    """Rounding may swap the order of two logits this close."""
    loss: float = 1e-5
    argmax_agreement: float = 0.999


FLOAT32 = Tolerance()

HOSTILE = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\t\r\n",
    "don't we'll I'VE 3.14159 1,000,000",
    "naïve café Ångström",
    "e\u0301 a\u0308",
    "Привет, 世界, مرحبا, नमस्ते, ไทย",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\x00\x01\x1f\x7f\x80",
    "\ufeffbyte order mark",
    "\u3000\u00a0\u2028\u200b",
    "<|endoftext|> <s> </s> [SEP] <|im_start|>",
    "def f(x):\n    return x  # ünïcode",
    "a" * 300,
    " " * 300,
    "\U0010fffd\U00040000",
)
"""Texts on which tokenizers tend to differ."""


@dataclass
class Reading:
    """What one reader found in the folder, compared with the source."""

    reader: str
    max_logit_difference: float = math.nan
    argmax_agreement: float = math.nan
    loss: float = math.nan
    greedy_tokens: int = 0
    greedy_equal: int = 0
    texts: int = 0
    texts_equal: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class UnusableReader:
    """A reader that cannot be used on this machine, and the reason."""

    reader: str
    reason: str


@dataclass(frozen=True)
class Reference:
    """What the source computes, with its weights rounded to the dtype of the folder."""

    windows: Tensor  # (N, T) int64
    logits: Tensor  # (N, T, V) float32
    loss: float
    prompt: list[int]
    continuation: list[int]
    gaps: list[float]  # between the two highest logits, at each token of the continuation
    ids: list[list[int]]  # of each hostile text
    decoded: list[str]
    chat_template: str | None
    stops: frozenset[int]


@torch.no_grad()
def run_model(model: SmolLM2, windows: Tensor) -> tuple[Tensor, float]:
    """Return the logits (N, T, V) and the mean loss per token."""
    hidden = model.model(windows)
    loss, count = next_token_loss(hidden[:, :-1], model.lm_head.weight, windows[:, 1:])
    return model.lm_head(hidden), (loss / count).item()


@torch.no_grad()
def continue_greedily(model: SmolLM2, prompt: list[int], stops: Collection[int]) -> tuple[list[int], list[float]]:
    """Return the greedy continuation, until a stop or the end of the context, and each token's lead over the runner-up."""
    c = model.config
    room = min(CONTINUATION, c.max_position_embeddings - len(prompt))
    shape = (c.num_hidden_layers, 1, c.num_key_value_heads, len(prompt) + room, c.head_dim)
    cache = KeyValueCache(torch.tensor([0]), shape, torch.float32, c.max_position_embeddings)
    ids: list[int] = []
    gaps: list[float] = []
    while len(ids) < room and not set(ids[-1:]) & set(stops):
        logits = model.lm_head(model.model.extend(torch.tensor([ids[-1:] or prompt]), cache)[0, -1])
        first, second = logits.topk(2).values.tolist()
        ids.append(int(logits.argmax()))
        gaps.append(first - second)
    return ids, gaps


@torch.no_grad()
def predict_along(model: SmolLM2, prompt: list[int], continuation: list[int]) -> list[int]:
    """Return the most likely token at each place of a continuation: equal to it if it is the greedy one."""
    hidden = model.model(torch.tensor([prompt + continuation]))[0, len(prompt) - 1 : -1]
    found: list[int] = model.lm_head(hidden).argmax(-1).tolist()
    return found


def find_difference(model: SmolLM2, folder: Path) -> str:
    """Return the name of a weight that is not bit-identical in a folder's files; empty if all are."""
    stored = open_weights(folder)
    weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    differ = (name for name, w in weights if name not in stored or not torch.equal(stored[name].float(), w))
    return next(differ, "")


def read_with_smollm2(folder: Path, reference: Reference) -> Reading:
    """Load the folder with `load_model`; its weights must be those in the files, which `certify` compares with the source's."""
    reading = Reading(f"smollm2 {smollm2.__version__}")
    try:
        model, tokenizer = load_model(folder)
    except Smollm2Error as error:
        reading.problems.append(f"does not load ({error})")
        return reading
    if name := find_difference(model, folder):
        reading.problems.append(f"{name} differs from the file's")
    compare_logits(reading, run_model(model, reference.windows)[0], reference)
    compare_greedy(reading, predict_along(model, reference.prompt, reference.continuation), reference)
    compare_tokenizer(reading, tokenizer.encode, tokenizer.decode, reference)
    if tokenizer.chat_template != reference.chat_template:
        reading.problems.append("the chat template is missing or differs from the source's")
    if tokenizer.stops != reference.stops:
        found, wanted = sorted(tokenizer.stops), sorted(reference.stops)
        reading.problems.append(f"generation stops at {found} and should stop at {wanted}")
    return reading


def read_with_transformers(folder: Path, reference: Reference) -> Reading | UnusableReader:
    """Load the folder with transformers, or return why transformers cannot be used here."""
    try:
        import transformers
    except Exception as error:  # a broken installation may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        return UnusableReader("transformers", "it is not installed" if absent else describe_error(error))
    reading = Reading(f"transformers {transformers.__version__}")
    with without_messages(transformers):
        try:
            compare_with_transformers(transformers, folder, reference, reading)
        except Exception as error:  # the fault may be the folder's or the library's, which may raise anything
            fault = find_own_fault(transformers, folder)
            if fault:
                return UnusableReader(reading.reader, fault)
            reading.problems.append(f"does not load ({describe_error(error)})")
    return reading


def describe_error(error: Exception) -> str:
    """Return the error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextlib.contextmanager
def without_messages(transformers: Any) -> Iterator[None]:
    """Silence transformers' messages, even printed ones, and its progress bars; restore its settings afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_with_transformers(transformers: Any, folder: str | Path) -> tuple[Any, dict[str, Any], Any]:
    """Return the folder's model in float32, the keys that did not match, and its tokenizer."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    return model.eval(), info, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def open_with_transformers(folder: str, flag: str) -> Any:
    """Return the model in a folder as transformers loads it, in float32. Raise ConfigError, which names `flag`, if it cannot."""
    try:
        import transformers

        with without_messages(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
    except Exception as error:  # whatever transformers raises
        what = f"transformers cannot load {folder} ({describe_error(error)})"
        raise ConfigError(flag, what, "name the folder of a model that transformers loads") from None
    found: Any = model
    return found.eval()


def find_own_fault(transformers: Any, folder: Path) -> str:
    """Return why transformers cannot load even a small model of this type that it wrote itself; empty if it can."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 257}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
    try:
        with tempfile.TemporaryDirectory() as own, torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.for_model(kind, **shape, **heads)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(own)
            tokenizer_from_text("bytes").save(Path(own))
            backend = Backend.from_file(str(Path(own, "tokenizer.json")))
            transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(own)
            model, _, tokenizer = load_with_transformers(transformers, own)
            prompt = torch.tensor([tokenizer.encode("a")])
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, pad_token_id=0)
    except Exception as error:  # whatever transformers raises for its own folder
        return describe_error(error)
    return ""


def compare_with_transformers(transformers: Any, folder: Path, reference: Reference, reading: Reading) -> None:
    """Load the model and the tokenizer with transformers, and compare them with the source."""
    model, info, tokenizer = load_with_transformers(transformers, folder)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            reading.problems.append(f"{what.replace('_', ' ')}: {sorted(map(str, info[what]))[0]}")
    with torch.no_grad():
        compare_logits(reading, model(reference.windows).logits.float(), reference)
        compare_greedy(reading, continue_with_transformers(model, reference), reference)

    def encode(text: str) -> list[int]:
        # This package reads "<|endoftext|>" in a text as plain text; transformers does so with split_special_tokens.
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    compare_tokenizer(reading, encode, decode, reference)
    if tokenizer.eos_token_id != model.config.eos_token_id:
        reading.problems.append(
            f"end of text is {tokenizer.eos_token_id} in the tokenizer and {model.config.eos_token_id} in the config"
        )
    # The usual user code: the tokenizer's whole output is passed to the model.
    model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=1, pad_token_id=0)


def continue_with_transformers(model: Any, reference: Reference) -> list[int]:
    """Return the greedy continuation: the first tokens by `generate`, and the most likely token at each later place."""
    prompt = torch.tensor([reference.prompt])
    wanted = reference.continuation
    length = min(GENERATED, len(wanted))
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    generated: list[int] = output[0, prompt.shape[1] :].tolist()
    if len(generated) < length:  # it stopped
        return generated
    logits = model(torch.tensor([[*reference.prompt, *wanted]])).logits[0, prompt.shape[1] - 1 : -1]
    predicted: list[int] = logits.argmax(-1).tolist()
    return generated + predicted[length:]


def compare_logits(reading: Reading, logits: Tensor, reference: Reference, tolerance: Tolerance = FLOAT32) -> None:
    """Compare logits, their most likely tokens and their loss with the source's."""
    if logits.shape != reference.logits.shape:
        reading.problems.append(f"logits are {tuple(logits.shape)} and should be {tuple(reference.logits.shape)}")
        return
    pairs = list(zip(logits, reference.logits, strict=True))  # by window, to take less memory
    reading.max_logit_difference = torch.stack([(a - b).abs_().max() for a, b in pairs]).max().item()
    reading.argmax_agreement = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean().item()
    targets = zip(logits[:, :-1], reference.windows[:, 1:], strict=True)
    losses = [torch.nn.functional.cross_entropy(row, ids) for row, ids in targets]
    reading.loss = torch.stack(losses).mean().item()
    scale = max(1.0, reference.logits.abs().max().item())
    if not reading.max_logit_difference <= tolerance.logits * scale:
        reading.problems.append(f"logits differ by {reading.max_logit_difference:.2g}")
    if not reading.argmax_agreement >= tolerance.argmax_agreement:
        reading.problems.append(f"the most likely token differs at {1 - reading.argmax_agreement:.1%} of positions")
    if not abs(reading.loss - reference.loss) <= tolerance.loss * max(1.0, reference.loss):
        reading.problems.append(f"the loss is {reading.loss:.6f} and should be {reference.loss:.6f}")


def compare_greedy(
    reading: Reading, found: Sequence[int], reference: Reference, tolerance: Tolerance = FLOAT32
) -> None:
    """Count the equal tokens of the greedy continuation. If the texts diverge at a token whose two highest logits are
    equal within rounding, both are right, and the comparison ends there."""
    wanted = reference.continuation
    reading.greedy_tokens = len(wanted)
    differ = (n for n, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b)
    reading.greedy_equal = n = next(differ, min(len(wanted), len(found)))
    scale = max(1.0, reference.logits.abs().max().item())
    if n < len(wanted) and n < len(found) and reference.gaps[n] <= tolerance.tie * scale:
        reading.greedy_tokens = n
    elif n < len(wanted):
        reading.problems.append(f"greedy text differs at token {n + 1} of {len(wanted)}")


def compare_tokenizer(
    reading: Reading,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    reference: Reference,
) -> None:
    """Check that the hostile texts encode to the source's ids, and that these ids decode to the source's text."""
    reading.texts = len(HOSTILE)
    for text, ids, decoded in zip(HOSTILE, reference.ids, reference.decoded, strict=True):
        found = encode(text)
        if found == ids and decode(ids) == decoded:
            reading.texts_equal += 1
        elif reading.texts == len(HOSTILE) and not any("tokenizer" in problem for problem in reading.problems):
            reading.problems.append(f"the tokenizer gives {found[:4]} for {text[:20]!r} and should give {ids[:4]}")
