"""The flags of `train`, `plan` and `prepare`: those of the run itself, then one per config key; and the resulting config."""

import argparse
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from smollm2.cli.flags import Parser, path, print_note, unescape
from smollm2.config.reading import (
    EFFECTIVE_HEADERS,
    add_config_flags,
    changed_on_resume,
    load_config_with_origins,
    read_config_flags,
)
from smollm2.config.schema import Config
from smollm2.config.sources import list_presets
from smollm2.config.vocabulary import find_key, suggest_key
from smollm2.errors import ConfigError, lay_out
from smollm2.storage.run_folder import CONFIG

SHORT_FLAGS = {
    "init_from": "model.init_from",
    "input_file": "data.input",
    "save_dir": "training.save_dir",
    "train_steps": "training.train_steps",
}


SETTLED = ("model.vocab_size", "data.pack", "data.document_mask")
"""Keys that a run may have set by itself: by its tokenizer, or because its text is conversations."""

TORCHRUN_OPTIONS = [
    "nnodes",
    "nproc_per_node",
    "node_rank",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "rdzv_conf",
    "standalone",
    "max_restarts",
    "monitor_interval",
    "start_method",
    "master_addr",
    "master_port",
    "local_addr",
    "signals_to_handle",
]
"""Options of torchrun that say how processes are started; torchrun accepts them with dashes as well."""


def add_run_flags(parser: Parser) -> None:
    """Add the flags of the run itself, then one for each config key."""
    parser.usage = f"{parser.prog} [--config FILE | --preset NAME] [--FLAG VALUE ...]"
    run = parser.add_argument_group("the run")
    run.add_argument("--config", metavar="FILE", type=path, help="config file; default: config.yaml")
    run.add_argument("--preset", metavar="NAME", help=f"a shipped config: {', '.join(list_presets())}")
    run.add_argument(
        "--input_file", metavar="FILE", help="data.input: a file, folder, pattern or hub name; - is standard input"
    )
    run.add_argument(
        "--init_from", metavar="MODEL", help="model.init_from: a folder or hub name of a model to start from"
    )
    run.add_argument("--save_dir", metavar="FOLDER", help="training.save_dir: the run folder")
    run.add_argument("--train_steps", metavar="N", help="training.train_steps: optimizer steps in the whole run")
    run.add_argument(
        "--resume", choices=["auto"], help="auto: resume from the newest valid checkpoint in save_dir, if there is one"
    )
    run.add_argument("--checkpoint_path", metavar="FILE", type=path, help="resume from this checkpoint")
    run.add_argument("--disable_wandb", action="store_true", help="wandb.enabled: false; wandb is not imported")
    run.add_argument(
        "--skip_preflight", action="store_true", help="training.preflight: false; train without the checks before it"
    )
    add_config_flags(parser)


def load_run_config(args: argparse.Namespace, unknown: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Return the config from the file and the flags, and the origin of each value.

    `unknown` holds the arguments that argparse did not recognize.

    Raise ConfigError, listing every problem.
    """
    problems = [lay_out(*problem) for problem in describe_unknown(args.parser, unknown)]
    if args.resume and args.checkpoint_path:
        problems.append(lay_out("--resume", "cannot be combined with --checkpoint_path", "use one of the two"))
    flags = read_flags(args, problems)
    own = None if problems else find_own_config(args, flags)
    if own:
        print_note(f"config: {own}, that of the run being resumed (--config chooses another)")
    config, origins = load_config_with_origins(own or args.config, preset=args.preset, flags=flags, found=problems)
    if not args.preset:
        keep_config(Path(own or args.config or CONFIG), Path(config.training.save_dir))
    return config, origins


def keep_config(source: Path, folder: Path) -> None:
    """Raise ConfigError if the run would overwrite the config that it was given, and a person wrote that config."""
    if source.resolve() != (folder / CONFIG).resolve():
        return
    if not source.read_text(encoding="utf-8-sig").startswith(EFFECTIVE_HEADERS):
        what = f"the run would overwrite {source} with its own config"
        raise ConfigError("training.save_dir", what, "use another folder")


def read_flags(args: argparse.Namespace, problems: list[str]) -> dict[str, tuple[str, str]]:
    """Return the flags that set a key: dotted key -> (flag as typed, text). A key that is set twice is a problem."""
    values = {key: (f"--{name}", getattr(args, name)) for name, key in SHORT_FLAGS.items()}
    flags = {key: given for key, given in values.items() if given[1] is not None}
    if args.disable_wandb:
        flags["wandb.enabled"] = ("--disable_wandb", "false")
    if args.skip_preflight:
        flags["training.preflight"] = ("--skip_preflight", "false")
    for key, given in read_config_flags(args).items():
        if key in flags:
            problems.append(lay_out(flags[key][0], f"{given[0]} sets the same key", "use one of the two"))
        flags.setdefault(key, given)
    if "data.document_separator" in flags:
        flag, text = flags["data.document_separator"]
        flags["data.document_separator"] = (flag, unescape(text))
    return flags


def find_own_config(args: argparse.Namespace, flags: dict[str, tuple[str, str]]) -> Path | None:
    """Return the run folder's own config if `--resume auto --save_dir FOLDER` is given and no config is chosen.

    ./config.yaml still takes precedence if the run in the folder could be resumed with it.
    """
    if args.resume != "auto" or args.config or args.preset or "training.save_dir" not in flags:
        return None
    own = Path(path(flags["training.save_dir"][1] or ".")) / CONFIG
    if not own.is_file():
        return None
    if not Path("config.yaml").exists():
        return own
    run, _ = load_config_with_origins(own, flags=flags)
    current, _ = load_config_with_origins(flags=flags)
    changes = changed_on_resume(run, current)
    is_other_run = any(change.rule == "refused" and change.key not in SETTLED for change in changes)
    return own if is_other_run else None


def describe_unknown(parser: Parser, words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (where, what, advice) for each argument that is an unknown flag, or a value with no flag before it."""
    problems: list[tuple[str, str, str]] = []
    after_flag = False
    if parser.prog.endswith(" train"):
        of_torchrun, words = separate_torchrun_options(words)
        problems += describe_torchrun_options(of_torchrun)
    for word in words:
        if word.startswith("-") and len(word) > 1:
            flag = word.split("=")[0]
            problems.append((flag, "unknown option", suggest_option(parser, flag)))
            after_flag = "=" not in word
        elif after_flag:  # the value of an unknown flag
            after_flag = False
        else:
            problems.append((word, "unexpected argument", advise_on_argument(parser, word)))
    return problems


def separate_torchrun_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of torchrun with their values, and the other words."""
    found: list[str] = []
    others: list[str] = []
    takes_value = False
    for word in words:
        is_flag = word.startswith("-") and len(word) > 1
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        is_found = name in TORCHRUN_OPTIONS if is_flag else takes_value
        (found if is_found else others).append(word)
        takes_value = is_found and is_flag and "=" not in word and name != "standalone"
    return found, others


def describe_torchrun_options(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (where, what, advice) for options that torchrun should have had, or an empty list if there are none."""
    names = [word.split("=")[0] for word in words if word.startswith("-")]
    if not names:
        return []
    what = "an option of torchrun, not of train.py" if len(names) == 1 else "options of torchrun, not of train.py"
    return [(", ".join(names), what, f"start the run with torchrun {shlex.join(words)} train.py ...")]


def advise_on_argument(parser: Parser, word: str) -> str:
    """Return what was probably meant by a value with no flag before it."""
    command = parser.prog.split()[-1]
    if command == "generate":
        return f"did you mean --prompt {shlex.quote(word)}?"
    if command in ("train", "plan") and Path(word).is_file():
        flag = "--config" if word.endswith((".yaml", ".yml")) else "--input_file"
        return f"did you mean {flag} {shlex.quote(word)}?"
    return f"see {parser.prog} --help"


def suggest_option(parser: Parser, flag: str) -> str:
    """Return what to do about an unknown flag: a similarly named flag of this command, or the key that was meant."""
    see_help = f"see {parser.prog} --help"
    options = parser.option_names()
    name = flag.lstrip("-")
    near = get_close_matches(flag, [option for option in options if "." not in option], 1, 0.75)
    exact = find_key(name)
    if near and exact.rpartition(".")[2] != name.rpartition(".")[2]:
        return f"did you mean {near[0]}?"
    if "--config" not in options:
        return see_help
    return suggest_key(name, prefix="--", otherwise=see_help)
