"""Arguments for a model's constructor: files from strangers may describe an architecture, and nothing else.

timm passes such arguments to its factories, in which some of them name a file or a host to read weights from, or a class."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from reslt.core.text import one_line

# Arguments of timm's constructors, and of the CIFAR ResNets', that describe an architecture by numbers, switches and
# short names: stages, widths and depths; stem, input and downsampling; attention, tokens and positions; blocks,
# normalization and activation; the head; regularization and initialization; and arguments of single families.
_NAMES = """
base_dim base_width block_config bottle_ratio cardinality channels ch_div depth depth_mult depths dim dims embed_dim
embed_dims expand_ratio expansion_ratio final_chs group_min_ratio group_size groups growth_rate growth_rates hidden_size
hidden_sizes init_channels initial_chs layers linear_out num_blocks num_features num_init_features num_levels reduction
stages w0 wa width width_factor width_mult widths wm

avg_down conv_bias down_kernel_size down_patch_size down_stride downsample downsample_kernel_size downsamples
dynamic_img_pad dynamic_img_size first_stride fix_stem img_size in_chans inplanes input_3x3 kernel_size kernel_sizes
output_stride pad_type patch_kernel patch_padding patch_size patch_sizes patch_stride replace_stem_pool stem_chs
stem_hidden_dim stem_kernel_size stem_size stem_stride stem_type stem_width strict_img_size strides

abs_win_pos_embed always_partition attn_ratio class_token cls_attn_layers focal_levels focal_windows head_dim head_mul
heads key_dim local_conv_size mask_unit_size no_embed_class num_heads num_kv_heads num_reg_tokens pos_embed pre_norm
q_pool q_stride qk_norm qkv_bias qkv_fused reg_tokens rope_temperature rope_type scale_attn_norm sr_ratios
use_abs_pos_emb use_pos_emb use_pos_embed use_rel_pos_bias use_rot_pos_emb use_shared_rel_pos_bias window_ratio
window_size window_sizes

aa_layer aa_stem_only act_layer attn_layer bias block_reduce_first bn_eps bn_momentum bn_size conv_mlp dw_act_layer
fc_norm final_norm mlp_bias mlp_ratio mlp_ratios norm_eps norm_layer norm_layer_cl pool_size preact proj_bias scale_mlp
scale_mlp_norm se_from_exp se_layer se_ratio swiglu_mlp use_grn use_post_norm

global_pool head_bias head_hidden_size head_init_scale head_norm head_norm_first pool_type use_fc_norm use_mlp_head

attn_drop_rate drop_block_rate drop_block_size fix_init init_values layer_scale layer_scale_init_value ls_init_value
memory_efficient patch_drop_rate pos_drop_rate proj_drop_rate weight_init zero_init_last

attn_head_dim_reduction attn_mlp_ratio attn_types b base_dims bidirectional bottleneck_width_ratio channel_attention
channel_attn_v2 channel_multiplier cls_ratio conv_init conv_ratio cpe_act crop_scale crpe_window d2_scales deepen_factor
depth_list depth_token_only dim_mul down_op down_ops down_pad downsample_block downsample_expand_ratios
downsample_ratio embed_norm eta expand_groups extra_norm_period extra_norm_stage fc_act_layer feature_dim ffn ffn_ratio
fused_conv fused_downsample global_att_blocks global_attn_indexes global_block_counts global_pos_size group head_widths
img_scale inc_sec inner_dim is_downsample_block k_r k_sec kernels layer_scale_init_values layerscale_value levels linear
local_up_to_layer locality_strength mask_unit_attn mbconv_expand_ratio mix_block_ratio mlp_ratio_token_only multi_conv
n_div neck_chans normalize_modulator num_blocks_list num_heads_inner num_heads_outer num_rnn_layers num_vit
outlook_attention parallel_depth partial_dim patch_norm pooling_scale pos_embs post_layers qk_dim rel_pos_dim
rel_pos_type repmixer_kernel_size res_scale_init_values scale_attn_inner se_downsamples sep_pos_embed sequential_attn
serial_depths shared_rel_pos shortcut shortcut_root small spatial_conv state_dim stem_bias stem_expand_ratio stem_mid_norm
stem_norm stride swiglu_align_to token_mixers tokens_norm transformer_depths transition_compression_ratio types union
use_abs_pos use_expand_proj use_lab use_layer_scale use_overlap_down use_post_norm_in_modulation use_rel_pos use_rope
vit_stem widen_factor width_list window_spec with_fc wss
"""
ARCHITECTURE = frozenset(_NAMES.split())
# Refused from every source, with the setting that does the same.
NEVER = {
    "cache_dir": "the environment variable HF_HOME moves timm's cache",
    "checkpoint_path": "--pretrained-file names a file of weights",
    "drop_path_rate": "give --drop-path",
    "drop_rate": "give --drop",
    "features_only": "it returns no logits",
    "num_classes": "the dataset states it",
    "out_indices": "it returns no logits",
    "pretrained": "give --pretrained",
}
SOURCE = re.compile(r"(hf-hub|local-dir):(.+)", re.DOTALL)
SHORT_NAME = re.compile(r"[A-Za-z0-9_]{0,40}")
MOST_VALUES, DEEPEST = 1000, 4


def model_source(name: str) -> tuple[str, str] | None:
    """'hf-hub:ORG/NAME' or 'local-dir:FOLDER' -> the source and the place there; None for any other model name."""
    found = SOURCE.fullmatch(name)
    return (found[1], found[2]) if found else None


def refused_arguments(names: Iterable[object], source: object = "--model-kwargs") -> list[str]:
    """Return a fault for each argument that is refused even if typed, because it loads weights or changes the output."""
    return [f"{source}: {str(name)[:40]}: {_never(name)}; leave it out" for name in names if _never(name)]


def foreign_arguments(arguments: object, file: object) -> list[str]:
    """Return a fault for each argument that a file may not state."""
    if not isinstance(arguments, dict):  # its own check reports it
        return []
    source = f"{file}: model_kwargs"
    others = [name for name, value in arguments.items() if not _never(name) and not describes_architecture(name, value)]
    return refused_arguments(arguments, source) + [
        f"{source}: {str(name)[:40]!r}: from a file, only sizes, switches and short names that describe an architecture are "
        f"accepted; if you trust it, type it instead: --model-kwargs {one_line(name)[:40]}=VALUE"
        for name in others
    ]


def trusted_arguments(stated: object, typed: dict, file: object) -> tuple[object, list[str]]:
    """Return the arguments that a checkpoint or a folded file states for its model, and faults: arguments that a file may
    not state must be typed too, and typed arguments must equal the stated ones, or the model would be another one."""
    if not isinstance(stated, dict):  # its own check reports it
        return stated, []
    faults = foreign_arguments({name: value for name, value in stated.items() if name not in typed}, file)
    for name, value in typed.items():
        if _never(name):  # already reported
            continue
        if name not in stated:
            faults.append(f"--model-kwargs: {name}: {file} states no such argument; leave it out")
        elif _in_json(value) != stated[name]:
            trained = one_line(repr(stated[name]))[:80]
            faults.append(f"--model-kwargs: {name}: the model of {file} was trained with {trained}; give that value")
    return stated | typed, faults


def _in_json(value: object) -> object:
    """Return a value as it is read back from JSON, which has no tuples."""
    return json.loads(json.dumps(value, default=str))


def _never(name: object) -> str | None:
    """Return why an argument is always refused; None if it is not."""
    is_pretrained = isinstance(name, str) and name.startswith("pretrained")
    return NEVER.get(name, "give --pretrained or --pretrained-file" if is_pretrained else None)


def describes_architecture(name: object, value: object) -> bool:
    """Return whether an argument is known to describe an architecture, and has a plain value."""
    return name in ARCHITECTURE and _is_plain(value, [MOST_VALUES], DEEPEST)


def _is_plain(value: object, left: list[int], depth: int) -> bool:
    """Return whether a value consists of numbers, switches and short names; `left[0]`: how many it may still contain."""
    left[0] -= 1
    if left[0] < 0 or depth == 0:
        return False
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item, left, depth - 1) for item in value)
    if isinstance(value, str):
        return SHORT_NAME.fullmatch(value) is not None
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
