"""Encoders that read the whole text at once: masked words, classes, tags, vectors."""

from dataclasses import replace

from tuner.families import Architecture, Family

BERT = Architecture(
    linears=frozenset({"query", "key", "value", "dense"}),
    attention=frozenset({"query", "key", "value"}),
    served=frozenset({"embedding", "sequence", "token"}),
)
DEBERTA_ATTENTION = frozenset({"query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"})

FAMILY = Family(
    name="bert",
    heads=frozenset({"masked", "sequence", "token", "embedding"}),
    architectures={
        "bert": BERT,
        "roberta": replace(BERT, positions_from_padding=True),
        # vLLM reads its token head as another class.
        "electra": replace(BERT, served=frozenset({"embedding", "sequence"})),
        "distilbert": Architecture(
            linears=frozenset({"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}),
            attention=frozenset({"q_lin", "k_lin", "v_lin", "out_lin"}),
        ),
        "modernbert": Architecture(
            linears=frozenset({"Wqkv", "Wo", "Wi"}),
            attention=frozenset({"Wqkv"}),
            served=frozenset({"embedding", "sequence", "token"}),
        ),
        "deberta-v2": Architecture(linears=DEBERTA_ATTENTION | {"dense"}, attention=DEBERTA_ATTENTION),
    },
    keep={
        "decoder": "it is tied to the embedding, and an error in it reaches every token",
        "pooler": "it belongs to the head, which is trained in full",
    },
    head_parts=frozenset({"pooler"}),
)
