"""The proof of an export: the folder is loaded from the disk and compared with its source on real text.

Two readers load it, this package and transformers (where it is installed), because a reader of ours would share a mistake
of our writer. Logits find a wrong weight, rotary base or layout; a wrong epsilon or end-of-text id hardly moves them, so
the config's fields are compared one by one as well.
"""

import contextlib
import hashlib
import json
import math
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smollm2
from smollm2.data.sample import read_topics
from smollm2.data.text import open_text
from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import Smollm2Error
from smollm2.inference.hugging_face_folder import read_hugging_face_config
from smollm2.inference.loading import load_model
from smollm2.model.loss import next_token_loss
from smollm2.model.transformer import SmolLM2

TOLERANCE = 1e-4
"""Largest difference of logits, against the largest logit or 1: float32 in another order of sums differs by up to 2e-5, a
wrong rotary base by 6.7 (measured on a 135M model)."""

TIE = 1e-5
"""Two logits this near to one another, against the largest or 1, may change places by rounding."""

LOSS_TOLERANCE = 1e-5
ARGMAX_AGREEMENT = 0.999
WINDOWS, WINDOW, PROMPT, CONTINUATION = 2, 256, 32, 64

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
"""Texts on which tokenizers differ."""

FALLBACK_TEXT = (
    "A model is a function of its weights, and a copy of the weights that gives other numbers is no copy. " * 40
)


@dataclass
class Reading:
    """What one reader found in the folder, against the source."""

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
class Reference:
    """What the source gives, with its weights rounded as the folder holds them."""

    windows: Tensor  # (N, T) int64
    logits: Tensor  # (N, T, V) float32
    loss: float
    prompt: list[int]
    continuation: list[int]
    gaps: list[float]  # between the two likeliest logits, at each token of the continuation
    ids: list[list[int]]  # of each hostile text
    decoded: list[str]


def certify(folder: Path, model: SmolLM2, tokenizer: Tokenizer, dtype: torch.dtype, text: str) -> dict[str, Any]:
    """Compare the folder with its source; `passed` says whether it is the same model, `problems` what is not.

    `model` comes back with its weights rounded to `dtype`.
    """
    windows = take_windows(tokenizer, text, model.config.max_position_embeddings)
    exact_logits, exact_loss = run_model(model, windows)
    round_weights(model, dtype)
    reference = make_reference(model, tokenizer, windows)
    readings = [read_as_ours(folder, model, reference), *read_as_transformers(folder, reference)]
    problems = check_config(folder, model, tokenizer)
    problems += [f"{reading.reader}: {problem}" for reading in readings for problem in reading.problems]
    return {
        "passed": not problems,
        "problems": problems,
        "dtype": str(dtype).removeprefix("torch."),
        "text": {"tokens": windows.numel(), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "source": {"loss": exact_loss, "smollm2": smollm2.__version__, "torch": str(torch.__version__)},
        "rounding": {
            "loss": reference.loss,
            "max_logit_difference": (reference.logits - exact_logits).abs().max().item(),
        },
        "tokenizer": {
            "texts": len(HOSTILE),
            "texts_that_come_back": sum(a == b for a, b in zip(HOSTILE, reference.decoded, strict=True)),
        },
        "readers": [asdict(reading) for reading in readings],
    }


def choose_text(file: str | Path | None = None) -> str:
    """The text of the comparison: the beginning of a file, or a piece of Python's language reference. Raises DataError."""
    if file is not None:
        with tempfile.TemporaryDirectory() as spool:
            return next(open_text(str(file), Path(spool)).chunks()).text
    topics = (topic for _, topic in read_topics(Path(sysconfig.get_path("stdlib"))))
    found = ""
    while len(found) < 8192 and (topic := next(topics, None)):
        found += topic + "\n"
    return found or FALLBACK_TEXT


def take_windows(tokenizer: Tokenizer, text: str, positions: int) -> Tensor:
    """Up to two windows (N, T) from the beginning of a text, each behind an end of text; a short text is repeated."""
    length = min(positions, WINDOW)
    ids = tokenizer.encode(text[: 64 * WINDOWS * WINDOW]) or [tokenizer.end_of_text]
    ids = ids * -(-WINDOWS * length // len(ids))
    rows = [[tokenizer.end_of_text, *ids[n * (length - 1) : (n + 1) * (length - 1)]] for n in range(WINDOWS)]
    return torch.tensor(rows)


@torch.no_grad()
def run_model(model: SmolLM2, windows: Tensor) -> tuple[Tensor, float]:
    """Logits (N, T, V) and the loss per token."""
    hidden = model.model(windows)
    loss, count = next_token_loss(hidden[:, :-1], model.lm_head.weight, windows[:, 1:])
    return model.lm_head(hidden), (loss / count).item()


@torch.no_grad()
def round_weights(model: SmolLM2, dtype: torch.dtype) -> None:
    """Give every weight the value that `dtype` holds, in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def make_reference(model: SmolLM2, tokenizer: Tokenizer, windows: Tensor) -> Reference:
    """What every reader must find again."""
    logits, loss = run_model(model, windows)
    prompt = windows[0, : min(PROMPT, windows.shape[1] // 2)].tolist()
    continuation, gaps = continue_greedily(model, prompt, tokenizer.end_of_text)
    ids = [tokenizer.encode(text) for text in HOSTILE]
    return Reference(windows, logits, loss, prompt, continuation, gaps, ids, [tokenizer.decode(row) for row in ids])


@torch.no_grad()
def continue_greedily(model: SmolLM2, prompt: list[int], end: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens, up to the end of text or the context, and by how much each led the second."""
    room = min(CONTINUATION, model.config.max_position_embeddings - len(prompt))
    ids: list[int] = []
    gaps: list[float] = []
    while len(ids) < room and end not in ids:
        logits = model.lm_head(model.model(torch.tensor([prompt + ids]))[0, -1])
        first, second = logits.topk(2).values.tolist()
        ids.append(int(logits.argmax()))
        gaps.append(first - second)
    return ids, gaps


def read_as_ours(folder: Path, source: SmolLM2, reference: Reference) -> Reading:
    """Load the folder as `load_model` does; here the weights must be the source's, bit for bit."""
    reading = Reading(f"smollm2 {smollm2.__version__}")
    try:
        model, tokenizer = load_model(folder)
    except Smollm2Error as error:
        reading.problems.append(f"does not load ({error})")
        return reading
    found = model.state_dict()
    wrong = [name for name, tensor in source.state_dict().items() if not torch.equal(tensor, found[name])]
    reading.problems += [f"{name} is not the source's" for name in wrong[:1]]
    compare_logits(reading, run_model(model, reference.windows)[0], reference)
    continuation, _ = continue_greedily(model, reference.prompt, tokenizer.end_of_text)
    compare_greedy(reading, continuation, reference)
    compare_tokenizer(reading, tokenizer.encode, tokenizer.decode, reference)
    return reading


def read_as_transformers(folder: Path, reference: Reference) -> list[Reading]:
    """Load the folder as transformers does; nothing where it is not installed."""
    try:
        transformers = import_transformers()
    except ImportError:
        return []
    reading = Reading(f"transformers {transformers.__version__}")
    with quiet(transformers):
        try:
            read_with(transformers, folder, reference, reading)
        except Exception as error:  # whatever a foreign library raises, the folder is not one that it reads
            reading.problems.append(f"does not load ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
    return [reading]


def import_transformers() -> Any:
    """The library, with the classes that the reading uses: they are imported late, and may be what is missing."""
    import transformers

    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' advice and progress bars; its settings come back as they were."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_with(transformers: Any, folder: Path, reference: Reference, reading: Reading) -> None:
    """Load model and tokenizer with transformers, in float32 whatever the folder holds, and compare."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            reading.problems.append(f"{what.replace('_', ' ')}: {sorted(map(str, info[what]))[0]}")
    model.eval()
    with torch.no_grad():
        compare_logits(reading, model(reference.windows).logits.float(), reference)
        prompt = torch.tensor([reference.prompt])
        options = {"max_new_tokens": len(reference.continuation), "do_sample": False, "pad_token_id": 0}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    compare_greedy(reading, output[0, prompt.shape[1] :].tolist(), reference)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text: str) -> list[int]:
        # Ours reads "<|endoftext|>" in a text as text; transformers only when asked to.
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    compare_tokenizer(reading, encode, decode, reference)
    if tokenizer.eos_token_id != model.config.eos_token_id:
        reading.problems.append(
            f"the tokenizer ends at {tokenizer.eos_token_id}, the config at {model.config.eos_token_id}"
        )


def compare_logits(reading: Reading, logits: Tensor, reference: Reference) -> None:
    """Fill in the numbers of the logits, and what is wrong with them."""
    if logits.shape != reference.logits.shape:
        reading.problems.append(f"logits are {tuple(logits.shape)} and should be {tuple(reference.logits.shape)}")
        return
    reading.max_logit_difference = (logits - reference.logits).abs().max().item()
    reading.argmax_agreement = (logits.argmax(-1) == reference.logits.argmax(-1)).float().mean().item()
    targets = reference.windows[:, 1:].flatten()
    reading.loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).item()
    scale = max(1.0, reference.logits.abs().max().item())
    if not reading.max_logit_difference <= TOLERANCE * scale:
        reading.problems.append(f"logits differ by {reading.max_logit_difference:.2g}")
    if not reading.argmax_agreement >= ARGMAX_AGREEMENT:
        reading.problems.append(
            f"the likeliest token is another one at {1 - reading.argmax_agreement:.1%} of positions"
        )
    if not abs(reading.loss - reference.loss) <= LOSS_TOLERANCE * max(1.0, reference.loss):
        reading.problems.append(f"the loss is {reading.loss:.6f} and was {reference.loss:.6f}")


def compare_greedy(reading: Reading, found: Sequence[int], reference: Reference) -> None:
    """Count equal tokens of the greedy continuation. Where the texts part at a tie of two logits within rounding, either
    is right, and the comparison ends there."""
    wanted = reference.continuation
    reading.greedy_tokens = len(wanted)
    differ = (n for n, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b)
    reading.greedy_equal = n = next(differ, min(len(wanted), len(found)))
    scale = max(1.0, reference.logits.abs().max().item())
    if n < len(wanted) and n < len(found) and reference.gaps[n] <= TIE * scale:
        reading.greedy_tokens = n
    elif n < len(wanted):
        reading.problems.append(f"greedy text differs at token {n + 1} of {len(wanted)}")


def compare_tokenizer(
    reading: Reading,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    reference: Reference,
) -> None:
    """Hostile texts must give the source's ids, and these the source's text."""
    reading.texts = len(HOSTILE)
    for text, ids, decoded in zip(HOSTILE, reference.ids, reference.decoded, strict=True):
        found = encode(text)
        if found == ids and decode(ids) == decoded:
            reading.texts_equal += 1
        elif reading.texts == len(HOSTILE) and not any("tokenizer" in problem for problem in reading.problems):
            reading.problems.append(f"the tokenizer gives {found[:4]} for {text[:20]!r}, the source {ids[:4]}")


def check_config(folder: Path, model: SmolLM2, tokenizer: Tokenizer) -> list[str]:
    """What the folder's configs say against the source: our own reading of the shape, then each field by its name."""
    try:
        config, generation = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        shape = read_hugging_face_config(folder)
    except (OSError, ValueError, Smollm2Error) as error:
        return [f"its configs cannot be read ({error})"]
    problems = [
        f"{name} is {getattr(shape, name)} and should be {value}"
        for name, value in model.config.model_dump().items()
        if getattr(shape, name) != value
    ]
    problems += [
        f"{name} is {config.get(name)} in config.json and should be {value}"
        for name, value in expected_fields(model, tokenizer).items()
        if config.get(name) != value
    ]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_theta") != model.config.rope_theta:
        problems.append(
            f"rope_parameters.rope_theta is {rope.get('rope_theta')} and should be {model.config.rope_theta}"
        )
    for name in ("bos_token_id", "eos_token_id"):
        if generation.get(name) != tokenizer.end_of_text:
            problems.append(
                f"{name} is {generation.get(name)} in generation_config.json and should be {tokenizer.end_of_text}"
            )
    return problems


def expected_fields(model: SmolLM2, tokenizer: Tokenizer) -> Mapping[str, object]:
    """Fields that transformers reads and `read_hugging_face_config` does not, or in one of two places only."""
    eps = "rms_norm_eps" if model.config.norm == "rmsnorm" else "layer_norm_eps"
    fields: dict[str, object] = {
        "rope_theta": model.config.rope_theta,
        eps: model.config.norm_eps,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
    }
    return fields if model.config.norm == "rmsnorm" else {**fields, "partial_rotary_factor": 1.0}
