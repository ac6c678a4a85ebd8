"""Decoder-only transformers that predict the next token."""

from tuner.families import Architecture, Family

LLAMA_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
LLAMA = Architecture(linears=LLAMA_ATTENTION | {"gate_proj", "up_proj", "down_proj"}, attention=LLAMA_ATTENTION, live_adapter=True)

FAMILY = Family(
    name="gpt",
    heads=frozenset({"causal"}),
    architectures={
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": LLAMA,
        "qwen3": LLAMA,
        # Its linears are transformers' Conv1D, which stores the transposed weight: peft adapts it, llm-compressor does not see
        # it, and vLLM has no LoRA for it.
        "gpt2": Architecture(
            linears=frozenset({"c_attn", "c_proj", "c_fc"}),
            attention=frozenset({"c_attn"}),
            live_adapter=False,
            quantizable=False,
        ),
    },
    keep={
        "lm_head": "it is tied to the embedding in small models, and an error in it reaches every token",
        "embed_tokens": "a server would need the whole table again for each adapter",
    },
)
