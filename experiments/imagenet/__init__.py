"""ResNet-50 on ImageNet, pruned in one shot: `python -m experiments.imagenet`."""
