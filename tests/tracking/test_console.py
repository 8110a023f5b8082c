import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from smollm2.tracking.base import Fanout, Sample
from smollm2.tracking.console import ConsoleTracker, RunLog, find_secrets, join_in_lines, redact, wrap_words

REPORT = {
    "loss": 3.21,
    "learning_rate": 1e-4,
    "grad_norm": 0.91,
    "tokens_per_second": 12345.6,
    "tokens": 640,
    "epoch": 0.1,
}


def printed(use: Callable[[ConsoleTracker], object]) -> str:
    stream = io.StringIO()
    use(ConsoleTracker(1000, 0, stream))
    return stream.getvalue()


def log_each(console: ConsoleTracker, rows: Sequence[tuple[Mapping[str, float], int]]) -> None:
    """Log rows, each with its step, through one fanout each."""
    for row, step in rows:
        Fanout([console]).log(row, step)


def show_progress(console: ConsoleTracker, fractions: Iterable[float]) -> None:
    for fraction in fractions:
        console.show_progress("tokenizing", fraction)


def show_a_run(console: ConsoleTracker) -> None:
    console.show_page("Training", [("model", "2 layers"), ("folder", "x" * 200)])
    for step in (10, 20, 30):
        Fanout([console]).log(REPORT, step)
    Fanout([console]).log({"validation_loss": 3.5, "validation_bpb": 1.25}, 30)
    Fanout([console]).log_text([Sample("Once", " upon\n\x1b[2Ja")], 30)
    Fanout([console]).log_event("checkpoint", "saved \x1b[31mred", 30, path="x")
    console.close()
    console.report("done")


def test_a_report_is_one_plain_line_in_a_pipe() -> None:
    assert printed(lambda console: Fanout([console]).log(REPORT, 10)) == (
        "step 10/1000  loss 3.2100  smoothed_loss 3.2100  learning_rate 1.00e-04  grad_norm 0.910  tokens_per_second 12346\n"
    )


def test_a_validation_is_one_plain_line_in_a_pipe() -> None:
    rows = {"validation_loss": 3.5, "validation_bpb": 1.25}
    assert (
        printed(lambda console: Fanout([console]).log(rows, 10))
        == "step 10/1000  validation_loss 3.5000  validation_bpb 1.2500\n"
    )


def test_an_event_without_text_is_not_printed() -> None:
    assert printed(lambda console: Fanout([console]).log_event("start", "", 0, device="cpu")) == ""


def test_a_loss_that_is_nan_is_printed_as_nan() -> None:
    assert (
        printed(lambda console: Fanout([console]).log({"loss": math.nan}, 1))
        == "step 1/1000  loss nan  smoothed_loss nan\n"
    )


def test_no_control_character_is_written_to_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    lines = printed(show_a_run).splitlines()
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", line) for line in lines)
    assert [line.split()[0] for line in lines] == ["Training", "model", "folder", *["step"] * 5, "saved", "done"]


def test_the_time_left_is_printed_from_the_second_report_on() -> None:
    first, second = printed(lambda console: log_each(console, [(REPORT, step) for step in (10, 20)])).splitlines()
    assert "time_left" not in first and re.search(r"time_left \d:\d\d:\d\d$", second)


def test_the_smoothed_loss_is_the_exponential_mean_without_bias() -> None:
    losses = [5.0, 4.0, math.nan, 3.0]
    text = printed(lambda console: log_each(console, [({"loss": loss}, 1) for loss in losses]))
    weights = [0.1 * 0.9**age for age in (2, 1, 0)]
    expected = sum(weight * loss for weight, loss in zip(weights, (5, 4, 3), strict=True)) / sum(weights)
    assert text.splitlines()[-1].endswith(f"smoothed_loss {expected:.4f}")


def test_the_smoothed_loss_continues_after_a_resume() -> None:
    losses = [5.0, 4.0, 3.0, 2.5]
    whole = printed(lambda console: log_each(console, [({"loss": loss}, 1) for loss in losses]))

    def resume(console: ConsoleTracker) -> None:
        console.restore_smoothing(losses[:2])
        for loss in losses[2:]:
            Fanout([console]).log({"loss": loss}, 1)

    assert printed(resume).splitlines() == whole.splitlines()[2:]


def test_a_page_aligns_its_values() -> None:
    text = printed(lambda console: console.show_page("Title", [("a", "1"), ("long", "[/b] 2\n3")]))
    assert text == "Title\n  a     1\n  long  [/b] 2\\n3\n"


def test_a_sample_is_one_line_with_its_prompt_in_brackets() -> None:
    text = printed(lambda console: Fanout([console]).log_text([Sample("", "a\n[b]"), Sample("The", " end")], 7))
    assert text == "step 7/1000  sample: []a\\n[b]\nstep 7/1000  sample: [The] end\n"


def test_the_progress_of_quick_work_is_printed_once() -> None:
    text = printed(lambda console: show_progress(console, [n / 100 for n in range(101)]))
    assert text == "tokenizing 100%\n"


def test_the_progress_of_slow_work_is_printed_by_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    fractions = (0.0, 0.05, 0.25, 0.3, 0.5, 0.75, 0.8, 1.0)
    text = printed(lambda console: show_progress(console, fractions))
    assert text.splitlines() == ["tokenizing 25%", "tokenizing 50%", "tokenizing 75%", "tokenizing 100%"]


def test_work_on_a_known_number_of_bytes_shows_its_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def show(console: ConsoleTracker) -> None:
        nonlocal now
        for fraction in (0.2, 0.3, 0.6, 1.0):  # a fifth was done by an earlier process
            console.show_progress("tokenizing", fraction, 100_000_000)
            now += 5

    assert printed(show).splitlines() == [
        "tokenizing 30%, 2 MB/s, 35 seconds left",
        "tokenizing 60%, 4 MB/s, 10 seconds left",
        "tokenizing 100%, 5.33 MB/s",
    ]


def test_a_mixture_shows_the_losses_of_each_source() -> None:
    rows = {"validation_loss": 3.5, "validation_bpb": 1.25, "validation_loss/web": 4.0, "validation_loss/code": 3.0}
    assert printed(lambda console: Fanout([console]).log(rows, 30)) == (
        "step 30/1000  validation_loss 3.5000  validation_loss/web 4.0000  validation_loss/code 3.0000  validation_bpb 1.2500\n"
    )


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    ConsoleTracker(1, 0, stream).report("Zürich\udc80")
    assert raw.getvalue().split() == [b"Z\\xfcrich\\udc80"]


def test_progress_pages_and_samples_are_escaped_for_an_ascii_stream() -> None:
    raw = io.BytesIO()
    console = ConsoleTracker(1, 0, io.TextIOWrapper(raw, "ascii"))
    console.show_progress("Zürich", 1.0)
    console.show_page("Zürich", [("größe", "é")])
    Fanout([console]).log_text([Sample("é", "ü")], 1)
    Fanout([console]).log_event("x", "é", 1)
    assert raw.getvalue().decode("ascii").splitlines() == [
        "Z\\xfcrich 100%",
        "Z\\xfcrich",
        "  gr\\xf6\\xdfe  \\xe9",
        "step 1/1  sample: [\\xe9]\\xfc",
        "\\xe9",
    ]


def test_a_closed_pipe_does_not_end_the_run() -> None:
    program = (
        "import sys; from smollm2.tracking.base import Fanout; from smollm2.tracking.console import ConsoleTracker; console = ConsoleTracker(9, 0)\n"
        "for step in range(20_000): Fanout([console]).log({'loss': 1.0}, step)\n"
        "sys.stderr.write('still here')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("step 0/9")
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == "still here"
    process.stderr.close()
    assert process.wait() == 0


@pytest.fixture(scope="module")
def terminal_output() -> str:
    """What a terminal of 80 columns is sent during a small run."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    program = "import test_console as t; t.show_a_run(t.ConsoleTracker(1000, 0))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, output
    return output.decode()


def test_a_terminal_has_the_latest_numbers_below_a_bar(terminal_output: str) -> None:
    assert "━━━" in terminal_output
    assert "smoothed_loss 3.2100  validation_loss 3.5000" in terminal_output
    assert re.search(r"step 20/1000  time_left \d:\d\d:\d\d", terminal_output)


def test_a_terminal_shows_all_numbers_below_a_message(terminal_output: str) -> None:
    sample, event = terminal_output.index("[Once]"), terminal_output.index("saved")
    assert "tokens_per_second 12346" in terminal_output[sample:event]


def test_a_terminal_scrolls_short_reports_above_the_bar(terminal_output: str) -> None:
    for line in ("step 20/1000  loss 3.2100\r\n", "step 30/1000  validation_loss 3.5000  validation_bpb 1.2500\r\n"):
        assert line in terminal_output


def test_a_terminal_receives_no_control_character_of_a_sample(terminal_output: str) -> None:
    """G6."""
    assert "[Once] upon\r\n\\x1b[2Ja" in terminal_output and "\x1b[2J" not in terminal_output
    assert "saved \\x1b[31mred" in terminal_output


def test_a_terminal_keeps_a_long_path_in_one_piece(terminal_output: str) -> None:
    assert "x" * 200 in terminal_output


def test_a_terminal_has_no_metric_that_is_broken_across_lines(terminal_output: str) -> None:
    below = re.findall(r"smoothed_loss 3\.2100.*?tokens_per_second 12346", terminal_output, re.DOTALL)[-1]
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", below).split("\n")
    assert len(lines) > 1
    assert all(re.fullmatch(r"(\w+ \S+)(  \w+ \S+)*", line.strip()) for line in lines)


@pytest.mark.parametrize("width", [80, 90, 100])
def test_long_lines_are_broken_at_spaces_only(width: int) -> None:
    line = "  precision  float32: this machine has no bf16 units; attention: sdpa; compile: off; " + "/" + "x" * 120
    lines = wrap_words(line, width, 13).splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(line.split())
    assert all(len(one) <= width for one in lines if "xxx" not in one)
    assert all(one.startswith(" " * 13) for one in lines[1:])


def test_parts_are_joined_in_as_few_lines_as_they_need() -> None:
    assert join_in_lines(["aaa 1", "bbb 2", "ccc 3"], 12) == ["aaa 1  bbb 2", "ccc 3"]
    assert join_in_lines(["a" * 30], 12) == ["a" * 30]


def test_a_terminal_is_restored_at_the_end(terminal_output: str) -> None:
    assert terminal_output.rindex("\x1b[?25h") > terminal_output.rindex("\x1b[?25l")
    assert terminal_output.endswith("done\r\n")


def test_the_log_has_the_time_the_rank_and_the_message(tmp_path: Path) -> None:
    RunLog(tmp_path, 3).write("resumed\nfrom 500")
    RunLog(tmp_path, 0).write("\x1b")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d rank 3  resumed", lines[0])
    assert lines[1] == "from 500" and lines[2].endswith(" rank 0  \\x1b")


def test_the_log_has_the_traceback_of_an_error_and_of_its_cause(tmp_path: Path) -> None:
    try:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("effect") from cause
    except ValueError as error:
        RunLog(tmp_path, 0).write_error(error)
    text = (tmp_path / "run.log").read_text()
    assert "KeyError: 'cause'" in text and "ValueError: effect" in text and 'raise KeyError("cause")' in text


def test_a_log_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    RunLog(tmp_path / "absent", 0).write("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("WANDB_API_KEY=canary rest", "WANDB_API_KEY=*** rest"),
        ("HF_TOKEN: canary", "HF_TOKEN: ***"),
        ("{'AWS_SECRET_ACCESS': 'can ary', 'a': 1}", "{'AWS_SECRET_ACCESS': ***, 'a': 1}"),
        ('"PASSWORD": "canary"', '"PASSWORD": ***'),
        ("--api_key=canary", "--api_key=***"),
        ("https://user:canary@host/x?y=1", "https://***@host/x?y=1"),
        ("https://canary@host", "https://***@host"),
        ("the value canary_of_env is known", "the value *** is known"),
        ("num_key_value_heads: 12, flops_per_token: 3", "num_key_value_heads: 12, flops_per_token: 3"),
        ("WANDB_API_KEY is not set", "WANDB_API_KEY is not set"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_secrets_stay_out_of_the_log(text: str, kept: str, tmp_path: Path) -> None:
    """G5."""
    assert redact(text, ("canary_of_env",)) == kept
    RunLog(tmp_path, 0, ("canary_of_env",)).write(text)
    assert (tmp_path / "run.log").read_text().endswith(f"  {kept}\n")


def test_secrets_are_found_by_the_names_of_their_variables() -> None:
    variables = {
        "WANDB_API_KEY": "canary1",
        "MY_PASSWORD": "canary2",
        "HOME": "/home/me",
        "SHORT_KEY": "1",
        "KEYBOARD": "german",
    }
    assert find_secrets(variables) == ("canary1", "canary2")
