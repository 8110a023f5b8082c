"""The transformer against transformers, its parameter counts, its start, and what may not depend on the future."""

import math
from pathlib import Path

import pytest
import torch
from twins import blocks_of, gradient_of, small_config, small_model, transformers_twin

from smollm2.config.reading import load_config
from smollm2.config.schema import ModelConfig
from smollm2.model.attention import Backend
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import compile_blocks

VARIANTS = {
    "grouped heads, tied, theta 10,000": {},
    "grouped heads, untied, theta 100,000": {"tie_word_embeddings": False, "rope_theta": 100000.0},
    "one key-value head a query head, tied": {"num_key_value_heads": 4, "rope_theta": 100000.0},
    "one key-value head a query head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "a head wider than hidden_size / heads": {"head_dim": 32},
    "layernorm, tied": {"norm": "layernorm"},
    "layernorm, untied, theta 100,000": {"norm": "layernorm", "tie_word_embeddings": False, "rope_theta": 100000.0},
}


def tokens(seed: int = 0, shape: tuple[int, int] = (2, 128)) -> torch.Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_gradients_equal_those_of_transformers(changes: dict[str, object]) -> None:
    model = small_model(**changes)
    twin = transformers_twin(model)
    input_ids, labels = tokens(0), tokens(1)
    labels[0, :9] = -100
    logits = twin(input_ids).logits
    assert (model(input_ids) - logits).abs().max() <= 1e-5
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss_sum, count = model(input_ids, labels)
    assert count == (labels != -100).sum()
    assert (loss_sum / count).item() == pytest.approx(reference.item(), rel=1e-5)
    torch.autograd.backward(reference)
    (loss_sum / count).backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference <= 1e-4, name


def test_a_bf16_model_keeps_its_rotary_tables_in_float32_and_its_logits_near() -> None:
    model = small_model()
    reference = model(tokens())
    model.to(torch.bfloat16)
    assert model.model.rotary.cos.dtype == torch.float32
    assert (model(tokens()).float() - reference).abs().max() < 0.1


def test_a_changed_token_moves_no_earlier_logit_and_every_later_one() -> None:
    model = small_model().eval()
    before = tokens()
    after = before.clone()
    after[:, 40] = (after[:, 40] + 1) % 320
    with torch.no_grad():
        moved = (model(before) != model(after)).any(-1)
    assert not moved[:, :40].any()
    assert moved[:, 40:].all()


def test_order_reaches_the_first_attention_output() -> None:
    model = small_model().eval()
    outputs = []
    blocks_of(model)[0].self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0, -1]))
    ids = tokens(shape=(1, 64))
    shuffled = ids.clone()
    shuffled[0, :63] = ids[0, torch.randperm(63, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        model(ids)
        model(shuffled)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def model_on(backend: Backend) -> SmolLM2:
    model = small_model().eval()
    model.model.attention_backend = backend
    return model


TWO_DOCUMENTS = (torch.arange(128) >= 50).long().repeat(2, 1)


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
def test_a_document_is_read_as_if_it_were_alone(backend: Backend) -> None:
    model = model_on(backend)
    ids, other = tokens(0), tokens(1)
    with torch.no_grad():
        packed, again = (
            model(torch.cat((before[:, :50], ids[:, 50:]), 1), document_ids=TWO_DOCUMENTS)[:, 50:]
            for before in (ids, other)
        )
        alone = model(ids[:, 50:])
    assert torch.equal(packed, again)
    assert (packed - alone).abs().max() <= 1e-5  # of logits up to 4; alone its rotary positions begin at 0


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
def test_the_loss_of_a_document_has_no_gradient_in_another(backend: Backend) -> None:
    model = model_on(backend)
    embedded: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: embedded.append(out))
    labels = tokens(1)
    labels[:, :50] = -100
    loss, _ = model(tokens(0), labels, TWO_DOCUMENTS)
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert not gradient[:, :50].any()
    assert gradient[:, 50:].any(-1).all()


@pytest.mark.parametrize("document_ids", [None, TWO_DOCUMENTS], ids=["one document", "two"])
def test_gradient_checkpointing_changes_no_bit_of_the_gradient(document_ids: torch.Tensor | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_model()
        model.model.checkpointing = checkpointing
        loss, _ = model(tokens(0), tokens(1), document_ids)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_with_documents_and_checkpointing() -> None:
    """Of every backend that runs here; compiled by torch's own compiler, as `training.compile` does it."""
    compiled = small_model(num_hidden_layers=2)
    compile_blocks(compiled.model.layers)
    for backend in ("sdpa", "blocks"):
        plain = small_model(num_hidden_layers=2)
        results = []
        for model in (plain, compiled):
            model.model.checkpointing = True
            model.model.attention_backend = backend
            model.zero_grad()
            losses = [model(tokens(0), tokens(1), document_ids)[0] for document_ids in (None, TWO_DOCUMENTS)]
            torch.autograd.backward(losses)
            gradient = gradient_of(model)
            results.append(([loss.item() for loss in losses], gradient))
        (losses, gradient), (compiled_losses, compiled_gradient) = results
        assert compiled_losses == pytest.approx(losses, rel=1e-5)
        assert (compiled_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize(
    ("preset", "count"),
    [("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384)],
)
def test_the_big_presets_have_the_published_parameter_counts(preset: str, count: int) -> None:
    assert parameters_on_meta(load_config(preset=preset).model) == count


@pytest.mark.parametrize(("norm", "count"), [("layernorm", 137_860_608), ("rmsnorm", 137_841_408)])
def test_the_users_config_has_the_count_of_its_arithmetic(norm: str, count: int) -> None:
    config = load_config(Path(__file__).parents[2] / "config.yaml").model
    assert parameters_on_meta(config.model_copy(update={"norm": norm})) == count


def parameters_on_meta(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SmolLM2(config).parameters())


@pytest.mark.parametrize("preset", ["nano", "micro"])
def test_the_small_presets_build_and_start_at_the_loss_of_their_arithmetic(preset: str) -> None:
    config = load_config(preset=preset).model
    torch.manual_seed(0)
    model = SmolLM2(config)
    ids = torch.randint(0, config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    loss, count = model(ids[:, :-1], ids[:, 1:])
    expected = math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    assert (loss / count).item() == pytest.approx(expected, abs=0.1)


def test_the_output_projections_start_smaller_by_the_root_of_twice_the_depth() -> None:
    model = SmolLM2(small_config(hidden_size=256, intermediate_size=512))
    block = blocks_of(model)[1]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.1 / math.sqrt(6), rel=0.03)
    assert block.self_attn.o_proj.weight.std().item() == pytest.approx(0.1 / math.sqrt(6), rel=0.03)
