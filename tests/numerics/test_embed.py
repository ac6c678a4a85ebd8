"""The contrastive and cosine losses, and the figures of retrieval, against sentence-transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.data.example import Texts
from tuner.data.rows import BadRows, Row
from tuner.errors import DataError
from tuner.heads import embedding
from tuner.tasks import embed


def bert(**config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.BertConfig(
        vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, **config
    )
    model = transformers.BertModel(made, add_pooling_layer=False)
    return model.eval()


def draw(seed: int, length: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows(count: int, negatives: int = 1) -> list[Texts]:
    return [
        Texts([draw(100 * row + at, 3 + (row + at) % 5) for at in range(2 + negatives)], score=row / count) for row in range(count)
    ]


class Given(torch.nn.Module):
    """What sentence-transformers calls a model, over vectors that are there already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def theirs(loss: Any, vectors: list[torch.Tensor], labels: Any = None) -> torch.Tensor:
    return loss([{"sentence_embedding": each} for each in vectors], labels)


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_the_contrastive_loss_is_sentence_transformers(negatives: int) -> None:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model, examples = bert(), rows(6, negatives)
    objective = embed.objective(model, _Tokenizer(), embed.Options(scale=15.0))
    vectors = [embedding.vectors(model, [row.texts[at] for row in examples], "mean", "cpu").clone() for at in range(2 + negatives)]
    expected = theirs(MultipleNegativesRankingLoss(Given(), scale=15.0), vectors)
    torch.testing.assert_close(objective(objective.collate(examples)) / 6, expected)
    assert expected > 0.5


def test_the_cosine_loss_is_sentence_transformers() -> None:
    from sentence_transformers.losses import CosineSimilarityLoss

    model, examples = bert(), rows(6, 0)
    objective = embed.objective(model, _Tokenizer(), embed.Options(loss="cosine"))
    vectors = [embedding.vectors(model, [row.texts[at] for row in examples], "mean", "cpu").clone() for at in range(2)]
    expected = theirs(CosineSimilarityLoss(Given()), vectors, torch.tensor([row.score for row in examples]))
    torch.testing.assert_close(objective(objective.collate(examples)) / 6, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_in_parts_has_the_gradient_of_the_whole(dropout: float) -> None:
    """With dropout the chance of the parts is not that of the whole: there the second pass must repeat the first."""
    model, examples = bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout), rows(7, 2)
    objective = embed.objective(model, _Tokenizer(), embed.Options())
    model.train(dropout > 0)

    def gradients(size: int) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(5)
        model.zero_grad()
        total = 0.0
        given = objective.begin(examples, size)
        for at in range(0, len(given), size):
            loss = objective(objective.collate(given[at : at + size]))
            loss.backward()
            total += loss.item()
        return total, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    parts, gradients_of_parts = gradients(3)
    if dropout:
        # The same chance, with a graph over all parts at once.
        torch.manual_seed(5)
        model.zero_grad()
        batches = [objective.collate(examples[at : at + 3]) for at in range(0, 7, 3)]
        found = [embedding.embed(model, batch, "mean") for batch in batches]
        split = [[vectors[role] for role in embed._roles(batch)] for vectors, batch in zip(found, batches, strict=True)]
        anchors, candidates = torch.cat([each[0] for each in split]), torch.cat([each[at] for at in (1, 2) for each in split])
        whole = torch.nn.functional.cross_entropy(20 * anchors @ candidates.T, torch.arange(7), reduction="sum")
        whole.backward()
        wanted, expected = whole.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    else:
        wanted, expected = gradients(7)
    assert parts == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(gradients_of_parts, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert max(float(each.abs().max()) for each in expected) > 1e-2


def test_the_same_text_is_no_negative_for_itself() -> None:
    model = bert()
    once = rows(4, 0)
    twice = [*once, Texts([draw(999, 4), once[0].texts[1]])]
    objective = embed.objective(model, _Tokenizer(), embed.Options())
    with torch.no_grad():
        batch = objective.collate(twice)
        vectors = embedding.embed(model, batch, "mean")
        scores = 20 * vectors[:5] @ vectors[5:].T
    scores[0, 4] = scores[4, 0] = -torch.inf
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(5), reduction="sum")
    torch.testing.assert_close(objective(batch), expected)


def test_retrieval_is_measured_as_sentence_transformers_does() -> None:
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    torch.manual_seed(0)
    anchors, candidates = (torch.nn.functional.normalize(torch.randn(40, 6), dim=-1) for _ in range(2))
    candidates = torch.nn.functional.normalize(candidates + 0.5 * anchors, dim=-1)

    class Vectors:
        similarity_fn_name, similarity = "cosine", staticmethod(lambda one, other: one @ other.T)

        def encode(self, texts: list[str], **_: Any) -> torch.Tensor:
            return torch.stack([(anchors if text[0] == "q" else candidates)[int(text[1:])] for text in texts])

        encode_query = encode_document = encode

    told = InformationRetrievalEvaluator(
        {f"q{at}": f"q{at}" for at in range(40)}, {f"d{at}": f"d{at}" for at in range(40)}, {f"q{at}": {f"d{at}"} for at in range(40)},
        accuracy_at_k=[1, 10], precision_recall_at_k=[1, 10], mrr_at_k=[10], ndcg_at_k=[10], map_at_k=[10], score_functions={"cosine": Vectors.similarity},
    )  # fmt: skip
    expected = told.compute_metrices(Vectors())["cosine"]
    similar = anchors @ candidates.T
    ranks = [int((similar[at] > similar[at, at]).sum()) + 1 for at in range(40)]
    ours = embed.retrieval(ranks)
    assert ours["recall@1"] == pytest.approx(expected["recall@k"][1], abs=1e-4)
    assert ours["recall@10"] == pytest.approx(expected["recall@k"][10], abs=1e-4)
    assert ours["MRR@10"] == pytest.approx(expected["mrr@k"][10], abs=1e-4)
    assert ours["nDCG@10"] == pytest.approx(expected["ndcg@k"][10], abs=1e-4)
    assert 0.1 < ours["recall@10"] < 1


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sentence_transformers_opens_the_result_and_makes_the_same_vectors(tmp_path: Path, tokenizer: Any, pooling: Any) -> None:
    from sentence_transformers import SentenceTransformer

    model = bert()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embedding.describe(tmp_path, {"pooling": pooling})
    texts = ["list the virtual machine", "show", "delete az vm network"]
    encoded = SentenceTransformer(str(tmp_path), device="cpu").encode(texts, convert_to_tensor=True)
    ours = embedding.vectors(model, [list(tokenizer(text)["input_ids"]) for text in texts], pooling, "cpu")
    torch.testing.assert_close(ours, encoded)


@pytest.mark.parametrize(
    ("options", "record", "said"),
    [
        ({}, {"anchor": "a"}, '"positive" is None, expected text; found "anchor"'),
        ({}, {"anchor": "a", "positive": "b", "negative": 3}, '"negatives[0]" is 3, expected text'),
        ({}, {"anchor": "a", "positive": "b", "negatives": "c"}, "\"negatives\" is 'c', expected a list of texts"),
        ({"loss": "cosine"}, {"sentence1": "a", "sentence2": "b"}, '"score" is None, expected a number from -1 to 1'),
        ({"loss": "cosine"}, {"sentence1": "a", "sentence2": "b", "score": 5}, '"score" is 5, expected a number from -1 to 1'),
        ({"max_tokens": 2}, {"anchor": "list the vm", "positive": "b"}, "expected at most max_tokens: 2"),
    ],
)
def test_texts_that_cannot_be_compared_are_said(tokenizer: Any, options: dict[str, Any], record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        list(embed.examples(iter([Row("f:1", record)]), tokenizer, embed.Options(**options), BadRows()))
    assert said in str(error.value)


class _Tokenizer:
    pad_token_id = 0


def test_a_model_that_gives_one_vector_to_all_texts_or_no_number_finds_nothing() -> None:
    from tuner.recipe import Evaluate

    found = []
    for value in (1.0, float("nan")):
        model = bert()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, torch.nn.LayerNorm):
                    layer.weight.zero_()
                    layer.bias.fill_(value)
        given = [(Row(f"f:{at}", {}), each) for at, each in enumerate(rows(4))]
        found.append(embed.scores(model, None, given, embed.Options(), Evaluate())["recall@1"])
    assert found == [0.0, 0.0]


def test_no_step_is_left_with_a_single_row_that_has_nothing_to_be_told_from() -> None:
    from tuner.data.order import plan

    lengths = [5] * 9
    assert sorted(map(len, plan(lengths, 8, 0, 0))) == [1, 8]
    batches = plan(lengths, 8, 0, 0, least=2)
    assert sorted(map(len, batches)) == [9]
    assert sorted(map(len, plan(lengths, 2, 0, 0, least=2))) == [2, 2, 2, 3]
    assert sorted(map(len, plan([5] * 10, 8, 0, 0, least=2))) == [2, 8]
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    objective = embed.objective(bert(), type("T", (), {"pad_token_id": 0}), embed.Options())
    assert objective.least_rows == 2
    objective.train()
    with pytest.raises(DataError, match="batch_size has to be 2 or more"):
        objective.begin(rows(1, negatives=0), 8)


def test_the_last_heldout_rows_are_told_apart_from_others_however_few_they_are() -> None:
    from tuner.objective import heldout_loss

    objective = embed.objective(bert(), type("T", (), {"pad_token_id": 0}), embed.Options())
    assert heldout_loss(objective, rows(1, negatives=0))["heldout_loss"] == 0.0
    seventeen = heldout_loss(objective, rows(17, negatives=0))["heldout_loss"]
    batch = objective.collate(sorted(rows(17, negatives=0), key=lambda row: len(row.ids)))
    with torch.no_grad():
        assert seventeen == pytest.approx(float(objective(batch)) / 17, abs=1e-4)
