"""Networks: CIFAR ResNets (registered with timm on import), the ResLT head on any timm model, folding for inference."""
