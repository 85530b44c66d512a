"""Map diffusers' names of a UNet to those of Stable Diffusion's original code (LDM, SGM), used by kohya and ComfyUI."""

__all__ = ["INNER", "NAMES", "RULES", "UNLESS"]

NAMES = frozenset({"down_blocks.0.resnets.0"})
UNLESS = frozenset[str]()

RULES = (
    (r"conv_in$", "input_blocks.0.0"),
    (r"time_embedding\.linear_1$", "time_embed.0"),
    (r"time_embedding\.linear_2$", "time_embed.2"),
    (r"add_embedding\.linear_1$", "label_emb.0.0"),
    (r"add_embedding\.linear_2$", "label_emb.0.2"),
    (r"down_blocks\.\d+\.resnets\.\d+", "input_blocks.{number}.0"),
    (r"down_blocks\.\d+\.attentions\.\d+", "input_blocks.{number}.1"),
    (r"down_blocks\.\d+\.downsamplers\.0\.conv$", "input_blocks.{number}.0.op"),
    (r"mid_block\.resnets\.0", "middle_block.0"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2"),
    (r"up_blocks\.\d+\.resnets\.\d+", "output_blocks.{number}.0"),
    (r"up_blocks\.\d+\.attentions\.\d+", "output_blocks.{number}.1"),
    (r"up_blocks\.\d+\.upsamplers\.0\.conv$", "output_blocks.{number}.{place}.conv"),
    (r"conv_norm_out$", "out.0"),
    (r"conv_out$", "out.2"),
)

INNER = (
    (r"^\.norm1$", ".in_layers.0"),
    (r"^\.conv1$", ".in_layers.2"),
    (r"^\.time_emb_proj$", ".emb_layers.1"),
    (r"^\.norm2$", ".out_layers.0"),
    (r"^\.conv2$", ".out_layers.3"),
    (r"^\.conv_shortcut$", ".skip_connection"),
)
