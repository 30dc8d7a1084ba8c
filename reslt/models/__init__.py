"""Networks: timm models and CIFAR ResNets with heads, branches, experts and adapters, and their folding for inference."""
