"""DE-NAS: the scores against independent references in float64, and the supernet against models made anew."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import bert, gpt2, llama, make_tokenizer, tokens
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification

from peft import DenasConfig, LoraConfig, SftConfig, SsfConfig, get_peft_model, search_structure
from peft.tuners.denas import apply_structure
from peft.tuners.denas.gradients import score_table, singular_values
from peft.tuners.denas.model import left_as_it_was, make_batches
from peft.tuners.denas.score import Terms, complexity, de_score, diversity, expressivity, saliency
from peft.tuners.denas.space import SearchSpace
from peft.tuners.denas.supernet import ADAPTER, supernet
from peft.utils.peft_types import PeftType


def batch_of(rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    ids = tokens(rows, length)
    return {"input_ids": ids, "labels": ids}


def calls(model: nn.Module, batch, keys) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Of the model in float64, for each call of each module: input (N, I), output (N, O), gradient of the output."""
    model = copy.deepcopy(model).double().eval()
    seen = {key: [] for key in keys}

    def hook(key):
        def forward(module, args, output):
            output.retain_grad()
            seen[key].append((args[0], output))

        return forward

    for key in keys:
        model.get_submodule(key).register_forward_hook(hook(key))
    model(**batch).loss.backward()
    flat = {key: [(x, y, y.grad) for x, y in pairs] for key, pairs in seen.items()}
    return {key: [tuple(t.detach().flatten(0, -2) for t in one) for one in found] for key, found in flat.items()}


def table_of(model, config, batches, **search) -> tuple[SearchSpace, np.ndarray]:
    space = SearchSpace(model, config, DenasConfig(**search), with_alpha=False)
    with left_as_it_was(model, 0):
        model.eval()
        return space, score_table(model, space, batches)


# ---- The score that is a sum ----


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_lora_table_is_the_spectrum_of_the_gradients(make):
    model, batch = make(), batch_of()
    space, table = table_of(model, LoraConfig(target_modules="all-linear"), [batch], r_max=10, r_step=3)
    seen = calls(model, batch, space.layout.places)
    for unit, row in zip(space.units, table):
        spectra = [torch.linalg.svdvals(g.T @ x) / (g.norm() * x.norm()) for ((x, _, g),) in map(seen.get, unit.keys)]
        assert all(spectrum.sum() <= 1 + 1e-9 for spectrum in spectra)  # what the docs say of it
        for r, value in zip([1, 4, 7, 10], row):
            assert value == pytest.approx(sum(s[:r].sum().item() for s in spectra), rel=1e-4)


def test_sft_table_is_the_largest_entries():
    model, batch = llama(), batch_of()
    config = SftConfig(target_modules=["v_proj", "down_proj"], density=0.1)
    space, table = table_of(model, config, [batch], granularity="module", share_step=5)
    seen = calls(model, batch, space.layout.places)
    for unit, row in zip(space.units, table):
        ((x, _, g),) = seen[unit.keys[0]]
        entries = (g.T @ x / (g.norm() * x.norm())).flatten().abs().sort(descending=True).values
        for share, value in zip([1, 6, 11], row):
            count = int(0.1 * share / 4 * entries.numel())
            assert value == pytest.approx(entries[:count].sum().item(), rel=1e-4)


def test_ssf_table_is_the_gradient_of_scale_and_shift():
    """Which autograd finds, of an SSF in float64."""
    base, batch = llama(), batch_of()
    space, table = table_of(base, SsfConfig(), [batch], max_params=1)
    seen = calls(base, batch, space.layout.places)
    model = get_peft_model(copy.deepcopy(base).double(), SsfConfig(), autocast_adapter_dtype=False).double().eval()
    model(**batch).loss.backward()
    for unit, row in zip(space.units, table):
        expected = 0.0
        for key in unit.keys:
            ((_, y, g),) = seen[key]
            layer = model.get_base_model().get_submodule(key)
            scale, shift = (p.grad.abs().sum() for p in layer.parameters() if p.requires_grad)
            expected += scale / (g.norm() * y.norm()) + shift / (g.norm() * y.numel() ** 0.5)
        assert row[0] == pytest.approx(expected.item(), rel=1e-4)


def test_size_of_the_gradients_does_not_matter():
    """Neither of the loss, nor of what comes into a layer."""

    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layers, self.factor = nn.ModuleList([nn.Linear(6, 6)]), factor

        def forward(self, x):
            y = self.layers[0](x * self.factor)
            return SimpleNamespace(loss=self.factor * (y * weights).sum())

    weights, x = torch.randn(2, 9, 6)
    small, large = Scaled(0.1), Scaled(30.0)
    config = LoraConfig(target_modules=["0"])
    tables = [table_of(model, config, [{"x": x}], r_max=4)[1] for model in (small, large)]
    assert tables[0] == pytest.approx(tables[1], rel=1e-4) and tables[0].min() > 0


def test_several_batches_are_averaged():
    model, first, second = llama(), batch_of(), batch_of()
    _, both = table_of(model, LoraConfig(), [first, second])
    each = [table_of(model, LoraConfig(), [batch])[1] for batch in (first, second)]
    assert np.allclose(both, sum(each) / 2, rtol=1e-5)


def test_layers_that_are_called_several_times():
    """ALBERT's layers are one layer: its gradient is the sum over the calls, and then it is valued."""
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, num_labels=3, classifier_dropout_prob=0.0,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    batch = {"input_ids": tokens(4, 6), "labels": torch.tensor([0, 1, 2, 0])}
    space, table = table_of(model, LoraConfig(target_modules=["query"]), [batch], r_max=3)
    (found,) = calls(model, batch, space.layout.places).values()
    assert len(found) == 3
    x, _, g = (torch.cat(parts) for parts in zip(*found))
    spectrum = torch.linalg.svdvals(g.T @ x) / (g.norm() * x.norm())
    assert table[0] == pytest.approx(spectrum.cumsum(0)[:3].numpy(), rel=1e-4)


def test_tokens_count_as_vectors_of_norm_one():
    """An embedding's input is a one-hot vector for each token."""

    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Embedding(7, 5)])

        def forward(self, x):
            return SimpleNamespace(loss=(self.layers[0](x) * g).sum())

    x, g = torch.randint(7, (12,)), torch.randn(12, 5)
    _, table = table_of(Embeds(), LoraConfig(target_modules=["0"]), [{"x": x}], r_max=3)
    hot = nn.functional.one_hot(x, 7).double()
    spectrum = torch.linalg.svdvals(g.double().T @ hot) / (g.double().norm() * hot.norm())
    assert table[0] == pytest.approx(spectrum.cumsum(0)[:3].numpy(), rel=1e-4)


def test_singular_values_of_large_matrices():
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (200, 300))
    sigma = torch.logspace(1, -5, 200, dtype=torch.float64)
    G = U * sigma @ V[:, :200].T
    assert torch.allclose(singular_values(G, 12).double(), sigma[:12], rtol=1e-3)
    assert singular_values(torch.randn(3, 40), 5)[3:].tolist() == [0, 0]


def test_loss_that_says_nothing_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="returned no loss for the batch with .'input_ids'.: give a batch with labels"):
        search_structure(model, LoraConfig(), batch={"input_ids": tokens()}, progress=False)
    model.get_submodule("model.layers.1.self_attn.q_proj").weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="gradients of .* are not finite"):
        search_structure(model, LoraConfig(), batch=batch_of(), progress=False)


# ---- deltatuner's terms ----


def test_terms_against_their_formulas():
    shapes = [(3, 20), (20, 3), (7,)]
    pairs = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    wide = [(w.double(), g.double()) for w, g in pairs]
    norms = [torch.linalg.svdvals(t).sum() if t.dim() > 1 else t.norm() for pair in wide for t in pair]
    assert diversity(pairs) == pytest.approx(sum(a * b for a, b in zip(norms[::2], norms[1::2])).item(), rel=1e-5)
    flow = sum((w * g).abs().reshape(-1, shape[-1]).sum(1).mean() for (w, g), shape in zip(wide, shapes))
    assert saliency(pairs) == pytest.approx(flow.item(), rel=1e-5)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert expressivity(a, b) == pytest.approx((a - b).double().pow(2).sum().sqrt().item(), rel=1e-5)
    assert complexity([(20, 30, 4), (7,)]) == 4 * 46 + 7


def test_complexity_is_the_dimension_of_what_factors_can_make():
    """Rank of the derivative of (A, B) -> B A."""
    A, B = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda a, b: b @ a, (A, B))
    assert torch.linalg.matrix_rank(torch.cat([j.reshape(30, -1) for j in jacobian], 1)) == complexity([(5, 6, 3)])


@pytest.mark.parametrize(("method", "scale"), [(PeftType.LORA, 1e9), (PeftType.SSF, 1e5)])
def test_formula(method, scale, seed):
    e, c, d, s, latency = np.random.default_rng(seed).random(5) * 1e6
    config = DenasConfig(
        score="deltatuner", expressivity_weight=2, complexity_weight=3, diversity_weight=4, saliency_weight=5,
        latency_weight=6,
    )  # fmt: skip
    expected = ((2 * e + 3 * c + 4 * d) / 1e9 + 5 * s / scale) / (1 + 6 * latency)
    assert de_score(Terms(e, c, d, s), latency, config, method) == pytest.approx(expected)


# ---- The supernet ----


@pytest.mark.parametrize("config", [LoraConfig(target_modules="all-linear"), SsfConfig()], ids=["lora", "ssf"])
def test_candidate_of_the_supernet_is_the_model_made_anew(config, seed):
    """Same parameters, same logits, same gradients, same terms as a model built with that structure."""
    base, batch = llama(), {"input_ids": tokens()}
    space = SearchSpace(base, config, DenasConfig(score="deltatuner", granularity="module"), with_alpha=True)
    rng = np.random.default_rng(seed)
    candidates = [space.draw(rng) for _ in range(3)]
    fresh = [copy.deepcopy(base) for _ in candidates]
    with left_as_it_was(base, 0), supernet(base, space, batch, seed=1) as net:
        for codes, other in zip(candidates, fresh):
            codes[0, 0] = 1
            terms = net.terms(codes)
            model = get_peft_model(other, apply_structure(config, other, space.to_dict(codes))).train()
            made = dict(model.get_base_model().named_parameters())
            found = {
                name.replace(ADAPTER, "default"): p
                for name, p in base.named_parameters()
                if ADAPTER in name and p.grad is not None
            }
            assert {name for name, p in made.items() if p.requires_grad} == set(found)
            for name, parameter in found.items():
                made[name].data.copy_(parameter.data)
            logits = model(**batch).logits
            logits.sum().backward()
            assert torch.allclose(logits, base(**batch).logits, atol=1e-5)
            for name, parameter in found.items():
                assert torch.allclose(parameter.grad, made[name].grad, rtol=1e-3, atol=1e-4), name
            pairs = [(made[name].detach(), made[name].grad) for name in found]
            assert terms.diversity == pytest.approx(diversity(pairs), rel=1e-3)
            assert terms.saliency == pytest.approx(saliency(pairs), rel=1e-3)


def test_candidate_is_distributed_as_if_drawn_anew():
    """B's entries are uniform in +-1/sqrt(r), A's in +-1/sqrt(I)."""
    base = llama()
    space = SearchSpace(base, LoraConfig(), DenasConfig(score="deltatuner"), with_alpha=True)
    codes = space.canonical(np.array([[1, 3, 2], [0, 0, 0]]))  # layer 0, rank 4, alpha 3 r
    with left_as_it_was(base, 0), supernet(base, space, {"input_ids": tokens()}, seed=2) as net:
        net.apply(codes)
        layer = base.model.layers[0].self_attn.q_proj
        A, B = layer.factors(ADAPTER)
        assert A.shape == (4, 16) and B.shape == (16, 4) and layer.scaling[ADAPTER] == 3
        assert 0.9 / 4**0.5 < B.abs().max() <= 1 / 4**0.5 and 0.9 / 16**0.5 < A.abs().max() <= 1 / 16**0.5


def test_sft_has_no_score_of_this_kind():
    with pytest.raises(ValueError, match="SFT's deltas start at zero"):
        search_structure(
            llama(), SftConfig(density=0.1), DenasConfig(score="deltatuner"), batch=batch_of(), progress=False
        )


# ---- Examples ----


def test_batch_from_the_tokenizer():
    tokenizer = make_tokenizer()
    model = llama()
    with pytest.raises(ValueError, match=r"has the token \d+, but the model has 50 of them"):
        make_batches(model, DenasConfig(), tokenizer, None)
    model.resize_token_embeddings(len(tokenizer))
    (batch,) = make_batches(model, DenasConfig(batch_size=3, sequence_length=200), tokenizer, None)
    assert batch["input_ids"].shape == (3, 200) and torch.equal(batch["labels"], batch["input_ids"])
    assert tokenizer.decode(batch["input_ids"][0]).startswith("The river")


def test_classifier_needs_labels():
    with pytest.raises(ValueError, match="is no language model, so that no labels can be made"):
        make_batches(bert(), DenasConfig(), make_tokenizer(), None)
    with pytest.raises(ValueError, match="give a `batch` .* or the `tokenizer`"):
        make_batches(bert(), DenasConfig(), None, None)
    with pytest.raises(ValueError, match="batch must be"):
        make_batches(bert(), DenasConfig(), None, [tokens()])
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 2])}
    result = search_structure(bert(), LoraConfig(task_type="SEQ_CLS"), batch=batch, progress=False)
    assert result.score > 0
