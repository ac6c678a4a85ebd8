"""Decoder-only transformers that predict the next token."""

from dataclasses import replace

from tuner.families import Architecture, Family

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
LLAMA = Architecture(
    linears=ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    attention=ATTENTION,
    live_adapter=True,
    served=frozenset({"embedding", "sequence", "token"}),
    not_quantized="",
)

FAMILY = Family(
    name="gpt",
    heads=frozenset({"causal", "sequence", "token", "embedding"}),
    architectures={
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": LLAMA,
        "qwen3": LLAMA,
        "gemma": LLAMA,
        "gemma2": replace(LLAMA, served=frozenset()),
        "gemma3_text": Architecture(
            LLAMA.linears, LLAMA.attention, live_adapter=True, not_quantized="", lacks=frozenset({"token"})
        ),
        "phi": Architecture(
            linears=frozenset({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
            attention=frozenset({"q_proj", "k_proj", "v_proj", "dense"}),
            live_adapter=True,
        ),
        "phi3": Architecture(
            linears=frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
            attention=frozenset({"qkv_proj", "o_proj"}),
            live_adapter=True,
        ),
        "opt": Architecture(
            linears=frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
            attention=frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
            live_adapter=True,
            lacks=frozenset({"token"}),
            packed_here=True,
        ),
        "gpt_neox": Architecture(
            linears=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
            attention=frozenset({"query_key_value", "dense"}),
        ),
        # Its linears are transformers' Conv1D, which stores the transposed weight: peft adapts it, llm-compressor does not see
        # it, bitsandbytes has no 4 bits for it, and vLLM has no LoRA for it.
        "gpt2": Architecture(
            linears=frozenset({"c_attn", "c_proj", "c_fc"}),
            attention=frozenset({"c_attn"}),
            served=frozenset({"embedding", "sequence"}),
            not_quantized="it is not built of torch.nn.Linear, which quantization looks for",
            not_rounded="it is not built of torch.nn.Linear, and what was rounded would come back transposed",
        ),
    },
    keep={
        "lm_head": "it is tied to the embedding in small models, and an error in it reaches every token",
        "embed_tokens": "a server would need the whole table again for each adapter",
    },
)
