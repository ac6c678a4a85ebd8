"""What training computes in its own way is what torch, peft and transformers compute: values and gradients, in float32 and bfloat16."""

import copy
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.grid.architectures import SMALL
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tuner import attention, dropout, fused, likelihood
from tuner.attention import attend
from tuner.checkpoint import load_model
from tuner.documents import Documents, documents
from tuner.families import family_of
from tuner.heads.causal import NextTokenLoss, supervised_log_likelihood
from tuner.memory import COMPILED
from tuner.methods import lora


class _Layer:
    is_causal = True
    num_key_value_groups = 3


def heads(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = ((rows, 6, length, 16), (rows, 2, length, 16), (rows, 2, length, 16))
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k) v in float64, as in Vaswani et al. 2017, equation 1."""
    key, value = (each.repeat_interleave(3, 1) for each in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    return (scores.masked_fill(~causal, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("most", [2**19, 2000])
@pytest.mark.parametrize("length", [1, 7, 200, 700])
@pytest.mark.parametrize("masked", ["causal", "window", "both ways"])
def test_attention_is_attention(length: int, masked: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    inputs = heads(2, length, torch.bfloat16)
    mask = None
    if masked != "causal":
        mask = torch.ones(2, 1, length, length, dtype=torch.bool)
        mask = mask.tril().triu(-3) if masked == "window" else mask
        mask[1, :, :, length - length // 3 :] &= torch.eye(length, dtype=torch.bool)[:, length - length // 3 :]  # a padded row
    found, _ = attend(_Layer(), *inputs, mask, scaling=0.3)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(found, inputs, slope.to(found.dtype))
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    wanted = exact(*doubles, mask, 0.3)
    of_wanted = torch.autograd.grad(wanted, doubles, slope.double())
    assert found.shape == (2, length, 6, 16) and found.dtype == torch.bfloat16
    for one, other in zip((found, *gradients), (wanted, *of_wanted), strict=True):
        assert float((one - other).norm() / (other.norm() + 1e-3)) < 1.5e-2, "bfloat16 has 8 bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_attended_to_alone(dtype: torch.dtype) -> None:
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, [0, 5, 6]] = starts[1, [0, 9]] = True
    packed = Documents(starts)
    assert packed.lengths == [5, 1, 6, 9, 3] and packed.bounds.tolist() == [0, 5, 6, 12, 21, 24]
    inputs = heads(2, 12, dtype)
    with documents(packed):
        found, _ = attend(_Layer(), *inputs, None, scaling=0.25)
    wanted = exact(*(each.double() for each in inputs), packed.mask, 0.25)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
    alone, _ = attend(_Layer(), *(each[1:, :, 9:] for each in inputs), None, scaling=0.25)
    torch.testing.assert_close(found[1:, 9:], alone, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def adapted(dtype: torch.dtype, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8, bias=False)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"], **options))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def results(model: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    trained = [each for each in model.parameters() if each.requires_grad]
    y = model(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *trained])]


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_linear_and_its_adapter_are_pefts(dtype: torch.dtype, apart: float) -> None:
    own, theirs = adapted(dtype), adapted(dtype)
    fused.use(own)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(results(own, x), results(theirs, x), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert float((one - other).float().norm() / other.float().norm()) < apart


def test_a_copy_computes_with_its_own_adapter() -> None:
    model, x = adapted(torch.float32), torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    fused.use(model)
    before = model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(other(x), before)
    assert float((model(x) - before).detach().abs().max()) > 0.1


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(checkpoints: Any) -> None:  # noqa: F811
    """Adapters, norms and gated products, compiled and not."""
    from torch._dynamo.utils import counters

    ids, found = torch.arange(3, 43).view(2, 20), []
    counters.clear()
    for compiled in (False, True):
        opened = load_model(checkpoints("llama"))
        torch.manual_seed(0)
        model = lora.prepare(opened, lora.Options(rank=4), *family_of("llama"), []).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        with fused.compiled(model) if compiled else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    assert counters["stats"]["unique_graphs"]
    assert len(found[0]) == len(found[1]) == 1 + 2 * 7 * 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["one for all queries", "of numbers"])
def test_masks_of_other_kinds_are_read_as_torch_reads_them(kind: str) -> None:
    """(B, 1, 1, T), and float32's least number, which is minus infinity in bfloat16, in a row that may read nothing at all."""
    query, key, value = heads(2, 9, torch.bfloat16)
    keep = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    keep[1, :, :, 6:] = False
    if kind == "one for all queries":
        mask = keep[:, :, :1]
    else:
        keep[1, :, 7:] = False
        mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    found, _ = attend(_Layer(), query, key, value, mask, scaling=0.3)
    wanted = exact(query.double(), key.double(), value.double(), keep.expand(2, 1, 9, 9), 0.3)
    read = keep.expand(2, 1, 9, 9).any(-1)[:, 0]
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[read].double(), wanted[read], rtol=0.02, atol=0.02)


def test_outputs_that_wait_are_forgotten() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(_Attends(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))  # type: ignore[arg-type]
    fused.use(model)
    inner = model.base_model.model
    x = torch.randn(3, 24)
    waiting = weakref.ref(inner.q_proj(x).grad_fn)
    assert waiting() is not None, "k's and v's outputs hold what made them"
    fused.forget()
    assert waiting() is None
    assert torch.equal(inner.k_proj(x), inner.k_proj(x))


class _Attends(nn.Module):
    """Three linears on one input, or two of them on another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 40), nn.Linear(24, 8, bias=False), nn.Linear(24, 8)

    def forward(self, x: Tensor, other: Tensor | None = None, *, without: bool = False) -> Tensor:
        other = x if other is None else other
        q, k = self.q_proj(x), self.k_proj(other)
        return q if without else torch.cat([q, k.sin() * self.v_proj(other)], -1)


@pytest.mark.parametrize("way", ["all", "another input", "one unused", "one switched off", "nothing learned"])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_linears_with_one_input_and_their_adapters_are_pefts(
    way: str, dtype: torch.dtype, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    asked, compute = [], fused._adapted
    monkeypatch.setattr(fused, "_adapted", lambda layers, x: asked.append(len(layers)) or compute(layers, x))  # type: ignore[func-returns-value]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"k_proj": 2})
        model: Any = get_peft_model(_Attends().to(dtype), config)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        if way == "one switched off":
            model.base_model.model.k_proj.enable_adapters(False)
        models.append(model)
    fused.use(models[0])
    results = []
    for model in models:
        x, other = (
            torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_() for seed in (1, 2)
        )
        given = {"other": other} if way == "another input" else {"without": True} if way == "one unused" else {}
        trained = [each for each in model.parameters() if each.requires_grad]
        with torch.set_grad_enabled(way != "nothing learned"):
            # Twice, with an input that differs: nothing of the first is left over.
            found = [model(x, **given), model(x * 2, **given)]
        if way != "nothing learned":
            total: Any = sum(each.float().square().sum() for each in found)
            gradients = torch.autograd.grad(total, [x, other, *trained], allow_unused=True)
            # What is not used has no gradient, or zero.
            found += [torch.zeros(1) if each is None or not each.any() else each for each in gradients]
        results.append(found)
    # How many linears are computed at a time; an input that differs is another time.
    together = {"another input": [3, 3, 3, 3], "one switched off": [2, 2]}.get(way, [3, 3])
    assert asked == together
    for one, wanted in zip(*results, strict=True):
        assert one.dtype == wanted.dtype and one.shape == wanted.shape
        assert float((one - wanted).float().norm() / (wanted.float().norm() + 1e-6)) < apart


@pytest.mark.parametrize("what", ["off", "dora", "dropout", "merged"])
def test_what_is_no_plain_adapter_is_left_to_peft(what: str) -> None:
    options = {"dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}}.get(what, {})
    own, theirs = adapted(torch.float32, **options), adapted(torch.float32, **options)
    fused.use(own)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    for model in (own, theirs):
        if what == "off":
            model.base_model.disable_adapter_layers()
        if what == "merged":
            model.merge_adapter()
    torch.manual_seed(3)
    found = own(x)
    torch.manual_seed(3)
    assert torch.equal(found, theirs(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("most", [2**22, 250])
def test_the_loss_without_logits_is_the_loss(bias: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(likelihood.MOST_WIDE, "cpu", most)
    monkeypatch.setitem(likelihood.MOST_LOGITS, "cpu", 2 * most)
    torch.manual_seed(0)
    layer, hidden = nn.Linear(16, 100, bias=bias), torch.randn(9, 16, requires_grad=True)
    targets = torch.randint(0, 100, (9,))
    wanted = nn.functional.cross_entropy(layer(hidden), targets, reduction="sum")
    found = likelihood.loss_sum(hidden, layer, targets)
    inputs = [hidden, *layer.parameters()]
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found / 7, inputs), torch.autograd.grad(wanted / 7, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [2**22, 250])
def test_each_loss_without_logits_is_that_of_its_token(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(likelihood.MOST_WIDE, "cpu", most)
    monkeypatch.setitem(likelihood.MOST_LOGITS, "cpu", 2 * most)
    torch.manual_seed(0)
    layer, hidden = nn.Linear(16, 100).requires_grad_(False), torch.randn(9, 16, requires_grad=True)
    targets, weights = torch.randint(0, 100, (9,)), torch.randn(9)
    with pytest.raises(ValueError, match="cannot be had without logits"):
        likelihood.loss_each(hidden, nn.Linear(16, 100), targets)
    wanted = nn.functional.cross_entropy(layer(hidden), targets, reduction="none")
    found = likelihood.loss_each(hidden, layer, targets)
    torch.testing.assert_close(found, wanted)
    (one,), (other,) = (torch.autograd.grad((each.square() * weights).sum(), [hidden]) for each in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_loss_without_logits_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(likelihood.MOST_WIDE, "cpu", 200)
    torch.manual_seed(0)
    layer, hidden = nn.Linear(16, 100).bfloat16(), (3 * torch.randn(9, 16)).bfloat16().requires_grad_()
    targets = torch.randint(0, 100, (9,))
    exact, doubles = copy.deepcopy(layer).double(), hidden.detach().double().requires_grad_()
    wanted = nn.functional.cross_entropy(exact(doubles), targets, reduction="sum")
    found = likelihood.loss_sum(hidden, layer, targets)
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(float(wanted.detach()), rel=2e-3)
    gradients = torch.autograd.grad(found, [hidden, *layer.parameters()])
    for one, other in zip(gradients, torch.autograd.grad(wanted, [doubles, *exact.parameters()]), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-2, "bfloat16 has 8 bits"


@pytest.mark.parametrize("model_type", [name for name in SMALL if "causal" in family_of(name)[0].heads])
def test_logits_that_are_more_than_the_output_layers_are_noticed(checkpoints: Any, model_type: str) -> None:  # noqa: F811
    model = load_model(checkpoints(model_type))
    if model_type == "gemma2":
        assert likelihood.plain_output(model) is None, "its logits are capped"
    ids = torch.arange(3, 40).view(1, -1)
    batch = {"input_ids": ids, "labels": ids}
    by_logits, _ = supervised_log_likelihood(model, batch)
    torch.testing.assert_close(NextTokenLoss(model, 0)(batch), -by_logits.sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])  # the output layer is the embeddings, or a matrix of its own
def test_the_loss_without_logits_reaches_new_tokens(checkpoints: Any, model_type: str) -> None:  # noqa: F811
    model = load_model(checkpoints(model_type))
    model = lora.prepare(model, lora.Options(rank=2), *family_of(model_type), [], new_tokens=range(20, 30)).eval()
    objective, ids = NextTokenLoss(model, 0), torch.arange(3, 40).view(1, -1)
    assert objective._layer[0] is not None
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    assert any("trainable_tokens" in name for name, _ in trained)
    with torch.no_grad():
        for _, each in trained:  # of an adapter one half is zero at first
            each += 0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    found, wanted = objective(batch), -supervised_log_likelihood(model, batch)[0].sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    gradients = (torch.autograd.grad(loss, [each for _, each in trained]) for loss in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with model.disable_adapter(), torch.no_grad():
        off = objective(batch)
        torch.testing.assert_close(off, -supervised_log_likelihood(model, batch)[0].sum(), rtol=1e-5, atol=1e-4)
    assert abs(float(off - found)) > 0.01


def test_scores_that_an_architecture_caps_are_capped(checkpoints: Any) -> None:  # noqa: F811
    """transformers' sdpa leaves Gemma 2's cap out without a word; eager attention and engines have it."""
    from transformers import AutoModelForCausalLM

    path = checkpoints("gemma2").path
    ids = torch.arange(3, 40).view(1, -1)
    found = {}
    for cap in (0.01, None):
        options = {"attn_logit_softcapping": cap, "query_pre_attn_scalar": 1}
        own, theirs = (
            AutoModelForCausalLM.from_pretrained(path, attn_implementation=each, **options) for each in ("sdpa", "eager")
        )
        attention.use(own)
        with torch.no_grad():
            torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
            found[cap] = theirs(ids).logits
    assert float((found[0.01] - found[None]).abs().max()) > 1e-4, "the cap is felt"


def drawn(rows: int, group: int, length: int, width: int) -> list[torch.Tensor]:
    """query, key and value in float64."""
    torch.manual_seed(0)
    shapes = (rows, group, length, width), (rows, length, width), (rows, length, width)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attended(query: Tensor, key: Tensor, value: Tensor, how: attention._How) -> Tensor:
    found: Tensor = attention._Attention.apply(query, key, value, None, how)  # type: ignore[no-untyped-call]
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [2**19, 130])  # scores at a time
def test_dropout_leaves_weights_out_and_scales_the_others(causal: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    query, key, _ = drawn(3, 2, 128, 8)
    one_each = torch.eye(128, dtype=torch.float64).expand(3, -1, -1)  # the values; what comes out are the weights
    query = torch.cat([query, query[..., :1].expand(-1, -1, -1, 120)], -1)
    key = torch.cat([key, torch.zeros(3, 128, 120, dtype=torch.float64)], -1)
    plain, dropped, again, other = (
        attended(query, key, one_each, attention._How(0.3, causal, rate, seed, True))
        for rate, seed in ((0.0, 0), (0.1, 7), (0.1, 7), (0.1, 8))
    )
    kept = dropped != 0
    there = plain != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.9, rtol=1e-4, atol=0)
    assert 1 - float(kept.sum() / there.sum()) == pytest.approx(0.1, abs=4 * (0.09 / int(there.sum())) ** 0.5)
    assert torch.equal(dropped, again)
    ones = dropout.kept(torch.empty(1000, dtype=torch.bfloat16), 0.1, 7, 0)
    assert set(ones.tolist()) == {0.0, 1.0}, "1 / 0.9 is none of bfloat16's numbers"
    # Two seeds agree on as many as independent draws do: 0.81 + 0.01.
    agree = float(((other != 0) == kept)[there].float().mean())
    assert agree == pytest.approx(0.82, abs=0.01)


# Of 66 tokens queries are in two blocks; of 9 their weights are kept with 4 channels and not with 2.
@pytest.mark.parametrize("sizes", [(2, 2, 9, 4), (2, 2, 9, 2), (1, 1, 66, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [2**19, 64])
def test_the_gradient_with_dropout_is_that_of_what_was_computed(
    causal: bool, most: int, sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    how = attention._How(0.5, causal, 0.3, 5, True)
    assert torch.autograd.gradcheck(lambda *given: attended(*given, how), drawn(*sizes), fast_mode=sizes[2] > 9)


def test_weights_are_kept_only_of_short_rows_that_something_is_learned_of() -> None:
    found = {}
    for length, learning in ((12, True), (12, False), (13, True)):
        query, key, value = drawn(2, 2, length, 4)
        saved = attended(query, key, value, attention._How(0.5, True, 0.0, 0, learning)).grad_fn.saved_tensors  # type: ignore[union-attr]
        found[length, learning] = saved[-1] is not None
    assert attention.KEPT == 3 and found == {(12, True): True, (12, False): False, (13, True): False}


def test_an_encoder_drops_attention_as_its_configuration_says() -> None:
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
    }
    found = []
    for used in (False, True):
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(vocab_size=100, attention_probs_dropout_prob=0.5, **sizes)).train()
        if used:
            attention.use(model)
        ids, mask = torch.arange(5, 85).view(2, 40), torch.ones(2, 40, dtype=torch.long)
        mask[1, 30:] = 0
        with torch.no_grad():
            runs = torch.stack([model(ids, attention_mask=mask).last_hidden_state for _ in range(500)])
        assert float((runs[0] - runs[1]).abs().max()) > 0.01, "chance"
        state = torch.get_rng_state()
        first = model(ids, attention_mask=mask).last_hidden_state
        torch.set_rng_state(state)
        assert torch.equal(first, model(ids, attention_mask=mask).last_hidden_state), "the same chance, the same result"
        found.append((runs.mean(0)[mask.bool()], runs.std(0)[mask.bool()]))
    (mean, spread), (own_mean, own_spread) = found
    error = float(spread.max()) / 500**0.5
    assert float((own_mean - mean).abs().max()) < 7 * error
    assert float(own_spread.mean()) == pytest.approx(float(spread.mean()), rel=0.02)


@pytest.mark.parametrize("length", [1700, 4096])
def test_products_of_long_rows_are_of_fewer_shapes_than_are_kept_compiled(length: int) -> None:
    shapes = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bmm" in str(func):
                shapes.add((func, *(each.shape for each in args)))
            return func(*args, **(kwargs or {}))

    query = torch.empty(12, 3, length, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = (torch.empty(12, length, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    with Seen():
        attended(query, key, value, attention._How(0.125, True, 0.0, 0, True)).sum().backward()
    # A layer has linears and adapters, too. With 67 shapes of 1,700 tokens a backward pass took twice as long.
    assert 8 < len(shapes) <= int(COMPILED["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) - 20
