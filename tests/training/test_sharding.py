"""A model that the ranks share out (FSDP2) trains, measures, saves and resumes as one that a single process holds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_trials import ONE, WORLDS, World, differences, forget_the_end, trained, try_kills
from runs import outcome, write_tiny
from torch import Tensor, nn
from torch import distributed as dist
from two_ranks import Ended, run_ranks

from smollm2.analysis.diagnostics import StepDiagnostics
from smollm2.analysis.landscape import measure_landscape
from smollm2.config.schema import ModelConfig
from smollm2.model.transformer import SmolLM2
from smollm2.runtime import sharding
from smollm2.runtime.sharding import ALONE, gathered, local, make_layout, share_out
from smollm2.training import setup

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU")

CPU = torch.device("cpu")


Finished = Callable[..., Path]


def slow_if(condition: bool, *values: object) -> Any:
    """A case, which is slow if it starts many ranks."""
    return pytest.param(*values, marks=pytest.mark.slow if condition else ())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return a function that returns the folder of a finished run. Each run is made once: its ranks take seconds."""
    folder = tmp_path_factory.mktemp("finished")
    write_tiny(folder)

    def train_once(world: World, optimizer: str = "adamw", form: str = "file") -> Path:
        name = f"{optimizer}_{form}_{world.ranks}_{world.sharding}_{world.per_machine}"
        if not (folder / name).exists():
            trained(folder, world, name, "--training.optimizer", optimizer, "--training.checkpoints", form)
        return folder / name

    return train_once


@pytest.mark.parametrize("world", [slow_if(w.ranks > 2, w) for w in WORLDS.values()], ids=WORLDS)
@pytest.mark.parametrize(("optimizer", "bound"), [("adamw", 1e-4), ("muon", 1e-5)])
def test_every_way_to_share_gives_the_losses_of_one_process(
    world: World, optimizer: str, bound: float, finished: Finished
) -> None:
    """Promise B1."""
    for name in ("loss", "grad_norm", "validation_loss"):
        found = differences(finished(world, optimizer), finished(ONE, optimizer), name)
        assert found[0] <= 1e-6
        assert max(found) <= bound


def copy_without_the_end(source: Path, folder: Path) -> None:
    """Make `folder`/run the finished run `source`, as it was before its last checkpoint."""
    write_tiny(folder)
    shutil.copytree(source, folder / "run")
    forget_the_end(folder / "run")


RESUMES = [("two parts", "four copies"), ("four copies", "four parts"), ("four parts", "two machines with two parts")]
RESUMES += [("two machines with two parts", "two parts"), ("two parts", "one part")]


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(("first", "then"), [slow_if("four" in " ".join(pair), *pair) for pair in RESUMES])
def test_any_layout_resumes_the_checkpoint_of_any_other(
    first: str, then: str, form: str, finished: Finished, tmp_path: Path
) -> None:
    copy_without_the_end(finished(WORLDS[first], form=form), tmp_path)
    ended = WORLDS[then].train(tmp_path, "run", "--resume", "auto")
    assert [rank.code for rank in ended] == [0] * WORLDS[then].ranks, ended
    assert max(differences(tmp_path / "run", finished(ONE))) <= 1e-4
    assert "not bit-exact, because of" in ended[0].out


@pytest.mark.parametrize("form", ["file", "folder"])
def test_with_nothing_changed_a_resume_is_bit_identical(form: str, finished: Finished, tmp_path: Path) -> None:
    world = WORLDS["two machines with two parts"]
    whole = finished(world, form=form)
    copy_without_the_end(whole, tmp_path)
    ended = world.train(tmp_path, "run", "--resume", "auto", "--training.checkpoints", form)
    assert outcome(tmp_path / "run", 12) == outcome(whole, 12)
    assert ": bit-exact" in ended[0].out


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_finished_one_is_bit_identical(tmp_path: Path) -> None:
    """Promise A1."""
    trials = list(try_kills(tmp_path, 4, seed=3))
    assert sum("kill" in one for one in trials) >= 4
    assert all(one["bit-identical"] for one in trials if "finished" in one)


def test_auto_shares_the_model_out_only_if_it_does_not_fit_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    auto = World(2, "auto")
    assert "copies of the model (none)" in auto.train(tmp_path, "fits", "--train_steps", "1")[0].out
    monkeypatch.setattr(setup, "memory_of", lambda runtime: 10**8)
    out = auto.train(tmp_path, "does_not_fit", "--train_steps", "1")[0].out
    assert "training.sharding: auto -> full, because the whole run does not fit into the 100 MB of one device" in out
    assert "one copy of the model in 2 parts (full) on 1 x 2 devices" in out
    assert 'sharding: "full"  # auto' in (tmp_path / "does_not_fit" / "config.yaml").read_text()


def small_model() -> SmolLM2:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 257, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return SmolLM2(ModelConfig.model_validate(sizes))


def on_ranks(work: Callable[[int], object], folder: Path, ranks: int = 2) -> list[Ended]:
    """Call `work` on ranks that have a process group."""

    def connected(rank: int) -> int:
        dist.init_process_group("gloo")
        work(rank)
        return 0

    ended = run_ranks(connected, folder, ranks)
    assert [rank.code for rank in ended] == [0] * ranks, ended
    return ended


def shared_model() -> tuple[SmolLM2, Any]:
    model, layout = small_model(), make_layout("full", CPU, dist.get_world_size(), 1)
    share_out(model, layout, torch.float32)
    return model, layout


def test_each_of_two_ranks_holds_half_of_the_state(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model, _ = shared_model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        loss, _ = model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
        loss.backward()
        optimizer.step()
        held: list[Tensor] = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        held += [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        storages = {s.data_ptr(): s.nbytes() for s in (local(t.detach()).untyped_storage() for t in held)}
        share = sum(storages.values()) / sum(4 * t.numel() for t in held)
        assert len(held) == 4 * len(list(model.parameters()))
        assert share <= 0.6, share

    on_ranks(work, tmp_path)


def test_the_landscape_and_the_diagnostics_are_those_of_the_whole_model(tmp_path: Path) -> None:
    ids = torch.arange(32).view(2, 16)

    def measure(model: nn.Module, layout: Any) -> tuple[list[float], Any]:
        def loss() -> float:
            with torch.no_grad():
                value: float = model(ids, ids)[0].item()
            if layout.is_sharded:
                model.reshard()  # type: ignore[operator]
            return value

        found = measure_landscape(model, loss, side=3, seed=1, targets=32)
        model(ids, ids)[0].backward()
        with StepDiagnostics(model, gathered_nothing, histograms=True, layout=layout) as diagnostics:
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        return [*found.line, *(x for row in found.grid for x in row)], diagnostics.diagnosis

    def work(rank: int) -> None:
        model, layout = shared_model()
        mine, theirs = measure(model, layout), measure(small_model(), ALONE)
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
        for name in ("gradient_norms", "weight_norms", "update_ratios"):
            assert getattr(mine[1], name) == pytest.approx(getattr(theirs[1], name), rel=1e-3), name
        for name, histogram in theirs[1].weight_histograms.items():
            assert sum(mine[1].weight_histograms[name].counts) == sum(histogram.counts)
            assert mine[1].weight_histograms[name].edges == pytest.approx(histogram.edges, rel=1e-4)

    on_ranks(work, tmp_path)


def gathered_nothing() -> Any:
    """Stand in for a tracker's `counted`."""
    return gathered(nn.Identity())


def run_out(model_call: int, on: Callable[[int], bool]) -> Callable[[], None]:
    """A function after which the `model_call`-th micro-batch runs out of memory, once, on some ranks."""

    def prepare() -> None:
        calls = {"n": 0}
        forward = SmolLM2.forward

        def failing(self: SmolLM2, *args: Any, **kwargs: Any) -> Any:
            calls["n"] += self.training
            if calls["n"] == model_call and self.training and on(dist.get_rank()):
                calls["n"] += 1
                raise MemoryError
            return forward(self, *args, **kwargs)

        SmolLM2.forward = failing  # type: ignore[method-assign]

    return prepare


def test_if_all_ranks_run_out_of_memory_the_step_starts_again_with_smaller_micro_batches(
    finished: Finished, tmp_path: Path
) -> None:
    write_tiny(tmp_path)
    ended = WORLDS["two parts"].train(tmp_path, "run", before=run_out(3, lambda rank: True))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert max(differences(tmp_path / "run", finished(WORLDS["two parts"]))) <= 1e-4
    assert "out of memory with 4 sequences at once. Continuing with 2 at once" in ended[0].out


def test_if_one_rank_alone_runs_out_of_memory_all_end_and_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    monkeypatch.setattr(sharding, "SECONDS_TO_MEET", 1)
    ended = WORLDS["two parts"].train(tmp_path, "run", before=run_out(3, lambda rank: rank == 1))
    assert {rank.code for rank in ended} == {6}, ended
    assert sum("out of memory" in rank.err for rank in ended) == 1
    assert max(rank.seconds for rank in ended) < 30


def test_a_flipped_bit_in_one_machines_copy_is_found_and_its_rank_named(tmp_path: Path) -> None:
    write_tiny(tmp_path)

    def flip() -> None:
        from smollm2.training import actions

        check = actions.check_replicas

        def flipping(run: Any, step: int) -> None:
            if dist.get_rank() == 3:
                local(next(run.model.model.layers.parameters()).detach()).view(-1)[0] += 1
            check(run, step)

        actions.check_replicas = flipping

    ended = WORLDS["two machines with two parts"].train(tmp_path, "run", "--training.save_interval", "1", before=flip)
    assert {rank.code for rank in ended} == {5}, ended
    assert "the weights of rank 3 differ" in "".join(rank.err for rank in ended)
    assert not list((tmp_path / "run").glob("step_*"))
