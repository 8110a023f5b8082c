"""Speed of greedy generation: this package against transformers' `generate` with its defaults, on the shape of `micro`.

Both hold the same weights, read the same prompt of 32 tokens and write 128 tokens, each in a process of its own. The
processes take turns, so that a busy machine slows both; a ratio is the median over the pairs. Our side turns the tokens
into text, theirs does not.

    python benchmarks/generate.py
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from results import Contestant, find_precisions, machine, publish, take_turns

PROMPT = "It is a truth universally known "
NEW_TOKENS = 128
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""configs/micro.yaml."""


def build_ours(precision: str, batch: int) -> Callable[[], str]:
    """One call of this package's `generate`."""
    import torch

    from smollm2.config.schema import ModelConfig
    from smollm2.data.tokenizer import load_tokenizer
    from smollm2.inference.generation import generate
    from smollm2.model.transformer import SmolLM2

    torch.manual_seed(1337)
    model = SmolLM2(ModelConfig(norm="rmsnorm", **SHAPE))
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    tokenizer = load_tokenizer("bytes")
    tokenizer.end_of_text = -1  # no token ends a text: each has all its length
    prompts = [PROMPT] * batch
    return lambda: generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, temperature=0)[0]


def build_transformers(precision: str, batch: int) -> Callable[[], str]:
    """One call of transformers' `generate`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from smollm2.config.schema import ModelConfig
    from smollm2.data.tokenizer import load_tokenizer
    from smollm2.model.transformer import SmolLM2

    torch.manual_seed(1337)
    weights = SmolLM2(ModelConfig(norm="rmsnorm", **SHAPE)).state_dict()
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5))
    model.eval()
    model.load_state_dict(weights)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    tokenizer = load_tokenizer("bytes")
    ids = torch.tensor([tokenizer.encode(PROMPT)] * batch)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def write() -> str:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert found.shape == (batch, len(PROMPT) + NEW_TOKENS)
        return tokenizer.decode(found[0, ids.shape[1] :].tolist())

    return write


BUILDERS = {"ours": build_ours, "transformers": build_transformers}


def serve(name: str, precision: str, batch: int, threads: int) -> None:
    """Child process: for each number read from standard input make that many calls and answer with one JSON line."""
    import torch

    torch.set_num_threads(threads)
    write = BUILDERS[name](precision, batch)
    for line in sys.stdin:
        started = time.perf_counter()
        texts = [write() for _ in range(int(line))]
        print(json.dumps({"seconds": time.perf_counter() - started, "text": texts[-1]}), flush=True)


def compare(precision: str, batch: int, pairs: int, calls: int, threads: int) -> dict[str, Any]:
    """Interleaved pairs of ours and the peer; medians."""
    flags = ["--precision", precision, "--batch", str(batch), "--threads", str(threads)]
    contestants = {name: Contestant(__file__, "--child", name, *flags) for name in BUILDERS}
    texts = [contestant.run(1)["text"] for contestant in contestants.values()]
    answers = take_turns(contestants, pairs, calls)
    tokens = calls * batch * NEW_TOKENS
    runs = {name: [tokens / answer["seconds"] for answer in found] for name, found in answers.items()}
    ratios = [ours / theirs for ours, theirs in zip(runs["ours"], runs["transformers"], strict=True)]
    return {
        "precision": precision,
        "batch": batch,
        "tokens_per_second": {name: round(statistics.median(rates)) for name, rates in runs.items()},
        "speed_ratio": round(statistics.median(ratios), 3),
        "speed_ratios": [round(ratio, 3) for ratio in ratios],
        "same_text": texts[0] == texts[1],
    }


def main() -> None:
    """Run the comparison, or one child of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2, help="texts (batches of them) in one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision", choices=["float32", "bf16"], help="default: float32, and bf16 if the CPU computes it"
    )
    parser.add_argument("--batch", type=int, help="default: 1 and 8")
    parser.add_argument("--child", choices=BUILDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.child, args.precision, args.batch, args.threads)
        return
    precisions = [args.precision] if args.precision else find_precisions()
    batches = [args.batch] if args.batch else [1, 8]
    found = machine("transformers")
    results = [compare(p, batch, args.pairs, args.calls, args.threads) for p in precisions for batch in batches]
    rows = []
    for row in results:
        speed = row["tokens_per_second"]
        text = "yes" if row["same_text"] else "no"
        rows.append([row["precision"], row["batch"], *speed.values(), row["speed_ratio"], text])
    columns = ["precision", "batch", "ours, tokens/s", "transformers", "speed ratio", "same text"]
    publish(__file__, columns, rows, machine=found, shape=SHAPE, results=results)


if __name__ == "__main__":
    main()
