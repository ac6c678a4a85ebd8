"""State-space models, and hybrids of them with attention: they predict the next token from a state of fixed size."""

from tuner.families import Architecture, Family
from tuner.families.gpt import LLAMA

# The fused kernels of a GPU multiply by these weights themselves. An adapter beside such a module is passed by there without a
# word, although the sequential path of a CPU uses it; peft refuses out_proj for most of these architectures.
FUSED = "the fused kernel reads its weight directly and would pass the adapter by"
IN_PROJ, NONE = frozenset({"in_proj"}), frozenset[str]()
KERNELS = frozenset({"mamba_ssm", "causal_conv1d"})
NO_CLASSES = frozenset({"sequence", "token"})
MAMBA1 = Architecture(
    IN_PROJ, NONE, lacks=NO_CLASSES, left_out=dict.fromkeys(("x_proj", "dt_proj", "out_proj"), FUSED), kernels=KERNELS
)
RENAMED = "peft 0.21 takes these names for the routed experts, and adapts those instead of the shared one"
EXPERTS = "experts are stored as one tensor, not as linears"
CARRIED = "transformers carries the state of its recurrent layers over from one document of a row to the next"
SHARED = "it is the model's own small adapter of a block that its layers share"


def hybrid(*extra: str, lacks: frozenset[str] = NO_CLASSES, not_packed: str = CARRIED, **left_out: str) -> Architecture:
    """Mamba-2 blocks beside a Llama's attention and feed-forward."""
    linears = LLAMA.linears | {"in_proj", *extra}
    return Architecture(
        linears, LLAMA.attention, not_packed=not_packed, lacks=lacks, left_out=left_out or {"out_proj": FUSED}, kernels=KERNELS
    )


FAMILY = Family(
    name="mamba",
    heads=frozenset({"causal", "sequence", "token"}),
    architectures={
        "mamba": MAMBA1,
        "falcon_mamba": MAMBA1,
        "mamba2": Architecture(IN_PROJ, NONE, not_packed=CARRIED, lacks=NO_CLASSES, left_out={"out_proj": FUSED}, kernels=KERNELS),
        "jamba": hybrid("x_proj", "out_proj", lacks=frozenset({"token"}), not_packed="", dt_proj=FUSED, router=EXPERTS),
        "bamba": hybrid(),
        "falcon_h1": hybrid(),
        "nemotron_h": Architecture(
            linears=LLAMA.attention | {"up_proj", "down_proj", "in_proj"},
            attention=LLAMA.attention,
            lacks=NO_CLASSES,
            not_packed=CARRIED,
            left_out={"out_proj": FUSED},
            kernels=KERNELS,
        ),
        "zamba2": Architecture(
            linears=LLAMA.attention | {"gate_up_proj", "down_proj", "in_proj"},
            attention=LLAMA.attention,
            lacks=frozenset({"token"}),
            not_packed=CARRIED,
            left_out={"out_proj": FUSED, "linear": SHARED, "0": SHARED, "1": SHARED},
            kernels=KERNELS,
        ),
        "qwen3_next": Architecture(
            linears=LLAMA.attention | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
            attention=LLAMA.attention,
            not_packed=CARRIED,
            left_out=dict.fromkeys(("gate_proj", "up_proj", "down_proj", "shared_expert_gate"), RENAMED),
            kernels=frozenset({"fla", "causal_conv1d"}),
        ),
    },
    keep={
        "lm_head": "it is tied to the embedding in small models, and an error in it reaches every token",
        "conv1d": "it is no linear, and the fused kernel reads its weight directly",
    },
)
