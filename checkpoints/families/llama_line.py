"""Rules that many families share: the tensor names of the Llama line."""

from checkpoints.rules import Rule

TRUNK = (
    Rule("model.embed_tokens.weight", "embed"),
    Rule("model.norm.weight", "final_norm"),
    Rule("lm_head.weight", "head", transpose=True),
    Rule("model.layers.{layer}.input_layernorm.weight", "layers/{layer}/attention_norm"),
    Rule("model.layers.{layer}.post_attention_layernorm.weight", "layers/{layer}/mlp_norm"),
)


def projections(block: str, names: dict[str, str]) -> tuple[Rule, ...]:
    """Weight and bias of each projection: name in the file to name in the tree."""
    rules = []
    for theirs, ours in names.items():
        prefix = f"model.layers.{{layer}}.{block}.{theirs}"
        rules.append(Rule(f"{prefix}.weight", f"layers/{{layer}}/{ours}/weight", transpose=True))
        rules.append(Rule(f"{prefix}.bias", f"layers/{{layer}}/{ours}/bias"))
    return tuple(rules)


ATTENTION = projections("self_attn", {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"})
GATED_MLP = projections("mlp", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})
QK_NORM = (
    Rule("model.layers.{layer}.self_attn.q_norm.weight", "layers/{layer}/q_norm"),
    Rule("model.layers.{layer}.self_attn.k_norm.weight", "layers/{layer}/k_norm"),
)
LLAMA_RULES = TRUNK + ATTENTION + GATED_MLP
IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
"""Old Llama checkpoints store the rotary frequencies."""
