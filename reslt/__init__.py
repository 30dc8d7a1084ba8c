"""ResLT (residual learning for long-tailed recognition, TPAMI 2022) on any timm model."""
