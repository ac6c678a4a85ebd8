"""A configuration of two small blocks for every architecture that a family lists."""

from typing import Any

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 1, "head_dim": 32}
MAMBA1 = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 32}

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neox": COMMON,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "phi": COMMON,
    "phi3": GROUPED,
    "opt": {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bert": COMMON,
    "roberta": COMMON,
    "electra": {**COMMON, "embedding_size": 64},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 256},
    "modernbert": {**COMMON, "global_attn_every_n_layers": 2, "local_attention": 64},
    "deberta-v2": {**COMMON, "relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"]},
    "mamba": MAMBA1,
    "falcon_mamba": MAMBA1,
    "mamba2": {**MAMBA1, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 32},
    "jamba": {
        **COMMON, "num_key_value_heads": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "bamba": {**COMMON, "num_key_value_heads": 1, "attn_layer_indices": [1], **MAMBA2},
    "falcon_h1": {**GROUPED, "mamba_d_ssm": 128, **MAMBA2},
    "nemotron_h": {
        **GROUPED, "layers_block_type": ["linear_attention", "full_attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 32,
    },
    "zamba2": {
        **COMMON, "num_key_value_heads": 2, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 32,
        "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 8,
    },
    "qwen3_next": {
        **GROUPED, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
}  # fmt: skip
